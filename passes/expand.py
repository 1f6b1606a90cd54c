"""expand: one ONNX graph in which every device has its own nodes and exchanges are real Slice and Concat.

    before (one node for all)    after (two devices)
    h = HaloExchange(x)          x@0 = Slice(x)                    x@1 = Slice(x)
    y = Conv(h)  pads 1,1        h@0 = HaloExchange_1(x@0, x@1)    h@1 = HaloExchange_2(x@1, x@0)
                                 y@0 = Conv(h@0)  pads 1,0         y@1 = Conv(h@1)  pads 0,1
                                 y = Concat(y@0, y@1)

Every value of every device has exactly the cells that the device holds; a value that has none on a device
is not there at all.  The functions of the exchanges read the shards of other devices, own shard first, so a
missing halo shows when onnxruntime runs the graph.  Weights are shared.  Every node says on which device it
runs, in ONNX's multi-device annotation (IR version 11).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from partitioner import dialect
from partitioner.errors import PartitionError
from partitioner.exchange import plan_exchange
from partitioner.geometry import Box
from partitioner.ops.emitter import Emitter, Scope
from partitioner.ops.nodes import input_box, operator_of
from passes.assembly import Library, Source, assemble, exchange_body, merge_body, recipe
from passes.base import Check, Pass
from passes.checks import ALL, MET, SPLIT

LARGEST = 64
IR_VERSION = 11
"""The first IR version with multi-device annotations; onnxruntime reads it from 1.23 on."""

_GLOBAL = frozenset({dialect.HALO_EXCHANGE, dialect.RESHARD, dialect.ALL_REDUCE, dialect.ALL_REDUCE_MOMENTS})


@dataclass(frozen=True)
class Expand(Pass):
    """Replace a plan by its expanded form, which is no plan any more."""

    name: ClassVar[str] = "expand"
    requires: ClassVar[tuple[Check, ...]] = (MET, SPLIT)
    breaks: ClassVar[tuple[Check, ...]] = ALL

    def apply(self, model: ir.Model) -> None:
        found = expand(model)
        model.graph, model.ir_version = found.graph, found.ir_version
        model.functions.clear()
        model.functions.update(found.functions)
        model.metadata_props.clear()
        model.device_configurations = found.device_configurations


def expand(plan: ir.Model) -> ir.Model:
    """The expanded form of a plan; the plan stays as it is.

    Raises:
        PartitionError: when the model is no plan, or has more than 64 ranks.
    """
    mesh = dialect.get_mesh(plan)
    if mesh.size > LARGEST:
        raise PartitionError(f"mesh {mesh} has {mesh.size} ranks; the expanded form is for up to {LARGEST}: "
                             "use a smaller mesh, or keep the plan form")
    return _Expansion(plan).model()


class _Expansion:
    def __init__(self, plan: ir.Model) -> None:
        self.plan = plan
        self.mesh = dialect.get_mesh(plan)
        self.places = [self.mesh.coordinates(rank) for rank in self.mesh]
        self.devices = ir.ModelConfiguration("devices", self.mesh.size, tuple(f"rank{r}" for r in self.mesh))
        self.scope = Scope(plan.graph.opset_imports[""])
        self.library = Library()
        self.shards: dict[tuple[str, int], str] = {}
        """(value of the plan, rank) -> name of the rank's tensor; nothing where the rank holds no cell."""
        self.parts: dict[tuple[str, int, Box], str] = {}
        self.boxes: dict[ir.Value, list[Box]] = {}

    def model(self) -> ir.Model:
        graph = self.plan.graph
        inputs = [ir.Value(name=value.name, shape=value.shape, type=value.type) for value in graph.inputs]
        for whole in inputs:
            self.scope.add(whole)
        for value in graph.initializers.values():
            self.scope.weight(value)
        for value in graph.outputs:
            if value.producer() is not None:  # keeps the name free for the whole output
                self.scope.add(ir.Value(name=value.name))
        for value in graph.inputs:
            self._cut(value)
        for node in graph:
            self._visit(node)
        return self._finish(inputs, [self._output(value) for value in graph.outputs])

    def _finish(self, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value]) -> ir.Model:
        known = {o.op_type for o in self.plan.graph if o.domain == dialect.DOMAIN} - _GLOBAL
        functions = [self.plan.functions[key].clone() for key in self.plan.functions if key[1] in known]
        functions += self.library.functions.values()
        imports = {**self.plan.graph.opset_imports, dialect.DOMAIN: dialect.VERSION}
        used = {value for node in self.scope.nodes for value in node.inputs}
        weights = [value for value in self.scope.initializers if value in used]
        graph = ir.Graph(inputs, outputs, nodes=self.scope.nodes, initializers=weights, opset_imports=imports,
                         name=self.plan.graph.name,
                         doc_string=f"expanded over {self.mesh}: node@rank runs on that rank's device")
        return ir.Model(graph, ir_version=max(self.plan.ir_version, IR_VERSION), functions=functions,
                        producer_name=self.plan.producer_name, producer_version=self.plan.producer_version,
                        device_configurations=(self.devices,))

    def _box(self, value: ir.Value, rank: int) -> Box:
        """The cells that a rank holds of a value."""
        if value not in self.boxes:
            layout = dialect.get_layout(value)
            self.boxes[value] = [layout.box(place) for place in self.places]
        return self.boxes[value][rank]

    def _cut(self, value: ir.Value) -> None:
        """Every rank's part of an input."""
        whole = Box.whole(dialect.shape_of(value))
        source = Source(str(value.name), whole, whole)
        for rank in self.mesh:
            box, emitter = self._box(value, rank), Emitter(self.scope, f"{value.name}@{rank}/")
            if box == whole:
                self.shards[str(value.name), rank] = source.name
            elif box:
                self._bind(value, rank, assemble(emitter, box, [source]))
            self._place(emitter, rank)

    def _output(self, value: ir.Value) -> ir.Value:
        """A whole output, from the ranks that own it; of replicas the first rank's."""
        if value.producer() is None:  # an input that is an output too
            return self.scope.values[str(value.name)]
        sources = [Source(self.shards[str(value.name), rank], self._box(value, rank), self._box(value, rank))
                   for rank in self.mesh if (str(value.name), rank) in self.shards]
        emitter = Emitter(self.scope, f"{value.name}/")
        whole = Box.whole(dialect.shape_of(value))
        assert value.dtype is not None
        result = assemble(emitter, whole, sources) if whole else emitter.zeros(whole.shape, value.dtype)
        if result in {source.name for source in sources}:
            result = emitter.op("Identity", [result])
        del self.scope.values[str(value.name)]
        found = self.scope.values[result]
        self.scope.rename(result, str(value.name))
        found.shape, found.type = value.shape, value.type
        return found

    def _bind(self, value: ir.Value, rank: int, result: str) -> None:
        """Let a tensor be a rank's shard of a value."""
        name = self.scope.fresh(f"{value.name}@{rank}")
        self.scope.rename(result, name)
        shard = self.scope.values[name]
        shard.shape, shard.type = ir.Shape(self._box(value, rank).shape), value.type
        self.shards[str(value.name), rank] = name

    def _place(self, emitter: Emitter, rank: int) -> None:
        """Say on which device the nodes of an emitter run."""
        for node in emitter.nodes:
            specs = tuple(ir.ShardingSpec(value=value, device=(rank,)) for value in node.outputs)
            node.device_configurations = (ir.NodeDeviceConfiguration(self.devices, specs),)

    def _visit(self, node: ir.Node) -> None:
        if dialect.is_all_reduce(node):
            self._all_reduce(node)
            return
        for rank in self.mesh:
            emitter = Emitter(self.scope, f"{node.name}@{rank}/", node)
            act = self._exchange if dialect.is_exchange(node) else self._compute
            self._settle(emitter, node, rank, act(emitter, node, rank))

    def _settle(self, emitter: Emitter, node: ir.Node, rank: int, results: Sequence[str]) -> None:
        """Let a rank's results be its shards of the node's outputs."""
        for value, result in zip(node.outputs, results, strict=False):
            if result:
                self._bind(value, rank, result)
        if results:
            emitter.name_main(f"{node.name}@{rank}")
        self._place(emitter, rank)

    def _compute(self, emitter: Emitter, node: ir.Node, rank: int) -> Sequence[str]:
        """A rank's own node; none where it has nothing to compute."""
        operator = operator_of(node)
        outs = tuple(self._box(value, rank) for value in node.outputs[: len(operator.outputs)])
        names: list[str | None] = []
        boxes: list[Box | None] = []
        for index, value in enumerate(node.inputs):
            box = None if value is None else input_box(node, index, outs, self.places[rank])
            boxes.append(box)
            names.append(self._read(value, rank, box) if value is not None and box and any(outs) else None)
        if not any(outs) or (dialect.get_partial(node) and not boxes[0]):
            return ()
        results = operator.emit(emitter, names, boxes, outs)
        own = {str(value.name) for made in emitter.nodes for value in made.outputs}
        return [name if name in own or not out else emitter.op("Identity", [name])
                for name, out in zip(results, outs, strict=True)]

    def _read(self, value: ir.Value, rank: int, box: Box) -> str:
        """The cells of a value that a node reads: all that the rank holds, or a part cut out of it."""
        if value.const_value is not None:
            name, held = self.scope.weight(value), Box.whole(dialect.shape_of(value))
        else:
            name, held = self.shards[str(value.name), rank], self._box(value, rank)
        key = (name, rank, box)
        if box != held and key not in self.parts:
            emitter = Emitter(self.scope, f"{value.name}.part{len(self.parts)}@{rank}/")
            self.parts[key] = assemble(emitter, box, [Source(name, held, held)])
            self._place(emitter, rank)
        return name if box == held else self.parts[key]

    def _exchange(self, emitter: Emitter, node: ir.Node, rank: int) -> Sequence[str]:
        source, target = node.inputs[0], node.outputs[0]
        assert source is not None
        box = self._box(target, rank)
        if not box:
            return ()
        part = plan_exchange(self.mesh, dialect.get_layout(source), dialect.get_layout(target)).for_rank(rank)
        taken = ({rank: part.keep} if part.keep else {}) | {t.source: t.box for t in part.receives}
        sources = [Source(self.shards[str(source.name), peer], self._box(source, peer), cells)
                   for peer, cells in taken.items()]
        name = self.library.name_of(node.op_type, recipe(box, sources),
                                    lambda: exchange_body(box, sources, self.scope.opset))
        return emitter.call(name, [s.name for s in sources], domain=dialect.DOMAIN)

    def _all_reduce(self, node: ir.Node) -> None:
        """Along one mesh axis after the other, every rank merges its group's partials in rank order."""
        kind, axes = dialect.all_reduce_kind(node)
        values = [value for value in node.inputs if value is not None]
        emitters = {rank: Emitter(self.scope, f"{node.name}@{rank}/", node) for rank in self.mesh}
        partials = {rank: [self.shards[str(value.name), rank] for value in values]
                    for rank in self.mesh if (str(values[0].name), rank) in self.shards}
        for axis in axes:
            groups = {rank: [r for r in self._group(rank, axis) if r in partials] for rank in self.mesh}
            partials = {rank: self._merge(emitters[rank], node, kind, [partials[r] for r in group])
                        for rank, group in groups.items() if group}
        for rank, emitter in emitters.items():
            self._settle(emitter, node, rank, partials.get(rank, ()))

    def _group(self, rank: int, axis: str) -> Sequence[int]:
        """The ranks that differ from this one along one mesh axis only, itself included."""
        return [self.mesh.rank({**self.places[rank], axis: i}) for i in range(self.mesh.count(axis))]

    def _merge(self, emitter: Emitter, node: ir.Node, kind: str,
               parts: Sequence[Sequence[str]]) -> Sequence[str]:
        dtype, width, count = node.outputs[-1].dtype, len(parts[0]), len(parts)
        assert dtype is not None
        name = self.library.name_of(node.op_type, (kind, width, dtype, count),
                                    lambda: merge_body(kind, width, dtype, count, self.scope.opset))
        return emitter.call(name, [n for part in parts for n in part], outputs=width, domain=dialect.DOMAIN)
