"""How long a plan takes on every rank, step by step, from boxes and a machine's profile.

    compute         the kernels of the step
    communication   the messages of the step, packing included
    wait            until the neighbours that send something have come as far

Of messages that travel while an interior is computed only the time counts by which they come later.

Figures are arrays of the mesh's shape, as those of `partitioner.cost`: 4096 ranks cost what 16+16+16 cost.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from partitioner import dialect
from partitioner.cost import PlanCost, StepCost, bytes_of, cells, copied_bytes
from partitioner.curves import FloatArray, Number
from partitioner.garbage import kept_for_later
from partitioner.geometry import Interval, hull
from partitioner.inplace import joined_to
from partitioner.interior import Overlap
from partitioner.kinds import kernel_seconds
from partitioner.layout import Layout
from partitioner.lifetime import Lifetimes, find_lifetimes
from partitioner.mesh import Mesh
from partitioner.ops.fused import starts
from partitioner.ops.nodes import needed_by_part, needed_layout, needs_of, operator_of
from partitioner.ops.standard.conv import Conv, ConvTranspose
from partitioner.profile import Kernels, Link, Profile
from partitioner.rolling import Turns, count_turns
from partitioner.slabs import Rest, find_rests

SHARED_CORES = ("gloo", "shm")
"""The transports of ranks that share out the cores of one machine, as far as a profile knows."""

LOCKSTEP = "lockstep"
"""The transport of ranks in one process, which compute one after the other."""

SLAB_CALLS = 5
"""Small kernels that a slab's step takes as long as beside its own: windows are found, results put in their place."""

THIN = 0.2
"""By how much a convolution of one plane is slower than one of many, per plane; of n planes an n-th of it."""

MERGE_CALLS = 8
"""Small kernels that merge one peer's partial result, or one slab's."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one node, per rank; of an input or output that is read or written when `node` is None."""

    node: ir.Node | None
    name: str
    compute: FloatArray
    communication: FloatArray
    wait: FloatArray

    @property
    def total(self) -> FloatArray:
        """All three together."""
        return self.compute + self.communication + self.wait


@dataclass(frozen=True)
class PlanTime:
    """All steps of a plan; every figure is per rank, an array of the mesh's shape.

    Args:
        transport: how messages travel; `lockstep` has all ranks in one process.
    """

    mesh: Mesh
    transport: str
    steps: tuple[StepTime, ...]

    @property
    def compute(self) -> FloatArray:
        """Seconds in kernels."""
        return self._sum([s.compute for s in self.steps])

    @property
    def communication(self) -> FloatArray:
        """Seconds in messages."""
        return self._sum([s.communication for s in self.steps])

    @property
    def wait(self) -> FloatArray:
        """Seconds in which other ranks are waited for."""
        return self._sum([s.wait for s in self.steps])

    @property
    def total(self) -> FloatArray:
        """Seconds of all steps."""
        return self.compute + self.communication + self.wait

    @property
    def seconds(self) -> float:
        """Seconds of the whole run: of all ranks after one another in one process, else of the slowest."""
        return float(self.total.sum() if self.transport == LOCKSTEP else self.total.max(initial=0.0))

    def _sum(self, figures: Sequence[FloatArray]) -> FloatArray:
        return sum(figures, start=np.zeros(self.mesh.shape))


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


