"""The contest of meshes: all of them take part, ratios are paired, and it runs."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.__main__ import main
from benchmarks.planner import CASES, Contest, Runs, meshes, table


def test_all_meshes_take_part() -> None:
    assert meshes(4, (9, 9)) == ["4x1", "2x2", "1x4"]
    assert len(meshes(4, (9, 9, 9))) == 6 and len(meshes(2, (9, 9, 9))) == 3
    assert meshes(4, (2, 9)) == ["2x2", "1x4"]
    assert len(CASES) == 6


def test_rounds_are_compared_with_one_another() -> None:
    slow = Runs("depth=2", 0.0, (2.2, 4.4, 1.0), (2.0, 2.0, 2.0))
    fast = Runs("height=2", 0.0, (2.0, 4.0, 1.0), (1.0, 1.0, 1.0))
    contest = Contest("n", 2, "depth=2", "", (slow, fast))
    assert contest.best is fast and contest.ratio("seconds") == pytest.approx(1.1) and contest.ratio("cpu") == 2
    assert not contest.is_near and Contest("n", 2, "height=2", "", (slow, fast)).is_near
    console = Console(width=130, file=io.StringIO())
    console.print(table([contest]))
    assert "NO" in console.file.getvalue() and "0 of 1" in console.file.getvalue()


def test_a_contest_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--filter", "image", "--shrink", "20", "--ranks", "2", "--rounds", "2", "--processes", "1"]
    assert main(["planner", *words, "--output", str(tmp_path / "f.json")]) in (0, 1)
    assert "image" in capsys.readouterr().out
    (found,) = json.loads((tmp_path / "f.json").read_text())
    assert {"height=2", "width=2"} <= {runs["mesh"] for runs in found["runs"]}
    assert all(len(runs["seconds"]) == len(runs["cpu"]) == 2 for runs in found["runs"])


@pytest.mark.parametrize(("words", "said"), [
    (["--filter", "nothing like it"], "leaves no case"), (["--rounds", "0"], "--rounds 0"),
    (["--processes", "0"], "--processes 0"),
    (["--ranks", "0"], "--ranks 0"), (["--shrink", "0"], "--shrink 0"),
    (["--profile", "nowhere.json", "--filter", "image", "--shrink", "20"], "nowhere.json: cannot be read"),
])
def test_bad_options_are_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path,
                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["planner", *words]) == 2
    assert said in capsys.readouterr().err
