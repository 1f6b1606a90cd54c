"""What a training run says while it goes on and at its end."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.curves import Row
from benchmarks.train_options import TrainOptions


class Reporter:
    """A bar of progress and a line per evaluation, from the first process alone.

    Args:
        speaks: whether this is the first process.
    """

    def __init__(self, speaks: bool, options: TrainOptions, done: int = 0) -> None:
        self._options = options
        self._console = Console(stderr=options.json, quiet=not speaks, highlight=False)
        self._progress = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                                  TimeElapsedColumn(), TimeRemainingColumn(), console=self._console, transient=True,
                                  disable=not (speaks and self._console.is_terminal))
        self._task = self._progress.add_task("training", total=options.steps, completed=done)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """A line of its own."""
        self._console.print(text, markup=False, soft_wrap=True)

    def show(self, row: Row) -> None:
        """A step is done."""
        self._progress.update(self._task, completed=row.step, description=f"loss {row.loss:.4f}")
        if row.liver is not None or row.lesion is not None:
            self.say(f"step {row.step} of {self._options.steps}, {row.seconds:.0f} s: loss {row.loss:.4f}, "
                     f"Dice of liver {_dice(row.liver)}, of lesion {_dice(row.lesion)}")


@dataclass(frozen=True)
class Figures:
    """How a run ended.

    Args:
        seconds: of all steps and evaluations, earlier parts of a resumed run included.
        peaks: the most memory that each process ever held, in bytes.
    """

    rows: Sequence[Row]
    interrupted: bool
    seconds: float
    peaks: tuple[int, ...]
    mesh: str
    replicas: int
    parameters: int

    def show(self, options: TrainOptions) -> None:
        """Print, as JSON or for people."""
        if options.json:
            sys.stdout.write(json.dumps(self.to_dict(options), indent=2) + "\n")
            return
        reporter = Reporter(True, options)
        if self.interrupted:
            reporter.say(f"interrupted after step {len(self.rows)}; --resume goes on from there")
            return
        last = self.rows[-1]
        reporter.say(f"{last.step} steps in {self.seconds:.0f} s on {self.mesh} x {self.replicas}: Dice of liver "
                     f"{_dice(last.liver)}, of lesion {_dice(last.lesion)} on {options.held_out} held-out volumes")
        reporter.say(f"peak memory of the {len(self.peaks)} processes: up to {max(self.peaks) / 1e6:.0f} MB each")
        for path in (options.curves, options.picture, options.model, options.checkpoint):
            if path.exists():
                reporter.say(f"  {path}")

    def to_dict(self, options: TrainOptions) -> dict[str, Any]:
        """Plain data: times in seconds, memory in bytes."""
        measured = [row for row in self.rows if row.liver is not None or row.lesion is not None]
        last = measured[-1] if measured else None
        return {
            "interrupted": self.interrupted, "steps": self.rows[-1].step, "loss": self.rows[-1].loss,
            "dice": None if last is None else {"step": last.step, "liver": last.liver, "lesion": last.lesion},
            "seconds": self.seconds, "mesh": self.mesh, "replicas": self.replicas, "processes": len(self.peaks),
            "peak_bytes": list(self.peaks), "parameters": self.parameters, "size": list(options.size),
            "filters": options.filters, "depth": options.depth, "output": str(options.output),
        }


def title(options: TrainOptions, mesh: str) -> str:
    """What a picture shows."""
    size = " x ".join(map(str, options.size))
    return f"3D U-Net, {options.filters} filters, {options.depth} levels, {size} voxels; mesh {mesh}"


def _dice(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3f}"
