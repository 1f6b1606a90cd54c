"""Disks that fill up for real while slabs are computed: one line, nothing half-written, what was saved stays."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Generator
from pathlib import Path

import numpy as np
import pytest
import torch

import partitioner as pt
from benchmarks.models import UNetConfig
from partitioner import dialect
from partitioner.exporter import export_module
from partitioner.loader import save_model
from tests.command import check_message, finish, refused, run_here, start, wait_for, works

SHAPE = (1, 1, 33, 22, 27)
Fill = Callable[[int], None]


def mount(folder: Path, megabytes: int) -> None:
    """A file system of its own on a folder, or the test is skipped."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        pytest.skip(f"no mount here: {error}")
    if done.returncode:
        pytest.skip(f"no file system may be mounted here: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path: Path) -> Generator[Path]:
    """A small disk."""
    mount(tmp_path / "disk", 16)
    try:
        yield tmp_path / "disk"
    finally:
        subprocess.run(["umount", "-l", str(tmp_path / "disk")], check=True)


def fill(disk: Path, spare: int = 0) -> None:
    """Take all the room that is left, but for some bytes."""
    with contextlib.suppress(OSError), (disk / "filler").open("ab", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    os.truncate(disk / "filler", (disk / "filler").stat().st_size - spare)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan in slabs that lets tensors rest in files, a volume, and its result."""
    found = tmp_path_factory.mktemp("full")
    module = UNetConfig(norm="instance", base=16, levels=2).build()
    model, _ = export_module(module, torch.zeros(SHAPE), False)
    save_model(model, found / "net.onnx")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("partitioner.budget.anonymous_memory", lambda: 0)
        with pytest.raises(pt.PartitionError, match="needs at least") as refusal:
            pt.partition(found / "net.onnx", shapes={"volume": SHAPE}, memory="1MiB", host_memory="64KiB")
        least = float(str(refusal.value).split("at least ")[1].split(" MiB")[0])
        plan = pt.partition(found / "net.onnx", shapes={"volume": SHAPE}, memory=f"{least + 0.2}MiB",
                            host_memory="64KiB")
    assert any(dialect.rests_in_file(v) for node in plan.model.graph for v in node.outputs)
    plan.save(found / "p.onnx")
    np.save(found / "x.npy", np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32))
    works("run", found / "p.onnx", "--input", found / "x.npy", "--output", found / "y.npy")
    works("run", found / "p.onnx", "--input", found / "x.npy", "--output", found / "y.nii.gz")
    return found


class Hooked:
    """In place of the progress bar: something happens at a share of the run."""

    percent = 0
    happens: Callable[[], None] = staticmethod(lambda: None)

    def __init__(self, *_: object) -> None:
        self._done = False

    def __enter__(self) -> Callable[[int, int, str], None]:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def __call__(self, done: int, count: int, _: str) -> None:
        if not self._done and done * 100 >= count * type(self).percent:
            self._done = True
            type(self).happens()


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch, disk: Path) -> Callable[[int], None]:
    """Fills the disk at a percentage of the run."""
    class Bar(Hooked):
        happens = staticmethod(lambda: fill(disk))

    def set_percent(percent: int) -> None:
        Bar.percent = percent
        monkeypatch.setattr("partitioner.running.ProgressBar", Bar)

    return set_percent


def words(made: Path, output: Path, *more: str) -> list[str | Path]:
    return ["run", made / "p.onnx", "--input", made / "x.npy", "--output", output, *more]


@pytest.mark.parametrize(("name", "percent"), [("y.zarr", 60), ("y.nii.gz", 100)])
def test_an_output(made: Path, disk: Path, at: Fill, name: str, percent: int) -> None:
    """While its chunks are written, or when it is packed at the end."""
    at(percent)
    (line,) = refused(*words(made, disk / name), code=1).splitlines()
    assert f"{name}: writing failed (No space left on device); free some space or choose another folder" in line
    assert os.listdir(disk) == ["filler"]


def test_an_output_has_its_room_from_the_start(made: Path, disk: Path, at: Fill) -> None:
    """A disk that fills up later takes nothing away from it."""
    at(10)
    works(*words(made, disk / "y.npy"))
    assert (disk / "y.npy").read_bytes() == (made / "y.npy").read_bytes()
    (disk / "y.npy").unlink()
    fill(disk)
    (line,) = refused(*words(made, disk / "y.npy")).splitlines()  # no room at all is seen before anything is computed
    assert "y.npy: needs " in line and "are free; free some space or choose another folder" in line
    assert os.listdir(disk) == ["filler"]


def test_resting_tensors(made: Path, disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(disk))
    monkeypatch.setattr(tempfile, "tempdir", None)
    fill(disk, 1 << 16)
    out = tmp_path / "out"
    out.mkdir()
    (line,) = refused(*words(made, out / "y.npy"), code=1).splitlines()
    assert f"partition: {disk}: no room for " in line
    assert "of a resting tensor (No space left on device); set TMPDIR to a folder with room" in line
    assert os.listdir(disk) == ["filler"] and os.listdir(out) == []


def test_saves(made: Path, disk: Path, at: Fill, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last save stays whole; with some room again the run goes on from it."""
    monkeypatch.setenv("PARTITIONER_SAVE_SECONDS", "1e-9")
    at(70)
    (line,) = refused(*words(made, disk / "y.npy", "--resume"), code=1).splitlines()
    assert line.endswith("y.npy.resume: the run cannot be saved (No space left on device); free some space, or run "
                         "without --resume")
    step = json.loads((disk / "y.npy.resume" / "saved.json").read_text())["step"]
    assert sorted(os.listdir(disk / "y.npy.resume")) == [
        "lock", "parts.json", "plan.onnx", "request.json", "saved.json", f"state-{step}-0.pt"]
    (disk / "filler").unlink()
    monkeypatch.setattr("partitioner.running.ProgressBar", Hooked)
    found = run_here(*words(made, disk / "y.npy", "--resume"))
    assert found.code == 0 and "y.npy.resume: goes on from what was saved" in found.err
    assert (disk / "y.npy").read_bytes() == (made / "y.npy").read_bytes()
    assert os.listdir(disk) == ["y.npy"]


def test_an_output_of_a_run_that_is_saved(made: Path, disk: Path, at: Fill, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be packed stays, and is packed by the command that goes on."""
    monkeypatch.setenv("PARTITIONER_SAVE_SECONDS", "0.01")
    at(100)
    (line,) = refused(*words(made, disk / "y.nii.gz", "--resume"), code=1).splitlines()
    assert "y.nii.gz: writing failed (No space left on device)" in line
    assert not (disk / "y.nii.gz").exists() and not list(disk.glob("*.packed"))
    (disk / "filler").unlink()
    monkeypatch.setattr("partitioner.running.ProgressBar", Hooked)
    found = run_here(*words(made, disk / "y.nii.gz", "--resume"))
    assert found.code == 0 and "goes on from what was saved" in found.err
    assert (disk / "y.nii.gz").read_bytes() == (made / "y.nii.gz").read_bytes()
    assert os.listdir(disk) == ["y.nii.gz"]


@pytest.mark.slow
def test_a_first_save(made: Path, disk: Path, at: Fill, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run that was never saved nothing stays."""
    monkeypatch.setenv("PARTITIONER_SAVE_SECONDS", "1e-9")
    at(0)
    refused(*words(made, disk / "y.npy", "--resume"), code=1)
    assert os.listdir(disk) == ["filler"]


@pytest.mark.slow
def test_saves_of_ranks(made: Path, disk: Path, tmp_path: Path) -> None:
    """All of them stop, one line is said, and they go on together."""
    for name in ("net.onnx", "x.npy"):
        shutil.copy(made / name, tmp_path)
    command = ["run", "net.onnx", "--mesh", "depth=2", "--input", "x.npy", "--output", "disk/y.npy", "--resume"]
    works("run", tmp_path / "net.onnx", "--mesh", "depth=2", "--input", tmp_path / "x.npy", "--output",
          tmp_path / "expected.npy")
    process = start(*command, "--backend", "gloo", cwd=tmp_path, PARTITIONER_SAVE_SECONDS="1e-9")
    wait_for(lambda: (disk / "y.npy.resume" / "saved.json").exists() or process.poll() is not None)
    fill(disk)
    found = finish(process)
    assert found.code == 1, found
    check_message(found.err)
    assert len(found.err.splitlines()) == 1 and "the run cannot be saved (No space left on device)" in found.err
    (disk / "filler").unlink()
    again = finish(start(*command, "--backend", "gloo", cwd=tmp_path))
    assert again.code == 0 and "goes on from what was saved" in again.err
    assert (disk / "y.npy").read_bytes() == (tmp_path / "expected.npy").read_bytes()
    assert os.listdir(disk) == ["y.npy"]
