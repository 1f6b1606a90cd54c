"""Oracle 1, the algebra: intervals, maps, layouts and exchanges against sets of cells; no torch."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from partitioner.exchange import Exchange, plan_exchange
from partitioner.geometry import (
    Box,
    Interval,
    Pieces,
    covers,
    extent,
    format_pieces,
    intersect,
    local_slices,
    parse_pieces,
    pieces,
    subtract,
    union,
)
from partitioner.layout import AxisLayout, Layout, even_cuts, follow_cuts, parse_layout
from partitioner.maps import AxisMap, Shift, Taps, TransposedWindow, Window, identity
from partitioner.mesh import Mesh

SMALL = st.integers(0, 12)
INTERVALS = st.builds(Interval, SMALL, SMALL)
PIECES = st.lists(INTERVALS, max_size=4).map(pieces)


def cells(parts: Pieces) -> set[int]:
    return {c for part in parts for c in range(part.start, part.stop)}


def is_normal(parts: Pieces) -> bool:
    return all(parts) and all(a.stop < b.start for a, b in itertools.pairwise(parts))


@given(PIECES, PIECES)
def test_pieces_are_sets(a: Pieces, b: Pieces) -> None:
    for found, expected in ((union(a, b), cells(a) | cells(b)), (intersect(a, b), cells(a) & cells(b)),
                            (subtract(a, b), cells(a) - cells(b))):
        assert cells(found) == expected
        assert is_normal(found)
    assert covers(a, b) == (cells(b) <= cells(a))
    assert extent(a) == len(cells(a))
    assert parse_pieces(format_pieces(a)) == a


@given(PIECES, PIECES)
def test_local_slices_find_every_cell(held: Pieces, wanted: Pieces) -> None:
    wanted = intersect(held, wanted)
    stored = [c for part in held for c in range(part.start, part.stop)]
    found = [c for s in local_slices(held, wanted) for c in stored[s]]
    assert found == sorted(cells(wanted))


def test_local_slices_refuse_what_is_not_held() -> None:
    with pytest.raises(ValueError, match="not among"):
        local_slices((Interval(0, 3),), (Interval(2, 4),))


def touched_by_window(window: Window, o: int) -> set[int]:
    taps = {o * window.stride - window.lo + t * window.dilation for t in range(window.kernel)}
    return {i for i in taps if 0 <= i < window.n_in}


def touched_by_transposed(window: TransposedWindow, o: int) -> set[int]:
    return {i for i in range(window.n_in) for t in range(window.kernel)
            if i * window.stride - window.lo + t * window.dilation == o}


@given(st.integers(1, 13), st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.integers(0, 6),
       st.integers(0, 6), st.data())
def test_windows_need_what_they_touch(n: int, k: int, s: int, d: int, lo: int, hi: int, data: st.DataObject) -> None:
    n_out = (n + lo + hi - (k - 1) * d - 1) // s + 1
    if n_out < 1:
        return
    window = Window(n, n_out, k, s, d, lo)
    a = data.draw(st.integers(0, n_out))
    b = data.draw(st.integers(a, n_out))
    needed = cells(window.needed(Interval(a, b)))
    touched = set().union(*(touched_by_window(window, o) for o in range(a, b)), set())
    assert touched <= needed
    if touched and needed:  # the hull and nothing beyond: both its ends lie within the outer windows
        assert min(needed) >= min(0, min(touched)) and len(window.needed(Interval(a, b))) <= 1
        reach = (k - 1) * d + 1
        assert min(needed) >= a * s - lo and max(needed) <= (b - 1) * s - lo + reach - 1


@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.integers(0, 3),
       st.integers(0, 2), st.data())
def test_transposed_windows_need_what_reaches_them(n: int, k: int, s: int, d: int, lo: int, extra: int,
                                                   data: st.DataObject) -> None:
    n_out = (n - 1) * s + (k - 1) * d + 1 + extra - lo
    if n_out < 1:
        return
    window = TransposedWindow(n, n_out, k, s, d, lo)
    a = data.draw(st.integers(0, n_out))
    b = data.draw(st.integers(a, n_out))
    touched = set().union(*(touched_by_transposed(window, o) for o in range(a, b)), set())
    assert touched <= cells(window.needed(Interval(a, b)))


def test_a_transposed_window_may_need_nothing() -> None:
    assert TransposedWindow(4, 10, 1, 3, 1, 0).needed(Interval(1, 3)) == ()


def test_taps_split_only_where_the_order_breaks() -> None:
    wrapped = Taps(10, 14, tuple((i % 10,) for i in range(-2, 12)))
    assert wrapped.needed(Interval(0, 5)) == (Interval(0, 3), Interval(8, 10))
    assert Taps(10, 4, ((0,), (3,), (6,), (9,))).needed(Interval(1, 3)) == (Interval(3, 7),)


MAPS = st.one_of(
    st.builds(lambda n: identity(n), st.integers(1, 20)),
    st.builds(lambda n, k, s: Window(n, (n + 2 * (k // 2) - k) // s + 1, k, s, 1, k // 2),
              st.integers(3, 20), st.integers(1, 3), st.integers(1, 3)),
    st.builds(lambda n, s: TransposedWindow(n, n * s, s, s, 1, 0), st.integers(1, 9), st.integers(1, 3)),
    st.builds(lambda n, o: Shift(n, max(1, n - o), o), st.integers(4, 20), st.integers(0, 3)),
)


@given(MAPS, st.integers(1, 6))
def test_followed_cuts_ascend_and_cover(axis_map: AxisMap, shards: int) -> None:
    found = follow_cuts(even_cuts(axis_map.n_in, shards), axis_map)
    assert found[0] == 0 and found[-1] == axis_map.n_out
    assert list(found) == sorted(found)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=3), st.data())
def test_layouts_read_what_they_print(middle: list[int], data: st.DataObject) -> None:
    cuts = (0, *sorted(middle), 9)
    parts = tuple(data.draw(PIECES) for _ in range(3))
    layout = Layout((4, 9, 7), (None, AxisLayout.from_cuts("depth", cuts), None))
    assert parse_layout(str(layout)) == layout
    assert layout.is_partition
    spread = AxisLayout("width", parts)
    again = parse_layout(str(Layout((12,), (spread,)))).axes[0]
    assert again is not None and (again.parts == parts or spread.cuts is not None)


# --- exchanges: what arrives is what is needed ---------------------------------------------------


@st.composite
def exchanges(draw: st.DrawFn) -> Exchange:
    mesh = Mesh(tuple((name, draw(st.integers(1, 3))) for name in draw(st.sampled_from(
        [("depth",), ("depth", "height"), ("batch", "depth", "width")]))))
    shape = tuple(draw(st.integers(1, 7)) for _ in range(3))
    owned: list[AxisLayout | None] = [None] * 3
    needed: list[AxisLayout | None] = [None] * 3
    for axis, name in zip(draw(st.permutations(range(3))), mesh.names, strict=False):
        if draw(st.booleans()):
            inner = sorted(draw(st.integers(0, shape[axis])) for _ in range(mesh.count(name) - 1))
            owned[axis] = AxisLayout.from_cuts(name, (0, *inner, shape[axis]))
    for axis, name in zip(draw(st.permutations(range(3))), mesh.names, strict=False):
        if draw(st.booleans()):
            cell = st.integers(0, shape[axis])
            bounded = st.lists(st.builds(Interval, cell, cell), max_size=3)
            needed[axis] = AxisLayout(name, tuple(pieces(draw(bounded)) for _ in range(mesh.count(name))))
    return plan_exchange(mesh, Layout(shape, tuple(owned)), Layout(shape, tuple(needed)))


def box_cells(box: Box) -> set[tuple[int, ...]]:
    return set(itertools.product(*(sorted(cells(axis)) for axis in box.axes)))


@given(exchanges())
def test_everyone_gets_what_it_needs_once(exchange: Exchange) -> None:
    mesh = exchange.mesh
    parts = [exchange.for_rank(rank) for rank in mesh]
    for rank in mesh:
        here = mesh.coordinates(rank)
        arrived = [box_cells(parts[rank].keep), *(box_cells(t.box) for t in parts[rank].receives)]
        assert set().union(*arrived) == box_cells(exchange.needed.box(here))
        assert sum(map(len, arrived)) == exchange.needed.box(here).size
        for transfer in parts[rank].receives:
            assert transfer in parts[transfer.source].sends
            assert exchange.owned.box(mesh.coordinates(transfer.source)).contains(transfer.box)
    assert sum(len(p.sends) for p in parts) == sum(len(p.receives) for p in parts)


@given(exchanges())
def test_traffic_from_tables_is_the_sum_of_messages(exchange: Exchange) -> None:
    traffic = exchange.traffic
    parts = [exchange.for_rank(rank) for rank in exchange.mesh]
    assert traffic.sent.reshape(-1).tolist() == [sum(t.box.size for t in p.sends) for p in parts]
    assert traffic.received.reshape(-1).tolist() == [sum(t.box.size for t in p.receives) for p in parts]
    assert traffic.messages.reshape(-1).tolist() == [len(p.sends) for p in parts]


@given(exchanges(), st.integers(0, 2**31))
def test_adjoint(exchange: Exchange, seed: int) -> None:
    """<E x, y> == <x, E' y> over all ranks, in integers."""
    generator = np.random.default_rng(seed)
    mesh = exchange.mesh
    boxes = [(exchange.owned.box(mesh.coordinates(r)), exchange.needed.box(mesh.coordinates(r))) for r in mesh]
    x = [{c: int(generator.integers(-9, 9)) for c in box_cells(own)} for own, _ in boxes]
    y = [{c: int(generator.integers(-9, 9)) for c in box_cells(need)} for _, need in boxes]
    forward = 0
    back: list[dict[tuple[int, ...], int]] = [dict.fromkeys(box_cells(own), 0) for own, _ in boxes]
    for rank in mesh:
        part = exchange.for_rank(rank)
        moves = [(rank, part.keep), *((t.source, t.box) for t in part.receives)]
        for source, box in moves:
            forward += sum(x[source][c] * y[rank][c] for c in box_cells(box))
        for target, box in [(rank, part.keep), *((t.target, t.box) for t in part.adjoint().sends)]:
            for c in box_cells(box):
                back[target][c] += y[rank][c]
    assert forward == sum(x[r][c] * back[r][c] for r in mesh for c in x[r])


