"""Where checkpointed training cuts a plan into segments: runs of nodes that keep what enters them and run again.

    forward     segment 1 | segment 2 | segment 3          kept: what crosses the bars
    backward    3 again, its gradients | 2 again, its gradients | 1 ...
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import onnx_ir as ir

from partitioner import dialect
from partitioner.lifetime import Lifetimes, find_lifetimes

Segments = tuple[tuple[int, int], ...]
"""Runs of nodes [start, stop), in order, without gaps."""


@dataclass(frozen=True)
class StepBytes:
    """A value of a program: its size in bytes, the step that makes it and the last one that reads it."""

    nbytes: int
    born: int
    dies: int


def find_segments(plan: ir.Model, lifetimes: Lifetimes | None = None) -> Segments:
    """The segments of a plan's nodes: the same on every rank, for they follow from whole tensors."""
    found, whole = lifetimes or find_lifetimes(plan, in_place=False), dict[str, int]()
    for value in (*plan.graph.inputs, *(v for node in plan.graph for v in node.outputs)):
        name = found.buffer_of.get(str(value.name))
        if name is not None and value.dtype is not None:
            nbytes = math.ceil(math.prod(dialect.shape_of(value)) * value.dtype.itemsize)
            whole[name] = max(whole.get(name, 0), nbytes)
    values = [StepBytes(0 if b.base is not None else whole[b.name], max(0, b.born), b.dies)
              for b in found.buffers.values() if b.name in whole]
    return choose_segments(values, sum(1 for _ in plan.graph))


def choose_segments(values: Sequence[StepBytes], steps: int) -> Segments:
    """Where to cut `steps` steps into segments, so that the peak is least.

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
