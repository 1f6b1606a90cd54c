"""Forecast against measurement: peak memory, bytes, messages and seconds of runs, both sides of every case in one run.

Every case is a process of its own, with the allocator's settings of the command `partition run`.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import partitioner as pt
from benchmarks.cpu_clock import cpu_seconds_below
from benchmarks.errors import SideError, UsageError
from benchmarks.memory import ALLOCATOR
from benchmarks.models import INPUT_NAME, ResNetConfig, UNetConfig, export

_BATCH = UNetConfig(norm="batch", down="maxpool")
_INSTANCE = UNetConfig(norm="instance")
_FLAT = replace(_BATCH, dims=2, in_channels=3)
_RESIDUAL = ResNetConfig()

_NETWORKS = {
    "batch-64": (_BATCH, (1, 1, 64, 64, 64)),
    "batch-96": (_BATCH, (1, 1, 96, 96, 96)),
    "batch-128": (_BATCH, (1, 1, 128, 128, 128)),
    "instance-64": (_INSTANCE, (1, 1, 64, 64, 64)),
    "instance-96": (_INSTANCE, (1, 1, 96, 96, 96)),
    "instance-128": (_INSTANCE, (1, 1, 128, 128, 128)),
    "flat-512": (_FLAT, (1, 3, 512, 512)),
    "residual-128": (_RESIDUAL, (1, 1, 128, 128, 128)),
}


@dataclass(frozen=True)
class Forecast:
    """One way to run one network: `share` is the part of the whole's activations that a depth-first run may hold."""

    network: str
    mesh: str = "single"
    backend: str = "lockstep"
    share: float | None = None

    @property
    def name(self) -> str:
        """In words."""
        slabs = "" if self.share is None else f", slabs {self.share:g}"
        return f"{self.network}, {self.backend} {self.mesh}{slabs}"


CASES = (
    Forecast("batch-64"),
    Forecast("batch-96"),
    Forecast("batch-128"),
    Forecast("instance-64"),
    Forecast("instance-96"),
    Forecast("instance-128"),
    Forecast("flat-512"),
    Forecast("residual-128"),
    Forecast("batch-96", "depth=2"),
    Forecast("instance-96", "depth=2"),
    Forecast("batch-96", "single", "gloo"),
    Forecast("batch-96", "depth=2", "gloo"),
    Forecast("batch-128", "depth=2", "gloo"),
    Forecast("instance-96", "depth=2", "gloo"),
    Forecast("instance-96", "height=2", "gloo"),
    Forecast("flat-512", "height=2", "gloo"),
    Forecast("residual-128", "depth=2", "gloo"),
    Forecast("batch-96", share=0.5),
    Forecast("batch-128", share=0.4),
    Forecast("instance-96", share=0.6),
)


@dataclass(frozen=True)
class Figures:
    """What is forecast, and what is measured: bytes of the largest process, seconds as they pass and of CPUs.

    Args:
        first: the peak of the first run, in which kernels are compiled too.
    """

    peak: int
    sent: int
    messages: int
    seconds: float
    cpu: float
    first: int = 0


@dataclass(frozen=True)
class Options:
    """How the cases are run: threads per process, repeats in each, the profile (None: measured first)."""

    threads: int
    repeats: int
    profile: Path | None
    text: str
    output: Path | None


