"""Results that do not depend on the number of CPU threads, so that every way to run gives the same bits."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
else:
    from partitioner.lazy import torch

@contextmanager
def one_thread(like: torch.Tensor, needed: bool = True) -> Generator[None]:
    """Run a block on one thread.

    MKL's matrix products, and torch's reductions to a single cell, add up in an order that depends on the
    number of threads.
    """
    count = torch.get_num_threads()
    if not needed or like.device.type != "cpu" or count == 1 or torch.is_grad_enabled():
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)

