"""A case as rows of text, for the terminal and for Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from benchmarks.bars import outcomes
from benchmarks.results import CaseResult, SideResult, spread

WIDTH = 130
"""Columns of text that the table needs."""

COLUMNS = ("time s", "ratio", "memory MB", "process MB", "forecast MB", "sent MB", "messages", "of limits %",
           "difference")
LEGEND = (
    "medians and ranges, processes per side: {repeats}; ratio: of the time to {first}; memory: rise over the idle "
    "processes, all of them together; process: the largest single one, and what the plan forecasts for its "
    "activations; of limits: arithmetic, and bytes read and written, against the best of this machine; "
    "difference: max|a-b| / max|b| from {first}"
)


def cells(result: CaseResult, side: SideResult) -> list[tuple[str, str]]:
    """A side's cells, each a value and its range; the first says why there are none."""
    if not side.samples:
        return [("failed" if side.failure else "not here" if side.refusal else "not run", "")]
    samples = side.samples
    counted, forecast = samples[-1].counted, samples[-1].forecast
    return [
        spread([s.seconds for s in samples], 1, 3),
        (_ratio(result, side), ""),
        spread([s.rise_bytes for s in samples], 1e6, 0),
        spread([s.process_bytes for s in samples], 1e6, 0),
        ("" if forecast is None else f"{forecast.rank_bytes / 1e6:.0f}", ""),
        ("" if counted is None else f"{counted.sent_bytes / 1e6:.2f}", ""),
        ("" if counted is None else str(counted.messages), ""),
        (_shares(result, side), ""),
        ("" if side.difference is None else f"{side.difference:.1e}", ""),
    ]


def notes(result: CaseResult) -> list[str]:
    """What stands below a table: limits, notes, missing and failed sides."""
    found = list(result.notes)
    if result.limits:
        best = max(result.limits, key=lambda limits: limits.flops)
        copied = max(limits.bytes for limits in result.limits)
        found.append(f"limits of this machine: {best.flops / 1e9:.0f} GFLOP/s ({best.best}), "
                     f"{copied / 1e9:.1f} GB/s copied, read and written together")
    if result.work is not None:
        flops, moved = result.work.flops / 1e9, result.work.bytes / 1e9
        found.append(f"the network: {flops:.1f} GFLOP, {moved:.2f} GB between layers")
    return found + [f"{side.side.name}: {side.state}" for side in result.sides if side.failure or side.refusal]


def table(result: CaseResult, repeats: int) -> Table:
    """The case for the terminal; notes and bars in the caption."""
    legend = LEGEND.format(first=result.case.sides[0].name, repeats=repeats)
    below = [legend, *notes(result), *(outcome.line for outcome in outcomes(result))]
    rows = [[_two_lines(*cell) for cell in cells(result, side)] for side in result.sides]
    return table_of(result, [name.replace(" MB", "\nMB").replace(" %", "\n%") for name in COLUMNS], rows, below)


def table_of(result: CaseResult, columns: Sequence[str], rows: Sequence[Sequence[str]], below: Sequence[str]) -> Table:
    """A table with a row of cells for each side of a case, and notes below it."""
    case = result.case
    found = Table(
        title=f"{case.name}: {case.what}",
        title_justify="left",
        caption=escape("\n".join(below)),
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    found.add_column("", no_wrap=True)
    for column in columns:
        found.add_column(column, justify="right", no_wrap=True)
    for side, texts in zip(result.sides, rows, strict=True):
        found.add_row(side.side.name, *texts)
    return found


def two_lines(values: Sequence[float], unit: float, digits: int) -> str:
    """The median, and below it the lowest and the highest."""
    return _two_lines(*spread(values, unit, digits))


def _two_lines(middle: str, between: str) -> str:
    return f"{middle}\n[dim]{between}[/dim]" if between else middle


def seconds(side: SideResult) -> float | None:
    """The median, None without a sample."""
    return statistics.median(s.seconds for s in side.samples) if side.samples else None


def shares(result: CaseResult, side: SideResult) -> tuple[float, float] | None:
    """Of the arithmetic and of the copy limit, 0 to 1; None where limits or samples are missing."""
    took = seconds(side)
    if not result.limits or result.work is None or not took:
        return None
    flops, copied = (max(getattr(limits, name) for limits in result.limits) for name in ("flops", "bytes"))
    return result.work.flops / took / flops, result.work.bytes / took / copied


def _shares(result: CaseResult, side: SideResult) -> str:
    found = shares(result, side)
    return "" if found is None else f"{100 * found[0]:.0f}, {100 * found[1]:.0f}"


def _ratio(result: CaseResult, side: SideResult) -> str:
    first, own = seconds(result.sides[0]), seconds(side)
    return f"{own / first:.2f}" if first and own else ""
