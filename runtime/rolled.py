"""One rank's part of a plan whose chains take turns: the steps of all slabs, over buffers that move along.

How a buffer moves is for `runtime.tracks`; which cells come when, for `partitioner.rolling`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import onnx_ir as ir

from partitioner import dialect
from partitioner.geometry import Box, Interval, Pieces, span
from partitioner.lifetime import Lifetimes
from partitioner.ops.nodes import operator_of
from partitioner.rolling import Chain, Slab, Stage, Turn, order_stages, rolled_axis
from runtime.localiser import Localiser
from runtime.memo import Memo
from runtime.program import (
    Action,
    BufferSpec,
    Compute,
    Exchange,
    Forget,
    Load,
    Merge,
    Move,
    Program,
    Step,
    Store,
    Window,
    buffers_written,
    place,
    windows_read,
    windows_written,
)
from runtime.tracks import Track, first_of, lay_track


class RolledLocaliser(Localiser):
    """The program of one rank of a plan with a schedule."""

    def __init__(self, model: ir.Model, rank: int, lifetimes: Lifetimes, streamed: frozenset[str]) -> None:
        super().__init__(model, rank, lifetimes)
        schedule = dialect.get_schedule(model)
        assert schedule is not None
        self.thickness = schedule.thickness
        self.name = schedule.axis
        self.is_strip = bool(schedule.strips)
        self.streamed = streamed
        self.storage = dialect.get_storage(model)
        self.tracks: dict[str, Track] = {}
        self.specs: dict[str, BufferSpec] = {}
        self.sharers: dict[str, list[ir.Value]] = {}
        self.read: set[ir.Value] = set()
        self.stages = order_stages(list(model.graph), self.name, schedule.strips)
        self.stage_of = {node: i for i, stage in enumerate(self.stages) for node in stage.nodes}
        values = (*model.graph.inputs, *(v for node in model.graph for v in node.outputs))
        self.filed = {self._buffer(v) for v in values if dialect.rests_in_file(v)}
        self.last_stage = self._last_stages()
        self.resting = self._resting_buffers()
        self.memo = Memo(self.here, self.name)
        self.partials: dict[ir.Node, tuple[tuple[Window, ...], list[Merge]]] = {}

    def program(self) -> Program:
        """All steps; buffers are as large as they ever are."""
        steps = _with_releases(list(self._actions()), frozenset(self.weights))
        return Program(self.rank, self.mesh, self.storage, self.specs, self.weights, steps, self.is_strip,
                       is_rolled=True)

    def _buffer(self, value: ir.Value) -> str:
        return self.lifetimes.buffer_of[str(value.name)]

    def _last_stages(self) -> dict[str, int]:
        """Per buffer the last stage that reads or fills it."""
        found: dict[str, int] = {}
        for node, stage in self.stage_of.items():
            for value in (*node.inputs, *node.outputs):
                if value is not None and str(value.name) in self.lifetimes.buffer_of:
                    found[self._buffer(value)] = max(found.get(self._buffer(value), 0), stage)
        return found

    def _resting_buffers(self) -> set[str]:
        """Buffers of values that have the rolled axis and that another stage than their own reads."""
        found: set[str] = set()
        for node, stage in self.stage_of.items():
            for value in node.inputs:
                if value is None or str(value.name) not in self.lifetimes.buffer_of:
                    continue
                if rolled_axis(value, self.name) is None:
                    continue
                producer = value.producer()
                in_slabs = self.stages[stage].is_chain and str(value.name) not in self.streamed
                if (not in_slabs) if producer is None else self.stage_of[producer] != stage:
                    found.add(self._buffer(value))
        return found

    # --- actions ------------------------------------------------------------------------------

    def _actions(self) -> Iterator[Action]:
        for value in self.model.graph.inputs:
            if not value.uses():
                yield from self._read_whole(value)
        thickness = iter(self.thickness)
        for index, stage in enumerate(self.stages):
            yield from self._chain(stage, index, next(thickness)) if stage.is_chain else self._between(stage)

    def _between(self, stage: Stage) -> Iterator[Action]:
        for node in stage.nodes:
            for value in dict.fromkeys(node.inputs):
                if value is not None and value.is_graph_input():
                    yield from self._read_whole(value)
            for value in node.outputs:
                self._make_whole(value)
            yield self._action(node)
            for value in node.outputs:
                yield from self._stores(value)

    def _read_whole(self, value: ir.Value) -> Iterator[Action]:
        """Read all of an input of the model, if that has not been done."""
        if value in self.read:
            return
        self.read.add(value)
        self._make_whole(value)
        yield Load(str(value.name), self._window(value))
        yield from self._stores(value)

    def _chain(self, stage: Stage, index: int, thickness: int) -> Iterator[Action]:
        chain = Chain(stage.nodes, self.name)
        for value in dict.fromkeys(v for node in stage.nodes for v in node.inputs):
            if value is not None and value.is_graph_input() and (
                    value not in chain.extent or self._buffer(value) in self.resting):
                yield from self._read_whole(value)
        slabs = list(chain.slabs(thickness))
        self._lay_tracks(chain, slabs)
        for slab in slabs:
            for turn in slab.turns:
                yield from self._load_part(turn, slab) if isinstance(turn.item, ir.Value) else self._turn(
                    turn.item, turn, slab)
            yield from self._forget(slab, index)

    def _load_part(self, turn: Turn, slab: Slab) -> Iterator[Action]:
        (part,), value = turn.parts, turn.item
        assert part is not None and isinstance(value, ir.Value)
        if value in self.read:
            return
        yield from self._make_room(value, part, slab)
        for piece in self.tracks[self._buffer(value)].pieces(part):
            yield Load(str(value.name), self._window(value, self._part(value, piece)))
        yield from self._stores(value, part)

    def _turn(self, node: ir.Node, turn: Turn, slab: Slab) -> Iterator[Action]:
        for value, part in zip(node.outputs, turn.parts, strict=True):
            if part is not None:
                yield from self._make_room(value, part, slab)
            elif turn.taken is None:
                self._make_whole(value)
        if turn.taken is not None:
            yield from self._partial(node, turn.taken)
        elif dialect.is_exchange(node):
            yield self._exchange_part(node, turn.parts[0])
        else:
            yield self._compute(node, turn)
        for value, part in zip(node.outputs, turn.parts, strict=True):
            if part:
                yield from self._stores(value, part)

    def _compute(self, node: ir.Node, turn: Turn) -> Compute:
        outs = tuple(self._part(v, part) if part is not None else self.memo.owned(v)
                     for v, part in zip(node.outputs, turn.parts, strict=True))
        writes = tuple(self._window(v, out) for v, out in zip(node.outputs, outs, strict=True))
        return Compute(str(node.name), operator_of(node), self._reads(node, outs), writes)

    def _partial(self, node: ir.Node, taken: Interval) -> Iterator[Action]:
        """A partial result of some cells, merged with that of the cells before."""
        if node not in self.partials:
            self.partials[node] = self._merged(node)
        windows, merges = self.partials[node]
        outs = tuple(map(self.memo.owned, node.outputs))
        here = {self.name: span(taken.start, taken.stop)}
        yield Compute(str(node.name), operator_of(node), self._reads(node, outs, here), windows)
        yield from merges

    def _merged(self, node: ir.Node) -> tuple[tuple[Window, ...], list[Merge]]:
        """Where a partial result of some cells is, and what merges it with that of the cells before."""
        outs = tuple(map(self.memo.owned, node.outputs))
        parts = {value: Window(f"{value.name}/part", box, tuple((slice(0, n),) for n in box.shape), True)
                 for value, box in zip(node.outputs, outs, strict=True)}
        for value, window in parts.items():
            assert value.dtype is not None
            self.specs[window.buffer] = BufferSpec(window.buffer, window.box, value.dtype)
        merges: list[Merge] = []
        for user in dict.fromkeys(user for value in node.outputs for user, _ in value.uses()):
            kind, _ = dialect.all_reduce_kind(user)  # the only readers that partial results have
            values = [v for v in user.inputs if v is not None]
            for value in values:
                self._make_whole(value)
            merges.append(Merge(str(user.name), kind, tuple(parts[v] for v in values),
                                tuple(map(self._window, values))))
        return tuple(parts.values()), merges

    def _exchange_part(self, node: ir.Node, part: Interval | None) -> Exchange:
        """The messages of an exchange that concern some cells along the rolled axis."""
        axis = rolled_axis(node.outputs[0], self.name)
        assert axis is not None and part is not None
        return self._exchange(node, lambda box: _replaced(box, axis, span(part.start, part.stop)))

    def _stores(self, value: ir.Value, part: Interval | None = None) -> Iterator[Action]:
        if value.is_graph_output():
            box = None if part is None else self._part(value, part)
            yield Store(str(value.name), self._window(value, box), self._hands_out(value))

    # --- buffers ------------------------------------------------------------------------------

    def _part(self, value: ir.Value, part: Interval) -> Box:
        """This rank's cells of a value, some of those along the rolled axis."""
        axis = self.memo.axis(value)
        assert axis is not None
        return _replaced(self.memo.owned(value), axis, span(part.start, part.stop))

    def _make_whole(self, value: ir.Value) -> None:
        """Room for all of this rank's part of a value."""
        buffer, axis = self._buffer(value), rolled_axis(value, self.name)
        if axis is None:
            self.specs[buffer] = BufferSpec(buffer, self.boxes[buffer], self.lifetimes.buffers[buffer].dtype)
        elif not self._rests(buffer):
            self._set_track(buffer, Track(axis, "resting", dialect.shape_of(value)[axis]))

    def _rests(self, buffer: str) -> bool:
        return buffer in self.tracks and self.tracks[buffer].kind == "resting"

    def _lay_tracks(self, chain: Chain, slabs: Sequence[Slab]) -> None:
        """Decide how the buffers of a chain move."""
        self.sharers = {}
        for value in chain.extent:
            self.sharers.setdefault(self._buffer(value), []).append(value)
        for buffer, values in self.sharers.items():
            axis = rolled_axis(values[0], self.name)
            assert axis is not None
            if self._rests(buffer):
                continue
            extent = chain.extent[values[0]]
            layouts = [dialect.get_layout(v) for v in values]
            alone = all(layout == layouts[0] for layout in layouts) and self._fits(values[0], buffer)
            self._set_track(buffer, Track(axis, "resting", extent) if buffer in self.resting else
                            lay_track(axis, values, slabs, extent, alone))

    def _set_track(self, buffer: str, track: Track) -> None:
        self.tracks[buffer] = track
        box = _replaced(self.boxes[buffer], track.axis, span(0, track.length))
        if buffer in self.specs and self.specs[buffer].box.size >= box.size:
            return
        home = "memory" if track.kind != "resting" else "file" if buffer in self.filed else "resting"
        self.specs[buffer] = BufferSpec(buffer, box, self.lifetimes.buffers[buffer].dtype, home, track.axis)

    def _fits(self, value: ir.Value, buffer: str) -> bool:
        """Whether a value takes all of its buffer along the axes that are not rolled."""
        is_view = self.lifetimes.buffers[buffer].base is not None
        return is_view or dialect.get_layout(value).box(self.here).shape == self.boxes[buffer].shape

    def _make_room(self, value: ir.Value, part: Interval, slab: Slab) -> Iterator[Action]:
        """Before cells are written: a passing buffer begins with them, a sliding one moves what it keeps."""
        buffer = self._buffer(value)
        track = self.tracks[buffer]
        if track.kind == "passing":
            track.origin = part.start
        if track.kind != "sliding" or part.stop - track.origin <= track.length:
            return
        first = min(first_of(slab.kept, self.sharers[buffer]), part.start)
        if first < part.start:
            kept = _replaced(self.specs[buffer].box, track.axis, span(first, part.start))
            before, after = (place(buffer, self.specs[buffer].box, _replaced(kept, track.axis, span(at.start, at.stop)))
                             for at in (*track.slices(Interval(first, part.start)), slice(0, part.start - first)))
            yield Move(str(value.name), before, after)
        track.origin = first

    def _forget(self, slab: Slab, stage: int) -> Iterator[Action]:
        """Resting cells that nobody reads any more are given back."""
        for buffer, values in self.sharers.items():
            if buffer not in self.resting or self.last_stage[buffer] != stage:
                continue
            before, first = first_of(slab.kept, values), first_of(slab.keeps, values)
            if first > before and self.specs[buffer].gives_back(self.storage):
                yield Forget(str(values[0].name), buffer, Interval(before, first))

    def _window(self, value: ir.Value, box: Box | None = None, joined: bool = True) -> Window:
        buffer = self.lifetimes.buffer_of.get(str(value.name))
        if buffer is None or buffer not in self.tracks:  # a weight, or what has no rolled axis
            return self.memo.window(value, box, joined, super()._window)
        track = self.tracks[buffer]
        owned = self.memo.owned(value)
        wanted = owned if box is None else box
        held = self.boxes[buffer] if self.lifetimes.buffers[buffer].base is None else owned
        pieces = wanted.axes[track.axis] or (Interval(track.origin, track.origin),)
        where = tuple(piece for part in pieces for piece in track.slices(part))
        slices = tuple(where if axis == track.axis else self.memo.slices(here, cells, joined)
                       for axis, (here, cells) in enumerate(zip(held.axes, wanted.axes, strict=True)))
        return Window(buffer, wanted, slices, track.kind == "passing")

    def _input_box(self, node: ir.Node, index: int, outs: tuple[Box, ...],
                   taken: Mapping[str, Pieces] | None) -> Box | None:
        return self.memo.input_box(node, index, outs, taken)


def _replaced(box: Box, axis: int, pieces: Pieces) -> Box:
    """A box with other cells along one axis."""
    return Box((*box.axes[:axis], pieces, *box.axes[axis + 1 :]))


def _with_releases(actions: Sequence[Action], weights: frozenset[str]) -> tuple[Step, ...]:
    """Every buffer is given back after the last step that reads it, or before it is made anew."""
    later: set[str] = set()
    found: list[Step] = []
    for action in reversed(actions):
        if isinstance(action, Forget) and action.buffer not in later:
            continue
        read = {w.buffer for w in windows_read(action)} - weights
        uses = read.union(buffers_written(action))
        found.append(Step(action, buffers_written(action), tuple(sorted(uses - later))))
        later |= uses
        later -= {w.buffer for w in windows_written(action) if w.fills} - read
    return tuple(reversed(found))
