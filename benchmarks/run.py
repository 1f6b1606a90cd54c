"""Runs a suite: every side in a process of its own, interleaved (A B C A B C), results kept as they come."""

from __future__ import annotations

import signal
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from benchmarks.errors import SideError, UsageError
from benchmarks.measure import measure
from benchmarks.results import CaseResult, Results, SideResult, table
from benchmarks.suite import Suite, exported
from benchmarks.worker import Job


@dataclass(frozen=True)
class Options:
    """How a suite is run: processes per side, threads in all, seconds per step, and where the results go."""

    repeats: int
    threads: int
    timeout: float
    output: Path


def run_suite(suite: Suite, options: Options, console: Console) -> int:
    """Measure, print a table per case, and write the JSON after every sample.

    Returns 0, 1 when a side failed, or 130 when interrupted; what is finished is printed and kept.

    Raises:
        UsageError: when the output cannot be written.
    """
    results = Results.empty(suite, options.threads, options.repeats)
    _save(results, options.output)
    # A polite end of the process, as a batch system asks for it, is an interruption like Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with tempfile.TemporaryDirectory() as folder:
            _measure_all(results, options, Path(folder), console)
    except KeyboardInterrupt:
        results.interrupted = True
        _save(results, options.output)
    for case in results.cases:
        console.print(table(case))
    console.print(f"{'interrupted; ' if results.interrupted else ''}results in {options.output}")
    if results.interrupted:
        return 130
    return 1 if results.failed else 0


def _measure_all(results: Results, options: Options, folder: Path, console: Console) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        total = options.repeats * sum(len(case.sides) for case in results.cases)
        task = progress.add_task("", total=total)
        for case in results.cases:
            progress.update(task, description=f"{case.case.name}: exporting")
            model = exported(case.case, folder)
            for repeat in range(options.repeats):
                for side in case.sides:
                    if side.failure:
                        progress.advance(task)
                        continue
                    progress.update(task, description=f"{case.case.name}: {side.side.name}")
                    _measure_side(results, case, side, model, repeat, options)
                    _save(results, options.output)
                    _advance(progress, task, case.case.name, side, repeat, options.repeats)


def _measure_side(
    results: Results, case: CaseResult, result: SideResult, model: Path, repeat: int, options: Options
) -> None:
    """One sample; the first one's output is compared with the first side's."""
    side = result.side
    job = Job(results.suite.name, case.case.name, side.name, str(model), options.threads)
    output, reference = (
        model.with_name(f"{case.case.name}-{name}.npy") for name in (side.name, case.sides[0].side.name)
    )
    try:
        result.samples.append(measure(job, side, options.timeout, None if repeat else output))
        if repeat == 0 and output != reference and reference.exists():
            result.difference = _difference(output, reference)
    except SideError as error:
        result.failure = str(error)


def _difference(output: Path, reference: Path) -> float:
    """max|a-b| / max|b|."""
    a, b = np.load(output, mmap_mode="r"), np.load(reference, mmap_mode="r")
    if a.shape != b.shape:
        raise SideError(f"yields the shape {a.shape}, not {b.shape}")
    found = float(np.abs(a - b).max() / np.abs(b).max())
    output.unlink()
    return found


def _advance(progress: Progress, task: TaskID, case: str, side: SideResult, repeat: int, repeats: int) -> None:
    progress.advance(task)
    if side.failure:
        progress.console.print(f"{case}: {side.side.name}: failed: {side.failure}", markup=False)
        return
    sample = side.samples[-1]
    progress.console.print(
        f"{case}: {side.side.name} ({repeat + 1} of {repeats}): {sample.seconds:.2f} s, "
        f"{sample.rise_bytes / 1e6:.0f} MB over {sample.idle_bytes / 1e6:.0f} MB idle"
    )


def _save(results: Results, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        results.save(path)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}; choose another --output") from None
