"""The command `partition run`: one run, a folder of cases, or a rank of a group."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from partitioner.console import ProgressBar, complain, print_json, say, vars_of
from partitioner.errors import AgreedError, ExecutionError, PartitionError

if TYPE_CHECKING:
    from partitioner.api import Backend, Progress
    from partitioner.cases import Case, CaseRuns
    from partitioner.files import FileRun
    from runtime.group import Place
    from runtime.session import RunReport

Result = TypeVar("Result")


def load_named_operators(names: Sequence[str]) -> None:
    """Import the user's own operators."""
    if names:
        from partitioner.ops.plugins import load_operators

        for name in names:
            load_operators(name)


def run_files(options: argparse.Namespace) -> int:
    """The command `run`; returns the exit code."""
    from partitioner.cases import find_cases
    from partitioner.options import file_run
    from runtime.allocator import keep_memory_tight
    from runtime.group import place_from_environment

    keep_memory_tight()
    place = place_from_environment()
    if place is not None and place.size > 1 and options.backend == "lockstep":
        raise AgreedError("backend lockstep runs all shards in one process; start it without torchrun or srun")
    if place is not None and options.backend != "lockstep":
        return _join(options, place)
    load_named_operators(options.operators)
    backend = options.backend or "lockstep"
    cases = find_cases(options)
    if cases is not None:
        return _run_cases(options, backend, cases, None)
    job = file_run(options, backend)
    with ProgressBar(options, True) as progress:
        report = job.run(progress)
    _report_run(options, job, report)
    return 0


def _run_cases(options: argparse.Namespace, backend: Backend, cases: Sequence[Case], place: Place | None) -> int:
    """Every case of a folder; those that fail are told of, the others go on."""
    from partitioner.cases import CaseRuns, is_done

    speaks = place is None or place.rank == 0
    kept = [] if options.overwrite else [case for case in cases if is_done(case)]
    if kept and speaks:
        sys.stderr.write(f"partition: note: {len(kept)} of {len(cases)} cases have their outputs and are kept; "
                         "--overwrite runs them again\n")
    failed: dict[str, int] = {}
    figures: list[dict[str, Any]] = []
    runs = CaseRuns(options, backend)
    try:
        for index, case in enumerate(cases, 1):
            if case in kept:
                continue
            where = f"case {index} of {len(cases)}"
            try:
                with ProgressBar(options, speaks, where) as progress:
                    job, report = _run_case(runs, case, place, progress)
            except (PartitionError, ExecutionError) as error:
                failed[case.name] = 1 if isinstance(error, ExecutionError) else 2
                if speaks:
                    complain(f"{where} ({case.name}): " + "; ".join(str(error).splitlines()), 0)
                if place is not None and isinstance(error, ExecutionError):  # a rank is gone
                    raise
                continue
            if report is not None:
                figures += _report_run(options, job, report, f"{where}: ")
    finally:
        runs.close()
    if options.json and speaks:
        print_json({"cases": figures, "kept": [case.name for case in kept], "failed": list(failed)})
    if failed and speaks:
        complain(f"{len(failed)} of {len(cases)} cases failed: {', '.join(failed)}", 0)
    return min(failed.values(), default=0)


def _run_case(runs: CaseRuns, case: Case, place: Place | None,
              progress: Progress | None) -> tuple[FileRun, RunReport | None]:
    if place is None:
        job = runs.prepare(case)
        return job, runs.run(job, progress)
    return _join_job(lambda: runs.prepare(case), place, progress)


def _join(options: argparse.Namespace, place: Place) -> int:
    """One rank of a group; whatever is wrong on one rank, all ranks learn before the work starts."""
    from partitioner.options import file_run
    from runtime import group

    backend = options.backend or ("nccl" if options.device.startswith("cuda") else "gloo")
    problem: str | None = None
    try:
        group.check_backend(backend, options.device, 1)
    except PartitionError as error:
        problem = str(error)
    group.join(place, backend if problem is None else "gloo")
    try:
        group.agree(problem)
        if options.memory is not None:  # so that all ranks choose the same schedule
            from partitioner.budget import held_now

            options.held = max(group.gather(held_now()))
        cases = _agreed(lambda: _found_cases(options))
        if cases is not None:
            return _run_cases(options, backend, cases, place)
        with ProgressBar(options, place.rank == 0) as progress:
            job, report = _join_job(lambda: file_run(options, backend), place, progress)
    finally:
        group.leave()
    if report is not None:
        _report_run(options, job, report)
    return 0


def _found_cases(options: argparse.Namespace) -> list[Case] | None:
    from partitioner.cases import find_cases

    load_named_operators(options.operators)
    return find_cases(options)


def _join_job(make: Callable[[], FileRun], place: Place,
              progress: Progress | None) -> tuple[FileRun, RunReport | None]:
    """The run itself, in a group that has been joined."""
    job = _agreed(make)
    return job, job.join(place, progress)


def _agreed(make: Callable[[], Result]) -> Result:
    """What a rank has made, when every rank could.

    Raises:
        PartitionError: on every rank when one could not.
    """
    from runtime import group

    found: list[Result] = []
    problem: str | None = None
    try:
        found.append(make())
    except PartitionError as error:
        problem = str(error)
    group.agree(problem)
    return found[0]


def _report_run(options: argparse.Namespace, job: FileRun, report: RunReport, where: str = "") -> list[dict[str, Any]]:
    """Tell of a run; as figures for JSON where the run is one of many."""
    from partitioner.report import size_text

    cost = job.plan.cost
    for name, count in report.not_finite.items():
        said = ("1 voxel is", "it spreads") if count == 1 else (f"{count} voxels are", "they spread")
        sys.stderr.write(f"partition: note: {job.inputs[name]}: {said[0]} NaN or infinite; {said[1]} as the network "
                         "has it\n")
    if options.json:
        figures = {
            "outputs": dict(job.outputs), "backend": job.backend, "mesh": dict(job.plan.mesh.axes),
            "seconds": report.seconds, "peak_bytes": report.peak_bytes,
            "predicted_peak_bytes": cost.peak_together if job.backend == "lockstep" else int(cost.peak.max(initial=0)),
            "predicted_sent_bytes": [int(n) for n in cost.sent.reshape(-1)],
            "not_finite": report.not_finite, "ranks": [vars_of(r) for r in report.ranks]}
        if not where:
            print_json(figures)
        return [figures]
    sent = sum(r.sent_bytes for r in report.ranks)
    say(f"{where}wrote {', '.join(dict.fromkeys(job.outputs.values()))} in {report.seconds:.2f} s; "
         f"{size_text(sent)} in {sum(r.messages for r in report.ranks)} messages; "
         f"peak {size_text(report.peak_bytes)} {'in this process' if job.backend == 'lockstep' else 'on a rank'}")
    return []
