"""Zarr through zarr (format 2 and 3): arrays in a folder (`scan.zarr`, `scan.zarr:/ct/0`), read chunk by chunk.

A chunk whose file is missing reads as the fill value: this is Zarr's rule, so a copy that lost files is not noticed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from partitioner.errors import PartitionError
from runtime.volumes.base import ArraySpec, DType, FileImage, Source, delivered_dtype
from runtime.volumes.raw import Array, Delivery, RawArray, c_order
from runtime.volumes.sources import ChunkedSource, Contents


class ZarrFormat:
    """See `VolumeFormat`."""

    suffixes = (".zarr",)
    is_folder, has_names = True, True

    def names(self, path: Path) -> tuple[str, ...]:
        """The arrays in a group, those in groups of it with their path; none where the store is one array."""
        node = _open(path)
        return () if isinstance(node, _zarr(path).Array) else tuple(_arrays(node))

    def open_source(self, path: Path, name: str | None, dtype: DType | None) -> Source:
        """See `VolumeFormat.open_source`."""
        array, where = _choose(path, _open(path), name)
        _check_codecs(where, array)
        shape = tuple(int(extent) for extent in array.shape)
        natural = array.dtype
        if not isinstance(natural, np.dtype):
            raise PartitionError(f"{where}: holds {natural} values; store real numbers, integers or booleans")
        delivery = Delivery(delivered_dtype(where, natural, dtype))
        contents = Contents(path, RawArray(0, shape, natural, c_order(len(shape))), delivery)
        return ChunkedSource(contents, tuple(array.chunks), partial(_fetch, where, array))

    def lay_out(self, path: Path, arrays: Sequence[ArraySpec], like: Source | None) -> FileImage:
        """Refuses: chunks would have to be written whole by one rank each."""
        raise PartitionError(f"{path}: Zarr stores are read, not written; write .h5, .npy or another kind of file")


FORMAT = ZarrFormat()


def _zarr(path: Path) -> ModuleType:
    try:
        import zarr
    except ImportError as error:
        raise PartitionError(
            f"{path}: Zarr stores need zarr; install it with pip install 'partitioner[zarr]'"
        ) from error
    return zarr


def _open(path: Path) -> Any:
    """The array or group at the root of a store."""
    if not path.exists():
        raise PartitionError(f"{path}: no such file; check the path")
    if not path.is_dir():
        raise PartitionError(f"{path}: no Zarr store, which is a folder; unpack it or convert it")
    zarr = _zarr(path)
    try:
        return zarr.open(str(path), mode="r")
    except Exception as error:  # the library hands on whatever a damaged description leads to
        raise PartitionError(
            f"{path}: no Zarr store, or a damaged one ({_line(error)}); copy or write it again"
        ) from error


def _choose(path: Path, root: Any, name: str | None) -> tuple[Any, Path]:
    """The array meant, and its place for messages."""
    array_type = _zarr(path).Array
    if isinstance(root, array_type):
        if name is not None:
            raise PartitionError(f"{path}: is one array, so it holds no '{name}'; leave out the name")
        return root, path
    if name is not None:
        try:
            found = root[name.strip("/")]
        except (KeyError, ValueError):
            found = None
        except Exception as error:
            raise PartitionError(f"{path}:/{name}: damaged ({_line(error)}); copy or write it again") from error
        if isinstance(found, array_type):
            return found, Path(f"{path}:/{name.strip('/')}")
    held = list(_arrays(root))
    if not held:
        raise PartitionError(f"{path}: holds no array; write it with zarr.save")
    if name is not None:
        raise PartitionError(f"{path}: holds no array '{name}'; it has {', '.join(held)}")
    if len(held) > 1:
        raise PartitionError(f"{path}: holds several arrays ({', '.join(held)}); name one, as {path}:/{held[0]}")
    return root[held[0]], Path(f"{path}:/{held[0]}")


def _arrays(group: Any, prefix: str = "") -> Iterator[str]:
    yield from (prefix + key for key in sorted(group.array_keys()))
    for key in sorted(group.group_keys()):
        yield from _arrays(group[key], f"{prefix}{key}/")


def _check_codecs(where: Path, array: Any) -> None:
    """Refuse chunks that are Python objects, which run code as they are loaded."""
    packers = array.compressors if hasattr(array, "compressors") else (array.compressor,)
    if any(getattr(codec, "codec_id", None) == "pickle" for codec in (*(array.filters or ()), *packers)):
        raise PartitionError(f"{where}: holds pickled Python objects, which are never loaded; store numbers")


def _fetch(where: Path, array: Any, cells: tuple[slice, ...]) -> Array:
    try:
        return np.asarray(array[cells])
    except Exception as error:  # every codec has errors of its own
        raise PartitionError(f"{where}: damaged or cut short ({_line(error)}); copy or write it again") from error


def _line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]
