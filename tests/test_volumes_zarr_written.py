"""Zarr stores and OME-Zarr images written part by part, and images as a model sees them."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import nibabel
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from partitioner.errors import ExecutionError, PartitionError
from partitioner.geometry import Interval
from runtime.volumes import ArraySpec, PartFile, array_names, create_sink, open_part, open_source
from runtime.volumes.chunks import CHUNK_BYTES, ChunkedArray, ChunkWriter, chunk_extents
from tests.volumes import AFFINE, SHAPE, check_parts, values, write_whole

FORMATS = (2, 3)


def refused(pattern: str) -> Any:
    """One clear line that matches."""
    return pytest.raises(PartitionError, match=rf"\A[^\n]*{pattern}[^\n]*\Z")


# --- chunks ------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), max_size=5), st.sampled_from([1, 4, 2**20]))
def test_chunks_fit(extents: list[tuple[int, int]], itemsize: int) -> None:
    shape = tuple(max(n, t) for n, t in extents)
    tile = tuple(t for _, t in extents)
    found = chunk_extents(shape, tile, itemsize)
    assert all(1 <= c <= t for c, t in zip(found, tile, strict=True))
    small = np.prod(tile) * itemsize <= CHUNK_BYTES
    assert found == tile if small else np.prod(found) * itemsize <= CHUNK_BYTES or set(found[2:]) <= {1}


def test_chunks_go_along_the_tiles() -> None:
    assert chunk_extents((1, 3, 512, 512, 512), (1, 3, 256, 512, 512), 4) == (1, 1, 128, 128, 256)
    assert chunk_extents((1, 1, 300, 300, 300), (1, 1, 150, 300, 300), 4) == (1, 1, 150, 150, 150)
    assert chunk_extents((1, 1, 64, 64, 64), None, 4) == (1, 1, 64, 64, 64)
    assert chunk_extents((), None, 4) == ()
    assert chunk_extents((0, 3), (0, 3), 4) == (1, 3)


@st.composite
def cut_up(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], list[list[int]]]:
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=3)))
    cuts = [sorted({0, n, *draw(st.lists(st.integers(0, n), max_size=2))}) for n in shape]
    return shape, tuple(draw(st.integers(1, n)) for n in shape), cuts


@settings(deadline=None)
@given(cut_up(), st.randoms())
def test_boxes_that_end_within_chunks(tmp_path_factory: pytest.TempPathFactory, case: Any, random: Any) -> None:
    """Whatever the boxes and their order, and with a writer each, every cell arrives."""
    shape, chunks, cuts = case
    folder = tmp_path_factory.mktemp("chunks")
    array = ChunkedArray("a/c", shape, np.dtype("<i2"), chunks, tuple(range(len(shape))))
    boxes = [tuple(Interval(*c) for c in pairs) for pairs in itertools.product(*map(itertools.pairwise, cuts))]
    random.shuffle(boxes)
    writers = [ChunkWriter(str(folder)) for _ in boxes]
    for writer, box in zip(writers, boxes, strict=True):
        writer.write(array, box, values(shape, np.int16)[tuple(slice(i.start, i.stop) for i in box)])
    for writer in writers:
        writer.close()
    sizes = [p.stat().st_size for p in folder.rglob("*") if p.is_file()]
    assert sum(sizes) == array.nbytes and len(set(sizes)) == 1
    found = np.zeros(shape, np.int16)
    for name, part, inside in array.parts(tuple(Interval(0, n) for n in shape)):
        chunk = np.fromfile(folder / name, "<i2").reshape(chunks)
        found[tuple(slice(i.start, i.stop) for i in part)] = chunk[tuple(slice(i.start, i.stop) for i in inside)]
    np.testing.assert_array_equal(found, values(shape, np.int16))


# --- stores ------------------------------------------------------------------------------------------


def write_slab(description: str, start: int, stop: int) -> None:
    """One rank's work: rows [start, stop) of the axis x (depth), in pieces that divide chunks."""
    box = [slice(None), slice(None), slice(start, stop), slice(None), slice(None)]
    with open_part(description) as writer:
        for left, right in ((0, 3), (3, SHAPE[-1])):
            box[-1] = slice(left, right)
            writer.write(box, values(SHAPE)[tuple(box)])


