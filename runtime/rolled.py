"""One rank's part of a plan whose chains take turns: the steps of all slabs, and windows that move on.

Where a value is kept from slab to slab, its buffer is a window that goes along the rolled axis:

    passing   nothing is kept: what a kernel returns is the buffer, until the slab's last reader
    sliding   few cells are kept: they move to the front before the next ones are written behind them
    ring      many cells are kept: cell c lies at c modulo the buffer's length, and nothing moves
    resting   all of it: later chains read it; cells that nobody reads any more are given back
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import onnx_ir as ir

from partitioner import dialect
from partitioner.geometry import Box, Interval, span
from partitioner.lifetime import Lifetimes
from partitioner.ops.nodes import operator_of
from partitioner.rolling import Chain, Slab, Stage, Turn, order_stages, rolled_axis
from runtime.program import (
    Action,
    AllReduce,
    BufferSpec,
    Compute,
    Exchange,
    Forget,
    Load,
    Localiser,
    Merge,
    Message,
    Move,
    Program,
    Slices,
    Step,
    Store,
    Window,
    place,
)

Kind = Literal["passing", "sliding", "ring", "resting"]


@dataclass
class _Track:
    """Where the cells of a buffer along the rolled axis lie at the moment.

    Args:
        length: cells that the buffer has room for.
        origin: the cell at the front (of a sliding buffer).
        alone: whether its values are as large as the buffer along all other axes.
    """

    axis: int
    kind: Kind
    length: int
    origin: int = 0
    alone: bool = True

    def slices(self, part: Interval) -> tuple[slice, ...]:
        """Where cells lie, in order."""
        if self.kind != "ring":
            return (slice(part.start - self.origin, part.stop - self.origin),)
        first = part.start % self.length
        if first + len(part) <= self.length:
            return (slice(first, first + len(part)),)
        return slice(first, self.length), slice(0, first + len(part) - self.length)


@dataclass(frozen=True)
class _Draft:
    """An action, the buffers that it reads or fills, and those that it brings into being."""

    action: Action
    uses: frozenset[str]
    makes: tuple[str, ...] = ()


class RolledLocaliser(Localiser):
    """The program of one rank of a plan with a schedule."""

    def __init__(self, model: ir.Model, rank: int, lifetimes: Lifetimes, streamed: frozenset[str]) -> None:
        super().__init__(model, rank, lifetimes)
        schedule = dialect.get_schedule(model)
        assert schedule is not None
        self.schedule = schedule
        self.name = schedule.axis
        self.streamed = streamed
        self.tracks: dict[str, _Track] = {}
        self.living: set[str] = set()
        self.specs: dict[str, BufferSpec] = {}
        self.stages = order_stages(list(model.graph), self.name)
        self.stage_of = {node: i for i, stage in enumerate(self.stages) for node in stage.nodes}
        values = (*model.graph.inputs, *(v for node in model.graph for v in node.outputs))
        self.filed = {self._buffer(v) for v in values if dialect.rests_in_file(v)}
        self.last_stage = self._last_stages()
        self.resting = self._resting_buffers()

    def program(self) -> Program:
        """All steps; buffers are as large as they ever are."""
        steps = _with_releases(list(self._drafts()))
        return Program(self.rank, self.mesh, dialect.get_storage(self.model), self.specs, self.weights, steps)

    # --- which buffers rest -------------------------------------------------------------------

    def _buffer(self, value: ir.Value) -> str:
        return self.lifetimes.buffer_of[str(value.name)]

    def _last_stages(self) -> dict[str, int]:
        """Per buffer the last stage that reads it."""
        found: dict[str, int] = {}
        for node, stage in self.stage_of.items():
            for value in (*node.inputs, *node.outputs):
                if value is not None and str(value.name) in self.lifetimes.buffer_of:
                    found[self._buffer(value)] = max(found.get(self._buffer(value), 0), stage)
        return found

    def _resting_buffers(self) -> set[str]:
        found: set[str] = set()
        for node, stage in self.stage_of.items():
            for value in node.inputs:
                if value is None or str(value.name) not in self.lifetimes.buffer_of:
                    continue
                if rolled_axis(value, self.name) is None:
                    continue
                producer = value.producer()
                made = None if producer is None else self.stage_of[producer]
                loaded = made is None and self.stages[stage].is_chain and str(value.name) not in self.streamed
                if not loaded and made != stage:
                    found.add(self._buffer(value))
        return found

    # --- drafts -------------------------------------------------------------------------------

    def _drafts(self) -> Iterator[_Draft]:
        for value in self.model.graph.inputs:
            if not value.uses():
                self._whole(value)
                yield self._load(value)
                yield from self._stores(value)
        chains = 0
        for index, stage in enumerate(self.stages):
            if stage.is_chain:
                yield from self._chain(stage, index, self.schedule.thickness[chains])
                chains += 1
            else:
                yield from self._between(stage)

    def _between(self, stage: Stage) -> Iterator[_Draft]:
        for node in stage.nodes:
            yield from self._inputs(node)
            for value in node.outputs:
                self._whole(value)
            action = self._action(node)
            yield self._draft(action)
            for value in node.outputs:
                yield from self._stores(value)

    def _inputs(self, node: ir.Node) -> Iterator[_Draft]:
        """Read the whole inputs of the model that a node reads and that are not there yet."""
        for value in dict.fromkeys(node.inputs):
            if value is None or not value.is_graph_input() or self._buffer(value) in self.living:
                continue
            self._whole(value)
            yield self._load(value)
            yield from self._stores(value)

    def _chain(self, stage: Stage, index: int, thickness: int) -> Iterator[_Draft]:
        chain = Chain(stage.nodes, self.name)
        for value in chain.extent:
            if value.is_graph_input() and self._buffer(value) in self.resting:
                yield from self._inputs_of(value)
        for node in stage.nodes:
            for value in node.inputs:
                if value is not None and value.is_graph_input() and value not in chain.extent:
                    yield from self._inputs_of(value)
        slabs = list(chain.slabs(thickness))
        self._track(chain, slabs)
        for slab in slabs:
            for turn in slab.turns:
                yield from self._turn(turn, slab, chain)
            yield from self._forget(chain, slab, index)
        for value in chain.extent:
            if value.is_graph_input():
                self.living.discard(self._buffer(value)) if self._buffer(value) not in self.resting else None

    def _inputs_of(self, value: ir.Value) -> Iterator[_Draft]:
        if self._buffer(value) not in self.living:
            self._whole(value)
            yield self._load(value)
            yield from self._stores(value)

    def _turn(self, turn: Turn, slab: Slab, chain: Chain) -> Iterator[_Draft]:
        item = turn.item
        if isinstance(item, ir.Value):
            part = turn.parts[0]
            assert part is not None
            if self._buffer(item) in self.resting and self._buffer(item) in self.living and self._is_loaded(item):
                return
            yield from self._make_room(item, part, slab)
            for piece in self._pieces(item, part):
                window = self._window(item, self._part(item, piece))
                yield self._draft(Load(str(item.name), window), (window.buffer,))
            yield from self._stores(item, part)
            return
        for value, part in zip(item.outputs, turn.parts, strict=True):
            if part is not None:
                yield from self._make_room(value, part, slab)
            elif turn.taken is None:
                self._whole(value)
        if dialect.is_exchange(item):
            assert turn.parts[0] is not None
            yield self._draft(self._exchange_part(item, turn.parts[0]))
        elif turn.taken is not None:
            yield from self._partial(item, turn.taken)
        else:
            yield self._draft(self._compute(item, turn))
        for value, part in zip(item.outputs, turn.parts, strict=True):
            if part:
                yield from self._stores(value, part)

    def _is_loaded(self, value: ir.Value) -> bool:
        """Whether a resting input was read whole before its first chain."""
        return str(value.name) in self.loaded

    loaded: frozenset[str] = frozenset()

    def _compute(self, node: ir.Node, turn: Turn) -> Compute:
        outs = tuple(self._part(v, part) if part is not None else dialect.get_layout(v).box(self.here)
                     for v, part in zip(node.outputs, turn.parts, strict=True))
        reads = self._reads(node, outs)
        writes = tuple(self._window(v, out) for v, out in zip(node.outputs, outs, strict=True))
        return Compute(str(node.name), operator_of(node), reads, writes)

    def _partial(self, node: ir.Node, taken: Interval) -> Iterator[_Draft]:
        """A partial result of some cells, merged with that of the cells before."""
        outs = tuple(dialect.get_layout(v).box(self.here) for v in node.outputs)
        parts = tuple(Window(f"{v.name}/part", box, tuple((slice(0, n),) for n in box.shape), True)
                      for v, box in zip(node.outputs, outs, strict=True))
        for value, window in zip(node.outputs, parts, strict=True):
            assert value.dtype is not None
            self.specs[window.buffer] = BufferSpec(window.buffer, window.box, value.dtype)
        here = {self.name: span(taken.start, taken.stop)}
        yield self._draft(Compute(str(node.name), operator_of(node), self._reads(node, outs, here), parts))
        by_value = dict(zip(node.outputs, parts, strict=True))
        merges = {user: None for value in node.outputs for user, _ in value.uses() if dialect.is_all_reduce(user)}
        for user in merges:
            kind, _ = dialect.all_reduce_kind(user)
            values = [v for v in user.inputs if v is not None]
            for value in values:
                self._whole(value)
            sources = tuple(by_value[v] for v in values)
            targets = tuple(self._window(v) for v in values)
            yield self._draft(Merge(str(user.name), kind, sources, targets))

    def _exchange_part(self, node: ir.Node, part: Interval) -> Exchange:
        """The messages of an exchange that concern some cells along the rolled axis."""
        whole = self._exchange(node)
        value = node.outputs[0]
        axis = rolled_axis(value, self.name)
        assert axis is not None and node.inputs[0] is not None
        source = node.inputs[0]

        def cut(window: Window, value: ir.Value) -> Window:
            return self._window(value, _replace(window.box, axis, part), joined=False)

        keep = None if whole.keep is None else (cut(whole.keep[0], source), cut(whole.keep[1], value))
        return replace(
            whole, source=self._window(source, self._part(source, part)), keep=keep,
            sends=tuple(Message(m.peer, tuple(cut(w, source) for w in m.windows)) for m in whole.sends),
            receives=tuple(Message(m.peer, tuple(cut(w, value) for w in m.windows)) for m in whole.receives))

    def _stores(self, value: ir.Value, part: Interval | None = None) -> Iterator[_Draft]:
        if not value.is_graph_output():
            return
        layout = dialect.get_layout(value)
        first = all(self.here[name] == 0 for name in self.mesh.names if name not in layout.mesh_axes)
        box = None if part is None else self._part(value, part)
        yield self._draft(Store(str(value.name), self._window(value, box), first))

    def _load(self, value: ir.Value) -> _Draft:
        self.loaded = self.loaded | {str(value.name)}
        window = self._window(value)
        return self._draft(Load(str(value.name), window), (window.buffer,))

    # --- buffers ------------------------------------------------------------------------------

    def _part(self, value: ir.Value, part: Interval) -> Box:
        """This rank's cells of a value, some of those along the rolled axis."""
        axis = rolled_axis(value, self.name)
        assert axis is not None
        return _replace(dialect.get_layout(value).box(self.here), axis, part)

    def _whole(self, value: ir.Value) -> None:
        """Room for all of this rank's part of a value."""
        buffer = self._buffer(value)
        self.living.add(buffer)
        if buffer in self.tracks and self.tracks[buffer].kind == "resting":
            return
        axis = rolled_axis(value, self.name)
        if axis is not None:
            self._new_track(buffer, _Track(axis, "resting", dialect.shape_of(value)[axis]))
        else:
            held = self.lifetimes.buffers[buffer]
            self.specs[buffer] = BufferSpec(buffer, self.boxes[buffer], held.dtype)

    def _new_track(self, buffer: str, track: _Track) -> None:
        known = self.specs.get(buffer)
        held = self.lifetimes.buffers[buffer]
        box = _replace(self.boxes[buffer], track.axis, Interval(0, track.length))
        if known is None or known.box.size < box.size:
            place = ("file" if buffer in self.filed else "resting") if track.kind == "resting" else "memory"
            self.specs[buffer] = BufferSpec(buffer, box, held.dtype, place, track.axis)
        self.tracks[buffer] = track

    def _track(self, chain: Chain, slabs: Sequence[Slab]) -> None:
        """Decide how the buffers of a chain move."""
        groups: dict[str, list[ir.Value]] = {}
        for value in chain.extent:
            groups.setdefault(self._buffer(value), []).append(value)
        for buffer, values in groups.items():
            axis = rolled_axis(values[0], self.name)
            assert axis is not None
            if buffer in self.tracks and self.tracks[buffer].kind == "resting":
                continue
            if buffer in self.resting:
                self._new_track(buffer, _Track(axis, "resting", chain.extent[values[0]]))
                continue
            width = kept = step = 0
            before = 0
            for slab in slabs:
                first = min(slab.kept[v] for v in values)
                upto = max(slab.upto[v] for v in values)
                width = max(width, upto - first)
                kept = max(kept, before - min(first, before))
                step = max(step, upto - before)
                before = upto
            alone = all(self._fits(v, buffer) for v in values) and len(values) == 1
            if kept == 0 and alone:
                self._new_track(buffer, _Track(axis, "passing", width))
            elif kept <= step:
                self._new_track(buffer, _Track(axis, "sliding", width, alone=alone))
            else:
                length = min(-(-width // step) * step, chain.extent[values[0]])
                self._new_track(buffer, _Track(axis, "ring", max(length, width), alone=alone))

    def _fits(self, value: ir.Value, buffer: str) -> bool:
        return dialect.get_layout(value).box(self.here).shape == self.boxes[buffer].shape or \
            self.lifetimes.buffers[buffer].base is not None

    def _make_room(self, value: ir.Value, part: Interval, slab: Slab) -> Iterator[_Draft]:
        """Before cells are written: a passing buffer begins with them, a sliding one moves what it keeps."""
        buffer = self._buffer(value)
        track = self.tracks[buffer]
        self.living.add(buffer)
        if track.kind == "passing":
            track.origin = part.start
            return
        if track.kind != "sliding" or part.stop - track.origin <= track.length:
            return
        first = min(slab.kept[v] for v in slab.kept if self._buffer(v) == buffer)
        first = min(first, part.start)
        if first < part.start:
            whole = self.specs[buffer].box
            old = track.slices(Interval(first, part.start))
            new = (slice(0, part.start - first),)
            slices = tuple((slice(0, n),) for n in whole.shape)
            yield self._draft(Move(str(value.name), *(
                Window(buffer, _replace(whole, track.axis, Interval(first, part.start)),
                       (*slices[: track.axis], where, *slices[track.axis + 1 :])) for where in (old, new))))
        track.origin = first

    def _pieces(self, value: ir.Value, part: Interval) -> Iterator[Interval]:
        """Cells side by side in the buffer."""
        start = part.start
        for piece in self.tracks[self._buffer(value)].slices(part):
            yield Interval(start, start + piece.stop - piece.start)
            start += piece.stop - piece.start

    def _forget(self, chain: Chain, slab: Slab, index: int) -> Iterator[_Draft]:
        """Resting cells that nobody reads any more are given back."""
        for value in chain.extent:
            buffer = self._buffer(value)
            if buffer not in self.resting or self.last_stage[buffer] != index:
                continue
            values = [v for v in chain.extent if self._buffer(v) == buffer]
            first, before = (min(ends[v] for v in values) for ends in (slab.keeps, slab.kept))
            if first > before and value is values[0] and buffer in self.living:
                there = self.tracks[buffer].length - before
                yield self._draft(Forget(str(value.name), buffer, first, (first - before) / there))

    def _window(self, value: ir.Value, box: Box | None = None, joined: bool = True) -> Window:
        name = str(value.name)
        if name in self.weights or self._buffer(value) not in self.tracks:
            return super()._window(value, box, joined)
        buffer = self._buffer(value)
        track = self.tracks[buffer]
        wanted = dialect.get_layout(value).box(self.here) if box is None else box
        held = self.boxes[buffer] if self.lifetimes.buffers[buffer].base is None else \
            dialect.get_layout(value).box(self.here)
        found = place(buffer, _replace(held, track.axis, None, wanted), wanted, joined)
        (part, *others) = wanted.axes[track.axis] or (Interval(track.origin, track.origin),)
        where: list[slice] = list(track.slices(part))
        for piece in others:
            where += track.slices(piece)
        slices: Slices = (*found.slices[: track.axis], tuple(where), *found.slices[track.axis + 1 :])
        return Window(buffer, wanted, slices, track.kind == "passing")

    def _draft(self, action: Action, makes: Iterable[str] = ()) -> _Draft:
        windows = list(_windows(action))
        fresh = [w.buffer for w in _written(action) if w.fills]
        return _Draft(action, frozenset(w.buffer for w in windows if w.buffer not in self.weights),
                      (*makes, *fresh))


def _replace(box: Box, axis: int, part: Interval | None, like: Box | None = None) -> Box:
    """A box with other cells along one axis."""
    pieces = like.axes[axis] if part is None and like is not None else span(part.start, part.stop) if part else ()
    return Box((*box.axes[:axis], pieces, *box.axes[axis + 1 :]))


def _windows(action: Action) -> Iterator[Window]:
    match action:
        case Load() | Store():
            yield action.window
        case Compute():
            yield from (w for w in (*action.reads, *action.writes) if w is not None)
        case Exchange():
            yield action.source
            yield Window(action.target, action.source.box, ())
        case AllReduce() | Merge():
            yield from (*action.sources, *action.targets)
        case Move():
            yield from (action.source, action.target)
        case Forget():
            pass


def _written(action: Action) -> Sequence[Window]:
    match action:
        case Compute():
            return action.writes
        case Load():
            return (action.window,)
        case _:
            return ()


def _with_releases(drafts: Sequence[_Draft]) -> tuple[Step, ...]:
    """Every buffer is given back after the last step that reads it, or before it is made anew."""
    later: set[str] = set()
    found: list[Step] = []
    for draft in reversed(drafts):
        if isinstance(draft.action, Forget) and draft.action.buffer not in later:
            continue
        found.append(Step(draft.action, draft.makes, tuple(sorted(draft.uses - later))))
        later |= draft.uses
        later -= {w.buffer for w in _written(draft.action) if w.fills}
    return tuple(reversed(found))