def threads_of_rank(profile: Profile, transport: str, ranks: int, threads: int | None = None) -> int | None:
    """CPU threads of a process, given or shared out among the ranks; None for the most that the profile knows."""
    if threads is not None or transport not in SHARED_CORES:
        return threads
    return max(1, profile.for_threads().threads // ranks)


@kept_for_later()
def plan_time(model: ir.Model, cost: PlanCost, profile: Profile, transport: str = LOCKSTEP,
              threads: int | None = None, link: Link | None = None) -> PlanTime:
    """The time of a plan on every rank.

    Args:
        cost: see `partitioner.cost.plan_cost`.
        transport: `lockstep`, `gloo`, or another one that the profile knows.
        threads: of a process (None: the most that the profile knows; see `threads_of_rank`).
        link: a slower network, as `Session` emulates it: the messages of a step come no earlier than it brings them.

    Raises:
        PartitionError: when the profile does not know the transport.
    """
    return _Clock(model, cost.mesh, profile, transport, threads, link).run(cost)


@dataclass(frozen=True)
class _Flight:
    """An exchange whose messages travel: its place among the steps, and when each rank began it."""

    place: int
    step: StepCost
    begun: FloatArray


class _Clock:
    """Goes through the steps and keeps how far every rank is."""

    def __init__(self, model: ir.Model, mesh: Mesh, profile: Profile, transport: str, threads: int | None,
                 link: Link | None) -> None:
        profile.message_seconds(0.0, 0.0, transport)  # refuses what it does not know before anything is computed
        self.model, self.mesh, self.profile, self.transport, self.link = model, mesh, profile, transport, link
        self.kernels: Kernels = profile.for_threads(threads_of_rank(profile, transport, mesh.size, threads))
        self.lifetimes: Lifetimes = find_lifetimes(model)
        self.before = order_of(model)
        self.turns = count_turns(model)
        self.schedule = dialect.get_schedule(model)
        self.rests: dict[ir.Value, Rest] = find_rests(model)
        self.first_readers = {v: node for node in reversed(model.graph) for v in node.inputs if v is not None}
        self.posted = {e for overlap in self.lifetimes.overlaps.values() for e in overlap.exchanges}
        self.under_way: list[_Flight] = []
        self.now = np.zeros(mesh.shape)
        self.zero = np.zeros(mesh.shape)

    def run(self, cost: PlanCost) -> PlanTime:
        """All steps, inputs read before them and outputs written after them."""
        steps = [self._edge(value) for value in self.model.graph.inputs if value.uses()]
        for step in cost.steps:
            overlap = self.lifetimes.overlaps.get(step.node)
            if step.node in self.posted:
                steps.append(self._post(step, len(steps)))
            elif overlap is not None:
                steps.append(self._overlapped(overlap, steps))
            else:
                steps.append(self._step(step))
        steps += [self._edge(value) for value in self.model.graph.outputs]
        return PlanTime(self.mesh, self.transport, tuple(steps))

    def _edge(self, value: ir.Value) -> StepTime:
        """An input that is read into its buffer, an output that is copied out of it; slab by slab in a chain."""
        assert value.dtype is not None
        nbytes = bytes_of(dialect.get_layout(value), value.dtype, self.mesh)
        count = max([1, *(self.turns[n].count for n in (*(u.node for u in value.uses()), value.producer())
                          if n is not None and n in self.turns)])
        shape = dialect.shape_of(value)
        kind = "reorder" if len(shape) > 3 and shape[1] > 1 else "pointwise"
        calls = count * SLAB_CALLS * self.kernels.launch if count > 1 else 0.0
        return self._passed(None, str(value.name), self.zero + calls + self._repeated(kind, 2.0 * nbytes, count))

    def _step(self, step: StepCost) -> StepTime:
        node = step.node
        if dialect.is_communication(node):
            return self._meeting(step)
        turns = self.turns.get(node, Turns())
        seconds = self._kernel(node, turns) + self._copies(node, turns) + self._from_memory(node, turns)
        if turns.count > 1 and self.schedule is not None and self.schedule.axis in dialect.get_partial(node):
            seconds = seconds + turns.count * MERGE_CALLS * (self.kernels.launch + self.kernels.step)
        return self._passed(node, str(node.name), self.zero + seconds)

    def _passed(self, node: ir.Node | None, name: str, compute: FloatArray) -> StepTime:
        self.now = self.now + compute
        return StepTime(node, name, compute, self.zero, self.zero)

    # --- kernels ------------------------------------------------------------------------------

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
            once = once * (1.0 + self._thinness(node, turns)) + SLAB_CALLS * self.kernels.launch
        if turns.count > 1 and self._slides(node.outputs[0]):  # the first slab takes the pages, others find them there
            again = once
            if operator.writes_into and maker is None:
                used, fresh = (kernel_seconds(self.kernels, operator, ins, outs, in_place=p) for p in (True, False))
                again = once - fresh + used
            return once + (count - 1) * again + count * self.kernels.step
        return count * (once + self.kernels.step)

    def _thinness(self, node: ir.Node, turns: Turns) -> float:
        """By how much a convolution is slower for having few planes."""
        return THIN * turns.count / max(1, turns.cells) if isinstance(operator_of(node), Conv | ConvTranspose) else 0.0

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
                    + calls + (self._pages(owned) if rest.waits else 0.0))
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

    def _pages(self, nbytes: Number) -> FloatArray:
        """What the system takes to give pages to a buffer that comes and goes with its cells."""
        return self._one("pages", nbytes) if "pages" in self.kernels.curves else self.zero

    def _one(self, kind: str, nbytes: Number) -> FloatArray:
        return self.kernels.seconds(kind, 0.0, nbytes)

    def _repeated(self, kind: str, nbytes: Number, count: int) -> FloatArray:
        """So many bytes in `count` equal calls."""
        each = np.asarray(nbytes, np.float64) / count
        return count * (self._one(kind, each) + self.kernels.step)

    # --- interior before boundary -------------------------------------------------------------

    def _post(self, step: StepCost, place: int) -> StepTime:
        """Messages that begin to travel; what they take is known when they are waited for."""
        found = self._passed(step.node, str(step.node.name), self._packing(step.node, 2.0 * step.sent))
        self.under_way.append(_Flight(place, step, self.now))
        return found

    def _packing(self, node: ir.Node, nbytes: Number) -> FloatArray:
        if self.transport == LOCKSTEP or _is_dense(node):
            return self.zero + self.kernels.step
        return self.zero + self._repeated("move", nbytes, 1)

    def _overlapped(self, overlap: Overlap, steps: list[StepTime]) -> StepTime:
        """The interior, what is left of the way of the messages then, and the boundary."""
        interior, *boundary = overlap.parts
        compute = self._part(overlap.node, interior)
        self.now = self.now + compute
        flights, self.under_way = self.under_way, []
        arrived = self.zero
        for flight in flights:
            arrived = self._finish(flight, arrived, steps)
        rest = sum((self._part(overlap.node, part, is_rest=True) for part in boundary), start=self.zero)
        self.now = self.now + rest
        return StepTime(overlap.node, str(overlap.node.name), compute + rest, self.zero, self.zero)

    def _finish(self, flight: _Flight, before: FloatArray, steps: list[StepTime]) -> FloatArray:
        """Complete the time of an exchange that was posted; returns when it has arrived, after the one before it."""
        node, told = flight.step.node, steps[flight.place]
        here, sends = self.transport == LOCKSTEP, self._message_seconds(flight.step)
        begun = self.now if here else np.maximum(before, self._gathered(node, flight.begun))
        takes_part = np.asarray(flight.step.sent + flight.step.received) > 0
        late = np.where(takes_part, np.maximum(0.0, begun + sends - self.now), 0.0)
        wait = np.where(takes_part, np.clip(begun - self.now, 0.0, late), 0.0)
        unpacking = self._packing(node, 2.0 * flight.step.received)
        steps[flight.place] = StepTime(node, told.name, told.compute + unpacking, late - wait, wait)
        self.now = self.now + late + unpacking
        return begun + sends

    def _part(self, node: ir.Node, part: Layout, is_rest: bool = False) -> FloatArray:
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

    # --- messages -----------------------------------------------------------------------------

    def _meeting(self, step: StepCost) -> StepTime:
        """A step in which ranks meet: all that takes part begins when the last one has come."""
        node = step.node
        turns = self.turns.get(node, Turns())
        messages = np.asarray(step.messages, np.float64)
        sends = self._message_seconds(step)
        compute = np.full(self.mesh.shape, max(1, turns.count) * self.kernels.step)
        if dialect.is_all_reduce(node):
            compute = compute + messages * MERGE_CALLS * self.kernels.launch
        elif self.transport != LOCKSTEP and not _is_dense(node):
            packed = 2 * (step.sent + step.received)
            compute = compute + self._repeated("move", packed, max(1, turns.count))
        communication = self.zero + sends
        wait = self.zero if self.transport == LOCKSTEP else self._gathered(node, self.now) - self.now
        wait = np.where(messages > 0, wait, 0.0)
        self.now = self.now + wait + communication + compute
        return StepTime(node, str(node.name), compute, communication, wait)

    def _message_seconds(self, step: StepCost) -> FloatArray:
        found = self.profile.message_seconds(step.sent, np.asarray(step.messages, np.float64), self.transport)
        if self.link is None:
            return found
        return np.maximum(found, np.where(step.messages > 0, self.link.seconds(step.sent, 1.0), 0.0))

    def _gathered(self, node: ir.Node, times: FloatArray) -> FloatArray:
        """When the last of those has come with whom a rank exchanges something."""
        found = times
        if dialect.is_all_reduce(node):
            _, names = dialect.all_reduce_kind(node)
        else:
            names = tuple(_split_axes(node))
        for name in names:
            if name not in self.mesh.names:
                continue
            axis = self.mesh.names.index(name)
            if node.op_type == dialect.HALO_EXCHANGE:
                found = _of_neighbours(found, axis)
            else:
                found = np.broadcast_to(found.max(axis, keepdims=True), found.shape)
        return found


