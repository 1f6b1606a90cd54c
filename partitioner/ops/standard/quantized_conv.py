"""Convolutions and matrix products of quantised integers: exact sums, rescaled as onnxruntime does."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
import onnx_ir as ir

from partitioner.geometry import Box
from partitioner.maps import Window, identity
from partitioner.ops.base import (
    Call,
    Example,
    Need,
    Needs,
    NodeView,
    Operator,
    TensorType,
    Unsupported,
    WrongExtents,
    aligned,
    whole,
)
from partitioner.ops.kernels.convolve import Geometry, convolve
from partitioner.ops.kernels.windows import (
    crop_outputs,
    explicit_pads,
    local_padding,
    pad_explicitly,
    plan_border,
    read_windows,
    window_needs,
)
from partitioner.ops.registry import register
from partitioner.ops.standard.quantize import quantized_type, saturate

if TYPE_CHECKING:
    import torch

    from partitioner.ops.emitter import Emitter
else:
    from partitioner.lazy import torch

_LARGEST_STEP = 255
"""How far an 8-bit number may be from its zero point."""
_EXACT_IN_FLOAT32 = 2**24


def working_type(weight: torch.Tensor, summed: Sequence[int]) -> torch.dtype:
    """A floating-point type in which sums of 8-bit numbers times these weights are exact, in any order.

    Only on the CPU may that be float32: elsewhere libraries may round its factors or transform them.
    """
    if weight.device.type != "cpu" or weight.numel() == 0:
        return torch.float64
    largest = float(weight.abs().sum(tuple(summed)).max())
    return torch.float32 if largest * _LARGEST_STEP < _EXACT_IN_FLOAT32 else torch.float64


def centred(tensor: torch.Tensor, zero: torch.Tensor | None, axis: int = 0) -> torch.Tensor:
    """tensor - zero point, in int32; a zero point that is a vector runs along `axis`."""
    found = tensor.to(torch.int32)
    if zero is None:
        return found
    spread = zero.to(torch.int32)
    shape = [1] * found.dim()
    if spread.numel() > 1:
        shape[axis] = -1
    return found - spread.reshape(shape)


def rescale(total: torch.Tensor, scales: Sequence[torch.Tensor], zero: torch.Tensor | None,
            dtype: ir.DataType, axis: int) -> torch.Tensor:
    """saturate(round(total * (a scale * b scale / y scale)) + zero point), in float32 as in onnxruntime."""
    a, b, y = (scale.to(torch.float32) for scale in scales)
    factor = a.reshape(()) * b / y.reshape(())
    shape = [1] * total.dim()
    if factor.numel() > 1:
        shape[axis] = -1
    point = None if zero is None else zero.reshape(())
    return saturate(total.to(torch.float32) * factor.reshape(shape), point, dtype)


def _check_single(view: NodeView, index: int, what: str) -> None:
    if view.has(index) and math.prod(view.input(index).shape) != 1:
        raise Unsupported(f"its {what} has {list(view.input(index).shape)} numbers; onnxruntime takes one: "
                          "quantise the activations per tensor")


@dataclass(frozen=True)
class IntegerConvolution(Operator):
    """A convolution of 8-bit integers whose padding is the input's zero point."""

    weight_index: ClassVar[int]
    zero_index: ClassVar[int]
    weight_zero_index: ClassVar[int]

    windows: tuple[Window, ...]
    group: int

    @classmethod
    def _read(cls, view: NodeView, dtype: ir.DataType) -> Self:
        data, weight = view.input(0), view.input(cls.weight_index)
        if not 3 <= data.rank <= 5 or weight.rank != data.rank:
            raise Unsupported(f"its input has {data.rank} axes and its weight {weight.rank}; 3 to 5 (batch, channel, "
                              "1 to 3 spatial) are supported")
        group = view.int("group", 1)
        if data.shape[1] != weight.shape[1] * group or weight.shape[0] % group:
            raise Unsupported(f"input has {data.shape[1]} channels but the weight expects {weight.shape[1] * group} "
                              f"(group {group}); give a volume with that many channels")
        _check_single(view, cls.zero_index, "input's zero point")
        windows, _ = read_windows(view, data.shape[2:], weight.shape[2:])
        shape = (data.shape[0], weight.shape[0], *(w.n_out for w in windows))
        return cls(view.inputs, (TensorType(shape, dtype),), windows, group)

    def needs(self, output: int = 0) -> Needs:
        data = self.inputs[0]
        assert data is not None
        own = (Need(0, identity(data.shape[0])), whole(data.shape)[1], *window_needs(self.windows))
        return (own, *(None if r is None else whole(r.shape) for r in self.inputs[1:]))

    @property
    def explicit(self) -> Mapping[str, tuple[int, ...]]:
        return explicit_pads(self.windows)

    def _sums(self, call: Call) -> torch.Tensor:
        """The exact sums, as int32."""
        held, outs = call.box(0).intervals()[2:], call.outs[0].intervals()[2:]
        borders = [plan_border(w, h, o) for w, h, o in zip(self.windows, held, outs, strict=True)]
        data = centred(call.tensor(0), call.optional(self.zero_index))
        weight = centred(call.tensor(self.weight_index), call.optional(self.weight_zero_index))
        kind = working_type(weight, range(1, weight.dim()))
        result = convolve(pad_explicitly(data.to(kind), borders, 0.0), weight.to(kind), None, Geometry(
            stride=[w.stride for w in self.windows],
            padding=[b.kernel_pad for b in borders],
            dilation=[w.dilation for w in self.windows],
            groups=self.group,
        ))
        return crop_outputs(result, borders, outs).to(torch.int32)

    def emit(self, emitter: Emitter, names: Sequence[str | None], boxes: Sequence[Box | None],
             outs: Sequence[Box]) -> tuple[str, ...]:
        name, box, data = names[0], boxes[0], self.inputs[0]
        assert box is not None and data is not None
        pairs = [local_padding(w, h, o)
                 for w, h, o in zip(self.windows, box.intervals()[2:], outs[0].intervals()[2:], strict=True)]
        pads = [lo for lo, _ in pairs] + [hi for _, hi in pairs]
        if name is None:  # every window lies wholly in the padding
            extents = [n + lo + hi for n, (lo, hi) in zip(box.shape[2:], pairs, strict=True)]
            zero = names[self.zero_index] if self.zero_index < len(names) else None
            number = emitter.constant(np.zeros((), data.dtype.numpy())) if zero is None else zero
            name = emitter.op("Expand", [number, emitter.integers([*box.shape[:2], *extents])])
            pads = [0] * len(pads)
        return emitter.same([name, *names[1:]], 1, {"pads": pads}, drop=("auto_pad",))

    def workspace(self, ins: Sequence[float], outs: Sequence[float]) -> float:
        return 12 * ins[0] + 12 * outs[0]  # centred int32, float64; sums float64, int32

    def flops(self, out: float) -> float:
        weight = self.inputs[self.weight_index]
        assert weight is not None
        return 2.0 * out * math.prod(weight.shape[1:])


