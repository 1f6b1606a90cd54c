"""Zarr stores of formats 2 and 3: boxes chunk by chunk, and what is wrong in one clear line."""

from __future__ import annotations

import json
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import zarr

from partitioner.errors import PartitionError
from runtime.volumes import ArraySpec, absolute_place, array_names, create_sink, open_source
from tests.volumes import SHAPE, check_parts, values

FORMATS = (2, 3)


def refused(pattern: str) -> Any:
    """One clear line that matches."""
    return pytest.raises(PartitionError, match=rf"\A[^\n]*{pattern}[^\n]*\Z")


def save(path: Path, array: Any, inside: str | None = None, **options: Any) -> Path:
    zarr.create_array(str(path), name=inside, data=array, **options)
    return path


@pytest.mark.parametrize("zarr_format", FORMATS)
@pytest.mark.parametrize("dtype", ["<f4", ">f8", ">i2", "u1", "?", "<f2"])
def test_boxes(tmp_path: Path, zarr_format: int, dtype: str) -> None:
    path = save(tmp_path / "a.zarr", values(SHAPE, dtype), chunks=(1, 1, 3, 4, 5), zarr_format=zarr_format)
    assert array_names(path) == ()
    with open_source(path) as source:
        assert source.random_access
        assert source.path == path
        check_parts(source, values(SHAPE, dtype).astype(np.dtype(dtype).newbyteorder("=")))


def test_shards(tmp_path: Path) -> None:
    path = save(tmp_path / "a.zarr", values((8, 12)), chunks=(2, 3), shards=(4, 6))
    check_parts(open_source(path), values((8, 12)))


@pytest.mark.parametrize("zarr_format", FORMATS)
@pytest.mark.parametrize("shape", [(), (0, 3), (13,)])
def test_other_ranks(tmp_path: Path, zarr_format: int, shape: tuple[int, ...]) -> None:
    check_parts(open_source(save(tmp_path / "a.zarr", values(shape), zarr_format=zarr_format)), values(shape))


@pytest.mark.parametrize("zarr_format", FORMATS)
def test_names_and_paths(tmp_path: Path, zarr_format: int) -> None:
    path = tmp_path / "a.ZARR"
    group = zarr.open_group(str(path), mode="w", zarr_format=zarr_format)
    group.create_array("seg/fine", data=values((2, 7), np.int64), chunks=(1, 3))
    check_parts(open_source(path), values((2, 7), np.int64))
    group.create_array("ct", data=values((3, 5)), chunks=(2, 2))
    assert array_names(path) == ("ct", "seg/fine")
    check_parts(open_source(f"{path}:/seg/fine"), values((2, 7), np.int64))
    check_parts(open_source(path, "ct", np.float64), values((3, 5), np.float64))
    assert open_source(path, "ct", ml_dtypes.bfloat16).read().dtype == ml_dtypes.bfloat16
    with refused(r"holds several arrays \(ct, seg/fine\); name one, as .*a\.ZARR:/ct"):
        open_source(path)
    for name in ("none", "seg", "seg/none"):
        with refused(f"holds no array '{name}'; it has ct, seg/fine"):
            open_source(f"{path}:/{name}")
    with refused(r"a\.ZARR:/ct: holds float32 values, but int64 is needed"):
        open_source(path, "ct", np.int64)


def test_a_store_that_is_one_array(tmp_path: Path) -> None:
    path = save(tmp_path / "a.zarr", values((3,)))
    with refused("is one array, so it holds no 'x'"):
        open_source(f"{path}:/x")


def test_reads_only_the_chunks_of_the_box(tmp_path: Path) -> None:
    """A damaged chunk does no harm to boxes beside it; a missing one is the fill value."""
    path = save(tmp_path / "a.zarr", values((6, 6)), chunks=(3, 3), zarr_format=2, compressors=None, fill_value=7)
    chunk = path / "1.1"
    chunk.write_bytes(chunk.read_bytes()[:-3])
    with open_source(path) as source:
        np.testing.assert_array_equal(source.read(((0, 3), (0, 6))), values((6, 6))[:3])
        with refused(r"a\.zarr: damaged or cut short"):
            source.read()
        chunk.unlink()
        np.testing.assert_array_equal(source.read(((3, 6), (3, 6))), np.full((3, 3), 7))


@pytest.mark.parametrize("zarr_format", FORMATS)
def test_what_is_no_store(tmp_path: Path, zarr_format: int) -> None:
    with refused("no such file"):
        open_source(tmp_path / "none.zarr")
    (tmp_path / "file.zarr").write_bytes(b"x")
    with refused(r"no Zarr store, which is a folder or a \.zarr\.zip"):
        open_source(tmp_path / "file.zarr")
    (tmp_path / "empty.zarr").mkdir()
    with refused("no Zarr store, or a damaged one"):
        open_source(tmp_path / "empty.zarr")
    zarr.open_group(str(tmp_path / "group.zarr"), mode="w", zarr_format=zarr_format)
    with refused("holds no array"):
        open_source(tmp_path / "group.zarr")
    save(tmp_path / "cut.zarr", values((3,)), zarr_format=zarr_format)
    about = tmp_path / "cut.zarr" / ("zarr.json" if zarr_format == 3 else ".zarray")
    for text in (about.read_text()[:-9], "{}", "[]", json.dumps({**json.loads(about.read_text()), "shape": "x"})):
        about.write_text(text)
        with refused(r"(no Zarr store, or a damaged one|holds no array)"):
            open_source(tmp_path / "cut.zarr")
        shutil.rmtree(tmp_path / "cut.zarr")
        save(tmp_path / "cut.zarr", values((3,)), zarr_format=zarr_format)


