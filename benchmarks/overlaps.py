"""Interior before boundary: two gloo ranks with and without it, side by side in one run, over links of several delays.

Ranks have one thread each.  What `Plan.time` says of both stands beside the measurement.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import partitioner as pt
from benchmarks.errors import SideError, UsageError
from benchmarks.models import INPUT_NAME, UNetConfig, export

BANDWIDTH = 1e10
"""Bytes per second of a delayed link: the delay is what counts."""


@dataclass(frozen=True)
class Options:
    """Extents of the cubes, delays in seconds, the mesh, repeats after one to warm up, and the profile of forecasts."""

    extents: tuple[int, ...]
    delays: tuple[float, ...]
    mesh: str
    repeats: int
    profile: Path | None
    output: Path | None


@dataclass(frozen=True)
class Sample:
    """Seconds of the slowest rank in every run, without and with overlap, and what was forecast."""

    extent: int
    delay: float
    plain: tuple[float, ...]
    overlapped: tuple[float, ...]
    plain_forecast: float
    overlapped_forecast: float

    @property
    def ratio(self) -> float:
        """With over without, of the medians."""
        return statistics.median(self.overlapped) / statistics.median(self.plain)

    @property
    def ratio_forecast(self) -> float:
        """The same as forecast."""
        return self.overlapped_forecast / self.plain_forecast


def run_overlaps(options: Options, console: Console) -> int:
    """Measure all extents and delays and print the table.

    Raises:
        UsageError: for a profile that cannot be read, or a mesh that does not fit.
        SideError: when the two sides do not agree.
    """
    found: list[Sample] = []
    with tempfile.TemporaryDirectory() as folder:
        for extent in options.extents:
            try:
                for sample in _measured(extent, Path(folder), options):
                    found.append(sample)
                    console.print(f"{extent}^3, {1e3 * sample.delay:g} ms: {sample.ratio:.2f}")
            except pt.PartitionError as error:
                raise UsageError(str(error)) from None
    console.print(table(found, options))
    if options.output is not None:
        options.output.write_text(json.dumps([asdict(sample) for sample in found], indent=1) + "\n")
    return 0


def _measured(extent: int, folder: Path, options: Options) -> Iterator[Sample]:
    shape = (1, 1, extent, extent, extent)
    model = export(UNetConfig(norm="batch", down="maxpool").build(), shape, folder / f"{extent}.onnx")
    plans = [pt.partition(model, mesh=options.mesh, overlap=overlap) for overlap in (False, True)]
    inputs = {INPUT_NAME: np.random.default_rng(0).standard_normal(shape, dtype=np.float32)}
    for delay in options.delays:
        link = pt.Link(delay, BANDWIDTH) if delay else None
        forecasts = [plan.time(options.profile, "gloo", 1, link).seconds for plan in plans]
        seconds: tuple[list[float], list[float]] = ([], [])
        with ExitStack() as stack:
            sessions = [stack.enter_context(plan.session("gloo", threads=1, link=link)) for plan in plans]
            for repeat in range(options.repeats + 1):
                order = (0, 1) if repeat % 2 else (1, 0)
                results = {}
                for side in order:
                    results[side] = next(iter(sessions[side].run(inputs).values()))
                    if repeat:
                        seconds[side].append(_slowest(sessions[side]))
                _check(results[0], results[1])
        yield Sample(extent, delay, tuple(seconds[0]), tuple(seconds[1]), *forecasts)


def _slowest(session: pt.Session) -> float:
    assert session.last_run is not None
    return max(rank.seconds for rank in session.last_run.ranks)


def _check(plain: np.ndarray, overlapped: np.ndarray) -> None:
    error = float(np.abs(plain - overlapped).max() / np.abs(plain).max())
    if not error < 1e-5:
        raise SideError(f"with overlap the result differs by {error:.1e}")


def table(found: Sequence[Sample], options: Options) -> Table:
    """Medians and ranges of both sides, and the forecasts."""
    shown = Table(title=f"interior before boundary: U-Net, 4 levels, base 16, gloo {options.mesh}, 1 thread per rank",
                  box=SIMPLE_HEAD, title_justify="left", caption_justify="left",
                  caption=f"seconds of the slowest rank: median (least-most) of {options.repeats} runs, both sides in "
                          "turn; ratios are with / without")
    for column in ("volume", "delay", "without", "with", "ratio", "forecast without", "with", "ratio"):
        shown.add_column(column, justify="left" if column == "volume" else "right", no_wrap=True)
    for sample in found:
        shown.add_row(f"{sample.extent}^3", f"{1e3 * sample.delay:g} ms", _spread(sample.plain),
                      _spread(sample.overlapped), f"{sample.ratio:.2f}", f"{sample.plain_forecast:.3f}",
                      f"{sample.overlapped_forecast:.3f}", f"{sample.ratio_forecast:.2f}")
    return shown


def _spread(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds):.3f} ({min(seconds):.3f}-{max(seconds):.3f})"
