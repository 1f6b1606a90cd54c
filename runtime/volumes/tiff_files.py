"""TIFF files opened through tifffile, which logs what is wrong with a file and goes on: here that is an error."""

from __future__ import annotations

import contextlib
import logging
import struct
from collections.abc import Generator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from partitioner.errors import PartitionError
from runtime.volumes.pages import stretches

_SIGNS = ("missing", "truncat", "corrupt", "invalid offset", "failed to read")
"""What tifffile says of a file that is not all there, and goes on."""


def tifffile_of(path: Path) -> ModuleType:
    """The library.

    Raises:
        PartitionError: it is not installed.
    """
    try:
        import tifffile
    except ImportError as error:
        raise PartitionError(
            f"{path}: TIFF files need tifffile; install it with pip install 'partitioner[tiff]'"
        ) from error
    return tifffile


@contextlib.contextmanager
def opened_tiff(path: Path) -> Generator[Any]:
    """The file, all of its pages and images found.

    Raises:
        PartitionError: no such file, no TIFF file, or one that is not all there.
    """
    if not path.exists():
        raise PartitionError(f"{path}: no such file; check the path")
    if not path.is_file():
        raise PartitionError(f"{path}: is no regular file; give a volume file")
    tifffile = tifffile_of(path)
    with contextlib.ExitStack() as stack:
        try:
            with _listening() as said:
                file = stack.enter_context(tifffile.TiffFile(path))
                _follow(file)
                for series in file.series:
                    len(series.pages)
        except Exception as error:  # the library hands on whatever a damaged file leads to
            raise PartitionError(
                f"{path}: no TIFF file, or one that is damaged or cut short ({line_of(error)}); copy or write it again"
            ) from error
        if said:
            raise PartitionError(f"{path}: damaged or cut short ({said[0]}); copy or write it again")
        yield file


def _follow(file: Any) -> None:
    """Follow the pages to the last, which must be described to its end.

    Raises:
        EOFError: it is not.
    """
    if not len(file.pages):
        return
    handle, form, last = file.filehandle, file.tiff, file.pages[len(file.pages) - 1]
    handle.seek(last.offset)
    (tags,) = struct.unpack(form.tagnoformat, handle.read(form.tagnosize))
    ends = [tag.valueoffset + tag.valuebytecount for tag in getattr(last, "tags", ())]
    end = max(last.offset + form.tagnosize + tags * form.tagsize + form.offsetsize, *ends, 0)
    if end > handle.size:
        raise EOFError(f"{handle.size} bytes where its description needs {end}")


class _Ear(logging.Handler):
    """Keeps what the library logs of a damaged file."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler`."""
        line = " ".join(record.getMessage().split())
        if record.levelno >= logging.ERROR or any(sign in line for sign in _SIGNS):
            self.said.append(line.rpartition("> ")[2][:200])


@contextlib.contextmanager
def _listening() -> Generator[list[str]]:
    """What tifffile logs in the block instead of raising; it does not reach the screen."""
    logger, ear = logging.getLogger("tifffile"), _Ear()
    passed_on = logger.propagate
    logger.addHandler(ear)
    logger.propagate = False
    try:
        yield ear.said
    finally:
        logger.propagate = passed_on
        logger.removeHandler(ear)


def check_pages(where: Path, pages: Sequence[Any], size: int) -> None:
    """Make sure that a file of this size holds all that its pages store.

    Raises:
        PartitionError: it is shorter.
    """
    needed = max((end for page in pages for _, end in stretches(page)), default=0)
    if needed > size:
        raise PartitionError(f"{where}: cut short, {size} bytes where its pages need {needed}; copy it again")


def check_decoder(where: Path, form: Any) -> None:
    """Make sure that pages like this one can be decoded.

    Raises:
        PartitionError: they cannot.
    """
    if form.is_final:
        return
    try:
        if form.shaped[1] > 1:
            raise ValueError("pages with a depth of their own")
        form.decode(None, 0)
    except Exception as error:
        remedy = "install it with pip install imagecodecs" if "imagecodecs" in str(error) else "convert it"
        raise PartitionError(f"{where}: cannot be decoded ({line_of(error)}); {remedy}") from error


def line_of(error: BaseException) -> str:
    """What an error says, in one line."""
    return (" ".join(str(error).split()) or type(error).__name__)[:200]
