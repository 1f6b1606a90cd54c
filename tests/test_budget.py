"""Memory budgets: parsed, kept by the forecast, refused with the smallest one; files and ranks give the same result."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import partitioner as pt
from benchmarks.models import UNetConfig
from partitioner import dialect
from partitioner.budget import Budget, Searched, held_now, parse_bytes
from partitioner.compiler import DepthFirst, compile_plan
from partitioner.errors import BudgetError
from partitioner.exporter import export_module
from partitioner.loader import load_model, save_model
from partitioner.mesh import Mesh
from partitioner.planning import Request, compile_request
from partitioner.profile import Profile
from partitioner.schedules import Candidate, _Room
from runtime.forecast import forecast
from runtime.monitor import anonymous_memory
from runtime.program import Forget, Move, localise, windows_written

SHAPE = (1, 1, 81, 54, 61)
MIB = 2**20


@pytest.fixture(scope="module")
def volume() -> np.ndarray:
    return np.random.default_rng(3).standard_normal(SHAPE).astype(np.float32)


@pytest.fixture(scope="module", params=["batch", "instance"])
def network(request, tmp_path_factory) -> Path:
    """A U-Net of three levels as a file."""
    module = UNetConfig(norm=request.param, down="maxpool", base=8, levels=3).build()
    model, _ = export_module(module, torch.zeros(SHAPE), False)
    path = tmp_path_factory.mktemp("budget") / f"{request.param}.onnx"
    save_model(model, path)
    return path


@pytest.fixture(autouse=True)
def quiet(monkeypatch) -> None:
    """What this process holds beside does not change within a test."""
    monkeypatch.setattr("partitioner.budget.anonymous_memory", lambda: 100 * MIB)
    monkeypatch.setattr("partitioner.budget.Searched.nbytes", 0)


def smallest(network: Path, **options) -> int:
    """The smallest budget, as the refusal tells it."""
    with pytest.raises(pt.PartitionError, match=r"needs at least ([\d.]+) MiB") as refusal:
        pt.partition(network, shapes={"volume": SHAPE}, memory="1MiB", **options)
    return int(float(str(refusal.value).split("at least ")[1].split(" MiB")[0]) * MIB)


@pytest.mark.parametrize(("text", "count"), [("2GiB", 2**31), ("500 MB", 500 * 10**6), (4096, 4096), ("1.5k", 1536)])
def test_amounts_of_memory(text: str | int, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "2XB", "-1GiB", "much", True, 1.5, None])
def test_no_amounts_of_memory(text) -> None:
    with pytest.raises(pt.PartitionError, match="is no amount of memory; write 2GiB"):
        parse_bytes(text)


def test_nothing_is_no_budget() -> None:
    with pytest.raises(pt.PartitionError, match="leaves nothing to work with"):
        parse_bytes("0GiB")
    with pytest.raises(pt.PartitionError, match="host_memory is a part of memory"):
        pt.partition(torch.nn.Conv2d(1, 1, 3), torch.zeros(1, 1, 9, 9), host_memory="1GiB")


def test_any_budget_gives_the_same_result(network: Path, volume: np.ndarray) -> None:
    whole = pt.partition(network, shapes={"volume": SHAPE})
    expected = next(iter(whole.run({"volume": volume}).values()))
    scale = np.abs(expected).max()
    least = smallest(network)
    seen = set()
    for extra in (1, 2, 4, 9):
        plan = pt.partition(network, shapes={"volume": SHAPE}, memory=least + extra * MIB)
        schedule = dialect.get_schedule(plan.model)
        assert schedule is not None
        seen.add((str(schedule), sum(dialect.rests_in_file(v) for n in plan.model.graph for v in n.outputs)))
        found = next(iter(plan.run({"volume": volume}).values()))
        assert np.abs(found - expected).max() <= 4e-6 * scale
        assert int(plan.cost.peak.max()) < int(whole.cost.peak.max())
        assert f"depth-first along {schedule.axis}" in plan.report()
        assert plan.to_dict()["schedule"]["axis"] == schedule.axis
        assert schedule.axis == "depth" or extra == 1  # the least may need slabs that are not dense
    assert len(seen) > 1


def test_a_large_budget_changes_nothing(network: Path) -> None:
    assert pt.partition(network, shapes={"volume": SHAPE}, memory="64GiB").to_dict()["schedule"] is None


def test_a_schedule_outlives_the_file(network: Path, volume: np.ndarray, tmp_path: Path) -> None:
    plan = pt.partition(network, shapes={"volume": SHAPE}, memory=smallest(network) + 4 * MIB)
    plan.save(tmp_path / "plan.onnx")
    again = pt.load(tmp_path / "plan.onnx")
    assert again.to_text() == plan.to_text() and "schedule: along depth" in again.to_text()
    for mine, theirs in zip(again.run({"volume": volume}).values(), plan.run({"volume": volume}).values(), strict=True):
        assert np.array_equal(mine, theirs)
    damaged = onnx.load(tmp_path / "plan.onnx")
    next(p for p in damaged.metadata_props if p.key == "partitioner.schedule").value = "depth/3"
    onnx.save(damaged, tmp_path / "damaged.onnx")
    with pytest.raises(pt.PartitionError, match="the plan is damaged"):
        pt.load(tmp_path / "damaged.onnx")


def test_resting_tensors_beyond_the_host_memory_lie_in_files(tmp_path: Path) -> None:
    module = UNetConfig(norm="instance", base=8, levels=2).build()
    taken = Budget(1, arrays=True).taken
    plan = pt.partition(module, torch.zeros(SHAPE))
    room = taken(plan.model) + int(plan.cost.peak.max()) // 2
    free = pt.partition(module, torch.zeros(SHAPE), memory=room)
    tight = pt.partition(module, torch.zeros(SHAPE), memory=room, host_memory="64KiB")
    rests = [forecast([localise(p.model, 0)]) for p in (free, tight)]
    assert rests[0].filed < rests[1].filed and rests[1].resting <= 64 * 1024


def test_steps_that_move_and_forget_are_there(network: Path) -> None:
    plan = compile_plan(load_model(network), Mesh(()), {"volume": SHAPE}, {}, order=DepthFirst("depth"))
    schedule = dialect.get_schedule(plan)
    assert schedule is not None
    dialect.set_schedule(plan, replace(schedule, thickness=(4,) * len(schedule.thickness)))
    actions = {type(step.action) for step in localise(plan, 0).steps}
    assert Move in actions and (Forget in actions) == ("instance" in network.name)


def test_pages_of_resting_tensors_are_counted_once(network: Path) -> None:
    """As many as there are cells that were written, by whatever, and that are not given back yet."""
    plan = compile_plan(load_model(network), Mesh(()), {"volume": SHAPE}, {}, order=DepthFirst("depth"))
    schedule = dialect.get_schedule(plan)
    assert schedule is not None
    dialect.set_schedule(plan, replace(schedule, thickness=(4,) * len(schedule.thickness)))
    program = localise(plan, 0)
    there: dict[str, np.ndarray] = {}
    most = 0
    for step in program.steps:
        for window in windows_written(step.action):
            spec = program.buffers[window.buffer]
            if spec.place == "resting":
                cells = there.setdefault(window.buffer, np.zeros(spec.box.shape, bool))
                cells[np.ix_(*(np.concatenate([np.r_[s] for s in slices]) for slices in window.slices))] = True
                if not spec.gives_back(program.storage):
                    cells[...] = True
        if isinstance(step.action, Forget) and step.action.buffer in there:
            assert program.buffers[step.action.buffer].axis == 2
            there[step.action.buffer][:, :, : step.action.cells.stop] = False
        most = max(most, 4 * sum(int(cells.sum()) for cells in there.values()))
        for name in step.releases:
            there.pop(name, None)
    assert forecast([program]).resting == pytest.approx(most, rel=0.01)


def test_what_a_search_leaves_is_counted_once(network: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the process was looked at before the first search, as for a folder of cases, or is before each."""
    def needed(held: int | None) -> int:
        with pytest.raises(BudgetError) as refusal:
            compile_request(load_model(network), Request("single", {"volume": SHAPE}, budget=Budget(MIB, held=held)))
        assert refusal.value.needed is not None
        return refusal.value.needed

    monkeypatch.setattr("partitioner.budget.anonymous_memory", lambda: 100 * MIB + Searched.nbytes)
    found = [needed(held) for held in (held_now(), held_now(), None, None)]
    assert Searched.nbytes > 0 and len(set(found)) == 1


