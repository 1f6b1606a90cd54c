"""Where strips meet: cut points of a network, found as a shortest path.

A rank that takes its shard strip by strip computes the halos of a strip itself, back to the point at which all strips
have met last.  To meet costs that what crosses the point rests whole; not to meet costs that cells near the cuts are
computed by both sides.

    begin ----- p ----- q ----- end      edge (p, q): the cells computed twice between p and q,
                                         and the bytes that come to rest at q
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import networkx as nx
import onnx_ir as ir

from partitioner import dialect
from partitioner.cost import bytes_of, operations
from partitioner.geometry import Interval, hull
from partitioner.ops.nodes import needed_layout, reduction_splits
from partitioner.rolling import links_of, rolled_axis

MOST_POINTS = 64
"""Cut points that are looked at: those that least crosses."""


@dataclass(frozen=True)
class Prices:
    """What the ways to get a halo cost.

    Args:
        operation: seconds of an operation that is done twice.
        byte: seconds of a byte that comes to rest where all meet.
        exchange: seconds of a value's exchange, where ranks meet.
    """

    operation: float
    byte: float
    exchange: float = 0.0


def values_to_recompute(model: ir.Model, strips: Sequence[str], prices: Prices) -> frozenset[str]:
    """The values whose halos strips should compute themselves, so that all costs least.

    Args:
        model: laid out with strips along mesh axes, every halo exchanged.
        prices: what the two ways cost.
    """
    return CutPoints(model, strips).choose(prices)


class CutPoints:
    """The positions between the nodes of a laid-out graph, and what crosses them.

    Args:
        model: laid out with strips, every halo exchanged.
        strips: their mesh axes.
    """

    def __init__(self, model: ir.Model, strips: Sequence[str]) -> None:
        self.nodes = [node for node in model.graph if not _is_halo(node)]
        self.strips = tuple(strips)
        self.inputs = set(model.graph.inputs)
        self.links = {node: {name: links_of(node, name) for name in strips} for node in self.nodes
                      if not dialect.is_communication(node)}
        self.free = {v for v in (*model.graph.inputs, *(o for n in self.nodes for o in n.outputs))
                     if self._is_split(v) and self._is_free(v)}
        mesh = dialect.get_mesh(model)
        self.bytes = {v: int(bytes_of(dialect.get_layout(v), v.dtype, mesh).sum())
                      for n in self.nodes for v in n.outputs if v.dtype is not None and self._is_split(v)}
        self.work = {node: float(operations(node, dialect.get_layout(node.outputs[0]), mesh).sum())
                     for node in self.links}
        self.middle = {name: mesh.count(name) // 2 for name in strips}
        self.crossing = list(self._crossing())

    def choose(self, prices: Prices) -> frozenset[str]:
        """The values that need no meeting when strips meet where it costs least."""
        return self._names(self._path(prices))

    def _path(self, prices: Prices) -> list[int]:
        count = len(self.nodes)
        inner = sorted(range(1, count), key=lambda p: sum(self.bytes[v] for v in self.crossing[p]))[:MOST_POINTS]
        points = sorted({0, count, *inner})
        graph: nx.DiGraph[int] = nx.DiGraph()
        for end in points[1:]:
            for start, twice, exchanged in self._segments(end, points):
                rests = sum(self.bytes[v] for v in self.crossing[end] - self.crossing[start])
                graph.add_edge(start, end, weight=twice * prices.operation + rests * prices.byte
                               + exchanged * prices.exchange)
        return nx.shortest_path(graph, 0, count, weight="weight")

    def _names(self, path: Sequence[int]) -> frozenset[str]:
        met = {v for p in path[1:-1] for v in self.crossing[p]}
        return frozenset(str(v.name) for v in self.free - met)

    def _is_free(self, value: ir.Value) -> bool:
        """Whether strips may compute more of a value than their own cells, along every axis that they cut."""
        places = [rolled_axis(value, name) for name in self.strips]
        return all(can_deepen(value, axis) for axis in places if axis is not None)

    def _is_split(self, value: ir.Value) -> bool:
        return any(rolled_axis(value, name) is not None for name in self.strips)

    def _crossing(self) -> Iterator[frozenset[ir.Value]]:
        """Per position the values made before it and read after it; inputs can be read again."""
        position = {node: index for index, node in enumerate(self.nodes)}
        last = {v: max((position[n] for n in _readers(v) if n in position), default=-1) for v in self.bytes}
        for p in range(len(self.nodes) + 1):
            yield frozenset(v for n in self.nodes[:p] for v in n.outputs if v in last and last[v] >= p)

    def _segments(self, end: int, points: Sequence[int]) -> Iterator[tuple[int, float, int]]:
        """(start, operations done twice from there to the end, halos exchanged there) for every earlier point."""
        held: dict[tuple[ir.Value, str], Interval] = {}
        total = 0.0
        starts = {p for p in points if p < end}
        for index in range(end - 1, -1, -1):
            node = self.nodes[index]
            if node in self.links:
                total += self.work[node] * (self._grow(node, held, self.crossing[end]) - 1)
            if index in starts:
                yield index, total, sum(self._reaches_out(v, held) for v in self.crossing[index])

    def _reaches_out(self, value: ir.Value, held: Mapping[tuple[ir.Value, str], Interval]) -> bool:
        """Whether more of a value is needed than a rank's own cells."""
        pairs = ((self._own(value, name), held.get((value, name))) for name in self.strips)
        return any(own is not None and need is not None and _hull(own, need) != own for own, need in pairs)

    def _grow(self, node: ir.Node, held: dict[tuple[ir.Value, str], Interval], met: frozenset[ir.Value]) -> float:
        """How many times its own cells a node computes; what it needs for them is noted of its inputs."""
        times = 1.0
        output = node.outputs[0]
        for name in self.strips:
            own = self._own(output, name)
            if own is None:
                continue
            grows = output in self.free and output not in met
            found = _hull(own, held.get((output, name))) if grows else own
            times *= len(found) / max(1, len(own))
            for link in self.links[node][name]:
                if link.target is None or found.stop <= found.start:
                    continue
                need = hull(link.map.needed(found))
                source = _made(link.source)
                held[source, name] = _hull(need, held.get((source, name)))
        return times

    def _own(self, value: ir.Value, name: str) -> Interval | None:
        axis = rolled_axis(value, name)
        split = None if axis is None else dialect.get_layout(value).axes[axis]
        return None if split is None else hull(split.parts[self.middle[name]])


