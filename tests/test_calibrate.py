"""Calibration measures what plans run, writes a whole file or none, and refuses bad options before it measures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import partitioner as pt
import runtime.calibrate
from runtime.calibrate import Extent, calibrate
from runtime.gauge import Gauge, Trial
from runtime.gauge_link import copy_times, process_times
from runtime.gauge_trials import CONVOLUTIONS, KINDS, block
from tests.command import check_message, run_here

TINY = Extent(1e-5, 1e6, 1e6, (4096, 16384), (64, 4096), ((1, 16), (1, 16)), (64, 4096), 1 << 20)
GAUGE = Gauge(torch.device("cpu"), 1e-5, 1)


@pytest.fixture
def tiny(monkeypatch) -> None:
    """A calibration of seconds: few points, no processes."""
    monkeypatch.setattr(runtime.calibrate, "QUICK", TINY)
    monkeypatch.setattr(runtime.calibrate, "process_times", lambda _, sizes, *__: {n: 1e-4 + n * 1e-9 for n in sizes})


def test_a_calibration_is_a_profile_that_survives_a_file(tiny, tmp_path) -> None:
    seen: list[tuple[int, int, str]] = []
    found = calibrate(threads=1, quick=True, progress=lambda *said: seen.append(said))
    found.save(tmp_path / "profile.json")
    assert pt.Profile.load(tmp_path / "profile.json") == found
    assert found.measured and found.versions["torch"] == torch.__version__
    (kernels,) = found.kernels
    assert kernels.threads == 1
    assert set(kernels.curves) == {*KINDS, "reorder", "pages"}
    assert set(kernels.grids) == set(CONVOLUTIONS)
    assert [done for done, _, _ in seen] == list(range(1, len(seen) + 1))
    assert {count for _, count, _ in seen} == {len(seen)}


def test_threads_are_as_before_afterwards(tiny) -> None:
    before = torch.get_num_threads()
    assert [k.threads for k in calibrate(threads=2, quick=True).kernels] == [2]
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_timed_at_about_the_size_asked_for(kind: str) -> None:
    for size in (1 << 16, 1 << 20):
        found = KINDS[kind](size).nbytes()
        aim = size / 4 if kind == "resize" else size
        assert 0.4 * aim < found < 2 * aim
    assert GAUGE.seconds(KINDS[kind](4096)) > 0


@pytest.mark.parametrize("family", CONVOLUTIONS)
def test_convolutions_count_the_operations_that_their_operator_has(family: str) -> None:
    keys = {"conv": [(4, 16, 27, 512), (16, 1, 9, 64), (1, 4, 1, 64)], "transposed": [(16, 4, 512)],
            "depthwise": [(9, 32768), (27, 32768)]}
    for key in keys[family]:
        trial, flops = CONVOLUTIONS[family](*key)
        operator = trial.operator()
        (out,) = operator.outputs
        cells = 1
        for n in out.shape:
            cells *= n
        assert operator.flops(cells) == pytest.approx(flops)


def test_blocks_reach_fresh_memory_exactly() -> None:
    assert [4 * 16 * a * b * c for a, b, c in (block((2 << 20) / 8 / 16), block((1920 << 10) / 8 / 16))] == [
        1 << 20, (1 << 20) * 15 // 16]


def test_results_go_to_their_place_or_are_fresh() -> None:
    for into in (False, True):
        trial = Trial("Relu", ((1, 4, 3, 5, 7),), into=into)
        shard, action = GAUGE.prepare(trial)
        assert action.writes[0].fills is not into
        assert GAUGE.seconds(trial) > 0
        assert "y0" not in shard.buffers


def test_messages_in_one_process_and_between_two() -> None:
    copies = copy_times((64, 1 << 16), 1e-3)
    assert all(0 < seconds < 1 for seconds in copies.values())
    assert set(copies) == {64, 1 << 16}


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["gloo", "shm"])
def test_messages_between_two_processes(backend: str) -> None:
    found = process_times(backend, (64, 1 << 16), 1e-2)
    assert set(found) == {64, 1 << 16}
    assert all(0 < seconds < 1 for seconds in found.values())


def test_the_command_writes_where_others_look(tiny, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("runtime.allocator.keep_memory_tight", lambda: None)
    monkeypatch.delenv("PARTITIONER_PROFILE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    result = run_here("calibrate", "--quick", "--threads", "1")
    path = tmp_path / "partitioner" / "profile.json"
    assert result.code == 0, result.err
    assert result.out.startswith(f"wrote {path}: ")
    assert pt.Profile.find() == pt.Profile.load(path)


def test_a_failure_leaves_no_file(tiny, tmp_path, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise pt.ExecutionError("gloo: messages between two processes failed")

    monkeypatch.setattr("runtime.allocator.keep_memory_tight", lambda: None)
    monkeypatch.setattr(runtime.calibrate, "process_times", fail)
    result = run_here("calibrate", "--quick", "--threads", "1", "-o", tmp_path / "profile.json")
    assert result.code == 1
    check_message(result.err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("words", "said"), [
    (["--device", "tpu"], "device 'tpu' is unknown"),
    (["--device", "cuda:0,cuda:1"], "is unknown"),
    (["--threads", "0"], "argument --threads: invalid threads value: '0'"),
    (["--threads", "many"], "argument --threads"),
    (["-o", "."], "is a folder"),
    (["-o", "file/profile.json"], "cannot be written"),
    (["more"], "unrecognized arguments: more"),
])
def test_bad_options_are_refused_before_measuring(words: list[str], said: str, tmp_path, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr(runtime.calibrate, "_kernels", fail)
    monkeypatch.setattr("runtime.allocator.keep_memory_tight", lambda: None)
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    result = run_here("calibrate", *words)
    assert result.code == 2
    assert said in result.err
    check_message(result.err)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


