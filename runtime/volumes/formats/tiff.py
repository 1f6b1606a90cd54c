"""TIFF through tifffile: stacks in one file or in a folder of files, OME-TIFF; pages are read in pieces.

    axes of the file               presented as
    pages of y x                   1 1 z y x
    a single page                  1 1 y x
    z c y x, t z c y x, ...        t c z y x

`scan.tif:/1` is another image of a file that holds several.  Written are whole pages without compression, whose values
have known places: (t, c, z, y, x) in this order, as BigTIFF where they are many, with OME's description in .ome.tif.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast
from xml.etree import ElementTree

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
from runtime.volumes.folders import visible_files
from runtime.volumes.headers import HeaderFile
from runtime.volumes.ome import OmeAxes, plan_axes
from runtime.volumes.pages import Pages, segment_extents
from runtime.volumes.raw import Array, Delivery, RawArray, c_order
from runtime.volumes.sources import ChunkedSource, Contents, MappedSource
from runtime.volumes.tiff_files import check_decoder, check_pages, line_of, opened_tiff, tifffile_of

_OME = (".ome.tif", ".ome.tiff")
_BATCH, _CHANNEL, _DEPTH = 0, 1, 2
_AXES = {"T": _BATCH, "C": _CHANNEL, "S": _CHANNEL, "Z": _DEPTH, "Q": _DEPTH, "I": _DEPTH}
_UNITS = {"nanometer": "nm", "micrometer": "µm", "millimeter": "mm", "centimeter": "cm", "meter": "m", "angstrom": "Å"}
_CENTIMETRES = {"nanometer": 1e-7, "micrometer": 1e-4, "millimeter": 0.1, "centimeter": 1.0, "meter": 100.0}
_CLASSIC_LIMIT = 2**32 - 2**25


class TiffFormat:
    """See `VolumeFormat`."""

    suffixes = (".tif", ".tiff", ".btf")
    is_folder, has_names, read_only = True, True, ()

    def names(self, path: Path) -> tuple[str, ...]:
        """Numbers of the images, where a file holds several."""
        if path.is_dir():
            return ()
        with opened_tiff(path) as file:
            count = len(_images(file))
            return tuple(map(str, range(count))) if count > 1 else ()

    def open_source(self, path: Path, name: str | None, dtype: DType | None) -> Source:
        """See `VolumeFormat.open_source`."""
        if path.is_dir():
            return _open_folder(path, name, dtype)
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(opened_tiff(path))
            where, image = _choose(path, _images(file), name)
            _check(where, image, file)
            stored = np.dtype(image.dtype).newbyteorder(file.byteorder)
            delivery = Delivery(delivered_dtype(where, stored, dtype))
            shape, order = _presented(where, image)
            meta = _meta(where, file, name, len(shape) - _DEPTH)
            if image.offset is not None:
                return MappedSource(Contents(path, RawArray(image.offset, shape, stored, order), delivery, meta))
            handle = cast(BinaryIO, file.filehandle)
            native = stored.newbyteorder("=") if not image.form.is_final else stored
            pages = Pages(shape, native, order, len(image.form.shape), lambda number: (image.pages[number], handle))
            return _source(Contents(path, _raw(pages), delivery, meta), where, pages, image.form, stack.pop_all())

    def lay_out(self, path: Path, arrays: Sequence[ArraySpec], like: Source | None) -> FileImage:
        """See `VolumeFormat.lay_out`."""
        spec = only_array(path, arrays)
        is_ome = path.name.lower().endswith(_OME)
        dtype = _tiff_dtype(path, spec, is_ome)
        shape = tuple(spec.shape)
        letters = {4: "TCYX", 5: "TCZYX"}.get(len(shape))
        if letters is None or not all(shape):
            raise PartitionError(f"{path}: TIFF holds images of shape (t, c, y, x) or (t, c, z, y, x), not "
                                 f"'{spec.name}' of shape {shape}; write .npy")
        described = _described(plan_axes(path, spec, None if like is None else like.meta), letters, is_ome)
        size = math.prod(shape) * dtype.itemsize
        is_big = size > _CLASSIC_LIMIT - 1024 * math.prod(shape[:-2]) or path.name.lower().endswith(".btf")
        image = HeaderFile()
        kind = {"bigtiff": is_big, "byteorder": "<", "ome": is_ome, "shaped": not is_ome}
        with tifffile_of(path).TiffWriter(image, **kind) as writer:
            begin, _ = writer.write(shape=shape, dtype=dtype, photometric="minisblack", software=False,
                                        returnoffset=True, **described)
        raw = RawArray(int(begin), shape, dtype.newbyteorder("<"), c_order(len(shape)))
        return FileImage(tuple(image.blocks), ((spec.name, raw),), image.size)


FORMAT = TiffFormat()


@dataclass(frozen=True)
class _Image:
    """Pages of one form that belong together.

    Args:
        axes: a letter each; those of a page last.
        offset: of the first value, where all lie side by side as they are.
    """

    axes: str
    shape: tuple[int, ...]
    dtype: DType
    pages: Sequence[Any]
    offset: int | None
    form: Any


# --- reading ---------------------------------------------------------------------------------------


def _images(file: Any) -> list[_Image]:
    """The images of a file; pages alike that say nothing of belonging together are a stack."""
    series = list(file.series)
    alone = all(len(s.pages) == 1 for s in series) and not (file.is_ome or file.is_imagej)
    if len(series) > 1 and alone and len({(s.shape, s.dtype, s.axes) for s in series}) == 1:
        first, pages = series[0], [s.pages[0] for s in series]
        one_form = all(p.hash == pages[0].hash for p in pages)
        if one_form:
            return [_Image("I" + first.axes, (len(series), *first.shape), first.dtype, pages, None, pages[0].keyframe)]
    return [_Image(s.get_axes(False), s.get_shape(False), s.dtype, list(s.pages), s.dataoffset, s.keyframe)
            for s in series]


def _choose(path: Path, images: Sequence[_Image], name: str | None) -> tuple[Path, _Image]:
    """The image meant, and its place for messages."""
    numbers = [str(number) for number in range(len(images))]
    if not images:
        raise PartitionError(f"{path}: holds no image; write it again")
    if name is not None and name not in numbers:
        raise PartitionError(f"{path}: holds no image '{name}'; it has {', '.join(numbers)}")
    if name is None and len(images) > 1:
        shapes = ", ".join(f"{n}: {'x'.join(map(str, i.shape))}" for n, i in zip(numbers, images, strict=True))
        raise PartitionError(f"{path}: holds several images ({shapes}); name one, as {path}:/0")
    return (path, images[0]) if name is None else (Path(f"{path}:/{name}"), images[int(name)])


def _check(where: Path, image: _Image, file: Any) -> None:
    """Make sure that every page is in the file, and whole, and can be decoded."""
    if any(page is None for page in image.pages):
        raise PartitionError(f"{where}: damaged or cut short (pages are missing); copy or write it again")
    if any(page.parent is not file for page in image.pages):
        raise PartitionError(f"{where}: is one image in several files; convert it to one file")
    if image.offset is None and len(image.pages) * math.prod(image.form.shape) != math.prod(image.shape):
        raise PartitionError(f"{where}: has {len(image.pages)} pages for {'x'.join(map(str, image.shape))} values; "
                             "convert it")
    if image.offset is None:
        check_pages(where, image.pages, file.filehandle.size)
        check_decoder(where, image.form)


def _presented(where: Path, image: _Image) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The extents as a model sees them, and its axes from the slowest in the file to the fastest."""
    kept = [(a, n) for a, n in zip(image.axes, image.shape, strict=True) if n > 1 or a in "YX"]
    places = [{"Y": -2, "X": -1}.get(axis, _AXES.get(axis)) for axis, _ in kept]
    if None in places or len(set(places)) != len(places) or [a for a, _ in kept if a in "YX"] != ["Y", "X"]:
        form = " x ".join(f"{a}={n}" for a, n in kept)
        raise PartitionError(f"{where}: has axes {form}; t, c, z, y, x are needed, each once at most; convert it")
    # tifffile lists z for every file of OME and ImageJ, with s at the end; elsewhere somebody has named it.
    is_volume = _DEPTH in places or ("Z" in image.axes and not image.axes.endswith("S"))
    rank = 5 if is_volume else 4
    shape = [1] * rank
    stored = [cast(int, place) % rank for place in places]
    for axis, (_, extent) in zip(stored, kept, strict=True):
        shape[axis] = extent
    return tuple(shape), (*(axis for axis in range(rank) if axis not in stored), *stored)


