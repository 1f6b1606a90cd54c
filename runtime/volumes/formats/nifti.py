"""NIfTI-1 and NIfTI-2 in one file, plain (mapped) or gzipped (streamed), through nibabel.

    in the file   x y z          presented as   1 1 x y z
                  x y z t                       1 t x y z
                  x y z 1 c                     1 c x y z

x is the fastest axis of the file.  Written the same way: one channel as x y z, several as x y z c.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import shutil
import struct
import zlib
from collections.abc import Generator, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np

from partitioner.errors import PartitionError
from runtime.volumes.base import (
    ArraySpec,
    DType,
    FileImage,
    Meta,
    Source,
    delivered_dtype,
    only_array,
    stored_dtype,
)
from runtime.volumes.raw import Delivery, RawArray
from runtime.volumes.sources import Contents, MappedSource, StreamedSource, open_binary, skip, stream_errors

_PACKED = ".nii.gz"
_SPATIAL = 3
_RANK = 5
# batch, channel, z, y, x: from the slowest axis of the file to the fastest.
_ORDER = (0, 1, 4, 3, 2)
_COPY_BYTES = 4 * 2**20
# nibabel's own level; higher ones take several times as long for a few per cent.
_LEVEL = 1
_NIFTI1_LIMIT = 2**15 - 1
_LENGTH = struct.Struct("<I")
_LENGTH_LIMIT = 2**32
_SCANNER = 1
"""The code of positions as the scanner gave them."""


class NiftiFormat:
    """See `VolumeFormat`."""

    suffixes = (_PACKED, ".nii")
    is_folder, has_names, read_only = False, False, ()

    def names(self, path: Path) -> tuple[str, ...]:
        """The volume has no name."""
        return ()

    def open_source(self, path: Path, name: str | None, dtype: DType | None) -> Source:
        """See `VolumeFormat.open_source`."""
        image = _load(path)
        proxy = image.dataobj
        wanted = np.dtype(np.float32) if dtype is None else dtype
        slope, inter = float(proxy.slope), float(proxy.inter)
        natural = proxy.dtype if (slope, inter) == (1.0, 0.0) else np.dtype(np.float64)
        delivered_dtype(path, proxy.dtype, None)
        delivery = Delivery(delivered_dtype(path, natural, wanted), slope, inter)
        raw = RawArray(int(proxy.offset), _presented(path, proxy.shape), proxy.dtype, _ORDER)
        contents = Contents(path, raw, delivery, Meta(np.asarray(image.affine), image.header))
        if not _is_packed(path):
            return MappedSource(contents)
        _check_length(path, raw.offset + raw.nbytes)
        return StreamedSource(contents, partial(_stream, path, raw.offset))

    def lay_out(self, path: Path, arrays: Sequence[ArraySpec], like: Source | None) -> FileImage:
        """See `VolumeFormat.lay_out`."""
        spec = only_array(path, arrays)
        if len(spec.shape) != _RANK or spec.shape[0] != 1 or not all(spec.shape):
            raise PartitionError(
                f"{path}: NIfTI holds one volume with 1 or more channels (1, C, x, y, z), not '{spec.name}' "
                f"of shape {spec.shape}; write .npy"
            )
        header, dtype = _header(path, spec, None if like is None else like.meta)
        block = _header_bytes(header)
        raw = RawArray(len(block), tuple(spec.shape), dtype, _ORDER)
        pack = _pack if _is_packed(path) else None
        return FileImage(((0, block),), ((spec.name, raw),), raw.offset + raw.nbytes, pack)


FORMAT = NiftiFormat()


def _is_packed(path: Path) -> bool:
    return path.name.lower().endswith(_PACKED)


def _nibabel(path: Path) -> ModuleType:
    try:
        import nibabel
    except ImportError as error:
        raise PartitionError(
            f"{path}: NIfTI files need nibabel; install it with pip install 'partitioner[nifti]'"
        ) from error
    return nibabel


def _load(path: Path) -> Any:
    nibabel = _nibabel(path)
    try:
        image = nibabel.load(path, mmap=False)
        is_nifti = isinstance(image, nibabel.Nifti1Image)
    except (
        nibabel.filebasedimages.ImageFileError,
        nibabel.spatialimages.HeaderDataError,
        OSError,
        EOFError,
        ValueError,
        zlib.error,
    ) as error:
        reason = " ".join(str(error).split()).removeprefix(f"{path}: ")
        raise PartitionError(
            f"{path}: no NIfTI file, or a damaged one ({reason}); copy or convert it again"
        ) from error
    if not is_nifti:
        raise PartitionError(f"{path}: is {type(image).__name__}, not a NIfTI file; convert it")
    return image


def _presented(path: Path, extents: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that a model sees, from the one in the file."""
    kept = list(extents)
    while len(kept) > _SPATIAL and kept[-1] == 1:
        kept.pop()
    channels = kept[_SPATIAL:]
    if len(channels) == 2 and channels[0] == 1:
        channels = channels[1:]
    if len(kept) < _SPATIAL or len(channels) > 1:
        raise PartitionError(f"{path}: has shape {extents}; a volume x, y, z or x, y, z, channels is needed")
    return (1, *(channels or [1]), *kept[:_SPATIAL])


