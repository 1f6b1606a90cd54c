"""From a path to its format, by the end of its name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from partitioner.errors import PartitionError
from runtime.volumes.base import ArraySpec, Source, VolumeFormat, only_array
from runtime.volumes.formats import all_formats
from runtime.volumes.sinks import Sink
from runtime.volumes.sources import open_binary


def known_suffixes() -> tuple[str, ...]:
    """Ends of the file names that can be read, and, but for .zarr, written."""
    return tuple(suffix for known in all_formats() for suffix in known.suffixes)


def open_source(
    path: str | Path, name: str | None = None, dtype: np.dtype[np.generic] | type[np.generic] | None = None
) -> Source:
    """Open a volume file for reading part by part.

    Args:
        path: .npy, .npz, .nii, .nii.gz, .h5, .hdf5 or .zarr; `scan.h5:/ct` names an array in the file.
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
        path: .npy, .npz, .nii, .nii.gz, .h5 or .hdf5 (`scan.h5:/labels` names the one array); an existing file is
            replaced, with all that it holds, when the sink is committed.
        arrays: one, or several with distinct names for .npz and .h5.
        like: a source whose affine and header go over, where both are NIfTI.

    Raises:
        PartitionError: unknown format, a folder that is missing or not writable, or arrays that the
            format cannot hold.
    """
    place = _locate(path)
    wanted = list(arrays)
    if place.inside is not None:
        wanted = [replace(only_array(Path(path), arrays), name=place.inside)]
    return Sink(place.file, place.kind.lay_out(place.file, wanted, like))


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
                return _Place(Path(text[:end]), text[end + 2 :] or None, known)
    return _Place(file, None, _format_of(file))


def _format_of(path: Path) -> VolumeFormat:
    name = path.name.lower()
    for known in all_formats():
        if name.endswith(known.suffixes):
            return known
    raise PartitionError(f"{path}: no known kind of volume file; use {', '.join(known_suffixes())}")
