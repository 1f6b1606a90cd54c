"""Processes that die, raise, are interrupted or left alone: one line, no hang, nothing left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import onnx
import psutil
import pytest

import partitioner as pt
from runtime.session import PoolRunner
from tests.command import (
    Array,
    Result,
    all_gone,
    check_message,
    convolution,
    family,
    finish,
    many_convolutions,
    start,
    volume,
    wait_for,
)


@pytest.fixture(scope="module")
def plan() -> pt.Plan:
    return pt.partition(convolution((1, 2, 7, 11, 5)), mesh="depth=2")


def alone(plan: pt.Plan, x: Array) -> Array:
    return plan.run({"x": x})["y"]


def workers(session: pt.Session) -> list[psutil.Process]:
    assert isinstance(session._runner, PoolRunner)
    return [psutil.Process(p.pid) for p in session._runner.pool._processes]


@pytest.fixture
def scratch(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for all temporary files, which a session must leave empty."""
    found = tmp_path_factory.mktemp("scratch")
    monkeypatch.setenv("TMPDIR", str(found))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr("runtime.session._roomy_folder", lambda model: str(found))
    return found


def is_empty(folder: Path) -> bool:
    return not any(folder.iterdir())


# --- deaths ------------------------------------------------------------------------------------------


def check_dead(session: pt.Session, processes: list[psutil.Process]) -> None:
    """All processes have ended, and the session says so at once."""
    assert all_gone(processes, 1)
    begin = time.monotonic()
    for _ in range(2):
        with pytest.raises(pt.ExecutionError, match=r"the ranks of this session have ended; open another"):
            session.run({"x": volume(session.plan.input_shapes["x"])})
    assert time.monotonic() - begin < 5
    session.close()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies_between_runs(plan: pt.Plan, victim: int, scratch: Path) -> None:
    session = plan.session("gloo")
    processes = workers(session)
    session.run({"x": volume()})
    processes[victim].kill()
    begin = time.monotonic()
    with pytest.raises(pt.ExecutionError, match=rf"\Arank {victim} was killed by SIGKILL[^\n]*\Z"):
        session.run({"x": volume()})
    assert time.monotonic() - begin < 30
    check_dead(session, processes)
    assert is_empty(scratch)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGABRT])
def test_a_rank_that_dies_in_the_middle(number: int, scratch: Path) -> None:
    shape = (1, 2, 160, 161, 40)
    plan = pt.partition(many_convolutions(shape), mesh="depth=3")
    session = plan.session("gloo")
    processes = workers(session)
    begin: list[float] = []

    def hit(done: int, count: int, name: str) -> None:
        if done > 2 and not begin:
            begin.append(time.monotonic())
            processes[1].send_signal(number)

    name = signal.Signals(number).name
    with pytest.raises(pt.ExecutionError, match=rf"\Arank 1 was killed by {name}[^\n]*no output was written\Z"):
        session.run({"x": volume(shape)}, progress=hit)
    assert begin and time.monotonic() - begin[0] < 30
    check_dead(session, processes)
    assert is_empty(scratch)