_UNSIGNED, _SIGNED = ir.DataType.UINT8, ir.DataType.INT8


def _weights(shape: tuple[int, ...], dtype: type[np.integer]) -> np.ndarray[tuple[int, ...], np.dtype[np.integer]]:
    """Weights for the examples, over the whole range of the type."""
    info = np.iinfo(dtype)
    return (np.arange(math.prod(shape)) * 37 % 256 + info.min).astype(dtype).reshape(shape)


@register
@dataclass(frozen=True)
class ConvInteger(IntegerConvolution):
    """Convolution of (x - zero point) with (w - zero point), in int32.

    Source: ONNX ConvInteger (10).
    """

    op_types: ClassVar[tuple[str, ...]] = ("ConvInteger",)
    examples: ClassVar[tuple[Example, ...]] = (
        Example("ConvInteger", ((1, 2, 13), (3, 2, 3), np.array(3, np.uint8)), {"pads": [1, 1]}, dtype=_UNSIGNED),
        Example("ConvInteger", ((2, 4, 11, 9), _weights((6, 2, 3, 2), np.uint8), np.array(5, np.uint8),
                                np.array([120], np.uint8)),
                {"group": 2, "strides": [2, 3], "pads": [1, 0, 2, 1]}, dtype=_UNSIGNED),
        Example("ConvInteger", ((1, 1, 5, 7, 8), _weights((2, 1, 3, 3, 3), np.uint8)),
                {"dilations": [2, 1, 1], "pads": [2, 1, 1] * 2}, dtype=_UNSIGNED),
        Example("ConvInteger", ((1, 1, 3), (1, 1, 1), np.array(7, np.uint8)), {"pads": [4, 5], "strides": [3]},
                dtype=_UNSIGNED),
    )
    weight_index: ClassVar[int] = 1
    zero_index: ClassVar[int] = 2
    weight_zero_index: ClassVar[int] = 3

    @classmethod
    def read(cls, view: NodeView) -> Self:
        return cls._read(view, ir.DataType.INT32)

    def run(self, call: Call) -> tuple[torch.Tensor, ...]:
        return (self._sums(call),)


