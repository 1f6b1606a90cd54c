"""What a plan costs every rank, from boxes alone: memory over time, bytes and messages on the wire.

Figures are arrays of the mesh's shape, built from per-axis tables: 4096 ranks cost what 16+16+16 cost.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from partitioner import dialect
from partitioner.exchange import REMEMBERED, IntArray, plan_exchange
from partitioner.garbage import kept_for_later
from partitioner.layout import Layout
from partitioner.lifetime import Buffer, Lifetimes, find_lifetimes
from partitioner.mesh import Mesh
from partitioner.ops.fused import BLOCK, block_workspace, starts
from partitioner.ops.nodes import needed_by_part, needed_layout, operator_of
from partitioner.rolling import Turns, count_turns

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

FloatArray = NDArray[np.float64]
Step = TypeVar("Step", bound="DataclassInstance")


@dataclass(frozen=True)
class StepCost:
    """One node's cost per rank.

    Args:
        sent, received: bytes on the wire.
        messages: messages sent.
        flops: floating-point operations.
        live: bytes of activations alive while the node runs, workspace included.
        workspace: bytes that the step needs beside the buffers.
    """

    node: ir.Node
    sent: IntArray
    received: IntArray
    messages: IntArray
    flops: FloatArray
    live: IntArray
    workspace: IntArray


class Shared:
    """Steps whose equal figures are one array: networks repeat their layers, and many ranks have long arrays."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, bytes], NDArray[Any]] = {}

    def step(self, step: Step) -> Step:
        """The same step, a dataclass; its arrays are not to be written to."""
        found = {field.name: getattr(step, field.name) for field in fields(step)}
        return replace(step, **{n: self._once(a) for n, a in found.items() if isinstance(a, np.ndarray)})

    def _once(self, array: NDArray[Any]) -> NDArray[Any]:
        if array.size < _LONG:
            return array
        digest = hashlib.blake2b(array.tobytes(), digest_size=16).digest()
        return self._known.setdefault((array.dtype.str, digest), array)


_LONG = 256
"""Ranks from which equal figures are looked for."""


@dataclass(frozen=True)
class PlanCost:
    """All steps of a plan, and the totals per rank.

    Args:
        slab_peak: peak activation memory per rank of a plan that is executed depth-first.
        slab_peak_together: that of all ranks in one process.
    """

    mesh: Mesh
    steps: tuple[StepCost, ...]
    weight_bytes: int
    slab_peak: IntArray | None = None
    slab_peak_together: int = 0

    @property
    def peak(self) -> IntArray:
        """Peak activation memory per rank, in bytes."""
        if self.slab_peak is not None:
            return self.slab_peak
        return np.max([s.live for s in self.steps], axis=0, initial=0)

    @property
    def peak_together(self) -> int:
        """Peak activation memory of all ranks in one process, in bytes: one rank computes at a time."""
        if self.slab_peak is not None:
            return self.slab_peak_together
        totals = [int((s.live - s.workspace).sum() + s.workspace.max(initial=0)) for s in self.steps]
        return max(totals, default=0)

    @property
    def sent(self) -> IntArray:
        """Bytes sent per rank."""
        return _total([s.sent for s in self.steps], self.mesh)

    @property
    def received(self) -> IntArray:
        """Bytes received per rank."""
        return _total([s.received for s in self.steps], self.mesh)

    @property
    def messages(self) -> IntArray:
        """Messages sent per rank."""
        return _total([s.messages for s in self.steps], self.mesh)

    @property
    def flops(self) -> FloatArray:
        """Floating-point operations per rank."""
        return np.sum([s.flops for s in self.steps], axis=0)


def _total(figures: Sequence[IntArray], mesh: Mesh) -> IntArray:
    total = np.zeros(mesh.shape, dtype=np.int64)
    for figure in figures:
        total = total + figure
    return total


def cells(layout: Layout, mesh: Mesh) -> IntArray:
    """Elements that every rank holds of a value; not to be written to."""
    return _cells(layout, mesh) if mesh.size <= REMEMBERED else _count_cells(layout, mesh)


