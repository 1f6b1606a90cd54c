"""Dense arrays within files: the form that every uncompressed volume has, whatever its header.

Boxes are read through short-lived mappings and written as ranges of bytes, a few MiB at a time, so
that a process holds its own part and no more.  Ranges, not mapped pages, are written: two hosts that
share a page of a network file would overwrite each other's cells, and a full disk would be a signal
instead of an error.
"""

from __future__ import annotations

import errno
import itertools
import math
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from partitioner.geometry import Interval

Array = NDArray[Any]
DType = np.dtype[Any]

TILE_BYTES = 8 * 2**20

_NO_RESERVATION = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)

Intervals = tuple[Interval, ...]


@dataclass(frozen=True)
class RawArray:
    """Where an array lies in a file.

    Args:
        offset: of the first value, in bytes.
        shape: extents as presented to the user.
        dtype: of the values in the file, byte order included.
        order: the axes of `shape` from the slowest in the file to the fastest: (0, 1, 2) for C order,
            (2, 1, 0) for Fortran order.
    """

    offset: int
    shape: tuple[int, ...]
    dtype: DType
    order: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the values."""
        return math.prod(self.shape) * self.dtype.itemsize

    @cached_property
    def strides(self) -> tuple[int, ...]:
        """Bytes from one cell to the next along each axis of the file, slowest first."""
        extents = [self.shape[axis] for axis in self.order]
        return tuple(math.prod(extents[i + 1 :]) * self.dtype.itemsize for i in range(len(extents)))

    def in_file(self, box: Intervals) -> Intervals:
        """A box with its axes in the order of the file."""
        return tuple(box[axis] for axis in self.order)

    def presented(self, box: Intervals) -> Intervals:
        """The inverse of `in_file`."""
        return tuple(box[self.order.index(axis)] for axis in range(len(self.order)))


@dataclass(frozen=True)
class Delivery:
    """How stored values become those delivered: `slope * value + inter`, in float64, then rounded."""

    dtype: DType
    slope: float = 1.0
    inter: float = 0.0

    @property
    def is_cast(self) -> bool:
        """Whether values are only cast, not scaled."""
        return (self.slope, self.inter) == (1.0, 0.0)

    def convert(self, stored: Array, out: Array) -> None:
        """Fill `out` with the converted values of an array of the same shape."""
        if self.is_cast:
            np.copyto(out, stored, casting="unsafe")
            return
        exact = stored.astype(np.float64)
        exact *= self.slope
        exact += self.inter
        np.copyto(out, exact, casting="unsafe")


def c_order(rank: int) -> tuple[int, ...]:
    """The last axis is the fastest."""
    return tuple(range(rank))


def tiles(box: Intervals, strides: tuple[int, ...], max_bytes: int) -> Iterator[Intervals]:
    """Cut a box (axes in file order) into boxes whose stretch of the file is about `max_bytes` each.

    The tiles come in file order; the tiles of a whole array are consecutive ranges of the file.
    """
    if not all(box):
        return
    if not box:
        yield ()
        return
    fitting = (axis for axis, stride in enumerate(strides) if stride <= max_bytes)
    cut = next(fitting, len(box) - 1)
    step = max(1, max_bytes // strides[cut])
    for fixed in itertools.product(*(range(i.start, i.stop) for i in box[:cut])):
        for start in range(box[cut].start, box[cut].stop, step):
            rows = Interval(start, min(start + step, box[cut].stop))
            yield (*(Interval(i, i + 1) for i in fixed), rows, *box[cut + 1 :])


def chunk_tiles(box: Intervals, chunks: tuple[int, ...], max_cells: int) -> Iterator[Intervals]:
    """Cut a box into boxes of about `max_cells` between whose parts no chunk is divided, so that none is read twice."""
    if not all(box):
        return
    if not box:
        yield ()
        return
    before, cut, rest = 1, 0, math.prod(len(i) for i in box[1:])
    while cut < len(box) - 1 and before * chunks[cut] * rest > max_cells:
        before *= min(chunks[cut], len(box[cut]))
        cut += 1
        rest //= len(box[cut])
    step = max(1, max_cells // (before * chunks[cut] * rest)) * chunks[cut]
    steps = (*chunks[:cut], step)
    for fixed in itertools.product(*(_aligned(i, s) for i, s in zip(box, steps, strict=False))):
        yield (*fixed, *box[cut + 1 :])


def _aligned(cells: Interval, step: int) -> list[Interval]:
    """An interval, cut at the multiples of `step`."""
    begins = range(cells.start // step * step, cells.stop, step)
    return [Interval(begin, begin + step) & cells for begin in begins]


def read_box(file: int, raw: RawArray, box: Intervals, delivery: Delivery) -> Array:
    """The values in a box, as a new array in C order.

    Args:
        file: descriptor, open for reading; the file must hold the whole array.
    """
    out = np.empty([len(i) for i in box], delivery.dtype)
    target = out.transpose(raw.order)
    origin = raw.in_file(box)
    for tile in tiles(origin, raw.strides, TILE_BYTES):
        delivery.convert(_map_tile(file, raw, tile), target[..., *relative(tile, origin)])
    return out


def write_box(file: int, raw: RawArray, box: Intervals, array: Array) -> None:
    """Store the values of a box; concurrent writers of other boxes are not disturbed.

    Args:
        file: descriptor, open for writing.
        array: of the box's shape, any strides.

    Raises:
        OSError: the disk is full or gone.
    """
    source = array.transpose(raw.order)
    origin = raw.in_file(box)
    for tile in tiles(origin, raw.strides, TILE_BYTES):
        _write_tile(file, raw, tile, np.ascontiguousarray(source[relative(tile, origin)], dtype=raw.dtype))


def relative(tile: Intervals, origin: Intervals) -> tuple[slice, ...]:
    """Where a tile lies in an array that holds the box `origin`."""
    return tuple(slice(t.start - o.start, t.stop - o.start) for t, o in zip(tile, origin, strict=True))


def _map_tile(file: int, raw: RawArray, tile: Intervals) -> Array:
    """The cells of a tile, mapped from the file; the mapping ends with the array."""
    first = raw.offset + sum(i.start * s for i, s in zip(tile, raw.strides, strict=True))
    stretch = sum((len(i) - 1) * s for i, s in zip(tile, raw.strides, strict=True)) + raw.dtype.itemsize
    skip = first % mmap.ALLOCATIONGRANULARITY
    mapped = mmap.mmap(file, skip + stretch, access=mmap.ACCESS_READ, offset=first - skip)
    extents = tuple(len(i) for i in tile)
    return np.ndarray(extents, raw.dtype, buffer=mapped, offset=skip, strides=raw.strides)


def _write_tile(file: int, raw: RawArray, tile: Intervals, block: Array) -> None:
    """Write a dense block as the fewest ranges of bytes."""
    split = len(tile)
    while split and raw.strides[split - 1] == math.prod(block.shape[split:]) * raw.dtype.itemsize:
        split -= 1
    begins = raw.offset + sum(i.start * s for i, s in zip(tile, raw.strides, strict=True))
    steps = [range(0, len(i) * s, s) for i, s in zip(tile[:split], raw.strides[:split], strict=True)]
    values = block.reshape(-1).view(np.uint8).data
    length = math.prod(block.shape[split:]) * raw.dtype.itemsize
    for number, offsets in enumerate(itertools.product(*steps)):
        write_range(file, values[number * length : (number + 1) * length], begins + sum(offsets))


def write_range(file: int, values: memoryview | bytes, offset: int) -> None:
    """Write all of `values` at `offset` (one call of the system may write less).

    Raises:
        OSError: the disk is full or gone.
    """
    rest = memoryview(values)
    while rest:
        written = os.pwrite(file, rest, offset)
        rest, offset = rest[written:], offset + written


def reserve(file: int, size: int) -> None:
    """Make the file `size` bytes long, its blocks taken now: no later write finds the disk full."""
    if not size:
        return
    try:
        os.posix_fallocate(file, 0, size)
    except (AttributeError, OSError) as error:  # not on every system, not on every file system
        if isinstance(error, OSError) and error.errno not in _NO_RESERVATION:
            raise
        os.ftruncate(file, size)
