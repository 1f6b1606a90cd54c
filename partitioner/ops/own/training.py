"""What layers do while a network is trained: batch statistics, and dropout by the cell's global index."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
import onnx_ir as ir

from partitioner.dialect import DOMAIN
from partitioner.geometry import Box, Interval
from partitioner.maps import identity
from partitioner.ops.base import (
    Backward,
    Call,
    Decomposer,
    Need,
    Needs,
    NodeView,
    Operator,
    Reduction,
    TensorType,
    Unsupported,
    aligned,
    statistics,
    whole,
)
from partitioner.ops.dtypes import torch_dtype
from partitioner.ops.kernels.decomposing import cast, merged_moments, type_of, wide_type
from partitioner.ops.kernels.moments import affine, moments, scale_and_shift
from partitioner.ops.registry import register
from partitioner.ops.standard.norm import normalize, per_channel

if TYPE_CHECKING:
    import torch

    from partitioner.ops.emitter import Emitter
else:
    from partitioner.lazy import torch


@register
@dataclass(frozen=True)
class TrainingBatchNormalization(Operator):
    """Normalisation of every channel by its mean and variance over batch and space, which are results too.

    Inputs x, scale, bias; outputs y, mean, population variance.
    Source: BatchNormalization in training mode; the running statistics are the module's affair.
    """

    op_types: ClassVar[tuple[str, ...]] = ("TrainingBatchNormalization",)
    domain: ClassVar[str] = DOMAIN

    epsilon: float

    @classmethod
    def read(cls, view: NodeView) -> Self:
        data = view.input(0)
        if data.rank < 2 or view.input(1).shape != (data.shape[1],):
            raise Unsupported(f"scale of {list(view.input(1).shape)} on input {list(data.shape)}; correct the file")
        vector = TensorType((data.shape[1],), wide_type(data.dtype))
        return cls(view.inputs, (data, vector, vector), float(np.asarray(view.attributes["epsilon"])))

    @property
    def reduction(self) -> Reduction:
        return Reduction(tuple(a for a in range(self.outputs[0].rank) if a != 1))

    def needs(self, output: int = 0) -> Needs:
        shape = self.outputs[0].shape
        if output:
            own = tuple(Need(0, identity(n)) if a == 1 else whole(shape)[a] for a, n in enumerate(shape))
            return (own, None, None)
        own = tuple(Need(1, identity(n)) if a == 1 else statistics(a, n) for a, n in enumerate(shape))
        vector = (Need(1, identity(shape[1])),)
        return (own, vector, vector)

    def decompose(self, write: Decomposer, inputs: Sequence[ir.Value | None]) -> tuple[ir.Value, ...]:
        x, scale, bias = inputs
        assert x is not None
        (data, *_) = self.outputs
        axes = self.reduction.axes
        merged = merged_moments(write, x, data.shape, axes, wide_type(data.dtype))
        y = normalize(write, [x, *merged, scale, bias], self.epsilon)
        count, mean, m2 = merged
        (variance,) = write.op("Div", [m2, cast(write, count, type_of(m2))])
        flat = write.constant(np.asarray([data.shape[1]], np.int64))
        return (y, *(write.op("Reshape", [v, flat])[0] for v in (mean, variance)))

    def backward(self, ins: Sequence[float], outs: Sequence[float]) -> Backward:
        return Backward(inputs=(0,), workspace=self.outputs[0].itemsize * outs[0])

    def run(self, call: Call) -> tuple[torch.Tensor, ...]:
        x = call.tensor(0)
        kept = torch_dtype(wide_type(self.outputs[0].dtype))
        count, mean, m2 = moments(x.to(kept), self.reduction.axes)
        variance = m2 / count
        scale, bias = (per_channel(call.tensor(i), x.dim()).to(kept) for i in (1, 2))
        y = affine(x, *scale_and_shift(scale, bias, mean, variance, self.epsilon))
        return y, mean.reshape(-1), variance.reshape(-1)

    def flops(self, out: float) -> float:
        return 6 * out


@register
@dataclass(frozen=True)
class TrainingDropout(Operator):
    """Cells kept with probability 1 - ratio and scaled by 1 / (1 - ratio); which ones, their global index says.

    A cell's number is a hash (splitmix64) of seed, layer and index, so that the mask is the same on every mesh.
    With `channels`, all cells of a channel have one number.
    Source: Dropout in training mode; torch's Dropout1d, 2d and 3d.
    """

    op_types: ClassVar[tuple[str, ...]] = ("TrainingDropout",)
    domain: ClassVar[str] = DOMAIN

    ratio: float
    layer: int
    channels: bool

    @classmethod
    def read(cls, view: NodeView) -> Self:
        return cls(view.inputs, (view.input(0),), view.float("ratio", 0.5), view.int("layer", 0),
                   bool(view.int("channels", 0)))

    def needs(self, output: int = 0) -> Needs:
        shape = self.outputs[0].shape
        return (aligned(shape, shape), ())

    def backward(self, ins: Sequence[float], outs: Sequence[float]) -> Backward:
        if self.ratio <= 0:
            return Backward(shares=True, hands_on=True)
        mask = outs[0] / math.prod(self.outputs[0].shape[2:]) if self.channels else outs[0]
        return Backward(beside=mask, workspace=self.outputs[0].itemsize * mask)

    def run(self, call: Call) -> tuple[torch.Tensor, ...]:
        from partitioner.ops.kernels.gradients import drop

        x = call.tensor(0)
        if self.ratio <= 0:
            return (x,)
        box, shape = call.outs[0], self.outputs[0].shape
        if self.channels:
            box = Box((*box.axes[:2], *((Interval(0, 1),) for _ in shape[2:])))
            shape = (*shape[:2], *(1 for _ in shape[2:]))
        kept, share = draw_kept(box, shape, self.ratio, int(call.tensor(1)), self.layer, x.device)
        return (drop(x, kept, 0.0 if share == 0 else 1 / share),)

    def emit(self, emitter: Emitter, names: Sequence[str | None], boxes: Sequence[Box | None],
             outs: Sequence[Box]) -> tuple[str, ...]:
        return (emitter.op("Identity", [names[0]]),)


def uniform(box: Box, shape: Sequence[int], seed: int, layer: int, device: torch.device) -> torch.Tensor:
    """A number in [0, 1) for every cell of a box, a function of seed, layer and the cell's index in `shape`."""
    axes = [_cells(pieces, device) for pieces in box.axes]
    return (_hashed(axes, shape, seed, layer) >> 40).bitwise_and_(2**24 - 1).to(torch.float32) / 2**24


