"""Constant folding on demand: what the shapes alone decide is computed by onnxruntime, once.

    before                                           after
    s = Shape(x); d = Gather(s, 2)                   sizes = constant
    sizes = Concat(..., Mul(d, 2)); y = Resize(x, sizes)     y = Resize(x, sizes)

Extents come from the operators' maps, not from ONNX shape inference.  Nodes whose inputs are all known
wait until a value is asked for; then all that wait are computed in one session.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from partitioner import dialect
from partitioner.ops.base import Unsupported
from partitioner.ops.opaque import RANDOM, captured, subgraph_nodes
from partitioner.ops.weights import RESHAPING

if TYPE_CHECKING:
    import onnx

_SHAPE_ONLY = frozenset({"Shape", "Size"})

_NOT_BY_ONNX = frozenset({"LRN", "Softmax", "LogSoftmax", "Hardmax", "AveragePool", "MaxPool", "LpPool"})
"""Operators that onnx's evaluator computes wrongly in some opset."""


class Folder:
    """Keeps track of the nodes that depend on constants alone and computes their values when asked."""

    def __init__(self, model: ir.Model, kept: Container[ir.Node] = ()) -> None:
        """`kept` nodes stay as they are."""
        self.model = model
        self.kept = kept
        self.pending: dict[ir.Value, ir.Node] = {}

    def try_fold(self, node: ir.Node) -> bool:
        """Take a node that constants decide; its outputs become constants when `settle` is called."""
        if node.op_type in _SHAPE_ONLY and node.domain == "":
            return self._fold_shape(node)
        if node in self.kept or node.domain != "" or (node.op_type in RANDOM and node.op_type != "Dropout"):
            return False
        if not all(v is None or self.is_constant(v) for v in self._sources(node)):
            return False
        if any(inner.op_type in RANDOM for inner in subgraph_nodes(node)):
            return False
        for output in node.outputs:
            self.pending[output] = node
        return True

    @staticmethod
    def _sources(node: ir.Node) -> list[ir.Value | None]:
        """All that a node reads, in its subgraphs too."""
        return [*node.inputs, *captured(node)]

    def is_constant(self, value: ir.Value) -> bool:
        """Whether the value is known or waits to be computed from known ones."""
        return value.const_value is not None or value in self.pending

    def _fold_shape(self, node: ir.Node) -> bool:
        source = node.inputs[0]
        if source is None or source in self.pending:
            self.settle([source] if source is not None else [])
        if source is None or source.shape is None or not source.shape.is_static():
            raise Unsupported("it asks for extents that are not known beforehand")
        shape = np.asarray(dialect.shape_of(source), np.int64)
        if node.op_type == "Size":
            array = np.asarray(int(np.prod(shape)), np.int64)
        else:
            start = node.attributes.get_int("start", 0)
            end = node.attributes.get_int("end", len(shape))
            array = shape[start:end]
        _become_constant(self.model.graph, node.outputs[0], array)
        return True

    def settle(self, values: Sequence[ir.Value | None]) -> None:
        """Compute those of the values that wait, with all that they depend on.

        Raises:
            Unsupported: when onnxruntime cannot compute them.
        """
        wanted = [v for v in values if v is not None and v in self.pending]
        if not wanted:
            return
        nodes = self._dependencies(wanted)
        outputs = [o for n in nodes for o in n.outputs if o.name]
        for value, array in zip(outputs, _evaluate(self.model, nodes, outputs), strict=True):
            _become_constant(self.model.graph, value, array)
            _name_source(self.pending.pop(value), value)

    def _dependencies(self, values: Sequence[ir.Value]) -> list[ir.Node]:
        found: dict[ir.Node, None] = {}

        def visit(value: ir.Value) -> None:
            node = self.pending.get(value)
            if node is None or node in found:
                return
            for source in self._sources(node):
                if source is not None:
                    visit(source)
            found[node] = None

        for value in values:
            visit(value)
        return list(found)


def _widen(model: onnx.ModelProto, names: Sequence[str]) -> None:
    """Cast outputs to float32."""
    from onnx import helper

    for value in model.graph.output:
        if value.name in names:
            model.graph.node.append(helper.make_node("Cast", [value.name], [f"{value.name}/float"], to=1))
            value.CopyFrom(helper.make_empty_tensor_value_info(f"{value.name}/float"))


def _narrowed(array: np.ndarray) -> np.ndarray:
    return np.asarray(array).astype(ir.DataType.BFLOAT16.numpy())


def _become_constant(graph: ir.Graph, value: ir.Value, array: np.ndarray) -> None:
    value.const_value = ir.tensor(array, name=value.name)
    value.shape = ir.Shape(array.shape)
    value.type = ir.TensorType(value.const_value.dtype)


def _name_source(node: ir.Node, value: ir.Value) -> None:
    """Note the weight that a constant is, in other extents."""
    source = node.inputs[0] if node.op_type in RESHAPING else None
    if source is not None and source.const_value is not None and source.dtype == value.dtype:
        dialect.set_source(value, dialect.get_source(source))


def _evaluate(model: ir.Model, nodes: Sequence[ir.Node], outputs: Sequence[ir.Value]) -> list[np.ndarray]:
    """Run nodes whose inputs are constants."""
    inner = {o for n in nodes for o in n.outputs}
    read = [v for n in nodes for v in (*n.inputs, *captured(n))]
    known = {v.name: v for v in read if v is not None and v not in inner}
    copies: dict[str | None, ir.Value] = {
        name: ir.Value(name=name, const_value=v.const_value, shape=v.shape, type=v.type) for name, v in known.items()}
    initializers = list(copies.values())
    clones: list[ir.Node] = []
    for node in nodes:
        inputs = [None if v is None else copies[v.name] for v in node.inputs]
        made = [ir.Value(name=o.name) for o in node.outputs]
        copies |= {o.name: o for o in made}
        clones.append(ir.Node(node.domain, node.op_type, inputs, list(node.attributes.values()), outputs=made))
    graph = ir.Graph([], [copies[o.name] for o in outputs], nodes=clones, initializers=initializers,
                     opset_imports=dict(model.graph.opset_imports), name="constants")
    proto = ir.to_proto(ir.Model(graph, ir_version=max(8, min(model.ir_version, 10))))
    try:
        return _by_onnxruntime(proto)
    except Exception as error:
        found = _by_onnx(proto)
        if found is not None:
            return found
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        names = ", ".join(str(n.name) for n in nodes[:3])
        raise Unsupported(f"its constant inputs ({names}) cannot be computed: {reason[:160]}") from None


def _by_onnxruntime(proto: onnx.ModelProto) -> list[np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    outputs = session.get_outputs()
    narrow = [o.name for o in outputs if o.type == "tensor(bfloat16)"]
    if narrow:  # numpy has no such type: taken out as float32, which holds every value of it
        _widen(proto, narrow)
        session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    arrays: Any = session.run(None, {})
    return [_narrowed(a) if o.name in narrow else np.asarray(a) for o, a in zip(outputs, arrays, strict=True)]


def _by_onnx(proto: onnx.ModelProto) -> list[np.ndarray] | None:
    """The constants by onnx's own evaluator, for what onnxruntime lacks: bfloat16 kernels, one cell for a scalar."""
    from onnx.reference import ReferenceEvaluator

    if any(n.op_type in _NOT_BY_ONNX for n in proto.graph.node):
        return None
    try:
        with np.errstate(all="ignore"):
            return [np.asarray(a) for a in ReferenceEvaluator(proto).run(None, {})]
    except Exception:
        return None
