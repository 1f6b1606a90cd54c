"""A copy of a volume from which any slab is read cheaply, for files that are read from their start to their end only.

The copy lies in blocks, each dense in the file, so that a thin slab along any axis touches the blocks that it crosses
and not the whole file.  The file has no name from the start: it is gone with the process, whatever ends that.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import shutil
import tempfile
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from partitioner.errors import ExecutionError, PartitionError
from partitioner.geometry import Interval
from runtime.volumes.base import Meta, Source, readable_size
from runtime.volumes.raw import (
    Array,
    Delivery,
    DType,
    Intervals,
    RawArray,
    c_order,
    read_box,
    relative,
    reserve,
    write_box,
)
from runtime.volumes.sources import ChunkedSource, Contents

_EDGES = {1: 2**18, 2: 512, 3: 64}
"""Cells of a block along each of the last axes, by their number: about 1 MiB in float32."""


def spooled(source: Source, folder: str | Path | None = None) -> Source:
    """A source with the same values that is read in boxes of any form; passes over `source` once.

    Args:
        source: stays open and is closed by the caller, who need not wait for the copy's end.
        folder: where the copy lies, as large as the values delivered; the folder for temporary files without one.

    Raises:
        PartitionError: no room in the folder, or the source is damaged.
        ExecutionError: the disk fills up.
    """
    place = Path(tempfile.gettempdir() if folder is None else folder)
    blocks = _Blocks.of(source.shape, source.dtype)
    _check_room(place, source, blocks.nbytes)
    file = _nameless(place, source, blocks.nbytes)
    try:
        with _filling(place, source):
            for start, values in source.slabs():
                box = tuple(Interval(a, a + n) for a, n in zip(start, values.shape, strict=True))
                blocks = blocks.ordered_like(box)
                blocks.write(file, box, values)
    except BaseException:
        os.close(file)
        raise
    return _SpooledSource(source.path, blocks, file, source.meta)


class _SpooledSource(ChunkedSource):
    """Holds the descriptor of the copy."""

    def __init__(self, path: Path, blocks: _Blocks, file: int, meta: Meta | None) -> None:
        raw = RawArray(0, blocks.shape, blocks.dtype, c_order(len(blocks.shape)))
        contents = Contents(path, raw, Delivery(blocks.dtype), meta)
        self._held = contextlib.ExitStack()
        self._held.callback(os.close, file)
        super().__init__(contents, blocks.extents, partial(blocks.read, file), self._held.close)


@dataclass(frozen=True)
class _Blocks:
    """An array as blocks of equal extents, one after the other; those at the end of an axis have cells to spare.

    Args:
        extents: of a block.
        order: of the axes within a block, from the slowest to the fastest; None before the first slab is seen.
    """

    shape: tuple[int, ...]
    dtype: DType
    extents: tuple[int, ...]
    order: tuple[int, ...] | None = None

    @classmethod
    def of(cls, shape: tuple[int, ...], dtype: DType) -> _Blocks:
        """Blocks of even extents for an array; batch and channels lie apart."""
        inner = min(len(shape), max(_EDGES))
        edges = (1,) * (len(shape) - inner) + (_EDGES.get(inner, 1),) * inner
        return cls(shape, dtype, tuple(_even(n, edge) for n, edge in zip(shape, edges, strict=True)))

    @property
    def counts(self) -> tuple[int, ...]:
        """Blocks along each axis."""
        return tuple(-(-n // e) for n, e in zip(self.shape, self.extents, strict=True))

    @property
    def nbytes(self) -> int:
        """Of all blocks."""
        return math.prod(self.counts) * self._block_bytes

    @property
    def _block_bytes(self) -> int:
        return math.prod(self.extents) * self.dtype.itemsize

    def ordered_like(self, slab: Intervals) -> _Blocks:
        """The same with the axes of a block in the order in which slabs such as this one, the first, arrive.

        What a slab brings of a block is then one range of the file.
        """
        if self.order is not None:
            return self
        cut = [0 if len(i) == 1 else 1 if len(i) < n else 2 for i, n in zip(slab, self.shape, strict=True)]
        order = tuple(sorted(range(len(cut)), key=cut.__getitem__))
        return _Blocks(self.shape, self.dtype, self.extents, order)

    def write(self, file: int, box: Intervals, values: Array) -> None:
        """Store the values of a box."""
        for raw, part, inside in self._parts(box):
            write_box(file, raw, inside, values[..., *relative(part, box)])

    def read(self, file: int, cells: tuple[slice, ...]) -> Array:
        """The values of a box."""
        box = tuple(Interval(c.start, c.stop) for c in cells)
        found = np.empty([len(i) for i in box], self.dtype)
        for raw, part, inside in self._parts(box):
            found[..., *relative(part, box)] = read_box(file, raw, inside, Delivery(self.dtype))
        return found

    def _parts(self, box: Intervals) -> Iterator[tuple[RawArray, Intervals, Intervals]]:
        """Per block that a box meets: where the block lies, what they share, and the same within the block."""
        order = self.order or c_order(len(self.shape))
        touched = [range(i.start // e, -(-i.stop // e)) for i, e in zip(box, self.extents, strict=True)]
        for block in itertools.product(*touched):
            begins = [at * e for at, e in zip(block, self.extents, strict=True)]
            part = tuple(i & Interval(b, b + e) for i, b, e in zip(box, begins, self.extents, strict=True))
            inside = tuple(i.shift(-b) for i, b in zip(part, begins, strict=True))
            yield RawArray(self._number(block) * self._block_bytes, self.extents, self.dtype, order), part, inside

    def _number(self, block: Sequence[int]) -> int:
        number = 0
        for at, count in zip(block, self.counts, strict=True):
            number = number * count + at
        return number


def _even(cells: int, edge: int) -> int:
    """The extent of the fewest blocks of `edge` cells at most, none much smaller than the others."""
    return -(-cells // max(1, -(-cells // edge))) or 1


def _check_room(folder: Path, source: Source, needed: int) -> None:
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise PartitionError(
            f"{source.path}: its copy cannot be made in {folder} ({error.strerror}); set TMPDIR to a folder with room"
        ) from error
    if needed > free:
        raise PartitionError(
            f"{source.path}: its copy for reading in parts needs {readable_size(needed)}, {readable_size(free)} are "
            f"free in {folder}; set TMPDIR to a folder with more room, or give an uncompressed file"
        )


def _nameless(folder: Path, source: Source, size: int) -> int:
    """The descriptor of a new file in a folder that no longer lists it, its space taken."""
    with _filling(folder, source):
        file, name = tempfile.mkstemp(prefix="partitioner-", suffix=".spool", dir=folder)
        try:
            os.unlink(name)
            reserve(file, size)
        except BaseException:
            os.close(file)
            raise
    return file


@contextlib.contextmanager
def _filling(folder: Path, source: Source) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise ExecutionError(
            f"{source.path}: its copy in {folder} cannot be written ({error.strerror or error}); "
            "set TMPDIR to a folder with room"
        ) from error
