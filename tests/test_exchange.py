"""The exchange planner, held against sets of cells: what arrives is what was needed, once, from one who owned it."""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partitioner.exchange import Exchange, RankExchange, plan_exchange
from partitioner.geometry import Box, Interval, Pieces, pieces, span
from partitioner.layout import AxisLayout, Layout, even_cuts, parse_layout
from partitioner.maps import Window
from partitioner.mesh import AXIS_NAMES, Mesh

Cell = tuple[int, ...]


def cells(box: Box) -> set[Cell]:
    return set(itertools.product(*([i for p in axis for i in range(p.start, p.stop)] for axis in box)))


@st.composite
def parts(draw: st.DrawFn, n: int) -> Pieces:
    """Nothing, one interval or several."""
    return pieces(draw(st.lists(st.builds(Interval, st.integers(0, n), st.integers(0, n)), max_size=3)))


@st.composite
def layouts(draw: st.DrawFn, mesh: Mesh, shape: tuple[int, ...], disjoint: bool) -> Layout:
    """Some tensor axes over some mesh axes; uneven cuts with empty shards, or any parts at all."""
    names = draw(st.permutations(mesh.names))
    axes: list[AxisLayout | None] = []
    for n, name in itertools.zip_longest(shape, names[: len(shape)]):
        if name is None or draw(st.integers(0, 2)) == 0:
            axes.append(None)
        elif disjoint or draw(st.booleans()):
            inner = sorted(draw(st.integers(0, n)) for _ in range(mesh.count(name) - 1))
            axes.append(AxisLayout.from_cuts(name, (0, *inner, n)))
        else:
            axes.append(AxisLayout(name, tuple(draw(parts(n)) for _ in range(mesh.count(name)))))
    return Layout(shape, tuple(axes))


@st.composite
def exchanges(draw: st.DrawFn) -> Exchange:
    """Halos, re-layouts from axis to axis, gathers, scatters and all between."""
    counts = draw(st.dictionaries(st.sampled_from(AXIS_NAMES), st.integers(1, 3), max_size=3))
    mesh = Mesh.parse(counts)
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    return plan_exchange(mesh, draw(layouts(mesh, shape, disjoint=True)), draw(layouts(mesh, shape, disjoint=False)))


@given(exchanges())
@settings(max_examples=300, deadline=None)
def test_what_arrives_is_what_was_needed(exchange: Exchange) -> None:
    for rank in exchange.mesh:
        here = exchange.mesh.coordinates(rank)
        needed = exchange.needed.box(here)
        part = exchange.for_rank(rank)
        arrived = Counter(cells(part.keep))
        for transfer in part.receives:
            assert transfer.target == rank != transfer.source
            owner = exchange.owned.box(exchange.mesh.coordinates(transfer.source))
            assert cells(transfer.box) <= cells(owner), "nobody sends what it does not own"
            assert transfer.box, "no empty messages"
            arrived.update(cells(transfer.box))
        assert set(arrived) == cells(needed)
        assert set(arrived.values()) <= {1}, "every cell comes once"
        assert cells(part.keep) == cells(exchange.owned.box(here)) & cells(needed), "what is here stays here"


@given(exchanges())
@settings(max_examples=200, deadline=None)
def test_sends_and_receives_are_the_same_messages(exchange: Exchange) -> None:
    ranks = [exchange.for_rank(rank) for rank in exchange.mesh]
    sends = [t for part in ranks for t in part.sends]
    receives = [t for part in ranks for t in part.receives]
    assert Counter(sends) == Counter(receives)
    assert len({(t.source, t.target) for t in sends}) == len(sends), "one message per pair"
    for rank, part in enumerate(ranks):
        assert all(t.source == rank for t in part.sends)
        assert [t.target for t in part.sends] == sorted(t.target for t in part.sends)
        assert [t.source for t in part.receives] == sorted(t.source for t in part.receives)


