"""The command on folders of chunks and slices: chunks along the shards, several outputs in a store, notes."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import onnx
import onnx.parser
import pytest
import tifffile
import zarr

from partitioner.cli import main
from runtime.volumes import open_source
from tests.test_volumes_dicom import SERIES, save
from tests.volumes import values


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    onnx.save(onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["": 20]>
        two (float[1, 1, 9, 6, 5] x) => (float[1, 1, 9, 6, 5] a, float[1, 1, 9, 6, 5] b) { a = Relu (x)  b = Neg (x)
        }"""), "two.onnx")
    onnx.save(onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["": 20]>
        one (float[1, 1, 9, 6, 5] x) => (float[1, 1, 9, 6, 5] y) { y = Neg (x) }"""), "one.onnx")
    np.save("in.npy", values((1, 1, 9, 6, 5)))
    return "one.onnx"


@pytest.mark.parametrize("backend", ["lockstep", "gloo"])
def test_chunks_go_along_the_shards(model: str, backend: str) -> None:
    command = ["run", model, "--mesh", "depth=2,height=2", "--backend", backend, "--input", "in.npy"]
    assert main([*command, "--output", "out.ome.zarr"]) == 0
    with open_source("out.ome.zarr") as source:
        np.testing.assert_array_equal(source.read(), -values((1, 1, 9, 6, 5)))
        assert source.notices == ()
    assert zarr.open("out.ome.zarr", mode="r")["0"].chunks == (5, 3, 5)
    assert sorted(p.name for p in Path().iterdir()) == ["in.npy", "one.onnx", "out.ome.zarr", "two.onnx"]


def test_several_outputs_in_a_store(model: str) -> None:
    assert main(["run", "two.onnx", "--mesh", "depth=2", "--input", "in.npy", "--output", "out.zarr"]) == 0
    np.testing.assert_array_equal(open_source("out.zarr:/b").read(), -values((1, 1, 9, 6, 5)))
    assert main(["run", model, "--mesh", "depth=2", "--input", "out.zarr:/b", "--output", "again.npy"]) == 0
    np.testing.assert_array_equal(np.load("again.npy"), values((1, 1, 9, 6, 5)))


def test_missing_chunks_are_noted_once(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    zarr.create_array("in.zarr", data=values((1, 1, 9, 6, 5)), chunks=(1, 1, 3, 6, 5), compressors=None)
    Path("in.zarr/c/0/0/1/0/0").unlink()
    assert main(["run", model, "--mesh", "depth=2", "--input", "in.zarr", "--output", "out.npy"]) == 0
    note = "partition: note: in.zarr: 1 of 3 chunks are missing and read as the fill value 0.0\n"
    assert capsys.readouterr().err == note
    assert np.load("out.npy")[0, 0, 3:6].any() == 0
    assert main(["verify", model, "--mesh", "depth=2", "--input", "in.zarr"]) == 0
    assert capsys.readouterr().err == note


def test_a_url(model: str) -> None:
    pytest.importorskip("fsspec")
    zarr.create_array("memory://command/in.zarr", data=values((1, 1, 9, 6, 5)))
    command = ["run", model, "--mesh", "depth=2", "--input", "memory://command/in.zarr", "--output", "out.zarr"]
    assert main(command) == 0
    np.testing.assert_array_equal(open_source("out.zarr").read(), -values((1, 1, 9, 6, 5)))


@pytest.mark.parametrize("backend", ["lockstep", "gloo"])
def test_from_slices_to_files(model: str, backend: str) -> None:
    """A DICOM series in, its place in the world out; a stack of the output's pages in again."""
    stored = values((9, 6, 5), np.int16)
    save(Path("ct"), stored)
    run = ["run", model, "--mesh", "depth=2", "--backend", backend, "--input"]
    assert main([*run, "ct/", "--output", "out.nii.gz"]) == 0
    np.testing.assert_array_equal(nibabel.load("out.nii.gz").get_fdata(), -stored)
    with open_source("ct") as source:
        assert source.meta is not None
        np.testing.assert_allclose(nibabel.load("out.nii.gz").affine, source.meta.affine)
    assert main([*run, f"ct:/{SERIES}", "--output", "out.ome.tif"]) == 0
    Path("pages").mkdir()
    for number, page in enumerate(tifffile.imread("out.ome.tif")):
        tifffile.imwrite(f"pages/{number}.tif", page)
    assert main([*run, "pages", "--output", "again.ome.zarr"]) == 0
    np.testing.assert_array_equal(open_source("again.ome.zarr").read()[0, 0], stored)
