"""How long a plan takes on every rank, step by step, from boxes and a machine's profile.

    compute         the kernels of the step (`partitioner.work`)
    communication   the messages of the step, packing included
    wait            until the neighbours that send something have come as far

Of messages that travel while an interior is computed only the time counts by which they come later; and what they take
of the cores where ranks of one machine share these, which was measured.

Figures are arrays of the mesh's shape, as those of `partitioner.cost`: 4096 ranks cost what 16+16+16 cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from partitioner import dialect
from partitioner.cost import PlanCost, Shared, StepCost
from partitioner.curves import FloatArray, Number
from partitioner.garbage import kept_for_later
from partitioner.interior import Overlap
from partitioner.lifetime import Lifetimes, find_lifetimes
from partitioner.mesh import Mesh
from partitioner.profile import Kernels, Link, Profile
from partitioner.rolling import Turns
from partitioner.work import MERGE_CALLS, Work

SHARED_CORES = ("gloo", "shm")
"""The transports of ranks that share out the cores of one machine, as far as a profile knows."""

LOCKSTEP = "lockstep"
"""The transport of ranks in one process, which compute one after the other."""


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
        self.work = Work(model, mesh, self.kernels, self.lifetimes)
        self.posted = {e for overlap in self.lifetimes.overlaps.values() for e in overlap.exchanges}
        self.under_way: list[_Flight] = []
        self.now = np.zeros(mesh.shape)
        self.zero = np.zeros(mesh.shape)

    def run(self, cost: PlanCost) -> PlanTime:
        """All steps, inputs read before them and outputs written after them."""
        steps = [self._passed(None, str(v.name), self.work.edge(v)) for v in self.model.graph.inputs if v.uses()]
        for step in cost.steps:
            overlap = self.lifetimes.overlaps.get(step.node)
            if step.node in self.posted:
                steps.append(self._post(step, len(steps)))
            elif overlap is not None:
                steps.append(self._overlapped(overlap, steps))
            else:
                steps.append(self._step(step))
        steps += [self._passed(None, str(v.name), self.work.edge(v)) for v in self.model.graph.outputs]
        return PlanTime(self.mesh, self.transport, tuple(map(Shared().step, steps)))

    def _step(self, step: StepCost) -> StepTime:
        if dialect.is_communication(step.node):
            return self._meeting(step)
        return self._passed(step.node, str(step.node.name), self.work.node(step.node))

    def _passed(self, node: ir.Node | None, name: str, compute: FloatArray) -> StepTime:
        self.now = self.now + compute
        return StepTime(node, name, compute, self.zero, self.zero)

    # --- interior before boundary -------------------------------------------------------------

    def _post(self, step: StepCost, place: int) -> StepTime:
        """Messages that begin to travel; what they take is known when they are waited for."""
        found = self._passed(step.node, str(step.node.name), self._packing(step.node, 2.0 * step.sent))
        self.under_way.append(_Flight(place, step, self.now))
        return found

    def _packing(self, node: ir.Node, nbytes: Number) -> FloatArray:
        if self.transport == LOCKSTEP or _is_dense(node):
            return self.zero + self.kernels.step
        return self.zero + self.work.moved(nbytes)

    def _overlapped(self, overlap: Overlap, steps: list[StepTime]) -> StepTime:
        """The interior, what is left of the way of the messages then, and the boundary."""
        interior, *boundary = overlap.parts
        compute = self.work.part(overlap.node, interior)
        self.now = self.now + compute
        flights, self.under_way = self.under_way, []
        arrived = self.zero
        for flight in flights:
            arrived = self._finish(flight, arrived, steps)
        rest = sum((self.work.part(overlap.node, part, is_rest=True) for part in boundary), start=self.zero)
        self.now = self.now + rest
        return StepTime(overlap.node, str(overlap.node.name), compute + rest, self.zero, self.zero)

    def _finish(self, flight: _Flight, before: FloatArray, steps: list[StepTime]) -> FloatArray:
        """Complete the time of an exchange that was posted; returns when it has arrived, after the one before it."""
        node, told = flight.step.node, steps[flight.place]
        here, sends = self.transport == LOCKSTEP, self._message_seconds(flight.step)
        begun = self.now if here else np.maximum(before, self._gathered(node, flight.begun))
        takes_part = np.asarray(flight.step.sent + flight.step.received) > 0
        late = np.where(takes_part, np.maximum(self._worked(flight.step), begun + sends - self.now), 0.0)
        wait = np.where(takes_part, np.clip(begun - self.now, 0.0, late), 0.0)
        unpacking = self._packing(node, 2.0 * flight.step.received)
        steps[flight.place] = StepTime(node, told.name, told.compute + unpacking, late - wait, wait)
        self.now = self.now + late + unpacking
        return begun + sends

    # --- messages -----------------------------------------------------------------------------

    def _meeting(self, step: StepCost) -> StepTime:
        """A step in which ranks meet: all that takes part begins when the last one has come."""
        node = step.node
        turns = self.work.turns.get(node, Turns())
        messages = np.asarray(step.messages, np.float64)
        sends = self._message_seconds(step)
        compute = np.full(self.mesh.shape, max(1, turns.count) * self.kernels.step)
        if dialect.is_all_reduce(node):
            compute = compute + messages * MERGE_CALLS * self.kernels.launch
        elif self.transport != LOCKSTEP and not _is_dense(node):
            packed = 2 * (step.sent + step.received)
            compute = compute + self.work.moved(packed, max(1, turns.count))
        communication = self.zero + sends
        wait = self.zero if self.transport == LOCKSTEP else self._gathered(node, self.now) - self.now
        wait = np.where(messages > 0, wait, 0.0)
        self.now = self.now + wait + communication + compute
        return StepTime(node, str(node.name), compute, communication, wait)

    def _worked(self, step: StepCost) -> Number:
        """What messages take of a machine's cores, which compute at the same time: that is hidden behind nothing."""
        shared = self.transport in SHARED_CORES and self.profile.links[self.transport].curve is not None
        return self._sent_seconds(step) if shared else 0.0

    def _message_seconds(self, step: StepCost) -> FloatArray:
        found = self._sent_seconds(step)
        if self.link is None or _is_joined(step.node):
            return found
        return np.maximum(found, np.where(step.messages > 0, self.link.seconds(step.sent, 1.0), 0.0))

    def _sent_seconds(self, step: StepCost) -> FloatArray:
        if _is_joined(step.node):
            whole, empty = (self.profile.message_seconds(n, np.ones(self.mesh.shape), self.transport)
                            for n in (step.sent, self.zero))
            return np.where(step.sent > 0, np.maximum(0.0, whole - empty), 0.0)
        return self.profile.message_seconds(step.sent, np.asarray(step.messages, np.float64), self.transport)

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


def _is_joined(node: ir.Node) -> bool:
    """Whether an exchange travels in the messages of another one."""
    return dialect.is_exchange(node) and dialect.joined_exchange(node) is not None


def _is_dense(node: ir.Node) -> bool:
    """Whether messages are runs of memory: slabs along the first spatial axis, of one case."""
    source, target = node.inputs[0], node.outputs[0]
    assert source is not None
    before, after = dialect.get_layout(source), dialect.get_layout(target)
    differing = [axis for axis, (a, b) in enumerate(zip(before.axes, after.axes, strict=True)) if a != b]
    return differing in ([0], [2]) and (differing == [0] or before.shape[0] == 1)
