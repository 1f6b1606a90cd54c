"""Runs programs: the steps of all ranks of this process, side by side, one transport for all.

Lock-step has every rank here, a distributed process has one; the loop is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from partitioner.ops.base import Call
from partitioner.ops.dtypes import torch_dtype
from partitioner.ops.kernels.moments import merge_moments
from runtime.arena import LARGE, Arena
from runtime.feeds import Drain, Feed, Portion
from runtime.forecast import forecast
from runtime.memory import allocate_buffer, give_back, in_storage_order, load_weight, parts_of, view, views
from runtime.program import (
    Action,
    AllReduce,
    BufferSpec,
    Compute,
    Exchange,
    Finish,
    Forget,
    Load,
    Merge,
    Message,
    Move,
    Post,
    Program,
    Store,
    Window,
    in_turns,
)
from runtime.transports import Handle, Job, Parcel, Transport

Progress = Callable[[int, int, str], None]
"""(steps done, steps in all, name of the step)."""


@dataclass
class Shard:
    """One rank's state: its program, device, weights and the buffers that are alive."""

    program: Program
    device: torch.device
    weights: Mapping[str, torch.Tensor]
    poison: bool = False
    buffers: dict[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])
    arena: Arena = field(default_factory=Arena)

    def tensor(self, name: str) -> torch.Tensor:
        """A weight or a living buffer."""
        found = self.weights.get(name)
        return self.buffers[name] if found is None else found

    def allocate(self, name: str, spec: BufferSpec | None = None) -> torch.Tensor:
        """Bring a buffer into being, or a part of it for a while."""
        spec = spec or self.program.buffers[name]
        self.buffers[name] = allocate_buffer(spec, self.device, self.program.storage, self.poison, self.arena)
        return self.buffers[name]

    def target(self, action: Compute) -> torch.Tensor | None:
        """Memory for a kernel's result: where its input lies, room in a larger buffer, or a large new one; or none."""
        first = action.writes[0]
        if not action.operator.writes_into or not first.is_dense:
            return None
        spec = self.program.buffers[first.buffer]
        there = self.buffers.get(first.buffer)
        if first.fills and (there is None or there.shape != first.box.shape):
            spec = replace(spec, box=first.box)
            if self.device.type != "cpu" or spec.place != "memory" or spec.nbytes <= LARGE:
                return None
            self.allocate(first.buffer, spec)
        return view(self.room(first), first)

    def window(self, window: Window) -> torch.Tensor:
        """The cells of a window; none of a buffer that is not there yet."""
        if not window.box and window.buffer not in self.buffers and window.buffer not in self.weights:
            dtype = torch_dtype(self.program.buffers[window.buffer].dtype)
            return torch.empty(window.box.shape, dtype=dtype, device=self.device)
        return view(self.tensor(window.buffer), window)

    def portion(self, window: Window, fresh: bool = False) -> Portion:
        """The cells of an input (its buffer is brought into being) or of an output."""
        if fresh and (window.fills or window.buffer not in self.buffers):
            self.allocate(window.buffer)
        return Portion(self.program.rank, window.box, self.window(window))

    def room(self, window: Window) -> torch.Tensor:
        """The buffer of a window, brought into being by the first part that is written."""
        return self.buffers[window.buffer] if window.buffer in self.buffers else self.allocate(window.buffer)

    def put(self, window: Window, result: torch.Tensor) -> None:
        """Let a result be the buffer, or copy it to its place in a larger one."""
        if window.fills:
            self.buffers[window.buffer] = result
            return
        for place, part in zip(views(self.room(window), window), parts_of(result, window), strict=True):
            place.copy_(part)

    def parcel(self, message: Message) -> Parcel:
        """A message's cells, axes in storage order."""
        found = [in_storage_order(v, self.program.storage)
                 for w in message.windows for v in views(self.tensor(w.buffer), w)]
        return Parcel(message.peer, tuple(found))


def make_shards(programs: Sequence[Program], devices: Sequence[torch.device], poison: bool = False) -> list[Shard]:
    """Shards with their weights; ranks on one device share them."""
    loaded: dict[torch.device, dict[str, torch.Tensor]] = {}
    for program, device in zip(programs, devices, strict=True):
        if device not in loaded:
            with torch.inference_mode():  # nothing writes to them: kernels may keep them in an order of their own
                loaded[device] = {n: load_weight(t, device, program.storage) for n, t in program.weights.items()}
    arena = Arena()
    return [Shard(p, d, loaded[d], poison, arena=arena) for p, d in zip(programs, devices, strict=True)]


