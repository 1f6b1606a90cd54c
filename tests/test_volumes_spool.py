"""A copy in blocks: the same values, slabs along any axis that touch little, and nothing left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from partitioner.errors import PartitionError
from runtime.volumes import open_source, spool, spooled
from tests.volumes import SHAPE, check_parts, save_nifti, values, write_whole


def refused(pattern: str) -> Any:
    """One clear line that matches."""
    return pytest.raises(PartitionError, match=rf"\A[^\n]*{pattern}[^\n]*\Z")


@pytest.mark.parametrize("edges", [{}, {1: 4, 2: 3, 3: 2}, {1: 3, 2: 4, 3: 5}])
@pytest.mark.parametrize("ending", [".npy", ".nii", ".nii.gz", ".npz"])
def test_the_same_values(tmp_path: Path, ending: str, edges: dict[int, int],
                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "_EDGES", {**spool._EDGES, **edges})
    write_whole(tmp_path / f"a{ending}", values(SHAPE, np.int16))
    with open_source(tmp_path / f"a{ending}", dtype=np.float32) as source:
        copy = spooled(source, tmp_path)
    assert os.listdir(tmp_path) == [f"a{ending}"]
    with copy:
        assert copy.random_access
        assert copy.path == tmp_path / f"a{ending}"
        assert (copy.meta is None) == (source.meta is None)
        check_parts(copy, values(SHAPE))
    copy.close()
    with pytest.raises(OSError, match="descriptor"):
        copy.read()


@pytest.mark.parametrize("shape", [(), (0, 3), (13,), (3, 0, 5), (9, 4), (2, 3, 5, 7)])
@pytest.mark.parametrize("edge", [2, 512])
def test_other_ranks(tmp_path: Path, shape: tuple[int, ...], edge: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "_EDGES", {1: edge, 2: edge, 3: edge})
    np.save(tmp_path / "a.npy", values(shape))
    with open_source(tmp_path / "a.npy") as source, spooled(source, tmp_path) as copy:
        check_parts(copy, values(shape))


def test_slabs_smaller_than_a_plane(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "_EDGES", {1: 4, 2: 4, 3: 3})
    save_nifti(tmp_path / "a.nii.gz", values((7, 11, 5)))
    with open_source(tmp_path / "a.nii.gz") as source:
        whole = source.slabs
        monkeypatch.setattr(source, "slabs", lambda: whole(200), raising=False)
        with spooled(source, tmp_path) as copy:
            check_parts(copy, values((7, 11, 5))[None, None])


def test_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_nifti(tmp_path / "a.nii.gz", values((7, 11, 5)))
    with open_source(tmp_path / "a.nii.gz") as source:
        monkeypatch.setattr(spool.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
        with refused(r"a\.nii\.gz: its copy .* needs 1\.5 KiB, 1000 bytes are free.*set TMPDIR"):
            spooled(source, tmp_path)
        monkeypatch.undo()
        with refused(r"its copy cannot be made in .*none .*set TMPDIR"):
            spooled(source, tmp_path / "none")
    assert os.listdir(tmp_path) == ["a.nii.gz"]


def test_a_damaged_source_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(path, np.random.default_rng(0).random(SHAPE))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 3
    path.write_bytes(content)
    descriptors = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    with refused("damaged"), open_source(path) as source:
        spooled(source, tmp_path)
    assert os.listdir(tmp_path) == ["a.npz"]
    assert not descriptors or len(os.listdir("/proc/self/fd")) == descriptors


_FULL_DISK = """
import resource, signal, sys
from partitioner.errors import ExecutionError
from runtime.volumes import open_source, spooled
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with open_source(sys.argv[1] + "/a.npy") as source:
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    try:
        spooled(source, sys.argv[1])
    except ExecutionError as error:
        print(error)
"""


def test_a_full_disk(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", values((64, 64, 3)))
    said = subprocess.run([sys.executable, "-c", _FULL_DISK, str(tmp_path)], capture_output=True, text=True,
                          check=True).stdout
    assert "cannot be written" in said and "set TMPDIR" in said and said.count("\n") == 1
    assert os.listdir(tmp_path) == ["a.npy"]


_MEMORY = """
import resource, sys
from pathlib import Path
from runtime.volumes import open_source, spooled
path, folder = sys.argv[1:]
def held():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with open_source(path) as source:
    before = held()
    with spooled(source, folder) as copy:
        for axis in (2, 3, 4):
            box = [(0, n) for n in copy.shape]
            box[axis] = (100, 102)
            assert (copy.read(box) == 1).all()
print(held() - before)
"""


def test_it_holds_a_slab_and_no_more(tmp_path: Path) -> None:
    """400 x 512 x 512 as float32 are 400 MiB; a slab of the source is 64 MiB."""
    path = tmp_path / "a.npz"
    np.savez_compressed(path, np.broadcast_to(np.uint8(1), (1, 1, 400, 512, 512)))
    command = [sys.executable, "-c", _MEMORY, str(path), str(tmp_path)]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert grown < 160 * 1024, f"{grown // 1024} MiB"