@pytest.mark.slow
def test_a_rank_that_raises(plan: pt.Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault in one rank is told in one line, not the failures that it causes in the others."""
    (tmp_path / "sitecustomize.py").write_text(
        "import json, sys\n"
        "if 'runtime.worker' in sys.orig_argv and json.loads(sys.orig_argv[-1])['rank'] == 1:\n"
        "    import torch\n"
        "    def fail(*_, **__):\n"
        "        raise ZeroDivisionError('by nothing\\nat all')\n"
        "    torch.nn.functional.conv3d = torch.conv3d = torch.convolution = fail\n"
        "    import partitioner.ops.kernels.convolve as c\n"
        "    import runtime.executor as e\n"
        "    e.compute = fail\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    session = plan.session("gloo")
    processes = workers(session)
    with pytest.raises(pt.ExecutionError, match=r"\Arank 1: ZeroDivisionError: by nothing\Z"):
        session.run({"x": volume()})
    check_dead(session, processes)


@pytest.mark.slow
def test_an_interrupted_session_ends_its_processes(plan: pt.Plan, scratch: Path) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    session = plan.session("gloo")
    processes = workers(session)
    with pytest.raises(KeyboardInterrupt):
        session.run({"x": volume()}, progress=interrupt)
    check_dead(session, processes)
    assert is_empty(scratch)


@pytest.mark.slow
def test_folders_named_like_ours_do_not_matter(plan: pt.Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks are started where the user stands, and take nothing from there."""
    for name in ("runtime", "partitioner", "passes", "torch"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('the wrong one')")
    monkeypatch.chdir(tmp_path)
    with plan.session("gloo") as session:
        assert np.array_equal(session.run({"x": volume()})["y"], alone(plan, volume()))


@pytest.mark.slow
def test_a_session_in_a_thread(plan: pt.Plan) -> None:
    found: list[Array] = []

    def work() -> None:
        with plan.session("gloo") as session:
            found.append(session.run({"x": volume()})["y"])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(120)
    assert np.array_equal(found[0], alone(plan, volume()))


# --- the command: signals and deaths in the middle of a run ------------------------------------------


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and a volume that take some seconds, and an older output."""
    folder = tmp_path_factory.mktemp("long")
    shape = (1, 2, 160, 161, 40)
    onnx.save(many_convolutions(shape), folder / "m.onnx")
    np.save(folder / "x.npy", volume(shape))
    return folder


def disturb(folder: Path, number: int, whom: str, scratch: Path) -> tuple[Result, float]:
    """Signal a running command, or one of its ranks, as soon as it has something half done."""
    (folder / "y.npy").write_bytes(b"old")
    process = start("run", "m.onnx", "--mesh", "depth=3", "--backend", "gloo", "--input", "x.npy", "--output", "y.npy",
                    "--overwrite", cwd=folder)
    try:
        wait_for(lambda: list(folder.glob("y.npy.*.part")) or process.poll() is not None)
        time.sleep(0.3)
        everyone = family(process)
        ranks = [p for p in everyone if "runtime.worker" in p.cmdline()]
        assert len(ranks) == 3
        begin = time.monotonic()
        if whom == "group":
            os.killpg(process.pid, number)
        else:
            (everyone[0] if whom == "launcher" else ranks[int(whom)]).send_signal(number)
        found = finish(process, 30)
        assert all_gone(everyone, 30)
        seconds = time.monotonic() - begin
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert sorted(os.listdir(folder)) == ["m.onnx", "x.npy", "y.npy"]
    assert (folder / "y.npy").read_bytes() == b"old"
    wait_for(lambda: is_empty(scratch), 5)
    return found, seconds


@pytest.mark.parametrize(("number", "whom", "code", "says"), [
    (signal.SIGINT, "group", 130, "interrupted; no output was written"),
    pytest.param(signal.SIGINT, "launcher", 130, "interrupted; no output was written", marks=pytest.mark.slow),
    pytest.param(signal.SIGTERM, "launcher", 143, "ended by SIGTERM; no output was written", marks=pytest.mark.slow),
    pytest.param(signal.SIGHUP, "group", 129, "ended by SIGHUP; no output was written", marks=pytest.mark.slow),
    (signal.SIGKILL, "1", 1, "rank 1 was killed by SIGKILL, perhaps for lack of memory; the run was stopped"),
    pytest.param(signal.SIGKILL, "0", 1, "rank 0 was killed by SIGKILL", marks=pytest.mark.slow),
    pytest.param(signal.SIGTERM, "2", 1, "rank 2 was killed by SIGTERM", marks=pytest.mark.slow),
])
def test_a_command_that_is_disturbed(long_run: Path, scratch: Path, number: int, whom: str, code: int,
                                     says: str) -> None:
    found, seconds = disturb(long_run, number, whom, scratch)
    assert (found.code, found.out) == (code, "")
    check_message(found.err)
    assert len(found.err.splitlines()) == 1 and found.err.startswith(f"partition: {says}")
    assert seconds < 30


@pytest.mark.slow
def test_a_launcher_that_is_killed_leaves_nothing(long_run: Path, scratch: Path) -> None:
    """Its ranks notice, clean up and end."""
    found, seconds = disturb(long_run, signal.SIGKILL, "launcher", scratch)
    assert found.code == -signal.SIGKILL and found.err == "" and seconds < 30
