"""`python -m benchmarks run`, `report`, `compare`: cases are sound, peers compute the network, results are kept."""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

from benchmarks import limits, peers_gloo, run, tables
from benchmarks.__main__ import main
from benchmarks.bars import outcomes
from benchmarks.compare import Change
from benchmarks.errors import SideError, SideRefusal, UsageError
from benchmarks.limits import Limits, Work
from benchmarks.models import UNetConfig, export
from benchmarks.peers import opened
from benchmarks.peers_device import opened_on_device
from benchmarks.peers_jax import Jax, traffic
from benchmarks.report import BEGIN, END
from benchmarks.results import CaseResult, Results, Sample, SideResult, load
from benchmarks.runner import Traffic
from benchmarks.suite import Bar, Case, Side, Suite, example_input
from benchmarks.suites import COMPILED, EAGER, FULL, JAX, ONNXRUNTIME, OURS, QUICK, RANKS, SHARED, SUITES, find_suite

TINY = find_suite("smoke").case("peers")


def sample(seconds: float, megabytes: int = 100, counted: Traffic | None = None) -> Sample:
    rise = megabytes * 10**6
    return Sample(1.0, 2 * seconds, seconds, 10**8, 10**8 + rise, rise, counted, None, 10**8, None, (seconds,), (rise,))


def results(ours: tuple[float, ...] = (1.0, 1.1, 0.9), megabytes: int = 100) -> Results:
    """A finished case of four sides, one of them missing, one failed."""
    bars = (Bar("time", "ours", "torch eager", 0.50), Bar("memory", "ours", "torch eager", 0.40),
            Bar("time", "ours", "torch.compile", 1.0), Bar("messages per rank", "ours", None, 14))
    case = replace(TINY, sides=(EAGER, COMPILED, ONNXRUNTIME, OURS), bars=bars)
    sides = [
        SideResult(EAGER, [sample(t, 200) for t in (2.0, 2.5, 1.5)]),
        SideResult(COMPILED, refusal="torch.compile needs a C++ compiler"),
        SideResult(ONNXRUNTIME, failure="ended with code 1"),
        SideResult(OURS, [sample(t, megabytes, Traffic(800, 24, 5, 400, 12)) for t in ours], 1e-7),
    ]
    environment = {"started": "2026-01-02T03:04:05+00:00", "commit": "0123456789abcdef+changes",
                   "versions": {"torch": "2.9", "jax": "missing"},
                   "machine": {"processor": "a CPU", "cores": 2, "memory_bytes": 2**34, "load_average": 0.5}}
    best = [Limits(4e9, 2e9, "a product"), Limits(3e9, 1e9, "x")]
    found = CaseResult(case, sides, ["a note"], best, Work(10**9, 10**8))
    return Results("smoke", 2, 3, [found], environment)


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    def save(name: str, **changed: Any) -> Path:
        results(**changed).save(tmp_path / name)
        return tmp_path / name

    return save


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert main([str(word) for word in arguments]) == 2
    found = capsys.readouterr()
    assert found.err.startswith("error: ") and len(found.err.splitlines()) == 1, found
    return found.err


# --- cases are data -----------------------------------------------------------------------------------


def test_names_are_one_each_and_bars_speak_of_sides_that_are_there() -> None:
    assert len({suite.name for suite in SUITES}) == len(SUITES)
    for suite in SUITES:
        assert len({case.name for case in suite.cases}) == len(suite.cases)
        for case in suite.cases:
            names = {side.name for side in case.sides}
            assert suite.name.startswith("training") or len(names) == len(case.sides)
            assert all({bar.side, bar.of or bar.side} <= names for bar in case.bars)


def test_the_full_suite_has_every_figure_and_every_peer() -> None:
    kinds = {side.kind for case in FULL.cases for side in case.sides}
    assert kinds >= {"torch eager", "torch channels last", "torch.compile", "onnxruntime", "jax", "naive gloo",
                     "careful gloo", "sliding window", "partitioned"}
    assert [case.name for case in FULL.cases] == ["whole-128", "whole-256", "ranks-64", "ranks-128", "train-64",
                                                  "train-96"]
    assert all(case.bars and case.limits for case in FULL.cases)
    assert {side.kind for case in QUICK.cases for side in case.sides} == kinds
    assert max(np.prod(case.shape) for case in QUICK.cases) == 64**3


