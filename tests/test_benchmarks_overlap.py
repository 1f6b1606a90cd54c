"""The table of overlaps: both sides with medians, ranges, ratios and forecasts; bad options are refused."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.__main__ import main
from benchmarks.overlaps import WAYS, Options, Sample, table

OPTIONS = Options((64,), (0.0, 0.002), "depth=2", 3, None, None)


def test_the_table_has_both_sides() -> None:
    seconds = {"plain": (0.3, 0.2, 0.4), "overlapped": (0.24, 0.27, 0.25), "planned": (0.21, 0.2, 0.22)}
    found = [Sample(64, 0.002, seconds, {"plain": 0.2, "overlapped": 0.1, "planned": 0.08}, "deeper")]
    assert [found[0].ratio(way) for way in WAYS] == pytest.approx([1.0, 0.25 / 0.3, 0.7])
    assert [found[0].ratio_forecast(way) for way in WAYS] == pytest.approx([1.0, 0.5, 0.4])
    console = Console(width=130, file=io.StringIO())
    console.print(table(found, OPTIONS))
    text = console.file.getvalue()
    assert all(said in text for said in ("64^3", "2 ms", "0.300 (0.200-0.400)", "0.250 (0.240-0.270)", "0.83", "0.50",
                                         "0.210 (0.200-0.220)", "0.70", "0.40"))


@pytest.mark.parametrize(("words", "said"), [
    (["--sizes", "8"], "--sizes 8"),
    (["--delays", "-1"], "--delays"),
    (["--repeats", "0"], "--repeats 0"),
    (["--sizes", "16", "--mesh", "depth=99"], "depth"),
])
def test_bad_options_are_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["overlap", *words]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_end_to_end(tmp_path: Path) -> None:
    output = tmp_path / "figures.json"
    assert main(["overlap", "--sizes", "32", "--delays", "0", "5", "--repeats", "1", "--output", str(output)]) == 0
    figures = json.loads(output.read_text())
    assert [sample["delay"] for sample in figures] == [0.0, 0.005]
    assert all(len(sample["seconds"][way]) == 1 for sample in figures for way in WAYS)
