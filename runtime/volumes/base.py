"""The contract between volume files and those who use them: sources, array specifications, formats."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from partitioner.errors import PartitionError
from partitioner.geometry import Interval
from runtime.volumes.chunks import ChunkedArray
from runtime.volumes.raw import Array, DType, RawArray

Span = slice | tuple[int, int] | Interval
"""The cells [start, stop) of one axis; `slice(None)` is the whole axis."""

DEFAULT_SLAB_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Meta:
    """Where a volume lies in the world.

    Args:
        affine: 4x4, from voxel indices to millimetres.
        header: the file's own header as its library gives it (a nibabel header for NIfTI).
    """

    affine: NDArray[np.float64]
    header: Any


class Source(Protocol):
    """A volume in a file, read part by part; `with` closes it."""

    @property
    def path(self) -> Path:
        """The file."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Extents as a model sees them; a NIfTI volume has batch and channel axes in front."""
        ...

    @property
    def dtype(self) -> DType:
        """Type of the values delivered, in native byte order."""
        ...

    @property
    def random_access(self) -> bool:
        """Whether `read` costs what its box holds; else each call passes over the file, so use `slabs`."""
        ...

    @property
    def meta(self) -> Meta | None:
        """Affine and header, for formats that have them."""
        ...

    @property
    def notices(self) -> tuple[str, ...]:
        """What a user should know although nothing is wrong, a line each: chunks that are missing."""
        ...

    def read(self, box: Sequence[Span] | None = None) -> Array:
        """The values in a box, one span per axis (all of them without one), dense in C order.

        Raises:
            ValueError: the box does not lie in the volume.
            PartitionError: the file is damaged.
        """
        ...

    def slabs(self, max_bytes: int = DEFAULT_SLAB_BYTES) -> Iterator[tuple[tuple[int, ...], Array]]:
        """Disjoint boxes that fill the volume, in the order of the file, as (start, values).

        Holds about `max_bytes` at a time, conversion included, and one row of the file at least.

        Raises:
            PartitionError: the file is damaged.
        """
        ...

    def close(self) -> None:
        """Let go of the file; harmless when repeated."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


@dataclass(frozen=True)
class ArraySpec:
    """An array that is to be written.

    Args:
        name: its name in a file that holds several (.npz, .h5); elsewhere only for messages.
        shape: extents as the model gives them.
        dtype: anything that numpy takes for a type, or "bfloat16".
        tile: the largest extents of a part that is written at once; formats in chunks take them.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str | DType | type[np.generic]
    tile: tuple[int, ...] | None = None

    @property
    def numpy_dtype(self) -> DType:
        """The type of the values that writers hand in."""
        if self.dtype == "bfloat16":
            import ml_dtypes  # registers the name with numpy

            return np.dtype(ml_dtypes.bfloat16)
        return np.dtype(self.dtype)


@dataclass(frozen=True)
class FileImage:
    """How a file will look before it is packed: blocks of bytes that are known, arrays that are not yet.

    Args:
        blocks: pairs (offset in bytes, bytes), the headers.
        arrays: by name, where the values go.
        size: of the whole file, in bytes.
        pack: copies the finished image into the final form (compression, an archive) as a stream;
            None where the image is the file already.
    """

    blocks: tuple[tuple[int, bytes], ...]
    arrays: tuple[tuple[str, RawArray], ...]
    size: int
    pack: Callable[[BinaryIO, BinaryIO], None] | None = None


@dataclass(frozen=True)
class FolderImage:
    """How a folder will look: files that are known, arrays in chunks that are not yet.

    Args:
        files: pairs (path within the folder, bytes), the descriptions.
        arrays: by name, where the values go.
        check: raises `PartitionError` when a folder must not be replaced by this one.
    """

    files: tuple[tuple[str, bytes], ...]
    arrays: tuple[tuple[str, ChunkedArray], ...]
    check: Callable[[Path], None]

    @property
    def size(self) -> int:
        """Of all files, in bytes."""
        return sum(len(block) for _, block in self.files) + sum(array.nbytes for _, array in self.arrays)


