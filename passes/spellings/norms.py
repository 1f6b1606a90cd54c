"""Normalisations that are written out: groups of channels flattened, means and variances node by node."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter import pattern

from partitioner import dialect
from partitioner.dialect import shape_of
from partitioner.ops.base import Array
from partitioner.ops.nodes import operator_of
from partitioner.ops.standard.reduce import Reduce
from passes.spellings.values import constant, made_of, near, number, spread

Expression = Any
"""A value of a pattern: onnxscript's classes for these are private."""


def grouped_rules() -> Iterator[tuple[str, pattern.RewriteRule]]:
    """Group normalisation by flattening every group of channels into one channel.

    y = Reshape(InstanceNormalization(Reshape(x, [N, G, ...]), scale, bias), extents of x)
    """
    yield "Reshape", pattern.RewriteRule(_grouped, _join_groups)


def _grouped(op: Any, x: Any, groups: Any, scale: Any, bias: Any, back: Any) -> Expression:
    flat = op.Reshape(x, groups, _allow_other_attributes=True, _outputs=["flat"])
    normal = op.InstanceNormalization(flat, scale, bias, _allow_other_attributes=True, _outputs=["normal"])
    return op.Reshape(normal, back, _allow_other_attributes=True, _outputs=["result"])


def _join_groups(op: Any, x: ir.Value, scale: ir.Value, bias: ir.Value, flat: ir.Value, normal: ir.Value,
                 result: ir.Value, **_: Any) -> ir.Value | None:
    shape, middle = shape_of(x), shape_of(flat)
    if shape_of(result) != shape or len(shape) < 3 or middle[0] != shape[0] or shape[1] % middle[1]:
        return None
    factor, summand, node = constant(scale), constant(bias), normal.producer()
    if factor is None or summand is None or node is None or x.dtype is None:
        return None
    epsilon, each = node.attributes.get_float("epsilon", 1e-5), shape[1] // middle[1]
    if each == 1:
        return op.op("InstanceNormalization", x, scale, bias, epsilon=epsilon)
    vectors = [made_of(op, np.repeat(array, each), value, f"{result.name}/{what}")
               for array, value, what in ((factor, scale, "scale"), (summand, bias, "bias"))]
    attributes = dialect.group_normalization_attributes(middle[1], epsilon, x.dtype, len(shape))
    attributes |= {name: ir.tensor(v) for name, v in attributes.items() if isinstance(v, np.ndarray)}
    return op.op(dialect.GROUP_NORMALIZATION, x, *vectors, _domain=dialect.DOMAIN, **attributes)