@given(exchanges())
@settings(max_examples=200, deadline=None)
def test_traffic_is_the_sum_over_ranks(exchange: Exchange) -> None:
    ranks = [exchange.for_rank(rank) for rank in exchange.mesh]
    traffic = exchange.traffic
    assert traffic.sent.shape == traffic.received.shape == traffic.messages.shape == exchange.mesh.shape
    assert traffic.sent.ravel().tolist() == [sum(t.box.size for t in part.sends) for part in ranks]
    assert traffic.received.ravel().tolist() == [sum(t.box.size for t in part.receives) for part in ranks]
    assert traffic.messages.ravel().tolist() == [len(part.sends) for part in ranks]
    assert exchange.is_empty == (not any(part.sends for part in ranks))
    assert traffic.total == traffic.received.sum()


Shards = list[dict[Cell, int]]
"""Per rank the cells that it holds and their values."""


def carry(exchange: Exchange, owned: Shards) -> Shards:
    """E: from what every rank owns to what every rank needs."""
    found: Shards = []
    for rank in exchange.mesh:
        part = exchange.for_rank(rank)
        held = {cell: owned[rank][cell] for cell in cells(part.keep)}
        for transfer in part.receives:
            held |= {cell: owned[transfer.source][cell] for cell in cells(transfer.box)}
        found.append(held)
    return found


def carry_back(exchange: Exchange, needed: Shards) -> Shards:
    """E': the reversed messages, received cells added."""
    parts: list[RankExchange] = [exchange.for_rank(rank).adjoint() for rank in exchange.mesh]
    found: Shards = [dict.fromkeys(cells(exchange.owned.box(exchange.mesh.coordinates(r))), 0) for r in exchange.mesh]
    for rank, part in enumerate(parts):
        for cell in cells(part.keep):
            found[rank][cell] += needed[rank][cell]
        for transfer in part.receives:
            assert transfer.target == rank
            assert transfer in parts[transfer.source].sends
            for cell in cells(transfer.box):
                found[rank][cell] += needed[transfer.source][cell]
    return found


def inner(one: Shards, two: Shards) -> int:
    return sum(value * two[rank][cell] for rank, shard in enumerate(one) for cell, value in shard.items())


@given(exchanges(), st.integers(0, 2**16))
@settings(max_examples=200, deadline=None)
def test_adjoint(exchange: Exchange, seed: int) -> None:
    """<E x, y> = <x, E' y> for whole numbers, exactly."""
    random = np.random.default_rng(seed)

    def draw(layout: Layout) -> Shards:
        return [{cell: int(random.integers(-9, 10)) for cell in sorted(cells(layout.box(exchange.mesh.coordinates(r))))}
                for r in exchange.mesh]

    x, y = draw(exchange.owned), draw(exchange.needed)
    assert inner(carry(exchange, x), y) == inner(x, carry_back(exchange, y))


def messages(exchange: Exchange, rank: int) -> dict[int, str]:
    return {t.source: str(t.box) for t in exchange.for_rank(rank).receives}


def test_corners_come_from_the_diagonal() -> None:
    mesh = Mesh.parse("height=2,width=2")
    exchange = plan_exchange(mesh, parse_layout("[height(0|4|9), width(0|3|7)]"),
                             parse_layout("[height(0:5 3:9), width(0:4 2:7)]"))
    assert messages(exchange, 0) == {1: "[0:4, 3:4]", 2: "[4:5, 0:3]", 3: "[4:5, 3:4]"}
    assert messages(exchange, 3) == {0: "[3:4, 2:3]", 1: "[3:4, 3:7]", 2: "[4:9, 2:3]"}


def test_halos_wider_than_the_neighbour_reach_beyond_it() -> None:
    mesh = Mesh.parse("width=4")
    exchange = plan_exchange(mesh, parse_layout("[width(0|5|6|7|12)]"), parse_layout("[width(0:8 2:9 3:10 4:12)]"))
    assert messages(exchange, 0) == {1: "[5:6]", 2: "[6:7]", 3: "[7:8]"}
    assert messages(exchange, 3) == {0: "[4:5]", 1: "[5:6]", 2: "[6:7]"}