@pytest.mark.parametrize("ending", [".zarr", ".v2.zarr", ".ome.zarr", ".v2.ome.zarr"])
def test_processes_write_their_parts(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"out{ending}"
    sink = create_sink(path, [ArraySpec("out", SHAPE, np.float32, (1, 2, 4, 4, 5))])
    assert os.listdir(tmp_path) == [], "planning touches no file"
    sink.prepare()
    assert PartFile.from_json(sink.part.to_json()) == sink.part
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=write_slab, args=(sink.part.to_json(), *cut))
               for cut in itertools.pairwise([0, 1, 5, 7])]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert not path.exists()
    sink.commit()
    assert os.listdir(tmp_path) == [path.name]
    name = "0" if "ome" in ending else "out"
    array = zarr.open(str(path), mode="r")[name]
    assert array.metadata.zarr_format == (2 if "v2" in ending else 3)
    np.testing.assert_array_equal(np.asarray(array[...]).reshape(SHAPE), values(SHAPE))
    assert array.chunks[-3:] == (4, 4, 5)
    with open_source(path) as source:
        assert source.notices == ()
        check_parts(source, values(SHAPE))


@pytest.mark.parametrize("ending", [".zarr", ".v2.zarr"])
@pytest.mark.parametrize(("dtype", "plain"), [("bfloat16", "float32"), (">i4", "int32")]
                         + [(same, same) for same in ("bool", "float16", "int64", "float64", "int8", "uint16")])
def test_types(tmp_path: Path, ending: str, dtype: str, plain: str) -> None:
    array = values((1, 1, 5, 3, 7)).astype(ArraySpec("", (), dtype).numpy_dtype)
    write_whole(tmp_path / f"out{ending}", array)
    found = zarr.open(str(tmp_path / f"out{ending}"), mode="r")["out"][...]
    assert found.dtype == np.dtype(plain)
    np.testing.assert_array_equal(found, array.astype(plain))


@pytest.mark.parametrize("ending", [".zarr", ".v2.zarr"])
@pytest.mark.parametrize("shape", [(), (0, 3), (13,), (3, 0, 5)])
def test_other_ranks(tmp_path: Path, ending: str, shape: tuple[int, ...]) -> None:
    write_whole(tmp_path / f"out{ending}", values(shape))
    check_parts(open_source(tmp_path / f"out{ending}"), values(shape))


def test_several_arrays(tmp_path: Path) -> None:
    path = tmp_path / "out.zarr"
    specs = [ArraySpec("/head/logits", SHAPE, "bfloat16"), ArraySpec("labels", SHAPE[2:], "uint8")]
    with create_sink(path, specs) as sink, sink.writer() as writer:
        writer.write(None, values(SHAPE).astype(ml_dtypes.bfloat16), "/head/logits")
        writer.write(None, values(SHAPE[2:], np.uint8), "labels")
        with pytest.raises(ValueError, match="none of /head/logits"):
            writer.write(None, values(SHAPE), "other")
    assert array_names(path) == ("labels", "head/logits")
    check_parts(open_source(f"{path}:/labels"), values(SHAPE[2:], np.uint8))
    write_whole(Path(f"{tmp_path}/one.zarr:/by/name"), values((3, 5)))
    assert array_names(tmp_path / "one.zarr") == ("by/name",)


def test_the_format_of_the_input_stays(tmp_path: Path) -> None:
    for number in FORMATS:
        zarr.create_array(str(tmp_path / f"in{number}.zarr"), data=values(SHAPE), zarr_format=number)
        with open_source(tmp_path / f"in{number}.zarr") as source:
            write_whole(tmp_path / f"out{number}.zarr", values(SHAPE), source)
        assert zarr.open(str(tmp_path / f"out{number}.zarr"), mode="r").metadata.zarr_format == number


@pytest.mark.parametrize("names", [("a", "/a"), ("a", "a/b"), ("",), ("a//b",), ("../a",)])
def test_names_that_no_store_has(tmp_path: Path, names: tuple[str, ...]) -> None:
    with refused("distinct names"):
        create_sink(tmp_path / "a.zarr", [ArraySpec(name, (3,), "float32") for name in names])


# --- targets ----------------------------------------------------------------------------------------


