"""Sums, products and global means of quantised tensors, with the roundings of onnxruntime."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
import onnx_ir as ir

from partitioner.maps import identity
from partitioner.ops.base import (
    Call,
    Decomposer,
    Example,
    Need,
    Needs,
    NodeView,
    Operator,
    Reduction,
    TensorType,
    Unsupported,
    aligned,
    whole,
)
from partitioner.ops.kernels.decomposing import rounded
from partitioner.ops.registry import register
from partitioner.ops.standard.quantize import QUANTIZED, quantized_type, saturate
from partitioner.ops.standard.quantized_conv import centred

if TYPE_CHECKING:
    import torch
else:
    from partitioner.lazy import torch

_SCALES = (np.array(0.05, np.float32), np.array(0.06, np.float32), np.array(0.1, np.float32))


def _check_scalars(view: NodeView, indices: Sequence[int]) -> None:
    for index in indices:
        if view.has(index) and math.prod(view.input(index).shape) != 1:
            raise Unsupported(f"input {index}, a scale or zero point, has {list(view.input(index).shape)} numbers; "
                              "onnxruntime takes one")


def _number(call: Call, index: int) -> torch.Tensor:
    """A scale or zero point as a float32 scalar; 0 when it is not given."""
    found = call.optional(index)
    return torch.zeros((), device=call.tensor(0).device) if found is None else found.to(torch.float32).reshape(())


@register
@dataclass(frozen=True)
class QuantizedBinary(Operator):
    """Sum or product of two quantised tensors that broadcast, in one float32 expression as in MLAS.

    Source: com.microsoft QLinearAdd, QLinearMul (1).
    """

    op_types: ClassVar[tuple[str, ...]] = ("QLinearAdd", "QLinearMul")
    domain: ClassVar[str] = "com.microsoft"
    examples: ClassVar[tuple[Example, ...]] = (
        Example("QLinearAdd", ((2, 3, 7, 5), _SCALES[0], np.array(3, np.uint8), (2, 3, 7, 5), _SCALES[0],
                               np.array(9, np.uint8), _SCALES[2], np.array(4, np.uint8)), dtype=ir.DataType.UINT8),
        Example("QLinearAdd", ((2, 3, 11), _SCALES[0], np.array(-3, np.int8), (3, 1), _SCALES[1],
                               np.array(0, np.int8), _SCALES[2]), dtype=ir.DataType.INT8),
        Example("QLinearMul", ((2, 3, 7, 5), _SCALES[0], np.array(3, np.uint8), (3, 7, 1), _SCALES[1],
                               np.array(9, np.uint8), _SCALES[0], np.array(4, np.uint8)), dtype=ir.DataType.UINT8),
        Example("QLinearMul", ((2, 1, 7), _SCALES[0], np.array(-9, np.int8), (2, 1, 7), _SCALES[1],
                               np.array(9, np.int8), _SCALES[0], np.array(4, np.int8)), dtype=ir.DataType.INT8),
    )

    op_type: str

    @classmethod
    def read(cls, view: NodeView) -> Self:
        a, b = view.input(0), view.input(3)
        _check_scalars(view, (1, 2, 4, 5, 6, 7))
        shape = np.broadcast_shapes(a.shape, b.shape)
        return cls(view.inputs, (TensorType(shape, quantized_type(a.dtype)),), view.op_type)

    def needs(self, output: int = 0) -> Needs:
        out = self.outputs[0].shape
        return tuple(None if t is None else aligned(t.shape, out) if i in (0, 3) else whole(t.shape)
                     for i, t in enumerate(self.inputs))

    def run(self, call: Call) -> tuple[torch.Tensor, ...]:
        a, b = call.tensor(0), call.tensor(3)
        a_scale, a_zero, b_scale, b_zero, scale, zero = (_number(call, i) for i in (1, 2, 4, 5, 6, 7))
        if self.op_type == "QLinearAdd":  # two fused multiply-adds, whose products are exact in float64
            first, second = a_scale / scale, b_scale / scale
            offset = zero - (first * a_zero + second * b_zero)
            shifted = (b.double() * second.double() + offset.double()).float()
            value = (a.double() * first.double() + shifted.double()).float()
        else:
            value = (a.float() - a_zero) * (b.float() - b_zero) * (a_scale * b_scale / scale) + zero
        return (saturate(value, None, self.outputs[0].dtype),)

    def flops(self, out: float) -> float:
        return 6 * out


@register
@dataclass(frozen=True)
class QuantizedGlobalAverage(Operator):
    """Mean over the spatial axes of a quantised tensor: an exact integer sum, rescaled once.

    saturate(round((sum - count * zero) * (x scale / (y scale * count))) + y zero)
    Source: com.microsoft QLinearGlobalAveragePool (1).
    """

    op_types: ClassVar[tuple[str, ...]] = ("QLinearGlobalAveragePool",)
    domain: ClassVar[str] = "com.microsoft"
    examples: ClassVar[tuple[Example, ...]] = (
        Example("QLinearGlobalAveragePool", ((2, 3, 7, 5), _SCALES[0], np.array(3, np.uint8), _SCALES[1],
                                             np.array(9, np.uint8)), dtype=ir.DataType.UINT8),
        Example("QLinearGlobalAveragePool", ((2, 7, 5, 3), _SCALES[0], np.array(3, np.int8), np.array(0.01, np.float32),
                                             np.array(9, np.int8)), {"channels_last": 1}, dtype=ir.DataType.INT8),
    )

    axes: tuple[int, ...]

    @classmethod
    def read(cls, view: NodeView) -> Self:
        data = view.input(0)
        _check_scalars(view, (1, 2, 3, 4))
        first = 1 if view.int("channels_last", 0) else 2
        axes = tuple(range(first, first + data.rank - 2))
        shape = tuple(1 if a in axes else n for a, n in enumerate(data.shape))
        return cls(view.inputs, (TensorType(shape, quantized_type(data.dtype)),), axes)

    @property
    def _data(self) -> TensorType:
        data = self.inputs[0]
        assert data is not None
        return data

    @property
    def _count(self) -> int:
        return math.prod(self._data.shape[a] for a in self.axes)

    def needs(self, output: int = 0) -> Needs:
        shape = self._data.shape
        own = tuple(whole(shape)[a] if a in self.axes else Need(a, identity(n)) for a, n in enumerate(shape))
        return (own, *(None if t is None else whole(t.shape) for t in self.inputs[1:]))

    @property
    def reduction(self) -> Reduction:
        return Reduction(self.axes)

    def run(self, call: Call) -> tuple[torch.Tensor, ...]:
        total = call.tensor(0).sum(self.axes, keepdim=True, dtype=torch.int32)
        zero = call.optional(2)
        if zero is not None:
            total = centred(total, zero.to(torch.int32) * self._count)
        factor = _number(call, 1) / (_number(call, 3) * self._count)
        point = call.optional(4)
        return (saturate(total.float() * factor, None if point is None else point.reshape(()),
                         self.outputs[0].dtype),)

    def decompose(self, write: Decomposer, inputs: Sequence[ir.Value | None]) -> ir.Value:
        x, x_scale, zero, y_scale, point = (*inputs, None)[:5]
        assert x is not None and x_scale is not None and y_scale is not None

        def cast(value: ir.Value, dtype: ir.DataType) -> ir.Value:
            return write.op("Cast", [value], {"to": int(dtype)})[0]

        def number(value: float, dtype: ir.DataType) -> ir.Value:
            return write.constant(np.asarray(value, dtype.numpy()))

        integer, real = ir.DataType.INT32, ir.DataType.FLOAT
        (total,) = write.all_reduce("sum", [write.reduce("ReduceSum", cast(x, integer), self.axes, True)])
        if zero is not None:
            (shift,) = write.op("Mul", [cast(zero, integer), number(self._count, integer)])
            (total,) = write.op("Sub", [total, shift])
        (divisor,) = write.op("Mul", [cast(y_scale, real), number(self._count, real)])
        (factor,) = write.op("Div", [cast(x_scale, real), divisor])
        result = rounded(write, write.op("Mul", [cast(total, real), factor])[0])
        if point is not None:
            (result,) = write.op("Add", [result, cast(point, real)])
        low, high = QUANTIZED[self.outputs[0].dtype]
        (result,) = write.op("Max", [result, number(low, real)])
        (result,) = write.op("Min", [result, number(high, real)])
        return cast(result, self.outputs[0].dtype)

    def flops(self, out: float) -> float:
        return out * self._count
