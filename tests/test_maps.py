"""Interval maps against taps enumerated one by one."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from partitioner.geometry import Interval, Pieces
from partitioner.maps import (
    AxisMap,
    Identity,
    Rows,
    Shift,
    Taps,
    TransposedWindow,
    Whole,
    WholeAligned,
    Window,
    ceil_div,
    identity,
)

small = st.integers(1, 5)
extents = st.integers(1, 14)


def cells(parts: Pieces) -> set[int]:
    return {i for part in parts for i in range(part.start, part.stop)}


def clip(wanted: set[int], n: int) -> set[int]:
    return {i for i in wanted if 0 <= i < n}


def around(found: set[int]) -> set[int]:
    return set(range(min(found), max(found) + 1)) if found else set()


@st.composite
def outs(draw: st.DrawFn, n_out: int) -> Interval:
    """An interval of the output, empty ones too."""
    start = draw(st.integers(0, n_out))
    return Interval(start, draw(st.integers(start, n_out)))


@st.composite
def windows(draw: st.DrawFn) -> Window:
    """Windows with any padding: some lie in the padding altogether."""
    n, k, s, d, lo, hi = (draw(v) for v in (extents, small, small, small, st.integers(0, 9), st.integers(0, 9)))
    room = n + lo + hi - (k - 1) * d - 1
    return Window(n, max(1, room // s + 1), k, s, d, lo)


@st.composite
def transposed(draw: st.DrawFn) -> TransposedWindow:
    """Transposed windows, kernels shorter than strides and output padding included."""
    n, k, s, d, lo, extra = (draw(v) for v in (extents, small, small, small, st.integers(0, 3), st.integers(0, 4)))
    return TransposedWindow(n, max(1, (n - 1) * s + (k - 1) * d + 1 - lo + extra), k, s, d, lo)


taps = st.builds(
    lambda rows: Taps(14, len(rows), tuple(tuple(sorted(row)) for row in rows)),
    st.lists(st.lists(st.integers(0, 13), max_size=3), min_size=1, max_size=12))


@given(windows(), st.data())
def test_window(window: Window, data: st.DataObject) -> None:
    out = data.draw(outs(window.n_out))
    touched = {o * window.stride - window.lo + t * window.dilation
               for o in range(out.start, out.stop) for t in range(window.kernel)}
    assert cells(window.needed(out)) == clip(around(touched), window.n_in)


@given(windows(), st.data())
def test_what_clipping_cuts_off_is_the_padding(window: Window, data: st.DataObject) -> None:
    out = data.draw(outs(window.n_out))
    if not out:
        return
    want, held = window.unclipped(out), window.needed(out)
    inside = [i for i in range(want.start, want.stop) if 0 <= i < window.n_in]
    assert sorted(cells(held)) == inside


@given(transposed(), st.data())
def test_transposed_window(window: TransposedWindow, data: st.DataObject) -> None:
    out = data.draw(outs(window.n_out))
    reached = {i: range(i * window.stride - window.lo, i * window.stride - window.lo + window.reach)
               for i in range(window.n_in)}
    touching = {i for i, span in reached.items() if any(o in span for o in range(out.start, out.stop))}
    assert cells(window.needed(out)) == touching


def test_outputs_that_no_input_reaches_need_nothing() -> None:
    window = TransposedWindow(3, 8, kernel=1, stride=3, dilation=1, lo=0)
    assert window.needed(Interval(1, 3)) == ()
    assert window.needed(Interval(1, 4)) == (Interval(1, 2),)
    assert window.needed(Interval(7, 8)) == ()


def test_windows_in_the_padding_need_nothing() -> None:
    window = Window(3, 9, kernel=1, stride=1, dilation=1, lo=3)
    assert window.needed(Interval(0, 3)) == ()
    assert window.needed(Interval(2, 4)) == (Interval(0, 1),)
    assert window.needed(Interval(6, 9)) == ()


@given(extents, extents, st.integers(-9, 9), st.data())
def test_shift(n_in: int, n_out: int, offset: int, data: st.DataObject) -> None:
    shift = Shift(n_in, n_out, offset)
    out = data.draw(outs(n_out))
    assert cells(shift.needed(out)) == clip({o + offset for o in range(out.start, out.stop)}, n_in)


@given(taps, st.data())
def test_taps(rows: Taps, data: st.DataObject) -> None:
    """All that is touched; between the pieces of a monotone map the gaps too, so that it stays one piece."""
    out = data.draw(outs(rows.n_out))
    touched = {i for o in range(out.start, out.stop) for i in rows.rows[o]}
    needed = cells(rows.needed(out))
    assert touched <= needed <= around(touched)


def test_taps_that_jump_need_pieces() -> None:
    wrapped = Taps(5, 7, tuple((i % 5,) for i in range(-1, 6)))
    assert wrapped.needed(Interval(0, 3)) == (Interval(0, 2), Interval(4, 5))


@given(extents, st.data())
def test_identity_and_whole(n: int, data: st.DataObject) -> None:
    out = data.draw(outs(n))
    everything = set(range(n)) if out else set()
    assert cells(identity(n).needed(out)) == set(range(out.start, out.stop))
    assert cells(Whole(n, n).needed(out)) == everything
    assert cells(WholeAligned(n, n).needed(out)) == everything


@st.composite
def flattened(draw: st.DrawFn) -> Rows:
    """Rows of several cells under transposed windows."""
    rows, inner = draw(transposed()), draw(small)
    return Rows(rows.n_in * inner, rows.n_out, rows, inner)


@given(flattened(), st.data())
def test_rows(flat: Rows, data: st.DataObject) -> None:
    out = data.draw(outs(flat.n_out))
    wanted = cells(flat.rows.needed(out))
    assert cells(flat.needed(out)) == {i * flat.inner + j for i in wanted for j in range(flat.inner)}


maps = st.one_of(
    windows(), transposed(), taps, flattened(),
    st.builds(Shift, extents, extents, st.integers(-9, 9)),
    extents.map(identity), st.builds(Whole, extents, extents), extents.map(lambda n: WholeAligned(n, n)))


@given(maps)
def test_cuts_follow_in_order_and_in_range(axis_map: AxisMap) -> None:
    followed = [axis_map.follow(cut) for cut in range(-2, axis_map.n_in + 3)]
    assert followed == sorted(followed)
    assert followed[0] == 0
    assert followed[-1] == axis_map.n_out
    assert axis_map.follow(0) == 0
    assert axis_map.follow(axis_map.n_in) == axis_map.n_out


@given(maps, st.data())
def test_needs_of_parts_together_are_their_union(axis_map: AxisMap, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, axis_map.n_out))
    one, two = Interval(0, cut), Interval(cut, axis_map.n_out)
    assert cells(axis_map.needed_by((one, two))) == cells(axis_map.needed(one)) | cells(axis_map.needed(two))
    assert axis_map.needed_by(()) == ()


@given(maps)
def test_identity_is_told_from_all_else(axis_map: AxisMap) -> None:
    each = [axis_map.needed(Interval(o, o + 1)) for o in range(axis_map.n_out)]
    same = axis_map.n_in == axis_map.n_out and each == [(Interval(o, o + 1),) for o in range(axis_map.n_out)]
    assert same or not axis_map.is_identity
    assert axis_map.is_identity or not isinstance(axis_map, Identity)


@given(st.integers(-50, 50), st.integers(1, 9))
def test_ceil_div(a: int, b: int) -> None:
    assert ceil_div(a, b) == math.ceil(a / b)


def test_a_stride_of_two_keeps_its_phase_across_a_cut() -> None:
    """k3 s2 p1 on 9 + 9 cells: 9 outputs, of which 5 begin in the first half."""
    window = Window(18, 9, kernel=3, stride=2, dilation=1, lo=1)
    assert window.follow(9) == 5
    assert window.needed(Interval(0, 5)) == (Interval(0, 10),)
    assert window.needed(Interval(5, 9)) == (Interval(9, 18),)


def test_deeper_halos_are_clipped_at_every_layer() -> None:
    """Two 3x convolutions: the intermediate value never holds a cell outside the image."""
    conv = Window(10, 10, kernel=3, stride=1, dilation=1, lo=1)
    assert conv.needed_by(conv.needed(Interval(0, 4))) == (Interval(0, 6),)
    assert conv.needed_by(conv.needed(Interval(4, 7))) == (Interval(2, 9),)
