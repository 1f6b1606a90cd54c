"""The onnx package's own node tests, of every operator, partitioned and held against the outputs that they state."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from benchmarks.conformance_cases import ONNXRUNTIME_SAYS, Result, load_cases
from benchmarks.conformance_pool import check_all
from benchmarks.conformance_reasons import REASONS
from benchmarks.errors import UsageError

OUTCOMES = {
    "sharded": "exact, on some mesh with nothing gathered",
    "gathered": "exact, but on every mesh a rule gathers or replicates something",
    "replicated": "exact, but a node has no rule: every rank computes it whole",
    "unsplit": "exact, no axis has two cells that a mesh could split",
    "refused": "refused before any work, for a reason below",
    "failed": "wrong, crashed, or refused for no reason below",
}

EXACT = ("sharded", "gathered", "replicated", "unsplit")
"""Outcomes with the right result."""


@dataclass(frozen=True)
class Options:
    """What to run.

    Args:
        text: only cases whose name contains it.
        jobs: processes side by side.
        timeout: seconds after which a case counts as stuck.
        output: JSON file for all results.
    """

    text: str = ""
    jobs: int = 1
    timeout: float = 120.0
    output: Path | None = None


def run_conformance(options: Options, console: Console) -> int:
    """Check all cases and show the result; 1 when any failed.

    Raises:
        UsageError: when no case has the text in its name.
    """
    names = [name for name in load_cases() if options.text in name]
    if not names:
        raise UsageError(f"--filter {options.text}: no node test has that in its name")
    results = _check_with_progress(names, options, console)
    for part in (operator_table(results), *summary(results)):
        console.print(part)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n")
        console.print(f"wrote {options.output}")
    return int(any(r.outcome == "failed" for r in results))


def _check_with_progress(names: Sequence[str], options: Options, console: Console) -> list[Result]:
    order = {name: i for i, name in enumerate(names)}
    found: list[Result] = []
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("node tests", total=len(names))
        for result in check_all(names, min(options.jobs, len(names)), options.timeout):
            found.append(result)
            progress.update(task, advance=1, description=f"node tests: {result.operator}")
    return sorted(found, key=lambda r: order[r.name])


def operator_table(results: Sequence[Result]) -> Table:
    """One row per operator."""
    table = Table(title="node tests of onnx, partitioned", title_justify="left", pad_edge=False)
    table.add_column("operator", overflow="fold", min_width=16)
    for name in ("cases", *EXACT):
        table.add_column(name, justify="right")
    table.add_column("refused", overflow="fold")
    table.add_column("constant inputs", justify="right")
    table.add_column("failed", justify="right")
    for operator in sorted({r.operator for r in results}):
        mine = [r for r in results if r.operator == operator]
        count = Counter(r.outcome for r in mine)
        refused = Counter(r.reason for r in mine if r.outcome == "refused")
        table.add_row(
            operator, str(len(mine)), *(_figure(count[name]) for name in EXACT),
            ", ".join(f"{n} {reason}" for reason, n in refused.most_common()),
            _figure(sum(r.constants > 0 for r in mine)), _figure(count["failed"]),
            style="bold red" if count["failed"] else "dim" if count["refused"] == len(mine) else "")
    return table


def _figure(n: int) -> str:
    return str(n) if n else ""


def summary(results: Sequence[Result]) -> list[Table | Text]:
    """Outcomes and reasons in all, and every failure."""
    count = Counter(r.outcome for r in results)
    outcomes = Table(title=f"{len(results)} cases on {sum(r.meshes for r in results)} meshes", title_justify="left",
                     pad_edge=False, show_header=False)
    for name, text in OUTCOMES.items():
        outcomes.add_row(name, str(count[name]), text, style="bold red" if name == "failed" and count[name] else "")
    reasons = Counter(r.reason for r in results if r.outcome == "refused")
    refused = Table(title="refused", title_justify="left", pad_edge=False, show_header=False)
    for reason in REASONS:
        if reasons[reason.name]:
            refused.add_row(reason.name, str(reasons[reason.name]), reason.explanation)
    lines = [Text(f"{r.name}: held against onnxruntime: {ONNXRUNTIME_SAYS[r.name]}")
             for r in results if r.name in ONNXRUNTIME_SAYS]
    lines += [Text(f"FAILED {r.name} ({r.operator}): {r.detail}", style="red") for r in results
              if r.outcome == "failed"]
    return [outcomes, *([refused] if reasons else []), *lines]
