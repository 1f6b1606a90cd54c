"""Volume files written part by part by several processes: complete or not there, equal to the values."""

from __future__ import annotations

import gzip
import itertools
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from runtime.volumes import (
    ArraySpec,
    PartFile,
    array_names,
    create_sink,
    open_part,
    open_source,
)
from tests.volumes import AFFINE, SHAPE, TIFF, WRITTEN, Array, check_parts, load, values, write_whole


def write_slab(description: str, start: int, stop: int) -> None:
    """One rank's work: rows [start, stop) of the axis x (depth)."""
    box = [slice(None), slice(None), slice(start, stop), slice(None), slice(None)]
    with open_part(description) as writer:
        for left, right in ((0, 3), (3, SHAPE[-1])):
            box[-1] = slice(left, right)
            writer.write(box, values(SHAPE)[tuple(box)])


@pytest.mark.parametrize("ending", WRITTEN)
def test_processes_write_their_parts(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"out{ending}"
    path.write_bytes(b"old")
    sink = create_sink(path, [ArraySpec("out", SHAPE, np.float32)])
    assert os.listdir(tmp_path) == [path.name], "planning touches no file"
    sink.prepare()
    assert PartFile.from_json(sink.part.to_json()) == sink.part
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=write_slab, args=(sink.part.to_json(), *cut))
        for cut in itertools.pairwise([0, 1, 5, 7])
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert path.read_bytes() == b"old"
    sink.commit()
    assert os.listdir(tmp_path) == [path.name]
    np.testing.assert_array_equal(load(path), values(SHAPE))
    check_parts(open_source(path), values(SHAPE))


@pytest.mark.parametrize("ending", WRITTEN)
@pytest.mark.parametrize(
    ("dtype", "plain", "nifti"),
    [("bool", "bool", "uint8"), ("float16", "float16", "float32"), ("bfloat16", "float32", "float32")]
    + [(same, same, same) for same in ("int64", "float64", "int8", "uint16", ">i4")],
)
def test_types_are_stored_without_loss(
    tmp_path: Path, ending: str, dtype: str, plain: str, nifti: str
) -> None:
    path, shape = tmp_path / f"out{ending}", (1, 1, 5, 3, 7)
    array = values(shape).astype(ArraySpec("", (), dtype).numpy_dtype)
    write_whole(path, array)
    found = load(path)
    expected = nifti if "nii" in ending or (dtype == "bool" and ending in TIFF) else plain
    assert found.dtype.newbyteorder("=") == np.dtype(expected).newbyteorder("=")
    np.testing.assert_array_equal(found, array.astype(found.dtype))


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_affine_and_header_go_over(tmp_path: Path, ending: str, order: str, kind: Any) -> None:
    header = kind.header_class(endianness=order)
    header.set_xyzt_units("mm", "sec")
    header["descrip"] = b"chest"
    header["cal_max"] = 400
    header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"kept" * 9))
    image = kind(values((7, 11, 5), np.int16), AFFINE, header)
    image.set_qform(AFFINE, 1, strip_shears=True)
    image.set_sform(AFFINE, 4)
    image.header.set_slope_inter(0.5, 3)
    image.to_filename(tmp_path / f"in{ending}")
    with open_source(tmp_path / f"in{ending}") as source:
        write_whole(tmp_path / f"out{ending}", values(SHAPE), source)
        write_whole(tmp_path / f"labels{ending}", values((1, 1, 7, 11, 5), np.uint8), source)
    before = nibabel.load(tmp_path / f"in{ending}")
    for name, stored, shape in (("out", "f4", (7, 11, 5, 2)), ("labels", "u1", (7, 11, 5))):
        after = nibabel.load(tmp_path / f"{name}{ending}")
        assert isinstance(after, kind)
        assert (after.shape, after.get_data_dtype()) == (shape, np.dtype(order + stored))
        for form in ("get_qform", "get_sform"):
            expected, code = getattr(before, form)(coded=True)
            found, found_code = getattr(after, form)(coded=True)
            assert found_code == code
            np.testing.assert_array_equal(found, expected)
        assert after.header.get_xyzt_units() == ("mm", "sec")
        assert nibabel.aff2axcodes(after.affine) == nibabel.aff2axcodes(before.affine)
        np.testing.assert_array_equal(after.header["pixdim"][:4], before.header["pixdim"][:4])
        np.testing.assert_array_equal(after.header.get_zooms()[:3], before.header.get_zooms())
        assert bytes(after.header["descrip"]).rstrip(b"\0") == b"chest"
        with (gzip.open if ending == ".nii.gz" else open)(tmp_path / f"{name}{ending}", "rb") as file:
            written = kind.header_class.from_fileobj(file)
        assert [float(written[field]) for field in ("scl_slope", "scl_inter", "cal_max")] == [1, 0, 0]
        assert [bytes(e.get_content()).rstrip(b"\0") for e in after.header.extensions] == [b"kept" * 9]
    np.testing.assert_array_equal(load(tmp_path / f"out{ending}"), values(SHAPE))