@pytest.mark.filterwarnings("ignore")
def test_values_that_are_no_numbers(tmp_path: Path) -> None:
    save(tmp_path / "complex.zarr", np.zeros(3, np.complex64))
    save(tmp_path / "text.zarr", np.array(["a", "b"]))
    for name, pattern in (("complex.zarr", "complex64"), ("text.zarr", "<U1|str")):
        with refused(pattern):
            open_source(tmp_path / name)


@pytest.mark.parametrize("change", [{"filters": [{"id": "pickle", "protocol": 5}]},
                                    {"compressor": {"id": "pickle", "protocol": 5}}])
def test_pickles_are_not_loaded(tmp_path: Path, change: dict[str, Any]) -> None:
    path = save(tmp_path / "a.zarr", values((3,)), zarr_format=2)
    about = json.loads((path / ".zarray").read_text())
    (path / ".zarray").write_text(json.dumps({**about, **change}))
    with refused("pickle"):  # zarr itself refuses some of these
        open_source(path)


def test_without_zarr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "a.zarr", values((3,)))
    monkeypatch.setitem(sys.modules, "zarr", None)
    with refused(r"a\.zarr: .*pip install 'partitioner\[zarr\]'"):
        open_source(path)


# --- stores that are no folders ----------------------------------------------------------------------


@pytest.mark.parametrize("zarr_format", FORMATS)
@pytest.mark.parametrize("top", ["", "a.zarr/"])
def test_an_archive(tmp_path: Path, zarr_format: int, top: str) -> None:
    group = zarr.open_group(str(tmp_path / "a.zarr"), mode="w", zarr_format=zarr_format)
    group.create_array("ct", data=values((3, 5)), chunks=(2, 2))
    group.create_array("seg", data=values((4,)), chunks=(2,))
    path = tmp_path / "b.zarr.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(p for p in (tmp_path / "a.zarr").rglob("*") if p.is_file()):
            archive.write(file, top + str(file.relative_to(tmp_path / "a.zarr")))
    assert array_names(path) == ("ct", "seg")
    with open_source(f"{path}:/ct") as source:
        check_parts(source, values((3, 5)))
        assert source.notices == ()
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with refused(r"b\.zarr\.zip: no Zarr store, or a damaged one"):
        open_source(path)
    path.write_bytes(content)
    with refused(r"b\.zarr\.zip: Zarr stores are written into folders only"):
        create_sink(path, [ArraySpec("x", (3,), "float32")])


def test_a_url(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fsspec")
    group = zarr.open_group("memory://folder/a.zarr", mode="w")
    group.create_array("ct", data=values((3, 5)), chunks=(2, 2))
    assert array_names("memory://folder/a.zarr") == ("ct",)
    for spelled in ("memory://folder/a.zarr", "memory://folder/a.zarr:/ct", absolute_place("memory://folder/a.zarr")):
        with open_source(spelled) as source:
            check_parts(source, values((3, 5)))
            assert source.notices == ()
    with refused("memory://folder/a.zarr:?.* holds no array 'none'; it has ct"):
        open_source("memory://folder/a.zarr:/none")
    with refused("memory://folder/b.zarr: no Zarr store, or a damaged one"):
        open_source("memory://folder/b.zarr")
    with refused("memory://folder/b.zarr: Zarr stores are written into folders only"):
        create_sink("memory://folder/b.zarr", [ArraySpec("x", (3,), "float32")])
    with refused("memory://folder/a.npy: only Zarr stores are reached by URL"):
        open_source("memory://folder/a.npy")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with refused("s3://bucket/a.zarr: needs a package .*pip install fsspec s3fs"):
        open_source("s3://bucket/a.zarr")


# --- chunks that are missing ---------------------------------------------------------------------------


@pytest.mark.parametrize(("zarr_format", "options"), [(2, {}), (3, {}), (3, {"shards": (4, 4)})])
def test_missing_chunks_are_noted(tmp_path: Path, zarr_format: int, options: dict[str, Any]) -> None:
    path = tmp_path / "a.zarr"
    group = zarr.open_group(str(path), mode="w", zarr_format=zarr_format)
    array = group.create_array("ct", shape=(9, 8), chunks=(2, 2) if options else (4, 4), dtype="int16", fill_value=7,
                               **options)
    array[:] = values((9, 8), np.int16)
    with open_source(path) as source:
        assert source.notices == ()
    files = sorted(p for p in (path / "ct").rglob("*") if p.is_file() and not p.name.startswith((".", "zarr.json")))
    assert len(files) == 6
    files[1].unlink()
    files[4].unlink()
    with open_source(path) as source:
        assert source.notices == (f"{path}:/ct: 2 of 6 chunks are missing and read as the fill value 7",)
        assert (source.read() == 7).sum() > 12