def test_empty_shards_neither_send_nor_need() -> None:
    mesh = Mesh.parse("width=3")
    exchange = plan_exchange(mesh, parse_layout("[width(0|4|4|9)]"), parse_layout("[width(0:5 - 3:9)]"))
    assert messages(exchange, 0) == {2: "[4:5]"}
    assert messages(exchange, 1) == {}
    assert exchange.traffic.sent.tolist() == [1, 0, 1]


def test_from_one_mesh_axis_to_another() -> None:
    mesh = Mesh.parse("height=2,width=2")
    exchange = plan_exchange(mesh, parse_layout("[height(0|2|4), 4]"), parse_layout("[4, width(0|2|4)]"))
    for rank in mesh:
        here = mesh.coordinates(rank)
        assert all(mesh.coordinates(t.source)["width"] == here["width"] for t in exchange.for_rank(rank).receives)
        assert sum(t.box.size for t in exchange.for_rank(rank).receives) == 4


def test_replicas_each_keep_to_their_own_group() -> None:
    """What all ranks along an axis hold alike is not sent along it."""
    mesh = Mesh.parse("depth=2,width=3")
    exchange = plan_exchange(mesh, parse_layout("[depth(0|3|6)]"), parse_layout("[depth(0:4 2:6)]"))
    assert exchange.traffic.messages.tolist() == [[1, 1, 1], [1, 1, 1]]
    assert messages(exchange, 1) == {4: "[3:4]"}


def test_a_convolution_moves_one_plane_per_face() -> None:
    """Nothing along axes that are not split, nothing at the border."""
    mesh = Mesh.parse("depth=4")
    n = 61
    owned = Layout((1, 8, n, 33, 29), (None, None, AxisLayout.from_cuts("depth", even_cuts(n, 4)), None, None))
    window = Window(n, n, kernel=3, stride=1, dilation=1, lo=1)
    split = owned.axes[2]
    assert split is not None
    needed = owned.with_axis(2, AxisLayout("depth", tuple(window.needed_by(p) for p in split.parts)))
    traffic = plan_exchange(mesh, owned, needed).traffic
    plane = 8 * 33 * 29
    assert traffic.sent.tolist() == [plane, 2 * plane, 2 * plane, plane]
    assert traffic.messages.tolist() == [1, 2, 2, 1]


def test_layouts_that_do_not_fit_are_refused() -> None:
    mesh = Mesh.parse("depth=2")
    with pytest.raises(ValueError, match="different tensors"):
        plan_exchange(mesh, parse_layout("[4]"), parse_layout("[5]"))
    with pytest.raises(ValueError, match="overlap or leave cells out"):
        plan_exchange(mesh, parse_layout("[depth(0:3 2:5)]"), parse_layout("[5]"))
    with pytest.raises(ValueError, match="overlap or leave cells out"):
        plan_exchange(mesh, Layout((5,), (AxisLayout("depth", (span(0, 2), span(3, 5))),)), parse_layout("[5]"))


def test_4096_ranks_cost_what_their_neighbours_cost() -> None:
    """Tables per axis: the traffic of 16x16x16 ranks and one rank's messages take no walk over all pairs."""
    mesh = Mesh.parse("16x16x16")
    shape = (1, 4, 160, 160, 160)
    owned, needed = Layout.replicated(shape), Layout.replicated(shape)
    for axis, name in zip((2, 3, 4), mesh.names, strict=True):
        split = AxisLayout.from_cuts(name, even_cuts(160, 16))
        halo = AxisLayout(name, tuple(span(max(0, p[0].start - 1), min(160, p[0].stop + 1)) for p in split.parts))
        owned, needed = owned.with_axis(axis, split), needed.with_axis(axis, halo)
    start = time.perf_counter()
    exchange = plan_exchange(mesh, owned, needed)
    middle = mesh.rank({"depth": 7, "height": 8, "width": 9})
    assert len(exchange.for_rank(middle).receives) == 26
    assert exchange.traffic.messages[7, 8, 9] == 26
    assert exchange.traffic.sent[7, 8, 9] == 4 * (12**3 - 10**3)
    assert exchange.traffic.messages[0, 0, 0] == 7
    assert time.perf_counter() - start < 2
    assert math.prod(exchange.traffic.sent.shape) == 4096
