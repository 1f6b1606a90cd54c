"""Which cells of a tensor every rank holds: cuts of an axis, and the layout of a whole tensor.

A layout says per tensor axis along which mesh axis it is split and which pieces each coordinate
holds; an axis that is not split is held whole by everyone.  Everything is stored per axis, so a
16x16x16 mesh costs 48 entries, not 4096.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from partitioner.geometry import (
    Box,
    Pieces,
    covers,
    extent,
    format_pieces,
    hull,
    parse_pieces,
    pieces,
    span,
    subtract,
    union,
)
from partitioner.maps import AxisMap, Identity

Cuts = tuple[int, ...]
"""Ascending positions 0, ..., n: shard i owns [cuts[i], cuts[i+1]); equal neighbours are an empty shard."""


def even_cuts(extent_: int, shards: int) -> Cuts:
    """Cuts into shards whose extents differ by at most one, the larger ones first."""
    base, extra = divmod(extent_, shards)
    return tuple(i * base + min(i, extra) for i in range(shards + 1))


def follow_cuts(cuts: Cuts, axis_map: AxisMap) -> Cuts:
    """The cuts of an operator's output that go naturally with those of its input."""
    inner = [axis_map.follow(cut) for cut in cuts[1:-1]]
    found = [0]
    for cut in inner:
        found.append(max(found[-1], min(cut, axis_map.n_out)))
    return (*found, axis_map.n_out)


@dataclass(frozen=True)
class AxisLayout:
    """One split tensor axis: the coordinate i of `mesh_axis` holds `parts[i]`."""

    mesh_axis: str
    parts: tuple[Pieces, ...]

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash(self.parts)

    @classmethod
    def from_cuts(cls, mesh_axis: str, cuts: Cuts) -> AxisLayout:
        """Disjoint shards between consecutive cuts."""
        return cls(mesh_axis, tuple(span(a, b) for a, b in itertools.pairwise(cuts)))

    @cached_property
    def cuts(self) -> Cuts | None:
        """The cuts when the parts are disjoint, in order and without gaps; None otherwise."""
        position = 0
        found = [0]
        for part in self.parts:
            if len(part) > 1 or (part and part[0].start != position):
                return None
            position += extent(part)
            found.append(position)
        return tuple(found)

    @cached_property
    def extents(self) -> tuple[int, ...]:
        """How many cells every coordinate holds."""
        return tuple(extent(part) for part in self.parts)

    @cached_property
    def held(self) -> Pieces:
        """The cells that some coordinate holds."""
        return pieces(i for part in self.parts for i in part)

    def covers(self, other: AxisLayout) -> bool:
        """Whether every coordinate holds what it holds in another layout of the axis."""
        return self is other or _covers(self, other)

    def through(self, axis_map: AxisMap) -> AxisLayout:
        """What every coordinate needs of an operator's input when it holds these parts of the output."""
        return self if type(axis_map) is Identity else _through(self, axis_map)

    def followed(self, axis_map: AxisMap) -> AxisLayout:
        """The shards of an operator's output that go naturally with these of its input, which have cuts."""
        return _followed(self, axis_map)

    def joined(self, other: AxisLayout) -> AxisLayout:
        """What every coordinate holds in at least one of two layouts of the axis."""
        return self if self is other else _joined(self, other)

    @cached_property
    def in_one_piece(self) -> AxisLayout:
        """What every coordinate holds, and the cells between its pieces."""
        whole = [hull(part) for part in self.parts]
        return AxisLayout(self.mesh_axis, tuple(span(part.start, part.stop) for part in whole))

    def __str__(self) -> str:
        return self._text

    @cached_property
    def _text(self) -> str:
        cuts = self.cuts
        if cuts is not None:
            return f"{self.mesh_axis}({'|'.join(map(str, cuts))})"
        return f"{self.mesh_axis}({' '.join(format_pieces(p) for p in self.parts)})"


_KEPT = 1 << 12
"""Answers about axes that are remembered: those of a plan are few, but they are asked for node by node."""


@lru_cache(_KEPT)
def _covers(outer: AxisLayout, inner: AxisLayout) -> bool:
    return all(covers(p, q) for p, q in zip(outer.parts, inner.parts, strict=True))


@lru_cache(_KEPT)
def _through(split: AxisLayout, axis_map: AxisMap) -> AxisLayout:
    return AxisLayout(split.mesh_axis, tuple(axis_map.needed_by(part) for part in split.parts))


