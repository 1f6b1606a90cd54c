"""Powers whose bits do not depend on how many threads share the cells."""

from __future__ import annotations

from typing import TYPE_CHECKING

from partitioner.ops.kernels.threads import one_thread

if TYPE_CHECKING:
    import torch


def power(x: torch.Tensor, exponent: float) -> torch.Tensor:
    """x ^ exponent for x >= 0.

    torch's pow rounds differently in vectors and in the cells left over, and every thread has its own cells
    left over; roots, products and quotients are rounded alike everywhere.
    """
    if exponent in _EXACT:
        return _EXACT[exponent](x)
    with one_thread(x):
        return x.pow(exponent)


def _identity(x: torch.Tensor) -> torch.Tensor:
    return x


def _square(x: torch.Tensor) -> torch.Tensor:
    return x.square()


def _root(x: torch.Tensor) -> torch.Tensor:
    return x.sqrt()


def _three_quarters_below(x: torch.Tensor) -> torch.Tensor:
    root = x.sqrt()
    return (root * root.sqrt()).reciprocal()


_EXACT = {1.0: _identity, 2.0: _square, 0.5: _root, -0.75: _three_quarters_below}
"""Exponents of norms 1 and 2, and of LRN's usual beta."""
