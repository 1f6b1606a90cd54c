"""Zarr (format 2 and 3) and OME-Zarr: arrays in a folder, a .zip or at a URL, read chunk by chunk; folders are written.

    scan.zarr, scan.zarr:/ct/0       an array as it is
    scan.ome.zarr, scan.ome.zarr:/1  the full resolution of an image, another level, as a model sees them (`ome`)

Reading goes through zarr; a chunk whose file is missing reads as the fill value, which is Zarr's rule and is noted.
Written chunks are not compressed, so that several processes fill them at once (`chunks`), and go along the parts in
which the array is written.  Format 3 is written, unless the input is of format 2 or the name ends with .v2.zarr.
"""

from __future__ import annotations

import contextlib
import re
import zipfile
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from partitioner.errors import PartitionError
from runtime.volumes.base import (
    ArraySpec,
    DType,
    FolderImage,
    Source,
    delivered_dtype,
    place_text,
    stored_dtype,
)
from runtime.volumes.chunks import ChunkedArray, chunk_extents
from runtime.volumes.ome import (
    OmeAxes,
    attributes_of,
    level_paths,
    multiscales,
    own_attributes,
    plan_axes,
    read_axes,
)
from runtime.volumes.raw import Array, Delivery, RawArray, c_order
from runtime.volumes.sources import ChunkedSource, Contents
from runtime.volumes.zarr_metadata import ROOTS, Files, array_files, group_files, held_arrays, place

_ZIP = ".zip"
_OME = ".ome.zarr"
_LEVEL = "0"
_NAMED_FORMAT = re.compile(r"\.v([23])(\.ome)?\.zarr\Z", re.IGNORECASE)
_NEWEST = 3


class ZarrFormat:
    """See `VolumeFormat`."""

    suffixes = (".zarr", ".zarr.zip")
    is_folder, has_names, read_only = True, True, (".zarr.zip",)

    def names(self, path: Path) -> tuple[str, ...]:
        """The arrays in a group, those in groups of it with their path; none where the store is one array or image."""
        with _opened(path) as root:
            is_one = isinstance(root, _zarr(path).Array) or multiscales(root.attrs) is not None
            return () if is_one else tuple(_arrays(root))

    def open_source(self, path: Path, name: str | None, dtype: DType | None) -> Source:
        """See `VolumeFormat.open_source`."""
        with contextlib.ExitStack() as stack:
            root = stack.enter_context(_opened(path))
            chosen = _choose(path, root, name)
            _check_codecs(chosen.where, chosen.array)
            return _ZarrSource(path, chosen, dtype, stack.pop_all())

    def lay_out(self, path: Path, arrays: Sequence[ArraySpec], like: Source | None) -> FolderImage:
        """See `VolumeFormat.lay_out`."""
        if path.name.lower().endswith(_ZIP) or "://" in place_text(path):
            raise PartitionError(f"{place_text(path)}: Zarr stores are written into folders only; write .zarr and "
                                 "copy it")
        number = _format_to_write(path, like)
        if path.name.lower().endswith(_OME):
            return _lay_out_image(path, arrays, like, number)
        names = [spec.name.strip("/") for spec in arrays]
        inner = [part for name in names for part in name.split("/")]
        if not all(inner) or {".", ".."} & set(inner) or _overlap(names):
            given = ", ".join(spec.name for spec in arrays)
            raise PartitionError(f"{path}: its arrays need distinct names, none within another, not {given}")
        files = group_files("", number)
        places: list[tuple[str, ChunkedArray]] = []
        for name, spec in zip(names, arrays, strict=True):
            for group in _groups_above(name):
                files |= group_files(group, number)
            array = _place(path, spec, name, c_order(len(spec.shape)), number)
            files |= array_files(name, array, number)
            places.append((spec.name, array))
        return FolderImage(tuple(files.items()), tuple(places), partial(_check_replaced, names=names))


FORMAT = ZarrFormat()


# --- reading ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Chosen:
    """An array in a store, its place for messages, and its axes where it belongs to an image."""

    array: Any
    where: Path
    axes: OmeAxes | None = None


