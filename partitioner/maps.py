"""Interval maps: which input cells an operator needs for given output cells, along one axis.

Every halo width, stride phase, border and transfer of the toolkit follows from these few formulas.
`needed(out)` is clipped to the tensor, so cells outside the image never exist; what clipping cut off
is the padding that the kernel adds locally.  `follow(cut)` says where the output would naturally be
cut when the input is cut at `cut`: the choice moves fewest cells, but any cut is exact.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from dataclasses import dataclass

from partitioner.geometry import Interval, Pieces, hull, pieces, span


def ceil_div(a: int, b: int) -> int:
    """Smallest integer not below a / b, for b > 0."""
    return -(-a // b)


@dataclass(frozen=True)
class AxisMap(ABC):
    """Input cells needed for output cells along one axis of `n_in` input and `n_out` output cells."""

    n_in: int
    n_out: int

    def needed(self, out: Interval) -> Pieces:
        """Input cells, clipped to [0, n_in), that the output cells `out` depend on; maybe none."""
        return self._needed(out) if out else ()

    def needed_by(self, parts: Pieces) -> Pieces:
        """The union of what every piece needs."""
        return pieces(i for part in parts for i in self.needed(part))

    def follow(self, cut: int) -> int:
        """The output cut that goes with an input cut; the ends follow the ends."""
        if cut <= 0:
            return 0
        if cut >= self.n_in:
            return self.n_out
        return min(max(self._follow(cut), 0), self.n_out)

    @property
    def overlap(self) -> int:
        """Input cells that are needed on both sides of the middle of the output: the halo of two shards together."""
        middle = self.n_out // 2
        before, after = self.needed(Interval(0, middle)), self.needed(Interval(middle, self.n_out))
        return max(0, hull(before).stop - hull(after).start) if before and after else 0

    @property
    def is_identity(self) -> bool:
        """Whether output cell i needs input cell i and no other."""
        return False

    @property
    def corresponds(self) -> bool:
        """Whether output cell i belongs to input cell i, so that both axes should be cut alike."""
        return self.is_identity

    @abstractmethod
    def _needed(self, out: Interval) -> Pieces: ...

    @abstractmethod
    def _follow(self, cut: int) -> int: ...


@dataclass(frozen=True)
class Identity(AxisMap):
    """Output cell i needs input cell i."""

    def _needed(self, out: Interval) -> Pieces:
        return (out,)

    def _follow(self, cut: int) -> int:
        return cut

    @property
    def is_identity(self) -> bool:
        return True


@dataclass(frozen=True)
class Whole(AxisMap):
    """Every output cell needs the whole input axis (a broadcast axis of one cell included)."""

    def _needed(self, out: Interval) -> Pieces:
        return span(0, self.n_in)

    def _follow(self, cut: int) -> int:
        return self.n_out


@dataclass(frozen=True)
class WholeAligned(Whole):
    """Every output cell needs the whole axis but belongs to one input cell: normalisation, softmax."""

    @property
    def corresponds(self) -> bool:
        return True

    def _follow(self, cut: int) -> int:
        return cut


@dataclass(frozen=True)
class Shift(AxisMap):
    """Output cell i is input cell i + offset; outside the input it comes from elsewhere (pad, concat)."""

    offset: int

    def _needed(self, out: Interval) -> Pieces:
        return span(max(0, out.start + self.offset), min(self.n_in, out.stop + self.offset))

    def _follow(self, cut: int) -> int:
        return cut - self.offset

    @property
    def is_identity(self) -> bool:
        return self.offset == 0 and self.n_in == self.n_out


@dataclass(frozen=True)
class Window(AxisMap):
    """A sliding window (convolution, pooling) of `kernel` taps, `lo` cells of padding before the axis.

    out [a, b)  ->  in [a*stride - lo, (b-1)*stride - lo + (kernel-1)*dilation + 1)
    """

    kernel: int
    stride: int
    dilation: int
    lo: int

    @property
    def reach(self) -> int:
        """Input cells from the window's first to its last tap."""
        return (self.kernel - 1) * self.dilation + 1

    def unclipped(self, out: Interval) -> Interval:
        """The needed cells with those outside the tensor: the padding is the difference."""
        start = out.start * self.stride - self.lo
        return Interval(start, (out.stop - 1) * self.stride - self.lo + self.reach)

    def _needed(self, out: Interval) -> Pieces:
        want = self.unclipped(out)
        return span(max(0, want.start), min(self.n_in, want.stop))

    def _follow(self, cut: int) -> int:
        return ceil_div(cut + self.lo - (self.reach - 1) // 2, self.stride)

    @property
    def is_identity(self) -> bool:
        return self.kernel == 1 and self.stride == 1 and self.lo == 0 and self.n_in == self.n_out


@dataclass(frozen=True)
class TransposedWindow(AxisMap):
    """A transposed convolution: input i reaches outputs i*stride - lo + t*dilation, t < kernel.

    out [a, b)  ->  in [ceil((a + lo - (kernel-1)*dilation) / stride), floor((b-1 + lo) / stride) + 1)
    """

    kernel: int
    stride: int
    dilation: int
    lo: int

    @property
    def reach(self) -> int:
        """Output cells from the first to the last that one input cell reaches."""
        return (self.kernel - 1) * self.dilation + 1

    def _needed(self, out: Interval) -> Pieces:
        first = ceil_div(out.start + self.lo - (self.reach - 1), self.stride)
        last = (out.stop - 1 + self.lo) // self.stride
        return span(max(0, first), min(self.n_in, last + 1))

    def _follow(self, cut: int) -> int:
        return cut * self.stride - self.lo + max(0, self.reach - self.stride) // 2


@dataclass(frozen=True)
class Flat(AxisMap):
    """The leading axes of two groups of axes that hold the same cells in the same order: a reshape.

    Input cell i stands for the flat cells [i*inner_in, (i+1)*inner_in), output cell i for as many of `inner_out`.
    out [a, b)  ->  in [floor(a*inner_out / inner_in), ceil(b*inner_out / inner_in))
    """

    inner_in: int
    inner_out: int

    def _needed(self, out: Interval) -> Pieces:
        first = out.start * self.inner_out // self.inner_in
        return span(first, min(self.n_in, ceil_div(out.stop * self.inner_out, self.inner_in)))

    def _follow(self, cut: int) -> int:
        return (cut * self.inner_in + self.inner_out // 2) // self.inner_out

    @property
    def is_identity(self) -> bool:
        return self.inner_in == self.inner_out


@dataclass(frozen=True)
class Rows(AxisMap):
    """An axis that holds flattened rows of `inner` cells each; `rows` says which rows are needed."""

    rows: AxisMap
    inner: int

    def _needed(self, out: Interval) -> Pieces:
        return pieces(Interval(i.start * self.inner, i.stop * self.inner) for i in self.rows.needed(out))

    def _follow(self, cut: int) -> int:
        return self.rows.follow((cut + self.inner // 2) // self.inner)

    @property
    def is_identity(self) -> bool:
        return self.inner == 1 and self.rows.is_identity


@dataclass(frozen=True)
class Taps(AxisMap):
    """Output cell i needs the input cells `rows[i]`: resize, mirrored or wrapped padding, strided slices."""

    rows: tuple[tuple[int, ...], ...]

    def _needed(self, out: Interval) -> Pieces:
        rows = self.rows[out.start : out.stop]
        flat = [i for row in rows for i in row]
        if not flat:
            return ()
        leads = [row[0] for row in rows if row]
        steps = [b - a for a, b in itertools.pairwise(leads)]
        if all(s >= 0 for s in steps) or all(s <= 0 for s in steps):
            return span(min(flat), max(flat) + 1)
        return pieces(Interval(i, i + 1) for i in flat)

    def _follow(self, cut: int) -> int:
        return sum(1 for row in self.rows if row and row[0] + row[-1] < 2 * cut)


@dataclass(frozen=True)
class Prefix(AxisMap):
    """Output cell i needs the input cells up to i: running sums."""

    def _needed(self, out: Interval) -> Pieces:
        return span(0, min(out.stop, self.n_in))

    def _follow(self, cut: int) -> int:
        return cut

    @property
    def corresponds(self) -> bool:
        return True


@dataclass(frozen=True)
class Suffix(AxisMap):
    """Output cell i needs the input cells from i on: running sums from the end."""

    def _needed(self, out: Interval) -> Pieces:
        return span(out.start, self.n_in)

    def _follow(self, cut: int) -> int:
        return cut

    @property
    def corresponds(self) -> bool:
        return True


def identity(extent: int) -> Identity:
    """The identity on an axis of `extent` cells."""
    return Identity(extent, extent)
