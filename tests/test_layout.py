"""Cuts, layouts and their text."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from partitioner.geometry import Interval, Pieces, extent, pieces, span
from partitioner.layout import AxisLayout, Cuts, Layout, even_cuts, follow_cuts, parse_layout
from partitioner.maps import Shift, Window, identity
from partitioner.mesh import AXIS_NAMES


@st.composite
def cuts_of(draw: st.DrawFn, n: int, shards: int) -> Cuts:
    """Cuts anywhere, several at one place too."""
    return (0, *sorted(draw(st.integers(0, n)) for _ in range(shards - 1)), n)


@st.composite
def layouts(draw: st.DrawFn, overlapping: bool) -> Layout:
    """Disjoint shards or parts that overlap, leave cells out, come in pieces."""
    names = draw(st.permutations(AXIS_NAMES))
    shape = draw(st.lists(st.integers(1, 12), max_size=4))
    axes: list[AxisLayout | None] = []
    for n, name in zip(shape, names, strict=False):
        shards = draw(st.integers(1, 4))
        if draw(st.booleans()):
            axes.append(None)
        elif overlapping and draw(st.booleans()):
            parts = [pieces(draw(st.lists(st.builds(Interval, st.integers(0, n), st.integers(0, n)), max_size=3)))
                     for _ in range(shards)]
            axes.append(AxisLayout(name, (*parts, span(n - 1, n))))
        else:
            axes.append(AxisLayout.from_cuts(name, draw(cuts_of(n, shards))))
    return Layout(tuple(shape), tuple(axes))


@given(st.integers(1, 40), st.integers(1, 9))
def test_even_cuts_differ_by_at_most_one(n: int, shards: int) -> None:
    cuts = even_cuts(n, shards)
    sizes = [b - a for a, b in itertools.pairwise(cuts)]
    assert (cuts[0], cuts[-1], len(sizes)) == (0, n, shards)
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


@given(st.integers(1, 20), st.integers(1, 5), st.data())
def test_cuts_of_shards_and_back(n: int, shards: int, data: st.DataObject) -> None:
    cuts = data.draw(cuts_of(n, shards))
    axis = AxisLayout.from_cuts("depth", cuts)
    assert sum(extent(part) for part in axis.parts) == n
    assert axis.cuts == cuts


def test_parts_that_overlap_have_no_cuts() -> None:
    assert AxisLayout("depth", (span(0, 4), span(3, 7))).cuts is None
    assert AxisLayout("depth", (span(0, 3), span(4, 7))).cuts is None
    assert AxisLayout("depth", (pieces([Interval(0, 1), Interval(2, 3)]),)).cuts is None
    assert not Layout((9,), (AxisLayout("depth", (span(0, 4), span(4, 7))),)).is_partition


@given(st.integers(1, 20), st.integers(1, 5), st.data())
def test_cuts_follow_an_operator(n: int, shards: int, data: st.DataObject) -> None:
    cuts = data.draw(cuts_of(n, shards))
    assert follow_cuts(cuts, identity(n)) == cuts
    window = Window(n, (n - 1) // 2 + 1, kernel=3, stride=2, dilation=1, lo=1)
    found = follow_cuts(cuts, window)
    assert list(found) == sorted(found)
    assert (found[0], found[-1], len(found)) == (0, window.n_out, len(cuts))


def test_shards_stay_empty_behind_an_operator() -> None:
    assert follow_cuts((0, 0, 9, 9), Window(9, 5, 3, 2, 1, 1)) == (0, 0, 5, 5)
    assert follow_cuts((0, 4, 9), Shift(9, 6, 3)) == (0, 1, 6)


@given(layouts(overlapping=True), layouts(overlapping=True))
def test_layouts_of_an_axis_join(left: Layout, right: Layout) -> None:
    for a, b in itertools.product(filter(None, left.axes), filter(None, right.axes)):
        if len(a.parts) != len(b.parts):
            continue
        both = a.joined(b)
        assert both.mesh_axis == a.mesh_axis
        assert both.covers(a) and both.covers(b)
        assert [_cells(part) for part in both.parts] == [_cells(p) | _cells(q)
                                                         for p, q in zip(a.parts, b.parts, strict=True)]
        whole = both.in_one_piece
        assert whole.covers(both) and all(len(part) <= 1 for part in whole.parts)
        assert [bool(part) for part in whole.parts] == [bool(part) for part in both.parts]


def _cells(parts: Pieces) -> set[int]:
    return {cell for i in parts for cell in range(i.start, i.stop)}


def test_shards_follow_an_operator() -> None:
    window = Window(9, 5, 3, 2, 1, 1)
    assert AxisLayout.from_cuts("depth", (0, 4, 9)).followed(window) == AxisLayout.from_cuts("depth", (0, 2, 5))
    with pytest.raises(ValueError, match="has no cuts"):
        AxisLayout("depth", (span(0, 5), span(4, 9))).followed(window)


@given(layouts(overlapping=True))
def test_text_round_trip(layout: Layout) -> None:
    found = parse_layout(str(layout))
    assert found == layout
    assert str(found) == str(layout)


@given(layouts(overlapping=False))
def test_partitions(layout: Layout) -> None:
    assert layout.is_partition
    assert layout.is_replicated == (not layout.mesh_axes)
    assert Layout.replicated(layout.shape).box({}).shape == layout.shape


@pytest.mark.parametrize("text", ["", "depth(0|5)", "[depth(5|0)]", "[depth(1|5)]", "[a]", "[depth()]", "[depth(0:x)]",
                                  "[3, depth(0:2:4)]", "[depth(0 5)]"])
def test_text_that_is_no_layout(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_layout(text)
