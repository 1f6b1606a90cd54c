"""Axes that a network merges, as the several axes that they stand for.

    x (2, 3, 4, 8)  ->  Reshape (24, 8)        of the first axis the factors are 2, 3 and 4
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from partitioner.ops.standard.reshape import Group, find_groups

NO_NAMES = frozenset[str]()


@dataclass(frozen=True)
class Factor:
    """A part of an axis, and the mesh axes that may split it."""

    extent: int
    names: frozenset[str] = NO_NAMES


Axis = tuple[Factor, ...]
"""What an axis stands for, the slowest first; one factor where it is an axis like any other."""
Factors = tuple[Axis, ...]
"""The axes of a tensor."""


def plain(shape: Sequence[int]) -> Factors:
    """Axes that stand for themselves, and that nothing splits."""
    return tuple((Factor(n),) for n in shape)


def is_plain(axes: Factors) -> bool:
    """Whether every axis stands for itself."""
    return all(len(axis) == 1 for axis in axes)


def extents(axes: Sequence[Axis]) -> tuple[int, ...]:
    """Extents of the tensor with its factors apart."""
    return tuple(factor.extent for axis in axes for factor in axis)


def place(axes: Factors, axis: int) -> int:
    """Where an axis begins among the factors."""
    return sum(len(a) for a in axes[:axis])


def as_one(axes: Sequence[Axis]) -> Factors:
    """Axes that are one again; what splits the first part may split them."""
    return tuple((Factor(math.prod(extents([axis])), axis[0].names),) for axis in axes)


def reshaped(axes: Factors, target: tuple[int, ...], may_start: bool) -> tuple[Factors, bool] | None:
    """The axes after a reshape, and whether it begins to keep some apart; None where factors would be mixed.

    Args:
        may_start: whether axes that a reshape merges are kept apart where the mesh may split one behind another.
    """
    flat = [factor for axis in axes for factor in axis]
    merged = [len(axis) > 1 for axis in axes for _ in axis]
    found: list[Axis] = [(Factor(n),) for n in target]
    started = False
    for group in find_groups(tuple(f.extent for f in flat), target):
        starts = may_start and _splits_behind(group, flat)
        if not starts and not any(merged[i] for i in group.ins):
            if group.source is not None and group.target is not None:
                found[group.target] = (Factor(target[group.target], flat[group.source].names),)
            continue
        parts = _divided([flat[i] for i in group.ins], [target[o] for o in group.outs])
        if parts is None:
            return None
        for out, part in zip(group.outs, parts, strict=True):
            found[out] = part
        started = started or starts
    return tuple(found), started


def _splits_behind(group: Group, flat: Sequence[Factor]) -> bool:
    """Whether the mesh may split an axis that stands behind another one of its group."""
    large = [flat[i] for i in group.ins if flat[i].extent > 1]
    return any(factor.names for factor in large[1:])


def _divided(ins: Sequence[Factor], outs: Sequence[int]) -> list[Axis] | None:
    """The factors of every output of a group; an input is cut in two where an output ends inside it."""
    rest = [factor for factor in ins if factor.extent != 1]
    found: list[Axis] = []
    for extent in outs:
        left, axis = extent, list[Factor]()
        while left > 1:
            first, *rest = rest
            if left % first.extent == 0:
                axis.append(first)
                left //= first.extent
            elif first.extent % left == 0:
                axis.append(Factor(left, first.names))
                rest = [Factor(first.extent // left), *rest]
                left = 1
            else:
                return None
        found.append(tuple(axis) or (Factor(1),))
    return found


def joined(shape: Sequence[int], given: Sequence[Factors]) -> Factors | None:
    """The axes of a result of this shape over which tensors broadcast; None where they stand for different axes."""
    found: list[Axis] = []
    for axis, n in enumerate(shape):
        parts = [a[axis - len(shape) + len(a)] for a in given if axis - len(shape) + len(a) >= 0]
        parts = [p for p in parts if extents([p]) != (1,)] or parts[:1]
        apart = [p for p in parts if len(p) > 1] or parts
        if any(extents([p]) != extents([apart[0]]) for p in apart):
            return None
        chosen = apart[0] if apart else (Factor(n),)
        names = [[p[i].names for p in apart] for i in range(len(chosen))]
        found.append(tuple(Factor(f.extent, NO_NAMES.union(*more)) for f, more in zip(chosen, names, strict=True)))
    return tuple(found)


def fitted(shape: Sequence[int], out: Factors) -> tuple[int, ...]:
    """Extents of an input of `shape`, apart as those of the result over which it broadcasts."""
    found: list[int] = []
    for n, axis in zip(shape, out[len(out) - len(shape):], strict=True):
        found += [1] * len(axis) if n == 1 else [factor.extent for factor in axis]
    return tuple(found)