class _ZarrSource(ChunkedSource):
    """See `ChunkedSource`; knows the store's format and which chunks are missing."""

    def __init__(self, path: Path, chosen: _Chosen, dtype: DType | None, held: contextlib.ExitStack) -> None:
        array, where, axes = chosen.array, chosen.where, chosen.axes
        natural = array.dtype
        if not isinstance(natural, np.dtype):
            raise PartitionError(f"{where}: holds {natural} values; store real numbers, integers or booleans")
        shape = tuple(int(extent) for extent in array.shape)
        chunks = tuple(array.chunks)
        kept = c_order(len(shape)) if axes is None else axes.kept
        if axes is not None:
            shape, chunks = axes.presented(shape), axes.presented(chunks)
        delivery = Delivery(delivered_dtype(where, natural, dtype))
        raw = RawArray(0, shape, natural, c_order(len(shape)))
        contents = Contents(path, raw, delivery, None if axes is None else axes.meta)
        super().__init__(contents, chunks, partial(_fetch, where, array, kept), held.close)
        self._chosen = chosen
        self.zarr_format = int(array.metadata.zarr_format if hasattr(array, "metadata") else 2)

    @property
    def notices(self) -> tuple[str, ...]:
        """See `Source.notices`; looks through the store's list of files, where there is one."""
        array, where = self._chosen.array, place_text(self._chosen.where)
        if "://" in where:
            return ()
        count, size = _chunk_files(array)
        if count >= size:
            return ()
        return (f"{where}: {size - count} of {size} chunks are missing and read as the fill value {array.fill_value}",)


