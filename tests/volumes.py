"""What the tests of volume files share: cells that are all different, and comparisons in parts."""

from __future__ import annotations

import gzip
import itertools
import math
from pathlib import Path
from typing import Any

import h5py
import nibabel
import numpy as np
import tifffile
from numpy.typing import NDArray

from partitioner.geometry import Box
from runtime.volumes import ArraySpec, Source, create_sink, known_suffixes

Array = NDArray[Any]
WRITTEN = tuple(suffix for suffix in known_suffixes(written=True) if suffix != ".zarr")
"""Files that are written; a Zarr store is a folder."""
TIFF = (".tif", ".tiff", ".btf")
SHAPE = (1, 2, 7, 11, 5)
AFFINE = np.array([[-0.7, 0.1, 0, 90], [0, 0.8, 0.2, -126], [0.3, 0, 2.5, -72], [0, 0, 0, 1]])


def values(shape: tuple[int, ...], dtype: Any = np.float32) -> Array:
    """Distinct cells, so that a cell in the wrong place shows."""
    return np.arange(1, math.prod(shape) + 1).reshape(shape).astype(dtype)


def save_nifti(path: Path, array: Array, slope: float = 1.0, inter: float = 0.0, order: str = "<") -> Any:
    """A NIfTI file that holds exactly these stored values, scaled by its header."""
    header = nibabel.Nifti1Header(endianness=order)
    header.set_data_dtype(array.dtype)
    image = nibabel.Nifti1Image(array, AFFINE, header)
    image.header.set_slope_inter(slope, inter)
    image.to_filename(path)
    if (slope, inter) != (1.0, 0.0):  # nibabel rescales as it saves; put the stored values back
        plain = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        saved = nibabel.load(path)
        offset = int(saved.dataobj.offset)
        assert (saved.dataobj.slope, saved.dataobj.inter) == (np.float32(slope), np.float32(inter))
        plain = plain[:offset] + array.astype(saved.dataobj.dtype).tobytes(order="F")
        path.write_bytes(gzip.compress(plain) if path.suffix == ".gz" else plain)
    return nibabel.load(path)


def presented(array: Array) -> Array:
    """x y z or x y z c as a model sees it."""
    return array[None, None] if array.ndim == 3 else np.moveaxis(array, -1, 0)[None]


def check_parts(source: Source, expected: Array) -> None:
    """Boxes of all kinds and slabs of all sizes give the expected cells."""
    assert source.shape == expected.shape
    assert source.dtype == expected.dtype
    assert source.dtype.isnative
    choices = [{(0, n), (n // 2, n), (max(n - 1, 0), n), (0, 0)} for n in expected.shape]
    for cuts in itertools.product(*choices):
        part = source.read(cuts)
        assert part.flags.c_contiguous
        np.testing.assert_array_equal(part, expected[tuple(slice(*cut) for cut in cuts)])
    np.testing.assert_array_equal(source.read(), expected)
    np.testing.assert_array_equal(source.read(Box.whole(expected.shape).intervals()), expected)
    for max_bytes in (1, 1000, 10**9):
        found = np.zeros_like(expected)
        count = 0
        for start, slab in source.slabs(max_bytes):
            found[tuple(slice(a, a + n) for a, n in zip(start, slab.shape, strict=True))] = slab
            assert slab.size == 1 or slab.nbytes <= max_bytes
            count += slab.size
        assert count == expected.size
        np.testing.assert_array_equal(found, expected)


def load(path: Path, name: str = "out") -> Array:
    """The whole file by its own library, as a model sees it."""
    if path.suffix == ".npy":
        return np.load(path)
    if path.suffix in TIFF:
        with tifffile.TiffFile(path) as file:
            return file.series[0].asarray(squeeze=False)
    if path.suffix in (".h5", ".hdf5"):
        with h5py.File(path) as file:
            return file[name][()]
    return np.load(path)[name] if path.suffix == ".npz" else presented(np.asarray(nibabel.load(path).dataobj))


def write_whole(path: Path, array: Array, like: Source | None = None) -> None:
    spec = ArraySpec("out", array.shape, array.dtype)
    with create_sink(path, [spec], like) as sink, sink.writer() as writer:
        writer.write(None, array)
