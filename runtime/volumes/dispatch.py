"""From a path to its format, by the end of its name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from partitioner.errors import PartitionError
from runtime.volumes.base import ArraySpec, Source, VolumeFormat
from runtime.volumes.formats import all_formats
from runtime.volumes.sinks import Sink
from runtime.volumes.sources import open_binary


def known_suffixes() -> tuple[str, ...]:
    """Ends of the file names that can be read and written."""
    return tuple(suffix for known in all_formats() for suffix in known.suffixes)


def open_source(
    path: str | Path, name: str | None = None, dtype: np.dtype[np.generic] | type[np.generic] | None = None
) -> Source:
    """Open a volume file for reading part by part.

    Args:
        path: .npy, .npz, .nii or .nii.gz.
        name: which array of a file that holds several; may be left out where there is one.
        dtype: type of the values delivered; without it a .npy or .npz comes in its own type, and a
            NIfTI volume in float32 (its slope and intercept applied in float64, then rounded).

    Raises:
        PartitionError: not there, not readable, not this format, cut short, no such array, no numbers,
            values that the wanted type cannot hold, or a format whose library is not installed.
    """
    file = Path(path)
    found = _format_of(file)
    open_binary(file).close()
    return found.open_source(file, name, None if dtype is None else np.dtype(dtype))


def array_names(path: str | Path) -> tuple[str, ...]:
    """Names of the arrays in a file; none for formats that hold one array without a name.

    Raises:
        PartitionError: as `open_source`.
    """
    file = Path(path)
    found = _format_of(file)
    open_binary(file).close()
    return found.names(file)


def create_sink(path: str | Path, arrays: Sequence[ArraySpec], like: Source | None = None) -> Sink:
    """Plan a volume file that is written part by part; checks everything and touches no file.

    Stored types: as given, but bfloat16 becomes float32; in NIfTI also bool becomes uint8 and float16
    float32.  A NIfTI file takes (1, 1, x, y, z) as a volume x, y, z and (1, C, x, y, z) as x, y, z, C.
    A .nii.gz or .npz needs twice the space until it is finished; members of a .npz are not compressed, so
    that they can be mapped again.

    Args:
        path: .npy, .npz, .nii or .nii.gz; an existing file is replaced when the sink is committed.
        arrays: one, or several with distinct names for .npz.
        like: a source whose affine and header go over, where both are NIfTI.

    Raises:
        PartitionError: unknown format, a folder that is missing or not writable, or arrays that the
            format cannot hold.
    """
    target = Path(path)
    return Sink(target, _format_of(target).lay_out(target, arrays, like))


def _format_of(path: Path) -> VolumeFormat:
    name = path.name.lower()
    for known in all_formats():
        if name.endswith(known.suffixes):
            return known
    raise PartitionError(f"{path}: no known kind of volume file; use {', '.join(known_suffixes())}")
