"""What every mesh would take, before any is laid out: all meshes at once, as arrays.

A rank's part of a value is the product of its parts along every axis, so that one pass over the graph with a number
per mesh tells kernels, halos, gathers and merges of all of them:

    seconds = kernels at the largest shard + messages of halos, gathers and merges
    bytes   = the most that is alive at once

Both leave out what only the cuts decide (cells at the borders of strided layers, waiting, copies), so that they are
never more than what a plan of that mesh takes: the search looks at meshes in this order, and stops when what is left is
estimated to be slower than what it has found.  In lock-step, where shards take their time one after the other, the
mean shard stands for all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from partitioner import dialect
from partitioner.curves import FloatArray
from partitioner.geometry import Interval
from partitioner.inplace import joined_to
from partitioner.kinds import kernel_seconds
from partitioner.lifetime import find_lifetimes
from partitioner.maps import AxisMap
from partitioner.mesh import Mesh
from partitioner.ops.nodes import needs_of, operator_of, reduction_splits
from partitioner.profile import Kernels, Profile
from partitioner.timing import LOCKSTEP, threads_of_rank
from partitioner.work import MERGE_CALLS, is_in_cache, order_of

_PARTIAL = 8
"""Bytes of a partial result, at least."""


@dataclass(frozen=True)
class Estimates:
    """Estimates for many meshes; every figure is an array with a number per mesh.

    Args:
        model: laid out along every axis that a mesh can split, on one rank each.
        meshes: those that are compared.
        transport, threads: as in `partitioner.timing.plan_time`.
        training: whether training steps are compared, not runs; see `partitioner.training_time`.
    """

    model: ir.Model
    meshes: Sequence[Mesh]
    profile: Profile
    transport: str
    threads: int | None = None
    training: bool = False

    @cached_property
    def seconds(self) -> FloatArray:
        """Time of a run or a step, of the largest shard; of all shards one after another in lock-step."""
        total = np.zeros(len(self.meshes))
        for node in self.model.graph:
            total = total + self._node(node)
        for value in (*self.model.graph.inputs, *(v for node in self.model.graph for v in node.outputs)):
            if dialect.has_layout(value) and value.uses():
                total = total + self._passes * self._exchange(value)
        if not self.training:
            total = total + sum(self._edge(v) for v in (*self.model.graph.inputs, *self.model.graph.outputs)
                                if v.producer() is not None or v.uses())
        return total * (self._sizes if self.transport == LOCKSTEP else 1.0)

    @property
    def _passes(self) -> int:
        """Forward, and back."""
        return 2 if self.training else 1

    @cached_property
    def peak(self) -> FloatArray:
        """Bytes of activations that the largest shard holds at once, at least: results in place are taken for nothing
        more, parts of a concatenation for no more than themselves.
        """
        nodes = list(self.model.graph)
        last = {value: index for index, node in enumerate(nodes) for value in node.inputs if value is not None}
        waiting = set(self.model.graph.inputs).intersection(last)  # those that no node has asked for yet
        live = most = np.zeros(len(self.meshes))
        for index, node in enumerate(nodes):
            read = {v for v in node.inputs if v in waiting}
            waiting -= read
            live = live + self._sum_of(read)
            gone = {v for v in (*node.inputs, *node.outputs) if v is not None and last.get(v, index) == index
                    and v.const_value is None and _is_made(v)}
            places = {self._buffers.get(str(v.name)) for v in node.outputs}
            taken = {v for v in gone.intersection(node.inputs) if self._buffers.get(str(v.name)) in places}
            live = live - self._sum_of(taken)
            if not operator_of(node).is_view:
                live = live + self._sum_of(node.outputs)
            most = np.maximum(most, live)
            live = live - self._sum_of(gone - taken)
        return most

    def _sum_of(self, values: Iterable[ir.Value]) -> FloatArray:
        return sum((self._bytes(v) for v in values), start=np.zeros(len(self.meshes)))

    @cached_property
    def _sizes(self) -> FloatArray:
        return np.array([mesh.size for mesh in self.meshes], np.float64)

    def _count(self, name: str) -> FloatArray:
        return np.array([mesh.count(name) for mesh in self.meshes], np.float64)

    def _parts(self, value: ir.Value) -> list[FloatArray | float]:
        """Extents of the largest shard of a value, axis by axis; of the mean one in lock-step."""
        if not dialect.has_layout(value):
            return [float(n) for n in dialect.shape_of(value)]
        layout = dialect.get_layout(value)
        return [float(n) if split is None else self._part(n, split.mesh_axis)
                for n, split in zip(layout.shape, layout.axes, strict=True)]

    def _part(self, n: int, name: str) -> FloatArray:
        found = n / self._count(name)
        return found if self.transport == LOCKSTEP else np.ceil(found)

    def _sides(self, name: str, first: int, second: int) -> FloatArray:
        """What a shard with most neighbours along an axis has of one figure on either side; the mean in lock-step."""
        peers = self._count(name) - 1
        if self.transport == LOCKSTEP:
            return (first + second) * peers / (peers + 1)
        return np.where(peers > 1, first + second, np.where(peers > 0, max(first, second), 0)).astype(np.float64)

    def _cells(self, value: ir.Value) -> FloatArray:
        return np.zeros(len(self.meshes)) + math.prod(self._parts(value), start=np.float64(1.0))

    def _bytes(self, value: ir.Value) -> FloatArray:
        return self._cells(value) * (0.0 if value.dtype is None else value.dtype.itemsize)

    def _node(self, node: ir.Node) -> FloatArray:
        ins = [None if v is None else self._cells(v) for v in node.inputs]
        outs = [self._cells(v) for v in node.outputs]
        operator, maker = operator_of(node), joined_to(node, self._buffers)
        cached = is_in_cache(node, self._buffers, self._before)
        total = np.zeros(len(self.meshes))
        for threads, where in self._threads:
            kernels = self.profile.for_threads(threads)
            found = 0.0 if cached else kernel_seconds(kernels, operator, [None if i is None else i[where] for i in ins],
                                                      [o[where] for o in outs], in_place=maker is not None)
            work = 1.0 + operator.gradient_work if self.training else 1.0
            total[where] = work * found + self._passes * kernels.step
        return total + self._passes * self._merges(node)

    def _edge(self, value: ir.Value) -> FloatArray:
        """An input that is read into its buffer, an output that is copied out of it."""
        shape = dialect.shape_of(value)
        kind = "reorder" if len(shape) > 3 and shape[1] > 1 else "pointwise"
        return self._overhead(0.0, 1.0) + self._kernels.seconds(kind, 0.0, 2.0 * self._bytes(value))

    def _overhead(self, launches: FloatArray | float, steps: FloatArray | float) -> FloatArray:
        """What so many small calls and steps of the executor take."""
        return np.zeros(len(self.meshes)) + launches * self._kernels.launch + steps * self._kernels.step

    @cached_property
    def _buffers(self) -> Mapping[str, str]:
        """The buffer of every value, where nothing has to be exchanged."""
        return find_lifetimes(self.model).buffer_of

    @cached_property
    def _before(self) -> Mapping[ir.Node, ir.Node]:
        return order_of(self.model)

    @cached_property
    def _kernels(self) -> Kernels:
        """The fastest that any of the meshes has."""
        return self.profile.for_threads(self.threads)

    @cached_property
    def _threads(self) -> list[tuple[int | None, NDArray[np.intp]]]:
        """Threads of a process, and the meshes on which it has them."""
        places: dict[int | None, list[int]] = {}
        for place, mesh in enumerate(self.meshes):
            threads = threads_of_rank(self.profile, self.transport, mesh.size, self.threads)
            places.setdefault(threads, []).append(place)
        return [(threads, np.array(found, np.intp)) for threads, found in places.items()]

    def _exchange(self, value: ir.Value) -> FloatArray:
        """The halo exchange of a value, and gathers of it: once for all its readers.

        With halos along several axes a rank has the corner neighbours too:  messages = (1 + 2) * (1 + 2) - 1.
        """
        layout, parts = dialect.get_layout(value), self._parts(value)
        held, neighbours = np.ones(len(self.meshes)), np.ones(len(self.meshes))
        total, packs = np.zeros(len(self.meshes)), np.zeros(len(self.meshes))
        for axis, split in enumerate(layout.axes):
            if split is None or layout.shape[axis] == 1:  # which no mesh splits
                continue
            peers, halo = self._count(split.mesh_axis) - 1, _halo(value, axis)
            if halo is None:
                total = np.maximum(total, self._sent(peers * self._bytes(value), peers))
                continue
            coarse = layout.shape[axis] < 2 * self._count(split.mesh_axis)  # some shards may need nothing
            sides = np.where(coarse, 0.0, self._sides(split.mesh_axis, halo[0] > 0, halo[1] > 0))
            halos = np.where(coarse, 0.0, np.minimum(self._sides(split.mesh_axis, *halo),
                                                     layout.shape[axis] - parts[axis]))
            held = held * (1.0 + halos / parts[axis])
            neighbours = neighbours * (1.0 + sides)
            packs = np.maximum(packs, sides * (axis > 2 or (axis == 2 and layout.shape[0] > 1)))
        nbytes = (held - 1.0) * self._bytes(value)
        if self.transport != LOCKSTEP:
            packing = self._kernels.seconds("move", 0.0, 4.0 * nbytes) + self._overhead(0.0, 1.0)
            total = total + np.where(packs > 0, packing, 0.0)
        total = total + np.where(neighbours > 1, self._overhead(0.0, 1.0), 0.0)
        return total + self._sent(nbytes, neighbours - 1.0)

    def _merges(self, node: ir.Node) -> FloatArray:
        """All-reduces of a node's partial results."""
        reduced = reduction_splits(node)
        names = sorted({split.mesh_axis for splits in reduced.values() for split in splits.values()})
        peers = sum((self._count(name) - 1 for name in names), start=np.zeros(len(self.meshes)))
        merging = self._overhead(MERGE_CALLS * peers, 1.0)
        return np.where(peers > 0, self._sent(peers * _PARTIAL, peers) + merging, 0.0)

    def _sent(self, nbytes: FloatArray, messages: FloatArray) -> FloatArray:
        return np.where(messages > 0, self.profile.message_seconds(nbytes, messages, self.transport), 0.0)


