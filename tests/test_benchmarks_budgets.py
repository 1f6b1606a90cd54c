"""`python -m benchmarks run --suite depth-first`: sides under budgets, what is refused, tables, curves, float64."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks import budgets
from benchmarks.__main__ import main
from benchmarks.errors import SideRefusal, UsageError
from benchmarks.float64 import in_float64
from benchmarks.models import UNet, UNetConfig, export
from benchmarks.peers import opened
from benchmarks.results import CaseResult, Sample, SideResult
from benchmarks.suite import Case, Side, Window
from benchmarks.suites import find_suite

SAMPLE = Sample(1.0, 3.0, 2.0, 100_000_000, 500_000_000, 400_000_000, None, None, 120_000_000, None)


def case(*sides: Side) -> Case:
    return Case("tiny", "a small one", UNetConfig(levels=2, base=2, down="maxpool"), (1, 1, 8, 8, 8), sides, "budgets")


def printed(result: CaseResult) -> str:
    console = Console(file=StringIO(), width=budgets.WIDTH)
    console.print(budgets.table(result))
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


@pytest.mark.slow
def test_the_smoke_suite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "found.json"
    status = main(["run", "--suite", "depth-first-smoke", "--repeats", "1", "--threads", "1", "--output", str(output)])
    shown = capsys.readouterr().out
    assert status == 0, shown
    (found,) = json.loads(output.read_text())["cases"]
    sides = {side["name"]: side for side in found["sides"]}
    whole, least, refused = sides["whole shards"], sides["least budget"], sides["budget 1/10"]
    assert "this model at these extents needs at least" in refused["refusal"] and refused["samples"] == []
    assert "budget 1/10" in shown and "refused" in shown
    idle, rise = (whole["summary"][name]["median"] for name in ("idle_bytes", "rise_bytes"))
    assert refused["budget_bytes"] == pytest.approx(idle + 0.1 * rise)
    assert least["refusal"] is None and least["samples"][0]["schedule"]
    assert refused["budget_bytes"] < least["budget_bytes"] >= least["summary"]["peak_bytes"]["max"]
    for name in ("whole shards", "least budget", "onnxruntime"):
        assert sides[name]["difference"] < 1e-5 and sides[name]["failure"] is None, name
    window = sides["sliding window, 0.25"]
    assert window["difference"] or "MONAI is not installed" in window["refusal"]
    assert (tmp_path / "found-tiny.png").exists() or "matplotlib is not installed" in shown


def test_the_suite_has_its_cases(capsys: pytest.CaptureFixture[str]) -> None:
    suite = find_suite("depth-first")
    usual = [c.name for c in suite.only().cases]
    assert usual == ["batch-128", "instance-128", "batch-192", "instance-192"]
    assert suite.only(["batch-256"]).cases[0].shape == (1, 1, 256, 256, 256)
    assert main(["list"]) == 0 and "budget 1/6" in capsys.readouterr().out


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_float64_in_slabs_is_float64(norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.float64._MATRIX_BYTES", 50_000)
    config = UNetConfig(levels=3, base=2, norm="batch" if norm == "batch" else "instance", down="maxpool")
    volume = torch.rand(1, 1, 13, 11, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = config.build().double()(volume)
        network = in_float64(config.build())
        found = network(volume)
    assert isinstance(network, UNet) and found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def test_refusals_before_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = case()
    model = export(tiny.network.build(), tiny.shape, tmp_path / "tiny.onnx")
    with (
        pytest.raises(SideRefusal, match=r"memory .* needs at least"),
        opened(Side("small", "partitioned", share=0.1), tiny, model, 1, budget=1_000_000),
    ):
        pass
    for name in ("monai", "monai.inferers", "monai.inferers.inferer"):
        monkeypatch.setitem(sys.modules, name, None)
    with (
        pytest.raises(SideRefusal, match="MONAI is not installed; pip install monai"),
        opened(Side("window", "sliding window", window=Window(4, 0.5)), tiny, model, 1),
    ):
        pass


def test_a_table_tells_ratios_schedules_and_what_went_wrong() -> None:
    names = [Side(name, "partitioned") for name in ("whole", "half", "tenth", "broken", "later")]
    thin = replace(SAMPLE, seconds=3.0, peak_bytes=300_000_000, opening_bytes=320_000_000, schedule="depth/8,8,4")
    sides = [
        SideResult(names[0], [SAMPLE], 1e-7),
        SideResult(names[1], [thin, thin], 2e-7, budget=290_000_000),
        SideResult(names[2], budget=140_000_000, refusal="needs [more]"),
        SideResult(names[3], failure="ended with code 1"),
        SideResult(names[4]),
    ]
    shown = printed(CaseResult(case(*names), sides, ["a note"]))
    (half,) = (line.split() for line in shown.splitlines() if line.startswith(" half"))
    assert half == ["half", "3.00", "1.50", "200", "0.50", "300", "290", "depth/8", "x2", "4", "x1", "2.0e-07"]
    lines = [line.strip() for line in shown.splitlines()]
    assert "half: 10 MB over its budget" in lines
    for text in ("30 MB over its budget while it was planned", "tenth: needs [more]", "broken: ended with code 1",
                 "a note", "refused", "failed", "not run"):
        assert text in shown


@pytest.mark.parametrize(("schedule", "short"), [
    (None, ""),
    ("depth/32,32,32", "depth/32 x3"),
    ("height/4,16,4 2 in files", "height/16 x1 4 x2, 2 in files"),
])
def test_schedules_in_short(schedule: str | None, short: str) -> None:
    assert budgets.short_schedule(schedule) == short


def test_the_least_budget_is_what_refused_sides_were_told() -> None:
    side = Side("small", "partitioned", share=0.1)
    told = [SideResult(side, refusal=f"this model needs at least {text} (") for text in ("2.00 GiB", "9 MiB")]
    assert budgets.least(CaseResult(case(side), told)) == 2**31 + 2**21
    assert budgets.least(CaseResult(case(side), [SideResult(side, [SAMPLE]), SideResult(side, refusal="why")])) is None


def test_curves(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    sides = (Side("whole", "partitioned"), Side("torch eager", "torch eager"), Side("budget", "partitioned", share=0.5))
    results = [SideResult(sides[0], [SAMPLE, replace(SAMPLE, seconds=2.5)]), SideResult(sides[1], [SAMPLE]),
               SideResult(sides[2], refusal="too small")]
    budgets.draw(CaseResult(case(*sides), results), tmp_path / "some.png")
    budgets.draw(CaseResult(case(*sides), [SideResult(s) for s in sides]), tmp_path / "none.png")
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("some.png", "none.png"))


def test_a_case_that_is_not_there() -> None:
    with pytest.raises(UsageError, match="case 'batch' is not in suite 'depth-first'; it has batch-128"):
        find_suite("depth-first").only(["batch"])
