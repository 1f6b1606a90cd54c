"""HDF5: boxes of contiguous and of compressed arrays, files written part by part, and damage in one clear line."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import h5py
import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import pytest
from hypothesis import given
from hypothesis import strategies as st

from partitioner.cli import main
from partitioner.errors import PartitionError
from partitioner.geometry import Interval
from runtime.volumes import ArraySpec, array_names, create_sink, open_part, open_source
from runtime.volumes.raw import chunk_tiles
from tests.models import NETWORKS
from tests.volumes import SHAPE, check_parts, values, write_whole


def refused(pattern: str) -> Any:
    """One clear line that matches."""
    return pytest.raises(PartitionError, match=rf"\A[^\n]*{pattern}[^\n]*\Z")


def save(path: Path, **arrays: Any) -> Path:
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file.create_dataset(name.replace("__", "/"), data=array)
    return path


@st.composite
def chunked(draw: st.DrawFn) -> tuple[tuple[Interval, ...], tuple[int, ...], int]:
    shape = draw(st.lists(st.integers(1, 9), max_size=4))
    cuts = [sorted(draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in shape]
    return (tuple(Interval(*cut) for cut in cuts), tuple(draw(st.integers(1, 5)) for _ in shape),
            draw(st.integers(1, 300)))


@given(chunked())
def test_tiles_divide_no_chunk(case: tuple[tuple[Interval, ...], tuple[int, ...], int]) -> None:
    """They fill the box once, and each chunk that touches it lies in one tile."""
    box, chunks, max_cells = case
    seen = np.zeros([i.stop for i in box], int)
    homes: dict[tuple[int, ...], int] = {}
    for number, tile in enumerate(chunk_tiles(box, chunks, max_cells)):
        seen[tuple(slice(i.start, i.stop) for i in tile)] += 1
        touched = [range(i.start // c, (i.stop - 1) // c + 1) for i, c in zip(tile, chunks, strict=True)]
        assert seen[tuple(slice(i.start, i.stop) for i in tile)].size <= max(max_cells, np.prod(chunks))
        for chunk in np.ndindex(*(len(t) for t in touched)):
            home = tuple(t[c] for t, c in zip(touched, chunk, strict=True))
            assert homes.setdefault(home, number) == number
    expected = np.zeros_like(seen)
    expected[tuple(slice(i.start, i.stop) for i in box)] = 1
    np.testing.assert_array_equal(seen, expected)


@pytest.mark.parametrize("options", [{}, {"chunks": (1, 1, 3, 4, 5)},
                                     {"chunks": (1, 2, 7, 2, 2), "compression": "gzip", "shuffle": True,
                                      "fletcher32": True}])
@pytest.mark.parametrize("dtype", ["<f4", ">f8", ">i2", "u1", "?", "<f2"])
def test_boxes(tmp_path: Path, options: dict[str, Any], dtype: str) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", data=values(SHAPE, dtype), **options)
    with open_source(tmp_path / "a.h5") as source:
        assert source.random_access
        assert source.meta is None
        check_parts(source, values(SHAPE, dtype).astype(np.dtype(dtype).newbyteorder("=")))


@pytest.mark.parametrize("shape", [(), (0, 3), (13,), (3, 0, 5)])
def test_other_ranks(tmp_path: Path, shape: tuple[int, ...]) -> None:
    check_parts(open_source(save(tmp_path / "a.hdf5", x=values(shape))), values(shape))
    write_whole(tmp_path / "b.h5", values(shape))
    check_parts(open_source(tmp_path / "b.h5"), values(shape))


def test_names_and_paths(tmp_path: Path) -> None:
    path = save(tmp_path / "a.h5", ct=values((3, 5)), seg__fine=values((2, 7), np.int64))
    assert array_names(path) == ("ct", "seg/fine")
    assert array_names(f"{path}:/seg/fine") == ("seg/fine",)
    for spelled in (f"{path}:/seg/fine", Path(f"{path}:/seg/fine")):
        check_parts(open_source(spelled), values((2, 7), np.int64))
    check_parts(open_source(path, "ct"), values((3, 5)))
    check_parts(open_source(path, "/ct", np.float64), values((3, 5), np.float64))
    found = open_source(path, "ct", ml_dtypes.bfloat16).read()
    assert found.dtype == ml_dtypes.bfloat16
    with refused(r"holds several arrays \(ct, seg/fine\); name one, as .*a\.h5:/ct"):
        open_source(path)
    for name in ("none", "seg", "seg/none"):
        with refused(f"holds no array '{name}'; it has ct, seg/fine"):
            open_source(f"{path}:/{name}")
    with refused(r"a\.h5:/ct: holds float32 values, but int64 is needed"):
        open_source(path, "ct", np.int64)
    with refused("no such file"):
        open_source(tmp_path / "b.h5:/ct")
    np.savez(tmp_path / "a.npz", ct=values((3, 5)), seg=values((2,)))
    check_parts(open_source(f"{tmp_path}/a.npz:/ct"), values((3, 5)))
    (tmp_path / "odd.h5:").mkdir()
    save(tmp_path / "odd.h5:" / "b.h5", x=values((3,)))
    check_parts(open_source(tmp_path / "odd.h5:" / "b.h5"), values((3,)))


def test_what_is_no_array_of_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file.create_group("group")
    with refused("holds no array; write it"):
        open_source(path)
    with h5py.File(path, "w") as file:
        file["text"] = ["a", "b"]
        file["complex"] = np.zeros(3, np.complex64)
        file["pairs"] = np.zeros(3, [("a", "f4"), ("b", "i2")])
        file["nothing"] = h5py.Empty("f4")
        file["gone"] = h5py.ExternalLink("none.h5", "/x")
    for name, pattern in (("text", "object values"), ("complex", "complex64"), ("pairs", "'a'"),
                          ("nothing", "no values"), ("gone", "no array 'gone'")):
        with refused(rf"a\.h5.*{pattern}"):
            open_source(path, name)


def test_damage_within_a_compressed_array(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        dataset = file.create_dataset("x", data=np.random.default_rng(0).random((40, 40, 40)), chunks=(40, 40, 40),
                                      compression="gzip")
        place = dataset.id.get_chunk_info(0)
    content = bytearray(path.read_bytes())
    content[place.byte_offset + place.size // 2] ^= 3
    path.write_bytes(content)
    with refused(r"a\.h5: damaged"), open_source(path) as source:
        source.read()


def test_several_arrays_in_parts(tmp_path: Path) -> None:
    path = tmp_path / "out.h5"
    specs = [ArraySpec("/head/logits", SHAPE, "bfloat16"), ArraySpec("labels", SHAPE[2:], "uint8"),
             ArraySpec("head/mask", (3, 5), "bool"), ArraySpec("none", (0, 3), "float32")]
    sink = create_sink(path, specs)
    assert os.listdir(tmp_path) == []
    with sink:
        for cut in (slice(0, 3), slice(3, 7)):
            with open_part(sink.part.to_json()) as writer:
                part = values(SHAPE).astype(ml_dtypes.bfloat16)[:, :, cut]
                writer.write((slice(0, 1), slice(0, 2), cut, slice(0, 11), slice(0, 5)), part, "/head/logits")
                writer.write((cut, slice(0, 11), slice(0, 5)), values(SHAPE[2:], np.uint8)[cut], "labels")
        with sink.writer() as writer:
            writer.write(None, values((3, 5), bool), "head/mask")
    assert os.listdir(tmp_path) == ["out.h5"]
    with h5py.File(path) as file:
        assert sorted(file) == ["head", "labels", "none"]
        assert [file[n].dtype.name for n in ("head/logits", "labels", "head/mask")] == ["float32", "uint8", "bool"]
        exact = values(SHAPE).astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(file["head/logits"], exact)
        np.testing.assert_array_equal(file["labels"], values(SHAPE[2:], np.uint8))
        assert np.all(file["head/mask"])
        assert file["none"].shape == (0, 3)
    before = path.read_bytes()
    with create_sink(path, specs):
        pass
    with h5py.File(path) as file:
        assert not np.any(file["head/logits"])
    assert len(path.read_bytes()) == len(before)
    write_whole(Path(f"{path}:/by/name"), values((3, 5)))
    assert array_names(path) == ("by/name",)


def test_planning_a_large_file_takes_no_memory(tmp_path: Path) -> None:
    sink = create_sink(tmp_path / "a.h5", [ArraySpec("out", (1, 1, 2**14, 2**12, 2**12), "float32")])
    assert sink.part.size > 2**40


def test_what_cannot_be_written(tmp_path: Path) -> None:
    for names, pattern in ((("a", "/a"), "distinct names, not a, /a"), (("a", "a/b"), r"cannot hold a, a/b .*\.npz"),
                           (("",), "distinct names")):
        with refused(pattern):
            create_sink(tmp_path / "a.h5", [ArraySpec(name, (3,), "float32") for name in names])
    with refused("is complex64"):
        create_sink(tmp_path / "a.h5", [ArraySpec("x", (3,), "complex64")])
    with refused("cannot hold x"):
        create_sink(tmp_path / "a.h5", [ArraySpec("x", (1,) * 40, "float32")])
    with refused("holds one array, not 2"):
        create_sink(tmp_path / "a.h5:/x", [ArraySpec("x", (3,), "float32")] * 2)
    assert os.listdir(tmp_path) == []


def test_without_h5py(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "a.h5", x=values((3,)))
    monkeypatch.setitem(sys.modules, "h5py", None)
    with refused(r"a\.h5: .*pip install 'partitioner\[hdf5\]'"):
        open_source(path)
    with refused(r"b\.h5: .*pip install 'partitioner\[hdf5\]'"):
        create_sink(tmp_path / "b.h5", [ArraySpec("x", (3,), "float32")])


def test_several_outputs_in_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                     capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    onnx.save(onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["": 20]>
        two (float[1, 1, 8, 6] x) => (float[1, 1, 8, 6] a, float[1, 1, 8, 6] b) { a = Relu (x)  b = Neg (x)
        }"""), "m.onnx")
    save(tmp_path / "in.h5", x=values((1, 1, 8, 6)) - 20, other=values((3,)))
    run = ["run", "m.onnx", "--mesh", "height=2", "--input", "in.h5"]
    assert main([*run, "--output", "out.h5"]) == 0
    np.testing.assert_array_equal(open_source("out.h5", "a").read(), np.maximum(values((1, 1, 8, 6)) - 20, 0))
    np.testing.assert_array_equal(open_source("out.h5:/b").read(), 20 - values((1, 1, 8, 6)))
    assert main([*run, "--output", "a=two.h5:/a", "--output", "b=two.h5:/b"]) == 2
    assert "same file as two.h5:/a" in capsys.readouterr().err
    assert not Path("two.h5").exists()


def test_the_command_takes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From one array of a file to another file."""
    monkeypatch.chdir(tmp_path)
    network = next(iter(NETWORKS.values()))
    network.export(tmp_path / "m.onnx")
    image = np.random.default_rng(0).standard_normal(network.shape, dtype=np.float32)
    save(tmp_path / "in.h5", scans__ct=image, other=image)
    np.save("in.npy", image)
    axis = "height" if len(network.shape) == 4 else "depth"
    for source, target in (("in.npy", "out.npy"), ("in.h5:/scans/ct", "out.h5")):
        assert main(["run", "m.onnx", "--mesh", f"{axis}=2", "--input", source, "--output", target]) == 0
    np.testing.assert_array_equal(open_source("out.h5").read(), np.load("out.npy"))
