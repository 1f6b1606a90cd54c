"""Runs a suite: every side in a process of its own, interleaved (A B C A B C), results kept as they come."""

from __future__ import annotations

import signal
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from benchmarks import budgets, limits, tables
from benchmarks.errors import SideError, SideRefusal, UsageError
from benchmarks.measure import compute, measure
from benchmarks.results import CaseResult, Results, SideResult
from benchmarks.suite import Side, Suite, exported
from benchmarks.suites import FLOAT64
from benchmarks.worker import Job


@dataclass(frozen=True)
class Options:
    """How a suite is run: processes per side, threads in all, seconds per step, and where the results go."""

    repeats: int
    threads: int
    timeout: float
    output: Path


def run_suite(suite: Suite, options: Options, console: Console) -> int:
    """Measure, print a table per case, and write the JSON after every sample; under budgets, draw the curve too.

    Returns 0, 1 when a side failed, or 130 when interrupted; what is finished is printed and kept.

    Raises:
        UsageError: when the suite's device is not here, or the output cannot be written.
    """
    results = Results.empty(suite, options.threads, options.repeats)
    if suite.device == "cuda":
        results.environment["machine"]["accelerator"] = _accelerator(suite)
    _save(results, options.output)
    # A polite end of the process, as a batch system asks for it, is an interruption like Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with tempfile.TemporaryDirectory() as folder:
            _measure_all(results, suite, options, Path(folder), console)
    except KeyboardInterrupt:
        results.interrupted = True
        _save(results, options.output)
    wide = Console(file=console.file, width=max(console.width, budgets.WIDTH, tables.WIDTH))
    for case in results.cases:
        if case.case.task == "budgets":
            wide.print(budgets.table(case))
            _draw(case, options.output, console)
        else:
            wide.print(tables.table(case, options.repeats))
    console.print(f"{'interrupted; ' if results.interrupted else ''}results in {options.output}", soft_wrap=True)
    if results.interrupted:
        return 130
    return 1 if results.failed else 0


def _accelerator(suite: Suite) -> str:
    import torch

    if not torch.cuda.is_available():
        raise UsageError(f"suite '{suite.name}' needs a CUDA device; torch sees none here")
    return torch.cuda.get_device_name()


def _measure_all(results: Results, suite: Suite, options: Options, folder: Path, console: Console) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        total = options.repeats * sum(len(case.sides) for case in results.cases)
        task = progress.add_task("", total=total)
        for case in results.cases:
            progress.update(task, description=f"{case.case.name}: exporting")
            model = exported(case.case, folder)
            if case.case.task == "budgets":
                progress.update(task, description=f"{case.case.name}: computing in float64")
                _compute_float64(results, case, model, options)
            for repeat in range(options.repeats):
                progress.update(task, description=f"{case.case.name}: the machine's limits")
                _measure_limits(case, suite, options)
                for side in case.sides:
                    if side.failure or side.refusal:
                        progress.advance(task)
                        continue
                    progress.update(task, description=f"{case.case.name}: {side.side.name}")
                    _measure_side(results, case, side, model, repeat, options)
                    _save(results, options.output)
                    _advance(progress, task, case.case.name, side, repeat, options.repeats)


def _measure_limits(case: CaseResult, suite: Suite, options: Options) -> None:
    """Once in every round, for other work on the machine changes them; what fails is noted once and left."""
    if not case.case.limits or any("limits of the machine" in note for note in case.notes):
        return
    case.work = case.work or limits.work(case.case)
    try:
        case.limits.append(limits.measured(options.threads, suite.device, case.case.dtype, options.timeout))
    except SideError as error:
        case.notes.append(str(error))


def _measure_side(
    results: Results, case: CaseResult, result: SideResult, model: Path, repeat: int, options: Options
) -> None:
    """One sample; the first one's output is compared with the reference."""
    side = result.side
    output, reference = _output(model, case, side), _output(model, case, _reference(case))
    try:
        if side.share is not None and result.budget is None:
            result.budget = _budget(case, side.share)
        job = _job(results, case, side, model, options, result.budget)
        result.samples.append(measure(job, side, options.timeout, None if repeat else output))
        if repeat == 0 and output != reference and reference.exists():
            result.difference = _difference(output, reference)
    except SideRefusal as refusal:
        result.refusal = str(refusal)
    except SideError as error:
        result.failure = str(error)


def _job(
    results: Results, case: CaseResult, side: Side, model: Path, options: Options, budget: int | None = None
) -> Job:
    tight = case.case.task == "budgets"
    return Job(results.suite, case.case.name, side.name, str(model), options.threads, budget, tight)


def _output(model: Path, case: CaseResult, side: Side) -> Path:
    return model.with_name(f"{case.case.name}-{side.name.replace('/', ' of ')}.npy")


def _reference(case: CaseResult) -> Side:
    return FLOAT64 if case.case.task == "budgets" else case.sides[0].side


def _compute_float64(results: Results, case: CaseResult, model: Path, options: Options) -> None:
    """The reference of errors; without it the sides are measured nevertheless."""
    job = _job(results, case, FLOAT64, model, options)
    try:
        compute(job, FLOAT64, options.timeout, _output(model, case, FLOAT64))
    except SideError as error:
        case.notes.append(f"no errors, for the reference in float64 failed: {error}")


def _budget(case: CaseResult, share: float) -> int:
    """The share of what the first side's first process took, over that process idle; for 0 the least possible."""
    if not share:
        least = budgets.least(case)
        if least is None:
            raise SideRefusal("no budget before it was refused, so what is the least is not known")
        return least
    whole = case.sides[0]
    if not whole.samples:
        raise SideError(f"there is no budget without a sample of '{whole.side.name}'")
    return whole.samples[0].idle_bytes + round(share * whole.samples[0].rise_bytes)


def _draw(case: CaseResult, output: Path, console: Console) -> None:
    picture = output.with_name(f"{output.stem}-{case.case.name}.png")
    try:
        budgets.draw(case, picture)
        console.print(f"curve in {picture}")
    except ImportError:
        console.print("no curve: matplotlib is not installed; pip install matplotlib")
    except OSError as error:
        raise UsageError(f"cannot write {picture}: {error.strerror or error}; choose another --output") from None


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
    if side.refusal:
        progress.console.print(f"{case}: {side.side.name}: refused: {side.refusal}", markup=False)
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