def test_nifti_without_a_model_of_it(tmp_path: Path) -> None:
    np.save(tmp_path / "in.npy", values(SHAPE))
    with open_source(tmp_path / "in.npy") as source:
        write_whole(tmp_path / "out.nii", values((1, 1, 3, 5, 7)), source)
    np.testing.assert_array_equal(nibabel.load(tmp_path / "out.nii").affine, np.eye(4))
    write_whole(tmp_path / "long.nii", values((1, 1, 40_000, 1, 1)))
    assert isinstance(nibabel.load(tmp_path / "long.nii"), nibabel.Nifti2Image)
    np.testing.assert_array_equal(load(tmp_path / "long.nii"), values((1, 1, 40_000, 1, 1)))


def test_npz_holds_several_arrays(tmp_path: Path) -> None:
    path = tmp_path / "out.npz"
    arrays: dict[str, Array] = {"logits": values(SHAPE), "/head/class": values((3, 10), np.int64)}
    arrays["nothing"] = values((0, 4), np.float64)
    specs = [ArraySpec(name, array.shape, array.dtype) for name, array in arrays.items()]
    with create_sink(path, specs) as sink, open_part(sink.part) as writer:
        for name, array in arrays.items():
            writer.write(None, array, name)
        with pytest.raises(ValueError, match="none of logits"):
            writer.write(None, values(SHAPE), "other")
    assert array_names(path) == tuple(arrays)
    found = np.load(path)
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        check_parts(open_source(path, name), array)


@pytest.mark.parametrize("ending", [".npz", ".nii.gz"])
def test_the_same_volume_gives_the_same_file(tmp_path: Path, ending: str) -> None:
    for name in ("one", "two"):
        write_whole(tmp_path / f"{name}{ending}", values(SHAPE))
    content = (tmp_path / f"one{ending}").read_bytes()
    assert content == (tmp_path / f"two{ending}").read_bytes()
    assert ending == ".npz" or content[4:8] == bytes(4), "gzip's time stamp"


@pytest.mark.parametrize("ending", WRITTEN)
def test_abort_leaves_the_old_file_and_nothing_else(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"out{ending}"
    path.write_bytes(b"old")
    with (
        pytest.raises(RuntimeError, match="a rank died"),
        create_sink(path, [ArraySpec("out", SHAPE, "float32")]) as sink,
        sink.writer() as writer,
    ):
        writer.write(None, values(SHAPE))
        raise RuntimeError("a rank died")
    sink.abort()
    assert os.listdir(tmp_path) == [path.name]
    assert path.read_bytes() == b"old"


def test_a_replaced_file_keeps_its_permissions_and_its_links(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    real, link = tmp_path / "kept" / "real.npy", tmp_path / "link.npy"
    real.write_bytes(b"old")
    real.chmod(0o600)
    link.symlink_to(real)
    write_whole(link, values((3, 5)))
    assert link.is_symlink()
    assert real.stat().st_mode & 0o777 == 0o600
    np.testing.assert_array_equal(np.load(real), values((3, 5)))


def test_wrong_parts_are_refused(tmp_path: Path) -> None:
    sink = create_sink(tmp_path / "out.npy", [ArraySpec("out", (4, 6), "int32")])
    with sink, sink.writer() as writer:
        for box, array in [
            (((0, 4), (0, 7)), values((4, 7), np.int32)),
            (((0, 2), (0, 6)), values((4, 6), np.int32)),
            (None, values((4, 6), np.float32)),
            (None, values((4, 6), np.int64)),
        ]:
            with pytest.raises(ValueError, match=r"cells|shape|values"):
                writer.write(box, array)
        writer.write(None, values((4, 6), np.int32))
        writer.close()
        with pytest.raises(ValueError, match="closed"):
            writer.write(None, values((4, 6), np.int32))


_FULL_DISK = """
import resource, signal, sys
import numpy as np
from partitioner.errors import ExecutionError, PartitionError
from runtime.volumes import ArraySpec, create_sink
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
sink = create_sink(sys.argv[1], [ArraySpec("out", (1, 1, 64, 64, 64), "float32")])
limit = int(sys.argv[2])
def restrict():
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    if sys.argv[3] == "prepare":
        restrict()
    with sink, sink.writer() as writer:
        restrict()
        writer.write(None, np.random.default_rng(0).random((1, 1, 64, 64, 64), np.float32))
except (ExecutionError, PartitionError) as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize(
    ("ending", "when", "kind"),
    [(".npy", "prepare", "PartitionError"), (".npy", "write", "ExecutionError")]
    + [(ending, "write", "ExecutionError") for ending in (".nii.gz", ".npz")]
    + [(".npz", "pack", "ExecutionError")],
)
def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, ending: str, when: str, kind: str) -> None:
    """A limit on the size of files stands for the disk; an archive is a little larger than what it holds."""
    path = tmp_path / f"out{ending}"
    path.write_bytes(b"old")
    raw_size = create_sink(path, [ArraySpec("out", (1, 1, 64, 64, 64), "float32")]).part.size
    limit = {"prepare": 2**16, "write": 2**16, "pack": raw_size}[when]
    command = [sys.executable, "-c", _FULL_DISK, str(path), str(limit), when]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.startswith(f"{kind} {path}: ")
    assert said.count("\n") == 1
    assert os.listdir(tmp_path) == [path.name]
    assert path.read_bytes() == b"old"