def test_files_are_written_while_others_compute(network: Path) -> None:
    """They cost a part of the disk's time, all of it where it is longer; the way back where nothing keeps a copy."""
    plan = compile_plan(load_model(network), Mesh(()), {"volume": SHAPE}, {}, order=DepthFirst("depth"))
    profile = Profile.find("default")
    memory = replace(forecast([localise(plan, 0)]), filed=2**30)

    def seconds(budget: int = 2**30, filed: int = 2**30, **speeds: float) -> float:
        room = _Room(Budget(budget, profile=replace(profile, **speeds)), 0, 1)
        files = Candidate(plan, None, dialect.get_schedule(plan), (), replace(memory, filed=filed), 0)
        return room.seconds(files)

    assert seconds(write=1e15) == pytest.approx(seconds(filed=0), rel=1e-3)
    assert seconds(write=2**30) > seconds(filed=0)
    assert seconds(write=2**30 / 100) == pytest.approx(100)
    assert seconds(write=2**30 / 100, read=2**30 / 50, budget=1 << 60) == pytest.approx(150)


RUN = "import sys; from partitioner.cli import main; sys.exit(main(sys.argv[1:]))"


def run(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", RUN, *map(str, words)], capture_output=True, text=True, timeout=240,
                          check=False)


def test_the_command_keeps_to_its_budget(network: Path, volume: np.ndarray, tmp_path: Path) -> None:
    """From a compressed file, which can only be read at once, on one rank and on two, to a chunked array."""
    nibabel = pytest.importorskip("nibabel")
    nibabel.save(nibabel.Nifti1Image(volume[0, 0], np.diag([1.0, 2.0, 3.0, 1.0])), tmp_path / "ct.nii.gz")
    expected = next(iter(pt.partition(network, shapes={"volume": SHAPE}).run({"volume": volume}).values()))
    words = ("run", network, "--input", tmp_path / "ct.nii.gz", "--output")
    refused = run(*words, tmp_path / "no.npy", "--memory", "1MiB")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and not (tmp_path / "no.npy").exists()
    least = refused.stderr.split("at least ")[1].split(" MiB")[0]
    budget = f"{float(least) + 3:.2f}MiB"
    for name, more in (("one.npy", ()), ("two.npy", ("--mesh", "height=2", "--backend", "gloo"))):
        done = run(*words, tmp_path / name, "--memory", budget, *more)
        assert done.returncode == 0, done.stderr
        assert np.abs(np.load(tmp_path / name) - expected).max() <= 4e-6 * np.abs(expected).max()


