"""Volumes that are folders: what files they hold, and how one is made beside its target, in parts, then renamed."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from pathlib import Path

from partitioner.errors import PartitionError
from runtime.volumes.base import FolderImage
from runtime.volumes.sinks import PartFile, Sink, beside, check_parent, flush

_PREAMBLE, _MAGIC = 128, b"DICM"


class FolderSink(Sink):
    """See `Sink`.

    Args:
        target: where the folder will be; one that is there is replaced, if the layout's `check` allows it.
        image: its layout.
    """

    def __init__(self, target: Path, image: FolderImage) -> None:
        real = Path(os.path.realpath(target))
        if real.exists() and not real.is_dir():
            raise PartitionError(f"{target}: is a file, a folder is to be written; remove it or choose another path")
        check_parent(target, real)
        if real.exists():
            image.check(target)
        super().__init__(real, PartFile(str(target), str(beside(real)), image.size, (), image.arrays))
        self._image = image

    @property
    def _needed(self) -> int:
        return self._image.size

    def _create(self) -> None:
        temporary = Path(self.part.temporary)
        temporary.mkdir()
        for name, block in self._image.files:
            path = temporary / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("xb") as file:
                file.write(block)
                file.flush()
                os.fsync(file.fileno())

    def _finish(self) -> None:
        temporary = Path(self.part.temporary)
        for folder, _, _ in os.walk(temporary):
            flush(Path(folder))
        if not self._target.exists():
            temporary.rename(self._target)
            return
        old = beside(self._target)
        self._target.rename(old)
        try:
            temporary.rename(self._target)
        except BaseException:
            with contextlib.suppress(OSError):
                old.rename(self._target)
            raise
        shutil.rmtree(old, ignore_errors=True)


def visible_files(folder: Path) -> list[str]:
    """Names of the files in a folder, hidden ones left out, in natural order (a2 before a10).

    Raises:
        OSError: it cannot be read.
    """
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if not entry.name.startswith(".") and entry.is_file()]
    return sorted(names, key=_natural)


def _natural(name: str) -> tuple[tuple[int, int | str], ...]:
    pieces = re.split(r"(\d+)", name.lower())
    return (*((0, int(p)) if p.isdecimal() else (1, p) for p in pieces), (1, name))


def is_dicom(path: Path) -> bool:
    """Whether a file begins as DICOM files do."""
    try:
        with path.open("rb") as file:
            return file.read(_PREAMBLE + len(_MAGIC))[_PREAMBLE:] == _MAGIC
    except OSError:
        return False