def _raw(pages: Pages) -> RawArray:
    return RawArray(0, pages.shape, pages.dtype, c_order(len(pages.shape)))


def _source(contents: Contents, where: Path, pages: Pages, form: Any, held: contextlib.ExitStack) -> ChunkedSource:
    high, wide = segment_extents(form)
    chunks = (1,) * (len(pages.shape) - 2) + (high, wide)

    def fetch(cells: tuple[slice, ...]) -> Array:
        try:
            return pages.fetch(cells)
        except Exception as error:  # every codec has errors of its own
            raise PartitionError(f"{where}: damaged or cut short ({line_of(error)}); copy or write it again") from error

    return ChunkedSource(contents, chunks, fetch, held.close)


# --- a folder of files -----------------------------------------------------------------------------


def _open_folder(path: Path, name: str | None, dtype: DType | None) -> ChunkedSource:
    """The single pages of the files in a folder, in natural order of their names, as a volume."""
    if name is not None:
        raise PartitionError(f"{path}: is a stack, so it holds no '{name}'; leave out the name")
    files = [path / n for n in visible_files(path) if n.lower().endswith(TiffFormat.suffixes)]
    if not files:
        raise PartitionError(f"{path}: is a folder without TIFF files; name the volume file")
    first = _only_page(files[0])
    for file in files[1:]:
        if (other := _only_page(file)).alike != first.alike:
            raise PartitionError(f"{file}: has pages of {other}, {files[0].name} of {first}; a stack's must be alike")
    stored = first.dtype
    delivery = Delivery(delivered_dtype(path, stored, dtype))
    form = first.form
    planes, _, height, width, samples = form.shaped
    shape = (1, max(planes, samples), len(files), height, width)
    inner = {2: (3, 4), 3: (1, 3, 4) if planes > 1 else (3, 4, 1)}[len(form.shape)]
    order = (0, 2, *inner) if len(inner) == 3 else (0, 1, 2, *inner)
    held = contextlib.ExitStack()
    native = stored.newbyteorder("=") if not form.is_final else stored
    pages = Pages(shape, native, order, len(inner), _OneByOne(files, held).page)
    return _source(Contents(path, _raw(pages), delivery), path, pages, form, held)


