"""A picture of a suite: for every case the seconds and the memory of every side, as bars with their ranges."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.curves import replace_file
from benchmarks.results import CaseResult, Results, SideResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_OWN, _OTHERS = "#b5523b", "#9fb3c8"
_ROW_INCHES, _CASE_INCHES = 0.24, 0.75


def draw(results: Results, path: Path) -> None:
    """Draw the cases below one another; sides that were not measured say why.

    Raises:
        ImportError: without matplotlib.
        OSError: when the path cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    heights = [_CASE_INCHES + _ROW_INCHES * len(case.sides) for case in results.cases]
    figure = Figure(figsize=(10, sum(heights)), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(results.cases), 2, squeeze=False, height_ratios=heights, sharey="row")
    for case, (left, right) in zip(results.cases, panels, strict=True):
        _bars(left, case, "seconds", [[s.seconds for s in side.samples] for side in case.sides])
        _bars(right, case, "memory over idle, MB", [[s.rise_bytes / 1e6 for s in side.samples] for side in case.sides])
        left.set_title(f"{case.case.name}: {case.case.what}", fontsize="small", loc="left")
    replace_file(path, lambda file: figure.savefig(file, format="png", dpi=110))


def _bars(axes: Axes, case: CaseResult, label: str, values: Sequence[Sequence[float]]) -> None:
    """A bar for each side at its median, a line from its lowest to its highest sample."""
    places = range(len(values))
    most = max((max(found) for found in values if found), default=1.0) or 1.0
    for place, side, found in zip(places, case.sides, values, strict=True):
        if not found:
            axes.text(0.01 * most, place, _state(side), va="center", fontsize="x-small", color="0.4")
            continue
        middle = statistics.median(found)
        axes.barh(place, middle, color=_OWN if side.side.own else _OTHERS, height=0.7)
        axes.plot([min(found), max(found)], [place, place], color="0.2", linewidth=1)
        axes.text(max(found) + 0.01 * most, place, f"{middle:.3g}", va="center", fontsize="x-small")
    axes.set_yticks(list(places), [side.side.name for side in case.sides], fontsize="small")
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.set_xlim(0, 1.12 * most)
    axes.set_xlabel(label, fontsize="x-small")
    axes.tick_params(axis="x", labelsize="x-small")
    axes.spines[["top", "right"]].set_visible(False)


def _state(side: SideResult) -> str:
    text = side.state
    return text if len(text) < 60 else f"{text[:57]}..."