def test_only_the_named_cases_and_peers() -> None:
    chosen = FULL.only(["ranks-64"], [JAX.name]).cases[0]
    assert [side.name for side in chosen.sides] == [EAGER.name, OURS.name, RANKS.name, SHARED.name, JAX.name]
    assert [bar.of for bar in chosen.bars] == [OURS.name, OURS.name, JAX.name]
    assert [case.name for case in find_suite("smoke").only().cases] == ["tiny", "peers"]


@pytest.mark.parametrize(("words", "said"), [
    (["--suite", "huge"], "suite 'huge' is unknown; choose from quick, full, gpu"),
    (["--case", "nope"], "case 'nope' is not in suite 'quick'; it has whole-64"),
    (["--peer", "tensorflow"], "peer 'tensorflow' is in no case of this run; they have torch eager; "),
    (["--repeats", "0"], "--repeats 0: at least 1 is needed"),
    (["--suite", "gpu"], "suite 'gpu' needs a CUDA device; torch sees none here"),
])
def test_bad_words(words: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path,
                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert said in refused(capsys, "run", *words, "--output", tmp_path / "x.json")
    assert not (tmp_path / "x.json").exists()


def test_work_is_that_of_the_network() -> None:
    found = limits.work(find_suite("quick").case("whole-64"))
    assert found.flops == pytest.approx(28.1e9, rel=0.01)
    training = limits.work(find_suite("full").case("train-64"))
    assert 2.9 < training.flops / found.flops < 3 and training.bytes == 3 * found.bytes


# --- peers --------------------------------------------------------------------------------------------


class ThreadWire:
    """Planes between two threads that stand for ranks."""

    def __init__(self, rank: int, planes: list[queue.Queue[Tensor]]) -> None:
        self.before, self.after = (None, 1) if rank == 0 else (0, None)
        self._out, self._in = planes[rank], planes[1 - rank]

    def exchange(self, first: Tensor, last: Tensor, before: Tensor, after: Tensor) -> None:
        mine, theirs = (last, after) if self.before is None else (first, before)
        assert mine.is_contiguous() and theirs.is_contiguous()
        self._out.put(mine.clone())
        theirs.copy_(self._in.get(timeout=60))


@pytest.mark.parametrize("careful", [False, True])
def test_ranks_by_hand_compute_the_network(careful: bool) -> None:
    volume = torch.from_numpy(example_input(TINY))
    planes: list[queue.Queue[Tensor]] = [queue.Queue(), queue.Queue()]
    wires: list[Any] = [ThreadWire(number, planes) for number in range(2)]
    networks = [peers_gloo._Careful(TINY, w, 8) if careful else peers_gloo._Naive(TINY, w) for w in wires]
    found: list[Any] = [None, None]

    def rank(number: int) -> None:
        with torch.inference_mode():
            found[number] = networks[number](volume[:, :, 8 * number : 8 * number + 8])

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with torch.inference_mode():
        torch.testing.assert_close(torch.cat(found, 2), TINY.network.build()(volume))


def test_jax_computes_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jax")
    for name in ("XLA_FLAGS", "JAX_PLATFORMS"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.setattr(os, "sched_setaffinity", lambda *_: None)
    volume = example_input(TINY)
    runner = Jax(replace(JAX, mesh="single"), TINY, 1)
    with torch.inference_mode():
        expected = TINY.network.build()(torch.from_numpy(volume))
    torch.testing.assert_close(torch.from_numpy(np.ascontiguousarray(runner.run(volume))), expected)
    assert runner.counted() == Traffic(0, 0)


def test_messages_of_a_compiled_program() -> None:
    program = """
      %p = f32[1,1,8,8,16]{4,3,2,1,0} collective-permute(%a), channel_id=1, source_target_pairs={{0,1}}, metadata={}
      %q = f32[1,1,8,8,16]{4,3,2,1,0} collective-permute(%b), channel_id=2, source_target_pairs={{1,0},{0,1}}
      %g = f32[4]{0} all-gather(%c), channel_id=3, replica_groups={{0,1}}
      %n = f32[4]{0} add(%c, %p)
    """
    assert traffic(program, 2) == Traffic(3 * 4096 + 2 * 16, 5, 0, (3 * 4096 + 32) // 2, 2)


@pytest.mark.parametrize("side", [JAX, replace(JAX, name="by hand", kind="careful gloo", processes=2)])
def test_what_peers_by_hand_are_not_written_for(side: Side) -> None:
    odd = replace(TINY, shape=(1, 1, 18, 12, 20))
    strided = replace(TINY, network=UNetConfig(levels=2, base=4))
    for case, said in ((odd, "multiple of 4"), (strided, "max pool and transposed convolution alone")):
        with pytest.raises(SideRefusal, match=said), opened(side, case, Path("none"), 1):
            pass


def test_packages_and_compilers_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jax", None)
    monkeypatch.setattr(os, "sched_setaffinity", lambda *_: None)
    for name in ("XLA_FLAGS", "JAX_PLATFORMS"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    with pytest.raises(SideRefusal, match="JAX is not installed; pip install"), opened(JAX, TINY, Path("none"), 1):
        pass
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    with (
        pytest.raises(SideRefusal, match=r"torch\.compile needs a C\+\+ compiler"),
        opened(COMPILED, TINY, Path("none"), 1),
    ):
        pass


def test_sides_of_the_gpu_suite_on_the_cpu(tmp_path: Path) -> None:
    """The same code in bfloat16, without the device."""
    case = replace(TINY, dtype="bfloat16")
    model = export(case.network.build(), case.shape, tmp_path / "m.onnx", dtype="bfloat16")
    found: list[Any] = []
    for side in (EAGER, *find_suite("gpu").cases[0].sides):
        if side.kind == "torch.compile":
            continue
        with opened_on_device(side, case, model, "cpu") as runner:
            found.append(runner.array(runner.run(example_input(case))))
            assert runner.device_bytes() is None
    assert len(found) == 4 and all(np.abs(a - found[0]).max() < 0.05 * np.abs(found[0]).max() for a in found)


# --- runs ---------------------------------------------------------------------------------------------


def measured_by(answer: Callable[[Side], Sample], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Let the runs be answered instead of measured; where the results go."""
    monkeypatch.setattr(run, "measure", lambda job, side, timeout, save: answer(side))
    monkeypatch.setattr(run, "exported", lambda case, folder: folder / "none.onnx")
    monkeypatch.setattr(run.limits, "measured", lambda *_: Limits(1e9, 1e9, "a product"))
    monkeypatch.setattr(run.signal, "signal", lambda *_: None)
    return tmp_path / "found" / "r.json"


def test_a_run_is_interleaved_and_names_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                        capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[str] = []

    def answer(side: Side) -> Sample:
        asked.append(side.name)
        if side.kind == "jax":
            raise SideRefusal("JAX is not installed")
        if side.kind == "onnxruntime":
            raise SideError("ended with code 1")
        return sample(1.0)

    output = measured_by(answer, monkeypatch, tmp_path)
    words = ["--suite", "smoke", "--case", "peers", "--peer", JAX.name, "--peer", ONNXRUNTIME.name, "--repeats", "2"]
    assert main(["run", *words, "--output", str(output)]) == 1
    assert asked == [EAGER.name, ONNXRUNTIME.name, JAX.name, OURS.name, RANKS.name, EAGER.name, OURS.name, RANKS.name]
    shown = capsys.readouterr().out
    assert f"{JAX.name}: not here: JAX is not installed" in shown and "onnxruntime: failed: ended with code 1" in shown
    found = load(output)
    assert not found.interrupted and len(found.cases[0].limits) == 2
    assert found.environment["versions"]["torch"] and found.environment["machine"]["cores"] >= 1
    assert json.loads(json.dumps(found.to_dict())) == json.loads(output.read_text())


def test_an_interrupted_run_keeps_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    count = iter(range(100))

    def answer(side: Side) -> Sample:
        if next(count) == 7:
            raise KeyboardInterrupt
        return sample(1.0)

    output = measured_by(answer, monkeypatch, tmp_path)
    assert main(["run", "--suite", "smoke", "--repeats", "1", "--output", str(output)]) == 130
    assert "interrupted; results in" in capsys.readouterr().out
    found = load(output)
    assert found.interrupted and all(side.samples for side in found.cases[0].sides)
    assert sum(len(side.samples) for side in found.cases[1].sides) == 2
    assert main(["report", str(output), "-o", str(tmp_path)]) == 0
    assert "Interrupted" in (tmp_path / "r.md").read_text()


# --- results ------------------------------------------------------------------------------------------


def test_results_come_back_as_they_were(saved: Callable[..., Path]) -> None:
    found = load(saved("a.json"))
    assert found == results() and found.cases[0].case.sides[0] == EAGER


@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.name)
def test_every_suite_can_be_kept(suite: Suite, tmp_path: Path) -> None:
    cases = [CaseResult(case, [SideResult(side) for side in case.sides]) for case in suite.cases]
    kept = Results(suite.name, 1, 1, cases, results().environment)
    kept.save(tmp_path / "r.json")
    assert load(tmp_path / "r.json") == kept


@pytest.mark.parametrize(("text", "said"), [
    ('{"format": 1, "suite": "quick", "cases": [], "commit": "abc"}', "has version 1, this program reads 2"),
    ("[1]", "is no result of"),
    ("# text", "is not JSON"),
    ('{"format": 2, "suite": "quick", "cases": [{}]}', "is damaged (KeyError"),
    (None, "cannot be read"),
])
@pytest.mark.parametrize("command", ["report", "compare"])
def test_files_that_are_no_results(command: str, text: str | None, said: str, tmp_path: Path,
                                   saved: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.json"
    if text is not None:
        path.write_text(text)
    assert f"{path}: {said}" in refused(capsys, command, saved("good.json"), path)


def test_bars_say_reached_or_missed_by_how_much() -> None:
    lines = [outcome.line for outcome in outcomes(results().cases[0])]
    assert lines == [
        "time: ours / torch eager: 0.500 (0.440-0.600), at most 0.500: reached",
        "memory: ours / torch eager: 0.500, at most 0.400: missed by 25 %",
        "time: ours / torch.compile: at most 1.000: not measured: torch.compile not here: "
        "torch.compile needs a C++ compiler",
        "messages per rank: ours: 12, at most 14: reached",
    ]
    alone = replace(TINY, sides=(OURS,), bars=(Bar("sent per rank", "ours", None, 2.0**20),))
    (found,) = outcomes(CaseResult(alone, [SideResult(OURS, [sample(1, 1, Traffic(3, 1, 0, 3 * 2**20, 1))])]))
    assert found.line == "sent per rank: ours: 3.000 MiB, at most 1.000 MiB: missed by 200 %"


def test_the_table_has_limits_and_what_is_missing() -> None:
    console = Console(file=StringIO(), width=tables.WIDTH)
    console.print(tables.table(results().cases[0], 3))
    assert isinstance(console.file, StringIO)
    shown = " ".join(console.file.getvalue().split())
    for text in ("0.900-1.100", "25, 5", "4 GFLOP/s (a product)", "not here", "failed: ended with code 1", "a note"):
        assert text in shown


def test_reports(saved: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "docs" / "README.md"
    page.parent.mkdir()
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert main(["report", str(saved("a.json")), "-o", str(tmp_path / "out"), "--into", str(page)]) == 0
    text = (tmp_path / "out" / "a.md").read_text()
    assert "| peers | memory: ours / torch eager | 0.500 | 0.400 | missed by 25 % |" in text
    assert "torch.compile: not here: torch.compile needs a C++ compiler" in text and "`0123456789ab+changes`" in text
    rows = (tmp_path / "out" / "a.csv").read_text().splitlines()
    assert len(rows) == 5 and rows[0].startswith("suite,case,side,kind") and "ended with code 1" in rows[3]
    filled = page.read_text()
    assert filled.startswith("before\n") and filled.endswith(f"{END}\nafter\n") and "old" not in filled
    picture = tmp_path / "out" / "a.png"
    if picture.exists():
        assert picture.read_bytes().startswith(b"\x89PNG") and "![smoke](../out/a.png)" in filled
    else:
        assert "no picture: matplotlib is not installed" in capsys.readouterr().out
    page.write_text("no place")
    assert "has no place for figures" in refused(capsys, "report", saved("a.json"), "-o", tmp_path, "--into", page)


def test_a_report_without_matplotlib(saved: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                     capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("matplotlib", "matplotlib.backends.backend_agg", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["report", str(saved("a.json")), "-o", str(tmp_path)]) == 0
    assert "matplotlib is not installed" in capsys.readouterr().out and "![" not in (tmp_path / "a.md").read_text()


# --- comparisons --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("old", "new", "verdict"), [
    ((1.0, 1.2), (1.1, 1.3), "same"),
    ((1.0, 1.1), (1.2, 1.3), "more"),
    ((1.0, 1.1), (0.5, 0.9), "less"),
    ((1.0,), (1.01,), "same"),
])
def test_verdicts(old: tuple[float, ...], new: tuple[float, ...], verdict: str) -> None:
    assert Change("case", "side", True, "time", old, new).verdict == verdict


def test_comparisons(saved: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    old, slow, large = saved("old.json"), saved("slow.json", ours=(1.3, 1.5, 1.4)), saved("large.json", megabytes=150)
    assert main(["compare", str(old), str(slow)]) == 0
    shown = capsys.readouterr().out
    assert any(line.split() == ["peers", "ours", "time", "s", "1.000", "1.400", "1.40", "more"]
               for line in shown.splitlines()), shown
    assert main(["compare", str(old), str(slow), "--fail-above", "1.5"]) == 0
    assert main(["compare", str(old), str(slow), "--fail-above", "1.1"]) == 1
    assert "peers, ours: time is 1.40 of what it was, above 1.1" in capsys.readouterr().out
    assert main(["compare", str(old), str(large), "--fail-above", "1.1"]) == 1
    assert "--fail-above -1" in refused(capsys, "compare", old, slow, "--fail-above", "-1")


def test_what_makes_results_hard_to_compare(tmp_path: Path, saved: Callable[..., Path],
                                            capsys: pytest.CaptureFixture[str]) -> None:
    other = results()
    other.environment["machine"] |= {"processor": "another"}
    other.environment["versions"] |= {"torch": "3"}
    other.threads, other.interrupted = 4, True
    other.cases[0].limits = [Limits(8e9, 1e9, "x")]
    other.cases[0].sides[0].samples = []
    other.save(tmp_path / "other.json")
    assert main(["compare", str(saved("old.json")), str(tmp_path / "other.json")]) == 0
    shown = capsys.readouterr().out
    for text in ("processor was a CPU, is another", "torch was 2.9, is 3", "threads were 2, are 4",
                 "NEW was interrupted", "did 2.00 of the arithmetic", "only in old.json: peers: torch eager"):
        assert text in shown


# --- end to end ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_peer_runs_and_agrees(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "r.json"
    assert main(["run", "--suite", "smoke", "--case", "peers", "--repeats", "1", "--output", str(output)]) == 0
    shown = capsys.readouterr().out
    (found,) = load(output).cases
    assert found.limits[0].flops > 1e9 and found.limits[0].bytes > 1e8
    for side in found.sides:
        assert side.samples or (side.refusal and side.refusal in " ".join(shown.split()))
        assert side.side.kind == "sliding window" or (side.difference or 0) < 1e-5, side
    split = [side.samples[0].counted for side in found.sides if side.side.mesh == "depth=2" and side.samples]
    assert len(split) >= 3 and len({(t.sent_bytes, t.messages) for t in split if t}) == 1


@pytest.mark.slow
def test_torch_compile(tmp_path: Path) -> None:
    output = tmp_path / "r.json"
    assert main(["run", "--suite", "smoke", "--case", "compiled", "--repeats", "1", "--output", str(output)]) == 0
    compiled = load(output).cases[0].side(COMPILED.name)
    assert compiled and (compiled.refusal or (compiled.samples and (compiled.difference or 0) < 1e-5))


def test_an_unknown_suite_is_a_mistake() -> None:
    with pytest.raises(UsageError, match="suite 'x' is unknown"):
        find_suite("x")


def test_a_case_needs_no_bars() -> None:
    case = Case("c", "what", UNetConfig(), (1, 1, 8, 8, 8), (OURS,))
    assert outcomes(CaseResult(case, [SideResult(OURS)])) == []
