"""Writing a volume from many processes: a temporary file or folder beside the target, filled in parts, then renamed."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import shutil
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np

from partitioner.errors import ExecutionError, PartitionError
from runtime.volumes.base import Array, FileImage, Span, readable_size, resolve
from runtime.volumes.chunks import ChunkedArray, ChunkWriter
from runtime.volumes.raw import Intervals, RawArray, reserve, write_box, write_range


@dataclass(frozen=True)
class PartFile:
    """All that a process needs to write its parts; travels by pickle or as JSON.

    Args:
        target: the file that is being made, for messages.
        temporary: absolute path of the file that the parts go to, or of the folder.
        size: of the temporary file, in bytes; of all files in the folder that are to come.
        arrays: by name, where the values go in the file.
        chunked: by name, where the values go in the folder; there is a file where there are none.
    """

    target: str
    temporary: str
    size: int
    arrays: tuple[tuple[str, RawArray], ...]
    chunked: tuple[tuple[str, ChunkedArray], ...] = ()

    def to_json(self) -> str:
        """As text."""
        known = dataclasses.asdict(self)
        for _, array in (*known["arrays"], *known["chunked"]):
            array["dtype"] = array["dtype"].str
        return json.dumps(known)

    @classmethod
    def from_json(cls, text: str) -> PartFile:
        """The inverse of `to_json`."""
        known = json.loads(text)
        arrays = tuple((name, RawArray(**_revived(fields))) for name, fields in known.pop("arrays"))
        chunked = tuple((name, ChunkedArray(**_revived(fields))) for name, fields in known.pop("chunked"))
        return cls(**known, arrays=arrays, chunked=chunked)

    def remove(self) -> None:
        """Remove what was written so far; harmless when it is gone."""
        if self.chunked:
            shutil.rmtree(self.temporary, ignore_errors=True)
            return
        for name in (self.temporary, self.packed):
            with contextlib.suppress(OSError):
                os.unlink(name)

    @property
    def packed(self) -> str:
        """Where a file that is packed at the end is made of the temporary one."""
        return f"{self.temporary}.packed"


def _revived(fields: dict[str, Any]) -> dict[str, Any]:
    found = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    return {**found, "dtype": np.dtype(found["dtype"])}


class Writer:
    """Writes boxes of the arrays of a prepared file or folder; `with` closes it.

    Raises:
        PartitionError: the temporary file is not there (another host, a folder that is not shared).
    """

    def __init__(self, part: PartFile) -> None:
        self._part = part
        self._arrays: dict[str, RawArray | ChunkedArray] = {**dict(part.arrays), **dict(part.chunked)}
        if part.chunked:
            folder = _opened_folder(part)
            stores = {name: partial(folder.write, array) for name, array in part.chunked}
        else:
            folder = _OneFile(part)
            stores = {name: partial(folder.write, raw) for name, raw in part.arrays}
        self._target: _OneFile | ChunkWriter | None = folder
        self._stores: dict[str, Callable[[Intervals, Array], None]] = stores

    def write(self, box: Sequence[Span] | None, array: Array, name: str | None = None) -> None:
        """Store the values of a box (None: all), one span per axis.

        Args:
            box: where, in the axes of the array as the model gives it.
            array: the values, of the box's shape; their type must fit the stored one without loss.
            name: which array, where the file holds several.

        Raises:
            ValueError: the box, shape, type or name does not fit the file.
            ExecutionError: the disk is full or gone.
        """
        known = self._known(name)
        raw = self._arrays[known]
        place = resolve(box, raw.shape)
        if array.shape != tuple(len(i) for i in place):
            raise ValueError(f"values of shape {array.shape} for the box [{', '.join(map(str, place))}]")
        if not np.can_cast(array.dtype, raw.dtype, "safe"):
            raise ValueError(f"{array.dtype} values for a file of {raw.dtype}")
        with _writing(self._part.target):
            self._stores[known](place, array)

    def flush(self) -> None:
        """Bring everything to the disk, and go on.

        Raises:
            ExecutionError: the disk is full or gone.
        """
        if self._target is not None:
            with _writing(self._part.target):
                self._target.flush()

    def close(self) -> None:
        """Bring everything to the disk and let go of the file; harmless when repeated.

        Raises:
            ExecutionError: the disk is full or gone.
        """
        target, self._target = self._target, None
        if target is not None:
            with _writing(self._part.target):
                target.close()

    def _known(self, name: str | None) -> str:
        if self._target is None:
            raise ValueError(f"the writer of {self._part.target} is closed")
        if name is None and len(self._arrays) == 1:
            return next(iter(self._arrays))
        if name is None or name not in self._arrays:
            raise ValueError(f"array {name!r} is none of {', '.join(self._arrays)}")
        return name

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _OneFile:
    """Writes boxes of arrays that lie in one file."""

    def __init__(self, part: PartFile) -> None:
        # Without leave to read, a network file system sends the bytes given and not the pages around them.
        try:
            self._file = os.open(part.temporary, os.O_WRONLY | os.O_CLOEXEC)
        except OSError as error:
            raise PartitionError(_unreachable(part, str(error.strerror))) from error
        if (size := os.fstat(self._file).st_size) != part.size:
            self.close()
            raise PartitionError(_unreachable(part, f"{size} bytes where {part.size} were prepared"))

    def write(self, raw: RawArray, box: Intervals, values: Array) -> None:
        """Store the values of a box."""
        write_box(self._file, raw, box, values)

    def flush(self) -> None:
        """Bring everything to the disk."""
        os.fsync(self._file)

    def close(self) -> None:
        """Bring everything to the disk and let go of the file."""
        try:
            self.flush()
        finally:
            os.close(self._file)


def _opened_folder(part: PartFile) -> ChunkWriter:
    if not os.path.isdir(part.temporary):
        raise PartitionError(_unreachable(part, "no such folder"))
    return ChunkWriter(part.temporary)


class Sink(ABC):
    """A volume file or folder in the making; the target stays as it was until `commit`.

    One process calls `prepare`, then any number write through `open_part(sink.part)`, and when all of
    them have closed their writers the first calls `commit` or `abort`.  As a context manager it prepares
    at the start and commits at the end, or aborts when an exception passes.

    Args:
        target: where it will be, links followed.
        part: where it is made.
    """

    def __init__(self, target: Path, part: PartFile) -> None:
        self._target = target
        self.part = part

    def prepare(self) -> None:
        """Create the temporary file in its full size, with the space reserved and the headers written.

        Raises:
            PartitionError: no space, or no leave to write there.
        """
        self._check_space()
        try:
            self._create()
        except OSError as error:
            self.abort()
            raise PartitionError(
                f"{self.part.target}: cannot be written ({error.strerror}); choose another folder"
            ) from error

    def writer(self) -> Writer:
        """A writer in this process."""
        return Writer(self.part)

    def commit(self, keep: bool = False) -> None:
        """Finish the file, bring it to the disk and give it its name, replacing an older one.

        Args:
            keep: leave what was written where that fails, to be tried again.

        Raises:
            ExecutionError: the disk is full or gone; nothing else is left behind and an older file stays.
        """
        try:
            with _writing(self.part.target):
                self._finish()
        except BaseException:
            if not keep:
                self.abort()
            raise
        flush(self._target.parent)
        self.abort()  # what the finished file was made of

    def abort(self) -> None:
        """Remove what was written; an older file of the target's name stays.  Harmless when repeated."""
        self.part.remove()

    def __enter__(self) -> Self:
        self.prepare()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.commit()
        else:
            self.abort()

    @property
    @abstractmethod
    def _needed(self) -> int:
        """The most space that is taken before the end, in bytes."""

    @abstractmethod
    def _create(self) -> None:
        """Make the temporary file or folder."""

    @abstractmethod
    def _finish(self) -> None:
        """Bring it to the disk and give it its name."""

    def _check_space(self) -> None:
        try:
            free = shutil.disk_usage(self._target.parent).free
        except OSError:  # some file systems do not say; reserving the space will tell
            return
        if self._needed > free:
            raise PartitionError(
                f"{self.part.target}: needs {readable_size(self._needed)}, {readable_size(free)} are free; "
                "free some space or choose another folder"
            )