def _is_made(value: ir.Value) -> bool:
    producer = value.producer()
    return producer is None or not operator_of(producer).is_view


def _halo(value: ir.Value, axis: int) -> tuple[int, int] | None:
    """Cells that a shard needs from before and from behind it, by the readers that need most; None for all cells."""
    before, after = 0, 0
    for use in value.uses():
        needs = needs_of(use.node, 0)[use.idx] if use.node.outputs else None
        if needs is None or axis in reduction_splits(use.node).get(use.idx, {}):
            continue
        need = needs[axis]
        if need.is_whole or need.axis is None:
            if not need.map.corresponds:
                return None
            continue
        extent = dialect.shape_of(use.node.outputs[0])[need.axis]
        first, second = _reach(need.map, dialect.shape_of(value)[axis], extent)
        before, after = max(before, first), max(after, second)
    return before, after


_STEPS = (1, 2, 3, 4, 8, 16)
"""Cuts at multiples of one of these are aligned to most strides."""


def _reach(found: AxisMap, extent: int, extent_out: int) -> tuple[int, int]:
    """How far beyond a cut near the middle an output's cells on either side of it need their input, at least.

        input   ..........cut..........      before: cells left of the cut that outputs right of it need
        output    ......  follow(cut)  ......
    """
    middle = extent // 2
    cuts = {middle // step * step for step in _STEPS} | {middle + 1}
    return min((_reach_of(found, cut, extent_out) for cut in sorted(cuts) if 0 < cut < extent), key=sum, default=(0, 0))


def _reach_of(found: AxisMap, cut: int, extent_out: int) -> tuple[int, int]:
    place = min(max(found.follow(cut), 0), extent_out)
    right, left = found.needed(Interval(place, extent_out)), found.needed(Interval(0, place))
    return (max(0, cut - min((p.start for p in right), default=cut)),
            max(0, max((p.stop for p in left), default=cut) - cut))
