"""HDF5 through h5py: arrays by name (`scan.h5:/ct`), read box by box, written as they lie in the file.

Written arrays are contiguous and their space is allocated at once: HDF5 makes the headers in memory and says where
the values go; these are then written like those of any other file.  What HDF5 has never stored, such as chunks that
nobody wrote, reads as the fill value: this is its rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from partitioner.errors import PartitionError
from runtime.volumes.base import ArraySpec, DType, FileImage, Source, delivered_dtype, stored_dtype
from runtime.volumes.headers import HeaderFile
from runtime.volumes.raw import Array, Delivery, RawArray, c_order
from runtime.volumes.sources import ChunkedSource, Contents, stream_errors


class Hdf5Format:
    """See `VolumeFormat`."""

    suffixes = (".h5", ".hdf5")
    is_folder, has_names, read_only = False, True, ()

    def names(self, path: Path) -> tuple[str, ...]:
        """All arrays, those in groups with their path."""
        with _open(path) as file, stream_errors(path):
            return tuple(_datasets(path, file))

    def open_source(self, path: Path, name: str | None, dtype: DType | None) -> Source:
        """See `VolumeFormat.open_source`."""
        file = _open(path)
        try:
            with stream_errors(path):
                dataset = _choose(path, file, name)
                where = Path(f"{path}:{dataset.name}")
                if dataset.shape is None:
                    raise PartitionError(f"{where}: holds no values; choose another array")
                raw = RawArray(0, tuple(dataset.shape), dataset.dtype, c_order(len(dataset.shape)))
                delivery = Delivery(delivered_dtype(where, raw.dtype, dtype))
                chunks = dataset.chunks or (1,) * len(raw.shape)
        except BaseException:
            file.close()
            raise
        return ChunkedSource(Contents(path, raw, delivery), chunks, partial(_fetch, path, dataset), file.close)

    def lay_out(self, path: Path, arrays: Sequence[ArraySpec], like: Source | None) -> FileImage:
        """See `VolumeFormat.lay_out`."""
        h5py = _h5py(path)
        names = [spec.name.strip("/") for spec in arrays]
        if not all(names) or len(set(names)) != len(names):
            raise PartitionError(f"{path}: its arrays need distinct names, not {', '.join(s.name for s in arrays)}")
        dtypes = [stored_dtype(path, spec) for spec in arrays]
        image = HeaderFile()
        places: list[tuple[str, RawArray]] = []
        try:
            with h5py.File(image, "w") as file:
                for name, spec, dtype in zip(names, arrays, dtypes, strict=True):
                    dataset = _allocate(h5py, file, name, spec.shape, dtype)
                    # An array without cells has no place.
                    raw = RawArray(dataset.get_offset() or 0, tuple(spec.shape), dtype, c_order(len(spec.shape)))
                    places.append((spec.name, raw))
        except (ValueError, RuntimeError, OSError) as error:  # a name that is a group too, more axes than HDF5 has
            raise PartitionError(f"{path}: cannot hold {', '.join(names)} ({_line(error)}); write .npz") from error
        return FileImage(tuple(image.blocks), tuple(places), image.size)


FORMAT = Hdf5Format()


def _h5py(path: Path) -> ModuleType:
    try:
        import h5py
    except ImportError as error:
        raise PartitionError(
            f"{path}: HDF5 files need h5py; install it with pip install 'partitioner[hdf5]'"
        ) from error
    return h5py


def _open(path: Path) -> Any:
    h5py = _h5py(path)
    try:
        return h5py.File(path, "r")
    except (OSError, RuntimeError, ValueError) as error:
        raise PartitionError(
            f"{path}: no HDF5 file, or one that is damaged or cut short ({_line(error)}); copy or write it again"
        ) from error


def _datasets(path: Path, file: Any) -> list[str]:
    found: list[str] = []
    dataset = _h5py(path).Dataset

    def visit(name: str, item: Any) -> None:
        if isinstance(item, dataset):
            found.append(name)

    file.visititems(visit)
    return found


def _choose(path: Path, file: Any, name: str | None) -> Any:
    h5py = _h5py(path)
    if name is not None:
        try:
            found = file[name]
        except (KeyError, ValueError):
            found = None
        if isinstance(found, h5py.Dataset):
            return found
    held = _datasets(path, file)
    if not held:
        raise PartitionError(f"{path}: holds no array; write it with h5py's create_dataset")
    if name is not None:
        raise PartitionError(f"{path}: holds no array '{name}'; it has {', '.join(held)}")
    if len(held) > 1:
        raise PartitionError(f"{path}: holds several arrays ({', '.join(held)}); name one, as {path}:/{held[0]}")
    return file[held[0]]


def _fetch(path: Path, dataset: Any, cells: tuple[slice, ...]) -> Array:
    with stream_errors(path):
        return np.asarray(dataset[cells])


def _allocate(h5py: ModuleType, file: Any, name: str, shape: Sequence[int], dtype: DType) -> Any:
    """An array whose values lie side by side, in space taken now and not written."""
    layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    layout.set_layout(h5py.h5d.CONTIGUOUS)
    layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    layout.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    layout.set_obj_track_times(False)  # the same arrays give the same file
    links = h5py.h5p.create(h5py.h5p.LINK_CREATE)
    links.set_create_intermediate_group(True)
    space = h5py.h5s.create_simple(tuple(shape)) if shape else h5py.h5s.create(h5py.h5s.SCALAR)
    return h5py.h5d.create(file.id, name.encode(), h5py.h5t.py_create(dtype, logical=True), space, layout, links)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
