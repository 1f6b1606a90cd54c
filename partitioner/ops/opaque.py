"""Operators without a rule: whole inputs in, whole outputs out, computed by onnxruntime on every rank.

    y = Det(x)         x is gathered first (a Reshard, shown in the plan with its bytes); every rank runs the node
    r = Region0(c, x)  an If, Loop or Scan with what its subgraphs read as inputs, a function of the plan

Only what is deterministic and has extents known beforehand; everything else is refused by name and reason.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import onnx_ir as ir

from partitioner import dialect
from partitioner.geometry import Box
from partitioner.ops.base import Call, Needs, NodeView, Operator, TensorType, Unsupported, statistics, whole
from partitioner.ops.dtypes import is_known

if TYPE_CHECKING:
    import onnx
    import torch

    from partitioner.ops.emitter import Emitter
else:
    from partitioner.lazy import torch

RANDOM = frozenset({"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial",
                    "Bernoulli", "Dropout"})
DOMAINS = ("", "com.microsoft", "ai.onnx.ml")
"""Domains whose operators onnxruntime knows."""

CONSTANT_BYTES = 1 << 20
"""Constants up to this size are part of the node that onnxruntime runs; larger ones are inputs."""

SAME_SINCE: Mapping[str, int] = {"RoiAlign": 16}
"""Operators that onnxruntime knows in an older version only, which differs in nothing but the element types."""


@dataclass(frozen=True)
class Opaque(Operator):
    """A node that onnxruntime computes on whole tensors; a split axis that it keeps is cropped afterwards.

    Args:
        model: the node as a model of its own, serialised.
        feeds: per input of that model, the index of the node's input.
        kept: per input, the axes whose extent an output has at the same place.
    """

    model: bytes
    feeds: tuple[int, ...]
    kept: tuple[tuple[int, ...], ...]

    @property
    def has_gradient(self) -> bool:
        return False

    @classmethod
    def read(cls, view: NodeView) -> Self:
        raise Unsupported("this operator has no rule; export the model without it")

    @classmethod
    def of(cls, node: ir.Node, view: NodeView) -> Self:
        """The operator of a node without a rule.

        Raises:
            Unsupported: with the reason why it cannot run replicated either.
        """
        _refuse(node, view)
        feeds = tuple(i for i, t in enumerate(view.inputs) if t is not None and not _is_small(node.inputs[i]))
        if not feeds:
            raise Unsupported("its result does not depend on the data; it should have been folded")
        model = _model_of(node, view, feeds)
        outputs = _outputs(model, dialect.region_extents(node) if dialect.is_region(node) else ())
        shapes = [t.shape for t in outputs]
        kept = tuple(_kept(t, shapes) for t in view.inputs)
        return cls(view.inputs, tuple(outputs), model, feeds, kept)

    def needs(self, output: int = 0) -> Needs:
        found: list[tuple[Any, ...] | None] = []
        for index, given in enumerate(self.inputs):
            if given is None or index not in self.feeds:
                found.append(None)
                continue
            same = self.kept[index] if given.shape == self.outputs[output].shape else ()
            needs = whole(given.shape)
            found.append(tuple(statistics(a, n) if a in same else needs[a] for a, n in enumerate(given.shape)))
        return tuple(found)

    def run(self, call: Call) -> tuple[torch.Tensor, ...]:
        session = _session(self.model)
        device = next((t.device for t in call.tensors if t is not None), torch.device("cpu"))
        arrays = {f"x{i}": call.tensor(i).detach().cpu().contiguous().numpy() for i in self.feeds}
        results: Any = session.run(None, arrays)
        found: list[torch.Tensor] = []
        for array, declared, out in zip(results, self.outputs, call.outs, strict=False):
            if tuple(array.shape) != declared.shape:
                raise RuntimeError(f"a node without a rule yields extents {list(array.shape)}, "
                                   f"{list(declared.shape)} were inferred")
            cells = tuple(slice(i.start, i.stop) for i in out.intervals())
            found.append(torch.from_numpy(np.array(np.asarray(array)[cells], copy=True)).to(device))
        return tuple(found)

    def emit(self, emitter: Emitter, names: Sequence[str | None], boxes: Sequence[Box | None],
             outs: Sequence[Box]) -> tuple[str, ...]:
        results = emitter.same(names, len(outs))
        found: list[str] = []
        for name, declared, out in zip(results, self.outputs, outs, strict=True):
            spans = {axis: (i.start, i.stop) for axis, i in enumerate(out.intervals())
                     if len(i) != declared.shape[axis]}
            found.append(emitter.crop(name, spans))
        return tuple(found)

    def workspace(self, ins: Sequence[float], outs: Sequence[float]) -> float:
        """Copies of the inputs for onnxruntime, and its whole results."""
        given = [t for t in self.inputs if t is not None]
        return float(sum(np.prod(t.shape) * t.itemsize for t in (*given, *self.outputs)))


def _kept(given: TensorType | None, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Axes that stay split: those of an input of the very extents of an output."""
    return () if given is None or given.shape not in shapes else tuple(range(given.rank))


def _refuse(node: ir.Node, view: NodeView) -> None:
    if node.domain not in DOMAINS and not dialect.is_region(node):
        raise Unsupported(f"domain '{node.domain}' is unknown; register the operator (docs/operators.md) or export the "
                          "model without it")
    if view.op_type in RANDOM or any(n.op_type in RANDOM for n in subgraph_nodes(node)):
        raise Unsupported("it draws random numbers; export the model without it")
    for value in (*node.inputs, *node.outputs):
        if value is not None and isinstance(value.type, ir.SequenceType | ir.OptionalType):
            raise Unsupported("it works on sequences or optional values; export the model with tensors only")
    for given in filter(None, view.inputs):
        if not is_known(given.dtype) or given.dtype == ir.DataType.BFLOAT16:
            raise Unsupported(f"it has no rule, and onnxruntime cannot run it on {given.dtype.name}; use float32")


