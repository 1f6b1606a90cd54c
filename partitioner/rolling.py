"""Depth-first execution: a few planes at a time go through all layers; in time a halo is a plane kept.

A rolled axis is a mesh axis of one rank along which that rank does not compute everything at once.  The nodes of a
plan fall into stages:

    chain     nodes that take turns, slab after slab along the rolled axis
    between   nodes that need something whole: a merged statistic, what follows from it, a gathered tensor

Within a chain nothing is computed twice.  Before a slab the interval maps say how far every value must have come
(from the chain's ends backwards), and after it which cells a later slab still needs:

    upto(input) = end of   needed([0, upto(output)))          of all its readers
    keep(input) = start of needed([upto(output), extent))

Small planes, as the deep levels of a network have, go several at a time (their grain): a turn has its price, and a
pyramid of levels advances by whole cells of its coarsest one anyway.

What a later stage reads rests: it is kept whole.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from partitioner import dialect
from partitioner.geometry import Interval, hull
from partitioner.maps import AxisMap, identity
from partitioner.ops.nodes import needs_of, reduction_splits

SMALL = 64 << 20
"""Bytes of activations below which nobody goes slab by slab who is not told to."""

LONGEST_GRAIN = 16
"""Cells of the longest axis that a slab thinner than that takes of small planes at once, at most."""

SPARED = 0.25
"""Of a slab, which a portion may be thicker so that none is thinner."""

Item = ir.Node | ir.Value
"""What takes a turn: a node, or an input of the model that is read."""


Ends = dict[ir.Value, int]
"""Per value how far it is along the rolled axis."""


@dataclass(frozen=True)
class Stage:
    """Consecutive nodes of a plan: a chain, or nodes that run once, one after the other."""

    nodes: tuple[ir.Node, ...]
    is_chain: bool


@dataclass(frozen=True)
class Turn:
    """One item's part of a slab.

    Args:
        parts: per output the cells along the rolled axis; None for an output that does not have it.
        taken: for partial results over the rolled axis, the cells of the inputs that go in.
    """

    item: Item
    parts: tuple[Interval | None, ...]
    taken: Interval | None = None


@dataclass(frozen=True)
class Slab:
    """The turns of one slab, and how far every value is when it begins and ends.

    Args:
        kept: per value the first cell that this slab or a later one needs.
        upto: per value the end of what has been computed after it.
        keeps: per value the first cell that a later slab needs.
    """

    turns: tuple[Turn, ...]
    kept: Ends
    upto: Ends
    keeps: Ends


def rolled_axis(value: ir.Value, name: str) -> int | None:
    """The tensor axis of a value that lies along a mesh axis."""
    for axis, split in enumerate(dialect.get_layout(value).axes):
        if split is not None and split.mesh_axis == name:
            return axis
    return None


def takes_turns(node: ir.Node, name: str, strips: Collection[str] = ()) -> bool:
    """Whether a node can be computed slab by slab along a mesh axis; strips meet between chains."""
    if dialect.is_exchange(node):
        source, target = node.inputs[0], node.outputs[0]
        assert source is not None
        axis = rolled_axis(target, name)
        return axis is not None and rolled_axis(source, name) == axis and not _brings_together(node, strips)
    if dialect.is_all_reduce(node):
        return False
    return name in dialect.get_partial(node) or any(rolled_axis(v, name) is not None for v in node.outputs)


def _brings_together(exchange: ir.Node, strips: Collection[str]) -> bool:
    """Whether an exchange takes cells from strip to strip."""
    source, target = exchange.inputs[0], exchange.outputs[0]
    assert source is not None
    pairs = zip(dialect.get_layout(source).axes, dialect.get_layout(target).axes, strict=True)
    return any(a != b and any(split is not None and split.mesh_axis in strips for split in (a, b)) for a, b in pairs)


def order_stages(nodes: Sequence[ir.Node], name: str, strips: Collection[str] = ()) -> list[Stage]:
    """The nodes in an order in which every chain is of one piece.

    Args:
        name: the rolled mesh axis.
        strips: mesh axes whose shards take turns too, stage by stage.
    """
    chains: dict[int, list[ir.Node]] = {}
    between: dict[int, list[ir.Node]] = {}
    after: dict[ir.Value, tuple[int, bool]] = {}  # chain that makes a value, and whether it is there slab by slab
    for node in nodes:
        rolls = takes_turns(node, name, strips)
        chain = 0 if rolls else -1
        for value in node.inputs:
            if value is None or value not in after:
                continue
            made, is_rolled = after[value]
            chain = max(chain, made if is_rolled or not rolls else made + 1)
        (chains if rolls else between).setdefault(chain, []).append(node)
        partial = rolls and all(rolled_axis(v, name) is None for v in node.outputs)
        after |= dict.fromkeys(node.outputs, (chain, rolls and not partial))
    found: list[Stage] = []
    for index in range(-1, max([-1, *chains, *between]) + 1):
        for is_chain, members in ((True, chains.get(index)), (False, between.get(index))):
            if members:
                found.append(Stage(tuple(members), is_chain))
    return found


@dataclass(frozen=True)
class Turns:
    """How often a node takes its turn, and how many cells of its first output, of how many, it computes in all.

    Cells that nobody needs (behind the last window of a strided convolution) are not computed.
    """

    count: int = 1
    cells: int = 1
    extent: int = 1


def count_turns(model: ir.Model) -> dict[ir.Node, Turns]:
    """The turns of every node of a chain; {} for a plan of whole-shard steps."""
    schedule = dialect.get_schedule(model)
    found: dict[ir.Node, Turns] = {}
    if schedule is None:
        return found
    stages = order_stages(list(model.graph), schedule.axis, schedule.strips)
    for stage, thickness in zip((s for s in stages if s.is_chain), schedule.thickness, strict=True):
        chain = Chain(stage.nodes, schedule.axis)
        found |= {node: Turns(0, 0, chain.extent.get(node.outputs[0], 1)) for node in stage.nodes}
        for slab in chain.slabs(thickness):
            for node in (turn.item for turn in slab.turns if isinstance(turn.item, ir.Node)):
                found[node] = replace(found[node], count=found[node].count + 1,
                                      cells=slab.upto.get(node.outputs[0], 1))
    return found


@dataclass(frozen=True)
class Link:
    """Through which map an input of a node depends on one of its outputs (None: on the slab's own progress)."""

    source: ir.Value
    target: ir.Value | None
    map: AxisMap


class Chain:
    """How one chain goes along the rolled axis.

    Args:
        nodes: in the order in which they take turns.
        name: the rolled mesh axis.

    Attributes:
        extent: cells along the rolled axis per value that has it, those from outside included.
        ends: the values that leave the chain, to rest or as outputs, and those of which partial results are taken.
        needed: how far every value must come in all; what is behind that is not computed.
    """

    def __init__(self, nodes: Sequence[ir.Node], name: str) -> None:
        self.nodes = tuple(nodes)
        self.name = name
        members = set(nodes)
        self.links = {node: links_of(node, name) for node in nodes}
        self.extent: dict[ir.Value, int] = {}
        self.ends: set[ir.Value] = set()
        for node in nodes:
            for value in (*(link.source for link in self.links[node]), *node.outputs):
                axis = rolled_axis(value, name)
                if axis is not None:
                    self.extent[value] = dialect.shape_of(value)[axis]
            self.ends |= {link.source for link in self.links[node] if link.target is None}
            for value in node.outputs:
                outside = any(use.node not in members for use in value.uses())
                if value in self.extent and (outside or value.is_graph_output() or not value.uses()):
                    self.ends.add(value)
        self.made = {v for node in nodes for v in node.outputs if v in self.extent}
        self.longest = max(self.extent.values(), default=1)
        self.needed = self._demand({v: self.extent[v] for v in self.ends}, dict.fromkeys(self.extent, 0), {})

    def slabs(self, thickness: int) -> Iterator[Slab]:
        """The slabs, of `thickness` cells of the longest axis each; shorter axes go along in proportion."""
        done = dict.fromkeys(self.extent, 0)
        taken = dict.fromkeys(self.ends, 0)
        kept = dict.fromkeys(self.extent, 0)
        grains = self._grains(thickness)
        for position in range(thickness, self.longest + thickness, thickness):
            share = min(position, self.longest)
            goal = {v: self.extent[v] * share // self.longest for v in self.ends}
            demand = self._demand(goal, done, grains)
            for upto, reached in self._portions(demand, goal, done, taken, thickness, grains):
                turns = tuple(self._turns(done, upto, taken, reached))
                keeps = self._keeps(upto, reached)
                yield Slab(turns, kept, upto, keeps)
                done, taken, kept = upto, reached, keeps

    def _grains(self, thickness: int) -> Ends:
        """Per value the cells that a turn computes at least, where slabs are thinner than a cell of the coarsest value.

        They make up such a cell, unless that is more than half of the bytes that a slab has of the largest value.
        What comes from a finer level goes as that does.
        """
        sizes: dict[int, float] = {}
        for value in self.made:
            assert value.dtype is not None
            size, extent = math.prod(dialect.shape_of(value)) * value.dtype.itemsize, self.extent[value]
            sizes[extent] = max(size, sizes.get(extent, 1.0))
        period = min(LONGEST_GRAIN, self.longest // max(1, min(sizes, default=1)))
        if period <= thickness:
            return {}
        largest, found = max(sizes.values(), default=1.0), dict[ir.Value, int]()
        for node in self.nodes:
            finest = max((self.extent[link.source] for link in self.links[node]), default=0)
            for value in (v for v in node.outputs if v in self.extent):
                size = sizes.get(max(finest, self.extent[value]), largest)
                span = max(thickness, min(int(thickness * largest / (2 * size)), period))
                found[value] = span * self.extent[value] // self.longest
        return found

    def _demand(self, goal: Ends, done: Ends, grains: Ends) -> Ends:
        upto = dict(done)
        for value, cells in goal.items():
            upto[value] = max(upto[value], cells)
        for node in reversed(self.nodes):
            self._keep_step(node, upto)
            for value in node.outputs:
                if value in grains and upto[value] > done[value]:
                    upto[value] = max(upto[value], min(done[value] + grains[value], self.needed[value]))
            for link in self.links[node]:
                if link.target is not None and upto[link.target]:
                    needed = hull(link.map.needed(Interval(0, upto[link.target])))
                    upto[link.source] = max(upto[link.source], needed.stop)
            self._use_up(node, upto)
        return upto

    def _use_up(self, node: ir.Node, upto: Ends) -> None:
        """Let what becomes longer come as far as the cells that it reads allow: several cells are made of one."""
        for target in (v for v in node.outputs if v in self.extent and upto[v]):
            links = [link for link in self.links[node] if link.target is target]
            if links and all(self.extent[link.source] < self.extent[target] for link in links):
                ends = {link.source: hull(link.map.needed(Interval(0, upto[target]))).stop for link in links}
                upto[target] = _furthest(links, ends, upto[target], self.extent[target])

    def _keep_step(self, node: ir.Node, upto: Ends) -> None:
        """Let outputs of the same extent come as far as the furthest of them: kernels make them at once."""
        outputs = [v for v in node.outputs if v in self.extent]
        for value in outputs:
            upto[value] = max(upto[v] for v in outputs if self.extent[v] == self.extent[value])

    def _portions(self, demand: Ends, goal: Ends, done: Ends, taken: Ends, thickness: int,
                  grains: Ends) -> Iterator[tuple[Ends, Ends]]:
        """What is demanded, in portions of the thickness: the first outputs need many cells of the inputs.

        What comes from outside advances by a portion, the last one a little larger rather than thin, everything else as
        far as its inputs allow, by whole grains.
        """
        sources = [v for v in self.extent if v not in self.made]
        most = max(((demand[v] - done[v]) * self.longest / max(1, self.extent[v]) for v in sources), default=0)
        before = done
        for part in range(1, math.ceil(most / thickness - SPARED)):
            upto = {v: done[v] + int((demand[v] - done[v]) * part * thickness / most) for v in sources}
            for node in self.nodes:
                for output in (v for v in node.outputs if v in self.extent):
                    links = [link for link in self.links[node] if link.target is output]
                    end = _furthest(links, upto, before[output], demand[output])
                    waits = before[output] and end < min(before[output] + grains.get(output, 1), demand[output])
                    upto[output] = before[output] if waits else end
            before = upto
            yield upto, {v: max(taken[v], min(goal[v], upto[v])) for v in goal}
        yield demand, goal

    def _turns(self, done: Ends, upto: Ends, taken: Ends, goal: Ends) -> Iterator[Turn]:
        loaded: set[ir.Value] = set()
        for node in self.nodes:
            for link in self.links[node]:
                value = link.source
                if value.is_graph_input() and value not in loaded and done[value] < upto[value]:
                    loaded.add(value)
                    yield Turn(value, (Interval(done[value], upto[value]),))
            sources = [link.source for link in self.links[node] if link.target is None]
            if sources:
                part = Interval(taken[sources[0]], goal[sources[0]])
                if part:
                    yield Turn(node, (None,) * len(node.outputs), part)
                continue
            parts = tuple(Interval(done[v], upto[v]) if v in self.extent else None for v in node.outputs)
            if any(parts):
                yield Turn(node, parts)

    def _keeps(self, upto: Ends, goal: Ends) -> Ends:
        keeps = dict(upto)
        for node in self.nodes:
            for link in self.links[node]:
                if link.target is None:
                    start = goal[link.source]
                else:
                    left = link.map.needed(Interval(upto[link.target], self.extent[link.target]))
                    start = hull(left).start if left else self.extent[link.source]
                keeps[link.source] = min(keeps[link.source], start)
        return keeps


def _furthest(links: Sequence[Link], upto: Ends, low: int, high: int) -> int:
    """The largest end, of those from `low` to `high`, for which all inputs have come far enough."""
    while low < high:
        middle = (low + high + 1) // 2
        if all(hull(link.map.needed(Interval(0, middle))).stop <= upto[link.source] for link in links):
            low = middle
        else:
            high = middle - 1
    return low


def links_of(node: ir.Node, name: str) -> tuple[Link, ...]:
    """How the inputs of a node depend on its outputs along a mesh axis."""
    found: list[Link] = []
    if dialect.is_exchange(node):
        source, target = node.inputs[0], node.outputs[0]
        assert source is not None
        axis = rolled_axis(target, name)
        assert axis is not None
        return (Link(source, target, identity(dialect.shape_of(target)[axis])),)
    partial = name in dialect.get_partial(node)
    splits = reduction_splits(node) if partial else {}
    for index, value in enumerate(node.inputs):
        axis = None if value is None or value.const_value is not None else rolled_axis(value, name)
        if value is None or axis is None:
            continue
        split = splits.get(index, {}).get(axis)
        if split is not None and split.mesh_axis == name:
            found.append(Link(value, None, identity(dialect.shape_of(value)[axis])))
            continue
        for output, target in enumerate(node.outputs):
            out_axis = rolled_axis(target, name)
            needs = needs_of(node, output)[index] if out_axis is not None else None
            if needs is not None and needs[axis].axis == out_axis:
                found.append(Link(value, target, needs[axis].map))
    return tuple(found)
