"""Runs that were stopped go on with the same bits, from the same files, and leave nothing behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

import partitioner as pt
from benchmarks.models import UNetConfig
from partitioner.api import Plan
from partitioner.cli import main
from partitioner.compiler import DepthFirst, compile_plan
from partitioner.exporter import export_module
from partitioner.files import FileRun
from partitioner.geometry import Box
from partitioner.loader import load_file, load_model, save_model
from partitioner.mesh import Mesh
from runtime.memory import allocate_buffer, refill
from runtime.monitor import anonymous_memory
from runtime.program import BufferSpec
from runtime.resume import SavedRun
from tests.command import count_tensors_only, refused, works

SHAPE = (1, 1, 33, 22, 27)
REQUEST = {"options": {"tta": None}, "files": {"x.npy": [1, 2]}}


class Stopped(Exception):
    """The run was killed."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and a volume."""
    found = tmp_path_factory.mktemp("resume")
    module = UNetConfig(norm="instance", base=8, levels=2).build()
    model, _ = export_module(module, torch.zeros(SHAPE), False)
    save_model(model, found / "net.onnx")
    np.save(found / "x.npy", np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32))
    return found


@pytest.fixture(scope="module")
def plan(made: Path) -> Plan:
    """The model in slabs, as a budget has it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("partitioner.budget.anonymous_memory", lambda: 0)
        count_tensors_only(patch)
        with pytest.raises(pt.PartitionError, match="needs at least") as refusal:
            pt.partition(made / "net.onnx", shapes={"volume": SHAPE}, memory="1MiB")
        least = float(str(refusal.value).split("at least ")[1].split(" MiB")[0])
        found = pt.partition(made / "net.onnx", shapes={"volume": SHAPE}, memory=f"{least + 0.2}MiB")
    assert found.to_dict()["schedule"] is not None
    return found


@pytest.fixture(scope="module")
def expected(made: Path, plan: Plan) -> np.ndarray:
    """What a run gives that nobody stops."""
    return run(made, plan, None, name="expected.npy")


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch) -> Path:
    """A folder of one's own with model and volume; every step is saved."""
    monkeypatch.setenv("PARTITIONER_SAVE_SECONDS", "1e-9")
    monkeypatch.setattr("runtime.saves.flush", lambda _: None)  # no disk is waited for, step after step
    for name in ("net.onnx", "x.npy"):
        shutil.copy(made / name, tmp_path)
    return tmp_path


def run(place: Path, plan: Plan, saved: SavedRun | None, stop: int | None = None, name: str = "y.npy") -> np.ndarray:
    def progress(done: int, count: int, _: str) -> None:
        if stop is not None and done >= stop * count // 100:
            raise Stopped

    (output,) = (str(v.name) for v in plan.model.graph.outputs)
    FileRun(plan, {"volume": str(place / "x.npy")}, {output: str(place / name)}, "lockstep", "cpu", saved).run(progress)
    return np.load(place / name)


@pytest.mark.parametrize("percent", [10, 50, 70, 95])
def test_a_run_goes_on_where_it_was_stopped(place: Path, expected: np.ndarray, plan: Plan, percent: int) -> None:
    with pytest.raises(Stopped):
        run(place, plan, SavedRun(place / "y.npy.resume", REQUEST), percent)
    assert not (place / "y.npy").exists() and (place / "y.npy.resume" / "saved.json").exists()
    again = SavedRun(place / "y.npy.resume", REQUEST)
    assert again.goes_on
    assert np.array_equal(run(place, Plan(load_file(again.plan_file)), again), expected)
    assert sorted(p.name for p in place.iterdir()) == ["net.onnx", "x.npy", "y.npy"]


def test_strips_go_on_where_they_were_stopped(place: Path) -> None:
    order = DepthFirst("depth", (("height", 2), ("width", 3)))
    plan = Plan(compile_plan(load_model(place / "net.onnx"), Mesh(()), {"volume": SHAPE}, {}, order=order))
    expected = run(place, plan, None, name="expected.npy")
    for percent in (10, 40, 70, 95):
        with pytest.raises(Stopped):
            run(place, plan, SavedRun(place / "y.npy.resume", REQUEST), percent)
    again = SavedRun(place / "y.npy.resume", REQUEST)
    assert again.goes_on
    assert np.array_equal(run(place, Plan(load_file(again.plan_file)), again), expected)


