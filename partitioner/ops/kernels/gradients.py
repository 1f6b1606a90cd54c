"""Kernels that are differentiated, where torch's own forward or backward passes are slow or keep too much.

Its convolutions are for where oneDNN's own interface (see `onednn_gradients`) is not there, or has no fast kernel.

Measured with torch 2.13 on one thread, in ms, torch's way and ours:

    convolution, 32 channels of 18x32x32, backward      117     19     torch leaves oneDNN up to N*C*D*H = 20480
    mean and variance, 16 channels of 32x64x64           11.7    2.8

and in seconds on two threads, 64 channels of 176x224x224 (2.1 GiB) to 32:

    gradient of a convolution's weight             over 240    3.7     oneDNN leaves its kernels (see `LARGE`)

A first gradient is all that there is: these have no second one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

_LEAVES_ONEDNN = 20480
"""Torch's threshold for batches of one: at most so many N * C * first two spatial extents."""


def leaves_onednn(data: torch.Tensor, weight: torch.Tensor, groups: int) -> bool:
    """Whether torch computes this convolution of a volume without oneDNN (see ConvParams::use_mkldnn)."""
    wide = weight.shape[-1] > 3 and weight.shape[-2] > 3
    size = data.shape[0] * data.shape[1] * data.shape[2] * data.shape[3]
    return groups == 1 and not wide and data.shape[0] == 1 and size <= _LEAVES_ONEDNN and data.numel() > 0


def convolution(data: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: Sequence[int],
                padding: Sequence[int], dilation: Sequence[int]) -> torch.Tensor:
    """A convolution of one group on the CPU by oneDNN, forward and backward."""
    result = _Convolution.apply(data, weight, bias, list(stride), list(padding), list(dilation))  # type: ignore[no-untyped-call]
    assert isinstance(result, torch.Tensor)
    return result


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, data: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: list[int],
                padding: list[int], dilation: list[int]) -> torch.Tensor:
        ctx.save_for_backward(data, weight)
        ctx.geometry = stride, padding, dilation
        found: torch.Tensor = torch.ops.mkldnn._convolution_pointwise(
            data, weight, bias, padding, stride, dilation, 1, "none", [], "")
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        data, weight = ctx.saved_tensors
        grad = grad_outputs[0].contiguous(memory_format=_channels_last(data))
        stride, padding, dilation = ctx.geometry
        by_data = by_weight = by_bias = None
        if ctx.needs_input_grad[0]:
            rest = [n + 2 * p - d * (k - 1) - 1 - (m - 1) * s for n, m, p, d, k, s in zip(
                data.shape[2:], grad.shape[2:], padding, dilation, weight.shape[2:], stride, strict=True)]
            by_data = torch.ops.mkldnn._convolution_transpose_pointwise(
                grad, weight, None, padding, rest, stride, dilation, 1, "none", [], "")
        if ctx.needs_input_grad[1]:
            # in oneDNN's own layout torch does not leave it, whatever the extents
            _, by_weight, _ = torch.ops.aten.convolution_backward(
                grad.to_mkldnn(), data.to_mkldnn(), weight, [weight.shape[0]], stride, padding, dilation, False,
                [0] * len(stride), 1, [False, True, False])
            by_weight = by_weight.to_dense() if by_weight.is_mkldnn else by_weight
        if ctx.needs_input_grad[2]:
            by_bias = grad.sum([a for a in range(grad.dim()) if a != 1])
        return by_data, by_weight, by_bias, None, None, None


LARGE = 2**31
"""Bytes from which oneDNN has no fast kernel for the gradient of a convolution's weight: what all cells of input or
result, whichever are more, would take with the channels of either, whichever are more.

Found by trying: 64 channels to 32 or back, of 160x224x224 cells as fast as ever, of 176x224x224 a hundred times slower.
"""

BLOCK = 2**28
"""Bytes of a block of such a gradient, counted in the same way."""


@dataclass(frozen=True)
class Windows:
    """How the windows of a convolution lie, per spatial axis, and whether it is a transposed one."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int
    transposed: bool


def is_large(data: torch.Tensor, weight: torch.Tensor, windows: Windows) -> bool:
    """Whether oneDNN has no fast kernel for the gradient of the weight."""
    reach = [d * (k - 1) + 1 for d, k in zip(windows.dilation, weight.shape[2:], strict=True)]
    axes = list(zip(data.shape[2:], windows.stride, windows.padding, reach, strict=True))
    if windows.transposed:
        channels, extents = weight.shape[1] * windows.groups, [(n - 1) * s - 2 * p + r for n, s, p, r in axes]
    else:
        channels, extents = weight.shape[0], [(n + 2 * p - r) // s + 1 for n, s, p, r in axes]
    return _size(data.shape, (data.shape[0], channels, *extents)) * data.element_size() >= LARGE


def _size(one: Sequence[int], other: Sequence[int]) -> int:
    """Numbers that the larger of two tensors would have with the channels of either."""
    return one[0] * max(one[1], other[1]) * max(math.prod(one[2:]), math.prod(other[2:]))


def large_convolution(data: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
                      windows: Windows) -> torch.Tensor:
    """A convolution, transposed or not, whose weight's gradient is summed up block by block."""
    result = _LargeConvolution.apply(data, weight, bias, windows)  # type: ignore[no-untyped-call]
    assert isinstance(result, torch.Tensor)
    return result


