"""Which buffer holds which value, and from which step to which: the same for every rank.

A halo exchange adds its halo to the buffer that already holds the owned cells: the value before and the
value after share one buffer of the larger extents, and nothing is copied.  A view (reshape, crop) keeps
the buffer of its input alive instead of taking one of its own.  What works cell by cell on a value that nobody
reads any more takes its memory, and a part of a concatenation is computed where it will lie.  What an overlapped
exchange sends stays until the node that computes meanwhile is done.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from partitioner import dialect
from partitioner.inplace import Place, find_in_place, find_placed
from partitioner.interior import Overlap, find_overlaps
from partitioner.layout import Layout
from partitioner.ops.nodes import operator_of

Shifts = tuple[tuple[int, int], ...]
"""Axes, and by how many cells a value is moved along them in its buffer."""


@dataclass(frozen=True)
class Buffer:
    """Memory for one value and those that share it.

    Args:
        layout: the cells that every rank keeps room for.
        born: the step that fills it; -1 for what is there before the first.
        dies: the last step that reads it; the number of steps for what leaves the graph at the end.
        base: the buffer of which this is a view, if it is one.
    """

    name: str
    layout: Layout
    dtype: ir.DataType
    born: int
    dies: int
    base: str | None = None


@dataclass(frozen=True)
class Lifetimes:
    """Buffers in the order in which they are born, the buffer of every value, and the overlaps of steps."""

    buffers: dict[str, Buffer]
    buffer_of: dict[str, str]
    overlaps: dict[ir.Node, Overlap] = field(default_factory=dict[ir.Node, Overlap])
    shifts: dict[str, Shifts] = field(default_factory=dict[str, Shifts])

    def released_after(self, step: int) -> tuple[str, ...]:
        """Buffers that no later step reads."""
        return tuple(b.name for b in self.buffers.values() if b.dies == step)


def find_lifetimes(model: ir.Model, in_place: bool = True) -> Lifetimes:
    """Buffers of a plan whose steps are its nodes in order.

    Args:
        in_place: whether what works cell by cell takes the memory of its input; not for training.
    """
    nodes = list(model.graph)
    position = {node: index for index, node in enumerate(nodes)}
    homes = _Homes(shared_buffers(nodes), find_in_place(model, nodes, position) if in_place else {},
                   find_placed(model, nodes, position) if in_place else {})
    buffer_of: dict[str, str] = {}
    shifts: dict[str, Shifts] = {}
    born: dict[str, tuple[int, ir.Value]] = {}
    for step, values in [*_inputs(model, position), *((i, n.outputs) for i, n in enumerate(nodes))]:
        for value in values:
            name, shift = homes.of(str(value.name))
            buffer_of[str(value.name)] = name
            if shift:
                shifts[str(value.name)] = shift
            if name not in born or step < born[name][0]:
                born[name] = (step, value)
    overlaps = find_overlaps(model)
    over = position | {exchange: position[o.node] for o in overlaps.values() for exchange in o.exchanges}
    dies = _last_reads(model, nodes, over, buffer_of)
    bases = _views(nodes, buffer_of, homes.shared)
    for name, base in reversed(bases.items()):
        dies[base] = max(dies.get(base, -1), dies.get(name, -1))
    return Lifetimes(_make_buffers(model, buffer_of, born, dies, bases), buffer_of, overlaps, shifts)


def _inputs(model: ir.Model, position: dict[ir.Node, int]) -> list[tuple[int, Sequence[ir.Value]]]:
    """Inputs are read from their files just before their first use."""
    return [(min((position[u.node] for u in v.uses()), default=0), [v]) for v in model.graph.inputs]


def shared_buffers(nodes: Sequence[ir.Node]) -> dict[str, str]:
    """Value before a halo exchange -> value after it, where one buffer serves both."""
    found: dict[str, str] = {}
    for node in nodes:
        if not dialect.is_exchange(node) or node.op_type != dialect.HALO_EXCHANGE:
            continue
        source, target = node.inputs[0], node.outputs[0]
        assert source is not None
        if str(source.name) not in found and _contains(dialect.get_layout(target), dialect.get_layout(source)):
            found[str(source.name)] = str(target.name)
    return found


@dataclass(frozen=True)
class _Homes:
    """Where values lie.

    Args:
        shared: value before a halo exchange -> value after it.
        taken: value -> the one that takes its memory.
        placed: value -> the one of which it becomes a part.
    """

    shared: Mapping[str, str]
    taken: Mapping[str, str]
    placed: Mapping[str, Place]

    def of(self, name: str) -> tuple[str, Shifts]:
        """The buffer of a value, and how far it is moved there."""
        shifts: list[tuple[int, int]] = []
        while name in self.taken or name in self.placed:
            if name in self.taken:
                name = self.taken[name]
                continue
            place = self.placed[name]
            shifts.append((place.axis, place.start))
            name = place.value
        return self.shared.get(name, name), tuple(shifts)


def _contains(outer: Layout, inner: Layout) -> bool:
    """Whether every rank keeps all its owned cells, in one piece."""
    for a, b in zip(outer.axes, inner.axes, strict=True):
        if a is None or b is None:
            if a is not b:
                return False
        elif a.mesh_axis != b.mesh_axis or not a.covers(b):
            return False
    return True


def _last_reads(model: ir.Model, nodes: Sequence[ir.Node], position: dict[ir.Node, int],
                buffer_of: dict[str, str]) -> dict[str, int]:
    dies: dict[str, int] = {}
    for node in nodes:
        for value in node.inputs:
            if value is not None and str(value.name) in buffer_of:
                name = buffer_of[str(value.name)]
                dies[name] = max(dies.get(name, -1), position[node])
        for value in node.outputs:
            name = buffer_of[str(value.name)]
            dies[name] = max(dies.get(name, -1), position[node])
    for value in model.graph.outputs:
        producer = value.producer()
        name = buffer_of[str(value.name)]
        dies[name] = max(dies.get(name, -1), 0 if producer is None else position[producer])
    return dies


def _views(nodes: Sequence[ir.Node], buffer_of: dict[str, str], shared: Mapping[str, str]) -> dict[str, str]:
    """Buffers that are views -> the buffer that they look at."""
    found: dict[str, str] = {}
    for node in nodes:
        if dialect.is_communication(node) or not operator_of(node).is_view:
            continue
        source, result = node.inputs[0], node.outputs[0]
        if source is not None and str(source.name) in buffer_of and str(result.name) not in shared:
            found[buffer_of[str(result.name)]] = buffer_of[str(source.name)]
    return found


def _make_buffers(model: ir.Model, buffer_of: dict[str, str], born: dict[str, tuple[int, ir.Value]],
                  dies: dict[str, int], bases: dict[str, str]) -> dict[str, Buffer]:
    holders = {str(v.name): v for v in (*model.graph.inputs, *(o for n in model.graph for o in n.outputs))}
    found: dict[str, Buffer] = {}
    for name, (step, value) in born.items():
        holder = holders[name]
        assert value.dtype is not None
        found[name] = Buffer(name, dialect.get_layout(holder), value.dtype, step, dies.get(name, step), bases.get(name))
    return found
