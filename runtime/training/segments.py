"""Activation checkpointing: segments of a program that keep what enters them and run again in the backward pass.

    forward     segment 1 | segment 2 | segment 3          kept: what crosses the bars
    backward    3 again, its gradients | 2 again, its gradients | 1 ...

The halos of a segment are exchanged again.  Every rank runs the same segments in the same order, for the token
of the communication steps passes through all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

Tensors = tuple[torch.Tensor, ...]
Run = Callable[[Tensors], Tensors]


@dataclass(frozen=True)
class StepBytes:
    """A value of a program: its size in bytes, the step that makes it and the last one that reads it."""

    nbytes: int
    born: int
    dies: int


def choose_segments(values: Sequence[StepBytes], steps: int) -> tuple[tuple[int, int], ...]:
    """Where to cut `steps` steps into segments [start, stop), so that the peak is least.

    peak = what crosses the cuts + all that the largest segment makes.  For several bounds on the latter the cheapest
    cuts are a shortest path over the steps; the bound with the least peak wins.
    """
    made = [0] * steps
    for value in values:
        made[value.born] += value.nbytes
    total = sum(made)
    best: tuple[float, tuple[int, ...]] = (total, (0, steps))
    for part in range(2, 17):
        found = _cheapest_cuts(values, made, total / part)
        best = min(best, found) if found is not None else best
    return tuple(pairwise(best[1]))


def _cheapest_cuts(values: Sequence[StepBytes], made: Sequence[int],
                   bound: float) -> tuple[float, tuple[int, ...]] | None:
    """Cuts whose segments make at most `bound` bytes each and cross the least; a single step may make more."""
    steps = len(made)
    born: list[list[StepBytes]] = [[] for _ in made]
    for value in values:
        born[value.born].append(value)
    cost: list[float] = [0.0, *[float("inf")] * steps]
    before, largest = [0] * (steps + 1), [0.0] * (steps + 1)
    for stop in range(1, steps + 1):
        inside = crossing = 0
        for start in reversed(range(stop)):
            inside += made[start]
            if inside > bound and start < stop - 1:
                break
            crossing += sum(v.nbytes for v in born[start] if v.dies >= stop)
            if cost[start] + crossing < cost[stop]:
                cost[stop], before[stop], largest[stop] = cost[start] + crossing, start, float(inside)
    cuts, peak = [steps], 0.0
    while cuts[-1] > 0:
        peak = max(peak, largest[cuts[-1]])
        cuts.append(before[cuts[-1]])
    return cost[steps] + peak, tuple(reversed(cuts))


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