def draw_kept(box: Box, shape: Sequence[int], ratio: float, seed: int, layer: int,
              device: torch.device) -> tuple[torch.Tensor, float]:
    """Which cells of a box a dropout keeps, and the share that it keeps: 1 - ratio in units of 2^-16.

    A hash of 64 bits decides over four channels, for it takes longer than all else that a dropout does.
    """
    threshold = min(max(round(ratio * 2**16), 0), 2**16)
    share = 1 - threshold / 2**16
    if len(shape) < 2:
        numbers = uniform(box, shape, seed, layer, device)
        return numbers >= threshold / 2**16, share
    order = [0, *range(2, len(shape)), 1]  # the channels' bits side by side
    axes = [_cells(pieces, device) for pieces in box.axes]
    channels = axes[1]
    first, last = (int(channels[0]), int(channels[-1])) if len(channels) else (0, -1)
    axes[1] = torch.arange(first // 4, last // 4 + 1, device=device)
    grouped = [shape[0], -(-shape[1] // 4), *shape[2:]]
    bits = _hashed([axes[a] for a in order], [grouped[a] for a in order], seed, layer).view(torch.int16)
    kept = (bits >= threshold - 2**15) if threshold < 2**16 else torch.zeros_like(bits, dtype=torch.bool)
    kept = kept.permute([0, len(shape) - 1, *range(1, len(shape) - 1)])
    if len(channels) == last - first + 1:
        return kept.narrow(1, first % 4, len(channels)), share
    return kept.index_select(1, channels - first // 4 * 4), share


def _cells(pieces: Sequence[Interval], device: torch.device) -> torch.Tensor:
    return torch.cat([torch.arange(i.start, i.stop, device=device) for i in pieces] or
                     [torch.zeros(0, dtype=torch.int64, device=device)])


def _hashed(axes: Sequence[torch.Tensor], shape: Sequence[int], seed: int, layer: int) -> torch.Tensor:
    """64 bits for every combination of indices along the axes of a tensor of extents `shape`: splitmix64."""
    start = (seed * 0x9E3779B97F4A7C15 + layer * 0xD1B54A32D192ED03) % 2**64
    z = torch.full((1,) * len(shape), _signed(start), dtype=torch.int64, device=axes[0].device if axes else None)
    stride = 1
    for axis in reversed(range(len(shape))):  # from the last axis on, so that the whole is written once
        step = axes[axis] * stride * _signed(0x9E3779B97F4A7C15)
        z = z + step.reshape([-1 if a == axis else 1 for a in range(len(shape))])
        stride *= shape[axis]
    z = z.contiguous()
    for bits, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        z.bitwise_xor_((z >> bits).bitwise_and_((1 << (64 - bits)) - 1))  # a shift that brings in zeros
        if factor != 1:
            z.mul_(_signed(factor))
    return z


def _signed(number: int) -> int:
    """64 bits as torch's int64 has them."""
    return number - 2**64 if number >= 2**63 else number