@dataclass(frozen=True)
class _Order:
    """The turns of some programs, and the bytes below the peak in each, which memory that waits for others may take."""

    programs: Sequence[Program]
    turns: Sequence[tuple[int, tuple[int, ...]]]
    spare: Sequence[int]


@dataclass
class Executor:
    """Runs the shards of this process; the transport reaches the others."""

    shards: Sequence[Shard]
    transport: Transport
    under_way: dict[str, Handle] = field(default_factory=dict[str, Handle])
    _known: _Order | None = None

    def run(self, feed: Feed, drain: Drain, progress: Progress | None = None, first: int = 0,
            after: Callable[[int], None] | None = None) -> None:
        """Run every step once, in the order of `in_turns`.

        Args:
            feed: where the inputs come from.
            drain: where the outputs go.
            progress: called after each step.
            first: the turn to begin with, when those before it have been run.
            after: called with the next turn's number after each, unless messages are under way then.
        """
        self.under_way.clear()
        order, arena = self._order(), self.shards[0].arena
        turns, spare = order.turns, order.spare
        arena.begin()
        with torch.inference_mode():
            for index, (number, places) in enumerate(turns[first:], first + 1):
                arena.keep(spare[index - 1])
                steps = [(self.shards[place], self.shards[place].program.steps[number]) for place in places]
                self._act([(shard, step.action) for shard, step in steps], feed, drain)
                for shard, step in steps:
                    for name in step.releases:
                        shard.buffers.pop(name, None)
                if progress is not None:
                    progress(index, len(turns), steps[0][1].action.name)
                if after is not None and index < len(turns) and not self.under_way:
                    after(index)

    @property
    def kept(self) -> int:
        """Bytes that no buffer uses at the moment, kept for those of the next run."""
        return sum(arena.kept for arena in {id(s.arena): s.arena for s in self.shards}.values())

    def _order(self) -> _Order:
        """The turns of the programs that the shards have, found once for all runs of them."""
        programs = [shard.program for shard in self.shards]
        if self._known is None or any(a is not b for a, b in zip(programs, self._known.programs, strict=True)):
            self._known = _Order(programs, in_turns(programs), forecast(programs).spare)
        return self._known

    def _act(self, pairs: Sequence[tuple[Shard, Action]], feed: Feed, drain: Drain) -> None:
        actions = [action for _, action in pairs]
        if isinstance(actions[0], Exchange):
            self.transport.exchange(jobs_of([(s, a) for s, a in pairs if isinstance(a, Exchange)]))
            return
        if isinstance(actions[0], Post):
            jobs = jobs_of([(s, a.exchange) for s, a in pairs if isinstance(a, Post)])
            self.under_way[actions[0].name] = self.transport.post(jobs)
            return
        if isinstance(actions[0], Finish):
            self.under_way.pop(actions[0].name).wait()
            return
        if isinstance(actions[0], AllReduce):
            self._all_reduce([(s, a) for s, a in pairs if isinstance(a, AllReduce)])
            return
        if isinstance(actions[0], Load):
            portions = [shard.portion(a.window, fresh=True) for shard, a in pairs if isinstance(a, Load)]
            feed.load(actions[0].name, portions)
            return
        for shard, action in pairs:
            if isinstance(action, Store) and action.writes and action.window.box:
                drain.store(action.name, shard.portion(action.window))
            elif isinstance(action, Compute):
                compute(shard, action)
            elif isinstance(action, Merge):
                accumulate(shard, action)
            elif isinstance(action, Move):
                move(shard, action)
            elif isinstance(action, Forget):
                spec = shard.program.buffers[action.buffer]
                give_back(shard.buffers[action.buffer], spec, shard.program.storage, action.cells)

    def _all_reduce(self, pairs: Sequence[tuple[Shard, AllReduce]]) -> None:
        """Along one mesh axis after the other: gather the group's partials, merge them in rank order."""
        partials = [[shard.window(w) for w in action.sources] for shard, action in pairs]
        for stage in range(len(pairs[0][1].groups)):
            jobs: list[Job] = []
            inboxes: list[dict[int, list[torch.Tensor]]] = []
            for (shard, action), mine in zip(pairs, partials, strict=True):
                dense = [t.contiguous() for t in mine]
                peers = [r for r in action.groups[stage] if r != shard.program.rank]
                inbox = {peer: [torch.empty_like(t) for t in dense] for peer in peers}
                inboxes.append({**inbox, shard.program.rank: dense})
                jobs.append(Job(shard.program.rank, tuple(Parcel(p, tuple(dense)) for p in peers),
                                tuple(Parcel(p, tuple(inbox[p])) for p in peers)))
            self.transport.exchange(jobs)
            partials = [merge(action.kind, [box[r] for r in action.groups[stage]])
                        for (_, action), box in zip(pairs, inboxes, strict=True)]
        for (shard, action), merged in zip(pairs, partials, strict=True):
            for window, tensor in zip(action.targets, merged, strict=True):
                shard.put(window, tensor)


