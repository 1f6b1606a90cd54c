"""Sums over images and volumes whose channels lie innermost, as rows of several cells: kernels are slow on short ones.

    x (case, channel, slice, ...)  in memory  case, slice, cell, channel  ->  rows (case, slice, row, side * channel)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from partitioner.ops.kernels.threads import one_thread

if TYPE_CHECKING:
    import torch
else:
    from partitioner.lazy import torch

_ROW = 256
"""Values of a row at most, where it holds more than one cell."""

_VECTOR = 16
"""Rows of a multiple of so many values are added up in the same order by any number of threads (tried, torch 2.13)."""


def suit(x: torch.Tensor, axes: Sequence[int]) -> bool:
    """Whether all spatial axes are added up, and slices along the first are dense matrices of cells by channels."""
    return (x.device.type == "cpu" and x.dim() in (4, 5) and tuple(axes) == tuple(range(2, x.dim()))
            and x.is_floating_point() and x.numel() > 0
            and x[:1, :, :1].movedim(1, -1).is_contiguous() and not torch.is_grad_enabled())


def rows_of(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The rows of all slices, a view, and how many cells are in a row."""
    cases, channels, slices = x.shape[:3]
    cells, side = math.prod(x.shape[3:]), 1
    while 2 * side * channels <= _ROW and cells % (2 * side) == 0:
        side *= 2
    return x.movedim(1, -1).view(cases, slices, cells // side, side * channels), side


def sums(rows: torch.Tensor, side: int) -> torch.Tensor:
    """Sums per slice and channel, (case, slice, 1, channel)."""
    with steady(rows):
        return folded(rows.sum(2, keepdim=True), side)


def steady(rows: torch.Tensor) -> AbstractContextManager[None]:
    """A block in which rows are added up in an order that does not depend on the number of threads."""
    return one_thread(rows, needed=rows.shape[3] % _VECTOR > 0)


def folded(found: torch.Tensor, side: int) -> torch.Tensor:
    """Sums per place in a row to sums per channel."""
    return found.unflatten(3, (side, -1)).sum(3) if side > 1 else found


def as_slices(found: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Figures per slice and channel with the axes of `x`, extent 1 along all but the first spatial one."""
    cases, channels, slices = x.shape[:3]
    return found.reshape(cases, slices, channels, *(1,) * (x.dim() - 3)).transpose(1, 2)
