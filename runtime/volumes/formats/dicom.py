"""A DICOM series through pydicom: the files of a folder, one slice each, as a volume (1, 1, slices, rows, columns).

Slices are in the order of their positions along their normal; values are those stored, by each file's own rescale slope
and intercept.  The affine gives places as NIfTI does (x to the right, y to the front, z up).  `folder:/UID` is one
series of a folder that holds several.  Read only.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import warnings
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from partitioner.errors import PartitionError
from runtime.volumes.base import ArraySpec, DType, FileImage, Meta, Source, delivered_dtype
from runtime.volumes.folders import is_dicom, visible_files
from runtime.volumes.raw import Array, Delivery, RawArray, c_order
from runtime.volumes.sources import ChunkedSource, Contents

_SUFFIX = ".dcm"
_DIRECTORY = "DICOMDIR"
_IMAGE = "Image Storage"
"""Part of the name of every class of images."""
_READ = (
    "SeriesInstanceUID", "SeriesDescription", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing",
    "SliceThickness", "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "BitsAllocated", "PixelRepresentation",
    "RescaleSlope", "RescaleIntercept", "PixelData", "FloatPixelData", "DoubleFloatPixelData",
)
_NEEDED = (
    "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "Rows", "Columns", "BitsAllocated",
)
_PIXELS = {"PixelData": "", "FloatPixelData": "f", "DoubleFloatPixelData": "f"}
_DEFERRED = 4096
"""Values longer than this are passed over; all but the pixels are shorter."""
_TOLERANCE = 0.02
"""Millimetres by which a position may be off, or the same part of the distance between slices."""
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])


class DicomFormat:
    """See `VolumeFormat`."""

    suffixes = (_SUFFIX,)
    is_folder, has_names, read_only = True, True, (_SUFFIX,)

    def names(self, path: Path) -> tuple[str, ...]:
        """The series, where a folder holds several."""
        found = _look_through(path).series
        return tuple(found) if len(found) > 1 else ()

    def open_source(self, path: Path, name: str | None, dtype: DType | None) -> Source:
        """See `VolumeFormat.open_source`."""
        where, slices = _choose(path, _look_through(path), name)
        slices = _in_order(where, slices)
        _check_alike(slices)
        _check_decoder(slices[0])
        stored = slices[0].dtype
        is_scaled = any((s.slope, s.inter) != (1.0, 0.0) for s in slices)
        natural = np.dtype(np.float64) if is_scaled else stored
        wanted = np.dtype(np.float32) if dtype is None else dtype
        shape = (1, 1, len(slices), *slices[0].extents)
        raw = RawArray(0, shape, natural, c_order(len(shape)))
        contents = Contents(path, raw, Delivery(delivered_dtype(where, natural, wanted)), Meta(_affine(slices), None))

        def fetch(cells: tuple[slice, ...]) -> Array:
            found = np.empty([c.stop - c.start for c in cells], natural)
            for number in range(cells[2].start, cells[2].stop):
                found[0, 0, number - cells[2].start] = slices[number].values(natural)[cells[3:]]
            return found

        return ChunkedSource(contents, (1, 1, 1, *slices[0].extents), fetch)

    def lay_out(self, path: Path, arrays: Sequence[ArraySpec], like: Source | None) -> FileImage:
        """Refuses: a DICOM series has far more to say than a network knows."""
        raise PartitionError(f"{path}: DICOM is read, not written; write .nii.gz or another kind of file")


FORMAT = DicomFormat()


@dataclass(frozen=True)
class _Slice:
    """One file of a series.

    Args:
        position: of the first voxel, in millimetres of the patient.
        rows, columns: directions in which the index of the column and of the row grows.
        spacing: between rows, between columns.
        thickness: of the slice, where the file says it.
        syntax: how the pixels are encoded.
    """

    path: Path
    series: str
    title: str
    position: NDArray[np.float64]
    rows: NDArray[np.float64]
    columns: NDArray[np.float64]
    spacing: tuple[float, float]
    thickness: float | None
    extents: tuple[int, int]
    dtype: DType
    slope: float
    inter: float
    syntax: Any

    @property
    def normal(self) -> NDArray[np.float64]:
        """The direction across the slice."""
        return np.cross(self.rows, self.columns)

    @property
    def alike(self) -> dict[str, Any]:
        """What the slices of a volume have in common."""
        directions = tuple(np.round([*self.rows, *self.columns], 4).tolist())
        return {"rows x columns": self.extents, "type": self.dtype.name, "spacing": np.round(self.spacing, 5).tolist(),
                "orientation": directions}

    def values(self, dtype: DType) -> Array:
        """The slice, rescaled where its values are.

        Raises:
            PartitionError: the file is damaged.
        """
        with _reading(self.path):
            stored = _pydicom(self.path).dcmread(self.path).pixel_array
            if stored.shape != self.extents:
                raise ValueError(f"{stored.shape} pixels where {self.extents} are announced")
        found = stored.astype(dtype)
        if (self.slope, self.inter) != (1.0, 0.0):
            found *= self.slope
            found += self.inter
        return found


# --- the files of a folder -------------------------------------------------------------------------


def _pydicom(path: Path) -> ModuleType:
    try:
        import pydicom
    except ImportError as error:
        raise PartitionError(
            f"{path}: DICOM series need pydicom; install it with pip install 'partitioner[dicom]'"
        ) from error
    return pydicom


@contextlib.contextmanager
def _reading(path: Path) -> Generator[None]:
    """Turn what the library says of a damaged file into one line; much of it says it as a warning and goes on."""
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            yield
        cut = next((w.message for w in said if "End of file" in str(w.message)), None)
        if isinstance(cut, Warning):
            raise EOFError(str(cut))
    except PartitionError:
        raise
    except Exception as error:  # every codec has errors of its own
        raise PartitionError(f"{path}: damaged or cut short ({_line(error)}); copy or write it again") from error


@dataclass(frozen=True)
class _Folder:
    """What a folder holds.

    Args:
        series: the slices of each.
        unfit: why a file of a series is no slice of a volume; a report or a screenshot has a series of its own.
    """

    series: dict[str, list[_Slice]]
    unfit: dict[str, str]


class _UnfitError(PartitionError):
    """A file that is no slice of a volume."""

    def __init__(self, series: str, reason: str) -> None:
        super().__init__(reason)
        self.series = series


def _look_through(folder: Path) -> _Folder:
    """The slices in a folder by their series.

    Raises:
        PartitionError: no folder, no slices in it, or a damaged file.
    """
    if not folder.exists():
        raise PartitionError(f"{folder}: no such file; check the path")
    if not folder.is_dir():
        raise PartitionError(f"{folder}: a DICOM series is the folder of its files; give that folder")
    found = _Folder({}, {})
    for name in visible_files(folder):
        path = folder / name
        if not is_dicom(path) and name.lower().endswith(_SUFFIX):
            raise PartitionError(f"{path}: no DICOM file, or a damaged one; copy it again or remove it")
        if not is_dicom(path) or name.upper() == _DIRECTORY:
            continue
        try:
            one = _read(path)
        except _UnfitError as error:
            found.unfit.setdefault(error.series, str(error))
        else:
            found.series.setdefault(one.series, []).append(one)
    if not found.series:
        raise PartitionError(next(iter(found.unfit.values()), f"{folder}: holds no DICOM images; give the folder of a "
                                                              "series"))
    return found


def _read(path: Path) -> _Slice:
    """What a file's header says.

    Raises:
        PartitionError: the file is damaged, cut short, or no slice.
    """
    pydicom = _pydicom(path)
    with _reading(path):
        data: Any = pydicom.dcmread(path, defer_size=_DEFERRED, specific_tags=list(_READ))
        if data.get("SeriesInstanceUID") is None:
            raise PartitionError(f"{path}: damaged or cut short (it belongs to no series); copy it again or remove it")
        kind = data.file_meta.get("MediaStorageSOPClassUID")
        if kind is not None and _IMAGE in kind.name and not any(pixels in data for pixels in _PIXELS):
            raise PartitionError(f"{path}: damaged or cut short (it holds no pixels); copy it again or remove it")
        if (reason := _unfit(data)) is not None:
            raise _UnfitError(str(data.SeriesInstanceUID), f"{path}: {reason}")
        _check_length(path, data)
        kind = next(kind for pixels, kind in _PIXELS.items() if pixels in data)
        sign = kind or ("i" if int(data.PixelRepresentation) else "u")
        spacing = [float(v) for v in data.PixelSpacing]
        orientation = np.array([float(v) for v in data.ImageOrientationPatient])
        thickness = data.get("SliceThickness")
        return _Slice(
            path, str(data.SeriesInstanceUID), str(data.get("SeriesDescription", "")),
            np.array([float(v) for v in data.ImagePositionPatient]), orientation[:3], orientation[3:],
            (spacing[0], spacing[1]), None if thickness is None else float(thickness),
            (int(data.Rows), int(data.Columns)), np.dtype(f"{sign}{int(data.BitsAllocated) // 8}"),
            float(data.get("RescaleSlope", 1)), float(data.get("RescaleIntercept", 0)),
            data.file_meta.TransferSyntaxUID)


def _unfit(data: Any) -> str | None:
    """Why a file is no slice of a volume, and what to do."""
    if not any(pixels in data for pixels in _PIXELS):
        return "holds no image; remove it from the folder"
    if int(data.get("NumberOfFrames") or 1) != 1:
        return f"holds {data.NumberOfFrames} frames; convert it to NIfTI or to single slices"
    if int(data.get("SamplesPerPixel", 1)) != 1:
        return "holds colours, a volume has one value per pixel; remove it or convert it"
    if missing := [name for name in _NEEDED if data.get(name) is None]:
        return f"does not say its {', '.join(missing)}; remove it, or convert the series to NIfTI"
    if int(data.BitsAllocated) not in (8, 16, 32, 64):
        return f"has values of {data.BitsAllocated} bits; convert it"
    return None


def _check_length(path: Path, data: Any) -> None:
    """Make sure that a file holds all of its pixels, where they are not compressed.

    Raises:
        PartitionError: it is shorter.
    """
    syntax = data.file_meta.TransferSyntaxUID
    if syntax.is_encapsulated or syntax.is_deflated:
        return  # noticed as the slice is decoded
    element: Any = data.get_item(next(pixels for pixels in _PIXELS if pixels in data), keep_deferred=True)
    needed = int(data.Rows) * int(data.Columns) * int(data.BitsAllocated) // 8
    begin, length = int(getattr(element, "value_tell", -1)), int(getattr(element, "length", 0))
    held = len(element.value) if begin < 0 else min(length, path.stat().st_size - begin)
    if held < needed:
        raise PartitionError(f"{path}: cut short, {max(0, held)} bytes where its {data.Rows} x {data.Columns} pixels "
                             f"need {needed}; copy it again")


def _choose(path: Path, folder: _Folder, name: str | None) -> tuple[Path, list[_Slice]]:
    """The series meant, and its place for messages."""
    if name is not None and name not in folder.series:
        raise PartitionError(folder.unfit.get(name, f"{path}: holds no series '{name}'; it has "
                                                    f"{', '.join(folder.series)}"))
    if name is None and len(folder.series) > 1:
        held = "; ".join(f"{uid} ({_about(slices)})" for uid, slices in folder.series.items())
        raise PartitionError(f"{path}: holds several series: {held}; name one, as {path}:/{next(iter(folder.series))}")
    chosen = next(iter(folder.series)) if name is None else name
    if chosen in folder.unfit:
        raise PartitionError(folder.unfit[chosen])
    return (path if name is None else Path(f"{path}:/{name}")), folder.series[chosen]


def _about(slices: Sequence[_Slice]) -> str:
    count = f"{len(slices)} slice{'s' if len(slices) > 1 else ''}"
    return f"{count}, {slices[0].title}" if slices[0].title else count


# --- from slices to a volume -----------------------------------------------------------------------


def _in_order(where: Path, slices: Sequence[_Slice]) -> list[_Slice]:
    """Sorted along the normal of the first slice.

    Raises:
        PartitionError: slices are missing, twice there, or not evenly spaced on a line.
    """
    normal = slices[0].normal
    found = sorted(slices, key=lambda one: float(one.position @ normal))
    along = np.array([one.position @ normal for one in found])
    if len(found) == 1:
        return found
    gaps = np.diff(along)
    usual = float(np.median(gaps))
    allowed = max(_TOLERANCE, _TOLERANCE * usual)
    for number, gap in enumerate(gaps):
        pair = f"{found[number].path.name} and {found[number + 1].path.name}"
        if gap <= allowed:
            raise PartitionError(f"{where}: {pair} lie in the same place; give a folder with one slice for each place")
        if abs(gap - usual) > allowed:
            raise PartitionError(f"{where}: {pair} are {gap:.6g} mm apart, others {usual:.6g}; slices are missing or "
                                 "unevenly spaced, complete or resample the series")
    step = (found[-1].position - found[0].position) / (len(found) - 1)
    for number, one in enumerate(found):
        if np.abs(found[0].position + number * step - one.position).max() > allowed:
            raise PartitionError(f"{where}: {one.path.name} does not lie in a line with the other slices; resample the "
                                 "series")
    return found


def _check_alike(slices: Sequence[_Slice]) -> None:
    """Make sure that the slices make a volume.

    Raises:
        PartitionError: they differ.
    """
    first = slices[0]
    for one in slices[1:]:
        for what, value in one.alike.items():
            if value != first.alike[what]:
                raise PartitionError(f"{one.path}: has {what} {value}, {first.path.name} has {first.alike[what]}; the "
                                     "slices of a series must be alike")


def _check_decoder(one: _Slice) -> None:
    """Make sure that the pixels can be decoded.

    Raises:
        PartitionError: they are compressed in a way for which no library is there.
    """
    if not one.syntax.is_encapsulated:
        return
    get_decoder = importlib.import_module("pydicom.pixels").get_decoder
    how = f"{one.path}: is compressed as {one.syntax.name}"
    try:
        decoder = get_decoder(one.syntax)
    except NotImplementedError as error:
        raise PartitionError(f"{how}, which nothing decodes; convert the series to an uncompressed one") from error
    if not decoder.is_available:
        needed = " or ".join(_packages(decoder.missing_dependencies))
        raise PartitionError(f"{how}; install {needed} with pip, or convert the series to an uncompressed one")


def _packages(missing: Sequence[str]) -> Iterator[str]:
    """Names of packages out of lines such as `gdcm - requires gdcm>=3.0.10`."""
    for line in missing:
        yield line.partition("requires ")[2] or line


def _affine(slices: Sequence[_Slice]) -> NDArray[np.float64]:
    """From slice, row and column to millimetres: right, front, up."""
    first, last = slices[0], slices[-1]
    step = first.normal * (first.thickness or 1.0)
    if len(slices) > 1:
        step = (last.position - first.position) / (len(slices) - 1)
    affine = np.eye(4)
    affine[:3, :3] = _LPS_TO_RAS @ np.stack([step, first.columns * first.spacing[0], first.rows * first.spacing[1]], 1)
    affine[:3, 3] = _LPS_TO_RAS @ first.position
    assert math.isfinite(affine.sum())
    return affine


def _line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]