def test_what_is_there_already(tmp_path: Path) -> None:
    """A store of the same arrays is replaced when the new one is complete; what would lose others is refused."""
    spec = [ArraySpec("out", (3,), "float32")]
    path = tmp_path / "out.zarr"
    write_whole(path, values((3,)))
    sink = create_sink(path, spec)
    with pytest.raises(RuntimeError, match="died"), sink, sink.writer() as writer:
        writer.write(None, values((3,)) * 2)
        raise RuntimeError("a rank died")
    sink.abort()
    assert os.listdir(tmp_path) == ["out.zarr"]
    check_parts(open_source(path), values((3,)))
    write_whole(path, values((3,)) * 2)
    assert os.listdir(tmp_path) == ["out.zarr"]
    check_parts(open_source(path), values((3,)) * 2)
    (tmp_path / "link.zarr").symlink_to(path)
    write_whole(tmp_path / "link.zarr", values((3,)) * 3)
    assert (tmp_path / "link.zarr").is_symlink()
    check_parts(open_source(path), values((3,)) * 3)
    zarr.open_group(str(path), mode="a").create_array("labels", data=values((2,)))
    with refused(r"out\.zarr: exists and holds labels, which would be lost"):
        create_sink(path, spec)
    zarr.create_array(str(tmp_path / "root.zarr"), data=values((2,)))
    with refused(r"root\.zarr: exists and holds an array without a name"):
        create_sink(tmp_path / "root.zarr", spec)
    (tmp_path / "empty.zarr").mkdir()
    write_whole(tmp_path / "empty.zarr", values((3,)))
    (tmp_path / "folder.zarr").mkdir()
    (tmp_path / "folder.zarr" / "thesis.txt").write_text("kept")
    with refused(r"folder\.zarr: is a folder and no Zarr store"):
        create_sink(tmp_path / "folder.zarr", spec)
    (tmp_path / "file.zarr").write_text("kept")
    with refused(r"file\.zarr: is a file, a folder is to be written"):
        create_sink(tmp_path / "file.zarr", spec)
    with refused(r"does not exist; create it"):
        create_sink(tmp_path / "none" / "a.zarr", spec)
    huge = create_sink(tmp_path / "huge.zarr", [ArraySpec("out", (1, 1, 2**20, 2**12, 2**12), "float32")])
    with refused(r"needs 65,536\.0 GiB, .* are free; free some space"):
        huge.prepare()


def test_a_store_that_is_elsewhere(tmp_path: Path) -> None:
    sink = create_sink(tmp_path / "a.zarr", [ArraySpec("out", SHAPE, "float32")])
    with refused("all hosts share"):
        open_part(sink.part)
    sink.prepare()
    with sink.writer() as writer:
        writer.write(None, values(SHAPE))
    with pytest.raises(ValueError, match="closed"):
        writer.write(None, values(SHAPE))
    sink.part.remove()
    with pytest.raises(ExecutionError, match=r"a\.zarr: writing failed"):
        sink.commit()


_FULL_DISK = """
import resource, signal, sys
import numpy as np
from partitioner.errors import ExecutionError
from runtime.volumes import ArraySpec, create_sink
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
sink = create_sink(sys.argv[1], [ArraySpec("out", (1, 1, 64, 64, 64), "float32")])
try:
    with sink, sink.writer() as writer:
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
        writer.write(None, np.ones((1, 1, 64, 64, 64), np.float32))
except ExecutionError as error:
    print(error)
"""


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "out.zarr"
    write_whole(path, values((3,)))
    said = subprocess.run([sys.executable, "-c", _FULL_DISK, str(path)], capture_output=True, text=True,
                          check=True).stdout
    assert said.startswith(f"{path}: writing failed") and said.count("\n") == 1
    assert os.listdir(tmp_path) == ["out.zarr"]
    check_parts(open_source(path), values((3,)))


def test_a_large_store_is_planned_without_memory(tmp_path: Path) -> None:
    sink = create_sink(tmp_path / "a.zarr", [ArraySpec("out", (1, 1, 2**14, 2**12, 2**12), "float32")])
    assert sink.part.size > 2**40


# --- images ------------------------------------------------------------------------------------------


def save_image(path: Path, array: Any, axes: str, zarr_format: int, **more: Any) -> Path:
    """An OME-Zarr image of two levels; y and x of 0.5 micrometers, z of 2, the first voxel of z at 10."""
    group = zarr.open_group(str(path), mode="w", zarr_format=zarr_format)
    levels = []
    for level, step in enumerate((1, 2)):
        cells = array[tuple(slice(None, None, step if a in "yx" else 1) for a in axes)]
        group.create_array(str(level), data=cells, chunks=tuple(min(4, n) for n in cells.shape))
        scale = [{"z": 2.0, "y": 0.5 * step, "x": 0.5 * step}.get(a, 1.0) for a in axes]
        moves = [{"type": "scale", "scale": scale}]
        moves.append({"type": "translation", "translation": [10.0 if a == "z" else 0.0 for a in axes]})
        levels.append({"path": str(level), "coordinateTransformations": moves})
    kinds = {"t": {"type": "time", "unit": "second"}, "c": {"type": "channel"}}
    named = [{"name": a, **kinds.get(a, {"type": "space", "unit": "micrometer"})} for a in axes]
    image = {"name": "ct", "axes": named, "datasets": levels, **more}
    if zarr_format == 2:
        group.attrs["multiscales"] = [{"version": "0.4", **image}]
    else:
        group.attrs["ome"] = {"version": "0.5", "multiscales": [image]}
    return path


