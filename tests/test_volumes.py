"""Volume files: what is read part by part equals what the formats' own libraries read."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import nibabel
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from partitioner.errors import PartitionError
from partitioner.geometry import Interval
from runtime.volumes import (
    array_names,
    open_source,
    raw,
)
from runtime.volumes.raw import Delivery, RawArray, read_box, write_box
from tests.volumes import AFFINE, SHAPE, check_parts, presented, save_nifti, values, write_whole

# --- arrays within files ---------------------------------------------------------------------------


@st.composite
def placed(draw: st.DrawFn) -> tuple[RawArray, tuple[Interval, ...]]:
    shape = tuple(draw(st.lists(st.integers(1, 7), max_size=4)))
    order = tuple(draw(st.permutations(range(len(shape)))))
    dtype = np.dtype(draw(st.sampled_from(["<i2", ">f4", "<f8", "u1"])))
    cuts = [sorted(draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in shape]
    return RawArray(draw(st.integers(0, 70)), shape, dtype, order), tuple(Interval(*cut) for cut in cuts)


@given(placed(), st.sampled_from([1, 24, 100, 2**20]))
def test_boxes_of_any_order_are_written_and_read_in_tiles(
    case: tuple[RawArray, tuple[Interval, ...]], tile_bytes: int
) -> None:
    where, box = case
    whole = values(where.shape, where.dtype)
    part = tuple(slice(i.start, i.stop) for i in box)
    with tempfile.TemporaryFile() as file, pytest.MonkeyPatch.context() as patch:
        patch.setattr(raw, "TILE_BYTES", tile_bytes)
        file.write(b"\xff" * where.offset + bytes(where.nbytes) + b"\xff")
        file.flush()
        write_box(file.fileno(), where, box, whole[part])
        expected = np.zeros_like(whole)
        expected[part] = whole[part]
        file.seek(0)
        bytes_found = file.read()
        assert bytes_found[: where.offset] + bytes_found[-1:] == b"\xff" * (where.offset + 1)
        in_file = np.frombuffer(bytes_found[where.offset : -1], where.dtype)
        np.testing.assert_array_equal(in_file, expected.transpose(where.order).ravel())
        delivery = Delivery(np.dtype(np.float64), 2.0, -1.0)
        np.testing.assert_array_equal(read_box(file.fileno(), where, box, delivery), 2.0 * whole[part] - 1.0)


# --- reading ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["<f4", ">f8", ">i2", "u1", "?", "<f2"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy(tmp_path: Path, dtype: str, order: str) -> None:
    array = values(SHAPE, dtype)
    np.save(tmp_path / "a.npy", np.asarray(array, order=order))
    with open_source(tmp_path / "a.npy") as source:
        assert source.random_access
        assert source.meta is None
        check_parts(source, array.astype(np.dtype(dtype).newbyteorder("=")))


@pytest.mark.parametrize("shape", [(), (0, 3), (13,), (3, 0, 5)])
def test_npy_of_other_ranks(tmp_path: Path, shape: tuple[int, ...]) -> None:
    np.save(tmp_path / "a.npy", values(shape))
    check_parts(open_source(str(tmp_path / "a.npy")), values(shape))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(tmp_path: Path, save: Callable[..., None]) -> None:
    image, labels = values(SHAPE, ">f4"), np.asfortranarray(values((3, 5, 2), np.int64))
    save(tmp_path / "a.npz", image=image, labels=labels)
    assert array_names(tmp_path / "a.npz") == ("image", "labels")
    with open_source(tmp_path / "a.npz", "image") as source:
        assert source.random_access == (save is np.savez)
        check_parts(source, image.astype("f4"))
    check_parts(open_source(tmp_path / "a.npz", "labels.npy"), labels)
    save(tmp_path / "one.npz", labels)
    check_parts(open_source(tmp_path / "one.npz"), labels)


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("shape", [(7, 11, 5), (7, 11, 5, 3)])
@pytest.mark.parametrize("dtype", ["i2", "u1", "f4", "f8", "u2"])
def test_nifti(tmp_path: Path, ending: str, order: str, shape: tuple[int, ...], dtype: str) -> None:
    image = save_nifti(tmp_path / f"a{ending}", values(shape, dtype), order=order)
    assert image.header.endianness == order
    with open_source(tmp_path / f"a{ending}") as source:
        assert source.random_access == (ending == ".nii")
        assert source.meta is not None
        np.testing.assert_array_equal(source.meta.affine, image.affine)
        check_parts(source, presented(image.get_fdata(dtype=np.float32)))


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize(("slope", "inter"), [(0.013, -1024.0), (3.0, 0.0), (1.0, 0.25)])
def test_nifti_scales_in_float64(tmp_path: Path, ending: str, slope: float, inter: float) -> None:
    stored = np.random.default_rng(0).integers(-32768, 32767, (7, 11, 5), np.int16)
    image = save_nifti(tmp_path / f"a{ending}", stored, slope, inter)
    exact = presented(image.get_fdata())
    assert not np.array_equal(exact[0, 0], stored)
    check_parts(open_source(tmp_path / f"a{ending}"), exact.astype(np.float32))
    check_parts(open_source(tmp_path / f"a{ending}", dtype=np.float64), exact)


@pytest.mark.parametrize(
    ("extents", "shape"),
    [((4, 5, 1), (1, 1, 4, 5, 1)), ((4, 5, 3, 1), (1, 1, 4, 5, 3)), ((4, 5, 3, 1, 2), (1, 2, 4, 5, 3))],
)
def test_nifti_axes_of_one(tmp_path: Path, extents: tuple[int, ...], shape: tuple[int, ...]) -> None:
    array = values(extents)
    nibabel.Nifti1Image(array, AFFINE).to_filename(tmp_path / "a.nii")
    assert nibabel.load(tmp_path / "a.nii").shape == extents
    with open_source(tmp_path / "a.nii") as source:
        expected = array if len(shape) == 5 and shape[1] == 1 else np.moveaxis(array[..., 0, :], -1, 0)
        np.testing.assert_array_equal(source.read(), expected.reshape(shape))


def test_the_type_wanted_is_delivered(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", values(SHAPE, np.int16))
    check_parts(open_source(tmp_path / "a.npy", dtype=np.float64), values(SHAPE, np.float64))
    found = open_source(tmp_path / "a.npy", dtype=ml_dtypes.bfloat16).read()
    assert found.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(found.astype("f4"), values(SHAPE).astype(ml_dtypes.bfloat16).astype("f4"))
    np.save(tmp_path / "a.npy", values(SHAPE, np.float32))
    with pytest.raises(PartitionError, match=r"a\.npy: holds float32 values, but int64 is needed"):
        open_source(tmp_path / "a.npy", dtype=np.int64)


def test_a_box_outside_the_volume_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", values((5, 7)))
    with open_source(tmp_path / "a.npy") as source:
        whole = (0, 7)
        for box in [((0, 6), whole), ((-1, 2), whole), ((3, 2), whole), ((0, 5),), (slice(0, 5, 2), whole)]:
            with pytest.raises(ValueError, match=r"cells|axes|stride"):
                source.read(box)
        np.testing.assert_array_equal(source.read((slice(1, None), slice(None))), values((5, 7))[1:])


def test_a_source_outlives_the_replacement_of_its_file(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", values((5, 7)))
    with open_source(tmp_path / "a.npy") as source:
        write_whole(tmp_path / "a.npy", source.read() * 2)
        np.testing.assert_array_equal(source.read(), values((5, 7)))
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), values((5, 7)) * 2)


_MEMORY = """
import resource, sys
import numpy as np
from runtime.volumes import open_source
path, kind = sys.argv[1:]
with open_source(path) as source:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if kind == "slabs":
        total = sum(slab.size for _, slab in source.slabs(8 * 2**20))
        assert total == np.prod(source.shape)
    else:
        assert source.read(tuple((0, n) for n in source.shape[:-1]) + ((3, 5),)).size == 2 * 160**3 * 2
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("ending", [".npy", ".nii", ".nii.gz", ".npz"])
def test_reading_holds_its_part_and_no_more(tmp_path: Path, ending: str) -> None:
    """160 x 160 x 160 x 64 bytes = 250 MiB as float32; a part of it must not bring the whole into memory."""
    path, shape = tmp_path / f"a{ending}", (2, 160, 160, 160, 8)
    if ending == ".npy":
        np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    elif ending == ".npz":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            np.save(tmp_path / "a.npy", np.broadcast_to(np.float32(1), shape))
            archive.write(tmp_path / "a.npy", "a.npy")
    else:
        nibabel.Nifti1Image(np.broadcast_to(np.float32(1), (160, 160, 160, 16)), AFFINE).to_filename(path)
    for kind in ("slabs", "box") if ending == ".npy" else ("slabs",):
        command = [sys.executable, "-c", _MEMORY, str(path), kind]
        grown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        part = 2 * 160**3 * 2 * 4 // 1024 if kind == "box" else 8 * 1024
        assert int(grown) < part + 40 * 1024, f"{kind}: {int(grown) // 1024} MiB"
