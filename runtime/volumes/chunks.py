"""Arrays as one file per chunk, each a plain array of the same extents: what Zarr calls a store without compression.

Every cell has its place in the file of its chunk, so several processes write boxes that end anywhere, also in one
chunk: each writes its own ranges of bytes and reads none.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from partitioner.geometry import Interval
from runtime.volumes.raw import Array, DType, Intervals, RawArray, c_order, relative, write_box

CHUNK_BYTES = 16 * 2**20
"""The largest chunk; the parts in which an array is written are chunks themselves when they are no larger."""

_BATCH_AND_CHANNEL = 2


@dataclass(frozen=True)
class ChunkedArray:
    """Where an array lies in a folder: chunk i, j, k in the file `prefix/i/j/k`.

    Args:
        prefix: path within the folder.
        shape: extents as presented to the user.
        dtype: of the values in the files, byte order included.
        chunks: extents of every chunk; those at the end of an axis have cells to spare.
        kept: the axes that number the chunks; the others have one cell.
        lone: the file's name where no axis is kept.
    """

    prefix: str
    shape: tuple[int, ...]
    dtype: DType
    chunks: tuple[int, ...]
    kept: tuple[int, ...]
    lone: str = ""

    @property
    def chunk(self) -> RawArray:
        """A chunk in its file."""
        return RawArray(0, self.chunks, self.dtype, c_order(len(self.chunks)))

    @property
    def nbytes(self) -> int:
        """Size of all chunks."""
        counts = (-(-n // c) for n, c in zip(self.shape, self.chunks, strict=True))
        return math.prod(counts) * self.chunk.nbytes

    def parts(self, box: Intervals) -> Iterator[tuple[str, Intervals, Intervals]]:
        """Per chunk that a box meets: its file, the cells they share, and the same within the chunk."""
        touched = [range(i.start // c, -(-i.stop // c)) for i, c in zip(box, self.chunks, strict=True)]
        if not all(box):
            return
        for at in itertools.product(*touched):
            begins = [i * c for i, c in zip(at, self.chunks, strict=True)]
            part = tuple(i & Interval(b, b + c) for i, b, c in zip(box, begins, self.chunks, strict=True))
            inside = tuple(i.shift(-b) for i, b in zip(part, begins, strict=True))
            yield self._file(at), part, inside

    def _file(self, at: Sequence[int]) -> str:
        pieces = [str(at[axis]) for axis in self.kept] or [self.lone]
        return "/".join(piece for piece in (self.prefix, *pieces) if piece)


class ChunkWriter:
    """Writes boxes of arrays into the files of their chunks, which it makes as they are needed.

    Args:
        folder: holds the arrays' folders.
    """

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)
        self._written: set[Path] = set()

    def write(self, array: ChunkedArray, box: Intervals, values: Array) -> None:
        """Store the values of a box; concurrent writers of other boxes are not disturbed.

        Raises:
            OSError: the disk is full or gone.
        """
        for name, part, inside in array.parts(box):
            file = self._open(self._folder / name, array.chunk.nbytes)
            try:
                piece = values[..., *relative(part, box)]
                write_box(file, array.chunk, *_with_spare(array, part, inside, piece))
            finally:
                os.close(file)

    def close(self) -> None:
        """See `flush`; there is nothing to let go of."""
        self.flush()

    def flush(self) -> None:
        """Bring everything to the disk.

        Raises:
            OSError: the disk is full or gone.
        """
        written, self._written = self._written, set()
        for path in sorted(written):
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(file)
            finally:
                os.close(file)

    def _open(self, path: Path, size: int) -> int:
        if path not in self._written:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._written.add(path)
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            if os.fstat(file).st_size < size:  # another writer may do the same: no cell changes by it
                os.ftruncate(file, size)
        except BaseException:
            os.close(file)
            raise
        return file


def _with_spare(array: ChunkedArray, part: Intervals, inside: Intervals, values: Array) -> tuple[Intervals, Array]:
    """The box and its values with the chunk's spare cells behind the array's end: whole chunks are one range."""
    spare = [c - i.stop if p.stop == n else 0
             for p, i, n, c in zip(part, inside, array.shape, array.chunks, strict=True)]
    if not any(spare):
        return inside, values
    box = tuple(Interval(i.start, i.stop + more) for i, more in zip(inside, spare, strict=True))
    return box, np.pad(values, [(0, more) for more in spare])


def chunk_extents(shape: tuple[int, ...], tile: tuple[int, ...] | None, itemsize: int) -> tuple[int, ...]:
    """Chunks for an array that is written in tiles: the tile, or even parts of one that is too large.

    Args:
        tile: the largest extents of a part that is written at once; the whole array without one.
    """
    found = [max(1, min(n, t)) for n, t in zip(shape, tile or shape, strict=True)]
    first = _BATCH_AND_CHANNEL if len(found) > _BATCH_AND_CHANNEL else 0
    for axis in range(first):  # images and channels apart, before space is cut
        if math.prod(found) * itemsize > CHUNK_BYTES:
            found[axis] = 1
    while math.prod(found) * itemsize > CHUNK_BYTES and max(found[first:]) > 1:
        axis = max(range(first, len(found)), key=found.__getitem__)
        found[axis] = _part(found[axis])
    return tuple(found)


def _part(cells: int) -> int:
    """A half or a third of an extent, exactly where it can be, so that chunks go along the tiles."""
    return next((cells // parts for parts in (2, 3) if cells % parts == 0), -(-cells // 2))
