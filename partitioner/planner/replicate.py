"""Where layers leave the mesh: a shortest path over the positions between nodes.

Deep layers are small: their halos cost more than computing them on every rank of an axis would.  A stretch of the
network, from position p to q, is either sharded like the rest or computed by all ranks along some mesh axes:

    0 --- 1 --- ... --- p ================= q --- ... --- n       ===  replicated: what it reads is gathered at p,
                                                                       where it ends every rank takes its own part
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import networkx as nx
import numpy as np
import onnx_ir as ir

from partitioner.cost import bytes_of
from partitioner.curves import FloatArray
from partitioner.layout import Layout
from partitioner.mesh import Mesh
from partitioner.timing import PlanTime

Sent = Callable[[float, int], float]
"""Seconds of so many bytes in so many messages."""

MOST_NODES = 2000
"""Positions that are looked at, at most."""


@dataclass(frozen=True)
class Stretches:
    """The choice for one mesh.

    Args:
        nodes: of the network as it is laid out, before anything is put in between.
        mesh: that of the plan.
        layouts: of the plan's values, by name.
        sharded: seconds of every node there, with the messages before it.
        replicated: the same on the mesh without some axes, by these axes.
        sent: what messages take.
    """

    nodes: Sequence[ir.Node]
    mesh: Mesh
    layouts: Mapping[str, Layout]
    sharded: FloatArray
    replicated: Mapping[tuple[str, ...], FloatArray]
    sent: Sent

    def choose(self) -> dict[str, tuple[str, ...]]:
        """Nodes to compute on all ranks of some axes, by name."""
        count = len(self.nodes)
        if count > MOST_NODES:
            return {}
        graph: nx.DiGraph[int] = nx.DiGraph()
        for index in range(count):
            graph.add_edge(index, index + 1, weight=float(self.sharded[index]), axes=())
        for axes in self.replicated:
            for start, stop, seconds in self._stretches(axes):
                if not graph.has_edge(start, stop) or seconds < graph.edges[start, stop]["weight"]:
                    graph.add_edge(start, stop, weight=seconds, axes=axes)
        found: dict[str, tuple[str, ...]] = {}
        for start, stop in itertools.pairwise(nx.shortest_path(graph, 0, count, weight="weight")):
            axes = graph.edges[start, stop]["axes"]
            found |= {str(node.name): axes for node in self.nodes[start:stop] if axes}
        return found

    def _stretches(self, axes: tuple[str, ...]) -> Iterator[tuple[int, int, float]]:
        """(start, stop, seconds) of those that take less than sharded, all that they read gathered first."""
        gains = np.concatenate([[0.0], np.cumsum(self.sharded - self.replicated[axes])])
        costs = np.concatenate([[0.0], np.cumsum(self.replicated[axes])])
        made = {value: index for index, node in enumerate(self.nodes) for value in node.outputs}
        best = np.maximum.accumulate(gains[::-1])[::-1]
        for start in range(len(self.nodes)):
            gathered: set[ir.Value] = set()
            seconds = 0.0
            for stop in range(start + 1, len(self.nodes) + 1):
                for value in self.nodes[stop - 1].inputs:
                    if value is not None and value not in gathered and made.get(value, -1) < start:
                        gathered.add(value)
                        seconds += self._gather(value, axes)
                if best[stop] - gains[start] <= seconds:
                    break
                if gains[stop] - gains[start] > seconds:
                    yield start, stop, float(costs[stop] - costs[start]) + seconds

    def _gather(self, value: ir.Value, axes: tuple[str, ...]) -> float:
        """Seconds until every rank along the axes has what the others have of a value."""
        layout = self.layouts.get(str(value.name))
        if layout is None or value.dtype is None or value.const_value is not None:
            return 0.0
        peers = math.prod(self.mesh.count(name) for name in layout.mesh_axes & set(axes)) - 1
        part = int(bytes_of(layout, value.dtype, self.mesh).max(initial=0))
        return self.sent(float(part) * peers, peers) if peers else 0.0


def subsets(mesh: Mesh) -> list[tuple[str, ...]]:
    """Mesh axes along which a stretch may be replicated: each alone, and all together."""
    names = [name for name, count in mesh.axes if count > 1]
    return [(name,) for name in names] + ([tuple(names)] if len(names) > 1 else [])


def seconds_by_node(time: PlanTime, nodes: Sequence[ir.Node]) -> FloatArray:
    """Seconds of every node of a network on the slowest rank, with all that its plan puts in before it."""
    place = {str(value.name): index for index, node in enumerate(nodes) for value in node.outputs}
    found, waiting = np.zeros(len(nodes)), 0.0
    for step in time.steps:
        if step.node is None:
            continue
        waiting += float((step.compute + step.communication).max(initial=0.0))
        index = next((place[str(v.name)] for v in step.node.outputs if str(v.name) in place), None)
        if index is not None:
            found[index] += waiting
            waiting = 0.0
    return found
