"""What the kernels of a plan take on every rank, from boxes and a machine's profile: all turns of a node, its copies.

Figures are arrays of the mesh's shape, as those of `partitioner.cost`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from partitioner import dialect
from partitioner.cost import bytes_of, cells, copied_bytes
from partitioner.curves import FloatArray, Number
from partitioner.geometry import Interval, hull
from partitioner.inplace import joined_to
from partitioner.kinds import kernel_seconds
from partitioner.layout import Layout
from partitioner.lifetime import Lifetimes
from partitioner.mesh import Mesh
from partitioner.ops.fused import starts
from partitioner.ops.nodes import needed_by_part, needed_layout, needs_of, operator_of
from partitioner.ops.standard.conv import Conv, ConvTranspose
from partitioner.profile import Kernels
from partitioner.rolling import Turns, count_turns
from partitioner.slabs import Rest, find_rests

SLAB_CALLS = 18
"""Smallest kernels that a step of a slab takes as long as beside its own: it begins in cold caches, on thin tensors."""

SLAB_LOSS = 0.08
"""By which part the kernels of slabs take longer on several threads: each call ends when the slowest of them does."""

MERGE_CALLS = 8
"""Small kernels that merge one peer's partial result, or one slab's."""


def is_in_cache(node: ir.Node, buffer_of: Mapping[str, str], before: Mapping[ir.Node, ir.Node]) -> bool:
    """Whether a node works in place on a result while a block of it is in cache, as the runtime fuses steps.

    Args:
        before: for every node the one that runs before it.
    """
    maker = joined_to(node, buffer_of)
    while maker is not None and before.get(node) is maker:
        if starts(operator_of(maker)):
            return True
        node, maker = maker, joined_to(maker, buffer_of)
    return False


def order_of(model: ir.Model) -> dict[ir.Node, ir.Node]:
    """For every node of a graph but the first the one that runs before it."""
    return {after: before for before, after in itertools.pairwise(model.graph)}


class Work:
    """Seconds of kernels and copies.

    Args:
        model: a plan.
        kernels: what a rank's process can do.
        lifetimes: the buffers of the plan.

    Attributes:
        turns: how often nodes take turns, where ranks go through their shards slab by slab.
    """

    def __init__(self, model: ir.Model, mesh: Mesh, kernels: Kernels, lifetimes: Lifetimes) -> None:
        self.mesh, self.kernels, self.lifetimes = mesh, kernels, lifetimes
        self.turns = count_turns(model)
        self.before = order_of(model)
        self.schedule = dialect.get_schedule(model)
        self.rests: dict[ir.Value, Rest] = find_rests(model)
        self.first_readers = {v: node for node in reversed(model.graph) for v in node.inputs if v is not None}
        self.zero = np.zeros(mesh.shape)

    def edge(self, value: ir.Value) -> FloatArray:
        """An input that is read into its buffer, an output that is copied out of it; slab by slab in a chain."""
        assert value.dtype is not None
        nbytes = bytes_of(dialect.get_layout(value), value.dtype, self.mesh)
        count = max([1, *(self.turns[n].count for n in (*(u.node for u in value.uses()), value.producer())
                          if n is not None and n in self.turns)])
        shape = dialect.shape_of(value)
        kind = "reorder" if len(shape) > 3 and shape[1] > 1 else "pointwise"
        calls = count * SLAB_CALLS * self.kernels.launch if count > 1 else 0.0
        return self.zero + calls + self._repeated(kind, 2.0 * nbytes, count)

    def node(self, node: ir.Node) -> FloatArray:
        """All turns of a node's kernel, and what is copied and merged for them."""
        turns = self.turns.get(node, Turns())
        seconds = self._kernel(node, turns) + self._copies(node, turns) + self._from_memory(node, turns)
        if turns.count > 1 and self.schedule is not None and self.schedule.axis in dialect.get_partial(node):
            seconds = seconds + turns.count * MERGE_CALLS * (self.kernels.launch + self.kernels.step)
        return self.zero + seconds

    def part(self, node: ir.Node, part: Layout, is_rest: bool = False) -> FloatArray:
        """A part of a node's result, none on ranks that have no cells of it.

        Args:
            is_rest: whether parts were computed before, so that results go to memory that is there.
        """
        operator = operator_of(node)
        needed = [needed_by_part(node, i, part) for i in range(len(node.inputs))]
        ins = [None if layout is None else cells(layout, self.mesh) for layout in needed]
        outs = [cells(part, self.mesh)] * len(node.outputs)
        found = kernel_seconds(self.kernels, operator, ins, outs, in_place=is_rest)
        if isinstance(operator, Conv | ConvTranspose) and needed[0] is not None and ins[0] is not None:
            again = self._one("pointwise", 2.0 * ins[0] * _dtype(node.outputs[0]).itemsize)
            found = found + np.where(self._is_strided(node, needed[0]), again, 0.0)
        copied = copied_bytes(node, part, self.mesh, self.lifetimes, is_rest)
        found = found + np.where(copied > 0, self._one("move" if is_rest else "pointwise", 2.0 * copied), 0.0)
        return np.where(outs[0] > 0, found, 0.0) + self.kernels.step

    def _is_strided(self, node: ir.Node, needed: Layout) -> NDArray[np.bool_]:
        """On which ranks cells of input 0 do not lie side by side in their buffer: not whole along the last axes."""
        value = node.inputs[0]
        assert value is not None
        name = self.lifetimes.buffer_of.get(str(value.name))
        held = dialect.get_layout(value) if name is None else self.lifetimes.buffers[name].layout
        few, all_ = (cells(Layout(lay.shape[3:], lay.axes[3:]), self.mesh) for lay in (needed, held))
        return few < all_

    def moved(self, nbytes: Number, count: int = 1) -> FloatArray:
        """So many bytes moved in `count` equal calls."""
        return self._repeated("move", nbytes, count)

    def _kernel(self, node: ir.Node, turns: Turns) -> FloatArray:
        """All turns of a node's kernel."""
        count = max(1, turns.count)
        share = turns.cells / max(1, turns.extent) / count
        layouts = [None if v is None else needed_layout(node, i) for i, v in enumerate(node.inputs)]
        ins = [None if layout is None else cells(layout, self.mesh) * (share if self._is_data(v) else 1.0)
               for layout, v in zip(layouts, node.inputs, strict=True)]
        outs = [cells(dialect.get_layout(v), self.mesh) * share for v in node.outputs]
        operator, maker = operator_of(node), joined_to(node, self.lifetimes.buffer_of)
        if is_in_cache(node, self.lifetimes.buffer_of, self.before):
            return count * (self.zero + self.kernels.step)
        once = kernel_seconds(self.kernels, operator, ins, outs, in_place=maker is not None)
        if isinstance(operator, Conv | ConvTranspose) and ins[0] is not None and self._is_sparse(node):
            once = once + self._one("pointwise", 2.0 * ins[0] * _dtype(node.outputs[0]).itemsize)
        if turns.count > 1:
            loss = SLAB_LOSS if self.kernels.threads > 1 else 0.0
            once = (1.0 + loss) * once + SLAB_CALLS * self.kernels.launch
        if turns.count > 1 and self._slides(node.outputs[0]):  # the first slab takes the pages, others find them there
            again = once
            if operator.writes_into and maker is None:
                used, fresh = (kernel_seconds(self.kernels, operator, ins, outs, in_place=p) for p in (True, False))
                again = once - fresh + used
            return once + (count - 1) * again + count * self.kernels.step
        return count * (once + self.kernels.step)

    def _is_sparse(self, node: ir.Node) -> bool:
        """Whether a convolution reads cells that do not lie side by side in their buffer: it copies them first."""
        value, needs = node.inputs[0], needs_of(node, 0)[0]
        assert value is not None and needs is not None
        extents, outs = dialect.shape_of(value), dialect.shape_of(node.outputs[0])
        found = [hull(need.map.needed(Interval(0, outs[need.axis]))) for need in needs[3:] if need.axis is not None]
        return any(len(interval) < n for interval, n in zip(found, extents[3:], strict=True))

    def _is_data(self, value: ir.Value | None) -> bool:
        return value is not None and value.const_value is None and len(dialect.shape_of(value)) > 2

    def _copies(self, node: ir.Node, turns: Turns) -> FloatArray:
        """Results that are copied to their place, and cells that move along before the next slab."""
        value, operator = node.outputs[0], operator_of(node)
        owned = bytes_of(dialect.get_layout(value), _dtype(value), self.mesh)
        buffer = self.lifetimes.buffers[self.lifetimes.buffer_of[str(value.name)]]
        if turns.count > 1 and not operator.is_view:
            rest = self.rests.get(value)
            if rest is None or not rest.is_kept:
                return self.zero
            computed = 0.0 if operator.writes_into else owned * (turns.cells / max(1, turns.extent))
            moved = owned * (rest.moved / max(1, turns.extent))
            calls = turns.count * SLAB_CALLS * self.kernels.launch  # to move cells, or to give them back
            return (self._repeated("move", 2.0 * computed, turns.count) + turns.count * self._one("move", 2.0 * moved)
                    + calls + (self.kernels.page_seconds(owned) if rest.waits else 0.0))
        if operator.writes_into or buffer.name == str(value.name):
            return self.zero
        held = bytes_of(buffer.layout, buffer.dtype, self.mesh)
        return np.where(owned != held, self._one("pointwise", 2.0 * owned), 0.0)

    def _from_memory(self, node: ir.Node, turns: Turns) -> FloatArray:
        """What slabs of resting tensors take beyond what their size tells: they go to memory and come from there."""
        nbytes = self.zero
        for value in (*dict.fromkeys(v for v in node.inputs if v is not None), *node.outputs):
            is_read = value.producer() is not node
            rest = self.rests.get(value)
            if rest is not None and rest.waits and not (is_read and self.first_readers[value] is node):
                nbytes = nbytes + bytes_of(dialect.get_layout(value), _dtype(value), self.mesh)
        if turns.count < 2 or not nbytes.any():
            return self.zero
        apart = turns.count * self._one("move", 2.0 * nbytes / turns.count)
        return np.maximum(0.0, self._one("move", 2.0 * nbytes) - apart) / 2.0

    def _slides(self, value: ir.Value) -> bool:
        """Whether results go to their place in a buffer that is there from the first slab to the last."""
        return value in self.rests and self.rests[value].is_kept and not self.rests[value].waits

    def _one(self, kind: str, nbytes: Number) -> FloatArray:
        return self.kernels.seconds(kind, 0.0, nbytes)

    def _repeated(self, kind: str, nbytes: Number, count: int) -> FloatArray:
        """So many bytes in `count` equal calls."""
        each = np.asarray(nbytes, np.float64) / count
        return count * (self._one(kind, each) + self.kernels.step)


def _dtype(value: ir.Value) -> ir.DataType:
    assert value.dtype is not None
    return value.dtype
