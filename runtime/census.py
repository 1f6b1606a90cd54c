"""Voxels of the inputs that are no numbers: counted while they are read, left as they are."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable

import torch

PIECE = 1 << 22
"""Cells looked at together, once it is known that some are no numbers."""


def not_finite(tensor: torch.Tensor) -> int:
    """How many cells are NaN or infinite.

    One pass and no memory where all are finite: then so is their sum, but for an overflow, which costs a second pass.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return 0
    total = tensor.sum(dtype=torch.float64 if tensor.dtype == torch.float64 else torch.float32)
    if math.isfinite(total.item()):
        return 0
    axis = max(range(tensor.dim()), key=tensor.size)
    rows = max(1, PIECE * tensor.size(axis) // tensor.numel())
    return sum(int((~piece.isfinite()).sum()) for piece in tensor.split(rows, axis))


def count_once(parts: Iterable[tuple[Hashable, torch.Tensor]]) -> int:
    """Cells that are no numbers in parts of one array; parts at the same place, as of several ranks, count once."""
    return sum(not_finite(tensor) for tensor in dict(parts).values())
