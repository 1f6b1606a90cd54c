"""Which kind of kernel an operator is, so that a profile knows how long it takes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from partitioner.curves import FloatArray, Number
from partitioner.ops.base import Operator
from partitioner.ops.standard.conv import Conv, ConvTranspose
from partitioner.ops.standard.pointwise import Pointwise
from partitioner.profile import Kernels

_DTYPES = {ir.DataType.FLOAT: "float32", ir.DataType.DOUBLE: "float64", ir.DataType.FLOAT16: "float16",
           ir.DataType.BFLOAT16: "bfloat16"}

_FUNCTIONS = frozenset({
    "Sigmoid", "Tanh", "Exp", "Log", "Erf", "Gelu", "Softplus", "Mish", "Swish", "Elu", "Selu", "Celu", "Pow", "Sin",
    "Cos", "Tan", "Asin", "Acos", "Atan", "Sinh", "Cosh", "Asinh", "Acosh", "Atanh"})

_NORMS = ("moments", "affine")

_KINDS: dict[str, tuple[str, ...]] = {
    "Moments": ("moments",),
    "Normalize": ("affine",),
    "BatchNormalization": ("affine",),
    **dict.fromkeys(("InstanceNormalization", "GroupNormalization", "LayerNormalization", "RMSNormalization",
                     "MeanVarianceNormalization", "LpNormalization"), _NORMS),
    **dict.fromkeys(("Softmax", "LogSoftmax", "ArgMax", "ArgMin", "Hardmax"), ("softmax",)),
    **dict.fromkeys(("MaxPool", "AveragePool", "LpPool", "MaxUnpool"), ("pool",)),
    **dict.fromkeys(("Resize", "Upsample", "GridSample"), ("resize",)),
    **dict.fromkeys(("Concat", "Pad", "Slice", "Transpose", "Split", "DepthToSpace", "SpaceToDepth", "Expand", "Tile",
                     "Gather", "Reshape"), ("copy",)),
    **dict.fromkeys(("MatMul", "Gemm", "Einsum", "FusedMatMul", "MatMulInteger", "QLinearMatMul"), ("matmul",)),
    **dict.fromkeys(("ConvInteger", "QLinearConv"), ("convolution",)),
}
"""Kinds of kernels by operator, one after the other; what is not here is `pointwise`."""


def kinds_of(operator: Operator) -> tuple[str, ...]:
    """The kernels that an operator runs; () for one that only looks at its input's memory."""
    if operator.is_view:
        return ()
    if isinstance(operator, Pointwise):
        return ("function",) if operator.op_type in _FUNCTIONS else ("pointwise",)
    name = next((n for n in operator.op_types if n in _KINDS), None)
    if name is not None:
        return _KINDS[name]
    reduces = operator.reduction is not None and math.prod(operator.outputs[0].shape) < _size(operator)
    return ("reduce",) if reduces else ("pointwise",)


def _size(operator: Operator) -> int:
    first = operator.inputs[0] if operator.inputs else None
    return 0 if first is None else math.prod(first.shape)


def kernel_seconds(kernels: Kernels, operator: Operator, ins: Sequence[Number | None], outs: Sequence[Number],
                   in_place: bool = False) -> FloatArray:
    """Seconds of one call of an operator's kernel, elementwise.

    Args:
        ins, outs: elements per input (None: not given) and output.
        in_place: whether a kernel that can writes to memory that has been used before.
    """
    dtype = _DTYPES.get(operator.outputs[0].dtype, "float32")
    flops = np.asarray(operator.flops(np.asarray(outs[0], np.float64)), np.float64)  # pyright: ignore
    nbytes = _bytes(operator, ins, outs)
    if isinstance(operator, Conv | ConvTranspose):
        return _convolution(kernels, operator, outs[0], flops, nbytes, dtype)
    kinds = kinds_of(operator)
    if not kinds:
        return np.where(nbytes > 0, kernels.launch, 0.0)
    if in_place and operator.writes_into:
        kinds = tuple({"affine": "affine in place", "pointwise": "move"}.get(kind, kind) for kind in kinds)
    given = np.asarray(0.0 if not ins or ins[0] is None else ins[0]) * _itemsize(operator)
    return sum((kernels.seconds(kind, flops, given if kind in ("moments", "reduce") else nbytes, dtype)
                for kind in kinds), start=np.zeros(np.shape(nbytes)))


def _bytes(operator: Operator, ins: Sequence[Number | None], outs: Sequence[Number]) -> FloatArray:
    """Bytes read and written: of inputs that are activations, and of outputs."""
    total = np.zeros(np.shape(outs[0]))
    for given, kind in zip(ins, operator.inputs, strict=False):
        if given is not None and kind is not None and kind.rank > 1:
            total = total + np.asarray(given) * kind.itemsize
    for found, kind in zip(outs, operator.outputs, strict=False):
        total = total + np.asarray(found) * kind.itemsize
    return total


def _itemsize(operator: Operator) -> float:
    first = operator.inputs[0] if operator.inputs else None
    return 4.0 if first is None else float(first.itemsize)


def _convolution(kernels: Kernels, operator: Conv | ConvTranspose, out: Number, flops: FloatArray, nbytes: FloatArray,
                 dtype: str) -> FloatArray:
    weight = operator.inputs[1]
    assert weight is not None
    channels, group = operator.outputs[0].shape[1], operator.group
    amount = np.asarray(out, np.float64) / channels
    window = math.prod(weight.shape[2:])
    if isinstance(operator, ConvTranspose):
        features = (weight.shape[0] / group, channels / group)
        return kernels.convolution_seconds("transposed", flops, features, amount, nbytes, dtype)
    if group > 1 and operator.channels_read == 1:
        return kernels.convolution_seconds("depthwise", flops, (window,), amount * channels, nbytes, dtype)
    features = (operator.channels_read, channels / group, window)
    return kernels.convolution_seconds("conv", flops, features, amount, nbytes, dtype)