class _LargeConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, data: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
                windows: Windows) -> torch.Tensor:
        ctx.save_for_backward(data, weight)
        ctx.windows = windows
        return torch.convolution(data, weight, bias, windows.stride, windows.padding, windows.dilation,
                                 windows.transposed, [0] * len(windows.stride), windows.groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        data, weight = ctx.saved_tensors
        grad = grad_outputs[0].contiguous(memory_format=_channels_last(data))
        by_data = by_weight = by_bias = None
        if ctx.needs_input_grad[0]:
            by_data = _backward(grad, data, weight, ctx.windows, 0)
        if ctx.needs_input_grad[1]:
            by_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
            for some_grad, some_data, windows in _blocks(grad, data, weight, ctx.windows):
                by_weight += _backward(some_grad, some_data, weight, windows, 1)
            by_weight = by_weight.to(weight.dtype)
        if ctx.needs_input_grad[2]:
            by_bias = grad.sum([a for a in range(grad.dim()) if a != 1])
        return by_data, by_weight, by_bias, None


def _backward(grad: torch.Tensor, data: torch.Tensor, weight: torch.Tensor, windows: Windows,
              index: int) -> torch.Tensor:
    """The gradient by the data (0) or by the weight (1)."""
    found: torch.Tensor = torch.ops.aten.convolution_backward(
        grad, data, weight, None, windows.stride, windows.padding, windows.dilation, windows.transposed,
        [0] * len(windows.stride), windows.groups, [index == i for i in range(3)])[index]
    return found


def _blocks(grad: torch.Tensor, data: torch.Tensor, weight: torch.Tensor,
            windows: Windows) -> Iterator[tuple[torch.Tensor, torch.Tensor, Windows]]:
    """Parts of the gradient and of the data that belong together, along the longest axis of every sample.

        few    ...|a  ...  b|...       one cell is a window of the other tensor:
        many   ..|lo  ...  hi|..       lo = a * stride - padding, hi = (b - 1) * stride - padding + reach
    """
    few, many = (data, grad) if windows.transposed else (grad, data)
    axis = max(range(2, few.dim()), key=lambda a: few.shape[a])
    place = axis - 2
    stride, padding = windows.stride[place], windows.padding[place]
    reach = windows.dilation[place] * (weight.shape[axis] - 1) + 1
    inner = Windows(windows.stride, [0 if i == place else p for i, p in enumerate(windows.padding)], windows.dilation,
                    windows.groups, windows.transposed)
    of_sample = _size(few[:1].shape, many[:1].shape) * data.element_size()
    step = max(1, few.shape[axis] * BLOCK // max(1, of_sample))
    for sample in range(few.shape[0]):
        for a in range(0, few.shape[axis], step):
            b = min(a + step, few.shape[axis])
            lo, hi = a * stride - padding, (b - 1) * stride - padding + reach
            some_few, some_many = few[sample : sample + 1].narrow(axis, a, b - a), _cells(many[sample : sample + 1],
                                                                                          axis, lo, hi)
            yield (some_many, some_few, inner) if windows.transposed else (some_few, some_many, inner)


def _cells(data: torch.Tensor, axis: int, lo: int, hi: int) -> torch.Tensor:
    """Cells lo to hi along an axis, with zeros beyond its ends."""
    n = data.shape[axis]
    inside = data.narrow(axis, min(max(lo, 0), n), max(0, min(hi, n) - min(max(lo, 0), n)))
    before, after = min(max(-lo, 0), hi - lo), max(0, hi - max(n, lo))
    if not before and not after:
        return inside
    pads = [0, 0] * (data.dim() - 1 - axis) + [before, after]
    return functional.pad(inside, pads)


def channel_moments(data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and M2 of every channel over all other axes, which are kept with extent 1."""
    mean, m2 = _ChannelMoments.apply(data)  # type: ignore[no-untyped-call]
    return mean, m2


class _ChannelMoments(torch.autograd.Function):
    """d mean / dx = 1 / n,   d M2 / dx = 2 (x - mean)"""

    @staticmethod
    def forward(ctx: Any, data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        axes = [a for a in range(data.dim()) if a != 1]
        mean = data.mean(axes, keepdim=True)  # torch adds up in a tree; its own statistics of a batch do not
        deviation = data - mean
        mean = mean + deviation.mean(axes, keepdim=True)
        ctx.save_for_backward(data, mean)
        return mean, deviation.square_().sum(axes, keepdim=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        by_mean, by_m2 = grad_outputs
        data, mean = ctx.saved_tensors
        factor = 2 * by_m2
        return torch.addcmul(by_mean / (data.numel() // data.shape[1]) - factor * mean, data, factor)


def channel_affine(data: torch.Tensor, factor: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """data * factor + offset with one number per channel."""
    result = _ChannelAffine.apply(data, factor, offset)  # type: ignore[no-untyped-call]
    assert isinstance(result, torch.Tensor)
    return result


class _ChannelAffine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, data: torch.Tensor, factor: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(data, factor)
        return torch.addcmul(offset, data, factor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,) = grad_outputs
        data, factor = ctx.saved_tensors
        axes = [a for a in range(data.dim()) if a != 1]
        by_data = grad * factor if ctx.needs_input_grad[0] else None
        return by_data, (grad * data).sum(axes, keepdim=True), grad.sum(axes, keepdim=True)


def drop(data: torch.Tensor, kept: torch.Tensor, scale: float) -> torch.Tensor:
    """The kept cells times a number, zeros elsewhere; what is remembered is a byte per cell."""
    result = _Drop.apply(data, kept, scale)  # type: ignore[no-untyped-call]
    assert isinstance(result, torch.Tensor)
    return result


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, data: torch.Tensor, kept: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.save_for_backward(kept)
        ctx.scale = scale
        return (data * kept).mul_(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (kept,) = ctx.saved_tensors
        return (grad_outputs[0] * kept).mul_(ctx.scale), None, None


def _channels_last(data: torch.Tensor) -> torch.memory_format:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return formats.get(data.dim(), torch.contiguous_format)