def subgraph_nodes(node: ir.Node) -> Iterator[ir.Node]:
    """All nodes in the subgraphs of a node, also of theirs."""
    for graph in subgraphs(node):
        for inner in graph:
            yield inner
            yield from subgraph_nodes(inner)


def subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    """The graphs among the attributes of a node."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def captured(node: ir.Node) -> list[ir.Value]:
    """Values of the graphs around a node that its subgraphs read, in order."""
    found: dict[ir.Value, None] = {}

    def visit(graph: ir.Graph, known: set[ir.Value]) -> None:
        known = known | set(graph.inputs) | set(graph.initializers.values()) | {o for n in graph for o in n.outputs}
        for inner in graph:
            for value in inner.inputs:
                if value is not None and value not in known:
                    found[value] = None
            for deeper in subgraphs(inner):
                visit(deeper, known)
        for value in graph.outputs:
            if value not in known:
                found[value] = None

    for graph in subgraphs(node):
        visit(graph, set())
    return list(found)


def _is_small(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None and value.const_value.nbytes <= CONSTANT_BYTES


def _model_of(node: ir.Node, view: NodeView, feeds: Sequence[int]) -> bytes:
    """The node as a model: inputs x0, x1, ... for its data, small constants inside, outputs y0, y1, ..."""
    from onnx import helper

    proto = ir.serde.serialize_node(node)
    proto.ClearField("metadata_props")
    proto.ClearField("device_configurations")
    initializers: list[onnx.TensorProto] = []
    for index, value in enumerate(node.inputs):
        if value is None:
            continue
        proto.input[index] = f"x{index}"
        if index not in feeds and value.const_value is not None:
            tensor = ir.serde.serialize_tensor(value.const_value)
            tensor.name = f"x{index}"
            initializers.append(tensor)
    for index in range(len(node.outputs)):
        proto.output[index] = f"y{index}"
    inputs = [helper.make_tensor_value_info(f"x{i}", int(t.dtype), t.shape)
              for i in feeds if (t := view.inputs[i]) is not None]
    outputs = [helper.make_empty_tensor_value_info(name) for name in proto.output]
    graph = helper.make_graph([proto], "node", inputs, outputs, initializers)
    imports = dict(node.graph.opset_imports) if node.graph is not None else {}
    if node.domain == "" and "" in imports:
        imports[""] = min(imports[""], SAME_SINCE.get(node.op_type, imports[""]))
    functions = []
    if node.domain == dialect.DOMAIN:
        functions = [dialect.region_proto(node)]
        imports |= {o.domain: o.version for o in functions[0].opset_import} | {dialect.DOMAIN: dialect.VERSION}
    opsets = [helper.make_opsetid(domain, version) for domain, version in {"": 18, **imports}.items()]
    opset = next(o.version for o in opsets if not o.domain)
    made = helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=8 if opset < 21 else 10)
    return made.SerializeToString()


def _outputs(model: bytes, told: Sequence[tuple[int, ...] | None]) -> list[TensorType]:
    """Extents and types as onnxruntime infers them, which also tells whether it has a kernel.

    Args:
        told: extents per output that are known from elsewhere.
    """
    found: list[TensorType] = []
    for index, output in enumerate(_session(model).get_outputs()):
        dtype = _ORT_TYPES.get(output.type)
        if dtype is None or not is_known(dtype):
            kind = "a sequence or optional value" if "(tensor" in output.type else f"of type {output.type}"
            raise Unsupported(f"its result is {kind}, which the runtime cannot hold; export the model without it")
        extents = told[index] if index < len(told) else None
        if extents is None:
            is_open = not output.shape and not _is_scalar(model, index)  # onnxruntime has one word for both
            if is_open or not all(isinstance(n, int) for n in output.shape):
                raise Unsupported("the extents of its result depend on the data; export the model without it")
            extents = tuple(int(n) for n in output.shape)
        found.append(TensorType(extents, dtype))
    return found


def _is_scalar(model: bytes, index: int) -> bool:
    """Whether onnx finds an output to have no axes."""
    import onnx

    found = onnx.shape_inference.infer_shapes(onnx.ModelProto.FromString(model))
    kind = found.graph.output[index].type.tensor_type
    return kind.HasField("shape") and not kind.shape.dim


_ORT_TYPES: Mapping[str, ir.DataType] = {
    "tensor(float)": ir.DataType.FLOAT, "tensor(double)": ir.DataType.DOUBLE, "tensor(float16)": ir.DataType.FLOAT16,
    "tensor(bfloat16)": ir.DataType.BFLOAT16, "tensor(bool)": ir.DataType.BOOL,
    **{f"tensor({name})": ir.DataType[name.upper()]
       for name in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "string")},
}


@functools.lru_cache(maxsize=64)
def _session(model: bytes) -> Any:
    """An onnxruntime session on one thread, so that its bits do not depend on their number."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        line = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise Unsupported(f"it has no rule, and onnxruntime cannot run it ({line[:160]}); export the model without "
                          "it") from None


def is_opaque(operator: Operator) -> bool:
    """Whether onnxruntime computes the node on whole tensors."""
    return isinstance(operator, Opaque)
