"""What the node types of our dialect mean in the global view: each is a model-local function.

Communication is the identity; the halves of a normalisation are plain arithmetic, in operators of every opset.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

DOMAIN = "partitioner"

HALO_EXCHANGE = "HaloExchange"
RESHARD = "Reshard"
ALL_REDUCE = "AllReduce"
ALL_REDUCE_MOMENTS = "AllReduceMoments"
MOMENTS = "Moments"
NORMALIZE = "Normalize"
GROUP_NORMALIZATION = "GroupNormalization"
CONCAT_CONV = "ConcatConv"
TRAINING_BATCH_NORMALIZATION = "TrainingBatchNormalization"
TRAINING_DROPOUT = "TrainingDropout"


def _function(name: str, opset: int, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value],
              nodes: Sequence[ir.Node], attributes: Sequence[str]) -> ir.Function:
    graph = ir.Graph(inputs, outputs, nodes=nodes, opset_imports={"": opset}, name=name)
    declared = [ir.Attr(a, ir.AttributeType.UNDEFINED, None) for a in attributes]
    return ir.Function(DOMAIN, name, graph=graph, attributes=declared)


def _identity(count: int, attributes: Sequence[str]) -> Callable[[str, int], ir.Function]:
    def build(name: str, opset: int) -> ir.Function:
        inputs = [ir.Value(name=f"x{i}") for i in range(count)]
        nodes = [ir.Node("", "Identity", [x]) for x in inputs]
        return _function(name, opset, inputs, [n.outputs[0] for n in nodes], nodes, attributes)

    return build


def _constant(attribute: str, kind: ir.AttributeType, ref: str) -> ir.Node:
    return ir.Node("", "Constant", [], [ir.RefAttr(attribute, ref, kind)])


def _reduce(op_type: str, x: ir.Value, opset: int) -> list[ir.Node]:
    """A reduction over the function's attribute `axes`."""
    keep = ir.AttrInt64("keepdims", 1)
    if opset < (13 if op_type == "ReduceSum" else 18):
        return [ir.Node("", op_type, [x], [ir.RefAttr("axes", "axes", ir.AttributeType.INTS), keep])]
    axes = _constant("value_ints", ir.AttributeType.INTS, "axes")
    return [axes, ir.Node("", op_type, [x, axes.outputs[0]], [keep])]


def _moments(name: str, opset: int) -> ir.Function:
    x = ir.Value(name="x")
    # opsets before 9 know constants of floating point only
    number = _constant("value", ir.AttributeType.TENSOR, "count")
    count = ir.Node("", "Cast", [number.outputs[0]], [ir.AttrInt64("to", int(ir.DataType.INT64))])
    wide = ir.Node("", "Cast", [x], [ir.RefAttr("to", "dtype", ir.AttributeType.INT)])
    mean = _reduce("ReduceMean", wide.outputs[0], opset)
    deviation = ir.Node("", "Sub", [wide.outputs[0], mean[-1].outputs[0]])
    square = ir.Node("", "Mul", [deviation.outputs[0], deviation.outputs[0]])
    total = _reduce("ReduceSum", square.outputs[0], opset)
    nodes = [number, count, wide, *mean, deviation, square, *total]
    outputs = [count.outputs[0], mean[-1].outputs[0], total[-1].outputs[0]]
    return _function(name, opset, [x], outputs, nodes, ["axes", "count", "dtype"])


def _normalize(name: str, opset: int) -> ir.Function:
    x, count, mean, m2, scale, bias = (ir.Value(name=n) for n in ("x", "count", "mean", "m2", "scale", "bias"))
    nodes: list[ir.Node] = []

    def op(op_type: str, *inputs: ir.Value, attributes: Sequence[ir.Attr] = ()) -> ir.Value:
        nodes.append(ir.Node("", op_type, list(inputs), attributes))
        return nodes[-1].outputs[0]

    def column(vector: ir.Value) -> ir.Value:
        """One number per channel, with an axis of extent 1 for every spatial one."""
        if opset < 13:
            return op("Unsqueeze", vector, attributes=[ir.RefAttr("axes", "spatial", ir.AttributeType.INTS)])
        axes = op("Constant", attributes=[ir.RefAttr("value_ints", "spatial", ir.AttributeType.INTS)])
        return op("Unsqueeze", vector, axes)

    def wide(value: ir.Value) -> ir.Value:
        """In the type of the statistics."""
        return op("Cast", value, attributes=[ir.RefAttr("to", "dtype", ir.AttributeType.INT)])

    cells = wide(count)
    epsilon = op("Constant", attributes=[ir.RefAttr("value", "epsilon", ir.AttributeType.TENSOR)])
    deviation = op("Sqrt", op("Add", op("Div", m2, cells), epsilon))
    scaled = op("Mul", op("Div", op("Sub", wide(x), mean), deviation), column(wide(scale)))
    result = op("Cast", op("Add", scaled, column(wide(bias))),
                attributes=[ir.RefAttr("to", "to", ir.AttributeType.INT)])
    inputs = [x, count, mean, m2, scale, bias]
    return _function(name, opset, inputs, [result], nodes, ["dtype", "epsilon", "spatial", "to"])