def _of_neighbours(times: FloatArray, axis: int) -> FloatArray:
    """The latest of a rank and the two beside it along one axis of the mesh."""
    padded = np.pad(times, [(1, 1) if a == axis else (0, 0) for a in range(times.ndim)], mode="edge")
    count = times.shape[axis]
    return np.max([np.take(padded, range(i, i + count), axis) for i in range(3)], axis=0)


def _split_axes(node: ir.Node) -> Sequence[str]:
    """Mesh axes along which an exchange moves something."""
    source, target = node.inputs[0], node.outputs[0]
    assert source is not None
    pairs = zip(dialect.get_layout(source).axes, dialect.get_layout(target).axes, strict=True)
    return [split.mesh_axis for a, b in pairs if a != b for split in (a, b) if split is not None]


def _is_dense(node: ir.Node) -> bool:
    """Whether messages are runs of memory: slabs along the first spatial axis, of one case."""
    source, target = node.inputs[0], node.outputs[0]
    assert source is not None
    before, after = dialect.get_layout(source), dialect.get_layout(target)
    differing = [axis for axis, (a, b) in enumerate(zip(before.axes, after.axes, strict=True)) if a != b]
    return differing in ([0], [2]) and (differing == [0] or before.shape[0] == 1)


def _dtype(value: ir.Value) -> ir.DataType:
    assert value.dtype is not None
    return value.dtype