class VolumeFormat(Protocol):
    """A file format; a module in `formats/` offers it under the name FORMAT."""

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Ends of file names, in lower case, with the dot."""
        ...

    @property
    def is_folder(self) -> bool:
        """Whether a volume is a folder, which `open_source` and `names` then look at themselves."""
        ...

    @property
    def read_only(self) -> tuple[str, ...]:
        """Those of the suffixes whose files are not written."""
        ...

    @property
    def has_names(self) -> bool:
        """Whether `file:/name` means an array in a file."""
        ...

    def names(self, path: Path) -> tuple[str, ...]:
        """Names of the arrays in a file; none for a format that holds one array without a name."""
        ...

    def open_source(self, path: Path, name: str | None, dtype: DType | None) -> Source:
        """Open the array `name` of an existing regular file, delivered as `dtype` (None: as it comes).

        Raises:
            PartitionError: not this format, cut short, or values that are no numbers.
        """
        ...

    def lay_out(self, path: Path, arrays: Sequence[ArraySpec], like: Source | None) -> FileImage | FolderImage:
        """How a file or folder with these arrays will look; touches no file.

        Raises:
            PartitionError: the format cannot hold these arrays.
        """
        ...


def resolve(box: Sequence[Span] | None, shape: tuple[int, ...]) -> tuple[Interval, ...]:
    """A box as one interval per axis; None is everything.

    Raises:
        ValueError: wrong number of axes, a stride, or cells outside the shape.
    """
    if box is None:
        return tuple(Interval(0, extent) for extent in shape)
    if len(box) != len(shape):
        raise ValueError(f"a box with {len(box)} axes for an array of shape {shape}")
    return tuple(_interval(span, extent) for span, extent in zip(box, shape, strict=True))


def _interval(span: Span, extent: int) -> Interval:
    if isinstance(span, tuple):
        found = Interval(*span)
    elif isinstance(span, Interval):
        found = span
    elif span.step not in (None, 1):
        raise ValueError(f"{span} has a stride")
    else:
        found = Interval(span.start or 0, extent if span.stop is None else span.stop)
    if not 0 <= found.start <= found.stop <= extent:
        raise ValueError(f"cells {found} of an axis with {extent}")
    return found


def delivered_dtype(path: Path, natural: DType, wanted: DType | None) -> DType:
    """The type in which values of type `natural` are delivered: the one wanted, or their own.

    Raises:
        PartitionError: the values are no real numbers, or would lose their kind (3.7 as an integer).
    """
    if natural.kind not in "biuf":
        raise PartitionError(f"{path}: holds {natural} values; store real numbers, integers or booleans")
    if wanted is None:
        return natural.newbyteorder("=")
    if not np.can_cast(natural, _kind_of(wanted), "same_kind"):
        raise PartitionError(f"{path}: holds {natural} values, but {wanted} is needed; convert the file")
    return wanted


def _kind_of(dtype: DType) -> DType:
    """A type of numpy's own with the same rules for casts; numpy has none for bfloat16."""
    return np.dtype(np.float16) if dtype.name == "bfloat16" else dtype


def stored_dtype(path: Path, spec: ArraySpec) -> DType:
    """The plain numpy type that holds the values exactly: bfloat16 becomes float32, others stay.

    Raises:
        PartitionError: no plain type holds them.
    """
    dtype = spec.numpy_dtype
    if dtype.name == "bfloat16":
        return np.dtype(np.float32)
    if dtype.kind not in "biuf":
        raise PartitionError(f"{path}: cannot hold '{spec.name}', which is {dtype}; cast it in the model")
    return dtype.newbyteorder("=")


def only_array(path: Path, arrays: Sequence[ArraySpec]) -> ArraySpec:
    """The single array meant for a format that holds one.

    Raises:
        PartitionError: there are several.
    """
    if len(arrays) == 1:
        return arrays[0]
    names = ", ".join(spec.name for spec in arrays)
    raise PartitionError(f"{path}: holds one array, not {len(arrays)} ({names}); use .npz or a file for each")


def readable_size(count: int) -> str:
    """Bytes for people, as 1.5 MiB."""
    size = float(count)
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} bytes" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} GiB"


def place_text(path: Path) -> str:
    """A path as a user writes it; that of a URL, whose slashes `Path` joins, has both again."""
    text = str(path)
    scheme, colon, rest = text.partition(":/")
    is_url = bool(colon) and len(scheme) > 1 and scheme.replace("+", "").isalnum() and not Path(scheme).exists()
    return f"{scheme}://{rest}" if is_url else text


def absolute_place(path: str | Path) -> str:
    """The same file from any working folder; a URL as it is."""
    return place_text(Path(path)) if "://" in place_text(Path(path)) else os.path.abspath(path)