def _group_normalization(name: str, opset: int) -> ir.Function:
    """The spelling that exporters write: groups flattened, an instance normalisation, numbers per channel.

    opset 8 and older know constants of floating point only.
    """
    x, scale, bias = (ir.Value(name=n) for n in ("x", "scale", "bias"))
    nodes: list[ir.Node] = []

    def op(op_type: str, *inputs: ir.Value, attributes: Sequence[ir.Attr] = ()) -> ir.Value:
        nodes.append(ir.Node("", op_type, list(inputs), attributes))
        return nodes[-1].outputs[0]

    def given(ref: str, kind: ir.AttributeType) -> ir.Value:
        return op("Constant", attributes=[ir.RefAttr("value" if kind == tensor else "value_ints", ref, kind)])

    def column(vector: ir.Value) -> ir.Value:
        if opset < 13:
            return op("Unsqueeze", vector, attributes=[ir.RefAttr("axes", "spatial", ir.AttributeType.INTS)])
        return op("Unsqueeze", vector, given("spatial", ir.AttributeType.INTS))

    tensor = ir.AttributeType.TENSOR
    grouped = op("Cast", given("grouped", tensor), attributes=[ir.AttrInt64("to", int(ir.DataType.INT64))])
    ones = given("ones", tensor)
    epsilon = ir.RefAttr("epsilon", "epsilon", ir.AttributeType.FLOAT)
    normal = op("InstanceNormalization", op("Reshape", x, grouped), ones, op("Sub", ones, ones), attributes=[epsilon])
    scaled = op("Mul", op("Reshape", normal, op("Shape", x)), column(scale))
    result = op("Add", scaled, column(bias))
    return _function(name, opset, [x, scale, bias], [result], nodes,
                     ["num_groups", "epsilon", "grouped", "ones", "spatial"])


def group_normalization_attributes(groups: int, epsilon: float, dtype: ir.DataType, rank: int) -> dict[str, Any]:
    """Attributes of a GroupNormalization of ours."""
    return {
        "num_groups": groups,
        "epsilon": epsilon,
        "grouped": np.asarray([0, groups, -1], np.float64),
        "ones": np.ones(groups, dtype.numpy()),
        "spatial": list(range(1, rank - 1)),
    }


def _concat_conv(name: str, opset: int) -> ir.Function:
    x, w, bias, other, more = (ir.Value(name=n) for n in ("x", "w", "bias", "x2", "w2"))
    data, weight = (ir.Node("", "Concat", pair, [ir.AttrInt64("axis", 1)]) for pair in ([x, other], [w, more]))
    names = ["strides", "dilations", "pads"]
    told = [ir.RefAttr(n, n, ir.AttributeType.INTS) for n in names]
    node = ir.Node("", "Conv", [data.outputs[0], weight.outputs[0], bias], told)
    return _function(name, opset, [x, w, bias, other, more], [node.outputs[0]], [data, weight, node], names)


def _training_batch_normalization(name: str, opset: int) -> ir.Function:
    x, scale, bias = (ir.Value(name=n) for n in ("x", "scale", "bias"))
    nodes: list[ir.Node] = []

    def op(op_type: str, *inputs: ir.Value, attributes: Sequence[ir.Attr] = ()) -> ir.Value:
        nodes.append(ir.Node("", op_type, list(inputs), attributes))
        return nodes[-1].outputs[0]

    def mean_of(value: ir.Value) -> ir.Value:
        nodes.extend(_reduce("ReduceMean", value, opset))
        return nodes[-1].outputs[0]

    def column(vector: ir.Value) -> ir.Value:
        if opset < 13:
            return op("Unsqueeze", vector, attributes=[ir.RefAttr("axes", "spatial", ir.AttributeType.INTS)])
        axes = op("Constant", attributes=[ir.RefAttr("value_ints", "spatial", ir.AttributeType.INTS)])
        return op("Unsqueeze", vector, axes)

    mean = mean_of(x)
    deviation = op("Sub", x, mean)
    variance = mean_of(op("Mul", deviation, deviation))
    epsilon = op("Constant", attributes=[ir.RefAttr("value", "epsilon", ir.AttributeType.TENSOR)])
    scaled = op("Mul", op("Div", deviation, op("Sqrt", op("Add", variance, epsilon))), column(scale))
    result = op("Add", scaled, column(bias))
    flat = op("Shape", scale)
    outputs = [result, op("Reshape", mean, flat), op("Reshape", variance, flat)]
    return _function(name, opset, [x, scale, bias], outputs, nodes, ["axes", "epsilon", "spatial"])


def _training_dropout(name: str, opset: int) -> ir.Function:
    """In the global view nothing is dropped: the masks belong to a step of training."""
    x, seed = ir.Value(name="x"), ir.Value(name="seed")
    node = ir.Node("", "Identity", [x])
    return _function(name, opset, [x, seed], [node.outputs[0]], [node], ["ratio", "layer", "channels"])


def batch_normalization_attributes(epsilon: float, dtype: ir.DataType, rank: int) -> dict[str, Any]:
    """Attributes of a TrainingBatchNormalization."""
    return {"axes": [a for a in range(rank) if a != 1], "epsilon": np.asarray(epsilon, dtype.numpy()),
            "spatial": [0, *range(2, rank)]}


FUNCTIONS: dict[str, Callable[[str, int], ir.Function]] = {
    HALO_EXCHANGE: _identity(1, ("source", "target")),
    RESHARD: _identity(1, ("source", "target")),
    ALL_REDUCE: _identity(1, ("op", "mesh_axes")),
    ALL_REDUCE_MOMENTS: _identity(3, ("op", "mesh_axes")),
    MOMENTS: _moments,
    NORMALIZE: _normalize,
    TRAINING_BATCH_NORMALIZATION: _training_batch_normalization,
    TRAINING_DROPOUT: _training_dropout,
    GROUP_NORMALIZATION: _group_normalization,
    CONCAT_CONV: _concat_conv,
}
