"""Runs that were stopped go on with the same bits, from the same files, and leave nothing behind."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

import partitioner as pt
from benchmarks.models import UNetConfig
from partitioner.api import Plan
from partitioner.cli import main
from partitioner.exporter import export_module
from partitioner.files import FileRun
from partitioner.geometry import Box
from partitioner.loader import load_file, save_model
from runtime.memory import allocate_buffer
from runtime.program import BufferSpec
from runtime.resume import SavedRun

SHAPE = (1, 1, 33, 22, 27)
REQUEST = {"options": "these"}


class Stopped(Exception):
    """The run was killed."""


@pytest.fixture
def place(tmp_path: Path, monkeypatch) -> Path:
    """A folder with a model, a budget for it and a volume; every step is saved."""
    monkeypatch.setattr("partitioner.budget.anonymous_memory", lambda: 0)
    monkeypatch.setenv("PARTITIONER_SAVE_SECONDS", "0")
    module = UNetConfig(norm="instance", base=8, levels=2).build()
    model, _ = export_module(module, torch.zeros(SHAPE), False)
    save_model(model, tmp_path / "net.onnx")
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32))
    return tmp_path


def scheduled(place: Path) -> Plan:
    with pytest.raises(pt.PartitionError, match="needs at least") as refusal:
        pt.partition(place / "net.onnx", shapes={"volume": SHAPE}, memory="1MiB")
    least = float(str(refusal.value).split("at least ")[1].split(" MiB")[0])
    plan = pt.partition(place / "net.onnx", shapes={"volume": SHAPE}, memory=f"{least + 0.2}MiB")
    assert plan.to_dict()["schedule"] is not None
    return plan


def run(place: Path, plan: Plan, saved: SavedRun | None, stop: int | None = None, name: str = "y.npy") -> np.ndarray:
    def progress(done: int, count: int, _: str) -> None:
        if stop is not None and done >= stop * count // 100:
            raise Stopped

    (output,) = (str(v.name) for v in plan.model.graph.outputs)
    FileRun(plan, {"volume": str(place / "x.npy")}, {output: str(place / name)}, "lockstep", "cpu", saved).run(progress)
    return np.load(place / name)


@pytest.mark.parametrize("percent", [10, 50, 70, 95])
def test_a_run_goes_on_where_it_was_stopped(place: Path, percent: int) -> None:
    plan = scheduled(place)
    expected = run(place, plan, None, name="expected.npy")
    with pytest.raises(Stopped):
        run(place, plan, SavedRun(place / "y.npy.resume", REQUEST), percent)
    assert not (place / "y.npy").exists() and (place / "y.npy.resume" / "state.pt").exists()
    again = SavedRun(place / "y.npy.resume", REQUEST)
    assert again.goes_on
    assert np.array_equal(run(place, Plan(load_file(again.plan_file)), again), expected)
    assert sorted(p.name for p in place.iterdir()) == ["expected.npy", "net.onnx", "x.npy", "y.npy"]


def test_a_run_goes_on_more_than_once(place: Path) -> None:
    plan = scheduled(place)
    for percent in (20, 40, 60):
        with pytest.raises(Stopped):
            run(place, plan, SavedRun(place / "y.npy.resume", REQUEST), percent)
    found = run(place, plan, SavedRun(place / "y.npy.resume", REQUEST))
    assert np.array_equal(found, run(place, plan, None, name="expected.npy"))


def test_another_run_does_not_go_on(place: Path) -> None:
    with pytest.raises(Stopped):
        run(place, scheduled(place), SavedRun(place / "y.npy.resume", REQUEST), 50)
    with pytest.raises(pt.PartitionError, match="is of another run"):
        SavedRun(place / "y.npy.resume", {"options": "those"})


def test_a_damaged_state_is_refused(place: Path) -> None:
    with pytest.raises(Stopped):
        run(place, scheduled(place), SavedRun(place / "y.npy.resume", REQUEST), 50)
    state = place / "y.npy.resume" / "state.pt"
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(pt.PartitionError, match="is damaged; remove it"):
        SavedRun(place / "y.npy.resume", REQUEST)


def test_a_lost_part_begins_anew(place: Path) -> None:
    plan = scheduled(place)
    with pytest.raises(Stopped):
        run(place, plan, SavedRun(place / "y.npy.resume", REQUEST), 50)
    for part in place.glob("*.part"):
        part.unlink()
    saved = SavedRun(place / "y.npy.resume", REQUEST)
    assert not saved.goes_on
    assert np.array_equal(run(place, plan, saved), run(place, plan, None, name="expected.npy"))


def test_what_fails_before_it_is_saved_leaves_nothing(place: Path, monkeypatch) -> None:
    monkeypatch.setenv("PARTITIONER_SAVE_SECONDS", "3600")
    with pytest.raises(Stopped):
        run(place, scheduled(place), SavedRun(place / "y.npy.resume", REQUEST), 50)
    assert sorted(p.name for p in place.iterdir()) == ["net.onnx", "x.npy"]


def test_the_command(place: Path, capsys) -> None:
    words = ["run", str(place / "net.onnx"), "--input", str(place / "x.npy"), "--output", str(place / "y.npy"),
             "--memory", "8GiB", "--resume"]
    assert main(words) == 0
    assert sorted(p.name for p in place.iterdir()) == ["net.onnx", "x.npy", "y.npy"]
    assert main([*words, "--overwrite", "--mesh", "depth=2", "--backend", "gloo"]) == 2
    assert "--resume: a run with backend gloo cannot be saved" in capsys.readouterr().err


def test_a_full_disk_is_told_and_the_last_save_stays(place: Path, monkeypatch) -> None:
    plan = scheduled(place)
    with pytest.raises(Stopped):
        run(place, plan, SavedRun(place / "y.npy.resume", REQUEST), 30)
    save = torch.save

    def full(state: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc] . PytorchStreamWriter failed writing file")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(pt.ExecutionError, match=r"the run cannot be saved .*free some space"):
        run(place, plan, SavedRun(place / "y.npy.resume", REQUEST))
    monkeypatch.setattr(torch, "save", save)
    assert not (place / "y.npy.resume" / "state.pt.part").exists()
    found = run(place, plan, SavedRun(place / "y.npy.resume", REQUEST))
    assert np.array_equal(found, run(place, plan, None, name="expected.npy"))


def test_no_room_for_resting_tensors_is_told(monkeypatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    spec = BufferSpec("x", Box.whole((1, 1, 128, 128, 128)), ir.DataType.FLOAT, "file", 2)
    with pytest.raises(pt.ExecutionError, match=r"no room for 8388608 bytes of a resting tensor .*set TMPDIR"):
        allocate_buffer(spec, torch.device("cpu"), "channels_last", False)