_SCALE = np.array(0.02, np.float32)
_X_ZERO, _Y_ZERO = np.array(4, np.uint8), np.array(100, np.uint8)


@register
@dataclass(frozen=True)
class QLinearConv(IntegerConvolution):
    """ConvInteger with an int32 bias, rescaled and saturated.

    Source: ONNX QLinearConv (10).
    """

    op_types: ClassVar[tuple[str, ...]] = ("QLinearConv",)
    examples: ClassVar[tuple[Example, ...]] = (
        Example("QLinearConv", ((2, 2, 13), _SCALE, _X_ZERO, (3, 2, 3), _SCALE, np.array(2, np.uint8), _SCALE,
                                _Y_ZERO), {"pads": [1, 1]}, opset=10, dtype=_UNSIGNED),
        Example("QLinearConv", ((1, 4, 11, 9), _SCALE, _X_ZERO, _weights((6, 2, 3, 2), np.int8),
                                np.array([.01, .02, .03, .04, .05, .06], np.float32), np.zeros(6, np.int8),
                                np.array(0.5, np.float32), _Y_ZERO, np.array([5, -900, 0, 300, 70, 2], np.int32)),
                {"group": 2, "strides": [2, 3], "pads": [1, 0, 2, 1]}, dtype=_UNSIGNED),
        Example("QLinearConv", ((1, 1, 5, 7, 8), _SCALE, np.array(-9, np.int8), _weights((2, 1, 3, 3, 3), np.int8),
                                _SCALE, np.array(0, np.int8), np.array(0.3, np.float32), np.array(7, np.int8)),
                {"dilations": [2, 1, 1], "pads": [2, 1, 1] * 2}, dtype=_SIGNED),
        Example("QLinearConv", ((1, 1, 3), _SCALE, _X_ZERO, (1, 1, 1), _SCALE, _X_ZERO, _SCALE, _Y_ZERO),
                {"pads": [4, 5], "strides": [3]}, dtype=_UNSIGNED),
        Example("QLinearConv", ((1, 2, 10), _SCALE, _X_ZERO, (3, 2, 4), _SCALE, _X_ZERO, _SCALE, _Y_ZERO),
                {"auto_pad": "SAME_UPPER", "strides": [3]}, dtype=_UNSIGNED),
    )
    weight_index: ClassVar[int] = 3
    zero_index: ClassVar[int] = 2
    weight_zero_index: ClassVar[int] = 5

    @classmethod
    def read(cls, view: NodeView) -> Self:
        for index, what in ((1, "input's scale"), (6, "output's scale"), (7, "output's zero point")):
            _check_single(view, index, what)
        return cls._read(view, quantized_type(view.input(7).dtype))

    def run(self, call: Call) -> tuple[torch.Tensor, ...]:
        total, bias = self._sums(call), call.optional(8)
        if bias is not None:
            total = total + bias.reshape(1, -1, *[1] * len(self.windows))
        scales = (call.tensor(1), call.tensor(4), call.tensor(6))
        return (rescale(total, scales, call.tensor(7), self.outputs[0].dtype, axis=1),)