def test_a_run_goes_on_more_than_once(place: Path, expected: np.ndarray, plan: Plan) -> None:
    for percent in (20, 40, 60):
        with pytest.raises(Stopped):
            run(place, plan, SavedRun(place / "y.npy.resume", REQUEST), percent)
    found = run(place, plan, SavedRun(place / "y.npy.resume", REQUEST))
    assert np.array_equal(found, expected)


def test_another_run_does_not_go_on(place: Path, plan: Plan) -> None:
    with pytest.raises(Stopped):
        run(place, plan, SavedRun(place / "y.npy.resume", REQUEST), 50)
    for other, says in ({"options": {"tta": "flips"}}, "--tta"), ({"files": {"x.npy": [1, 3]}}, "x.npy"):
        with pytest.raises(pt.PartitionError, match=rf"is of another run \(differs in {says}\); remove it, or"):
            SavedRun(place / "y.npy.resume", {**REQUEST, **other})


def test_a_damaged_state_is_refused(place: Path, plan: Plan) -> None:
    with pytest.raises(Stopped):
        run(place, plan, SavedRun(place / "y.npy.resume", REQUEST), 50)
    (state,) = (place / "y.npy.resume").glob("state-*-0.pt")
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(pt.PartitionError, match="is damaged; remove it"):
        run(place, plan, SavedRun(place / "y.npy.resume", REQUEST))
    (place / "y.npy.resume" / "saved.json").write_text("{")
    with pytest.raises(pt.PartitionError, match="is damaged; remove it"):
        SavedRun(place / "y.npy.resume", REQUEST)


def test_a_folder_of_something_else_is_left_alone(place: Path) -> None:
    (place / "y.npy.resume").mkdir()
    (place / "y.npy.resume" / "diary.txt").write_text("mine")
    with pytest.raises(pt.PartitionError, match="holds something else; move it away"):
        SavedRun(place / "y.npy.resume", REQUEST)


def test_two_do_not_work_on_one_run(place: Path, plan: Plan, monkeypatch) -> None:
    monkeypatch.setattr("runtime.claim.WAIT", 0.2)
    with pytest.raises(Stopped):
        run(place, plan, SavedRun(place / "y.npy.resume", REQUEST), 50)
    one = SavedRun(place / "y.npy.resume", REQUEST)
    with pytest.raises(pt.PartitionError, match="another process works on this run; wait for it, or end it"):
        SavedRun(place / "y.npy.resume", REQUEST)
    one.release()
    assert SavedRun(place / "y.npy.resume", REQUEST).goes_on


def test_states_that_do_not_count_are_not_gone_on_with(place: Path, expected: np.ndarray, plan: Plan) -> None:
    """Whoever is killed while it saves leaves the save before whole; what it began goes with the next one."""
    with pytest.raises(Stopped):
        run(place, plan, SavedRun(place / "y.npy.resume", REQUEST), 50)
    step = json.loads((place / "y.npy.resume" / "saved.json").read_text())["step"]
    for name in (f"state-{step + 1}-0.pt", f"state-{step + 2}-0.pt.part", "saved.json.part"):
        (place / "y.npy.resume" / name).write_text("half")
    again = SavedRun(place / "y.npy.resume", REQUEST)
    assert again.saving.step == step
    with pytest.raises(Stopped):
        run(place, plan, again, 60)
    assert len(list((place / "y.npy.resume").glob("state-*"))) == 1
    found = run(place, plan, SavedRun(place / "y.npy.resume", REQUEST))
    assert np.array_equal(found, expected)


def test_parts_of_a_run_that_was_killed_before_it_was_saved_go(place: Path, plan: Plan) -> None:
    with pytest.raises(Stopped):
        run(place, plan, SavedRun(place / "y.npy.resume", REQUEST), 50)
    (place / "y.npy.resume" / "saved.json").unlink()
    (orphan,) = place.glob("y.npy.*.part")
    with pytest.raises(Stopped):
        run(place, plan, SavedRun(place / "y.npy.resume", REQUEST), 50)
    assert not orphan.exists() and len(list(place.glob("y.npy.*.part"))) == 1


