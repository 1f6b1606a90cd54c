"""The curves of a training run: a table (CSV) and a picture (PNG) of loss and Dice coefficients."""

from __future__ import annotations

import csv
import io
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

_COLOURS = {"liver": "#b5523b", "lesion": "#3b6fb5"}
_WINDOW = 20
"""Steps over which the picture's smooth line takes the mean."""


@dataclass(frozen=True)
class Row:
    """One step.

    Args:
        step: counted from 1.
        seconds: since the start, the time of earlier parts of a resumed run included.
        liver, lesion: Dice coefficients on held-out volumes; None where none were measured.
    """

    step: int
    seconds: float
    learning_rate: float
    loss: float
    liver: float | None = None
    lesion: float | None = None


def rows_from(found: Sequence[Mapping[str, Any]]) -> list[Row]:
    """The rows that a checkpoint has kept as plain data."""
    return [Row(**row) for row in found]


def plain(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows as plain data."""
    return [asdict(row) for row in rows]


def write_table(rows: Sequence[Row], path: Path) -> None:
    """Write the CSV; numbers in full, so that runs can be compared.

    Raises:
        OSError: when the path cannot be written.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(Row.__dataclass_fields__), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: "" if value is None else value for key, value in asdict(row).items()} for row in rows)
    replace_file(path, lambda file: file.write(text.getvalue().encode()))


def read_table(path: Path) -> list[Row]:
    """The rows of a CSV that `write_table` has written."""
    with path.open(newline="", encoding="utf-8") as file:
        return [Row(int(line["step"]), float(line["seconds"]), float(line["learning_rate"]), float(line["loss"]),
                    float(line["liver"]) if line["liver"] else None, float(line["lesion"]) if line["lesion"] else None)
                for line in csv.DictReader(file)]


def draw(rows: Sequence[Row], title: str, path: Path) -> None:
    """Draw the loss of every step with its running mean, and the Dice coefficients below it.

    Raises:
        ImportError: without matplotlib.
        OSError: when the path cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True)
    figure.suptitle(title, fontsize="medium")
    steps, losses = [row.step for row in rows], [row.loss for row in rows]
    upper.plot(steps, losses, color="0.75", linewidth=0.8, label="each step")
    upper.plot(steps, running_mean(losses), color="black", label=f"mean of {_WINDOW} steps")
    upper.set(ylabel="loss", yscale="log")
    upper.legend(frameon=False)
    for name, colour in _COLOURS.items():
        points = [(row.step, value) for row in rows if (value := getattr(row, name)) is not None]
        label = name if not points else f"{name}: {points[-1][1]:.3f}"
        lower.plot(*zip(*points, strict=True) if points else ([], []), "o-", color=colour, markersize=3, label=label)
    lower.set(xlabel="step", ylabel="Dice on held-out volumes", ylim=(0, 1))
    lower.axhline(0.9, color="0.75", linewidth=0.8, linestyle="--")
    lower.legend(frameon=False, loc="lower right")
    replace_file(path, lambda file: figure.savefig(file, format="png", dpi=120))


def running_mean(values: Sequence[float]) -> list[float]:
    """The mean of each value and up to ten on either side."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    starts, ends = np.maximum(places - _WINDOW // 2, 0), np.minimum(places + _WINDOW // 2 + 1, len(values))
    return list((sums[ends] - sums[starts]) / (ends - starts))


def replace_file(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write beside and rename, so that a reader never sees half a file."""
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with beside.open("wb") as file:
            write(file)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
