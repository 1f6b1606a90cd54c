"""A forecast for many devices as curves, one panel per figure; needs matplotlib."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

from partitioner.planner.scaling import Row, Scaling, size_words

PANELS: tuple[tuple[str, Callable[[Row], float | None]], ...] = (
    ("seconds", lambda row: row.seconds),
    ("efficiency, strong scaling", lambda row: row.efficiency),
    ("memory per device, GiB", lambda row: row.memory_bytes / 2**30),
    ("sent per device, GiB", lambda row: row.sent_bytes / 2**30),
    ("messages per device", lambda row: float(row.messages)),
)
"""Titles, and the figure of a row."""


def draw(scaling: Scaling) -> bytes:
    """The picture as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(13, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(2, 3).flat)
    sizes = list(dict.fromkeys(row.size for row in scaling.rows))
    groups = {size_words(size): [row for row in scaling.rows if row.size == size] for size in sizes}
    for axes, (title, of) in zip(panels, PANELS, strict=False):
        for name, rows in groups.items():
            _curve(axes, name, [(row.devices, of(row), row.fits is not False) for row in rows])
        _finish(axes, title, logarithmic="efficiency" not in title)
    if scaling.memory is not None:
        panels[2].axhline(scaling.memory / 2**30, color="black", linewidth=0.8, linestyle="--")
    panels[0].legend(fontsize="small", title="hollow: does not fit" if scaling.memory is not None else None)
    _last(panels[-1], scaling)
    figure.suptitle(f"forecast with the {'measured' if scaling.measured else 'estimated'} figures of profile "
                    f"'{scaling.profile}'")
    found = io.BytesIO()
    figure.savefig(found, format="png", dpi=110)
    return found.getvalue()


def _curve(axes: Any, name: str, points: Sequence[tuple[int, float | None, bool]]) -> None:
    known = [(devices, value, fits) for devices, value, fits in points if value is not None]
    (line,) = axes.plot([d for d, _, _ in known], [v for _, v, _ in known], label=name, linewidth=1.2)
    for devices, value, fits in known:
        axes.plot([devices], [value], marker="o", markersize=4, color=line.get_color(),
                  markerfacecolor=line.get_color() if fits else "white")


def _last(axes: Any, scaling: Scaling) -> None:
    """The largest cubes where the memory is limited, else weak scaling."""
    if scaling.largest:
        cubes = [(cube.devices, float(cube.size[0]), True) for cube in scaling.largest if cube.size is not None]
        _curve(axes, "", cubes)
        _finish(axes, "largest cube that fits, cells along an axis", logarithmic=True)
        return
    shares: dict[float, list[Row]] = {}
    for row in scaling.rows:
        if row.weak_efficiency is not None:
            shares.setdefault(row.cells / row.devices, []).append(row)
    for share, rows in sorted(shares.items()):
        _curve(axes, f"{share:.3g} cells per device", [(row.devices, row.weak_efficiency, True) for row in rows])
    _finish(axes, "efficiency, weak scaling", logarithmic=False)
    if 0 < len(shares) <= 8:
        axes.legend(fontsize="x-small")


def _finish(axes: Any, title: str, logarithmic: bool) -> None:
    axes.set_title(title, fontsize="medium")
    axes.set_xlabel("devices")
    axes.set_xscale("log", base=2)
    if logarithmic:
        axes.set_yscale("symlog" if title.startswith(("messages", "sent")) else "log",
                        **({"linthresh": 1e-3} if title.startswith("sent") else {}))
    else:
        axes.set_ylim(bottom=0)
    axes.grid(visible=True, linewidth=0.4)
