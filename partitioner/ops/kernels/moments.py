"""Mean and spread of a tensor in parts: count, mean and M2 merge without cancellation.

M2 is the sum of squared deviations from the mean; for two parts a and b (Chan, Golub, LeVeque 1979)

    n = na + nb,  d = mean_b - mean_a,  mean = mean_a + d * nb / n,  M2 = M2_a + M2_b + d^2 * na * nb / n
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from partitioner.ops.kernels.rows import as_slices, folded, rows_of, steady, suit, sums
from partitioner.ops.kernels.threads import one_thread

if TYPE_CHECKING:
    import torch
else:
    from partitioner.lazy import torch

Moments = tuple["torch.Tensor", "torch.Tensor", "torch.Tensor"]
"""Count (int64, no axes), mean and M2 (reduced axes kept with extent 1)."""


def moments(x: torch.Tensor, axes: Sequence[int]) -> Moments:
    """Count, mean and M2 of `x` over `axes`.

    Slices along the first axis are reduced first and merged in order, so that the bits do not depend on
    the number of threads.
    """
    if torch.is_grad_enabled() and x.requires_grad and _is_per_channel(x, axes):
        from partitioner.ops.kernels.gradients import channel_moments

        count = torch.tensor(_cells(x, axes), dtype=torch.int64, device=x.device)
        return (count, *channel_moments(x))
    with one_thread(x, needed=x.numel() == _cells(x, axes)):
        return _moments(x, axes)


def _is_per_channel(x: torch.Tensor, axes: Sequence[int]) -> bool:
    """Whether there is one result per channel."""
    kept = [n for a, n in enumerate(x.shape) if a not in axes and a != 1]
    return x.dim() > 2 and 1 not in axes and all(n == 1 for n in kept) and x.numel() > 0


def _moments(x: torch.Tensor, axes: Sequence[int]) -> Moments:
    first, *others = axes
    count = torch.tensor(_cells(x, axes), dtype=torch.int64, device=x.device)
    if x.shape[first] == 0 or _cells(x, axes) == 0:
        shape = [1 if a in axes else n for a, n in enumerate(x.shape)]
        zeros = torch.zeros(shape, dtype=x.dtype, device=x.device)
        return count, zeros, zeros.clone()
    if not others:
        return (count, *_centred(x, (first,)))
    per_slice = _cells(x, others)
    if suit(x, axes):
        means, squares = _of_slices(x)
    else:
        variance, means = torch.var_mean(x, tuple(others), correction=0, keepdim=True)
        squares = variance * per_slice
    mean = means.mean(first, keepdim=True)
    between = (means - mean).square().sum(first, keepdim=True)
    return count, mean, squares.sum(first, keepdim=True) + between * per_slice


_BLOCK = 1 << 19
"""Cells whose deviations are squared at once: they stay in the cache."""


def _of_slices(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and M2 of every case, channel and slice along the first spatial axis: torch's variance is slow there."""
    rows, side = rows_of(x)
    cases, slices, count, length = rows.shape
    means = sums(rows, side) / (count * side)
    centres, squares = means.repeat(1, 1, 1, side), torch.empty((cases, slices, 1, length), dtype=x.dtype)
    step = max(1, _BLOCK // (count * length))
    room = torch.empty((min(step, slices), count, length), dtype=x.dtype)
    with steady(rows):
        for case in range(cases):
            parts = (t[case].split(step) for t in (rows, centres, squares))
            for part, centre, found in zip(*parts, strict=True):
                deviation = torch.ops.aten.mse_loss.out(part, centre, 0, out=room[: len(part)])  # squared, one by one
                torch.sum(deviation, 1, keepdim=True, out=found)
    return as_slices(means, x), as_slices(folded(squares, side), x)


def _centred(x: torch.Tensor, axes: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    mean = x.mean(axes, keepdim=True)
    deviation = x - mean
    rest = deviation.mean(axes, keepdim=True)
    return mean + rest, (deviation - rest).square().sum(axes, keepdim=True)


def merge_moments(parts: Sequence[Moments]) -> Moments:
    """The moments of all parts together, merged in the order given."""
    count, mean, m2 = parts[0]
    for other, other_mean, other_m2 in parts[1:]:
        total = count + other
        share = (other.to(mean.dtype) / total.clamp(min=1).to(mean.dtype))
        delta = other_mean - mean
        m2 = m2 + other_m2 + delta.square() * (count.to(mean.dtype) * share)
        mean = mean + delta * share
        count = total
    return count, mean, m2


def group_moments(parts: Moments, groups: int) -> Moments:
    """The moments of groups of adjacent channels from those of the channels, repeated for every channel."""
    count, mean, m2 = parts
    with one_thread(mean):
        means, m2s = (t.unflatten(1, (groups, -1)) for t in (mean, m2))
        centre = means.mean(2, keepdim=True)
        spread = m2s.sum(2, keepdim=True) + (means - centre).square().sum(2, keepdim=True) * count
    centre, spread = (t.expand_as(means).flatten(1, 2) for t in (centre, spread))
    return count * means.shape[2], centre, spread


def scale_and_shift(scale: torch.Tensor, bias: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor,
                    epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors a, b with (x - mean) / sqrt(variance + epsilon) * scale + bias = x * a + b."""
    factor = scale * torch.rsqrt(variance + epsilon)
    return factor, bias - mean * factor


def affine(x: torch.Tensor, factor: torch.Tensor, offset: torch.Tensor,
           into: torch.Tensor | None = None) -> torch.Tensor:
    """x * factor + offset in one pass, into given memory if there is some; in the factor's type if it is wider."""
    if torch.is_grad_enabled() and into is None and x.device.type == "cpu" and x.dtype == factor.dtype and x.numel() \
            and factor.shape == offset.shape == tuple(n if a == 1 else 1 for a, n in enumerate(x.shape)):
        from partitioner.ops.kernels.gradients import channel_affine

        return channel_affine(x, factor, offset)
    if x.dtype != factor.dtype:
        result = torch.addcmul(offset, x.to(factor.dtype), factor).to(x.dtype)
        return result if into is None else into.copy_(result)
    return torch.addcmul(offset, x, factor) if into is None else torch.addcmul(offset, x, factor, out=into)


def _cells(x: torch.Tensor, axes: Sequence[int]) -> int:
    cells = 1
    for axis in axes:
        cells *= x.shape[axis]
    return cells
