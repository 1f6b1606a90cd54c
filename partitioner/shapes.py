"""Extents that a network can take: the nearest ones when those given do not work."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from partitioner.errors import PartitionError, ShapeError
from passes.canonicalize import bind_inputs, infer_and_fold, prepare

FARTHEST = 64
"""How many cells smaller or larger an axis is tried."""

PATIENCE = 5.0
"""Seconds that the search for extents that work may take."""


def spatial_rank(model: ir.Model) -> int:
    """Spatial axes of the volume: of the input with most axes."""
    ranks = [len(v.shape) for v in model.graph.inputs if v.shape is not None]
    return max(0, min(max(ranks, default=2) - 2, 3))


@contextlib.contextmanager
def with_nearest_shapes(source: ir.Model, shapes: Mapping[str, Sequence[int]]) -> Generator[None]:
    """Add the nearest extents that work to an error about extents.

    Raises:
        PartitionError: the error of the block, with a line more where other extents would do.
    """
    try:
        yield
    except ShapeError as error:
        nearest = nearest_shapes(source, shapes)
        if not nearest:
            raise
        raise PartitionError(f"{error}\nnearest extents that work: {' or '.join(nearest)}") from None


def nearest_shapes(source: ir.Model, shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """The nearest smaller and larger extents of the volume that the network takes, as text.

    Each axis is searched on its own, in cubes, since what a network can take is mostly a rule per axis; where
    no cube will do, one axis is changed at a time.  The search ends after a few seconds.
    """
    name = max(shapes, key=lambda n: len(shapes[n]), default=None)
    if name is None or len(shapes[name]) < 3:
        return []
    search = _Search(source, shapes, name, time.monotonic() + PATIENCE)
    found = [extents for direction in (-1, 1) if (extents := search.by_cubes(direction)) is not None]
    chosen = found or search.by_one_axis()
    return list(dict.fromkeys(f"{name}={'x'.join(map(str, extents))}" for extents in chosen))


@dataclass
class _Search:
    """Tries extents of a volume, and of all inputs that have the same spatial extents."""

    source: ir.Model
    shapes: Mapping[str, Sequence[int]]
    name: str
    deadline: float
    cubes: dict[int, bool] = field(default_factory=dict[int, bool])

    @property
    def given(self) -> tuple[int, ...]:
        return tuple(self.shapes[self.name])

    def works(self, spatial: Sequence[int]) -> bool:
        """Whether the network takes these spatial extents; no when the time is over."""
        if min(spatial) < 1 or time.monotonic() > self.deadline:
            return False
        alike = {n: (*s[:2], *spatial) for n, s in self.shapes.items() if tuple(s[2:]) == self.given[2:]}
        return takes(self.source, {**self.shapes, **alike})

    def by_cubes(self, direction: int) -> tuple[int, ...] | None:
        """Per axis the nearest extent of which a cube works."""
        spatial = [self._nearest_cube(n, direction) for n in self.given[2:]]
        known = [n for n in spatial if n is not None]
        return (*self.given[:2], *known) if len(known) == len(spatial) and self.works(known) else None

    def _nearest_cube(self, n: int, direction: int) -> int | None:
        for extent in range(n, n + direction * (FARTHEST + 1), direction):
            if extent not in self.cubes:
                self.cubes[extent] = self.works([extent] * len(self.given[2:]))
            if self.cubes[extent]:
                return extent
        return None

    def by_one_axis(self) -> list[tuple[int, ...]]:
        """The nearest extents that differ along one axis only."""
        for step in range(1, FARTHEST + 1):
            around = [(*self.given[:axis], n + way * step, *self.given[axis + 1 :])
                      for axis, n in enumerate(self.given) if axis > 1 for way in (-1, 1)]
            found = [extents for extents in around if self.works(extents[2:])]
            if found or time.monotonic() > self.deadline:
                return found
        return []


def takes(source: ir.Model, shapes: Mapping[str, Sequence[int]]) -> bool:
    """Whether a network takes these extents."""
    model = source.clone()
    try:
        prepare(model)
        bind_inputs(model, shapes)
        return not infer_and_fold(model)
    except PartitionError:
        return False
