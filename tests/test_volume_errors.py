"""Damaged files and targets that cannot be: one clear line that names the file, and nothing left behind."""

from __future__ import annotations

import gzip
import os
import sys
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from partitioner.errors import ExecutionError, PartitionError
from runtime.volumes import (
    ArraySpec,
    create_sink,
    open_part,
    open_source,
)
from tests.volumes import AFFINE, SHAPE, WRITTEN, values, write_whole


def refused(pattern: str) -> Any:
    """One clear line that matches."""
    return pytest.raises(PartitionError, match=rf"\A[^\n]*{pattern}[^\n]*\Z")


def test_files_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "folder.npy").mkdir()
    os.mkfifo(tmp_path / "pipe.npy")
    for name, pattern in [
        ("a.npy", "no such file"),
        ("folder.npy", "is a folder"),
        ("pipe.npy", "no regular file"),
        ("a.mha", r"no known kind of volume file; use .*\.nii\.gz"),
    ]:
        with refused(pattern):
            open_source(tmp_path / name)


@pytest.mark.parametrize("ending", WRITTEN)
@pytest.mark.parametrize(
    "content", [b"", b"no volume at all" * 50, b"\x93NUMPY\x01\x00", b"PK\x03\x04", b"\x1f\x8b\x08"]
)
def test_files_of_another_kind(tmp_path: Path, ending: str, content: bytes) -> None:
    path = tmp_path / f"a{ending}"
    path.write_bytes(content)
    with refused(r"a\.(n(py|pz|ii|ii\.gz)|h5|hdf5|tiff?|btf)\b.*: no "):
        open_source(path)