def _check_length(path: Path, needed: int) -> None:
    """Make sure that a gzipped file holds what its header says.

    Its end tells how long the unpacked file is.  A file that was cut tells something else there, and so does one
    that was packed in pieces, which is whole: such a file is unpacked once to know.

    Raises:
        PartitionError: it is shorter.
    """
    with open_binary(path) as packed:
        packed.seek(-_LENGTH.size, os.SEEK_END)
        (told,) = _LENGTH.unpack(packed.read())
    if told == needed % _LENGTH_LIMIT:
        return
    with stream_errors(path), gzip.open(path, "rb") as stream:
        skip(stream, needed)
        while stream.read(_COPY_BYTES):  # its checksum is compared at the end
            pass


@contextlib.contextmanager
def _stream(path: Path, offset: int) -> Generator[io.BufferedIOBase]:
    with gzip.open(path, "rb") as stream:
        skip(stream, offset)
        yield stream


def _header(path: Path, spec: ArraySpec, meta: Meta | None) -> tuple[Any, DType]:
    """A header for the array, its place in the world from `meta`, and the type of its values in the file."""
    nibabel = _nibabel(path)
    batch, channels, *extents = spec.shape
    shape = (*extents, channels) if batch * channels > 1 else tuple(extents)
    known = meta.header if meta is not None and isinstance(meta.header, nibabel.Nifti1Header) else None
    is_large = max(shape) > _NIFTI1_LIMIT or isinstance(known, nibabel.Nifti2Header)
    kind = nibabel.Nifti2Image if is_large else nibabel.Nifti1Image
    dtype = _nifti_dtype(path, spec)
    # nibabel derives a header from an image; this one is a single zero seen everywhere.
    values = np.broadcast_to(np.zeros((), dtype), shape)
    affine = np.eye(4) if meta is None else meta.affine
    given = None if known is None else kind.header_class.from_header(known)
    image = kind(values, affine, given, dtype=dtype)
    header = image.header
    if meta is not None and known is None:  # a place in millimetres from another kind of file
        image.set_qform(affine, _SCANNER, strip_shears=True)
        image.set_sform(affine, _SCANNER)
        header.set_xyzt_units("mm")
    header.set_data_dtype(dtype)
    header.set_slope_inter(1.0, 0.0)
    header.set_data_offset(0)  # after the extensions, set as the header is written
    header["cal_min"] = header["cal_max"] = 0.0  # the input's display window says nothing of the output
    return header, header.get_data_dtype()


def _nifti_dtype(path: Path, spec: ArraySpec) -> DType:
    dtype = stored_dtype(path, spec)
    if dtype == np.bool_:
        return np.dtype(np.uint8)
    return np.dtype(np.float32) if dtype == np.float16 else dtype


def _header_bytes(header: Any) -> bytes:
    """The header and its extensions, up to the first value."""
    stream = io.BytesIO()
    header.write_to(stream)
    return stream.getvalue().ljust(int(header.get_data_offset()), b"\0")


def _pack(image: BinaryIO, packed: BinaryIO) -> None:
    # Neither a name nor a time: the same volume gives the same file.
    with gzip.GzipFile("", "wb", _LEVEL, packed, mtime=0) as stream:
        shutil.copyfileobj(image, stream, _COPY_BYTES)
