"""QuantizeLinear and DequantizeLinear: per tensor, per axis or per block, as onnxruntime rounds and saturates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
import onnx_ir as ir

from partitioner.geometry import Box
from partitioner.maps import Taps
from partitioner.ops.base import (
    Call,
    Example,
    Need,
    Needs,
    NodeView,
    Operator,
    TensorType,
    Unsupported,
    aligned,
    whole,
)
from partitioner.ops.dtypes import torch_dtype
from partitioner.ops.registry import register
from partitioner.ops.standard.resize import local_positions

if TYPE_CHECKING:
    import torch

    from partitioner.ops.emitter import Emitter
else:
    from partitioner.lazy import torch

QUANTIZED = {
    ir.DataType.INT8: (-128, 127),
    ir.DataType.UINT8: (0, 255),
    ir.DataType.INT16: (-32768, 32767),
    ir.DataType.UINT16: (0, 65535),
}
"""Element types to which numbers are quantised, with their lowest and highest value."""

_FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_PER_CHANNEL = np.array([0.5, 0.25, 0.0625], np.float32)
_SMALL = np.array(0.0625, np.float32)


def quantized_type(dtype: ir.DataType) -> ir.DataType:
    """An element type that numbers can be quantised to.

    Raises:
        Unsupported: for float8, 4-bit and other types.
    """
    if dtype not in QUANTIZED:
        raise Unsupported(f"it quantises to {dtype.name}, for which there is no rule; quantise to an 8-bit or "
                          "16-bit integer type")
    return dtype


def saturate(value: torch.Tensor, zero: torch.Tensor | None, dtype: ir.DataType) -> torch.Tensor:
    """clip(round_half_to_even(value) + zero point), in the element type given."""
    low, high = QUANTIZED[dtype]
    rounded = torch.round(value)
    shifted = rounded if zero is None else rounded + zero.to(rounded.dtype)
    return shifted.clamp(low, high).to(torch_dtype(dtype))


def exact_float(dtype: torch.dtype) -> torch.dtype:
    """The type in which a scale is applied: float32 for the half types, as onnxruntime does."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


