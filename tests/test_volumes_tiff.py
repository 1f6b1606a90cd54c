"""TIFF: stacks of all kinds equal what tifffile reads, files written part by part, and damage in one clear line."""

from __future__ import annotations

import importlib.util
import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import tifffile
import zarr

from partitioner.errors import PartitionError
from runtime.volumes import ArraySpec, array_names, create_sink, open_part, open_source
from tests.volumes import SHAPE, check_parts, values, write_whole

VOLUME = (7, 37, 21)


def refused(pattern: str) -> Any:
    """One clear line that matches."""
    return pytest.raises(PartitionError, match=rf"\A[^\n]*{pattern}[^\n]*\Z")


LAYOUTS: dict[str, dict[str, Any]] = {
    "plain": {}, "strips": {"rowsperstrip": 5}, "deflated": {"compression": "zlib"},
    "deflated strips": {"compression": "zlib", "rowsperstrip": 8},
    "tiles": {"tile": (16, 16)}, "deflated tiles": {"tile": (16, 16), "compression": "zlib"},
}


@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["f4", "i2", "u1"])
def test_stacks(tmp_path: Path, dtype: str, layout: str, byteorder: Any) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, values(VOLUME, dtype), byteorder=byteorder, photometric="minisblack", **LAYOUTS[layout])
    assert array_names(path) == ()
    with open_source(path) as source:
        assert source.random_access
        assert source.meta is None
        check_parts(source, values(VOLUME, dtype)[None, None])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("told", [True, False])