@lru_cache(_KEPT)
def _followed(split: AxisLayout, axis_map: AxisMap) -> AxisLayout:
    if split.cuts is None:
        raise ValueError(f"{split} has no cuts")
    return AxisLayout.from_cuts(split.mesh_axis, follow_cuts(split.cuts, axis_map))


@lru_cache(_KEPT)
def _joined(left: AxisLayout, right: AxisLayout) -> AxisLayout:
    return AxisLayout(left.mesh_axis, tuple(union(p, q) for p, q in zip(left.parts, right.parts, strict=True)))


@dataclass(frozen=True)
class Layout:
    """What every rank holds of a tensor of extents `shape`; `axes[a]` is None where it is not split."""

    shape: tuple[int, ...]
    axes: tuple[AxisLayout | None, ...]

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.shape, *(0 if axis is None else hash(axis) for axis in self.axes)))

    @classmethod
    def replicated(cls, shape: Sequence[int]) -> Layout:
        """Every rank holds the whole tensor."""
        return cls(tuple(shape), (None,) * len(shape))

    @cached_property
    def mesh_axes(self) -> frozenset[str]:
        """Names of the mesh axes along which the tensor is split; it is replicated along the others."""
        return frozenset(axis.mesh_axis for axis in self.axes if axis is not None)

    @property
    def is_replicated(self) -> bool:
        """Whether no axis is split."""
        return not self.mesh_axes

    @cached_property
    def is_partition(self) -> bool:
        """Whether the shards are disjoint and cover the tensor."""
        return all(
            axis is None or ((cuts := axis.cuts) is not None and cuts[-1] == n)
            for axis, n in zip(self.axes, self.shape, strict=True)
        )

    @cached_property
    def is_cover(self) -> bool:
        """Whether every cell is held by some rank; shards may overlap."""
        return all(
            axis is None or covers(axis.held, span(0, n))
            for axis, n in zip(self.axes, self.shape, strict=True)
        )

    def each_once(self) -> Layout:
        """The same shards without the cells that a shard before them holds."""
        axes: list[AxisLayout | None] = []
        for split in self.axes:
            before: Pieces = ()
            parts: list[Pieces] = []
            for part in () if split is None else split.parts:
                parts.append(subtract(part, before))
                before = union(before, part)
            axes.append(None if split is None else AxisLayout(split.mesh_axis, tuple(parts)))
        return Layout(self.shape, tuple(axes))

    def part(self, axis: int, coordinates: Mapping[str, int]) -> Pieces:
        """What the rank at these coordinates holds along a tensor axis."""
        split = self.axes[axis]
        return span(0, self.shape[axis]) if split is None else split.parts[coordinates[split.mesh_axis]]

    def box(self, coordinates: Mapping[str, int]) -> Box:
        """What the rank at these mesh coordinates holds."""
        return Box(tuple(self.part(a, coordinates) for a in range(len(self.shape))))

    def with_axis(self, axis: int, split: AxisLayout | None) -> Layout:
        """The same layout with one axis laid out anew."""
        return replace(self, axes=(*self.axes[:axis], split, *self.axes[axis + 1 :]))

    def __str__(self) -> str:
        items = [str(n) if axis is None else str(axis) for n, axis in zip(self.shape, self.axes, strict=True)]
        return "[" + ", ".join(items) + "]"


def parse_layout(text: str) -> Layout:
    """The inverse of `str(layout)`, but for an extent whose last cells nobody holds: that is not in the text.

    Raises:
        ValueError: when the text is no layout.
    """
    inner = text.strip()
    if not (inner.startswith("[") and inner.endswith("]")):
        raise ValueError(f"'{text}' is no layout")
    shape: list[int] = []
    axes: list[AxisLayout | None] = []
    for item in filter(None, (part.strip() for part in inner[1:-1].split(","))):
        if not item.endswith(")"):
            shape.append(int(item))
            axes.append(None)
            continue
        split = _parse_axis(item)
        axes.append(split)
        shape.append(max((p[-1].stop for p in split.parts if p), default=0))
    return Layout(tuple(shape), tuple(axes))


def _parse_axis(item: str) -> AxisLayout:
    name, _, body = item[:-1].partition("(")
    if "|" in body:
        cuts = tuple(int(cut) for cut in body.split("|"))
        if cuts[0] != 0 or list(cuts) != sorted(cuts):
            raise ValueError(f"'{item}': cuts must ascend from 0")
        return AxisLayout.from_cuts(name, cuts)
    return AxisLayout(name, tuple(parse_pieces(part) for part in body.split(" ")))
