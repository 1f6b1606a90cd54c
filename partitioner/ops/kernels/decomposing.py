"""What the decompositions of several reductions have in common, written with a `Decomposer`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from partitioner.dialect import DOMAIN
from partitioner.ops.base import Decomposer

_HALVES = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})


def wide_type(dtype: ir.DataType) -> ir.DataType:
    """The type in which sums of such numbers are kept: 16-bit floats overflow, or stop growing, soon."""
    return ir.DataType.FLOAT if dtype in _HALVES else dtype


def type_of(value: ir.Value) -> ir.DataType:
    """Element type of a value that has been laid out."""
    assert value.dtype is not None
    return value.dtype


def cast(write: Decomposer, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    """The value in another element type; itself when it has that already."""
    return value if value.dtype == dtype else write.op("Cast", [value], {"to": int(dtype)})[0]


def number(write: Decomposer, value: float, dtype: ir.DataType) -> ir.Value:
    """A constant without axes."""
    return write.constant(np.asarray(value, dtype.numpy()))


def squeezed(write: Decomposer, value: ir.Value, axes: Sequence[int]) -> ir.Value:
    """The value without axes of one cell; which they are is said, for others may have one cell too."""
    if write.opset < 13:
        return write.op("Squeeze", [value], {"axes": list(axes)})[0]
    return write.op("Squeeze", [value, write.constant(np.asarray(list(axes), np.int64))])[0]


def clip(write: Decomposer, value: ir.Value, low: float, high: float | None = None) -> ir.Value:
    """The value, not below `low` and not above `high`; NaN stays."""
    bounds = {"min": low} if high is None else {"min": low, "max": high}
    if write.opset < 11:
        return write.op("Clip", [value], bounds)[0]
    return write.op("Clip", [value, *(number(write, b, type_of(value)) for b in bounds.values())])[0]


def rounded(write: Decomposer, value: ir.Value) -> ir.Value:
    """The nearest whole numbers, halves to even ones; opsets before 11 have no operator for it.

    r = floor(x + 1/2), less 1 where that was a half and r is odd.
    """
    if write.opset >= 11:
        return write.op("Round", [value])[0]
    dtype = type_of(value)
    half, one, two = (number(write, n, dtype) for n in (0.5, 1, 2))
    (above,) = write.op("Add", [value, half])
    (result,) = write.op("Floor", [above])
    (pairs,) = write.op("Floor", [write.op("Div", [result, two])[0]])
    (odd,) = write.op("Sub", [result, write.op("Mul", [pairs, two])[0]])
    (apart,) = write.op("Sub", [above, result])
    (sign,) = write.op("Sign", write.op("Abs", [apart]))
    (tie,) = write.op("Sub", [one, sign])
    return write.op("Sub", [result, write.op("Mul", [odd, tie])[0]])[0]


def through_float(write: Decomposer, op_type: str, value: ir.Value) -> ir.Value:
    """Sqrt, Log or Exp; of integers as onnxruntime has it, in float64 and rounded towards zero."""
    dtype = type_of(value)
    if dtype.is_floating_point():
        return write.op(op_type, [value])[0]
    (result,) = write.op(op_type, [cast(write, value, ir.DataType.DOUBLE)])
    return cast(write, result, dtype)


def merged_moments(write: Decomposer, x: ir.Value, shape: Sequence[int], axes: Sequence[int],
                   dtype: ir.DataType) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Count, mean and M2 over axes, some of them sharded, computed in `dtype`; reduced axes are kept."""
    cells = math.prod(shape[a] for a in axes)
    attributes = {"axes": list(axes), "count": np.asarray(cells, np.float64), "dtype": int(dtype)}
    count, mean, m2 = write.all_reduce("moments", write.op("Moments", [x], attributes, outputs=3, domain=DOMAIN))
    return count, mean, m2


def merged_variance(write: Decomposer, x: ir.Value, shape: Sequence[int],
                    axes: Sequence[int]) -> tuple[ir.Value, ir.Value]:
    """Mean and variance over axes, some of them sharded, in the type of `x`; reduced axes are kept."""
    _, mean, m2 = merged_moments(write, x, shape, axes, type_of(x))
    cells = math.prod(shape[a] for a in axes)
    return mean, write.op("Div", [m2, number(write, cells, type_of(x))])[0]


def merged_sum(write: Decomposer, op_type: str, x: ir.Value, axes: Sequence[int], keepdims: bool = True) -> ir.Value:
    """A reduction that adds up (ReduceSum, ReduceL1, ReduceSumSquare) over axes, some of them sharded."""
    return write.all_reduce("sum", [write.reduce(op_type, x, axes, keepdims)])[0]