def run_forecasts(options: Options, console: Console) -> int:
    """Measure all cases and print the table; returns 1 when one failed.

    Raises:
        UsageError: for a filter that leaves no case, or a profile that cannot be read.
        SideError: when the calibration fails.
    """
    cases = [case for case in CASES if options.text in case.name]
    if not cases:
        raise UsageError(f"--filter '{options.text}' leaves no case")
    found: dict[Forecast, tuple[Figures, Figures]] = {}
    failed: dict[Forecast, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        profile = options.profile or _calibrated(Path(folder), options.threads, console)
        try:
            pt.Profile.load(profile)
        except pt.PartitionError as error:
            raise UsageError(str(error)) from None
        for case in cases:
            with console.status(case.name):
                try:
                    found[case] = _measured(case, Path(folder), profile, options)
                except SideError as error:
                    failed[case] = str(error)
    console.print(table(found, failed))
    if options.output is not None:
        rows = [{"case": c.name, "forecast": asdict(f), "measured": asdict(m)} for c, (f, m) in found.items()]
        options.output.write_text(json.dumps(rows, indent=1) + "\n")
    return 1 if failed else 0


def _calibrated(folder: Path, threads: int, console: Console) -> Path:
    path = folder / "profile.json"
    with console.status("calibrating"):
        run_python(["-m", "partitioner.cli", "calibrate", "--threads", str(threads), "-o", str(path)], threads)
    return path


def _measured(case: Forecast, folder: Path, profile: Path, options: Options) -> tuple[Figures, Figures]:
    network, shape = _NETWORKS[case.network]
    model = folder / f"{case.network}.onnx"
    if not model.exists():
        export(network.build(), shape, model)
    told = {"case": asdict(case), "model": str(model), "profile": str(profile), "threads": options.threads,
            "repeats": options.repeats}
    said = json.loads(run_python(["-m", "benchmarks.forecasts", json.dumps(told)], options.threads))
    return Figures(**said["forecast"]), Figures(**said["measured"])


def run_python(arguments: Sequence[str], threads: int) -> str:
    """Run Python and return what it prints.

    Raises:
        SideError: when it fails.
    """
    environment = {**os.environ, **ALLOCATOR, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False,
                          cwd=Path(__file__).parents[1])
    if done.returncode:
        raise SideError((done.stderr.strip().splitlines() or ["no reason given"])[-1])
    return done.stdout


# --- the table ----------------------------------------------------------------------------------------


def table(found: dict[Forecast, tuple[Figures, Figures]], failed: dict[Forecast, str]) -> Table:
    """Measured figures per case, forecast over measured, and the median of how far off they are."""
    shown = Table(title="forecast against measurement", box=SIMPLE_HEAD, title_justify="left", caption_justify="left",
                  caption="ratios are forecast / measured; seconds are wall time of the slowest rank, CPU time that of "
                          "all processes; peak: activations in the largest process, after its first run (and in the "
                          "first, which compiles kernels too)")
    for column in ("case", "peak MB", "ratio", "sent MB", "messages", "seconds", "ratio", "CPU s", "ratio"):
        shown.add_column(column, justify="left" if column == "case" else "right", no_wrap=True)
    for case, (forecast, measured) in found.items():
        sent = _exact(forecast.sent, measured.sent, lambda n: f"{n / 1e6:.1f}")
        messages = _exact(forecast.messages, measured.messages, str)
        shown.add_row(case.name, f"{measured.peak / 1e6:.0f} ({measured.first / 1e6:.0f})",
                      f"{forecast.peak / measured.peak:.2f}", sent, messages, f"{measured.seconds:.3f}",
                      f"{forecast.seconds / measured.seconds:.2f}", f"{measured.cpu:.3f}",
                      f"{forecast.cpu / measured.cpu:.2f}")
    for case, reason in failed.items():
        shown.add_row(f"{case.name} failed: {reason[:60]}")
    if found:
        off = [f"{100 * deviation(list(found.values()), name):.1f} %" for name in ("peak", "seconds", "cpu")]
        shown.add_section()
        shown.add_row("median off by", "", off[0], "", "", "", off[1], "", off[2])
    return shown


def _exact(forecast: int, measured: int, text: Callable[[int], str]) -> str:
    """A figure that must be met exactly."""
    return text(measured) if forecast == measured else f"{text(measured)}, forecast {forecast}"


def deviation(pairs: Sequence[tuple[Figures, Figures]], name: str) -> float:
    """Median of |forecast / measured - 1| of one figure."""
    return statistics.median(abs(getattr(f, name) / getattr(m, name) - 1) for f, m in pairs)


# --- the process of one case --------------------------------------------------------------------------


def main() -> int:
    """One case, told as JSON; prints both sides as JSON."""
    told = json.loads(sys.argv[1])
    case, threads = Forecast(**told["case"]), told["threads"]
    _, shape = _NETWORKS[case.network]
    plan = _plan(case, told["model"])
    time_ = plan.time(told["profile"], case.backend, threads)
    peak = plan.cost.peak_together if case.backend == "lockstep" else plan.cost.peak.max()
    forecast = Figures(int(peak), int(plan.cost.sent.sum()), int(plan.cost.messages.sum()), time_.seconds,
                       float((time_.compute + time_.communication).sum()) * threads)
    volume = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    room = {str(v.name): np.ones([int(n) for n in v.shape or ()], np.float32) for v in plan.model.graph.outputs}
    out = room if case.backend == "lockstep" else None  # what is measured is activations, in this process or in ranks
    runs: list[Figures] = []
    with plan.session(case.backend, threads=threads) as session:  # pyright: ignore
        for _ in range(told["repeats"] + 1):
            before = _cpu_seconds(case)
            session.run({INPUT_NAME: volume}, out=out)
            report = session.last_run
            assert report is not None
            runs.append(Figures(report.peak_bytes, sum(r.sent_bytes for r in report.ranks),
                                sum(r.messages for r in report.ranks), max(r.seconds for r in report.ranks),
                                _cpu_seconds(case) - before))
    steady = runs[1:]
    measured = Figures(max(r.peak for r in steady), steady[-1].sent, steady[-1].messages,
                       statistics.median(r.seconds for r in steady), statistics.median(r.cpu for r in steady),
                       runs[0].peak)
    sys.stdout.write(json.dumps({"forecast": asdict(forecast), "measured": asdict(measured)}))
    return 0


def _plan(case: Forecast, model: str) -> pt.Plan:
    whole = pt.partition(model, mesh=case.mesh)
    if case.share is None:
        return whole
    try:
        return pt.partition(model, mesh=case.mesh, memory="1MiB")
    except pt.PartitionError as refusal:
        found = re.search(r"\(([\d.]+) (GiB|MiB) of it for the process", str(refusal))
        if found is None:
            raise
    held = float(found[1]) * (2**30 if found[2] == "GiB" else 2**20)
    return pt.partition(model, mesh=case.mesh, memory=int(held + case.share * whole.cost.peak.max()))


def _cpu_seconds(case: Forecast) -> float:
    """CPU time of the processes that compute so far."""
    return time.process_time() if case.backend == "lockstep" else cpu_seconds_below()


if __name__ == "__main__":
    sys.exit(main())
