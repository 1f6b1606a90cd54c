"""The commands of the suites: `run`, `report`, `compare`, `list`."""

from __future__ import annotations

import argparse
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.errors import UsageError

RESULTS = Path(__file__).parent / "results"


def add_commands(commands: Any) -> None:
    """Add them to the parser's."""
    run = commands.add_parser("run", help="measure a suite, ours beside its peers")
    run.add_argument("--suite", default="quick", help="see: python -m benchmarks list (default: quick)")
    run.add_argument("--case", action="append", default=[], help="only this case; may be given again")
    run.add_argument("--peer", action="append", default=[], metavar="SIDE",
                     help="of the peers only this; may be given again")
    run.add_argument("--repeats", type=int, default=3, help="fresh processes per side")
    run.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="for each side in all")
    run.add_argument("--timeout", type=float, default=600, help="seconds until a step counts as stuck")
    run.add_argument("--output", type=Path, help="JSON file (default: benchmarks/results/SUITE-DATE.json)")
    run.set_defaults(command=_run)

    report = commands.add_parser("report", help="results as Markdown, CSV and a picture")
    report.add_argument("files", nargs="+", type=Path, metavar="FILE", help="that `run` wrote")
    report.add_argument("-o", "--output", type=Path, default=RESULTS, metavar="DIR",
                        help="folder (default: %(default)s)")
    report.add_argument("--into", type=Path, metavar="FILE", help="fill this Markdown file's place for figures, too")
    report.set_defaults(command=_report)

    compare = commands.add_parser("compare", help="two results: what changed beyond the spread")
    compare.add_argument("old", type=Path, metavar="OLD")
    compare.add_argument("new", type=Path, metavar="NEW")
    compare.add_argument("--fail-above", type=float, metavar="X",
                         help="end with 1 where time or memory of an own side is more than X times the old one")
    compare.set_defaults(command=_compare)

    shown = commands.add_parser("list", help="name suites, cases and sides")
    shown.set_defaults(command=_list)


def _run(options: argparse.Namespace) -> int:
    from benchmarks.run import Options, run_suite
    from benchmarks.suites import find_suite

    suite = find_suite(options.suite).only(options.case, options.peer)
    for name in ("repeats", "threads"):
        if getattr(options, name) < 1:
            raise UsageError(f"--{name} {getattr(options, name)}: at least 1 is needed")
    output = options.output or RESULTS / f"{suite.name}-{datetime.now(UTC):%Y%m%d-%H%M%S}.json"
    return run_suite(suite, Options(options.repeats, options.threads, options.timeout, output), Console())


def _report(options: argparse.Namespace) -> int:
    from benchmarks.report import write_reports

    return write_reports(options.files, options.output, options.into, Console())


def _compare(options: argparse.Namespace) -> int:
    from benchmarks.compare import run_compare

    if options.fail_above is not None and not options.fail_above > 0:
        raise UsageError(f"--fail-above {options.fail_above:g}: give a ratio above 0, as 1.1")
    return run_compare(options.old, options.new, options.fail_above, Console())


def _list(options: argparse.Namespace) -> int:
    from benchmarks.suites import SUITES

    for suite in SUITES:
        print(f"{suite.name}: {suite.what}")
        for case in suite.cases:
            asked = "; only by --case" if case.optional else ""
            print(f"  {case.name}: {case.what} ({'; '.join(side.name for side in case.sides)}{asked})")
            for bar in case.bars:
                most = f"{bar.most:g}" if bar.measure != "sent per rank" else f"{bar.most / 2**20:g} MiB"
                print(f"    {bar.name}: at most {most}")
    return 0
