"""Time against memory: the table and the curve of a case that is measured under memory budgets."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from benchmarks.curves import replace_file
from benchmarks.results import CaseResult, SideResult
from benchmarks.tables import seconds, table_of, two_lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMNS = ("time s", "ratio", "memory\nMB", "ratio", "process\nMB", "budget\nMB", "depth-first", "error")
_LEGEND = (
    "memory: the peak over the idle process, which holds network, input and room for the output, without what rests "
    "in mapped files; "
    "process: the same peak from nothing, which a budget is for; ratios to {first}; "
    "depth-first: axis/thickness of the slabs, and in how many chains; "
    "error: max|a-b| / max|b| from float64"
)
WIDTH = 112
"""Columns of text that the table needs."""

_MARGIN_BYTES = 2 * 2**20
_OWN, _OTHERS = "#b5523b", ("#3b6fb5", "#3f8f5f", "#8a5fb0", "#a08030")


def table(result: CaseResult) -> Table:
    """The case as a table: medians, below them the lowest and the highest; refusals and failures in the caption."""
    notes = [_LEGEND.format(first=result.case.sides[0].name), *result.notes]
    for side in result.sides:
        notes += [f"{side.side.name}: {text}" for text in (side.refusal, side.failure) if text]
        notes += [f"{side.side.name}: {text}" for text in _overruns(side)]
    return table_of(result, _COLUMNS, [_cells(side, result.sides[0]) for side in result.sides], notes)


def _cells(result: SideResult, whole: SideResult) -> Sequence[str]:
    budget = "" if result.budget is None else f"{result.budget / 1e6:.0f}"
    if not result.samples:
        state = "refused" if result.refusal else "failed" if result.failure else "not run"
        return (state, "", "", "", "", budget)
    samples = result.samples
    return (
        two_lines([s.seconds for s in samples], 1, 2),
        _ratio(seconds(result), seconds(whole)),
        two_lines([s.rise_bytes for s in samples], 1e6, 0),
        _ratio(_rise(result), _rise(whole)),
        two_lines([s.peak_bytes for s in samples], 1e6, 0),
        budget,
        short_schedule(samples[-1].schedule),
        "" if result.difference is None else f"{result.difference:.1e}",
    )


def _overruns(result: SideResult) -> list[str]:
    """What a process held beyond its budget, while it ran or before."""
    if result.budget is None or not result.samples:
        return []
    running = max(s.peak_bytes for s in result.samples) - result.budget
    opening = max(s.opening_bytes for s in result.samples) - result.budget
    found = [f"{running / 1e6:.0f} MB over its budget"] if running > 0 else []
    return found + ([f"{opening / 1e6:.0f} MB over its budget while it was planned"] if opening > 0 else [])


def short_schedule(schedule: str | None) -> str:
    """`depth/32,32,32 2 in files` as `depth/32 x3, 2 in files`; nothing where the volume is taken whole."""
    found = re.fullmatch(r"(\w+)/([\d,]+)(?: (.*))?", schedule or "")
    if found is None:
        return schedule or ""
    cells = found[2].split(",")
    kinds = sorted(set(cells), key=lambda n: -int(n))
    text = " ".join(f"{n} x{cells.count(n)}" for n in kinds)
    return f"{found[1]}/{text}" + (f", {found[3]}" if found[3] else "")


def least(result: CaseResult) -> int | None:
    """The budget that refused sides were told to give, and a little more, for no two processes are quite alike."""
    texts = [side.refusal for side in result.sides if side.refusal]
    found = [re.search(r"needs at least ([\d.]+) (GiB|MiB)", text) for text in texts]
    bytes_ = [float(match[1]) * (2**30 if match[2] == "GiB" else 2**20) for match in found if match]
    return round(max(bytes_)) + _MARGIN_BYTES if bytes_ else None


def _rise(result: SideResult) -> float | None:
    return statistics.median(s.rise_bytes for s in result.samples) if result.samples else None


def _ratio(value: float | None, whole: float | None) -> str:
    return f"{value / whole:.2f}" if value is not None and whole else ""


def draw(result: CaseResult, path: Path) -> None:
    """Draw seconds over memory: the whole volume and the budgets joined by a line, a mark for each other side.

    Raises:
        ImportError: without matplotlib.
        OSError: when the path cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    measured = [side for side in result.sides if side.samples]
    own = [side for side in measured if side.side.own]
    _mark(axes, sorted(own, key=lambda s: _rise(s) or 0), "whole shards, default and budgets", _OWN, "o-")
    for place, side in enumerate(s for s in measured if s not in own):
        _mark(axes, [side], side.side.name, _OTHERS[place % len(_OTHERS)], "sD^v"[place % 4])
    for side in own:
        axes.annotate(side.side.name, (_megabytes(side), seconds(side) or 0), (5, 5), textcoords="offset points",
                      fontsize="small", color=_OWN)
    axes.set(title=f"{result.case.name}: {result.case.what}", xlabel="peak memory over the idle process, MB",
             ylabel="seconds")
    axes.title.set_fontsize("medium")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    if measured:
        axes.legend(frameon=False)
    replace_file(path, lambda file: figure.savefig(file, format="png", dpi=120))


def _mark(axes: Axes, sides: Sequence[SideResult], label: str, colour: str, style: str) -> None:
    """Medians, and bars from the lowest to the highest sample."""
    if not sides:
        return
    middles = [seconds(side) or 0 for side in sides]
    times = [[s.seconds for s in side.samples] for side in sides]
    below = [middle - min(found) for middle, found in zip(middles, times, strict=True)]
    above = [max(found) - middle for middle, found in zip(middles, times, strict=True)]
    axes.errorbar([_megabytes(side) for side in sides], middles, (below, above), fmt=style, color=colour, label=label,
                  markersize=5, linewidth=1)


def _megabytes(side: SideResult) -> float:
    return (_rise(side) or 0) / 1e6