@pytest.mark.parametrize("percent", [20, 60, 90])
def test_cells_that_are_no_numbers_are_counted_once(place: Path, plan: Plan, percent: int) -> None:
    """Also where several chains read the input, some of them after the run has gone on."""
    x = np.load(place / "x.npy")
    x[0, 0, [0, 16, 32]] = np.nan
    np.save(place / "x.npy", x)
    with pytest.raises(Stopped):
        run(place, plan, SavedRun(place / "y.npy.resume", REQUEST), percent)
    (output,) = (str(v.name) for v in plan.model.graph.outputs)
    saved = SavedRun(place / "y.npy.resume", REQUEST)
    report = FileRun(plan, {"volume": str(place / "x.npy")}, {output: str(place / "y.npy")}, "lockstep", "cpu",
                     saved).run()
    assert report.not_finite == {"volume": 3 * 22 * 27}


def test_memory_that_was_given_back_stays_so() -> None:
    """A resting buffer that is filled again takes the pages that held something, bits of -0 too."""
    spec = BufferSpec("x", Box.whole((1, 4, 64, 64, 64)), ir.DataType.FLOAT, "resting", 2)
    cpu = torch.device("cpu")
    buffer = allocate_buffer(spec, cpu, "channels_first", False)
    buffer[:, :, 20:30] = 3.0
    buffer[:, :, 40:41] = -0.0
    saved, before = buffer.clone(), anonymous_memory()
    again = allocate_buffer(spec, cpu, "channels_first", False)
    refill(again, saved, 2)
    taken = anonymous_memory() - before  # the comparison takes memory of its own
    assert again.numpy().tobytes() == saved.numpy().tobytes()
    assert taken < spec.nbytes // 2


def test_a_lost_part_begins_anew(place: Path, expected: np.ndarray, plan: Plan) -> None:
    with pytest.raises(Stopped):
        run(place, plan, SavedRun(place / "y.npy.resume", REQUEST), 50)
    for part in place.glob("*.part"):
        part.unlink()
    saved = SavedRun(place / "y.npy.resume", REQUEST)
    assert not saved.goes_on
    assert np.array_equal(run(place, plan, saved), expected)


def test_what_fails_before_it_is_saved_leaves_nothing(place: Path, plan: Plan, monkeypatch) -> None:
    monkeypatch.setenv("PARTITIONER_SAVE_SECONDS", "3600")
    with pytest.raises(Stopped):
        run(place, plan, SavedRun(place / "y.npy.resume", REQUEST), 50)
    assert sorted(p.name for p in place.iterdir()) == ["net.onnx", "x.npy"]


def test_the_command(place: Path, capsys) -> None:
    words = ["run", str(place / "net.onnx"), "--input", str(place / "x.npy"), "--output", str(place / "y.npy"),
             "--memory", "8GiB", "--resume"]
    assert main(words) == 0
    assert sorted(p.name for p in place.iterdir()) == ["net.onnx", "x.npy", "y.npy"]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("seconds", ["0", "-3", "soon", "nan", "inf", "1e999", "2 min"])
def test_saving_at_no_positive_number_of_seconds_is_refused(place: Path, monkeypatch, seconds: str) -> None:
    monkeypatch.setenv("PARTITIONER_SAVE_SECONDS", seconds)
    words = ["run", place / "net.onnx", "--input", place / "x.npy", "--output", place / "y.npy"]
    (line,) = refused(*words, "--resume").splitlines()
    assert line == (f"partition: PARTITIONER_SAVE_SECONDS={seconds}: is no positive number of seconds; set one, as "
                    "120, or unset it")
    if seconds == "0":
        works(*words)  # where nothing is saved nobody asks


def test_a_full_disk_is_told_and_the_last_save_stays(
        place: Path, expected: np.ndarray, plan: Plan, monkeypatch) -> None:
    with pytest.raises(Stopped):
        run(place, plan, SavedRun(place / "y.npy.resume", REQUEST), 30)
    save = torch.save

    def full(state: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc] . unexpected pos 576 vs 534")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(pt.ExecutionError, match=r"the run cannot be saved .*free some space"):
        run(place, plan, SavedRun(place / "y.npy.resume", REQUEST))
    monkeypatch.setattr(torch, "save", save)
    assert not list((place / "y.npy.resume").glob("*.part*"))
    found = run(place, plan, SavedRun(place / "y.npy.resume", REQUEST))
    assert np.array_equal(found, expected)


def test_no_room_for_resting_tensors_is_told(monkeypatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    spec = BufferSpec("x", Box.whole((1, 1, 128, 128, 128)), ir.DataType.FLOAT, "file", 2)
    with pytest.raises(pt.ExecutionError, match=r"no room for 8388608 bytes of a resting tensor .*set TMPDIR"):
        allocate_buffer(spec, torch.device("cpu"), "channels_last", False)
