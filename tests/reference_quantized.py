"""Quantised operators by numpy alone, from their definitions; where these leave rounding open, as onnxruntime does it.

Integer sums are exact (int64).  Where an operator rescales integers by scales, factors and products are float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from tests.reference import RULES, Array, Node, conv, rule

_FLOAT32 = np.float32


def _spread(node: Node, parameter: Array | None, shape: tuple[int, ...]) -> Array:
    """A scale or zero point broadcast against data of this shape."""
    if parameter is None:
        return np.zeros((), np.int64)
    if parameter.size == 1 and parameter.ndim < 2:
        return parameter.reshape(())
    axis, block = node.get("axis", 1) % len(shape), node.get("block_size", 0)
    if block:
        return np.take(parameter, np.arange(shape[axis]) // block, axis)
    return parameter.reshape([-1 if a == axis else 1 for a in range(len(shape))])


def saturate(value: Array, zero: Array, dtype: Any) -> Array:
    """Rounded half to even, shifted, clipped."""
    info = np.iinfo(dtype)
    return np.clip(np.rint(value) + zero, info.min, info.max).astype(dtype)


@rule("QuantizeLinear")
def quantize(node: Node, xs: list[Any]) -> Array:
    zero = xs[2] if len(xs) > 2 else None
    told = onnx.helper.tensor_dtype_to_np_dtype(node.get("output_dtype", 0) or onnx.TensorProto.UINT8)
    value = xs[0] / _spread(node, xs[1], xs[0].shape)
    return saturate(value, _spread(node, zero, xs[0].shape), told if zero is None else zero.dtype)


@rule("DequantizeLinear")
def dequantize(node: Node, xs: list[Any]) -> Array:
    zero = xs[2] if len(xs) > 2 else None
    centred = xs[0].astype(np.int64) - _spread(node, zero, xs[0].shape).astype(np.int64)
    return centred * _spread(node, xs[1], xs[0].shape)


def centred(x: Array, zero: Array | None, axis: int = 0) -> Array:
    """x - zero point, a vector of zero points along `axis`."""
    x = x.astype(np.int64)
    if zero is None:
        return x
    zero = zero.astype(np.int64)
    return x - (zero.reshape(()) if zero.size == 1 else np.moveaxis(zero.reshape(-1, *[1] * (x.ndim - 1)), 0, axis))


def rescaled(total: Array, a: Array, b: Array, y: Array, zero: Array, axis: int) -> Array:
    """Sums times one float32 factor, saturated."""
    factor = np.ravel(_FLOAT32(a)) * np.ravel(_FLOAT32(b)) / np.ravel(_FLOAT32(y))
    shape = [1] * total.ndim
    shape[axis] = -1
    return saturate(total.astype(_FLOAT32) * factor.reshape(shape), zero.reshape(()).astype(np.int64), zero.dtype)


def _optional(xs: list[Any], index: int) -> Any:
    return xs[index] if index < len(xs) else None


@rule("ConvInteger")
def conv_integer(node: Node, xs: list[Any]) -> Array:
    x, w = centred(xs[0], _optional(xs, 2)), centred(xs[1], _optional(xs, 3))
    return conv(node, [x.astype(np.float64), w.astype(np.float64)]).astype(np.int32)


@rule("QLinearConv")
def q_linear_conv(node: Node, xs: list[Any]) -> Array:
    x, x_scale, x_zero, w, w_scale, w_zero, y_scale, y_zero = xs[:8]
    total = conv_integer(node, [x, w, x_zero, w_zero])
    if _optional(xs, 8) is not None:
        total = total + xs[8].reshape(-1, *[1] * (x.ndim - 2))
    return rescaled(total, x_scale, w_scale, y_scale, y_zero, 1)


@rule("MatMulInteger")
def matmul_integer(node: Node, xs: list[Any]) -> Array:
    return (centred(xs[0], _optional(xs, 2)) @ centred(xs[1], _optional(xs, 3), -1)).astype(np.int32)


@rule("QLinearMatMul")
def q_linear_matmul(node: Node, xs: list[Any]) -> Array:
    a, a_scale, a_zero, b, b_scale, b_zero, y_scale, y_zero = xs
    return rescaled(matmul_integer(node, [a, b, a_zero, b_zero]), a_scale, b_scale, y_scale, y_zero, -1)


# --- com.microsoft -----------------------------------------------------------------------------------


def _scalars(xs: list[Any], *indices: int) -> list[np.float32]:
    return [_FLOAT32(0 if _optional(xs, i) is None else np.ravel(xs[i])[0]) for i in indices]


@rule("QLinearAdd")
def q_linear_add(node: Node, xs: list[Any]) -> Array:
    """a * ra + (b * rb + c) with fused multiply-adds, r the scales over the output's (MLAS)."""
    a, b = (x.astype(np.float64) for x in (xs[0], xs[3]))
    a_scale, a_zero, b_scale, b_zero, scale, zero = _scalars(xs, 1, 2, 4, 5, 6, 7)
    first, second = a_scale / scale, b_scale / scale
    inner = (b * float(second) + float(zero - (first * a_zero + second * b_zero))).astype(_FLOAT32)
    return saturate((a * float(first) + inner).astype(_FLOAT32), np.int64(0), xs[0].dtype)


@rule("QLinearMul")
def q_linear_mul(node: Node, xs: list[Any]) -> Array:
    a_scale, a_zero, b_scale, b_zero, scale, zero = _scalars(xs, 1, 2, 4, 5, 6, 7)
    product = (xs[0].astype(_FLOAT32) - a_zero) * (xs[3].astype(_FLOAT32) - b_zero)
    return saturate(product * (a_scale * b_scale / scale) + zero, np.int64(0), xs[0].dtype)


@rule("QLinearGlobalAveragePool")
def q_linear_global_average(node: Node, xs: list[Any]) -> Array:
    first = 1 if node.get("channels_last", 0) else 2
    axes = tuple(range(first, first + xs[0].ndim - 2))
    x_scale, x_zero, y_scale, y_zero = _scalars(xs, 1, 2, 3, 4)
    count = np.prod([xs[0].shape[a] for a in axes])
    total = (xs[0].astype(np.int64) - int(x_zero)).sum(axes, keepdims=True).astype(_FLOAT32)
    return saturate(total * (x_scale / (y_scale * _FLOAT32(count))), np.int64(y_zero), xs[0].dtype)


@rule("BiasGelu", "FastGelu", "QuickGelu")
def contrib_gelu(node: Node, xs: list[Any]) -> Array:
    x = xs[0] if len(xs) < 2 else xs[0] + xs[1]
    if node.op == "QuickGelu":
        return x / (1 + np.exp(-node.get("alpha", 1.702) * x))
    return RULES["Gelu"](Node("Gelu", 20, {"approximate": "tanh" if node.op == "FastGelu" else "none"}), [x])


@rule("FusedMatMul")
def fused_matmul(node: Node, xs: list[Any]) -> Array:
    told = (node.get("transA", 0), node.get("transB", 0))
    a, b = (np.swapaxes(x, -1, -2) if flip else x for x, flip in zip(xs, told, strict=True))
    return node.get("alpha", 1.0) * (a @ b)