def test_ranks_of_a_group_choose_one_schedule(network: Path, volume: np.ndarray, tmp_path: Path) -> None:
    """Under torchrun every process plans for itself, and they hold different amounts."""
    np.save(tmp_path / "x.npy", volume)
    expected = next(iter(pt.partition(network, shapes={"volume": SHAPE}).run({"volume": volume}).values()))
    start = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "partitioner.cli", "run", str(network),
             "--input", str(tmp_path / "x.npy"), "--output", str(tmp_path / "y.npy"), "--mesh", "height=2")
    refused = subprocess.run([sys.executable, *start, "--memory", "1MiB"], capture_output=True, text=True, timeout=240,
                             check=False)
    least = refused.stderr.split("at least ")[1].split(" MiB")[0]
    done = subprocess.run([sys.executable, *start, "--memory", f"{float(least) + 8:.2f}MiB"], capture_output=True,
                          text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert np.abs(np.load(tmp_path / "y.npy") - expected).max() <= 4e-6 * np.abs(expected).max()


def test_a_plan_from_a_file_takes_no_budget(network: Path, tmp_path: Path) -> None:
    pt.partition(network, shapes={"volume": SHAPE}).save(tmp_path / "plan.onnx")
    refused = run("plan", tmp_path / "plan.onnx", "--memory", "2GiB")
    assert refused.returncode == 2 and "is a plan with its schedule; give --memory when" in refused.stderr


def test_anonymous_memory_is_told() -> None:
    assert anonymous_memory() > 10 * MIB
