"""The Gaussian error linear unit, where x is infinite too."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as functional
else:
    from partitioner.lazy import functional, torch

_LARGE = 1e4
"""From here on the unit of x is x, to the last bit."""


def gelu(x: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    """Infinite where x is, as in onnxruntime (and NaN at minus infinity).

    On CPU torch computes several cells of float32 or bfloat16 at once and then has NaN for infinity, and infinity for
    the largest numbers; a single cell, float64 and other devices are right.
    """
    result = functional.gelu(x, approximate=approximate)
    if approximate != "none" or x.device.type != "cpu" or not x.numel() or float(x.detach().amax()) <= _LARGE:
        return result
    return torch.where(x > _LARGE, x, result)
