"""Which meshes there are for a number of devices."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from partitioner.mesh import AXIS_NAMES, Mesh

FEW = 16
"""Up to this many devices every smaller number of them is looked at too, not divisors alone."""


def counts_of(devices: int) -> list[int]:
    """How many of so many devices a mesh may use, most first: with many, such as divide their number."""
    if devices <= FEW:
        return list(range(devices, 0, -1))
    small = [d for d in range(1, math.isqrt(devices) + 1) if devices % d == 0]
    return sorted({*small, *(devices // d for d in small)}, reverse=True)


def meshes_of(devices: int, extents: Mapping[str, int], fixed: Mapping[str, int]) -> list[Mesh]:
    """All meshes of up to so many devices.

    Args:
        extents: cells of every axis that a mesh can split.
        fixed: ranks along axes that the user has decided.
    """
    names = [name for name in AXIS_NAMES if name in extents]
    limits = {name: fixed.get(name, extents[name]) for name in names}
    found: list[Mesh] = []
    for count in counts_of(devices):
        for shape in _factors(count, [limits[name] for name in names]):
            pairs = [(name, n) for name, n in zip(names, shape, strict=True)]
            if all(n == fixed.get(name, n) for name, n in pairs):
                found.append(Mesh(tuple((name, n) for name, n in pairs if n > 1)))
    return found


def _factors(count: int, limits: list[int]) -> Iterator[tuple[int, ...]]:
    """Ordered factors of a number, each at most its limit; large first ones first, for the first axes lie dense."""
    if not limits:
        if count == 1:
            yield ()
        return
    for first in range(min(count, limits[0]), 0, -1):
        if count % first == 0:
            for rest in _factors(count // first, limits[1:]):
                yield (first, *rest)