@dataclass(frozen=True)
class IntegerProduct(Operator):
    """A matrix product of 8-bit integers over the last two axes, the others broadcast."""

    right_index: ClassVar[int]
    zero_index: ClassVar[int]
    right_zero_index: ClassVar[int]

    @classmethod
    def _read(cls, view: NodeView, dtype: ir.DataType) -> Self:
        a, b = view.input(0), view.input(cls.right_index)
        if a.rank < 2 or b.rank < 2:
            raise Unsupported("a product with a vector has no sharded rule; export it as a matrix of one column")
        if a.shape[-1] != b.shape[-2]:
            raise WrongExtents(f"it multiplies {list(a.shape)} by {list(b.shape)}; the network takes one extent of "
                               "volume only: give the one that it was exported for")
        _check_single(view, cls.zero_index, "left zero point")
        if view.has(cls.right_zero_index) and view.input(cls.right_zero_index).rank > 1:
            raise Unsupported("a zero point per column and matrix has no rule; use one per column")
        lead = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        return cls(view.inputs, (TensorType((*lead, a.shape[-2], b.shape[-1]), dtype),))

    def needs(self, output: int = 0) -> Needs:
        a, b = self.inputs[0], self.inputs[self.right_index]
        assert a is not None and b is not None
        out = self.outputs[0].shape
        rows, columns = Need(len(out) - 2, identity(out[-2])), Need(len(out) - 1, identity(out[-1]))
        left = (*aligned(a.shape[:-2], out[:-2]), rows, whole(a.shape)[-1])
        right = (*aligned(b.shape[:-2], out[:-2]), whole(b.shape)[-2], columns)
        found: list[tuple[Need, ...] | None] = []
        for index, given in enumerate(self.inputs):
            if given is None:
                found.append(None)
            elif index in (0, self.right_index):
                found.append(left if index == 0 else right)
            else:  # a vector has one number per column
                found.append((columns,) if given.shape == (out[-1],) and out[-1] > 1 else whole(given.shape))
        return tuple(found)

    def _sums(self, call: Call) -> torch.Tensor:
        """The exact sums, as int32."""
        a = centred(call.tensor(0), call.optional(self.zero_index))
        b = centred(call.tensor(self.right_index), call.optional(self.right_zero_index), axis=-1)
        kind = working_type(b, [-2])
        return torch.matmul(a.to(kind), b.to(kind)).to(torch.int32)

    def flops(self, out: float) -> float:
        a = self.inputs[0]
        assert a is not None
        return 2.0 * out * a.shape[-1]


@register
@dataclass(frozen=True)
class MatMulInteger(IntegerProduct):
    """(a - zero point) times (b - zero point), in int32.

    Source: ONNX MatMulInteger (10).
    """

    op_types: ClassVar[tuple[str, ...]] = ("MatMulInteger",)
    examples: ClassVar[tuple[Example, ...]] = (
        Example("MatMulInteger", ((2, 5, 3), (3, 4), np.array(3, np.uint8)), dtype=_UNSIGNED),
        Example("MatMulInteger", ((2, 3, 5, 4), _weights((4, 7), np.int8), np.array(9, np.uint8),
                                  np.array([1, -2, 3, 0, 5, -6, 7], np.int8)), dtype=_UNSIGNED),
        Example("MatMulInteger", ((5, 4), (4, 3)), dtype=_UNSIGNED),
    )
    right_index: ClassVar[int] = 1
    zero_index: ClassVar[int] = 2
    right_zero_index: ClassVar[int] = 3

    @classmethod
    def read(cls, view: NodeView) -> Self:
        return cls._read(view, ir.DataType.INT32)

    def run(self, call: Call) -> tuple[torch.Tensor, ...]:
        return (self._sums(call),)


@register
@dataclass(frozen=True)
class QLinearMatMul(IntegerProduct):
    """MatMulInteger, rescaled and saturated.

    Source: ONNX QLinearMatMul (10, 21).
    """

    op_types: ClassVar[tuple[str, ...]] = ("QLinearMatMul",)
    examples: ClassVar[tuple[Example, ...]] = (
        Example("QLinearMatMul", ((2, 5, 3), _SCALE, _X_ZERO, _weights((3, 4), np.uint8), _SCALE,
                                  np.array(120, np.uint8), np.array(0.3, np.float32), _Y_ZERO), dtype=_UNSIGNED),
        Example("QLinearMatMul", ((2, 3, 5, 4), _SCALE, _X_ZERO, _weights((4, 3), np.int8),
                                  np.array([.01, .02, .03], np.float32), np.array([0, 1, -2], np.int8),
                                  np.array(0.3, np.float32), _Y_ZERO), dtype=_UNSIGNED),
    )
    right_index: ClassVar[int] = 3
    zero_index: ClassVar[int] = 2
    right_zero_index: ClassVar[int] = 5

    @classmethod
    def read(cls, view: NodeView) -> Self:
        for index, what in ((1, "left scale"), (6, "output's scale"), (7, "output's zero point")):
            _check_single(view, index, what)
        return cls._read(view, quantized_type(view.input(7).dtype))

    def run(self, call: Call) -> tuple[torch.Tensor, ...]:
        scales = (call.tensor(1), call.tensor(4), call.tensor(6))
        return (rescale(self._sums(call), scales, call.tensor(7), self.outputs[0].dtype, axis=-1),)
