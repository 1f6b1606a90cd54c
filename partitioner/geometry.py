"""Integer intervals, sets of them, and boxes: all the arithmetic of shards and halos rests on these.

Intervals are half-open and in global coordinates.  What a shard holds along one axis is a tuple of
intervals (`Pieces`): sorted, disjoint, not touching, none empty.  An empty tuple is an empty shard.
A tensor's part is the outer product of one `Pieces` per axis (`Box`); in memory its pieces lie
side by side, so the local extent of an axis is the sum of its pieces' lengths.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True, order=True, slots=True)
class Interval:
    """The cells start, start+1, ..., stop-1 of an axis; empty when stop <= start."""

    start: int
    stop: int

    def __len__(self) -> int:
        return max(0, self.stop - self.start)

    def __bool__(self) -> bool:
        return self.stop > self.start

    def __and__(self, other: Interval) -> Interval:
        return Interval(max(self.start, other.start), min(self.stop, other.stop))

    def __str__(self) -> str:
        return f"{self.start}:{self.stop}"

    def shift(self, offset: int) -> Interval:
        """The same cells, moved by `offset`."""
        return Interval(self.start + offset, self.stop + offset)

    def contains(self, other: Interval) -> bool:
        """Whether every cell of `other` is one of ours."""
        return not other or (self.start <= other.start and other.stop <= self.stop)


Pieces = tuple[Interval, ...]


def pieces(intervals: Iterable[Interval]) -> Pieces:
    """The union of intervals in normal form: sorted, disjoint, not touching, none empty."""
    merged: list[Interval] = []
    for item in sorted(i for i in intervals if i):
        if merged and item.start <= merged[-1].stop:
            merged[-1] = Interval(merged[-1].start, max(merged[-1].stop, item.stop))
        else:
            merged.append(item)
    return tuple(merged)


def span(start: int, stop: int) -> Pieces:
    """One interval as pieces; none when it is empty."""
    return (Interval(start, stop),) if stop > start else ()


def extent(parts: Pieces) -> int:
    """How many cells the pieces hold."""
    if len(parts) == 1:
        return parts[0].stop - parts[0].start
    return sum(len(i) for i in parts)


def hull(parts: Pieces) -> Interval:
    """The smallest interval around the pieces; [0, 0) when there are none."""
    return Interval(parts[0].start, parts[-1].stop) if parts else Interval(0, 0)


def intersect(left: Pieces, right: Pieces) -> Pieces:
    """The cells that both hold."""
    if len(left) == 1 and len(right) == 1:
        both = left[0] & right[0]
        return (both,) if both else ()
    return pieces(a & b for a in left for b in right)


def union(left: Pieces, right: Pieces) -> Pieces:
    """The cells that at least one of them holds."""
    return left if left == right else pieces((*left, *right))


def subtract(left: Pieces, right: Pieces) -> Pieces:
    """The cells of `left` that `right` lacks."""
    rest = list(left)
    for hole in right:
        rest = [p for i in rest for p in (Interval(i.start, min(i.stop, hole.start)),
                                          Interval(max(i.start, hole.stop), i.stop)) if p]
    return pieces(rest)


def covers(outer: Pieces, inner: Pieces) -> bool:
    """Whether every cell of `inner` is in `outer`."""
    return all(any(o.contains(i) for o in outer) for i in inner)


def local_slices(held: Pieces, wanted: Pieces, joined: bool = True) -> tuple[slice, ...]:
    """Where `wanted` lies within a buffer that stores `held` side by side.

    Slices that touch are joined, or there is one per wanted piece: sender and receiver of a message, whose
    buffers hold different cells, then list the same ones.

    held 0:3 7:9, wanted 2:3 7:8  ->  (slice(2, 4),)

    Raises:
        ValueError: when a wanted cell is not held.
    """
    if len(held) == len(wanted) == 1 and held[0].contains(wanted[0]):
        return (slice(wanted[0].start - held[0].start, wanted[0].stop - held[0].start),)
    found: list[slice] = []
    for want in wanted:
        offset = 0
        for have in held:
            if have.contains(want):
                break
            offset += len(have)
        else:
            raise ValueError(f"cells {want} are not among {format_pieces(held)}")
        begin = offset + want.start - have.start
        if joined and found and found[-1].stop == begin:
            found[-1] = slice(found[-1].start, begin + len(want))
        else:
            found.append(slice(begin, begin + len(want)))
    return tuple(found)


def format_pieces(parts: Pieces) -> str:
    """Pieces as text, e.g. `0:3+7:9`; `-` when there are none."""
    return "+".join(str(i) for i in parts) or "-"


def parse_pieces(text: str) -> Pieces:
    """The inverse of `format_pieces`.

    Raises:
        ValueError: when the text is no list of intervals.
    """
    if text == "-":
        return ()
    bounds = [item.split(":") for item in text.split("+")]
    return pieces(Interval(int(start), int(stop)) for start, stop in bounds)


@dataclass(frozen=True)
class Box:
    """The part of a tensor that lies in `axes[i]` along every axis i."""

    axes: tuple[Pieces, ...]

    @classmethod
    def whole(cls, shape: Iterable[int]) -> Box:
        """All of a tensor of this shape."""
        return cls(tuple(span(0, n) for n in shape))

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Extents of the local tensor."""
        return tuple([extent(axis) for axis in self.axes])

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def __bool__(self) -> bool:
        return all(self.axes)

    def __iter__(self) -> Iterator[Pieces]:
        return iter(self.axes)

    def __and__(self, other: Box) -> Box:
        return Box(tuple(intersect(a, b) for a, b in zip(self.axes, other.axes, strict=True)))

    def contains(self, other: Box) -> bool:
        """Whether every element of `other` is one of ours."""
        return not other or all(covers(a, b) for a, b in zip(self.axes, other.axes, strict=True))

    def intervals(self) -> tuple[Interval, ...]:
        """One interval per axis, for boxes known to be of one piece; an empty axis is [0, 0)."""
        return tuple(hull(axis) for axis in self.axes)

    def __str__(self) -> str:
        return "[" + ", ".join(format_pieces(axis) for axis in self.axes) + "]"
