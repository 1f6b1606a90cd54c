"""How files are read: boxes of a mapped file, boxes of a file in chunks, or one pass over a compressed stream."""

from __future__ import annotations

import contextlib
import io
import lzma
import math
import os
import zipfile
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from partitioner.errors import PartitionError
from partitioner.geometry import Interval
from runtime.volumes.base import DEFAULT_SLAB_BYTES, Array, DType, Meta, Span, resolve
from runtime.volumes.raw import TILE_BYTES, Delivery, Intervals, RawArray, chunk_tiles, read_box, relative, tiles

OpenStream = Callable[[], contextlib.AbstractContextManager[io.BufferedIOBase]]
"""Opens a stream of decompressed bytes that stands at the first value."""

Fetch = Callable[[tuple[slice, ...]], Array]
"""Reads the stored values of a box through a library."""

STREAM_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, RuntimeError)
"""What the libraries raise for a damaged, cut or encrypted stream."""

_FLOAT64_BYTES = 8
_DRAIN_BYTES = 2**20


@dataclass(frozen=True)
class Contents:
    """What a source delivers: where the values lie, what they become, and where the volume lies."""

    path: Path
    raw: RawArray
    delivery: Delivery
    meta: Meta | None = None

    def slab_tiles(self, max_bytes: int) -> Iterator[Intervals]:
        """The whole array as consecutive tiles (axes in file order) that fit `max_bytes` with conversion."""
        per_cell = self.raw.dtype.itemsize + self.delivery.dtype.itemsize
        per_cell += 0 if self.delivery.is_cast else _FLOAT64_BYTES
        whole = tuple(Interval(0, self.raw.shape[axis]) for axis in self.raw.order)
        return tiles(whole, self.raw.strides, max(1, max_bytes * self.raw.dtype.itemsize // per_cell))


class _Opened:
    """What both kinds of source say of their contents."""

    def __init__(self, contents: Contents) -> None:
        self.contents = contents

    @property
    def path(self) -> Path:
        return self.contents.path

    @property
    def shape(self) -> tuple[int, ...]:
        return self.contents.raw.shape

    @property
    def dtype(self) -> DType:
        return self.contents.delivery.dtype

    @property
    def meta(self) -> Meta | None:
        return self.contents.meta

    @property
    def notices(self) -> tuple[str, ...]:
        return ()

    def close(self) -> None:
        """Let go of the file."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class MappedSource(_Opened):
    """A volume whose values lie as they are in a file; the file stays open, so replacing it does no harm.

    Raises:
        PartitionError: the file is shorter than its header says.
    """

    random_access = True

    def __init__(self, contents: Contents) -> None:
        super().__init__(contents)
        self._file = open_binary(contents.path)
        size = os.fstat(self._file.fileno()).st_size
        if size < (needed := contents.raw.offset + contents.raw.nbytes):
            self._file.close()
            raise PartitionError(
                f"{contents.path}: cut short, {size} bytes where its header needs {needed}; copy it again"
            )

    def read(self, box: Sequence[Span] | None = None) -> Array:
        """See `Source.read`."""
        contents = self.contents
        return read_box(self._file.fileno(), contents.raw, resolve(box, self.shape), contents.delivery)

    def slabs(self, max_bytes: int = DEFAULT_SLAB_BYTES) -> Iterator[tuple[tuple[int, ...], Array]]:
        """See `Source.slabs`."""
        for tile in self.contents.slab_tiles(max_bytes):
            box = self.contents.raw.presented(tile)
            yield tuple(i.start for i in box), self.read(box)

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()


class ChunkedSource(_Opened):
    """A volume of which a library reads boxes, chunk by chunk.

    Args:
        contents: `raw` tells extents and type; its offset means nothing.
        chunks: extents of the pieces that the library reads whole.
        fetch: raises `PartitionError` for damaged files.
        close: lets go of the file.
    """

    random_access = True

    def __init__(self, contents: Contents, chunks: tuple[int, ...], fetch: Fetch,
                 close: Callable[[], None] = lambda: None) -> None:
        super().__init__(contents)
        self._chunks = tuple(max(1, extent) for extent in chunks)
        self._fetch = fetch
        self._close = close

    def read(self, box: Sequence[Span] | None = None) -> Array:
        """See `Source.read`."""
        contents, wanted = self.contents, resolve(box, self.shape)
        out = np.empty([len(i) for i in wanted], self.dtype)
        for tile in chunk_tiles(wanted, self._chunks, TILE_BYTES // contents.raw.dtype.itemsize):
            stored = self._fetch(tuple(slice(i.start, i.stop) for i in tile))
            contents.delivery.convert(stored, out[..., *relative(tile, wanted)])
        return out

    def slabs(self, max_bytes: int = DEFAULT_SLAB_BYTES) -> Iterator[tuple[tuple[int, ...], Array]]:
        """See `Source.slabs`."""
        for tile in self.contents.slab_tiles(max_bytes):
            yield tuple(i.start for i in tile), self.read(tile)

    def close(self) -> None:
        """Let go of the file."""
        self._close()


class StreamedSource(_Opened):
    """A compressed volume: `slabs` passes over it once, `read` passes over it until its box is full."""

    random_access = False

    def __init__(self, contents: Contents, open_stream: OpenStream) -> None:
        super().__init__(contents)
        self._open_stream = open_stream

    def read(self, box: Sequence[Span] | None = None) -> Array:
        """See `Source.read`."""
        wanted = resolve(box, self.shape)
        out = np.empty([len(i) for i in wanted], self.dtype)
        missing = out.size
        if not missing:
            return out
        with contextlib.closing(self._slabs(DEFAULT_SLAB_BYTES)) as slabs:
            for held, values in slabs:
                common = tuple(a & b for a, b in zip(held, wanted, strict=True))
                if not all(common):
                    continue
                out[..., *relative(common, wanted)] = values[..., *relative(common, held)]
                missing -= math.prod(len(i) for i in common)
                if not missing:
                    break
        return out

    def slabs(self, max_bytes: int = DEFAULT_SLAB_BYTES) -> Iterator[tuple[tuple[int, ...], Array]]:
        """See `Source.slabs`."""
        with contextlib.closing(self._slabs(max_bytes)) as slabs:
            for box, values in slabs:
                yield tuple(i.start for i in box), values

    def _slabs(self, max_bytes: int) -> Generator[tuple[Intervals, Array]]:
        contents, raw = self.contents, self.contents.raw
        with contextlib.ExitStack() as stack:
            with stream_errors(contents.path):
                stream = stack.enter_context(self._open_stream())
            for tile in contents.slab_tiles(max_bytes):
                stored = np.empty([len(i) for i in tile], raw.dtype)
                with stream_errors(contents.path):
                    _fill(stream, stored)
                box = raw.presented(tile)
                values = np.empty([len(i) for i in box], self.dtype)
                contents.delivery.convert(stored, values.transpose(raw.order))
                del stored
                yield box, values
            with stream_errors(contents.path):
                while stream.read(_DRAIN_BYTES):  # the checksum is compared at the very end
                    pass


@contextlib.contextmanager
def stream_errors(path: Path) -> Generator[None]:
    """Turn what a library says of a damaged file into one line.

    Raises:
        PartitionError: in place of the library's error.
    """
    try:
        yield
    except STREAM_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise PartitionError(f"{path}: damaged or cut short ({reason}); copy or write it again") from error


def open_binary(path: Path) -> io.BufferedReader:
    """Open a file for reading.

    Raises:
        PartitionError: it is not there, no regular file, or not readable.
    """
    if not path.exists():
        raise PartitionError(f"{path}: no such file; check the path")
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "no regular file"
        raise PartitionError(f"{path}: is {kind}; give a volume file")
    try:
        return path.open("rb")
    except OSError as error:
        raise PartitionError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error


def skip(stream: io.BufferedIOBase, count: int) -> None:
    """Read and drop `count` bytes.

    Raises:
        EOFError: the stream ends before.
    """
    while count:
        dropped = len(stream.read(min(count, _DRAIN_BYTES)))
        if not dropped:
            raise EOFError("it ends before its data")
        count -= dropped


def _fill(stream: io.BufferedIOBase, array: Array) -> None:
    rest = array.reshape(-1).view(np.uint8).data
    while rest:
        count = stream.readinto(rest)
        if not count:
            raise EOFError(f"its data end {len(rest)} bytes too early")
        rest = rest[count:]
