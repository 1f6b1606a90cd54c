"""Activation checkpointing: segments of a program that keep what enters them and run again in the backward pass.

Where segments begin and end, `partitioner.segments` says.  The halos of a segment are exchanged again.  Every rank
runs the same segments in the same order, for the token of the communication steps passes through all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

Tensors = tuple[torch.Tensor, ...]
Run = Callable[[Tensors], Tensors]


def run_segment(run: Run, token: torch.Tensor, tensors: Tensors) -> Tensors:
    """The token and results of `run`, whose own intermediate values are not kept."""
    return tuple(_Segment.apply(run, token, *tensors))  # type: ignore[no-untyped-call]


class _Segment(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Run, *tensors: torch.Tensor) -> Tensors:
        ctx.run = run
        ctx.kinds = {kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
                     for kind in {t.device.type for t in tensors}}
        ctx.save_for_backward(*tensors)
        found = run(tensors)
        ctx.mark_non_differentiable(*[t for t in found if not t.is_floating_point()])
        return found

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
        needed = ctx.needs_input_grad[1:]
        inputs = tuple(t.detach().requires_grad_(need) for t, need in zip(ctx.saved_tensors, needed, strict=True))
        with torch.enable_grad():
            results = _in_autocast(ctx.run, inputs, list(ctx.kinds.items()))
        pairs = [(r, g) for r, g in zip(results, grad_outputs, strict=True) if r.requires_grad and g is not None]
        wanted = [t for t in inputs if t.requires_grad]
        found = iter(torch.autograd.grad([r for r, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True))
        return (None, *(next(found) if need else None for need in needed))


def _in_autocast(run: Run, inputs: Tensors, kinds: Sequence[tuple[str, tuple[bool, torch.dtype]]]) -> Tensors:
    """Run under the automatic precision of the forward pass."""
    if not kinds:
        return run(inputs)
    (kind, (enabled, dtype)), *others = kinds
    with torch.autocast(kind, dtype, enabled, cache_enabled=False):
        return _in_autocast(run, inputs, others)
