"""From a plan to one rank's program of whole-shard steps: windows, releases, parts where messages travel meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import onnx_ir as ir

from partitioner import dialect
from partitioner.exchange import RankExchange, plan_exchange
from partitioner.geometry import Box, Pieces
from partitioner.lifetime import Lifetimes, Shifts
from partitioner.mesh import Mesh
from partitioner.ops.nodes import input_box, operator_of
from runtime.program import (
    Action,
    AllReduce,
    BufferSpec,
    Compute,
    Exchange,
    Finish,
    Load,
    Message,
    Post,
    Program,
    Step,
    Store,
    Window,
    nothing,
    place,
)


class Localiser:
    """Whole-shard steps: one per node, but where a node computes while messages travel."""

    def __init__(self, model: ir.Model, rank: int, lifetimes: Lifetimes, overlaps: bool = True) -> None:
        self.model = model
        self.rank = rank
        self.mesh = dialect.get_mesh(model)
        self.here = self.mesh.coordinates(rank)
        self.lifetimes = lifetimes
        self.boxes = {b.name: b.layout.box(self.here) for b in lifetimes.buffers.values()}
        self.overlaps = lifetimes.overlaps if overlaps else {}
        self.posted = {exchange for overlap in self.overlaps.values() for exchange in overlap.exchanges}
        self.joined: dict[str, list[ir.Node]] = {}
        for node in model.graph:
            leader = dialect.joined_exchange(node)
            if leader is not None:
                self.joined.setdefault(leader, []).append(node)
        self._shares: dict[ir.Node, RankExchange] = {}
        self.weights = {str(v.name): v.const_value for v in model.graph.initializers.values()
                        if v.const_value is not None and v.uses()}

    def program(self) -> Program:
        specs = {b.name: BufferSpec(b.name, self.boxes[b.name], b.dtype) for b in self.lifetimes.buffers.values()}
        return Program(self.rank, self.mesh, dialect.get_storage(self.model), specs, self.weights, tuple(self._steps()))

    def _steps(self) -> Iterator[Step]:
        born: dict[int, list[str]] = {}
        dies: dict[int, list[str]] = {}
        for buffer in self.lifetimes.buffers.values():
            born.setdefault(buffer.born, []).append(buffer.name)
            dies.setdefault(buffer.dies, []).append(buffer.name)
        inputs = {self.lifetimes.buffer_of[str(v.name)]: v for v in self.model.graph.inputs}
        outputs = {v for v in self.model.graph.outputs}
        for index, node in enumerate(self.model.graph):
            fresh = born.get(index, [])
            for name in [n for n in fresh if n in inputs]:
                value = inputs[name]
                yield Step(Load(str(value.name), self._window(value)), (name,), ())
                if value in outputs:
                    yield self._store(value)
            leaving = [value for value in node.outputs if value in outputs]
            stored = self._stored(leaving)
            over = tuple(name for name in dies.get(index, ()) if name not in stored)
            first, *others = self._acts(node)
            yield Step(first, tuple(n for n in fresh if n not in inputs), () if others else over)
            for action in others:
                yield Step(action, (), over if action is others[-1] else ())
            for value in leaving:
                yield self._store(value, tuple(n for n in dies.get(index, ()) if n in stored)
                                  if value is leaving[-1] else ())

    def _stored(self, values: Sequence[ir.Value]) -> set[str]:
        """The buffers in which values lie that are stored after their node, those of which these are views too."""
        found: set[str] = set()
        for value in values:
            name: str | None = self.lifetimes.buffer_of[str(value.name)]
            while name is not None:
                found.add(name)
                name = self.lifetimes.buffers[name].base
        return found

    def _store(self, value: ir.Value, releases: tuple[str, ...] = ()) -> Step:
        return Step(Store(str(value.name), self._window(value), self._hands_out(value)), (), releases)

    def _hands_out(self, value: ir.Value) -> bool:
        """Whether this rank is the first of those that hold its part."""
        held = dialect.get_layout(value).mesh_axes
        return all(self.here[name] == 0 for name in self.mesh.names if name not in held)

    def _window(self, value: ir.Value, box: Box | None = None, joined: bool = True) -> Window:
        """Cells of a value in its buffer; all that this rank owns unless a box is given."""
        name = str(value.name)
        if name in self.weights:
            whole = Box.whole(dialect.shape_of(value))
            return place(name, whole, whole if box is None else box)
        buffer = self.lifetimes.buffer_of[name]
        owned = dialect.get_layout(value).box(self.here)
        held = self.boxes[buffer] if self.lifetimes.buffers[buffer].base is None else owned
        wanted = owned if box is None else box
        if name not in self.lifetimes.shifts:
            return place(buffer, held, wanted, joined)
        found = place(buffer, held, _shifted(wanted, self.lifetimes.shifts[name]), joined)
        return replace(found, box=wanted, fills=False)

    def _acts(self, node: ir.Node) -> Sequence[Action]:
        if node in self.posted:
            return (Post(self._exchange(node)),)
        overlap = self.overlaps.get(node)
        if overlap is None:
            return (self._action(node),)
        interior, *boundary = (self._compute_part(node, part.box(self.here)) for part in overlap.parts)
        finishes = [Finish(self._exchange(exchange)) for exchange in overlap.exchanges]
        placed = [replace(c, writes=tuple(replace(w, fills=False) for w in c.writes)) for c in boundary]
        return (interior, *finishes, *placed)

    def _compute_part(self, node: ir.Node, out: Box) -> Compute:
        """A part of a node's result; what comes after the interior goes into the buffer that is there then."""
        outs = (out,) * len(node.outputs)
        writes = tuple(self._window(v, out) for v in node.outputs)
        return Compute(str(node.name), operator_of(node), self._reads(node, outs), writes)

    def _action(self, node: ir.Node) -> Action:
        if dialect.is_exchange(node):
            if dialect.joined_exchange(node) is not None:  # it has come with the one before
                return nothing(str(node.name))
            return replace(self._exchange(node), joined=tuple(map(self._exchange, self.joined.get(str(node.name), ()))))
        if dialect.is_all_reduce(node):
            return self._all_reduce(node)
        outs = tuple(dialect.get_layout(v).box(self.here) for v in node.outputs)
        writes = tuple(self._window(v) for v in node.outputs)
        return Compute(str(node.name), operator_of(node), self._reads(node, outs), writes)

    def _reads(self, node: ir.Node, outs: tuple[Box, ...],
               taken: Mapping[str, Pieces] | None = None) -> tuple[Window | None, ...]:
        found: list[Window | None] = []
        for index, value in enumerate(node.inputs):
            box = None if value is None else self._input_box(node, index, outs, taken)
            found.append(None if box is None or value is None else self._window(value, box))
        return tuple(found)

    def _input_box(self, node: ir.Node, index: int, outs: tuple[Box, ...],
                   taken: Mapping[str, Pieces] | None) -> Box | None:
        return input_box(node, index, outs, self.here, taken)

    def _exchange(self, node: ir.Node, cut: Callable[[Box], Box] = lambda box: box) -> Exchange:
        """An exchange, or what `cut` leaves of every box of it."""
        source, target = node.inputs[0], node.outputs[0]
        assert source is not None
        if node not in self._shares:
            plan = plan_exchange(self.mesh, dialect.get_layout(source), dialect.get_layout(target))
            self._shares[node] = plan.for_rank(self.rank)
        part = self._shares[node]
        shared = self.lifetimes.buffer_of[str(source.name)] == self.lifetimes.buffer_of[str(target.name)]

        def window(value: ir.Value, box: Box) -> Window:
            return self._window(value, cut(box), joined=False)

        keep = (window(source, part.keep), window(target, part.keep)) if part.keep and not shared else None
        return Exchange(
            str(node.name), self._window(source, cut(dialect.get_layout(source).box(self.here))),
            self.lifetimes.buffer_of[str(target.name)], keep,
            tuple(Message(t.target, (window(source, t.box),)) for t in part.sends),
            tuple(Message(t.source, (window(target, t.box),)) for t in part.receives),
        )

    def _all_reduce(self, node: ir.Node) -> AllReduce:
        kind, names = dialect.all_reduce_kind(node)
        sources = tuple(self._window(v) for v in node.inputs if v is not None)
        targets = tuple(self._window(v) for v in node.outputs)
        groups = tuple(reduction_group(self.mesh, self.rank, name) for name in names)
        return AllReduce(str(node.name), kind, sources, targets, groups)


def reduction_group(mesh: Mesh, rank: int, name: str) -> tuple[int, ...]:
    """The ranks that differ from this one along one mesh axis only, itself included, in order."""
    here = mesh.coordinates(rank)
    return tuple(mesh.rank({**here, name: i}) for i in range(mesh.count(name)))


def _shifted(box: Box, shifts: Shifts) -> Box:
    """The same cells as a part of another value."""
    axes = list(box.axes)
    for axis, start in shifts:
        axes[axis] = tuple(piece.shift(start) for piece in axes[axis])
    return Box(tuple(axes))
