"""Halos over links of several delays: two gloo ranks, three ways side by side in one run.

    plain       every exchange is waited for
    overlapped  interiors are computed while halos travel
    planned     as the planner chooses when it is told of the delay: deeper halos, replicated layers, interiors first

Ranks have one thread each.  What `Plan.time` says of all stands beside the measurement.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
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


WAYS = ("plain", "overlapped", "planned")


@dataclass(frozen=True)
class Sample:
    """Every way's seconds of the slowest rank in every run, its forecast, and what the planner chose."""

    extent: int
    delay: float
    seconds: dict[str, tuple[float, ...]]
    forecast: dict[str, float]
    note: str

    def ratio(self, way: str) -> float:
        """A way over plain exchanges, of the medians."""
        return statistics.median(self.seconds[way]) / statistics.median(self.seconds["plain"])

    def ratio_forecast(self, way: str) -> float:
        """The same as forecast."""
        return self.forecast[way] / self.forecast["plain"]


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
                    console.print(f"{extent}^3, {1e3 * sample.delay:g} ms: overlapped "
                                  f"{sample.ratio('overlapped'):.2f}, planned {sample.ratio('planned'):.2f} "
                                  f"({sample.note})")
            except pt.PartitionError as error:
                raise UsageError(str(error)) from None
    console.print(table(found, options))
    if options.output is not None:
        options.output.write_text(json.dumps([asdict(sample) for sample in found], indent=1) + "\n")
    return 0


def _measured(extent: int, folder: Path, options: Options) -> Iterator[Sample]:
    shape = (1, 1, extent, extent, extent)
    model = export(UNetConfig(norm="batch", down="maxpool").build(), shape, folder / f"{extent}.onnx")
    same = [pt.partition(model, mesh=options.mesh, overlap=overlap) for overlap in (False, True)]
    inputs = {INPUT_NAME: np.random.default_rng(0).standard_normal(shape, dtype=np.float32)}
    profile = pt.Profile.find(options.profile)
    for delay in options.delays:
        link = pt.Link(delay, BANDWIDTH) if delay else None
        planned = pt.partition(model, mesh=options.mesh, devices=same[0].mesh.size, backend="gloo",
                               profile=_delayed(profile, delay))
        assert planned.choice is not None
        plans = dict(zip(WAYS, [*same, planned], strict=True))
        forecast = {way: plan.time(profile, "gloo", 1, link).seconds for way, plan in plans.items()}
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        with ExitStack() as stack:
            sessions = {way: stack.enter_context(plan.session("gloo", threads=1, link=link))
                        for way, plan in plans.items()}
            for repeat in range(options.repeats + 1):
                results = {}
                for way in WAYS if repeat % 2 else WAYS[::-1]:
                    results[way] = next(iter(sessions[way].run(inputs).values()))
                    if repeat:
                        seconds[way].append(_slowest(sessions[way]))
                for way in WAYS[1:]:
                    _check(results["plain"], results[way])
        yield Sample(extent, delay, {way: tuple(found) for way, found in seconds.items()}, forecast,
                     planned.choice.chosen.note or "nothing else")


def _delayed(profile: pt.Profile, delay: float) -> pt.Profile:
    """The profile of a machine whose messages take so much longer."""
    if not delay:
        return profile
    return replace(profile, links={**profile.links, "gloo": pt.Link(delay, BANDWIDTH)})


def _slowest(session: pt.Session) -> float:
    assert session.last_run is not None
    return max(rank.seconds for rank in session.last_run.ranks)


def _check(plain: np.ndarray, overlapped: np.ndarray) -> None:
    error = float(np.abs(plain - overlapped).max() / np.abs(plain).max())
    if not error < 1e-5:
        raise SideError(f"the result differs from that of plain exchanges by {error:.1e}")


def table(found: Sequence[Sample], options: Options) -> Table:
    """Medians and ranges of the three ways, and their ratios as measured and as forecast."""
    shown = Table(title=f"halos over slow links: U-Net, 4 levels, base 16, gloo {options.mesh}, 1 thread per rank",
                  box=SIMPLE_HEAD, title_justify="left", caption_justify="left",
                  caption=f"seconds of the slowest rank: median (least-most) of {options.repeats} runs, all in turn; "
                          "ratios to plain as measured, and as forecast")
    for column in ("volume", "delay", "plain", "overlapped", "ratio", "forecast", "planned", "ratio", "forecast"):
        shown.add_column(column, justify="left" if column == "volume" else "right", no_wrap=True)
    for sample in found:
        compared = [text for way in WAYS[1:] for text in (
            _spread(sample.seconds[way]), f"{sample.ratio(way):.2f}", f"{sample.ratio_forecast(way):.2f}")]
        shown.add_row(f"{sample.extent}^3", f"{1e3 * sample.delay:g} ms", _spread(sample.seconds["plain"]), *compared)
    return shown


def _spread(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds):.3f} ({min(seconds):.3f}-{max(seconds):.3f})"