def test_pages_written_one_by_one(tmp_path: Path, layout: str, told: bool) -> None:
    """Each an image of its own, or pages that nothing describes."""
    with tifffile.TiffWriter(tmp_path / "a.tiff") as writer:
        for page in values(VOLUME):
            more = {} if told else {"metadata": None}
            writer.write(page, contiguous=False, photometric="minisblack", **more, **LAYOUTS[layout])
    check_parts(open_source(tmp_path / "a.tiff"), values(VOLUME)[None, None])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("axes", "shape", "presented"), [
    ("TCZYX", (2, 3, 4, 20, 18), "TCZYX"), ("TZCYX", (2, 4, 3, 20, 18), "TCZYX"), ("ZCYX", (4, 3, 20, 18), "1CZYX"),
    ("CYX", (3, 20, 18), "1CYX"), ("YX", (20, 18), "11YX"), ("ZYX", (4, 20, 18), "11ZYX"),
])
def test_named_axes(tmp_path: Path, axes: str, shape: tuple[int, ...], presented: str, layout: str) -> None:
    order = [axes.index(a) for a in presented if a in axes]
    full = [shape[axes.index(a)] if a in axes else 1 for a in presented]
    expected = values(shape).transpose(order).reshape(full)
    for name, ome in (("a.tif", False), ("a.ome.tif", True)):
        tifffile.imwrite(tmp_path / name, values(shape), ome=ome, metadata={"axes": axes}, photometric="minisblack",
                         **LAYOUTS[layout])
        check_parts(open_source(tmp_path / name), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("count", [1, 4])
def test_colours_are_channels(tmp_path: Path, count: int, planar: Any, layout: str) -> None:
    shape = (count, 20, 18, 3) if planar == "contig" else (count, 3, 20, 18)
    array = values(shape, np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", array if count > 1 else array[0], photometric="rgb", planarconfig=planar,
                     **LAYOUTS[layout])
    channels = np.moveaxis(array, -1 if planar == "contig" else 1, 0)[None]
    check_parts(open_source(tmp_path / "a.tif"), channels if count > 1 else channels[:, :, 0])


def test_hyperstacks_of_imagej(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", values((4, 3, 20, 18)), imagej=True, metadata={"axes": "ZCYX"})
    check_parts(open_source(tmp_path / "a.tif"), values((4, 3, 20, 18)).transpose(1, 0, 2, 3)[None])


def test_several_images(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as writer:
        writer.write(values((4, 20, 18)), photometric="minisblack")
        writer.write(values((9, 8), np.uint8), photometric="minisblack")
    assert array_names(path) == ("0", "1")
    check_parts(open_source(f"{path}:/0"), values((4, 20, 18))[None, None])
    check_parts(open_source(f"{path}:/1"), values((9, 8), np.uint8)[None, None])
    with refused(r"holds several images \(0: 4x20x18, 1: 9x8\); name one, as .*a\.tif:/0"):
        open_source(path)
    with refused("holds no image '2'; it has 0, 1"):
        open_source(f"{path}:/2")


def test_levels_of_an_image_are_one(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "a.ome.tif") as writer:
        writer.write(values((4, 32, 32)), subifds=1, metadata={"axes": "ZYX"}, tile=(16, 16))
        writer.write(values((4, 16, 16)), subfiletype=1, tile=(16, 16))
    check_parts(open_source(tmp_path / "a.ome.tif"), values((4, 32, 32))[None, None])


# --- folders -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("byteorder", ["<", ">"])
def test_a_folder_of_slices(tmp_path: Path, layout: str, byteorder: Any) -> None:
    folder = tmp_path / "slices"
    folder.mkdir()
    for number, page in enumerate(values((5, 20, 18))):
        tifffile.imwrite(folder / f"slice{number}.tif", page, byteorder=byteorder, **LAYOUTS[layout])
    (folder / ".hidden").write_bytes(b"")
    for spelled in (folder, f"{folder}/"):
        with open_source(spelled) as source:
            check_parts(source, values((5, 20, 18))[None, None])
    assert array_names(folder) == ()
    with refused("is a stack, so it holds no 'x'"):
        open_source(f"{folder}:/x")


def test_folders_that_are_no_stack(tmp_path: Path) -> None:
    folder = tmp_path / "slices"
    folder.mkdir()
    with refused("no Zarr store, TIFF stack or DICOM series"):
        open_source(folder)
    tifffile.imwrite(folder / "a1.tif", values((20, 18)))
    tifffile.imwrite(folder / "a2.tif", values((20, 17)))
    with refused(r"a2\.tif: has pages of 20x17 float32, a1\.tif of 20x18 float32"):
        open_source(folder)
    tifffile.imwrite(folder / "a2.tif", values((3, 20, 18)), photometric="minisblack")
    with refused(r"a2\.tif: holds 3 pages; a folder's files must hold one each"):
        open_source(folder)
    tifffile.imwrite(folder / "a2.tif", values((20, 18)))
    content = (folder / "a2.tif").read_bytes()
    (folder / "a2.tif").write_bytes(content[:-40])
    with refused(r"a2\.tif: .*cut short"):
        open_source(folder)
    (folder / "a2.tif").write_bytes(b"no image")
    with refused(r"a2\.tif: no TIFF file"):
        open_source(folder)
    (folder / "readme.txt").write_text("")
    with refused("no Zarr store, TIFF stack or DICOM series"):
        open_source(folder)
    with refused(r"slices: .*"):
        create_sink(folder, [ArraySpec("x", (1, 1, 4, 5), "float32")])


# --- damage ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["stack", "pages", "ome"])
@pytest.mark.parametrize("missing", [1, 200, 0.5, 0.95])
def test_truncated_files_are_refused_when_opened(tmp_path: Path, kind: str, layout: str, missing: float) -> None:
    path, array = tmp_path / "a.tif", np.random.default_rng(0).random(VOLUME)
    options = {**LAYOUTS[layout], "photometric": "minisblack"}
    if kind == "pages":
        with tifffile.TiffWriter(path) as writer:
            for page in array:
                writer.write(page, contiguous=False, metadata=None, **options)
    else:
        tifffile.imwrite(path, array, ome=kind == "ome", **options)
    content = path.read_bytes()
    path.write_bytes(content[: -missing if isinstance(missing, int) else round(len(content) * (1 - missing))])
    if missing == 1 and kind == "stack" and "compression" not in options and "tile" not in options:
        check_parts(open_source(path), array[None, None])  # tifffile ends these with bytes to which nothing points
        return
    with refused("cut short"):
        open_source(path)


def test_what_is_no_stack(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.tif"
    for content in (b"", b"no image at all" * 9, b"II*\0", b"II*\0\xff\xff\xff\0"):
        path.write_bytes(content)
        with refused(r"a\.tif: (no TIFF file|damaged or cut short|holds no image)"):
            open_source(path)
    with refused("no such file"):
        open_source(tmp_path / "none.tif")
    tifffile.imwrite(path, np.zeros((3, 20, 18), np.complex64), photometric="minisblack")
    with refused("complex64"):
        open_source(path)
    tifffile.imwrite(path, values((20, 18)))
    with refused("holds float32 values, but int64 is needed"):
        open_source(path, dtype=np.int64)
    tifffile.imwrite(path, values((2, 3, 20, 18)), metadata={"axes": "RCYX"}, photometric="minisblack")
    with refused("has axes R=2 x C=3 x Y=20 x X=18; t, c, z, y, x are needed"):
        open_source(path)
    assert not caplog.records


def test_damage_within_a_page(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.random.default_rng(0).random(VOLUME), compression="zlib", photometric="minisblack")
    with tifffile.TiffFile(path) as file:
        place = file.pages[3].dataoffsets[0]
    content = bytearray(path.read_bytes())
    content[place : place + 9] = b"\xff" * 9
    path.write_bytes(content)
    with open_source(path) as source:
        assert source.read([(0, 1), (0, 1), (0, 3), (0, 37), (0, 21)]).size
        with refused(r"a\.tif: damaged"):
            source.read()


def test_a_codec_that_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, values(VOLUME, np.uint8), compression="zlib", photometric="minisblack")
    with tifffile.TiffFile(path) as file:
        places = [page.tags["Compression"].valueoffset for page in file.pages]
    content = bytearray(path.read_bytes())
    for place in places:
        content[place : place + 2] = (34933).to_bytes(2, "little")  # PNG, which tifffile leaves to imagecodecs
    path.write_bytes(content)
    if importlib.util.find_spec("imagecodecs") is not None:
        pytest.skip("imagecodecs is installed")
    with refused(r"a\.tif: cannot be decoded .*pip install imagecodecs"):
        open_source(path)


def test_without_tifffile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tifffile.imwrite(tmp_path / "a.tif", values(VOLUME), photometric="minisblack")
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with refused(r"a\.tif: .*pip install 'partitioner\[tiff\]'"):
        open_source(tmp_path / "a.tif")
    with refused(r"b\.tif: .*pip install 'partitioner\[tiff\]'"):
        create_sink(tmp_path / "b.tif", [ArraySpec("x", SHAPE, "float32")])


# --- writing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".tif", ".ome.tif", ".btf"])
@pytest.mark.parametrize("shape", [(1, 1, 7, 11, 5), (2, 3, 4, 9, 8), (1, 1, 9, 8), (1, 3, 9, 8), (1, 1, 5, 3, 4),
                                   (1, 4, 2, 5, 3)])
def test_written_files(tmp_path: Path, ending: str, shape: tuple[int, ...]) -> None:
    path = tmp_path / f"a{ending}"
    sink = create_sink(path, [ArraySpec("out", shape, "float32")])
    assert os.listdir(tmp_path) == []
    with sink:
        for cut in itertools.pairwise([0, shape[-2] // 2, shape[-2]]):
            with open_part(sink.part.to_json()) as writer:
                box = (*((0, n) for n in shape[:-2]), cut, (0, shape[-1]))
                writer.write(box, values(shape)[tuple(slice(*b) for b in box)])
    with tifffile.TiffFile(path) as file:
        assert file.is_ome == (ending == ".ome.tif")
        assert file.is_bigtiff == (ending == ".btf")
        assert len(file.pages) == np.prod(shape[:-2])
        np.testing.assert_array_equal(file.asarray().reshape(shape), values(shape))
        np.testing.assert_array_equal(np.stack([p.asarray() for p in file.pages]).reshape(shape), values(shape))
    check_parts(open_source(path), values(shape))


def test_voxel_sizes_go_over(tmp_path: Path) -> None:
    nibabel.Nifti1Image(values((4, 9, 8)), np.diag([2.0, 0.5, 0.25, 1])).to_filename(tmp_path / "a.nii")
    with open_source(tmp_path / "a.nii") as source:
        for name in ("a.ome.tif", "a.tif", "b.ome.zarr"):
            write_whole(tmp_path / name, values((1, 1, 4, 9, 8)), source)
    with tifffile.TiffFile(tmp_path / "a.ome.tif") as file:
        pixels = tifffile.xml2dict(file.ome_metadata)["OME"]["Image"]["Pixels"]
    assert [(pixels[f"PhysicalSize{a}"], pixels[f"PhysicalSize{a}Unit"]) for a in "ZYX"] == [
        (2.0, "mm"), (0.5, "mm"), (0.25, "mm")]
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        assert file.shaped_metadata[0]["spacing"] == 2.0
        assert file.pages[0].get_resolution("MILLIMETER") == pytest.approx((4.0, 2.0))
    with open_source(tmp_path / "a.ome.tif") as source:
        assert source.meta is not None
        expected = np.array([[0, 0, 0.25, 0], [0, 0.5, 0, 0], [2, 0, 0, 0], [0, 0, 0, 1]])
        np.testing.assert_allclose(source.meta.affine, expected)
        write_whole(tmp_path / "c.ome.zarr", values((1, 1, 4, 9, 8)), source)
        write_whole(tmp_path / "c.nii", values((1, 1, 4, 9, 8)), source)
    image = zarr.open_group(str(tmp_path / "c.ome.zarr"), mode="r").attrs["ome"]["multiscales"][0]
    assert image["axes"][0] == {"name": "z", "type": "space", "unit": "millimeter"}
    assert image["datasets"][0]["coordinateTransformations"][0]["scale"] == [2.0, 0.5, 0.25]
    np.testing.assert_allclose(nibabel.load(tmp_path / "c.nii").affine, expected)
    tifffile.imwrite(tmp_path / "d.ome.tif", values((9, 8)), metadata={"axes": "YX", "PhysicalSizeX": 0.5})
    with open_source(tmp_path / "d.ome.tif") as source:
        assert source.meta is not None
        np.testing.assert_allclose(source.meta.affine[0, 1], 0.0005)  # micrometres where no unit is given


@pytest.mark.parametrize(("ending", "dtype", "stored"), [
    (".tif", "bool", "uint8"), (".tif", "float16", "float16"), (".tif", "int64", "int64"), (".tif", ">i4", "int32"),
    (".tif", "bfloat16", "float32"), (".ome.tif", "float16", "float32"), (".ome.tif", "float64", "float64"),
    (".ome.tif", "uint16", "uint16"), (".ome.tif", "bool", "uint8")])
def test_types(tmp_path: Path, ending: str, dtype: str, stored: str) -> None:
    array = values((1, 1, 4, 9, 8)).astype(ArraySpec("", (), dtype).numpy_dtype)
    write_whole(tmp_path / f"a{ending}", array)
    found = tifffile.imread(tmp_path / f"a{ending}")
    assert found.dtype == np.dtype(stored)
    np.testing.assert_array_equal(found.reshape(array.shape), array.astype(stored))


def test_what_cannot_be_written(tmp_path: Path) -> None:
    for name, shape, dtype, pattern in (
            ("a.tif", (3,), "float32", r"images of shape"), ("a.tif", (1, 1, 0, 5), "float32", r"images of shape"),
            ("a.ome.tif", SHAPE, "int64", r"integers of up to 32 bits.*write \.tif"),
            ("a.tif", SHAPE, "complex64", "is complex64")):
        with refused(pattern):
            create_sink(tmp_path / name, [ArraySpec("x", shape, dtype)])
    with refused("holds one array, not 2"):
        create_sink(tmp_path / "a.tif", [ArraySpec("x", SHAPE, "float32")] * 2)
    assert os.listdir(tmp_path) == []


def test_a_large_file_is_planned_without_memory(tmp_path: Path) -> None:
    sink = create_sink(tmp_path / "a.ome.tif", [ArraySpec("x", (1, 1, 2**10, 2**15, 2**15), "float32")])
    assert sink.part.size > 2**42


_MEMORY = """
import sys, tracemalloc
from runtime.volumes import open_source
with open_source(sys.argv[1]) as source:
    tracemalloc.start()
    assert source.read([(0, 1), (0, 1), (0, 200), (100, 110), (100, 110)]).size == 200 * 100
    print(tracemalloc.get_traced_memory()[1])
"""


@pytest.mark.parametrize("layout", ["plain", "deflated strips", "deflated tiles"])
def test_reading_holds_its_part_and_no_more(tmp_path: Path, layout: str) -> None:
    """200 pages of 1 MiB; neither they nor one of them is needed whole."""
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.broadcast_to(np.float32(1), (200, 512, 512)), photometric="minisblack", **LAYOUTS[layout])
    grown = subprocess.run([sys.executable, "-c", _MEMORY, str(path)], capture_output=True, text=True,
                           check=True).stdout
    assert int(grown) < 2**20
