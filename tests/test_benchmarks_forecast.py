"""The table of forecasts: cases are all there, ratios and medians are right, what failed says why."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from benchmarks.__main__ import main
from benchmarks.forecasts import _NETWORKS, CASES, Figures, deviation, table
from benchmarks.memory import ALLOCATOR
from runtime.allocator import MAPPED_FROM


def figures(seconds: float) -> Figures:
    return Figures(100 * 10**6, 25 * 10**5, 7, seconds, 2 * seconds)


def test_cases_differ_and_cover_every_way_to_run() -> None:
    assert len(CASES) == len(set(CASES)) >= 12
    assert {case.backend for case in CASES} == {"lockstep", "gloo"}
    assert {case.mesh for case in CASES if case.backend == "gloo"} >= {"single", "depth=2"}
    assert sum(case.share is not None for case in CASES) >= 2
    assert {case.network for case in CASES} == set(_NETWORKS)


def test_the_table_has_ratios_and_medians() -> None:
    pairs = {case: (figures(forecast), figures(1.0)) for case, forecast in zip(CASES, (0.8, 1.1, 1.02), strict=False)}
    assert deviation(list(pairs.values()), "seconds") == pytest.approx(0.1)
    console = Console(width=130, file=io.StringIO())
    console.print(table(pairs, {CASES[3]: "it ran away"}))
    text = console.file.getvalue()
    assert all(case.name in text for case in CASES[:4])
    assert "10.0 %" in text and "0.80" in text and "instance-64, lockstep single failed: it ran away" in text
    assert "2.5" in text and "forecast 2.5" not in text


@pytest.mark.parametrize(("words", "said"), [
    (["--filter", "nothing like it"], "leaves no case"),
    (["--threads", "0"], "--threads 0"),
    (["--profile", "nowhere.json"], "nowhere.json: cannot be read"),
])
def test_bad_options_are_refused(words: list[str], said: str, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["forecast", *words]) == 2
    assert said in capsys.readouterr().err


def test_cases_run_under_the_allocator_of_the_command() -> None:
    """Benchmarks do not import the runtime, so that its thresholds stand there again."""
    assert {"MALLOC_MMAP_THRESHOLD_": str(MAPPED_FROM), "MALLOC_TRIM_THRESHOLD_": str(2 * MAPPED_FROM)} == ALLOCATOR
