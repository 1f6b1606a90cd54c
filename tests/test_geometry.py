"""Intervals, pieces and boxes against sets of integers."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from partitioner.geometry import (
    Box,
    Interval,
    Pieces,
    covers,
    extent,
    format_pieces,
    hull,
    intersect,
    local_slices,
    parse_pieces,
    pieces,
    span,
    subtract,
    union,
)

intervals = st.builds(Interval, st.integers(-6, 20), st.integers(-6, 20))
parts = st.lists(intervals, max_size=5).map(pieces)


def cells(given: Pieces) -> set[int]:
    return {i for part in given for i in range(part.start, part.stop)}


def is_normal(given: Pieces) -> bool:
    """Sorted, disjoint, not touching, none empty."""
    return all(given) and all(a.stop < b.start for a, b in itertools.pairwise(given))


@given(st.lists(intervals, max_size=6))
def test_pieces_are_the_union_in_normal_form(given: list[Interval]) -> None:
    found = pieces(given)
    assert is_normal(found)
    assert cells(found) == {i for item in given for i in range(item.start, item.stop)}


@given(parts, parts)
def test_set_operations(one: Pieces, two: Pieces) -> None:
    for found, expected in ((union(one, two), cells(one) | cells(two)),
                            (intersect(one, two), cells(one) & cells(two)),
                            (subtract(one, two), cells(one) - cells(two))):
        assert is_normal(found)
        assert cells(found) == expected
    assert covers(one, two) == (cells(two) <= cells(one))


@given(intervals, intervals, st.integers(-9, 9))
def test_intervals(one: Interval, two: Interval, offset: int) -> None:
    inside, other = set(range(one.start, one.stop)), set(range(two.start, two.stop))
    assert len(one) == len(inside)
    assert bool(one) == bool(inside)
    assert set(range((one & two).start, (one & two).stop)) == inside & other
    assert one.contains(two) == (other <= inside)
    assert set(range(one.shift(offset).start, one.shift(offset).stop)) == {i + offset for i in inside}


@given(parts)
def test_extent_hull_and_text(given: Pieces) -> None:
    assert extent(given) == len(cells(given))
    around = hull(given)
    assert not given or (around.start, around.stop) == (min(cells(given)), max(cells(given)) + 1)
    assert given or not around
    assert parse_pieces(format_pieces(given)) == given


@given(st.integers(-5, 5), st.integers(-5, 5))
def test_span(start: int, stop: int) -> None:
    assert cells(span(start, stop)) == set(range(start, stop))
    assert is_normal(span(start, stop))


@given(parts, parts, st.booleans())
def test_local_slices_find_every_cell_in_its_place(held: Pieces, choice: Pieces, joined: bool) -> None:
    wanted = intersect(held, choice)
    buffer = sorted(cells(held))
    found = local_slices(held, wanted, joined)
    assert [c for s in found for c in buffer[s]] == sorted(cells(wanted))
    if joined:
        assert all(a.stop < b.start for a, b in itertools.pairwise(found)), "slices that touch"
    else:
        assert len(found) == len(wanted), "both ends of a message list the same pieces"


def test_local_slices_refuse_cells_that_are_not_held() -> None:
    with pytest.raises(ValueError, match=r"3:6 .* 0:4\+5:9"):
        local_slices((Interval(0, 4), Interval(5, 9)), (Interval(3, 6),))


boxes = st.lists(parts, min_size=2, max_size=2).map(lambda axes: Box(tuple(axes)))


def box_cells(box: Box) -> set[tuple[int, ...]]:
    return set(itertools.product(*(sorted(cells(axis)) for axis in box)))


@given(boxes, boxes)
def test_boxes(one: Box, two: Box) -> None:
    assert box_cells(one & two) == box_cells(one) & box_cells(two)
    assert one.contains(two) == (box_cells(two) <= box_cells(one))
    assert one.size == len(box_cells(one))
    assert bool(one) == bool(box_cells(one))


def test_a_scalar_is_a_box_of_one_cell() -> None:
    assert Box.whole(()).size == 1
    assert Box.whole(())
    assert Box.whole((3, 0)).size == 0
    assert not Box.whole((3, 0))
