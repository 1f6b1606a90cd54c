"""From a path to its format, by the end of its name; of a folder without one, by what it holds."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from partitioner.errors import PartitionError
from runtime.volumes.base import ArraySpec, FolderImage, Source, VolumeFormat, only_array, place_text
from runtime.volumes.folders import FolderSink, is_dicom, visible_files
from runtime.volumes.formats import all_formats
from runtime.volumes.sinks import FileSink, Sink
from runtime.volumes.sources import open_binary
from runtime.volumes.zarr_metadata import ROOTS

_ZARR = ".zarr"


def known_suffixes(written: bool = False) -> tuple[str, ...]:
    """Ends of the file names that can be read, or only of those that can be written too."""
    return tuple(suffix for known in all_formats() for suffix in known.suffixes
                 if not written or suffix not in known.read_only)


def open_source(
    path: str | Path, name: str | None = None, dtype: np.dtype[np.generic] | type[np.generic] | None = None
) -> Source:
    """Open a volume file for reading part by part.

    Args:
        path: a file with one of the `known_suffixes`, or a folder: a Zarr store, a stack of TIFF files, a DICOM
            series; `scan.h5:/ct` names an array in a file, `scan.zarr:/ct` in a store, `folder:/UID` a series.
        name: which array of a file that holds several; may be left out where there is one.
        dtype: type of the values delivered; without it a NIfTI volume comes in float32 (its slope and intercept
            applied in float64, then rounded), others in their own type.

    Raises:
        PartitionError: not there, not readable, not this format, cut short, no such array, no numbers,
            values that the wanted type cannot hold, or a format whose library is not installed.
    """
    place = _locate(path)
    place.check()
    wanted = None if dtype is None else np.dtype(dtype)
    return place.kind.open_source(place.file, place.inside or name, wanted)


def is_volume(path: str | Path) -> bool:
    """Whether a path means a volume by its name, or by what its folder holds."""
    try:
        _locate(path)
    except PartitionError:
        return False
    return True


def array_names(path: str | Path) -> tuple[str, ...]:
    """Names of the arrays in a file; none for formats that hold one array without a name.

    Raises:
        PartitionError: as `open_source`.
    """
    place = _locate(path)
    place.check()
    return place.kind.names(place.file) if place.inside is None else (place.inside,)


def create_sink(path: str | Path, arrays: Sequence[ArraySpec], like: Source | None = None) -> Sink:
    """Plan a volume file that is written part by part; checks everything and touches no file.

    Stored types: as given, but bfloat16 becomes float32; in NIfTI also bool becomes uint8 and float16
    float32.  A NIfTI file takes (1, 1, x, y, z) as a volume x, y, z and (1, C, x, y, z) as x, y, z, C.
    A .nii.gz or .npz needs twice the space until it is finished; members of a .npz are not compressed, so
    that they can be mapped again.

    Args:
        path: a file with one of the `known_suffixes(written=True)` (`scan.h5:/labels` names the one array); an
            existing file is replaced, with all that it holds, when the sink is committed; so is a Zarr store, but
            not one that holds other arrays.
        arrays: one, or several with distinct names for .npz, .h5 and .zarr.
        like: a source whose place in the world goes over; between NIfTI files all of the header does.

    Raises:
        PartitionError: unknown format, a folder that is missing or not writable, or arrays that the
            format cannot hold.
    """
    place = _locate(path)
    wanted = list(arrays)
    if place.inside is not None:
        wanted = [replace(only_array(Path(path), arrays), name=place.inside)]
    image = place.kind.lay_out(place.file, wanted, like)
    return FolderSink(place.file, image) if isinstance(image, FolderImage) else FileSink(place.file, image)


@dataclass(frozen=True)
class _Place:
    """A path as `file` or `file:/inside`."""

    file: Path
    inside: str | None
    kind: VolumeFormat

    def check(self) -> None:
        """Make sure that there is a file that can be read; folders are looked at by their format."""
        if not self.kind.is_folder:
            open_binary(self.file).close()


def _locate(path: str | Path) -> _Place:
    """The file, and the array in it, that a path means."""
    file = Path(path)
    text = str(file)
    for known in (k for k in all_formats() if k.has_names):
        for suffix in known.suffixes:
            at = text.lower().find(f"{suffix}:/")
            if at >= 0 and not file.exists():
                end = at + len(suffix)
                return _Place(_reachable(Path(text[:end]), known), text[end + 2 :] or None, known)
    folder, colon, inside = text.rpartition(":/")
    if colon and not file.exists() and os.path.isdir(folder):
        return _Place(Path(folder), inside or None, _format_of(Path(folder)))
    return _Place(file, None, _format_of(file))


def _reachable(path: Path, kind: VolumeFormat) -> Path:
    """The path, unless it is a URL of something that is no Zarr store."""
    if "://" in place_text(path) and _ZARR not in kind.suffixes:
        raise PartitionError(f"{place_text(path)}: only Zarr stores are reached by URL; copy the file here")
    return path


def _format_of(path: Path) -> VolumeFormat:
    name = path.name.lower()
    for known in all_formats():
        if name.endswith(known.suffixes):
            _reachable(path, known)
            return known
    if path.is_dir():
        return _format_of_folder(path)
    raise PartitionError(f"{place_text(path)}: no known kind of volume file; use {', '.join(known_suffixes())}")


def _format_of_folder(folder: Path) -> VolumeFormat:
    """What a folder holds whose name does not say it.

    Raises:
        PartitionError: nothing that is known.
    """
    try:
        names = visible_files(folder)
    except OSError as error:
        raise PartitionError(f"{folder}: cannot be read ({error.strerror}); check its permissions") from error
    if any((folder / root).exists() for root in ROOTS):
        return _format_of(Path(_ZARR))
    if names and all(name.lower().endswith((".tif", ".tiff")) for name in names):
        return _format_of(Path(".tif"))
    if any(name.lower().endswith(".dcm") or is_dicom(folder / name) for name in names):
        return _format_of(Path(".dcm"))
    raise PartitionError(f"{folder}: is a folder and no Zarr store, TIFF stack or DICOM series; name the volume file")