@lru_cache(64)
def _cells(layout: Layout, mesh: Mesh) -> IntArray:
    found = _count_cells(layout, mesh)
    found.flags.writeable = False
    return found


def _count_cells(layout: Layout, mesh: Mesh) -> IntArray:
    total = np.ones(mesh.shape, dtype=np.int64)
    for axis, n in enumerate(layout.shape):
        split = layout.axes[axis]
        if split is None:
            total *= n
            continue
        counts = np.array(split.extents, dtype=np.int64)
        shape = [len(counts) if name == split.mesh_axis else 1 for name in mesh.names]
        total *= counts.reshape(shape)
    return total


def bytes_of(layout: Layout, dtype: ir.DataType, mesh: Mesh) -> IntArray:
    """Bytes that every rank holds of a value."""
    return np.ceil(cells(layout, mesh) * dtype.itemsize).astype(np.int64)


@kept_for_later()
def plan_cost(model: ir.Model) -> PlanCost:
    """The cost of a plan on every rank."""
    mesh, lifetimes = dialect.get_mesh(model), find_lifetimes(model)
    sizes = {b.name: _buffer_bytes(b, mesh) for b in lifetimes.buffers.values()}
    births: dict[int, list[str]] = {}
    deaths: dict[int, list[str]] = {}
    for buffer in lifetimes.buffers.values():
        births.setdefault(buffer.born, []).append(buffer.name)
        deaths.setdefault(buffer.dies, []).append(buffer.name)
    turns = count_turns(model)
    posted = {exchange for overlap in lifetimes.overlaps.values() for exchange in overlap.exchanges}
    live = np.zeros(mesh.shape, dtype=np.int64)
    under_way = np.zeros(mesh.shape, dtype=np.int64)
    steps: list[StepCost] = []
    shared = Shared()
    for index, node in enumerate(model.graph):
        for name in births.get(index, ()):
            live = live + sizes[name]
        step = _step(node, mesh, lifetimes, live, turns.get(node, Turns()))
        step = replace(step, live=step.live + under_way, workspace=step.workspace + under_way)
        steps.append(shared.step(step))
        if node in posted:
            under_way = under_way + step.sent + step.received
        elif node in lifetimes.overlaps:
            under_way = np.zeros(mesh.shape, dtype=np.int64)
        for name in deaths.get(index, ()):
            live = live - sizes[name]
    weights = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    return PlanCost(mesh, tuple(steps), weights)


def _buffer_bytes(buffer: Buffer, mesh: Mesh) -> IntArray:
    if buffer.base is not None:
        return np.zeros(mesh.shape, dtype=np.int64)
    return bytes_of(buffer.layout, buffer.dtype, mesh)