def read_group_norm(node: ir.Node, opset: int) -> tuple[dict[str, Any], list[ir.Value]] | None:
    """Attributes, and scale and bias per channel, of a GroupNormalization with constant numbers per group."""
    x, scale, bias = node.inputs
    if opset >= 21 or x is None or scale is None or bias is None or x.dtype is None:
        return None
    given = constant(scale), constant(bias)
    groups, channels = node.attributes.get_int("num_groups", 0), shape_of(x)[1]
    if given[0] is None or given[1] is None or groups < 1 or channels % groups:
        return None
    vectors: list[ir.Value] = []
    for array, value, what in zip(given, (scale, bias), ("scale", "bias"), strict=True):
        assert array is not None
        tensor = ir.tensor(np.repeat(array, channels // groups), name=f"{node.name}/{what}")
        vectors.append(ir.Value(name=tensor.name, shape=ir.Shape((channels,)), type=ir.TensorType(x.dtype),
                                const_value=tensor))
        dialect.set_source(vectors[-1], dialect.get_source(value))
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    return dialect.group_normalization_attributes(groups, epsilon, x.dtype, len(shape_of(x))), vectors


# --- mean and variance -------------------------------------------------------------------------------


def variance_rules() -> Iterator[tuple[str, pattern.RewriteRule]]:
    """(x - mean) / sqrt(mean((x - mean)^2) + epsilon) in its ways to square, to divide, and to share the difference.

    Over all spatial axes it is InstanceNormalization, over the last axes LayerNormalization where the opset has it.
    """
    for square, shared, (root, tail) in product(_SQUARES, (True, False), _TAILS):
        yield root, pattern.RewriteRule(_variance_pattern(square, shared, tail), _join_variance)
    for square in _SQUARES:
        yield "Add", pattern.RewriteRule(_transformed_pattern(square), _join_transformed)


_SQUARES: Sequence[Callable[[Any, Any, Any], Any]] = (
    lambda op, d, two: op.Pow(d, two),
    lambda op, d, two: op.Mul(d, d),
)

_TAILS: Sequence[tuple[str, Callable[[Any, Any, Any, Any, Any], Any]]] = (
    ("Div", lambda op, d, v, one, power: op.Div(d, op.Sqrt(v))),
    ("Mul", lambda op, d, v, one, power: op.Mul(d, op.Reciprocal(op.Sqrt(v)))),
    ("Mul", lambda op, d, v, one, power: op.Mul(d, op.Div(one, op.Sqrt(v)))),
    ("Mul", lambda op, d, v, one, power: op.Mul(d, op.Pow(v, power))),
)


def _variance_pattern(square: Callable[..., Any], shared: bool, tail: Callable[..., Any]) -> Callable[..., Any]:
    def written(op: Any, x: Any, two: Any, epsilon: Any, one: Any, power: Any) -> Expression:
        mean = op.ReduceMean(x, _allow_other_inputs=True, _allow_other_attributes=True, _outputs=["mean"])
        difference = op.Sub(x, mean)
        squared = square(op, difference if shared else op.Sub(x, mean), two)
        variance = op.ReduceMean(squared, _allow_other_inputs=True, _allow_other_attributes=True,
                                 _outputs=["variance"])
        return tail(op, difference, op.Add(variance, epsilon), one, power)

    return written


def _join_variance(op: Any, x: ir.Value, mean: ir.Value, variance: ir.Value,
                   **constants: ir.Value | None) -> ir.Value | None:
    if not _are_right(constants):
        return None
    return _normalised(op, x, mean, variance, constants, _is_scaled_per_channel(variance, shape_of(x)))


def _transformed_pattern(square: Callable[..., Any]) -> Callable[..., Any]:
    """x * a + (bias - mean * a) with a = scale / sqrt(variance + epsilon), as TensorFlow and Keras write it."""

    def written(op: Any, x: Any, two: Any, epsilon: Any, scale: Any, bias: Any) -> Expression:
        mean = op.ReduceMean(x, _allow_other_inputs=True, _allow_other_attributes=True, _outputs=["mean"])
        variance = op.ReduceMean(square(op, op.Sub(x, mean), two), _allow_other_inputs=True,
                                 _allow_other_attributes=True, _outputs=["variance"])
        factor = op.Mul(op.Reciprocal(op.Sqrt(op.Add(variance, epsilon))), scale)
        return op.Add(op.Mul(x, factor), op.Sub(bias, op.Mul(mean, factor)))

    return written


def _join_transformed(op: Any, x: ir.Value, mean: ir.Value, variance: ir.Value, scale: ir.Value, bias: ir.Value,
                      **constants: ir.Value | None) -> ir.Value | None:
    if not _are_right(constants):
        return None
    return _normalised(op, x, mean, variance, constants, _is_per_channel(scale, shape_of(x)), (scale, bias))


def _are_right(constants: Mapping[str, ir.Value | None]) -> bool:
    """Whether the constants of a spelling, those that it has, are what their names say."""
    small = number(constants.get("epsilon"))
    others = ((constants.get(name), wanted) for name, wanted in (("two", 2.0), ("one", 1.0), ("power", -0.5)))
    return small is not None and 0 < small < math.inf and all(v is None or near(number(v), n) for v, n in others)


def _normalised(op: Any, x: ir.Value, mean: ir.Value, variance: ir.Value, constants: Mapping[str, ir.Value | None],
                per_channel: bool, given: Sequence[ir.Value] = ()) -> ir.Value | None:
    """The operator for these means; scale 1 and bias 0 when they are not given: the nodes that follow may set them."""
    first, shape, graph = _first_axis(mean, variance), shape_of(x), mean.graph
    if first is None or graph is None or x.dtype is None:
        return None
    attributes: dict[str, Any] = {"epsilon": number(constants["epsilon"])}
    if first == 2 and x.dtype == ir.DataType.FLOAT and (len(shape) > 3 or per_channel):
        op_type, start, stop = "InstanceNormalization", 1, 2
    elif graph.opset_imports[""] >= 17 and x.dtype in (ir.DataType.FLOAT, ir.DataType.DOUBLE):
        op_type, start, stop = "LayerNormalization", first, len(shape)
        attributes["axis"] = first
    else:
        return None
    vectors: list[Array | None] = [spread(v, shape, start, stop) for v in given] or [
        np.full(shape[start:stop], n, x.dtype.numpy()) for n in (1, 0)]
    names = [v.name for v in given] or [f"{x.name}/scale", f"{x.name}/bias"]
    sources = given or (None, None)
    known = [op.initializer(ir.tensor(v), name=str(n)) if source is None else made_of(op, v, source, str(n))
             for n, v, source in zip(names, vectors, sources, strict=True) if v is not None]
    return op.op(op_type, x, *known, **attributes) if len(known) == 2 else None


def _first_axis(mean: ir.Value, variance: ir.Value) -> int | None:
    """The first of the axes when both means are over all axes from there on, and keep them."""
    axes: list[tuple[int, ...]] = []
    for value in (mean, variance):
        node = value.producer()
        operator = None if node is None else operator_of(node)
        if not isinstance(operator, Reduce) or not operator.keepdims:
            return None
        axes.append(tuple(sorted(operator.axes)))
    rank = len(shape_of(mean))
    if axes[0] != axes[1] or not axes[0] or axes[0] != tuple(range(axes[0][0], rank)) or axes[0][0] == 0:
        return None
    return axes[0][0]


def _is_per_channel(value: ir.Value, shape: tuple[int, ...]) -> bool:
    """Whether a constant holds one number for every channel."""
    return value.const_value is not None and value.const_value.size > 1 and spread(value, shape, 1, 2) is not None


def _is_scaled_per_channel(variance: ir.Value, shape: tuple[int, ...]) -> bool:
    """Whether the result, some nodes further on, is multiplied by a number per channel and nothing else."""
    value: ir.Value = variance
    while True:
        readers = [use.node for use in value.uses()]
        if len(readers) != 1 or len(readers[0].outputs) != 1:
            return False
        (reader,) = readers
        if shape_of(value) == shape:
            others = [v for v in reader.inputs if v is not None and v is not value]
            return reader.op_type == "Mul" and len(others) == 1 and _is_per_channel(others[0], shape)
        value = reader.outputs[0]