def _hull(first: Interval, second: Interval | None) -> Interval:
    if second is None or not second:
        return first
    return second if not first else Interval(min(first.start, second.start), max(first.stop, second.stop))


def _is_halo(node: ir.Node) -> bool:
    return dialect.is_exchange(node) and node.op_type == dialect.HALO_EXCHANGE


def _made(value: ir.Value) -> ir.Value:
    """The value that was computed: before its halo exchange."""
    producer = value.producer()
    if producer is not None and _is_halo(producer) and producer.inputs[0] is not None:
        return producer.inputs[0]
    return value


def _uses(value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    """Readers of a value, also of what a halo exchange makes of it."""
    for use in value.uses():
        if _is_halo(use.node):
            yield from _uses(use.node.outputs[0])
        else:
            yield use.node, use.idx


def _readers(value: ir.Value) -> list[ir.Node]:
    return [node for node, _ in _uses(value)]


def can_deepen(value: ir.Value, axis: int) -> bool:
    """Whether ranks may compute more of a split axis than their own cells, so that readers need no exchange.

    Halo exchanges are looked through.  Kernels with several results make them at once, each as far as it goes.
    """
    producer, split = value.producer(), dialect.get_layout(value).axes[axis]
    if split is None or value.is_graph_output() or not value.uses():
        return False
    if producer is not None and (dialect.is_communication(producer) or len(producer.outputs) > 1):
        return False
    for node, index in _uses(value):
        if dialect.is_communication(node) or axis in reduction_splits(node).get(index, {}):
            return False
        want = needed_layout(node, index)
        wanted = split if want is None else want.axes[axis]
        if wanted is None or wanted.mesh_axis != split.mesh_axis:
            return False
    return True
