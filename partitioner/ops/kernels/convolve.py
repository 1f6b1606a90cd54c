"""The local convolution kernels: oneDNN directly on the CPU, torch.nn.functional elsewhere.

On the CPU torch leaves oneDNN for small slabs (N*C*D*H up to about 20480) and becomes up to 20 times
slower, with bits that depend on the number of threads; the direct operator does neither.  Of one channel it makes a
result with channels last only when it is given weights in its own order: 2 to 4 times as fast, in all.  It has no
gradient; what `onednn_gradients` does not take is trained by `gradients`, or else torch's own.

Half precision, autocast's too, is widened on the CPU: with AMX, oneDNN of torch 2.13 returns wrong numbers for some of
its convolutions (a stride along a last axis that leaves one output) and crashes in others.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from partitioner.ops.kernels.threads import one_thread

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as functional
else:
    from partitioner.lazy import functional, torch


@dataclass(frozen=True)
class Geometry:
    """Per spatial axis stride, padding on both sides (cropping, when transposed) and dilation."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int


def convolve(data: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, geometry: Geometry,
             transposed: bool = False) -> torch.Tensor:
    """Convolution or transposed convolution of a local tensor.

    Args:
        data: (batch, channels, 1 to 3 spatial axes).
        weight: (out, in / groups, ...), or (in, out / groups, ...) when transposed.
    """
    if data.dim() == 3:
        flat = Geometry((1, *geometry.stride), (0, *geometry.padding), (1, *geometry.dilation), geometry.groups)
        return convolve(data.unsqueeze(2), weight.unsqueeze(2), bias, flat, transposed).squeeze(2)
    if data.device.type == "cpu" and torch.is_autocast_enabled("cpu") and data.dtype != torch.float64:
        dtype = torch.get_autocast_dtype("cpu")
        narrow_bias = None if bias is None else bias.to(dtype)
        with torch.autocast("cpu", enabled=False):
            return convolve(data.to(dtype), weight.to(dtype), narrow_bias, geometry, transposed)
    if data.device.type == "cpu" and data.dtype in (torch.bfloat16, torch.float16):
        wide_bias = None if bias is None else bias.float()
        return convolve(data.float(), weight.float(), wide_bias, geometry, transposed).to(data.dtype)
    if data.device.type == "cpu" and not transposed and _is_misread(data, weight, geometry):
        data, weight = (t.clone(memory_format=torch.contiguous_format) for t in (data, weight))
    if _suits_onednn(data):
        return _onednn(data, weight, bias, geometry, transposed)
    if data.device.type == "cpu" and torch.is_grad_enabled():
        from partitioner.ops.kernels import gradients

        windows = gradients.Windows(geometry.stride, geometry.padding, geometry.dilation, geometry.groups, transposed)
        if gradients.is_large(data, weight, windows):
            return gradients.large_convolution(data, weight, bias, windows)
        if (not transposed and _suits_onednn(data, training=True)
                and gradients.leaves_onednn(data, weight, geometry.groups)):
            return gradients.convolution(data, weight, bias, geometry.stride, geometry.padding, geometry.dilation)
    if transposed:
        kernel = functional.conv_transpose2d if data.dim() == 4 else functional.conv_transpose3d
    else:
        kernel = functional.conv2d if data.dim() == 4 else functional.conv3d
    with one_thread(data):
        return kernel(data, weight, bias, stride=geometry.stride, padding=geometry.padding,
                      dilation=geometry.dilation, groups=geometry.groups)


def _is_misread(data: torch.Tensor, weight: torch.Tensor, geometry: Geometry) -> bool:
    """Whether oneDNN, called by us or by torch, may read beyond a channels-last tensor: then store it channels first.

    Found by trying some 10^5 geometries with torch 2.13: with a stride along the last axis, it returns wrong
    numbers where one output is left there and a filter reads one channel, and crashes where one input is.
    """
    n, kernel = data.shape[-1], weight.shape[-1]
    stride, padding, dilation = geometry.stride[-1], geometry.padding[-1], geometry.dilation[-1]
    outputs = (n + 2 * padding - (kernel - 1) * dilation - 1) // stride + 1
    return stride > 1 and (n == 1 or (outputs == 1 and weight.shape[1] == 1))


def _suits_onednn(data: torch.Tensor, training: bool = False) -> bool:
    return (data.device.type == "cpu" and data.dtype == torch.float32 and torch.is_grad_enabled() == training
            and torch.backends.mkldnn.is_available() and _has_operators())


@functools.cache
def _has_operators() -> bool:
    """Whether torch has its inner operators under the names that it has had so far."""
    names = ("_convolution_pointwise", "_convolution_transpose_pointwise", "_reorder_convolution_weight")
    return all(hasattr(torch.ops.mkldnn, name) for name in names)


def _onednn(data: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, geometry: Geometry,
            transposed: bool) -> torch.Tensor:
    stride, padding, dilation = list(geometry.stride), list(geometry.padding), list(geometry.dilation)
    if transposed:
        return torch.ops.mkldnn._convolution_transpose_pointwise(
            data, weight, bias, padding, [0] * len(padding), stride, dilation, geometry.groups, "none", [], "")
    if data.shape[1] == 1 and stride[-1] == 1 and data.numel():  # torch takes one channel for channels first
        weight = torch.ops.mkldnn._reorder_convolution_weight(weight, padding, stride, dilation, geometry.groups, None)
    return torch.ops.mkldnn._convolution_pointwise(
        data, weight, bias, padding, stride, dilation, geometry.groups, "none", [], "")
