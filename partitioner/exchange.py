"""The one communication planner: halos, re-layouts, gathers and scatters are all `plan_exchange`.

Every owned box is intersected with every needed box.  Boxes are products of per-axis pieces, so the
intersections are tables per tensor axis, and a rank's messages are products of table rows:

    rank owns [0, 61) of depth, needs [0, 62)   ->   receives [61, 62) from the rank that owns it

Corners, halos wider than a neighbour, empty shards and several pieces need no case of their own.
The adjoint is the same list of transfers with sources and destinations swapped, received cells added.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from partitioner.geometry import Box, Pieces, intersect, span
from partitioner.layout import AxisLayout, Layout
from partitioner.mesh import Mesh

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Transfer:
    """One message: the cells of `box` go from rank `source` to rank `target`."""

    source: int
    target: int
    box: Box


@dataclass(frozen=True)
class RankExchange:
    """One rank's part of an exchange, messages ordered by peer; `keep` is what it already holds."""

    keep: Box
    sends: tuple[Transfer, ...]
    receives: tuple[Transfer, ...]

    def adjoint(self) -> RankExchange:
        """The reversed messages: what was received is sent back, to be added where it came from."""
        return RankExchange(
            self.keep,
            tuple(Transfer(t.target, t.source, t.box) for t in self.receives),
            tuple(Transfer(t.target, t.source, t.box) for t in self.sends),
        )


@dataclass(frozen=True)
class Traffic:
    """Elements and messages per rank, as arrays of the mesh's shape."""

    sent: IntArray
    received: IntArray
    messages: IntArray

    @property
    def total(self) -> int:
        """Elements over all messages."""
        return int(self.sent.sum())


@dataclass(frozen=True)
class Exchange:
    """Takes a tensor from the disjoint layout `owned` to the layout `needed`, which may overlap."""

    mesh: Mesh
    owned: Layout
    needed: Layout

    @cached_property
    def is_empty(self) -> bool:
        """Whether every rank already holds all that it needs."""
        return self.traffic.total == 0

    def for_rank(self, rank: int) -> RankExchange:
        """The messages of one rank; the cost grows with its neighbours, not with the mesh."""
        here = self.mesh.coordinates(rank)
        keep = self.owned.box(here) & self.needed.box(here)
        receives = [t for t in self._receives(rank, here) if t.source != rank]
        sends = [t for t in self._sends(rank, here) if t.target != rank]
        return RankExchange(
            keep,
            tuple(sorted(sends, key=lambda t: t.target)),
            tuple(sorted(receives, key=lambda t: t.source)),
        )

    def _receives(self, rank: int, here: Mapping[str, int]) -> Iterator[Transfer]:
        choices = [self._sources(name, here) for name in self.mesh.names]
        for coordinates in itertools.product(*choices):
            there = dict(zip(self.mesh.names, coordinates, strict=True))
            box = self.owned.box(there) & self.needed.box(here)
            if box:
                yield Transfer(self.mesh.rank(there), rank, box)

    def _sends(self, rank: int, here: Mapping[str, int]) -> Iterator[Transfer]:
        choices = [self._targets(name, here) for name in self.mesh.names]
        for coordinates in itertools.product(*choices):
            there = dict(zip(self.mesh.names, coordinates, strict=True))
            box = self.owned.box(here) & self.needed.box(there)
            if box:
                yield Transfer(rank, self.mesh.rank(there), box)

    def _sources(self, name: str, here: Mapping[str, int]) -> list[int]:
        """Coordinates along a mesh axis that own something we need; ourselves where it is replicated."""
        if name not in self.owned.mesh_axes:
            return [here[name]]
        axis = _split_axis(self.owned, name)
        want = self.needed.part(axis, here)
        return [i for i, part in enumerate(_parts(self.owned, axis)) if intersect(part, want)]

    def _targets(self, name: str, here: Mapping[str, int]) -> list[int]:
        """Coordinates along a mesh axis that need something we own."""
        if name not in self.owned.mesh_axes:
            return [here[name]]
        if name not in self.needed.mesh_axes:
            return list(range(self.mesh.count(name)))
        axis = _split_axis(self.needed, name)
        have = self.owned.part(axis, here)
        return [i for i, part in enumerate(_parts(self.needed, axis)) if intersect(part, have)]

    def goes_with(self, other: Exchange) -> bool:
        """Whether the other exchange sends a message wherever this one does."""
        mine, theirs = self._links(), other._links()
        return mine is not None and theirs is not None and mine.keys() == theirs.keys() and all(
            bool((mine[name] <= theirs[name]).all()) for name in mine)

    def _links(self) -> dict[str, NDArray[np.bool_]] | None:
        """Per mesh axis from which coordinate to which one cells go; None where axes change hands."""
        found: dict[str, NDArray[np.bool_]] = {}
        for axis in range(len(self.owned.shape)):
            name = _name(self.owned, axis)
            if name != _name(self.needed, axis):
                return None
            if name is not None:
                found[name] = self._table(axis) > 0
        return found

    @cached_property
    def traffic(self) -> Traffic:
        """Elements sent and received and messages sent, per rank, from per-axis tables alone; not to be written to."""
        cells = [self._table(a) for a in range(len(self.owned.shape))]
        flags = [(table > 0).astype(np.int64) for table in cells]
        own_cells, own_flags = self._own(cells), self._own(flags)
        need = self._need()
        return Traffic(self._fan_out(cells) - own_cells, need - own_cells, self._fan_out(flags) - own_flags)

    @cached_property
    def messages_received(self) -> IntArray:
        """Messages that every rank gets: those that its gradients send back."""
        total, own = np.ones(self.mesh.shape, dtype=np.int64), list[IntArray]()
        for axis in range(len(self.owned.shape)):
            flags = (self._table(axis) > 0).astype(np.int64)
            own.append(flags)
            entry = flags if _name(self.owned, axis) is None else flags.sum(axis=0, keepdims=True)
            total = total * _spread(entry, (None, _name(self.needed, axis)), self.mesh)
        return total - self._own(own)

    def _table(self, axis: int) -> IntArray:
        """Cells of tensor axis `axis` that source coordinate i owns and target coordinate j needs."""
        owned, needed, extent_ = self.owned.axes[axis], self.needed.axes[axis], self.owned.shape[axis]
        return _overlaps(owned or extent_, needed or extent_)

    def _need(self) -> IntArray:
        total = np.ones(self.mesh.shape, dtype=np.int64)
        for axis in range(len(self.needed.shape)):
            split = self.needed.axes[axis]
            counts = np.array([self.needed.shape[axis]] if split is None else split.extents, dtype=np.int64)
            total = total * _spread(counts, (_name(self.needed, axis),), self.mesh)
        return total

    def _own(self, tables: list[IntArray]) -> IntArray:
        """Product over axes of the entries where source and target are the same rank."""
        total = np.ones(self.mesh.shape, dtype=np.int64)
        for axis, table in enumerate(tables):
            names = (_name(self.owned, axis), _name(self.needed, axis))
            total = total * _spread(table, names, self.mesh)
        return total

    def _fan_out(self, tables: list[IntArray]) -> IntArray:
        """Sum over all targets of the product over axes, per source."""
        total = np.ones(self.mesh.shape, dtype=np.int64)
        for axis, table in enumerate(tables):
            source, target = _name(self.owned, axis), _name(self.needed, axis)
            free = target is not None and target in self.owned.mesh_axes
            entry = table.sum(axis=1, keepdims=True) if free else table
            total = total * _spread(entry, (source, None if free else target), self.mesh)
        for name in self.owned.mesh_axes - self.needed.mesh_axes:
            total = total * self.mesh.count(name)
        return total