@pytest.mark.parametrize("ending", [*WRITTEN, "deflated.npz"])
@pytest.mark.parametrize("missing", [1, 8, 200, 0.5])
def test_truncated_files_are_refused_when_opened(tmp_path: Path, ending: str, missing: float) -> None:
    """Before a network runs for hours."""
    path, array = tmp_path / f"a{ending}", np.random.default_rng(0).random(SHAPE)
    if ending == "deflated.npz":
        np.savez_compressed(path, out=array)
    else:
        write_whole(path, array)
    content = path.read_bytes()
    path.write_bytes(content[: -missing if isinstance(missing, int) else len(content) // 2])
    if ending in (".tif", ".tiff") and missing in (1, 8):
        np.testing.assert_array_equal(open_source(path).read(), array)  # nothing points to the last bytes
        return
    with refused("cut short"):
        open_source(path)


def test_a_gzipped_file_of_several_pieces_or_too_short(tmp_path: Path) -> None:
    path = tmp_path / "a.nii"
    write_whole(path, values(SHAPE))
    content = path.read_bytes()
    for pieces in ((content,), (content[:100], content[100:900], content[900:]), (content, b"and more")):
        (tmp_path / "a.nii.gz").write_bytes(b"".join(map(gzip.compress, pieces)))
        np.testing.assert_array_equal(open_source(tmp_path / "a.nii.gz").read(), values(SHAPE))
    for pieces in ((content[:-4],), (content[:100], content[100:900])):
        (tmp_path / "a.nii.gz").write_bytes(b"".join(map(gzip.compress, pieces)))
        with refused(r"a\.nii\.gz: damaged or cut short \(it ends before its data\)"):
            open_source(tmp_path / "a.nii.gz")


@pytest.mark.parametrize("ending", [".nii.gz", ".npz"])
@pytest.mark.parametrize("where", range(5, 100, 7))
@pytest.mark.filterwarnings("ignore:.*encountered in cast:RuntimeWarning")
def test_a_damaged_stream_is_noticed(tmp_path: Path, ending: str, where: int) -> None:
    """Wherever the damage is, and also where it makes the data longer instead of shorter."""
    path, array = tmp_path / f"a{ending}", np.random.default_rng(where).random(SHAPE)
    if ending == ".npz":
        np.savez_compressed(path, out=array)
    else:
        write_whole(path, array)
    content = bytearray(path.read_bytes())
    content[len(content) * where // 100] ^= 3
    path.write_bytes(content)
    with refused("damaged"), open_source(path) as source:
        for _ in source.slabs():
            pass


def test_values_that_are_no_numbers(tmp_path: Path) -> None:
    np.save(tmp_path / "objects.npy", np.array([{}, None]))
    np.save(tmp_path / "complex.npy", np.zeros((3, 5), np.complex64))
    np.save(tmp_path / "text.npy", np.array(["a", "b"]))
    np.savez(tmp_path / "objects.npz", a=np.array([{}, None]))
    colour = np.zeros((3, 5, 4), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    nibabel.Nifti1Image(colour, AFFINE).to_filename(tmp_path / "colour.nii")
    for name, pattern in [
        ("objects.npy", "pickled"),
        ("objects.npz", "pickled"),
        ("complex.npy", "complex64"),
        ("text.npy", "<U1"),
        ("colour.nii", r"\('R', 'u1'\)"),
    ]:
        with refused(pattern):
            open_source(tmp_path / name)


def test_npz_members(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", one=values((3,)), two=values((5,)))
    with refused(r"several arrays \(one, two\)"):
        open_source(tmp_path / "a.npz")
    with refused("no array 'three'; it has one, two"):
        open_source(tmp_path / "a.npz", "three")
    np.savez(tmp_path / "none.npz")
    with refused("holds no array"):
        open_source(tmp_path / "none.npz")


@pytest.mark.parametrize("extents", [(4, 5), (4, 5, 3, 2, 2)])
def test_nifti_of_other_ranks(tmp_path: Path, extents: tuple[int, ...]) -> None:
    nibabel.Nifti1Image(values(extents), AFFINE).to_filename(tmp_path / "a.nii")
    with refused(r"a volume x, y, z or"):
        open_source(tmp_path / "a.nii")


def test_nifti_without_nibabel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_whole(tmp_path / "a.nii", values(SHAPE))
    monkeypatch.setitem(sys.modules, "nibabel", None)
    with refused(r"pip install 'partitioner\[nifti\]'"):
        open_source(tmp_path / "a.nii")
    with refused(r"pip install 'partitioner\[nifti\]'"):
        create_sink(tmp_path / "b.nii", [ArraySpec("out", SHAPE, "float32")])


def test_targets_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "folder.npy").mkdir()
    (tmp_path / "file").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe.npy")
    one = [ArraySpec("out", SHAPE, "float32")]
    for name, arrays, pattern in [
        ("folder.npy", one, "is a folder"),
        ("pipe.npy", one, "no regular file"),
        ("missing/a.npy", one, "does not exist"),
        ("file/a.npy", one, "does not exist"),
        ("a.mha", one, "no known kind"),
        ("a.npy", [*one, *one], r"holds one array, not 2 \(out, out\); use \.npz"),
        ("a.npz", [*one, *one], "distinct names"),
        ("a.npy", [ArraySpec("out", (3,), "complex64")], "is complex64"),
        ("a.nii", [ArraySpec("out", (2, 1, 3, 5, 7), "float32")], r"holds one volume.*\(2, 1, 3, 5, 7\)"),
        ("a.nii.gz", [ArraySpec("out", (1, 10), "float32")], r"shape \(1, 10\); write \.npy"),
    ]:
        with refused(pattern):
            create_sink(tmp_path / name, arrays)
    huge = create_sink(tmp_path / "huge.npy", [ArraySpec("out", (1, 1, 2**20, 2**12, 2**12), "float32")])
    with refused(r"needs 65,536\.0 GiB, .* are free; free some space"):
        huge.prepare()
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.npy", "pipe.npy"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_leave_to_write(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with refused("no leave to write"):
        create_sink(tmp_path / "a.npy", [ArraySpec("out", SHAPE, "float32")])
    tmp_path.chmod(0o700)


def test_a_folder_that_takes_no_files() -> None:
    """The kernel's own folder refuses even root."""
    if not os.path.isdir("/proc/self"):
        pytest.skip("needs a Linux kernel")
    with refused(r"cannot be written|no leave|\.npy: needs"), create_sink(
        "/proc/self/a.npy", [ArraySpec("out", SHAPE, "float32")]
    ):
        pass


def test_a_part_that_is_elsewhere(tmp_path: Path) -> None:
    sink = create_sink(tmp_path / "a.npy", [ArraySpec("out", SHAPE, "float32")])
    with refused("all hosts share"):
        open_part(sink.part)
    Path(sink.part.temporary).write_bytes(b"short")
    with refused("5 bytes where .* were prepared.*all hosts share"):
        open_part(sink.part)
    with pytest.raises(ExecutionError, match=r"a\.npy: writing failed"):
        Path(sink.part.temporary).unlink()
        sink.commit()
