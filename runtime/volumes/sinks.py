"""Writing a volume from many processes: a temporary file beside the target, filled in parts, then renamed."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
import stat
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from partitioner.errors import ExecutionError, PartitionError
from runtime.volumes.base import Array, FileImage, Span, readable_size, resolve
from runtime.volumes.raw import RawArray, write_box, write_range

_NO_RESERVATION = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@dataclass(frozen=True)
class PartFile:
    """All that a process needs to write its parts; travels by pickle or as JSON.

    Args:
        target: the file that is being made, for messages.
        temporary: absolute path of the file that the parts go to.
        size: of the temporary file, in bytes.
        arrays: by name, where the values go.
    """

    target: str
    temporary: str
    size: int
    arrays: tuple[tuple[str, RawArray], ...]

    def to_json(self) -> str:
        """As text."""
        arrays = [
            {"name": name, "offset": a.offset, "shape": a.shape, "dtype": a.dtype.str, "order": a.order}
            for name, a in self.arrays
        ]
        known = {"target": self.target, "temporary": self.temporary, "size": self.size, "arrays": arrays}
        return json.dumps(known)

    @classmethod
    def from_json(cls, text: str) -> PartFile:
        """The inverse of `to_json`."""
        known = json.loads(text)
        arrays = [
            (a["name"], RawArray(a["offset"], tuple(a["shape"]), np.dtype(a["dtype"]), tuple(a["order"])))
            for a in known["arrays"]
        ]
        return cls(known["target"], known["temporary"], known["size"], tuple(arrays))


class Writer:
    """Writes boxes of the arrays of a prepared file; `with` closes it.

    Raises:
        PartitionError: the temporary file is not there (another host, a folder that is not shared).
    """

    def __init__(self, part: PartFile) -> None:
        self._part = part
        self._arrays = dict(part.arrays)
        # Without leave to read, a network file system sends the bytes given and not the pages around them.
        try:
            self._file = os.open(part.temporary, os.O_WRONLY | os.O_CLOEXEC)
        except OSError as error:
            raise PartitionError(_unreachable(part, str(error.strerror))) from error
        if (size := os.fstat(self._file).st_size) != part.size:
            self.close()
            raise PartitionError(_unreachable(part, f"{size} bytes where {part.size} were prepared"))

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
        raw = self._raw(name)
        place = resolve(box, raw.shape)
        if array.shape != tuple(len(i) for i in place):
            raise ValueError(f"values of shape {array.shape} for the box [{', '.join(map(str, place))}]")
        if not np.can_cast(array.dtype, raw.dtype, "safe"):
            raise ValueError(f"{array.dtype} values for a file of {raw.dtype}")
        with _writing(self._part.target):
            write_box(self._file, raw, place, array)

    def close(self) -> None:
        """Bring everything to the disk and let go of the file; harmless when repeated.

        Raises:
            ExecutionError: the disk is full or gone.
        """
        if self._file < 0:
            return
        file, self._file = self._file, -1
        try:
            with _writing(self._part.target):
                os.fsync(file)
        finally:
            os.close(file)

    def _raw(self, name: str | None) -> RawArray:
        if self._file < 0:
            raise ValueError(f"the writer of {self._part.target} is closed")
        if name is None and len(self._arrays) == 1:
            return self._part.arrays[0][1]
        if name not in self._arrays:
            raise ValueError(f"array {name!r} is none of {', '.join(self._arrays)}")
        return self._arrays[name]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Sink:
    """A volume file in the making; the target stays as it was until `commit`.

    One process calls `prepare`, then any number write through `open_part(sink.part)`, and when all of
    them have closed their writers the first calls `commit` or `abort`.  As a context manager it prepares
    at the start and commits at the end, or aborts when an exception passes.

    Args:
        target: where the file will be.
        image: its layout.
    """

    def __init__(self, target: Path, image: FileImage) -> None:
        self._target = _checked_target(target)
        self._image = image
        temporary = self._target.with_name(f"{self._target.name}.{secrets.token_hex(4)}.part")
        self.part = PartFile(str(target), str(temporary), image.size, image.arrays)
        self._packed = temporary.with_name(f"{temporary.name}.packed")

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

    def commit(self) -> None:
        """Finish the file, bring it to the disk and give it its name, replacing an older one.

        Raises:
            ExecutionError: the disk is full or gone; nothing is left behind and an older file stays.
        """
        temporary = Path(self.part.temporary)
        try:
            with _writing(self.part.target):
                finished = temporary if self._image.pack is None else self._pack()
                _flush(finished)
                finished.replace(self._target)
        except BaseException:
            self.abort()
            raise
        _flush(self._target.parent)
        temporary.unlink(missing_ok=True)

    def abort(self) -> None:
        """Remove what was written; an older file of the target's name stays.  Harmless when repeated."""
        for path in (Path(self.part.temporary), self._packed):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        self.prepare()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.commit()
        else:
            self.abort()

    def _check_space(self) -> None:
        # A packed file stands beside its unpacked image until that is removed, and may be as large.
        needed = self._image.size * (1 if self._image.pack is None else 2)
        try:
            free = shutil.disk_usage(self._target.parent).free
        except OSError:  # some file systems do not say; reserving the space will tell
            return
        if needed > free:
            raise PartitionError(
                f"{self.part.target}: needs {readable_size(needed)}, {readable_size(free)} are free; "
                "free some space or choose another folder"
            )

    def _create(self) -> None:
        file = os.open(self.part.temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, self._mode())
        try:
            reserve(file, self._image.size)
            for offset, block in self._image.blocks:
                write_range(file, block, offset)
        finally:
            os.close(file)

    def _pack(self) -> Path:
        assert self._image.pack is not None
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with (
            Path(self.part.temporary).open("rb") as image,
            os.fdopen(os.open(self._packed, flags, self._mode()), "wb") as packed,
        ):
            self._image.pack(image, packed)
        return self._packed

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
    if not real.parent.is_dir():
        raise PartitionError(f"{target}: the folder {real.parent} does not exist; create it first")
    if not os.access(real.parent, os.W_OK | os.X_OK):
        raise PartitionError(f"{target}: no leave to write in {real.parent}; choose another folder")
    return real


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


def _flush(path: Path) -> None:
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