def jobs_of(pairs: Sequence[tuple[Shard, Exchange]]) -> list[Job]:
    """The messages of an exchange, room for what it brings made and what is kept copied."""
    jobs: list[Job] = []
    for shard, action in pairs:
        for one in action.each:
            if one.target not in shard.buffers:
                shard.allocate(one.target)
            if one.keep is not None:
                source, target = one.keep
                cells = views(shard.tensor(source.buffer), source)
                for kept, place in zip(cells, views(shard.tensor(target.buffer), target), strict=True):
                    place.copy_(kept)
        jobs.append(Job(shard.program.rank, _parcels(shard, [m for one in action.each for m in one.sends]),
                        _parcels(shard, [m for one in action.each for m in one.receives])))
    return jobs


def _parcels(shard: Shard, messages: Sequence[Message]) -> tuple[Parcel, ...]:
    """One parcel for every peer."""
    found: dict[int, tuple[torch.Tensor, ...]] = {}
    for message in messages:
        found[message.peer] = (*found.get(message.peer, ()), *shard.parcel(message).views)
    return tuple(Parcel(peer, tensors) for peer, tensors in found.items())


def accumulate(shard: Shard, action: Merge) -> None:
    """Merge partial results of more cells with those of the cells before."""
    parts = [shard.window(w) for w in action.sources]
    if all(w.buffer in shard.buffers for w in action.targets):
        parts = merge(action.kind, [[shard.window(w) for w in action.targets], parts])
    for window, tensor in zip(action.targets, parts, strict=True):
        shard.put(window, tensor)


def move(shard: Shard, action: Move) -> None:
    """Copy within a buffer, where source and target may overlap."""
    buffer = shard.buffers[action.source.buffer]
    source, target = view(buffer, action.source), view(buffer, action.target)
    overlap = any(a[0].start < b[0].stop and b[0].start < a[0].stop and a != b
                  for a, b in zip(action.source.slices, action.target.slices, strict=True))
    target.copy_(source.clone() if overlap else source)


def merge(kind: str, parts: Sequence[Sequence[torch.Tensor]]) -> list[torch.Tensor]:
    """Partial results of a group merged in rank order: sum, prod, max, min or moments."""
    if kind == "moments":
        return list(merge_moments([(p[0], p[1], p[2]) for p in parts]))
    step = {"sum": torch.add, "prod": torch.mul, "max": torch.maximum, "min": torch.minimum}[kind]
    (result, *rest) = [p[0] for p in parts]
    for other in rest:
        result = step(result, other)
    return [result]


def compute(shard: Shard, action: Compute) -> None:
    """Run one kernel; its result becomes the buffer, or goes into the room that a larger buffer has for it."""
    outs = tuple(w.box for w in action.writes)
    if not any(map(bool, outs)):
        for window in action.writes:
            shard.room(window)
        return
    tensors = tuple(None if w is None else shard.window(w) for w in action.reads)
    boxes = tuple(None if w is None else w.box for w in action.reads)
    first, into = action.writes[0], shard.target(action)
    results = action.operator.run(Call(tensors, boxes, outs, into))
    for window, result in zip(action.writes, results, strict=False):
        if into is None or window is not first:
            shard.put(window, result)