def _step(node: ir.Node, mesh: Mesh, lifetimes: Lifetimes, live: IntArray, turns: Turns) -> StepCost:
    zero = np.zeros(mesh.shape, dtype=np.int64)
    if dialect.is_exchange(node):
        sent, received, messages = exchange_traffic(node, mesh)
        sent, received = (n * turns.cells // turns.extent for n in (sent, received))
        workspace = sent + received
        return StepCost(node, sent, received, messages * turns.count, zero.astype(float), live + workspace, workspace)
    if dialect.is_all_reduce(node):
        sent, messages = all_reduce_traffic(node, mesh)
        return StepCost(node, sent, sent, messages, zero.astype(float), live + 2 * sent, 2 * sent)
    workspace = _workspace(node, mesh, lifetimes)
    flops = operations(node, dialect.get_layout(node.outputs[0]), mesh)
    return StepCost(node, zero, zero, zero, flops, live + workspace, workspace)


def operations(node: ir.Node, layout: Layout, mesh: Mesh) -> FloatArray:
    """Floating-point operations of every rank when the first output of a node has a layout."""
    flops = operator_of(node).flops(_as_number(cells(layout, mesh)))
    return np.broadcast_to(np.asarray(flops, float), mesh.shape)


def operations_done_twice(model: ir.Model) -> float:
    """Floating-point operations for cells that a rank before computes too, over all ranks: halos that were deepened."""
    mesh, found = dialect.get_mesh(model), 0.0
    for node in model.graph:
        if dialect.is_communication(node):
            continue
        layout = dialect.get_layout(node.outputs[0])
        if not layout.is_partition:
            found += float((operations(node, layout, mesh) - operations(node, layout.each_once(), mesh)).sum())
    return found


def _as_number(array: NDArray[Any]) -> Any:
    """Operators compute with single numbers; arrays of ranks take the same formulas."""
    return array.astype(np.float64)


def _workspace(node: ir.Node, mesh: Mesh, lifetimes: Lifetimes) -> IntArray:
    """What the kernel takes beside its buffers, and a result that is copied into a larger buffer."""
    inputs, overlap = range(len(node.inputs)), lifetimes.overlaps.get(node)
    if overlap is None:
        outs = [dialect.get_layout(v) for v in node.outputs]
        needed = [needed_layout(node, i) for i in inputs]
        return _kernel_bytes(node, needed, outs, mesh) + copied_bytes(node, outs[0], mesh, lifetimes)
    found = [_kernel_bytes(node, [needed_by_part(node, i, part) for i in inputs], [part] * len(node.outputs), mesh)
             + copied_bytes(node, part, mesh, lifetimes, is_rest=part is not overlap.parts[0])
             for part in overlap.parts]
    return np.max(found, axis=0)


def _kernel_bytes(node: ir.Node, needed: Sequence[Layout | None], outs: Sequence[Layout], mesh: Mesh) -> IntArray:
    """What a kernel takes for some cells of its results."""
    given = [_as_number(np.zeros(mesh.shape) if layout is None else cells(layout, mesh)) for layout in needed]
    operator, results = operator_of(node), [_as_number(cells(layout, mesh)) for layout in outs]
    total = block_workspace(operator, given, results) if starts(operator) else operator.workspace(given, results)
    return np.broadcast_to(np.ceil(np.asarray(total, float)).astype(np.int64), mesh.shape)


def copied_bytes(node: ir.Node, part: Layout, mesh: Mesh, lifetimes: Lifetimes, is_rest: bool = False) -> IntArray:
    """Bytes of a part of a node's first result that are computed beside their place and copied there.

    Args:
        is_rest: whether other parts were computed before, so that the buffer is there already.
    """
    value = node.outputs[0]
    if operator_of(node).writes_into or value.dtype is None:
        return np.zeros(mesh.shape, dtype=np.int64)
    buffer = lifetimes.buffers[lifetimes.buffer_of[str(value.name)]]
    own, held = bytes_of(part, value.dtype, mesh), bytes_of(buffer.layout, buffer.dtype, mesh)
    in_blocks = (own > BLOCK) & starts(operator_of(node))
    return np.where((is_rest | (own != held)) & ~in_blocks, own, 0)


def exchange_traffic(node: ir.Node, mesh: Mesh) -> tuple[IntArray, IntArray, IntArray]:
    """Bytes sent, bytes received and messages sent per rank by a HaloExchange or Reshard.

    One that travels in the messages of another has none of its own.
    """
    source, target = node.inputs[0], node.outputs[0]
    assert source is not None and source.dtype is not None
    traffic = plan_exchange(mesh, dialect.get_layout(source), dialect.get_layout(target)).traffic
    size = source.dtype.itemsize
    messages = traffic.messages if dialect.joined_exchange(node) is None else np.zeros_like(traffic.messages)
    return (traffic.sent * size).astype(np.int64), (traffic.received * size).astype(np.int64), messages


def all_reduce_traffic(node: ir.Node, mesh: Mesh) -> tuple[IntArray, IntArray]:
    """Bytes and messages per rank: along each mesh axis in turn, everyone sends its partial to everyone."""
    _, names = dialect.all_reduce_kind(node)
    size = sum((bytes_of(dialect.get_layout(v), v.dtype, mesh) for v in node.outputs if v.dtype is not None),
               start=np.zeros(mesh.shape, dtype=np.int64))
    peers = sum(mesh.count(name) - 1 for name in names)
    return size * peers, np.full(mesh.shape, peers, dtype=np.int64)