def voxels(image: Any) -> Any:
    """The scale of the full resolution."""
    return image["datasets"][0]["coordinateTransformations"][0]


CASES = {"zyx": (1, 1, 4, 6, 5), "czyx": (1, 3, 4, 6, 5), "tzyx": (2, 1, 4, 6, 5), "tczyx": (1, 3, 4, 6, 5),
         "yx": (1, 1, 6, 5), "cyx": (1, 3, 6, 5), "tcyx": (2, 3, 6, 5)}


@pytest.mark.parametrize("zarr_format", FORMATS)
@pytest.mark.parametrize("axes", CASES)
def test_images_as_a_model_sees_them(tmp_path: Path, axes: str, zarr_format: int) -> None:
    shape = CASES[axes]
    full = dict(zip("tczyx" if len(shape) == 5 else "tcyx", shape, strict=True))
    path = save_image(tmp_path / "a.ome.zarr", values(tuple(full[a] for a in axes)), axes, zarr_format)
    assert array_names(path) == ()
    with open_source(path) as source:
        check_parts(source, values(shape))
        for ending in ("", ".v2"):
            write_whole(tmp_path / f"b{ending}.ome.zarr", values(shape) + 1, source)
    check_parts(open_source(f"{path}:/1"), values(shape)[..., ::2, ::2])
    assert array_names(f"{path}:/1") == ("1",)
    for ending, number in (("", zarr_format), (".v2", 2)):
        written = zarr.open_group(str(tmp_path / f"b{ending}.ome.zarr"), mode="r")
        assert written.metadata.zarr_format == number
        attributes = dict(zarr.open_group(str(path), mode="r").attrs)
        before = attributes.get("ome", attributes)["multiscales"][0]
        after = dict(written.attrs).get("ome", dict(written.attrs))["multiscales"][0]
        assert after["axes"] == before["axes"]
        assert voxels(after) == voxels(before)
        assert after["name"] == "out"
        assert written["0"].shape == tuple(full[a] for a in axes)
        if number == 3:
            assert written["0"].metadata.dimension_names == tuple(axes)
        check_parts(open_source(tmp_path / f"b{ending}.ome.zarr"), values(shape) + 1)


def test_more_channels_than_the_input(tmp_path: Path) -> None:
    path = save_image(tmp_path / "a.ome.zarr", values((4, 6, 5)), "zyx", 3)
    with open_source(path) as source:
        write_whole(tmp_path / "b.ome.zarr", values((1, 3, 4, 6, 5)), source)
    written = zarr.open_group(str(tmp_path / "b.ome.zarr"), mode="r")
    image = written.attrs["ome"]["multiscales"][0]
    assert [a["name"] for a in image["axes"]] == ["c", "z", "y", "x"]
    assert image["datasets"][0]["coordinateTransformations"][0]["scale"] == [1.0, 2.0, 0.5, 0.5]
    assert image["datasets"][0]["coordinateTransformations"][1]["translation"] == [0.0, 10.0, 0.0, 0.0]
    write_whole(tmp_path / "c.ome.zarr", values((2, 3, 6, 5)))
    assert zarr.open_group(str(tmp_path / "c.ome.zarr"), mode="r")["0"].metadata.dimension_names == ("t", "c", "y", "x")


