"""The device mesh: named axes, and the correspondence of ranks and coordinates."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from partitioner.errors import PartitionError

AXIS_NAMES = ("batch", "depth", "height", "width")
SPATIAL_NAMES = AXIS_NAMES[1:]
LARGEST = 1 << 20
"""Ranks that a mesh may have; figures per rank are kept for all of them."""


@dataclass(frozen=True)
class Mesh:
    """A grid of ranks, row-major in the order batch, depth, height, width.

    Args:
        axes: pairs (name, number of ranks), each number at least 1.

    >>> Mesh.parse("depth=2,height=3").size
    6
    """

    axes: tuple[tuple[str, int], ...]

    @classmethod
    def parse(cls, given: str | Mapping[str, int] | Mesh | None, spatial_rank: int = 3) -> Mesh:
        """A mesh from `depth=2,height=2`, from a dict, or from `2x2x1` (the spatial axes in order).

        Args:
            given: the user's text, dict or mesh; None is a single rank.
            spatial_rank: how many spatial axes the volume has (names the axes of the short form).

        Raises:
            PartitionError: for an unknown axis, a number below 1, or text of another form.
        """
        if isinstance(given, Mesh):
            return given
        if given is None or given == "":
            return cls(())
        pairs = _parse_text(given, spatial_rank) if isinstance(given, str) else list(given.items())
        for name, count in pairs:
            if name not in AXIS_NAMES:
                raise PartitionError(f"mesh axis '{name}' is unknown; use {', '.join(AXIS_NAMES)}")
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:  # pyright: ignore
                raise PartitionError(f"mesh axis {name}={count}: the number of ranks must be an integer from 1")
        names = [name for name, _ in pairs]
        if len(set(names)) != len(names):
            raise PartitionError(f"mesh names an axis twice: {', '.join(names)}; name each axis once")
        if math.prod(count for _, count in pairs) > LARGEST:
            raise PartitionError(f"the mesh has more than {LARGEST} ranks; use fewer")
        return cls(tuple(sorted(pairs, key=lambda pair: AXIS_NAMES.index(pair[0]))))

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Axis names in order."""
        return tuple(name for name, _ in self.axes)

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Number of ranks along each axis."""
        return tuple(count for _, count in self.axes)

    @cached_property
    def size(self) -> int:
        """Number of ranks."""
        return math.prod(self.shape)

    def count(self, name: str) -> int:
        """Ranks along an axis; 1 for an axis that the mesh lacks."""
        return self._counts.get(name, 1)

    @cached_property
    def _counts(self) -> dict[str, int]:
        return dict(self.axes)

    def with_axes(self, names: Iterable[str]) -> Mesh:
        """The mesh with these axes too, of one rank each where it lacks them."""
        lacking = [(name, 1) for name in names if name not in self.names]
        return Mesh(tuple(sorted((*self.axes, *lacking), key=lambda pair: AXIS_NAMES.index(pair[0]))))

    def coordinates(self, rank: int) -> dict[str, int]:
        """The coordinate of a rank along every axis."""
        found: dict[str, int] = {}
        for name, count in reversed(self.axes):
            rank, found[name] = divmod(rank, count)
        return {name: found[name] for name in self.names}

    def rank(self, coordinates: Mapping[str, int]) -> int:
        """The rank at the given coordinates."""
        rank = 0
        for name, count in self.axes:
            rank = rank * count + coordinates[name]
        return rank

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.size))

    def __str__(self) -> str:
        return ",".join(f"{name}={count}" for name, count in self.axes) or "single"


def _parse_text(text: str, spatial_rank: int) -> list[tuple[str, int]]:
    text = text.strip()
    if text == "single":
        return []
    try:
        if "=" in text:
            halves = [item.split("=") for item in text.split(",")]
            return [(name.strip(), int(count)) for name, count in halves]
        counts = [int(item) for item in text.lower().split("x")]
    except ValueError:
        raise PartitionError(f"mesh '{text}' is not understood; write depth=2,height=2 or 2x2x1") from None
    if len(counts) > spatial_rank:
        raise PartitionError(
            f"mesh '{text}' has {len(counts)} axes but the volume has {spatial_rank} spatial; name fewer"
        )
    return list(zip(spatial_names(spatial_rank), counts, strict=False))


def spatial_names(spatial_rank: int) -> tuple[str, ...]:
    """Mesh axis names of a volume's spatial axes: depth, height, width in 3D; height, width in 2D."""
    return SPATIAL_NAMES[max(0, 3 - spatial_rank) :]
