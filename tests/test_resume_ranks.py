"""Runs on many processes that were stopped or killed go on together, with the same bits."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import psutil
import pytest

import partitioner as pt
from runtime.saves import MEETINGS, Pace
from tests.command import Result, all_gone, family, finish, many_convolutions, start, volume, wait_for
from tests.test_resume import made, plan  # noqa: F401 (fixtures)
from tests.test_torchrun import launch, one_host, ours

SHAPE = (1, 2, 12, 9, 7)
STEPS = 120
EVERY = "1e-9"
"""Seconds between saves: every step is saved, which takes some milliseconds, so that there is time to kill."""


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of many steps, its volume, and what lock-step makes of it."""
    found = tmp_path_factory.mktemp("ranks")
    onnx.save(many_convolutions(SHAPE, STEPS), found / "m.onnx")
    np.save(found / "x.npy", volume(SHAPE))
    (expected,) = pt.partition(found / "m.onnx", mesh="depth=3").run({"x": volume(SHAPE)}).values()
    np.save(found / "expected.npy", expected)
    return found


@pytest.fixture
def folder(long_run: Path, tmp_path: Path) -> Path:
    """A folder of one's own for a run that can be spoilt."""
    for name in ("m.onnx", "x.npy"):
        shutil.copy(long_run / name, tmp_path)
    return tmp_path


RUN = ["run", "m.onnx", "--mesh", "depth=3", "--input", "x.npy", "--output", "y.npy", "--resume", "--json"]


def begin(folder: Path, starter: str, words: Sequence[str] = RUN, every: str = EVERY) -> subprocess.Popen[str]:
    if starter == "torchrun":
        return launch(folder, one_host(3), words, PARTITIONER_SAVE_SECONDS=every)
    return start(*words, "--backend", "gloo", cwd=folder, PARTITIONER_SAVE_SECONDS=every)


def saved_step(folder: Path) -> int:
    """The step of the last save that counts."""
    with contextlib.suppress(FileNotFoundError):
        return json.loads((folder / "y.npy.resume" / "saved.json").read_text())["step"]
    return 0