@dataclass(frozen=True)
class _Page:
    """What the only page of a file is like."""

    shape: tuple[int, ...]
    dtype: DType
    form: Any

    @property
    def alike(self) -> tuple[Any, ...]:
        """What all pages of a stack have in common."""
        return self.shape, self.dtype, self.form.is_final, self.form.shaped

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.shape))} {self.dtype.name}"


def _only_page(path: Path) -> _Page:
    with opened_tiff(path) as file:
        if len(file.pages) != 1 or len(file.pages[0].shape) > 3:
            raise PartitionError(f"{path}: holds {len(file.pages)} pages; a folder's files must hold one each")
        page = file.pages[0]
        check_pages(path, [page], file.filehandle.size)
        check_decoder(path, page.keyframe)
        return _Page(tuple(page.shape), np.dtype(page.dtype).newbyteorder(file.byteorder), page.keyframe)


class _OneByOne:
    """Opens one file of a stack at a time."""

    def __init__(self, files: Sequence[Path], held: contextlib.ExitStack) -> None:
        self._files = files
        self._held = held

    def page(self, number: int) -> tuple[Any, BinaryIO]:
        """The page of a file, which stays open until the next one is asked for."""
        self._held.close()
        file = self._held.enter_context(opened_tiff(self._files[number]))
        return file.pages[0], cast(BinaryIO, file.filehandle)


# --- voxel sizes and writing -----------------------------------------------------------------------


def _meta(where: Path, file: Any, name: str | None, rank: int) -> Meta | None:
    """The voxel sizes that an OME description gives."""
    if not file.is_ome or not file.ome_metadata:
        return None
    try:
        root = ElementTree.fromstring(file.ome_metadata)
        found = [e.attrib for e in root.iter() if e.tag.rpartition("}")[2] == "Pixels"][int(name or 0)]
        sizes = {a: float(found.get(f"PhysicalSize{a}", "nan")) for a in "ZYX"}
        signs = {a: found.get(f"PhysicalSize{a}Unit", "µm").replace("\u03bc", "µ") for a in "ZYX"}
    except (ElementTree.ParseError, IndexError, ValueError) as error:
        raise PartitionError(f"{where}: its OME description is damaged ({line_of(error)}); write it again") from error
    if not any(size > 0 for size in sizes.values()):
        return None
    units = {sign: unit for unit, sign in _UNITS.items()}
    axes = "ZYX"[-rank:]
    scale = tuple(sizes[a] if sizes[a] > 0 else 1.0 for a in axes)
    return OmeAxes(tuple(axes.lower()), tuple(units.get(signs[a]) for a in axes), scale, (0.0,) * rank).meta


def _tiff_dtype(path: Path, spec: ArraySpec, is_ome: bool) -> DType:
    dtype = stored_dtype(path, spec)
    if dtype == np.bool_:
        return np.dtype(np.uint8)
    if not is_ome:
        return dtype
    if dtype.kind in "iu" and dtype.itemsize > 4:
        raise PartitionError(f"{path}: OME-TIFF holds integers of up to 32 bits, '{spec.name}' is {dtype}; write .tif")
    return np.dtype(np.float32) if dtype == np.float16 else dtype


def _described(axes: OmeAxes, letters: str, is_ome: bool) -> dict[str, Any]:
    """Arguments that tell tifffile of axes and voxel sizes."""
    sizes = list(_sizes(axes))
    metadata: dict[str, Any] = {"axes": letters}
    for letter, (size, unit) in zip("ZYX"[-len(sizes) :], sizes, strict=True):
        if is_ome and unit is not None:
            metadata |= {f"PhysicalSize{letter}": size, f"PhysicalSize{letter}Unit": _UNITS[unit]}
    if all(unit in _CENTIMETRES for _, unit in sizes):
        (high, unit), (wide, _) = sizes[-2:]
        per_unit = _CENTIMETRES[cast(str, unit)]
        if not is_ome and len(sizes) > len("YX"):
            metadata |= {"spacing": sizes[0][0], "unit": sizes[0][1]}
        return {"metadata": metadata, "resolution": (1 / (wide * per_unit), 1 / (high * per_unit)),
                "resolutionunit": "CENTIMETER"}
    return {"metadata": metadata}


def _sizes(axes: OmeAxes) -> Iterator[tuple[float, str | None]]:
    for axis in axes.spatial:
        unit = axes.units[axis]
        yield axes.scale[axis], unit if unit in _UNITS else None
