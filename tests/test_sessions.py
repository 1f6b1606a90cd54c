"""Sessions: several runs, several shapes, processes that start, die and are interrupted."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

import partitioner as pt
from partitioner.sessions import KEPT_PLANS
from runtime import executor, launcher
from runtime.session import LockstepRunner, PoolRunner
from tests.command import (
    Array,
    all_gone,
    convolution,
    volume,
)

OPEN = ("n", 2, "d", "h", "w_")


@pytest.fixture(scope="module")
def plan() -> pt.Plan:
    return pt.partition(convolution(OPEN), mesh="depth=2", shapes={"x": (1, 2, 7, 11, 5)})


@pytest.fixture(scope="module")
def pool(plan: pt.Plan) -> Generator[pt.Session]:
    """One pair of processes for all tests that leave it whole."""
    with plan.session("gloo") as session:
        yield session


def workers(session: pt.Session) -> list[psutil.Process]:
    assert isinstance(session._runner, PoolRunner)
    return [psutil.Process(p.pid) for p in session._runner.pool._processes]


def alone(plan: pt.Plan, x: Array) -> Array:
    return plan.run({"x": x})["y"]


# --- runs and shapes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["new", "strided", "mapped", "tensor"])
@pytest.mark.parametrize("backend", ["lockstep", "gloo"])
def test_outputs_are_written_to_given_arrays(plan: pt.Plan, pool: pt.Session, tmp_path: Path, backend: str,
                                             kind: str) -> None:
    x = volume(seed=9)
    expected = alone(plan, x)
    wide = np.zeros((*expected.shape[:-1], 2 * expected.shape[-1]), expected.dtype)
    out: Any = {
        "new": np.empty_like(expected), "strided": wide[..., ::2], "tensor": torch.empty(expected.shape),
        "mapped": np.lib.format.open_memmap(tmp_path / "y.npy", "w+", expected.dtype, expected.shape),
    }[kind]
    found = (plan.run({"x": x}, out={"y": out}) if backend == "lockstep" else pool.run({"x": x}, out={"y": out}))["y"]
    assert found is out and np.array_equal(out, expected)
    assert not wide[..., 1::2].any()


@pytest.mark.parametrize(("make", "says"), [
    (lambda x, y: y, "out is a ndarray; give a dict"),
    (lambda x, y: {"z": y}, "output 'z' is unknown; the model has y"),
    (lambda x, y: {"y": y[:, :, 1:]}, "is 1x3x6x11x5; the model makes 1x3x7x11x5"),
    (lambda x, y: {"y": y.astype(np.float64)}, "is float64; the model takes float32"),
    (lambda x, y: {"y": np.flip(y, 2)}, "torch cannot write to"),
    (lambda x, y: {"y": np.broadcast_to(np.float32(0), y.shape)}, "torch cannot write to"),
    (lambda x, y: {"y": list(y)}, "is a list"),
    (lambda x, y: {"y": np.lib.stride_tricks.as_strided(x, y.shape)}, "lies where input 'x' lies"),
    (lambda x, y: {"y": torch.from_numpy(np.lib.stride_tricks.as_strided(x, y.shape))}, "lies where input 'x' lies"),
])
def test_arrays_without_room_are_refused(plan: pt.Plan, make: Any, says: str) -> None:
    x = volume(seed=9)
    with pytest.raises(pt.PartitionError) as refusal:
        plan.run({"x": x}, out=make(x, alone(plan, x)))
    assert says in str(refusal.value)


def test_processes_give_the_bits_of_lockstep(plan: pt.Plan, pool: pt.Session) -> None:
    before = [w.pid for w in workers(pool)]
    for seed in range(3):
        x = volume(seed=seed)
        found = pool.run({"x": x})
        assert list(found) == ["y"] and found["y"].tobytes() == alone(plan, x).tobytes()
        assert found["y"].flags.writeable
    assert [w.pid for w in workers(pool)] == before and len(before) == 2


@pytest.mark.parametrize("kind", ["fortran", "reversed", "read-only", "strided", "tensor", "strided tensor", "mapped"])
def test_processes_take_arrays_of_all_kinds(plan: pt.Plan, pool: pt.Session, tmp_path: Path, kind: str) -> None:
    x = volume(seed=5)
    expected = alone(plan, x)
    np.save(tmp_path / "x.npy", x)
    frozen = x.copy()
    frozen.flags.writeable = False
    given: Any = {
        "fortran": np.asfortranarray(x), "reversed": x[:, :, ::-1].copy()[:, :, ::-1], "read-only": frozen,
        "strided": np.repeat(x, 2, axis=4)[..., ::2], "tensor": torch.from_numpy(x),
        "strided tensor": torch.from_numpy(np.ascontiguousarray(x.T)).permute(4, 3, 2, 1, 0),
        "mapped": np.load(tmp_path / "x.npy", mmap_mode="r"),
    }[kind]
    found = pool.run({"x": given})["y"]
    assert isinstance(found, torch.Tensor if "tensor" in kind else np.ndarray)
    assert np.array_equal(np.asarray(found), expected)


def check_shapes(session: pt.Session) -> None:
    shapes = [(1, 2, 7 + i, 11, 5 + i % 2) for i in range(KEPT_PLANS + 2)]
    for shape in (*shapes, *reversed(shapes)):
        x = volume(shape)
        found = session.run({"x": x})["y"]
        expected = pt.partition(convolution(shape), mesh="depth=2").run({"x": x})["y"]
        assert np.array_equal(found, expected)
        assert session.plan.input_shapes == {"x": shape}
        assert len(session._plans) <= KEPT_PLANS
        assert session.last_run is not None
        assert [r.sent_bytes for r in session.last_run.ranks] == session.plan.cost.sent.tolist()


def test_new_shapes_are_planned_for_in_lockstep(plan: pt.Plan) -> None:
    with plan.session() as session:
        check_shapes(session)


def test_new_shapes_are_planned_for_by_processes(pool: pt.Session) -> None:
    before = [w.pid for w in workers(pool)]
    check_shapes(pool)
    assert [w.pid for w in workers(pool)] == before  # the same processes, which the plans are sent to


def test_kept_plans_are_not_made_again(plan: pt.Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    compile_ = pt.Plan.compile.__func__  # type: ignore[attr-defined]

    def counted(cls: type, *arguments: Any, **options: Any) -> pt.Plan:
        made.append(arguments[1].shapes)
        return compile_(cls, *arguments, **options)

    monkeypatch.setattr(pt.Plan, "compile", classmethod(counted))
    with plan.session() as session:
        for _ in range(3):
            for depth in range(7, 7 + KEPT_PLANS):
                session.run({"x": volume((1, 2, depth, 11, 5))})
        assert len(made) == KEPT_PLANS - 1  # all but the first, once
        for depth in (20, 21, 7, 8):
            session.run({"x": volume((1, 2, depth, 11, 5))})
        assert [shapes["x"][2] for shapes in made] == [8, 9, 10, 20, 21, 8]  # the first plan is always at hand


def test_cuts_come_back_with_their_shape() -> None:
    plan = pt.partition(convolution(OPEN), mesh="depth=2", shapes={"x": (1, 2, 7, 11, 5)}, cuts={"depth": (0, 6, 7)})
    with plan.session() as session:
        for depth in (7, 8, 9, 10, 11, 12, 7):
            session.run({"x": volume((1, 2, depth, 11, 5))})
        assert "depth(0|6|7)" in session.plan.to_dict()["inputs"][0]["layout"]


def test_a_shape_that_cannot_be_leaves_the_session_whole(plan: pt.Plan, pool: pt.Session) -> None:
    x = volume()
    for session in (pool, plan.session()):
        for wrong in (volume((1, 2, 1, 11, 5)), volume((1, 3, 7, 11, 5)), volume((1, 2, 7, 11)), x.astype(np.float64)):
            with pytest.raises(pt.PartitionError):
                session.run({"x": wrong})
        assert np.array_equal(session.run({"x": x})["y"], alone(plan, x))


def test_a_plan_from_a_file_keeps_its_shape(plan: pt.Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "p.onnx")
    with pt.load(tmp_path / "p.onnx").session() as session:
        with pytest.raises(pt.PartitionError, match="is for inputs x=1x2x7x11x5, not x=1x2x8x11x5; partition the mo"):
            session.run({"x": volume((1, 2, 8, 11, 5))})
        assert np.array_equal(session.run({"x": volume()})["y"], alone(plan, volume()))


def test_progress(plan: pt.Plan, pool: pt.Session) -> None:
    for session in (pool, plan.session()):
        seen: list[tuple[int, int, str]] = []
        session.run({"x": volume()}, progress=lambda *step, seen=seen: seen.append(step))
        assert seen[-1][0] == seen[-1][1] and [s[0] for s in seen] == sorted(s[0] for s in seen)
        assert all(isinstance(s[2], str) for s in seen)


def test_figures_of_the_last_run(plan: pt.Plan, pool: pt.Session) -> None:
    pool.run({"x": volume()})
    for session in (pool, plan.session()):
        session.run({"x": volume()})
        report = session.last_run
        assert report is not None and [r.rank for r in report.ranks] == [0, 1] and report.seconds > 0
        assert [r.sent_bytes for r in report.ranks] == plan.cost.sent.tolist()


# --- the end of a session ----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["lockstep", pytest.param("gloo", marks=pytest.mark.slow)])
def test_a_closed_session(plan: pt.Plan, backend: Any) -> None:
    session = plan.session(backend)
    session.run({"x": volume()})
    processes = workers(session) if backend == "gloo" else []
    session.close()
    session.close()
    assert all_gone(processes, 1)
    with pytest.raises(pt.PartitionError, match=r"this session is closed; open another with plan\.session\(\)"):
        session.run({"x": volume()})
    with pytest.raises(ZeroDivisionError), plan.session() as other:
        raise ZeroDivisionError
    with pytest.raises(pt.PartitionError, match="closed"):
        other.run({"x": volume()})


@pytest.mark.parametrize(("options", "says"), [
    ({"backend": "mpi"}, "backend 'mpi' is unknown; use lockstep, gloo, nccl, shm"), ({"backend": None}, "unknown"),
    ({"device": "tpu"}, "device 'tpu' is unknown"), ({"device": ""}, "unknown"), ({"device": "meta"}, "cannot be used"),
    ({"device": "cuda"}, "GPU"), ({"device": "cpu,cuda:7"}, "GPU"), ({"backend": "nccl"}, "backend nccl"),
    ({"backend": "nccl", "device": "cuda"}, "GPU"), ({"backend": "gloo", "device": "tpu"}, "device 'tpu' is unknown"),
    ({"threads": 0}, "threads=0: give at least 1"), ({"backend": "gloo", "threads": -1}, "threads=-1"),
])
def test_sessions_that_cannot_be(plan: pt.Plan, options: dict[str, Any], says: str,
                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(launcher, "RankPool", None)  # no process is started for nothing
    with pytest.raises(pt.PartitionError, match=r"\A[^\n]*\Z") as caught:
        plan.session(**options)
    assert says in str(caught.value)


def test_nccl_needs_a_gpu_per_rank(plan: pt.Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    with pytest.raises(pt.PartitionError, match="moves the memory of GPUs, not of device 'cpu'; add --device cuda"):
        plan.session("nccl")
    with pytest.raises(pt.PartitionError, match="needs a GPU for every rank: 2 ranks, 1 GPUs here; use --backend"):
        plan.session("nccl", device="cuda")


def test_a_closed_runner_holds_no_weights(plan: pt.Plan) -> None:
    """Weights of one plan go before those of the next one come, whoever still holds the runner."""
    runner = LockstepRunner(plan.model)
    runner.run_arrays({"x": volume()})
    weights = [weakref.ref(t) for shard in runner._executor.shards for t in shard.weights.values()]
    runner.close()
    gc.collect()
    assert weights and not any(weight() is not None for weight in weights)


def test_more_kernels_than_stay_bound(plan: pt.Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor, "MOST_BOUND", 1)
    x = volume(seed=4)
    with plan.session() as session:
        first, again = (session.run({"x": x})["y"] for _ in range(2))
    assert np.array_equal(first, alone(plan, x)) and np.array_equal(again, first)


def test_threads_are_for_the_run_only(plan: pt.Plan) -> None:
    before = torch.get_num_threads()
    seen: list[int] = []
    with plan.session(threads=before + 1) as session:
        session.run({"x": volume()}, progress=lambda *_: seen.append(torch.get_num_threads()))
    assert set(seen) == {before + 1} and torch.get_num_threads() == before


def test_lockstep_survives_an_interruption(plan: pt.Plan) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with plan.session() as session:
        with pytest.raises(KeyboardInterrupt):
            session.run({"x": volume()}, progress=interrupt)
        assert isinstance(session._runner, LockstepRunner)
        assert not any(shard.buffers for shard in session._runner._executor.shards)
        assert np.array_equal(session.run({"x": volume()})["y"], alone(plan, volume()))


def test_lack_of_memory_is_one_line(plan: pt.Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"),
                  RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: try")):
        def fail(*_: object, error: BaseException = error, **_more: object) -> None:
            raise error

        with plan.session() as session:
            assert isinstance(session._runner, LockstepRunner)
            monkeypatch.setattr(type(session._runner._executor), "run", fail)
            with pytest.raises(pt.ExecutionError, match=r"\Aout of (device )?memory[^\n]*more shards[^\n]*\Z"):
                session.run({"x": volume()})
            monkeypatch.undo()
