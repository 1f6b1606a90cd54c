"""Runs programs: the steps of all ranks of this process, side by side, one transport for all.

Lock-step has every rank here, a distributed process has one; the loop is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from partitioner.ops.base import Bound, Call
from partitioner.ops.dtypes import torch_dtype
from partitioner.ops.kernels.moments import merge_moments
from runtime.allocator import give_heap_back
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

MOST_BOUND = 4096
"""Kernels that stay bound from run to run, at 2 KB each: where there are more, each has so much to do that it is bound
anew."""


class Buffers(dict[str, torch.Tensor]):
    """Living buffers by name, and views of them, which slab after slab asks for again."""

    def __init__(self) -> None:
        super().__init__()
        self._views: dict[str, dict[tuple[int, ...], torch.Tensor]] = {}

    def view(self, window: Window) -> torch.Tensor:
        """The cells of a window: a view where every axis is one slice, else a copy."""
        buffer = self[window.buffer]
        if window.fills and buffer.shape == window.box.shape:
            return buffer
        if not window.is_dense:
            return view(buffer, window)
        known = self._views.setdefault(window.buffer, {})
        found = known.get(window.place)
        if found is None:
            found = known[window.place] = view(buffer, window)
        return found

    def __setitem__(self, name: str, buffer: torch.Tensor) -> None:
        self._views.pop(name, None)
        super().__setitem__(name, buffer)

    def pop(self, name: str, *default: Any) -> Any:
        self._views.pop(name, None)
        return super().pop(name, *default)

    def clear(self) -> None:
        self._views.clear()
        super().clear()


class Kernels:
    """The kernels of the actions of one process, each bound when it is called for the first time."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Compute, Bound]] = {}

    def of(self, action: Compute, call: Call) -> Bound:
        """The kernel of an action."""
        known = self._known.get(id(action))
        if known is None or known[0] is not action:
            known = action, action.operator.bind(call)
            if len(self._known) < MOST_BOUND:
                self._known[id(action)] = known
        return known[1]


@dataclass
class Shard:
    """One rank's state: its program, device, weights and the buffers that are alive."""

    program: Program
    device: torch.device
    weights: Mapping[str, torch.Tensor]
    poison: bool = False
    buffers: Buffers = field(default_factory=Buffers)
    arena: Arena = field(default_factory=Arena)
    kernels: Kernels = field(default_factory=Kernels)

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
        if not action.is_direct:
            return None
        first = action.writes[0]
        spec = self.program.buffers[first.buffer]
        there = self.buffers.get(first.buffer)
        if first.fills and (there is None or there.shape != first.box.shape):
            spec = replace(spec, box=first.box)
            if self.device.type != "cpu" or spec.place != "memory" or spec.nbytes <= LARGE:
                return None
            self.allocate(first.buffer, spec)
        return self.buffers.view(first) if first.buffer in self.buffers else view(self.room(first), first)

    def window(self, window: Window) -> torch.Tensor:
        """The cells of a window; none of a buffer that is not there yet."""
        weight = self.weights.get(window.buffer)
        if weight is not None:
            return weight if window.fills else view(weight, window)
        if not window.box and window.buffer not in self.buffers:
            dtype = torch_dtype(self.program.buffers[window.buffer].dtype)
            return torch.empty(window.box.shape, dtype=dtype, device=self.device)
        return self.buffers.view(window)

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
    arena, kernels = Arena(), Kernels()
    return [Shard(p, d, loaded[d], poison, arena=arena, kernels=kernels)
            for p, d in zip(programs, devices, strict=True)]


@dataclass(frozen=True)
class _Turn:
    """What some shards do at once.

    Args:
        releases: buffers that nobody reads after it.
        spare: bytes below the peak, which memory that waits for others may take.
        tidies: whether the C library is to give back what it holds free: before a chain of strips, which leave gaps.
    """

    name: str
    pairs: Sequence[tuple[Shard, Action]]
    releases: Sequence[tuple[Shard, str]]
    spare: int
    tidies: bool

    @cached_property
    def is_nothing(self) -> bool:
        """Whether nobody does anything, as where a step was joined to the one before."""
        return all(isinstance(action, Compute) and not action.writes for _, action in self.pairs)


def _turns(shards: Sequence[Shard]) -> list[_Turn]:
    programs = [shard.program for shard in shards]
    found: list[_Turn] = []
    before = 0
    for (number, places), spare in zip(in_turns(programs), forecast(programs).spare, strict=True):
        steps = [(shards[place], programs[place].steps[number]) for place in places]
        strip = places[0] if programs[0].is_strip else 0
        found.append(_Turn(steps[0][1].action.name, [(shard, step.action) for shard, step in steps],
                           [(shard, name) for shard, step in steps for name in step.releases], spare, strip < before))
        before = strip
    return found


@dataclass
class Executor:
    """Runs the shards of this process; the transport reaches the others."""

    shards: Sequence[Shard]
    transport: Transport
    under_way: dict[str, Handle] = field(default_factory=dict[str, Handle])
    _known: tuple[Sequence[Program], list[_Turn]] = ((), [])

    def run(self, feed: Feed, drain: Drain, progress: Progress | None = None, first: int = 0,
            after: Callable[[int], None] | None = None, watch: Callable[[], None] | None = None) -> None:
        """Run every step once, in the order of `in_turns`.

        Args:
            feed: where the inputs come from.
            drain: where the outputs go.
            progress: called after each step.
            first: the turn to begin with, when those before it have been run.
            after: called with the next turn's number after each, unless messages are under way then.
            watch: called after each step, before its memory is released.
        """
        self.under_way.clear()
        turns, arena = self._order(), self.shards[0].arena
        arena.begin()
        with torch.inference_mode():
            for index, turn in enumerate(turns[first:], first + 1):
                arena.keep(turn.spare)
                if turn.tidies:
                    give_heap_back()
                if not turn.is_nothing:
                    self._act(turn.pairs, feed, drain)
                    if watch is not None:
                        watch()
                for shard, name in turn.releases:
                    shard.buffers.pop(name, None)
                if progress is not None:
                    progress(index, len(turns), turn.name)
                if after is not None and index < len(turns) and not self.under_way:
                    after(index)

    @property
    def kept(self) -> int:
        """Bytes that no buffer uses at the moment, kept for those of the next run."""
        return sum(arena.kept for arena in {id(s.arena): s.arena for s in self.shards}.values())

    def _order(self) -> list[_Turn]:
        """The turns of the programs that the shards have, found once for all runs of them."""
        known, turns = self._known
        programs = [shard.program for shard in self.shards]
        if len(programs) != len(known) or any(a is not b for a, b in zip(programs, known, strict=True)):
            turns = _turns(self.shards)
            self._known = programs, turns
        return turns

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
    source, target = shard.buffers.view(action.source), shard.buffers.view(action.target)
    target.copy_(source.clone() if action.overlaps else source)


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
    if action.is_empty:
        for window in action.writes:
            shard.room(window)
        return
    tensors = tuple([None if w is None else shard.window(w) for w in action.reads])
    into = shard.target(action)
    call = Call(tensors, action.boxes, action.outs, into)
    results = shard.kernels.of(action, call)(call)
    for window, result in zip(action.writes, results, strict=False):
        if into is None or window is not action.writes[0]:
            shard.put(window, result)
