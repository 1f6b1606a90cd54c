"""The descriptions in a Zarr store (formats 2 and 3), as files of JSON: written for arrays without compression."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from runtime.volumes.base import DType
from runtime.volumes.chunks import ChunkedArray

Files = dict[str, bytes]
"""By path within the store."""

ROOTS = ("zarr.json", ".zgroup", ".zarray")
"""One of these lies in every folder that is an array or a group."""


def array_files(at: str, array: ChunkedArray, zarr_format: int, names: Sequence[str] | None = None) -> Files:
    """The description of an array at a path of the store.

    Args:
        names: of its axes, one for each that is kept.
    """
    shape = [array.shape[axis] for axis in array.kept]
    chunks = [array.chunks[axis] for axis in array.kept]
    fill: Any = False if array.dtype.kind == "b" else 0.0 if array.dtype.kind == "f" else 0
    if zarr_format == 2:
        described = {"zarr_format": 2, "shape": shape, "chunks": chunks, "dtype": array.dtype.str, "order": "C",
                     "fill_value": fill, "filters": None, "compressor": None, "dimension_separator": "/"}
        return {_join(at, ".zarray"): _json(described), _join(at, ".zattrs"): _json({})}
    codec: dict[str, Any] = {"name": "bytes"}
    if array.dtype.itemsize > 1:
        codec["configuration"] = {"endian": "little"}
    described = {
        "zarr_format": 3, "node_type": "array", "shape": shape, "data_type": array.dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunks}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": fill, "codecs": [codec], "attributes": {}, "storage_transformers": [],
        **({} if names is None else {"dimension_names": list(names)}),
    }
    return {_join(at, "zarr.json"): _json(described)}


def group_files(at: str, zarr_format: int, attributes: Mapping[str, Any] | None = None) -> Files:
    """The description of a group at a path of the store."""
    if zarr_format == 2:
        return {_join(at, ".zgroup"): _json({"zarr_format": 2}), _join(at, ".zattrs"): _json(attributes or {})}
    described = {"zarr_format": 3, "node_type": "group", "attributes": attributes or {}}
    return {_join(at, "zarr.json"): _json(described)}


def place(at: str, shape: tuple[int, ...], dtype: DType, chunks: tuple[int, ...], kept: tuple[int, ...],
          zarr_format: int) -> ChunkedArray:
    """Where the values of an array go."""
    little = dtype.newbyteorder("<")
    if zarr_format == 2:
        return ChunkedArray(at, shape, little, chunks, kept, "0")
    return ChunkedArray(_join(at, "c"), shape, little, chunks, kept)


def held_arrays(folder: Path, at: str = "") -> Iterator[str]:
    """Paths of all arrays in a store that is a folder."""
    if _is_array(folder):
        yield at
        return
    for inside in sorted(p for p in folder.iterdir() if p.is_dir()):
        yield from held_arrays(inside, _join(at, inside.name))


def _is_array(folder: Path) -> bool:
    if (folder / ".zarray").is_file():
        return True
    try:
        return json.loads((folder / "zarr.json").read_bytes()).get("node_type") == "array"
    except (OSError, ValueError, AttributeError):
        return False


def _join(at: str, name: str) -> str:
    return f"{at}/{name}" if at else name


def _json(described: Mapping[str, Any]) -> bytes:
    return json.dumps(described, indent=2).encode()
