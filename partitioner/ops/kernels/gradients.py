"""Kernels that are differentiated, where torch's own forward or backward passes are slow or keep too much.

Measured with torch 2.13 on one thread, in ms, torch's way and ours:

    convolution, 32 channels of 18x32x32, backward      117     19     torch leaves oneDNN up to N*C*D*H = 20480
    mean and variance, 16 channels of 32x64x64           11.7    2.8

A first gradient is all that there is: these have no second one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

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
