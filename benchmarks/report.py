"""Files of results as Markdown, CSV and a picture."""

from __future__ import annotations

import csv
import io
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import budgets, charts
from benchmarks.bars import Outcome, outcomes
from benchmarks.curves import replace_file
from benchmarks.errors import UsageError
from benchmarks.results import CaseResult, Results, SideResult, load
from benchmarks.tables import COLUMNS, LEGEND, cells, notes, shares

BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"


def write_reports(files: Sequence[Path], folder: Path, into: Path | None, console: Console) -> int:
    """For every file NAME.json write NAME.md, NAME.csv and NAME.png into the folder.

    Args:
        files: results; all are read before anything is written.
        folder: made when missing.
        into: a Markdown file whose place for figures is filled with the bars and pictures of all files.
        console: says what was written.

    Raises:
        UsageError: for files that cannot be read or written.
    """
    found = [(path, load(path)) for path in files]
    if len({path.stem for path in files}) < len(files):
        raise UsageError("two of the files have the same name, and so would their reports; report them one by one")
    summaries: list[str] = []
    for path, results in found:
        picture = _draw(results, folder / f"{path.stem}.png", console)
        _write(folder / f"{path.stem}.csv", table_text(results), console)
        _write(folder / f"{path.stem}.md", markdown(results, picture and picture.name), console)
        link = picture and os.path.relpath(picture, (into or picture).parent)
        summaries.append(summary(results) + (f"\n![{results.suite}]({link})\n" if link else ""))
    if into is not None:
        _fill(into, "\n".join(summaries), console)
    return 0


# --- Markdown -----------------------------------------------------------------------------------------


def markdown(results: Results, picture: str | None) -> str:
    """The whole report: where and when, all bars, then every case with all its sides."""
    parts = [f"# Suite {results.suite}", summary(results)]
    if picture:
        parts.append(f"![times and memory]({picture})\n")
    return "\n\n".join(part.rstrip() for part in (*parts, *(_case(c, results.repeats) for c in results.cases))) + "\n"


def summary(results: Results) -> str:
    """Where and when, and all bars in one table."""
    machine = results.environment["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in results.environment["versions"].items())
    where = [machine["processor"], f"{machine['cores']} cores", f"{machine['memory_bytes'] / 2**30:.0f} GiB"]
    where += [machine["accelerator"]] if "accelerator" in machine else []
    text = (
        f"Suite `{results.suite}`, {results.environment['started'][:10]}, commit "
        f"`{_short(results.environment['commit'])}`; {', '.join(where)}; {results.threads} threads in all, "
        f"processes per side, interleaved: {results.repeats}; load average before: {machine['load_average']:.1f}. "
        f"{versions}."
    )
    if results.interrupted:
        text += " **Interrupted: what was finished is here.**"
    found = [(case, outcome) for case in results.cases for outcome in outcomes(case)]
    if not found:
        return text + "\n"
    rows = [[case.case.name, *_bar(outcome)] for case, outcome in found]
    return f"{text}\n\n{_rows(('case', 'bar', 'found', 'at most', ''), rows)}"


def _short(commit: str | None) -> str:
    """`0a4a261d5b1c+changes`."""
    head, plus, changes = (commit or "unknown").partition("+")
    return f"{head[:12]}{plus}{changes}"


def _bar(outcome: Outcome) -> tuple[str, ...]:
    return outcome.bar.name, outcome.found, outcome.text(outcome.bar.most), outcome.verdict


def _case(result: CaseResult, repeats: int) -> str:
    rows = [[side.side.name, *(_cell(*cell) for cell in cells(result, side))] for side in result.sides]
    below = [LEGEND.format(first=result.case.sides[0].name, repeats=repeats), *notes(result)]
    listed = "\n".join(f"- {_escaped(text)}" for text in below)
    bars = "\n".join(f"- {_escaped(outcome.line)}" for outcome in outcomes(result))
    title = f"## {result.case.name}\n\n{result.case.what}"
    return f"{title}\n\n{_rows(('side', *COLUMNS), rows)}\n{listed}\n{bars}"


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([*row, *[""] * (len(head) - len(row))] for row in rows)]
    return "".join(f"| {' | '.join(_escaped(text) for text in line)} |\n" for line in lines)


def _cell(middle: str, between: str) -> str:
    return f"{middle} ({between})" if between else middle


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _fill(path: Path, text: str, console: Console) -> None:
    """Put the text between the two marks of a file, once each."""
    try:
        whole = path.read_text()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from None
    before, begin, rest = whole.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UsageError(f"{path}: has no place for figures; write '{BEGIN}' and '{END}' on lines of their own")
    _write(path, f"{before}{BEGIN}\n{text}{END}{after}", console)


# --- CSV and picture ----------------------------------------------------------------------------------

_NUMBERS = ("seconds", "first_seconds", "setup_seconds", "rise_bytes", "process_bytes", "peak_bytes")
_FIELDS = (
    "suite", "case", "side", "kind", "mesh", "backend", "processes", "samples",
    *(f"{name}_{which}" for name in _NUMBERS for which in ("median", "min", "max")),
    "sent_bytes", "messages", "rank_sent_bytes", "rank_messages", "arithmetic_share", "copy_share", "difference",
    "state",
)  # fmt: skip


def table_text(results: Results) -> str:
    """The CSV, a row for each side of each case; numbers in full."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=_FIELDS, lineterminator="\n", restval="")
    writer.writeheader()
    for case in results.cases:
        writer.writerows({"suite": results.suite, **_fields(case, side)} for side in case.sides)
    return text.getvalue()


def _fields(case: CaseResult, result: SideResult) -> dict[str, Any]:
    side = result.side
    found: dict[str, Any] = {"case": case.case.name, "side": side.name, "kind": side.kind, "mesh": side.mesh,
                             "backend": side.backend, "processes": side.processes, "samples": len(result.samples),
                             "state": "" if result.samples else result.state}
    if not result.samples:
        return found
    for name in _NUMBERS:
        values = [getattr(sample, name) for sample in result.samples]
        found |= {f"{name}_median": statistics.median(values), f"{name}_min": min(values), f"{name}_max": max(values)}
    counted, of_limits = result.samples[-1].counted, shares(case, result)
    if counted is not None:
        found |= {name: getattr(counted, name) for name in ("sent_bytes", "messages", "rank_sent_bytes",
                                                            "rank_messages")}
    if of_limits is not None:
        found |= {"arithmetic_share": of_limits[0], "copy_share": of_limits[1]}
    return found | ({} if result.difference is None else {"difference": result.difference})


def _draw(results: Results, path: Path, console: Console) -> Path | None:
    """The pictures; None where matplotlib is missing or nothing was measured."""
    if not any(side.samples for case in results.cases for side in case.sides):
        console.print("no picture: nothing was measured")
        return None
    try:
        _make_folder(path)
        charts.draw(results, path)
        for case in results.cases:
            if case.case.task == "budgets":
                budgets.draw(case, path.with_name(f"{path.stem}-{case.case.name}.png"))
    except ImportError:
        console.print('no picture: matplotlib is not installed; pip install "partitioner[plot]"', markup=False)
        return None
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}; choose another folder") from None
    console.print(f"wrote {path}", soft_wrap=True)
    return path


def _write(path: Path, text: str, console: Console) -> None:
    try:
        _make_folder(path)
        replace_file(path, lambda file: file.write(text.encode()))
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}; choose another folder") from None
    console.print(f"wrote {path}", soft_wrap=True)


def _make_folder(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