def _chunk_files(array: Any) -> tuple[int, int]:
    """How many files of chunks there are, and how many there could be; the same where nobody can tell."""
    try:
        sharded = getattr(array, "shards", None)
        extents = sharded or array.chunks
        size = int(np.prod([-(-n // c) for n, c in zip(array.shape, extents, strict=True)], dtype=object))
        found = array._nshards_initialized if sharded else array.nchunks_initialized
        return min(int(found), size), size
    except Exception:  # a store that cannot be listed
        return 0, 0


def _zarr(path: Path) -> ModuleType:
    try:
        import zarr
    except ImportError as error:
        raise PartitionError(
            f"{place_text(path)}: Zarr stores need zarr; install it with pip install 'partitioner[zarr]'"
        ) from error
    return zarr


@contextlib.contextmanager
def _opened(path: Path) -> Generator[Any]:
    """The array or group at the root of a store."""
    where = place_text(path)
    is_remote = "://" in where
    if not is_remote and not path.exists():
        raise PartitionError(f"{where}: no such file; check the path")
    if not is_remote and not path.is_dir() and not path.name.lower().endswith(_ZIP):
        raise PartitionError(f"{where}: no Zarr store, which is a folder or a .zarr.zip; unpack it or convert it")
    zarr = _zarr(path)
    with contextlib.ExitStack() as stack:
        try:
            if path.name.lower().endswith(_ZIP) and not is_remote:
                inside = _folder_in(path)
                store = zarr.storage.ZipStore(str(path), mode="r")
                root = zarr.open(store, mode="r", path=inside)
                stack.callback(store.close)
            else:
                root = zarr.open(where, mode="r")
        except ImportError as error:
            raise PartitionError(
                f"{where}: needs a package for its kind of address ({_line(error)}); install it, as with "
                "pip install fsspec s3fs aiohttp"
            ) from error
        except Exception as error:  # the library hands on whatever a damaged description leads to
            raise PartitionError(
                f"{where}: no Zarr store, or a damaged one ({_line(error)}); copy or write it again"
            ) from error
        yield root


def _folder_in(path: Path) -> str:
    """The folder within an archive that is the store: none, or the only one at the top."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    tops = {name.partition("/")[0] for name in names}
    if len(tops) == 1 and (top := tops.pop()) not in ROOTS and any(f"{top}/{root}" in names for root in ROOTS):
        return top
    return ""


def _choose(path: Path, root: Any, name: str | None) -> _Chosen:
    """The array meant."""
    array_type, where = _zarr(path).Array, place_text(path)
    if isinstance(root, array_type):
        if name is not None:
            raise PartitionError(f"{where}: is one array, so it holds no '{name}'; leave out the name")
        return _Chosen(root, path)
    found = root if name is None else _find(path, root, name.strip("/"))
    if isinstance(found, array_type):
        return _level(path, root, found, name.strip("/")) if name else _Chosen(found, path)
    if found is not None and (image := multiscales(found.attrs)) is not None:
        inside = "/".join(p for p in ((name or "").strip("/"), level_paths(path, image)[0]) if p)
        array = _find(path, root, inside)
        if not isinstance(array, array_type):
            raise PartitionError(f"{where}: holds no array '{inside}', which its OME-Zarr description names; "
                                 "copy or write it again")
        return _level(path, root, array, inside)
    held = list(_arrays(root))
    if not held:
        raise PartitionError(f"{where}: holds no array; write it with zarr.save")
    if name is not None:
        raise PartitionError(f"{where}: holds no array '{name}'; it has {', '.join(held)}")
    if len(held) > 1:
        raise PartitionError(f"{where}: holds several arrays ({', '.join(held)}); name one, as {where}:/{held[0]}")
    return _level(path, root, root[held[0]], held[0])


def _find(path: Path, root: Any, name: str) -> Any:
    """The array or group of a name, None where there is none."""
    try:
        return root[name]
    except (KeyError, ValueError):
        return None
    except Exception as error:
        raise PartitionError(
            f"{place_text(path)}:/{name}: damaged ({_line(error)}); copy or write it again"
        ) from error


def _level(path: Path, root: Any, array: Any, name: str) -> _Chosen:
    """An array by its name, with the axes of the image whose level it is."""
    where = Path(f"{path}:/{name}")
    for parent in ("", *_groups_above(name)):
        group = root[parent] if parent else root
        image = multiscales(group.attrs)
        level = name[len(parent):].strip("/")
        if image is not None and level in level_paths(where, image):
            axes = read_axes(where, image, level, len(array.shape), own_attributes(group.attrs))
            return _Chosen(array, where, axes)
    return _Chosen(array, where)


def _groups_above(name: str) -> list[str]:
    parts = name.split("/")
    return ["/".join(parts[:count]) for count in range(1, len(parts))]


def _arrays(group: Any, prefix: str = "") -> Iterator[str]:
    yield from (prefix + key for key in sorted(group.array_keys()))
    for key in sorted(group.group_keys()):
        yield from _arrays(group[key], f"{prefix}{key}/")


def _check_codecs(where: Path, array: Any) -> None:
    """Refuse chunks that are Python objects, which run code as they are loaded."""
    packers = array.compressors if hasattr(array, "compressors") else (array.compressor,)
    if any(getattr(codec, "codec_id", None) == "pickle" for codec in (*(array.filters or ()), *packers)):
        raise PartitionError(f"{where}: holds pickled Python objects, which are never loaded; store numbers")


def _fetch(where: Path, array: Any, kept: tuple[int, ...], cells: tuple[slice, ...]) -> Array:
    try:
        found = np.asarray(array[tuple(cells[axis] for axis in kept)])
    except Exception as error:  # every codec has errors of its own
        raise PartitionError(
            f"{place_text(where)}: damaged or cut short ({_line(error)}); copy or write it again"
        ) from error
    return found.reshape([c.stop - c.start for c in cells])


def _line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


# --- writing ---------------------------------------------------------------------------------------


def _format_to_write(path: Path, like: Source | None) -> int:
    named = _NAMED_FORMAT.search(path.name)
    return int(named[1]) if named is not None else int(getattr(like, "zarr_format", _NEWEST))


def _lay_out_image(path: Path, arrays: Sequence[ArraySpec], like: Source | None, number: int) -> FolderImage:
    if len(arrays) != 1:
        names = ", ".join(spec.name for spec in arrays)
        raise PartitionError(f"{path}: holds one image, not {len(arrays)} ({names}); use .zarr or a file for each")
    spec = arrays[0]
    axes = plan_axes(path, spec, None if like is None else like.meta)
    array = _place(path, spec, _LEVEL, axes.kept, number)
    files: Files = group_files("", number, attributes_of(axes, spec.name, _LEVEL, number))
    files |= array_files(_LEVEL, array, number, axes.names)
    return FolderImage(tuple(files.items()), ((spec.name, array),), partial(_check_replaced, names=[_LEVEL]))


def _place(path: Path, spec: ArraySpec, at: str, kept: tuple[int, ...], number: int) -> ChunkedArray:
    dtype = stored_dtype(path, spec)
    shape = tuple(spec.shape)
    return place(at, shape, dtype, chunk_extents(shape, spec.tile, dtype.itemsize), kept, number)


def _overlap(names: Sequence[str]) -> bool:
    return len(set(names)) != len(names) or any(group in names for name in names for group in _groups_above(name))


def _check_replaced(path: Path, names: Sequence[str]) -> None:
    """Refuse to replace a folder that holds anything but arrays of the names that are written.

    Raises:
        PartitionError: it does.
    """
    if not any(path.iterdir()):
        return
    if not any((path / root).exists() for root in ROOTS):
        raise PartitionError(f"{path}: is a folder and no Zarr store; remove it or choose another name")
    others = [name or "an array without a name" for name in held_arrays(path) if name not in names]
    if others:
        raise PartitionError(f"{path}: exists and holds {', '.join(others)}, which would be lost; remove it or choose "
                             "another name")
