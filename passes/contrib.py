"""Operators that onnxruntime writes into a model when it optimises or quantises it, as standard ONNX nodes.

    before                                            after
    y = FusedConv(x, w, b, z)  activation=Relu        c = Conv(x, w, b); s = Add(c, z); y = Relu(s)
    y = QLinearSigmoid(x, sx, zx, sy, zy)             d = DequantizeLinear(x, sx, zx); s = Sigmoid(d)
                                                      y = QuantizeLinear(s, sy, zy)
    y, s, z = DynamicQuantizeLinear(x)                ReduceMin(x), ReduceMax(x), ...; y = QuantizeLinear(x, s, z)

What onnxruntime rounds in a way of its own (QLinearAdd and others) has operator classes instead.  A node that a rule
does not suit stays as it is, and canonicalize then names it as one without a rule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from partitioner import dialect
from partitioner.ops.base import Array
from passes.rewrite import Namer

CONTRIB = "com.microsoft"

Results = Sequence[ir.Value] | None
"""What takes the place of a node's outputs, in order; None when the node stays as it is."""


def rewrite_contrib(model: ir.Model) -> None:
    """Replace every node for which there is a rule."""
    graph, namer = model.graph, Namer(model.graph)
    for node in list(graph):
        rule = RULES.get((node.domain, node.op_type))
        if rule is None:
            continue
        writer = _Writer(graph, node, namer)
        results = rule(writer)
        if results is None:
            writer.undo()
            continue
        for old, new in zip(node.outputs, results, strict=False):
            old.replace_all_uses_with(new, replace_graph_outputs=True)
            new.name, new.type, new.shape = old.name, old.type, old.shape
        graph.remove(node, safe=True)


