"""Pages of TIFF files, read through tifffile in pieces: plain ones as ranges of bytes, others segment by segment."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from partitioner.geometry import Interval
from runtime.volumes.raw import Array, Delivery, DType, Intervals, RawArray, c_order, read_box, relative


@dataclass(frozen=True)
class Pages:
    """A stack of pages of one form.

    Args:
        shape: extents as presented.
        order: the presented axes from the slowest of the stack to the fastest; those of one page come last.
        inner: how many of them are within a page.
        open_page: the page of a number, with the file that holds it; called for one page after the other.
    """

    shape: tuple[int, ...]
    dtype: DType
    order: tuple[int, ...]
    inner: int
    open_page: Callable[[int], tuple[Any, BinaryIO]]

    def fetch(self, cells: tuple[slice, ...]) -> Array:
        """The stored values of a box."""
        box = tuple(Interval(c.start, c.stop) for c in cells)
        found = np.empty([len(i) for i in box], self.dtype)
        placed, stacked = [box[a] for a in self.order], found.transpose(self.order)
        outer, inner = placed[: -self.inner], tuple(placed[-self.inner :])
        for at in itertools.product(*(range(i.start, i.stop) for i in outer)):
            page, file = self.open_page(self._number(at))
            place = tuple(i - o.start for i, o in zip(at, outer, strict=True))
            stacked[place] = read_page(page, file, inner, self.dtype)
        return found

    def _number(self, at: Sequence[int]) -> int:
        number = 0
        for index, axis in zip(at, self.order, strict=False):
            number = number * self.shape[axis] + index
        return number


def read_page(page: Any, file: BinaryIO, box: Intervals, dtype: DType) -> Array:
    """A box of one page: (rows, columns), with samples in front or behind where the page has them there."""
    form = page.keyframe
    planes, _, height, width, samples = form.shaped
    if form.is_final:
        raw = RawArray(int(page.dataoffsets[0]), tuple(form.shape), dtype, c_order(len(box)))
        return read_box(file.fileno(), raw, box, Delivery(dtype))
    rows = box[-3] if samples > 1 else box[-2]
    columns = box[-2] if samples > 1 else box[-1]
    whole = (Interval(0, planes), Interval(0, 1), rows, columns, Interval(0, samples))
    found = np.zeros([len(i) for i in whole], dtype)
    for index in _segments(form, planes, (height, width), rows, columns):
        values, place = _decoded(page, file, index)
        common = tuple(a & b for a, b in zip(place, whole, strict=True))
        if all(common):
            found[relative(common, whole)] = form.nodata if values is None else values[relative(common, place)]
    if planes > 1:
        return found[box[0].start : box[0].stop, 0, ..., 0]
    return found[0, 0][..., box[-1].start : box[-1].stop] if samples > 1 else found[0, 0, ..., 0]


def segment_extents(form: Any) -> tuple[int, int]:
    """Rows and columns that are decoded at once; single rows of pages that lie as they are."""
    _, _, height, width, _ = form.shaped
    if form.is_final:
        return 1, width
    if form.is_tiled:
        return int(form.tilelength), int(form.tilewidth)
    return min(int(form.rowsperstrip), height), width


def stretches(page: Any) -> Iterator[tuple[int, int]]:
    """(begin, end) in the file of everything that a page stores."""
    if page.keyframe.is_final and len(page.dataoffsets):
        yield int(page.dataoffsets[0]), int(page.dataoffsets[0]) + math.prod(page.keyframe.shape) * page.dtype.itemsize
        return
    for begin, count in zip(page.dataoffsets, page.databytecounts, strict=False):
        yield int(begin), int(begin) + int(count)


def _segments(form: Any, planes: int, extents: tuple[int, int], rows: Interval, columns: Interval) -> Iterator[int]:
    """Numbers of the segments that a box touches."""
    high, wide = segment_extents(form)
    down, across = -(-extents[0] // high), -(-extents[1] // wide)
    for plane in range(planes):
        for row in range(rows.start // high, -(-rows.stop // high)):
            for column in range(columns.start // wide, -(-columns.stop // wide)):
                yield (plane * down + row) * across + column


def _decoded(page: Any, file: BinaryIO, index: int) -> tuple[Array | None, Intervals]:
    """A segment's values, None where they are not stored, and its place in the page."""
    form = page.keyframe
    count = int(page.databytecounts[index])
    file.seek(int(page.dataoffsets[index]))
    data = file.read(count) if count else None
    if data is not None and len(data) < count:
        raise EOFError(f"its data end {count - len(data)} bytes too early")
    tables = {} if form.jpegtables is None else {"jpegtables": form.jpegtables}
    values, (plane, depth, row, column, _), shape = form.decode(data, index, **tables)
    begins = (plane, depth, row, column, 0)
    extents = (1, *shape)
    # Segments at the border are cut off there, whatever their decoder delivers.
    ends = [min(b + n, limit) for b, n, limit in zip(begins, extents, form.shaped, strict=True)]
    place = tuple(Interval(b, e) for b, e in zip(begins, ends, strict=True))
    return (None if values is None else values[None]), place