@dataclass(frozen=True)
class Quantization(Operator):
    """What both directions share: a scale and a zero point per tensor, per cell of an axis, or per block of it.

    Args:
        axis: None when there is one scale for the whole tensor.
        block: cells per scale along `axis`; 0 when the scale is a vector.
    """

    axis: int | None
    block: int

    def needs(self, output: int = 0) -> Needs:
        shape = self.outputs[0].shape
        return (aligned(shape, shape), *(None if p is None else self._parameter(p) for p in self.inputs[1:]))

    def _parameter(self, parameter: TensorType) -> tuple[Need, ...]:
        shape = self.outputs[0].shape
        if self.axis is None:
            return whole(parameter.shape)
        own = aligned(shape, shape)
        if not self.block:
            return (own[self.axis],)
        rows = tuple((cell // self.block,) for cell in range(shape[self.axis]))
        blocks = Need(self.axis, Taps(parameter.shape[self.axis], shape[self.axis], rows))
        return tuple(blocks if a == self.axis else need for a, need in enumerate(own))

    def _spread(self, call: Call, index: int) -> torch.Tensor | None:
        """Scale or zero point, broadcast against the data."""
        found = call.optional(index)
        if found is None or self.axis is None:
            return None if found is None else found.reshape(())
        if not self.block:
            return found.reshape([-1 if a == self.axis else 1 for a in range(self.outputs[0].rank)])
        return found.index_select(self.axis, torch.tensor(self._rows(call.box(index), call.outs[0])).to(found.device))

    def _rows(self, held: Box, out: Box) -> list[int]:
        """For every cell to produce, where its block's scale lies in what is held."""
        assert self.axis is not None
        position = local_positions(held.axes[self.axis])
        cells = [cell for part in out.axes[self.axis] for cell in range(part.start, part.stop)]
        return [position[cell // self.block] for cell in cells]

    def emit(self, emitter: Emitter, names: Sequence[str | None], boxes: Sequence[Box | None],
             outs: Sequence[Box]) -> tuple[str, ...]:
        if not self.block:
            return emitter.same(names, 1)
        spread: list[str | None] = [names[0]]
        for name, box in zip(names[1:], boxes[1:], strict=True):  # a shard may begin within a block
            assert (name is None) == (box is None)
            spread.append(None if name is None or box is None else emitter.op(
                "Gather", [name, emitter.integers(self._rows(box, outs[0]))], {"axis": self.axis}))
        return emitter.same(spread, 1, {"block_size": 1})


def _granularity(view: NodeView) -> tuple[int | None, int]:
    """(axis, block size) of the scales."""
    data, scale = view.input(0), view.input(1)
    if view.has(2) and view.input(2).shape != scale.shape:
        raise Unsupported(f"zero point of {list(view.input(2).shape)} beside a scale of {list(scale.shape)}; "
                          "correct the file")
    block = view.int("block_size", 0)
    if scale.shape in ((), (1,)) and not block:
        return None, 0
    axis = view.int("axis", 1)
    if not -data.rank <= axis < data.rank:
        raise Unsupported(f"axis {axis} on a tensor of {data.rank} axes; correct the file")
    axis %= data.rank
    extents = [-(-n // block) if block and a == axis else n for a, n in enumerate(data.shape)]
    if list(scale.shape) != (extents if block else extents[axis : axis + 1]):
        raise Unsupported(f"scale of {list(scale.shape)} on an input of {list(data.shape)}, axis {axis}, "
                          f"block size {block}; correct the file")
    return axis, block


@register
@dataclass(frozen=True)
class QuantizeLinear(Quantization):
    """saturate(round_half_to_even(x / scale) + zero point).

    Source: ONNX QuantizeLinear (10, 13, 19, 21, 23), to 8 and 16 bits.
    """

    op_types: ClassVar[tuple[str, ...]] = ("QuantizeLinear",)
    examples: ClassVar[tuple[Example, ...]] = (
        Example("QuantizeLinear", ((2, 3, 7, 5), np.array(0.017, np.float32), np.array(119, np.uint8)), opset=10),
        Example("QuantizeLinear", ((2, 3, 11), _SMALL, np.array(-3, np.int8)), opset=13),
        Example("QuantizeLinear", ((2, 3, 7, 5), _PER_CHANNEL, np.array([0, -5, 9], np.int8)), opset=13),
        Example("QuantizeLinear", ((1, 2, 3, 5), _PER_CHANNEL), {"axis": -2}, opset=19),
        Example("QuantizeLinear", ((1, 2, 9), np.array([1e-3], np.float32)), opset=10),
        Example("QuantizeLinear", ((1, 2, 7, 3), np.array(2e-5, np.float32), np.array(40000, np.uint16)), opset=21),
        Example("QuantizeLinear", ((2, 2, 7), np.array(2e-5, np.float32)), {"output_dtype": 5}, opset=21),
        Example("QuantizeLinear", ((1, 2, 7), np.array([[[.03, .07, .02]] * 2], np.float32),
                                   np.array([[[3, 0, 9]] * 2], np.uint8)), {"axis": 2, "block_size": 3}, opset=21),
    )

    @property
    def has_gradient(self) -> bool:
        return False

    @classmethod
    def read(cls, view: NodeView) -> Self:
        data = view.input(0)
        if data.dtype not in _FLOATS:
            raise Unsupported(f"it quantises {data.dtype.name}, which onnxruntime does not; cast to float first")
        if view.int("precision", 0):
            raise Unsupported("its attribute precision has no rule; remove it")
        told = ir.DataType(view.int("output_dtype", 0) or int(ir.DataType.UINT8))
        dtype = quantized_type(view.input(2).dtype if view.has(2) else told)
        return cls(view.inputs, (TensorType(data.shape, dtype),), *_granularity(view))

    def run(self, call: Call) -> tuple[torch.Tensor, ...]:
        x, scale = call.tensor(0), self._spread(call, 1)
        assert scale is not None
        kind = exact_float(x.dtype)
        return (saturate(x.to(kind) / scale.to(kind), self._spread(call, 2), self.outputs[0].dtype),)

    def flops(self, out: float) -> float:
        return 4 * out


@register
@dataclass(frozen=True)
class DequantizeLinear(Quantization):
    """(x - zero point) * scale.

    Source: ONNX DequantizeLinear (10, 13, 19, 21, 23), from integers of 8, 16 and 32 bits.
    """

    op_types: ClassVar[tuple[str, ...]] = ("DequantizeLinear",)
    examples: ClassVar[tuple[Example, ...]] = (
        Example("DequantizeLinear", ((2, 3, 7, 5), np.array(0.017, np.float32), np.array(119, np.uint8)),
                opset=10, dtype=ir.DataType.UINT8),
        Example("DequantizeLinear", ((2, 3, 7, 5), _PER_CHANNEL, np.array([0, -5, 9], np.int8)),
                opset=13, dtype=ir.DataType.INT8),
        Example("DequantizeLinear", ((2, 3, 11), _SMALL), opset=13, dtype=ir.DataType.INT32),
        Example("DequantizeLinear", ((1, 2, 7, 3), np.array([0.3], np.float32), np.array([2], np.int16)),
                opset=21, dtype=ir.DataType.INT16),
        Example("DequantizeLinear", ((1, 2, 7, 3), _SMALL, np.array(4, np.uint16)),
                opset=21, dtype=ir.DataType.UINT16),
        Example("DequantizeLinear", ((1, 7, 2), np.array([[[.3, .7], [.2, .9], [.4, .1]]], np.float32),
                                     np.array([[[3, 0], [1, 2], [4, 5]]], np.uint8)),
                {"axis": 1, "block_size": 3}, opset=21, dtype=ir.DataType.UINT8),
        Example("DequantizeLinear", ((2, 1, 7), np.array([[[.3, .7]], [[.2, .9]]], np.float32)),
                {"axis": 2, "block_size": 4}, opset=21, dtype=ir.DataType.INT8),
    )

    @classmethod
    def read(cls, view: NodeView) -> Self:
        data, scale = view.input(0), view.input(1)
        if data.dtype != ir.DataType.INT32:
            quantized_type(data.dtype)
        told = view.int("output_dtype", 0)
        dtype = ir.DataType(told) if told else scale.dtype
        return cls(view.inputs, (TensorType(data.shape, dtype),), *_granularity(view))

    def run(self, call: Call) -> tuple[torch.Tensor, ...]:
        x, scale, zero = call.tensor(0).to(torch.int32), self._spread(call, 1), self._spread(call, 2)
        assert scale is not None
        kind = exact_float(scale.dtype)
        centred = x if zero is None else x - zero.to(torch.int32)
        return ((centred.to(kind) * scale.to(kind)).to(torch_dtype(self.outputs[0].dtype)),)

    def flops(self, out: float) -> float:
        return 2 * out


@register
@dataclass(frozen=True)
class ContribQuantizeLinear(QuantizeLinear):
    """QuantizeLinear as onnxruntime writes it into models of older opsets, 16-bit types included.

    Source: com.microsoft QuantizeLinear (1).
    """

    domain: ClassVar[str] = "com.microsoft"
    examples: ClassVar[tuple[Example, ...]] = (
        Example("QuantizeLinear", ((2, 3, 7, 5), np.array(2e-5, np.float32), np.array(40000, np.uint16))),
        Example("QuantizeLinear", ((2, 3, 7), _PER_CHANNEL, np.array([0, 5, 9], np.uint8)), {"axis": 1}),
    )


@register
@dataclass(frozen=True)
class ContribDequantizeLinear(DequantizeLinear):
    """DequantizeLinear as onnxruntime writes it into models of older opsets, 16-bit types included.

    Source: com.microsoft DequantizeLinear (1).
    """

    domain: ClassVar[str] = "com.microsoft"
    examples: ClassVar[tuple[Example, ...]] = (
        Example("DequantizeLinear", ((2, 3, 7, 5), _SMALL, np.array(4, np.uint16)), dtype=ir.DataType.UINT16),
        Example("DequantizeLinear", ((2, 3, 7), _PER_CHANNEL, np.array([0, -5, 9], np.int8)), {"axis": 1},
                dtype=ir.DataType.INT8),
    )
