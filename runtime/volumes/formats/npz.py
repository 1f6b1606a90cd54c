"""numpy's .npz: arrays by name in a zip archive; stored members are mapped, deflated ones streamed."""

from __future__ import annotations

import contextlib
import functools
import io
import struct
import zipfile
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

from partitioner.errors import PartitionError
from runtime.volumes.base import ArraySpec, DType, FileImage, Source, delivered_dtype
from runtime.volumes.formats.npy import plan_array, read_header
from runtime.volumes.raw import Delivery, RawArray
from runtime.volumes.sources import (
    STREAM_ERRORS,
    Contents,
    MappedSource,
    StreamedSource,
    open_binary,
    skip,
    stream_errors,
)

_ENDING = ".npy"
_ALIGNMENT = 64
_COPY_BYTES = 4 * 2**20
# A member's local header: 26 bytes, then the lengths of its name and of its extra field, then those two.
_LENGTHS = struct.Struct("<26xHH")
# Members are dated like this, so that the same arrays give the same file.
_DATE = (1980, 1, 1, 0, 0, 0)


class NpzFormat:
    """See `VolumeFormat`."""

    suffixes = (".npz",)
    is_folder, has_names, read_only = False, True, ()

    def names(self, path: Path) -> tuple[str, ...]:
        """The members, without their ending."""
        with _opened(path) as archive:
            return tuple(_members(archive))

    def open_source(self, path: Path, name: str | None, dtype: DType | None) -> Source:
        """See `VolumeFormat.open_source`."""
        with _opened(path) as archive:
            member = _choose(path, _members(archive), name)
            with stream_errors(path), archive.open(member) as stream:
                raw = read_header(f"{path} ({member.filename})", stream)
        delivery = Delivery(delivered_dtype(path, raw.dtype, dtype))
        if member.compress_type == zipfile.ZIP_STORED:
            _check_sum(path, member)
            placed = RawArray(_begin(path, member) + raw.offset, raw.shape, raw.dtype, raw.order)
            return MappedSource(Contents(path, placed, delivery))
        opener = partial(_stream, path, member.filename, raw.offset)
        return StreamedSource(Contents(path, raw, delivery), opener)

    def lay_out(self, path: Path, arrays: Sequence[ArraySpec], like: Source | None) -> FileImage:
        """See `VolumeFormat.lay_out`."""
        names = [spec.name for spec in arrays]
        if not all(names) or len(set(names)) != len(names):
            raise PartitionError(f"{path}: its arrays need distinct names, not {', '.join(names)}")
        blocks: list[tuple[int, bytes]] = []
        places: list[tuple[str, RawArray]] = []
        members: list[_Member] = []
        end = 0
        for spec in arrays:
            begin = -(-end // _ALIGNMENT) * _ALIGNMENT
            header, raw = plan_array(path, spec, begin)
            end = raw.offset + raw.nbytes
            blocks.append((begin, header))
            places.append((spec.name, raw))
            members.append(_Member(spec.name + _ENDING, begin, end))
        return FileImage(tuple(blocks), tuple(places), end, partial(_pack, members))


FORMAT = NpzFormat()


@dataclass(frozen=True)
class _Member:
    """The bytes [begin, end) of the image become the member of this name."""

    name: str
    begin: int
    end: int


@functools.cache
def _summed(path: Path, name: str, modified: int) -> None:
    """Read a member to its end once, so that its checksum is compared."""
    with _opened(path) as archive, stream_errors(path), archive.open(name) as stream:
        while stream.read(_COPY_BYTES):
            pass


def _check_sum(path: Path, member: zipfile.ZipInfo) -> None:
    """Make sure that a member which will be mapped, not read through the archive, is as it was written."""
    _summed(path, member.filename, path.stat().st_mtime_ns)


@contextlib.contextmanager
def _opened(path: Path) -> Generator[zipfile.ZipFile]:
    with open_binary(path) as file:
        try:
            archive = zipfile.ZipFile(file)
        except (*STREAM_ERRORS, ValueError) as error:
            raise PartitionError(
                f"{path}: no .npz archive, or one cut short ({error}); write it with numpy.savez"
            ) from error
        with archive:
            yield archive


def _members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    return {m.filename.removesuffix(_ENDING): m for m in archive.infolist() if m.filename.endswith(_ENDING)}


def _choose(path: Path, members: dict[str, zipfile.ZipInfo], name: str | None) -> zipfile.ZipInfo:
    held = ", ".join(members)
    if not members:
        raise PartitionError(f"{path}: holds no array; write it with numpy.savez")
    if name is None and len(members) > 1:
        raise PartitionError(f"{path}: holds several arrays ({held}); name one")
    if name is not None and name.removesuffix(_ENDING) not in members:
        raise PartitionError(f"{path}: holds no array '{name}'; it has {held}")
    return next(iter(members.values())) if name is None else members[name.removesuffix(_ENDING)]


def _begin(path: Path, member: zipfile.ZipInfo) -> int:
    """Offset of a member's first byte; its local header need not be as long as the directory says."""
    with open_binary(path) as file:
        file.seek(member.header_offset)
        name, extra = _LENGTHS.unpack(file.read(_LENGTHS.size))
    return member.header_offset + _LENGTHS.size + name + extra


@contextlib.contextmanager
def _stream(path: Path, member: str, offset: int) -> Generator[io.BufferedIOBase]:
    with zipfile.ZipFile(path) as archive, archive.open(member) as stream:
        assert isinstance(stream, io.BufferedIOBase)
        skip(stream, offset)
        yield stream


def _pack(members: Sequence[_Member], image: BinaryIO, packed: BinaryIO) -> None:
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
        for member in members:
            image.seek(member.begin)
            with archive.open(zipfile.ZipInfo(member.name, _DATE), "w", force_zip64=True) as stream:
                rest = member.end - member.begin
                while rest:
                    block = image.read(min(rest, _COPY_BYTES))
                    stream.write(block)
                    rest -= len(block)