def is_rank(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return "runtime.worker" in process.cmdline() or "LOCAL_RANK" in process.environ()
    return False


def number_of(process: psutil.Process) -> int:
    if "LOCAL_RANK" in process.environ():
        return int(process.environ()["RANK"])
    return json.loads(process.cmdline()[-1])["rank"]


def stop(folder: Path, starter: str, whom: str, step: int, number: int = signal.SIGKILL,
         words: Sequence[str] = RUN) -> Result:
    """Begin a run, and kill some of its processes as soon as a step has been saved."""
    process = begin(folder, starter, words)
    try:
        wait_for(lambda: saved_step(folder) >= step or process.poll() is not None)
        assert process.poll() is None, process.communicate()
        everyone = family(process)
        ranks = {number_of(p): p for p in everyone if is_rank(p)}
        assert sorted(ranks) == [0, 1, 2]
        victims = {"all": everyone, "launcher": everyone[:1], "ranks": list(ranks.values())}.get(whom)
        for victim in victims or [ranks[int(whom)]]:
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.send_signal(number)
        found = finish(process, 60)
        if whom != "launcher":  # whose ranks have a moment to notice, in which the next command is started
            assert all_gone(everyone, 30)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert not (folder / "y.npy").exists()
    return found


def check_goes_on(folder: Path, expected: Path, starter: str) -> dict[str, Any]:
    """The same command goes on, with the bytes of a run that nobody disturbed, and leaves nothing."""
    found = finish(begin(folder, starter, every="3600"))
    assert found.code == 0, found.err
    (note,) = ours(found)
    assert note.startswith("partition: note: y.npy.resume: goes on from what was saved at 20")
    assert (folder / "y.npy").read_bytes() == (expected / "expected.npy").read_bytes()
    assert sorted(os.listdir(folder)) == ["m.onnx", "x.npy", "y.npy"]
    return json.loads(found.out)


slow = pytest.mark.slow


@pytest.mark.parametrize(("starter", "whom", "number"), [
    ("gloo", "all", signal.SIGKILL),
    pytest.param("gloo", "0", signal.SIGKILL, marks=slow),
    pytest.param("gloo", "2", signal.SIGKILL, marks=slow),
    pytest.param("gloo", "ranks", signal.SIGKILL, marks=slow),
    pytest.param("gloo", "launcher", signal.SIGKILL, marks=slow),
    pytest.param("gloo", "launcher", signal.SIGTERM, marks=slow),
    pytest.param("gloo", "launcher", signal.SIGINT, marks=slow),
    pytest.param("torchrun", "all", signal.SIGKILL, marks=slow),
    pytest.param("torchrun", "0", signal.SIGKILL, marks=slow),
    pytest.param("torchrun", "1", signal.SIGKILL, marks=slow),
    pytest.param("torchrun", "launcher", signal.SIGTERM, marks=slow),
])
def test_whoever_is_killed_the_run_goes_on(long_run: Path, folder: Path, starter: str, whom: str, number: int) -> None:
    stop(folder, starter, whom, 60, number)
    done = saved_step(folder)
    assert done >= 60
    figures = check_goes_on(folder, long_run, starter)
    sent, foretold = (sum(r["sent_bytes"] for r in figures["ranks"]), sum(figures["predicted_sent_bytes"]))
    assert 0 < sent < foretold * 0.9  # what was done is not done again


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again(long_run: Path, folder: Path) -> None:
    for step in (30, 90, 130):
        stop(folder, "gloo", "1", step)
    check_goes_on(folder, long_run, "gloo")


@pytest.mark.parametrize("starter", [pytest.param("gloo", marks=slow), "torchrun"])
def test_saving_sends_nothing_that_was_not_foretold(long_run: Path, folder: Path, starter: str) -> None:
    found = finish(begin(folder, starter, every="0.05"))
    assert found.code == 0 and ours(found) == [], found.err
    figures = json.loads(found.out)
    assert [r["sent_bytes"] for r in figures["ranks"]] == figures["predicted_sent_bytes"]
    assert (folder / "y.npy").read_bytes() == (long_run / "expected.npy").read_bytes()
    assert sorted(os.listdir(folder)) == ["m.onnx", "x.npy", "y.npy"]


@pytest.mark.slow
@pytest.mark.parametrize("starter", ["gloo", "torchrun"])
@pytest.mark.parametrize(("more", "says"), [
    (["--mesh", "height=3"], r"is of another run (differs in --mesh); remove it"),
    (["--strict"], r"is of another run (differs in --strict); remove it"),
    ("model", "is of another run (differs in m.onnx); remove it"),
    ("input", "is of another run (differs in x.npy); remove it"),
    ("state", "is damaged; remove it to begin anew"),
])
def test_another_run_does_not_go_on(folder: Path, starter: str, more: list[str] | str, says: str) -> None:
    stop(folder, starter, "all", 5)
    words = list(RUN)
    if more == "model":
        onnx.save(many_convolutions(SHAPE, STEPS - 1), folder / "m.onnx")
    elif more == "input":
        np.save(folder / "x.npy", volume(SHAPE, seed=1))
    elif more == "state":
        (state,) = (folder / "y.npy.resume").glob(f"state-{saved_step(folder)}-1.pt")
        state.write_bytes(state.read_bytes()[:100])
    else:
        words += more
    kept = sorted(os.listdir(folder))
    found = finish(begin(folder, starter, words))
    line = ours(found)[-1]
    assert says in line and found.code == (2 if starter == "gloo" else 1)
    assert sorted(os.listdir(folder)) == kept


@pytest.mark.slow
def test_other_ranks_do_not_go_on(folder: Path) -> None:
    stop(folder, "gloo", "all", 5)
    found = finish(start(*RUN, "--backend", "lockstep", cwd=folder))
    assert found.code == 2 and "is of another run (differs in --backend); remove it" in found.err


@pytest.mark.slow
def test_what_is_killed_before_it_was_saved_leaves_nothing(long_run: Path, folder: Path) -> None:
    process = begin(folder, "gloo", every="3600")
    wait_for(lambda: list(folder.glob("y.npy.*.part")) or process.poll() is not None)
    everyone = family(process)
    everyone[0].kill()
    finish(process)
    assert all_gone(everyone, 30)
    assert sorted(os.listdir(folder)) == ["m.onnx", "x.npy"]


@pytest.mark.slow
def test_every_rank_in_slabs(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Windows and resting tensors of every rank."""
    shape = np.load(made / "x.npy").shape
    monkeypatch.setattr("partitioner.budget.anonymous_memory", lambda: 0)
    with pytest.raises(pt.PartitionError, match="needs at least") as refusal:
        pt.partition(made / "net.onnx", mesh="height=3", shapes={"volume": shape}, memory="1MiB")
    least = float(str(refusal.value).split("at least ")[1].split(" MiB")[0])
    found = pt.partition(made / "net.onnx", mesh="height=3", shapes={"volume": shape}, memory=f"{least + 0.2}MiB")
    assert found.to_dict()["schedule"] is not None
    found.save(tmp_path / "p.onnx")
    np.save(tmp_path / "expected.npy", next(iter(found.run({"volume": np.load(made / "x.npy")}).values())))
    shutil.copy(made / "x.npy", tmp_path)
    words = ["run", "p.onnx", "--input", "x.npy", "--output", "y.npy", "--resume", "--json"]
    for step in (20, 200):
        stop(tmp_path, "gloo", "all", step, words=words)
    done = finish(begin(tmp_path, "gloo", words))
    assert done.code == 0, done.err
    assert (tmp_path / "y.npy").read_bytes() == (tmp_path / "expected.npy").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["expected.npy", "p.onnx", "x.npy", "y.npy"]


# --- when to meet ------------------------------------------------------------------------------------


def meetings(every: float, costs: Callable[[int], float], steps: int) -> tuple[list[int], list[float]]:
    """At which steps ranks meet, and when they save, where each step takes some seconds."""
    now = [0.0]
    pace = Pace(every, 0, lambda: now[0])
    meeting, met, saves = 1, [], []
    for step in range(1, steps):
        now[0] += costs(step - 1)
        if step == meeting:
            save, meeting = pace.meet(step)
            met.append(step)
            assert meeting > step
            if save:
                saves.append(now[0])
                now[0] += 1.0
                pace.saved()
    return met, saves


@pytest.mark.parametrize("seconds", [0.001, 0.1, 7.0, 300.0])
def test_ranks_meet_rarely_and_save_in_time(seconds: float) -> None:
    steps = int(2000 / seconds) + 20
    met, saves = meetings(120.0, lambda _: seconds, steps)
    gaps = np.diff([0.0, *saves])
    assert len(saves) > 10 and gaps.min() >= 120 and gaps.max() <= 121 + 120 / MEETINGS + 2 * seconds
    assert len(met) <= min(steps, 20 + 2 * (MEETINGS + 1) * len(saves))


def test_steps_that_become_slow_are_noticed() -> None:
    """A chain of small steps, then one whose steps take a hundred times as long."""
    _, saves = meetings(120.0, lambda step: 0.01 if step < 20000 else 1.0, 24000)
    assert np.diff(saves).max() < 120 * (1 + 200 / MEETINGS)
    assert np.median(np.diff(saves)[3:]) < 150


def test_saving_always_is_saving_before_every_step() -> None:
    met, saves = meetings(1e-9, lambda _: 0.01, 50)
    assert met == list(range(1, 50)) and len(saves) == 49


def test_a_clock_that_stands_still() -> None:
    pace = Pace(1.0, 10, lambda: time.monotonic() * 0)
    assert pace.meet(11) == (False, 13) and pace.meet(13) == (False, 17)