class _Writer:
    """The node to replace, and what is put before it."""

    def __init__(self, graph: ir.Graph, node: ir.Node, namer: Namer) -> None:
        self.graph = graph
        self.node = node
        self.attributes = dialect.attributes_of(node)
        self.opset = graph.opset_imports.get("", 1)
        self._namer = namer
        self._made: list[ir.Node] = []

    def input(self, index: int) -> ir.Value | None:
        """An input; None when it is not given."""
        return self.node.inputs[index] if index < len(self.node.inputs) else None

    def op(self, op_type: str, inputs: Sequence[ir.Value | None],
           attributes: Mapping[str, Any] | None = None) -> ir.Value:
        """A new node of the standard domain; returns its output."""
        given = list(inputs)
        while given and given[-1] is None:
            del given[-1]
        name = self._namer(f"{self.node.name or self.node.op_type}/{op_type}")
        made = dialect.new_node("", op_type, given, attributes or {}, 1, name)
        self.graph.insert_before(self.node, made)
        self._made.append(made)
        return made.outputs[0]

    def constant(self, array: Array) -> ir.Value:
        """A new constant."""
        tensor = ir.tensor(array)
        value = ir.Value(name=self._namer(f"{self.node.name or self.node.op_type}/constant"),
                         shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def number(self, value: float) -> ir.Value:
        """A float32 scalar."""
        return self.constant(np.asarray(value, np.float32))

    def undo(self) -> None:
        """Remove what was written."""
        for made in reversed(self._made):
            self.graph.remove(made, safe=True)

    def kept(self, *names: str) -> dict[str, Any]:
        """Those of the attributes that a standard node takes too."""
        return {name: self.attributes[name] for name in names if name in self.attributes}


# --- fused activations -------------------------------------------------------------------------------


def _activate(w: _Writer, x: ir.Value, name: str, numbers: Sequence[float]) -> ir.Value | None:
    """The activation of that name; None for an unknown one."""
    if name == "":
        return x
    if name in ("Relu", "Sigmoid", "Tanh"):
        return w.op(name, [x])
    if name == "LeakyRelu":
        return w.op(name, [x], {"alpha": numbers[0]} if numbers else {})
    if name == "HardSigmoid":
        return w.op(name, [x], dict(zip(("alpha", "beta"), numbers, strict=False)))
    if name != "Clip" or len(numbers) != 2:
        return None
    if w.opset < 11:
        return w.op(name, [x], {"min": numbers[0], "max": numbers[1]})
    return w.op(name, [x, w.number(numbers[0]), w.number(numbers[1])])


def _fused_conv(w: _Writer) -> Results:
    convolved = w.op("Conv", [w.input(i) for i in range(3)],
                     w.kept("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides"))
    rest = w.input(3)
    total = convolved if rest is None else w.op("Add", [convolved, rest])
    result = _activate(w, total, str(w.attributes.get("activation", "")), w.attributes.get("activation_params", ()))
    return None if result is None else [result]


def _fused_gemm(w: _Writer) -> Results:
    product = w.op("Gemm", [w.input(i) for i in range(3)], w.kept("alpha", "beta", "transA", "transB"))
    told = (w.attributes.get(f"activation_{name}") for name in ("alpha", "beta", "gamma"))
    numbers = [float(v) for v in told if v is not None]
    result = _activate(w, product, str(w.attributes.get("activation", "")), numbers)
    return None if result is None else [result]


def _skip_layer_norm(w: _Writer) -> Results:
    x, skip, scale, shift, bias = (w.input(i) for i in range(5))
    if w.opset < 17 or any(v.uses() or v.is_graph_output() for v in w.node.outputs[1:3]):
        return None
    total = w.op("Add", [x, skip])
    total = total if bias is None else w.op("Add", [total, bias])
    found = w.op("LayerNormalization", [total, scale, shift], {"axis": -1, **w.kept("epsilon")})
    if len(w.node.outputs) < 4 or not (w.node.outputs[3].uses() or w.node.outputs[3].is_graph_output()):
        return [found]
    return [found, w.node.outputs[1], w.node.outputs[2], w.op("Identity", [total])]


# --- quantised: dequantise, compute, quantise --------------------------------------------------------


def _dequantised(w: _Writer, first: int = 0) -> ir.Value:
    """The tensor at an input, whose scale and zero point follow it."""
    return w.op("DequantizeLinear", [w.input(first + i) for i in range(3)])


def _around(op_type: str, *names: str) -> Callable[[_Writer], Results]:
    """A rule for inputs x, x scale, x zero point, y scale, y zero point."""

    def rule(w: _Writer) -> Results:
        if w.opset < 10 or w.input(4) is None:
            return None
        result = w.op(op_type, [_dequantised(w)], w.kept(*names))
        return [w.op("QuantizeLinear", [result, w.input(3), w.input(4)])]

    return rule


def _quantised_softmax(w: _Writer) -> Results:
    told = int(w.attributes.get("opset", w.opset))
    same = (told < 13) == (w.opset < 13)
    return _around("Softmax", "axis")(w) if same or w.attributes.get("axis", -1) == -1 else None


def _quantised_concat(w: _Writer) -> Results:
    if w.opset < 10:
        return None
    scale, zero = w.input(0), w.input(1)
    parts: list[ir.Value | None] = []
    for first in range(2, len(w.node.inputs), 3):
        if _same(w.input(first + 1), scale) and _same(w.input(first + 2), zero):
            parts.append(w.input(first))
        else:
            parts.append(w.op("QuantizeLinear", [_dequantised(w, first), scale, zero]))
    return [w.op("Concat", parts, w.kept("axis"))]


def _same(one: ir.Value | None, other: ir.Value | None) -> bool:
    """Whether two inputs are the same value or equal constants."""
    if one is other:
        return True
    if one is None or other is None or one.const_value is None or other.const_value is None:
        return False
    return np.array_equal(one.const_value.numpy().reshape(-1), other.const_value.numpy().reshape(-1))


_POOL = ("auto_pad", "ceil_mode", "dilations", "kernel_shape", "pads", "strides", "storage_order",
         "count_include_pad")


def _quantised_average(w: _Writer) -> Results:
    """Of this operator alone onnxruntime rounds the sum of mean / scale and zero point, not the quotient."""
    scale, zero = w.input(3), w.input(4)
    if w.opset < 11 or scale is None or zero is None:
        return None
    pooled = _channels_first(w, _dequantised(w), "AveragePool", len(w.attributes["kernel_shape"]),
                             bool(w.attributes.get("channels_last", 0)))
    point = w.op("Cast", [zero], {"to": int(ir.DataType.FLOAT)})
    rounded = w.op("Round", [w.op("Add", [w.op("Div", [pooled, scale]), point])])
    return [w.op("QuantizeLinear", [w.op("Sub", [rounded, point]), w.number(1.0), zero])]


def _nhwc_max_pool(w: _Writer) -> Results:
    x = w.input(0)
    if x is None or w.opset < 12:
        return None
    return [_channels_first(w, x, "MaxPool", len(w.attributes["kernel_shape"]), last=True)]


def _channels_first(w: _Writer, x: ir.Value, op_type: str, spatial: int, last: bool,
                    rest: Sequence[ir.Value | None] = ()) -> ir.Value:
    """A node of windows on a tensor whose channels may be its last axis."""
    names = _POOL if op_type != "QLinearConv" else ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")
    if not last:
        return w.op(op_type, [x, *rest], w.kept(*names))
    forth = w.op("Transpose", [x], {"perm": [0, spatial + 1, *range(1, spatial + 1)]})
    result = w.op(op_type, [forth, *rest], w.kept(*names))
    return w.op("Transpose", [result], {"perm": [0, *range(2, spatial + 2), 1]})


def _contrib_conv(w: _Writer) -> Results:
    x, weight = w.input(0), w.input(3)
    if x is None or weight is None or weight.shape is None or w.opset < 10:
        return None
    return [_channels_first(w, x, "QLinearConv", len(weight.shape) - 2, bool(w.attributes.get("channels_last", 0)),
                            w.node.inputs[1:])]


def _dynamic_quantize(w: _Writer) -> Results:
    """scale = range / 255 (1 when all is 0); zero point = round(clip(-lowest / scale)), of the range with 0 in it."""
    x, zero = w.input(0), w.number(0.0)
    low = w.op("Min", [w.op("ReduceMin", [x], {"keepdims": 0}), zero])
    high = w.op("Max", [w.op("ReduceMax", [x], {"keepdims": 0}), zero])
    step = w.op("Div", [w.op("Sub", [high, low]), w.number(255.0)])
    scale = w.op("Where", [w.op("Equal", [low, high]), w.number(1.0), step])
    start = w.op("Sub", [zero, w.op("Div", [low, scale])])
    clipped = w.op("Clip", [start, zero, w.number(255.0)])
    point = w.op("Cast", [w.op("Round", [clipped])], {"to": int(ir.DataType.UINT8)})
    return [w.op("QuantizeLinear", [x, scale, point]), scale, point]


RULES: Mapping[tuple[str, str], Callable[[_Writer], Results]] = {
    ("", "DynamicQuantizeLinear"): _dynamic_quantize,
    (CONTRIB, "FusedConv"): _fused_conv,
    (CONTRIB, "FusedGemm"): _fused_gemm,
    (CONTRIB, "SkipLayerNormalization"): _skip_layer_norm,
    (CONTRIB, "QLinearLeakyRelu"): _around("LeakyRelu", "alpha"),
    (CONTRIB, "QLinearSigmoid"): _around("Sigmoid"),
    (CONTRIB, "QLinearSoftmax"): _quantised_softmax,
    (CONTRIB, "QLinearConcat"): _quantised_concat,
    (CONTRIB, "QLinearAveragePool"): _quantised_average,
    (CONTRIB, "QLinearConv"): _contrib_conv,
    (CONTRIB, "NhwcMaxPool"): _nhwc_max_pool,
}
"""(domain, operator) -> what writes the equivalent nodes."""
