"""numpy's .npy: one array, mapped as it is."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy

from partitioner.errors import PartitionError
from runtime.volumes.base import (
    ArraySpec,
    DType,
    FileImage,
    Source,
    delivered_dtype,
    only_array,
    stored_dtype,
)
from runtime.volumes.raw import Delivery, RawArray, c_order
from runtime.volumes.sources import Contents, MappedSource, open_binary


class NpyFormat:
    """See `VolumeFormat`."""

    suffixes = (".npy",)
    is_folder, has_names, read_only = False, False, ()

    def names(self, path: Path) -> tuple[str, ...]:
        """The array has no name."""
        return ()

    def open_source(self, path: Path, name: str | None, dtype: DType | None) -> Source:
        """See `VolumeFormat.open_source`."""
        with open_binary(path) as stream:
            raw = read_header(path, stream)
        return MappedSource(Contents(path, raw, Delivery(delivered_dtype(path, raw.dtype, dtype))))

    def lay_out(self, path: Path, arrays: Sequence[ArraySpec], like: Source | None) -> FileImage:
        """See `VolumeFormat.lay_out`."""
        header, raw = plan_array(path, only_array(path, arrays), 0)
        return FileImage(((0, header),), ((arrays[0].name, raw),), raw.offset + raw.nbytes)


FORMAT = NpyFormat()


def read_header(where: Path | str, stream: IO[bytes], begin: int = 0) -> RawArray:
    """Where the values lie of an array in .npy form that begins at `begin` of its file.

    Args:
        where: the file (and member), for messages.
        stream: stands at the start of the array's header; is left at its values.

    Raises:
        PartitionError: no such header, or Python objects instead of values.
    """
    try:
        start = stream.tell()
        version = npy.read_magic(stream)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, is_fortran, dtype = read(stream)
    except (ValueError, EOFError, SyntaxError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise PartitionError(f"{where}: no .npy array ({reason}); write it with numpy.save") from error
    if dtype.hasobject:
        raise PartitionError(f"{where}: holds pickled Python objects, which are never loaded; store numbers")
    order = c_order(len(shape))
    return RawArray(begin + stream.tell() - start, shape, dtype, order[::-1] if is_fortran else order)


def plan_array(path: Path, spec: ArraySpec, begin: int) -> tuple[bytes, RawArray]:
    """The header of an array in .npy form that begins at `begin` of its file, and where its values go."""
    dtype = stored_dtype(path, spec)
    header = io.BytesIO()
    described = {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": tuple(spec.shape)}
    npy.write_array_header_1_0(header, described)
    block = header.getvalue()
    return block, RawArray(begin + len(block), tuple(spec.shape), np.dtype(dtype), c_order(len(spec.shape)))