def test_places_in_the_world(tmp_path: Path) -> None:
    """Voxel sizes go from images to NIfTI files and back, also what an image's description cannot say."""
    path = save_image(tmp_path / "a.ome.zarr", values((4, 6, 5)), "zyx", 3)
    with open_source(path) as source:
        assert source.meta is not None
        expected = np.array([[0, 0, 0.0005, 0], [0, 0.0005, 0, 0], [0.002, 0, 0, 0.01], [0, 0, 0, 1]])
        np.testing.assert_allclose(source.meta.affine, expected)
        write_whole(tmp_path / "a.nii", values((1, 1, 4, 6, 5)), source)
    np.testing.assert_allclose(nibabel.load(tmp_path / "a.nii").affine, expected)
    plain = np.diag([2.0, 0.5, 3.0, 1.0])
    plain[:3, 3] = 10, -20, 30
    for name, affine in (("plain", plain), ("turned", AFFINE)):
        nibabel.Nifti1Image(values((7, 11, 5)), affine).to_filename(tmp_path / f"{name}.nii")
        with open_source(tmp_path / f"{name}.nii") as source:
            write_whole(tmp_path / f"{name}.ome.zarr", values((1, 1, 7, 11, 5)), source)
        with open_source(tmp_path / f"{name}.ome.zarr") as source:
            assert source.meta is not None
            np.testing.assert_allclose(source.meta.affine, nibabel.load(tmp_path / f"{name}.nii").affine)
            image = dict(zarr.open_group(str(tmp_path / f"{name}.ome.zarr"), mode="r").attrs)
            assert ("partitioner" in image) == (name == "turned")
            assert [a["name"] for a in image["ome"]["multiscales"][0]["axes"]] == ["x", "y", "z"]


def test_images_within_a_store(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    group = zarr.open_group(str(path), mode="w")
    group.create_array("plain", data=values((3, 5)))
    save_image(path / "inner", values((4, 6, 5)), "zyx", 3)
    check_parts(open_source(f"{path}:/inner"), values((1, 1, 4, 6, 5)))
    check_parts(open_source(f"{path}:/inner/0"), values((1, 1, 4, 6, 5)))
    check_parts(open_source(f"{path}:/plain"), values((3, 5)))
    with refused(r"holds several arrays \(plain, inner/0, inner/1\); name one"):
        open_source(path)


@pytest.mark.parametrize(("change", "pattern"), [
    ({"axes": [{"name": n} for n in "xyc"]}, "has axes x, y, c; t, c, z, y, x in this order"),
    ({"axes": [{"name": n} for n in "zqx"]}, "has axes z, q, x"),
    ({"axes": [{"name": n} for n in "yx"]}, "tells of 2 axes, the array has 3"),
    ({"axes": 7}, "description is damaged"),
    ({"datasets": [{"path": "0", "coordinateTransformations": [{"scale": ["a", 1, 1]}]}]}, "description is damaged"),
    ({"datasets": [{"path": "0", "coordinateTransformations": [{"scale": [1, 1]}]}]}, "description is damaged"),
    ({"datasets": [{"way": "0"}]}, "its levels have no paths"),
    ({"datasets": [{"path": "9"}]}, "holds no array '9', which its OME-Zarr description names"),
])
def test_damaged_descriptions(tmp_path: Path, change: dict[str, Any], pattern: str) -> None:
    path = save_image(tmp_path / "a.ome.zarr", values((4, 6, 5)), "zyx", 3)
    about = json.loads((path / "zarr.json").read_text())
    about["attributes"]["ome"]["multiscales"][0] |= change
    (path / "zarr.json").write_text(json.dumps(about))
    with refused(pattern):
        open_source(path)


def test_what_is_no_image(tmp_path: Path) -> None:
    for shape in ((3,), (1, 2, 5), (1, 1, 2, 3, 4, 5)):
        with refused(r"OME-Zarr holds images of shape"):
            create_sink(tmp_path / "a.ome.zarr", [ArraySpec("x", shape, "float32")])
    with refused("holds one image, not 2"):
        create_sink(tmp_path / "a.ome.zarr", [ArraySpec("x", SHAPE, "float32"), ArraySpec("y", SHAPE, "float32")])


_MEMORY = """
import sys, tracemalloc
from runtime.volumes import open_source
with open_source(sys.argv[1]) as source:
    tracemalloc.start()
    assert source.read([(0, 1), (0, 1), (100, 110), (0, 256), (0, 256)]).size == 10 * 256 * 256
    print(tracemalloc.get_traced_memory()[1])
"""


def test_reading_holds_its_part_and_no_more(tmp_path: Path) -> None:
    with create_sink(tmp_path / "a.zarr", [ArraySpec("out", (1, 1, 512, 256, 256), "float32", (1, 1, 10, 256, 256))]):
        pass
    grown = subprocess.run([sys.executable, "-c", _MEMORY, str(tmp_path / "a.zarr")], capture_output=True, text=True,
                           check=True).stdout
    assert int(grown) < 16 * 2**20