def test_corners_travel_in_one_exchange() -> None:
    mesh = Mesh.parse("depth=2,height=2")
    owned = Layout((6, 6), (AxisLayout.from_cuts("depth", (0, 3, 6)), AxisLayout.from_cuts("height", (0, 3, 6))))
    wide = (pieces([Interval(0, 4)]), pieces([Interval(2, 6)]))
    needed = Layout((6, 6), (AxisLayout("depth", wide), AxisLayout("height", wide)))
    part = plan_exchange(mesh, owned, needed).for_rank(0)
    assert [(t.source, t.box.size) for t in part.receives] == [(1, 3), (2, 3), (3, 1)]


def test_a_halo_wider_than_the_neighbour_comes_from_several() -> None:
    mesh = Mesh.parse("depth=4")
    owned = Layout((9,), (AxisLayout.from_cuts("depth", (0, 4, 5, 6, 9)),))
    parts = tuple(pieces([Interval(max(0, a - 3), min(9, b + 3))]) for a, b in ((0, 4), (4, 5), (5, 6), (6, 9)))
    part = plan_exchange(mesh, owned, Layout((9,), (AxisLayout("depth", parts),))).for_rank(0)
    assert [(t.source, str(t.box)) for t in part.receives] == [(1, "[4:5]"), (2, "[5:6]"), (3, "[6:7]")]


def test_ranks_are_row_major() -> None:
    mesh = Mesh.parse({"height": 3, "depth": 2})
    assert str(mesh) == "depth=2,height=3"
    assert [mesh.rank(mesh.coordinates(r)) for r in mesh] == list(range(6))
    assert mesh.coordinates(4) == {"depth": 1, "height": 1}