class FileSink(Sink):
    """See `Sink`.

    Args:
        target: where the file will be.
        image: its layout.
    """

    def __init__(self, target: Path, image: FileImage) -> None:
        real = _checked_target(target)
        super().__init__(real, PartFile(str(target), str(beside(real)), image.size, image.arrays))
        self._image = image

    @property
    def _needed(self) -> int:
        # A packed file stands beside its unpacked image until that is removed, and may be as large.
        return self._image.size * (1 if self._image.pack is None else 2)

    def _create(self) -> None:
        file = os.open(self.part.temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, self._mode())
        try:
            reserve(file, self._image.size)
            for offset, block in self._image.blocks:
                write_range(file, block, offset)
        finally:
            os.close(file)

    def _finish(self) -> None:
        finished = Path(self.part.temporary) if self._image.pack is None else self._pack()
        flush(finished)
        finished.replace(self._target)

    def _pack(self) -> Path:
        assert self._image.pack is not None
        found = Path(self.part.packed)
        found.unlink(missing_ok=True)  # of a process that was killed here
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            with (
                Path(self.part.temporary).open("rb") as image,
                os.fdopen(os.open(found, flags, self._mode()), "wb") as packed,
            ):
                self._image.pack(image, packed)
        except BaseException:
            found.unlink(missing_ok=True)
            raise
        return found

    def _mode(self) -> int:
        """Permissions of the file that is replaced, or those of any new file."""
        with contextlib.suppress(OSError):
            return stat.S_IMODE(self._target.stat().st_mode)
        return 0o666


def open_part(part: PartFile | str) -> Writer:
    """Open a prepared file for writing, from its description or that in JSON.

    Raises:
        PartitionError: it is not there, as on a host that does not share the folder.
    """
    return Writer(PartFile.from_json(part) if isinstance(part, str) else part)


def _checked_target(target: Path) -> Path:
    """The absolute path of the target, links followed, so that a link's file is replaced and not the link."""
    real = Path(os.path.realpath(target))
    if real.is_dir():
        raise PartitionError(f"{target}: is a folder; name a file in it")
    if real.exists() and not real.is_file():
        raise PartitionError(f"{target}: is no regular file and cannot be replaced; choose another path")
    check_parent(target, real)
    return real


def check_parent(target: Path, real: Path) -> None:
    """Make sure that the target's folder can be written.

    Raises:
        PartitionError: it cannot.
    """
    if not real.parent.is_dir():
        raise PartitionError(f"{target}: the folder {real.parent} does not exist; create it first")
    if not os.access(real.parent, os.W_OK | os.X_OK):
        raise PartitionError(f"{target}: no leave to write in {real.parent}; choose another folder")


def beside(target: Path) -> Path:
    """A new name in the folder of the target."""
    return target.with_name(f"{target.name}.{secrets.token_hex(4)}.part")


def flush(path: Path) -> None:
    """Bring a file, or a folder's entries, to the disk."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)


@contextlib.contextmanager
def _writing(target: str) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise ExecutionError(
            f"{target}: writing failed ({error.strerror or error}); free some space or choose another folder"
        ) from error


def _unreachable(part: PartFile, reason: str) -> str:
    return (
        f"{part.target}: its temporary file {part.temporary} cannot be used here ({reason}); "
        "write to a folder that all hosts share"
    )
