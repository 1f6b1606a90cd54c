"""Where the cells of a value along a rolled axis lie in its buffer, as slab follows slab.

    passing   nothing is kept: what a kernel returns is the buffer, until the slab's last reader
    sliding   few cells are kept: they move to the front before the next ones are written behind them
    ring      many cells are kept: cell c lies at c modulo the buffer's length, and nothing moves
    resting   all of it: later chains read it; cells that nobody reads any more are given back
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from partitioner.geometry import Interval
from partitioner.rolling import Ends, Slab

Kind = Literal["passing", "sliding", "ring", "resting"]


@dataclass
class Track:
    """A buffer's cells along the rolled axis at the moment.

    Args:
        axis: of the tensor.
        length: cells that the buffer has room for.
        origin: the cell at the front of a passing or sliding buffer.
    """

    axis: int
    kind: Kind
    length: int
    origin: int = 0

    def slices(self, part: Interval) -> tuple[slice, ...]:
        """Where cells lie, in order."""
        if self.kind != "ring":
            return (slice(part.start - self.origin, part.stop - self.origin),)
        first = part.start % self.length
        if first + len(part) <= self.length:
            return (slice(first, first + len(part)),)
        return slice(first, self.length), slice(0, first + len(part) - self.length)

    def pieces(self, part: Interval) -> Iterator[Interval]:
        """The cells in runs that lie side by side in the buffer."""
        start = part.start
        for piece in self.slices(part):
            yield Interval(start, start + piece.stop - piece.start)
            start += piece.stop - piece.start


def first_of(ends: Ends, values: Sequence[ir.Value]) -> int:
    """How far the values that share a buffer are at least."""
    return min(ends[v] for v in values)


def lay_track(axis: int, values: Sequence[ir.Value], slabs: Sequence[Slab], extent: int, alone: bool) -> Track:
    """How the buffer of some values moves through the slabs of a chain.

    Args:
        extent: cells along the axis.
        alone: whether it holds one value, as large as itself along all other axes.
    """
    width = kept = step = before = 0
    for slab in slabs:
        first, upto = first_of(slab.kept, values), max(slab.upto[v] for v in values)
        width = max(width, upto - first)
        kept = max(kept, before - min(first, before))
        step = max(step, upto - before)
        before = upto
    if kept == 0 and alone:
        return Track(axis, "passing", width)
    if kept <= step:
        return Track(axis, "sliding", width)
    return Track(axis, "ring", max(width, min(-(-width // step) * step, extent)))