def plan_exchange(mesh: Mesh, owned: Layout, needed: Layout) -> Exchange:
    """The exchange that takes a tensor from `owned` (disjoint along split axes) to `needed`.

    Raises:
        ValueError: when the layouts are of different tensors or `owned` does not cover its tensor.
    """
    if owned.shape != needed.shape:
        raise ValueError(f"layouts of different tensors: {owned} and {needed}")
    if not owned.is_partition:
        raise ValueError(f"shards of {owned} overlap or leave cells out")
    return (_planned if mesh.size <= REMEMBERED else Exchange)(mesh, owned, needed)


REMEMBERED = 1 << 16
"""Ranks up to which figures are remembered: the values of a plan have few different layouts."""


@lru_cache(64)
def _planned(mesh: Mesh, owned: Layout, needed: Layout) -> Exchange:
    return Exchange(mesh, owned, needed)


def _name(layout: Layout, axis: int) -> str | None:
    split = layout.axes[axis]
    return None if split is None else split.mesh_axis


def _split_axis(layout: Layout, name: str) -> int:
    return next(a for a in range(len(layout.axes)) if _name(layout, a) == name)


def _parts(layout: Layout, axis: int) -> tuple[Pieces, ...]:
    split = layout.axes[axis]
    return (span(0, layout.shape[axis]),) if split is None else split.parts


@lru_cache(1 << 10)
def _overlaps(rows: AxisLayout | int, columns: AxisLayout | int) -> IntArray:
    """Cells that every part of an axis has in common with every other one; a number is the extent of a whole axis."""
    parts = [(span(0, given),) if isinstance(given, int) else given.parts for given in (rows, columns)]
    left, right = ([(i, piece.start, piece.stop) for i, part in enumerate(side) for piece in part] for side in parts)
    found = np.zeros([len(side) for side in parts], dtype=np.int64)
    if left and right:
        (row, *one), (column, *other) = np.array(left).T, np.array(right).T
        common = np.minimum.outer(one[1], other[1]) - np.maximum.outer(one[0], other[0])
        np.add.at(found, (row[:, None], column), np.maximum(common, 0))
    found.flags.writeable = False
    return found


def _spread(values: IntArray, names: tuple[str | None, ...], mesh: Mesh) -> IntArray:
    """Values indexed by the named mesh axes (None: a single entry) as an array over the whole mesh.

    A name that stands twice takes the diagonal: source and target have the same coordinate there.
    """
    letters = {name: index for index, name in enumerate(mesh.names)}
    subscripts = [len(letters) + i if name is None else letters[name] for i, name in enumerate(names)]
    kept = sorted({letters[name] for name in names if name is not None})
    compact = np.einsum(values, subscripts, kept)
    shape = [mesh.shape[i] if i in kept else 1 for i in range(len(letters))]
    return np.asarray(compact, dtype=np.int64).reshape(shape)
