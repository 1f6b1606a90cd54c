"""`python -m benchmarks demo` shows the toolkit at work; `run` measures a suite of cases; `list` names the suites.

`report` makes Markdown, CSV and pictures of results; `compare` holds two of them against one another.

`seams` shows what a sliding window costs; `conformance` runs the onnx package's own node tests partitioned;
`train` trains a 3D U-Net on shards; `forecast` holds what plans foretell against what is measured; `overlap` measures
what computing interiors while halos travel, and what the planner chooses, is worth over links of several delays.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.errors import SideError, UsageError
from benchmarks.suite_commands import add_commands
from benchmarks.train_options import add_arguments

_INTERRUPTED = 130

TRAIN = """\
Trains the 3D U-Net of "High-Resolution Medical Image Analysis with Spatial Partitioning" (Hou et al. 2019) on
synthetic CT volumes with a liver and lesions, every volume split over the shards of a mesh:

  python -m benchmarks train                               one process, some minutes
  python -m benchmarks train --mesh depth=2                two processes, half of each volume in each
  python -m benchmarks train --mesh depth=2 --replicas 2   two copies of that, on volumes of their own
  torchrun --nproc-per-node 8 -m benchmarks train --mesh depth=4,height=2 --device cuda --filters 32 --size 512

The loss curve does not depend on the mesh.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; a mistake of the user ends with one line and 2, a failure with 1."""
    options = _parser().parse_args(argv, argparse.Namespace(arguments=sys.argv[1:] if argv is None else list(argv)))
    try:
        return options.command(options)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except SideError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return _INTERRUPTED


def _demo(options: argparse.Namespace) -> int:
    from benchmarks.demo import Demo, parse_size, run_demo

    demo = Demo(
        workdir=options.workdir,
        size=parse_size(options.size),
        shards=options.shards,
        base=_at_least(1, "--base", options.base),
        train_steps=_at_least(0, "--train-steps", options.train_steps),
    )
    return run_demo(demo, Console())


def _conformance(options: argparse.Namespace) -> int:
    from benchmarks.conformance import Options, run_conformance

    chosen = Options(
        text=options.filter,
        jobs=_at_least(1, "--jobs", options.jobs),
        timeout=options.timeout,
        output=options.json,
    )
    return run_conformance(chosen, Console())


def _train(options: argparse.Namespace) -> int:
    from benchmarks.train_launch import follow_launcher
    from benchmarks.train_options import from_arguments

    follow_launcher()
    chosen = from_arguments(options)
    from benchmarks.train import run_train

    return run_train(chosen, options.arguments)


def _seams(options: argparse.Namespace) -> int:
    from benchmarks.seams import Seams, run_seams

    chosen = Seams(
        size=_at_least(16, "--size", options.size),
        window=_at_least(8, "--window", options.window),
        overlap=options.overlap,
        blend=options.blend,
        memory=options.memory,
        base=_at_least(1, "--base", options.base),
        train_steps=_at_least(0, "--train-steps", options.train_steps),
        output=options.output,
    )
    return run_seams(chosen, Console())


def _forecast(options: argparse.Namespace) -> int:
    from benchmarks.forecasts import Options, run_forecasts

    chosen = Options(
        threads=_at_least(1, "--threads", options.threads),
        repeats=_at_least(1, "--repeats", options.repeats),
        profile=options.profile,
        text=options.filter,
        output=options.output,
    )
    console = Console()
    console = console if console.is_terminal else Console(width=130)
    if options.training:
        from benchmarks.training_forecasts import run_steps

        return run_steps(chosen.text, chosen.threads, chosen.output, console)
    return run_forecasts(chosen, console)


def _overlap(options: argparse.Namespace) -> int:
    from benchmarks.overlaps import Options, run_overlaps

    if min(options.delays) < 0:
        raise UsageError("--delays: at least 0 milliseconds are needed")
    chosen = Options(
        extents=tuple(_at_least(16, "--sizes", size) for size in options.sizes),
        delays=tuple(1e-3 * delay for delay in options.delays),
        mesh=options.mesh,
        repeats=_at_least(1, "--repeats", options.repeats),
        profile=options.profile,
        output=options.output,
    )
    console = Console()
    return run_overlaps(chosen, console if console.is_terminal else Console(width=130))


def _planner(options: argparse.Namespace) -> int:
    from benchmarks.planner import Options, run_planner

    chosen = Options(
        ranks=tuple(_at_least(1, "--ranks", ranks) for ranks in options.ranks),
        rounds=_at_least(1, "--rounds", options.rounds),
        processes=_at_least(1, "--processes", options.processes),
        shrink=_at_least(1, "--shrink", options.shrink),
        profile=options.profile,
        text=options.filter,
        output=options.output,
    )
    console = Console()
    return run_planner(chosen, console if console.is_terminal else Console(width=130))


def _at_least(least: int, name: str, value: int) -> int:
    if value < least:
        raise UsageError(f"{name} {value}: at least {least} is needed")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="a 3D U-Net on several processes, from export to picture")
    demo.add_argument("--workdir", type=Path, default=Path("demo-output"), help="where the files go")
    demo.add_argument("--size", default="121x160x143", help="voxels: depth x height x width")
    demo.add_argument("--shards", default="depth=2,height=2", help="the mesh, as for partition --mesh")
    demo.add_argument("--base", type=int, default=16, help="filters at the finest level")
    demo.add_argument("--train-steps", type=int, default=30, help="0: random weights, a meaningless picture")
    demo.set_defaults(command=_demo)

    seams = commands.add_parser("seams", help="MONAI's sliding window beside the whole volume, and a picture of both")
    seams.add_argument("--size", type=int, default=96, help="voxels along each axis of the volume")
    seams.add_argument("--window", type=int, default=48, help="voxels along each axis of a window")
    seams.add_argument("--overlap", type=float, default=0.25, help="of neighbouring windows, as a share of one")
    seams.add_argument("--blend", choices=("constant", "gaussian"), default="constant",
                       help="weights where windows overlap")
    seams.add_argument("--memory", help="budget of the whole volume's run, as 2GiB (default: none)")
    seams.add_argument("--base", type=int, default=16, help="filters at the finest level")
    seams.add_argument("--train-steps", type=int, default=30, help="0: random weights, a meaningless picture")
    seams.add_argument("--output", type=Path, default=Path("seams.png"), help="the picture")
    seams.set_defaults(command=_seams)

    add_commands(commands)

    tests = commands.add_parser("conformance", help="onnx's own node tests of every operator, partitioned")
    tests.add_argument("--filter", default="", metavar="TEXT", help="only cases with this in their name")
    tests.add_argument("--json", type=Path, metavar="FILE", help="write every case's result")
    tests.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes side by side")
    tests.add_argument("--timeout", type=float, default=120, help="seconds until a case counts as stuck")
    tests.set_defaults(command=_conformance)

    train = commands.add_parser("train", help="a 3D U-Net for liver and lesions, trained on shards of each volume",
                                formatter_class=argparse.RawDescriptionHelpFormatter, description=TRAIN)
    add_arguments(train)
    train.set_defaults(command=_train)

    _add_forecast(commands)
    _add_overlap(commands)
    _add_planner(commands)
    return parser


def _add_forecast(commands: Any) -> None:
    told = commands.add_parser("forecast", help="memory, bytes, messages and seconds: forecast against measured")
    told.add_argument("--training", action="store_true", help="memory of training steps instead of runs")
    told.add_argument("--filter", default="", metavar="TEXT", help="only cases with this in their name")
    told.add_argument("--profile", type=Path, metavar="FILE", help="of this machine (default: it is calibrated first)")
    told.add_argument("--threads", type=int, default=1, help="of every process")
    told.add_argument("--repeats", type=int, default=3, help="runs of every case, after one to warm up")
    told.add_argument("--output", type=Path, metavar="FILE", help="write the figures as JSON")
    told.set_defaults(command=_forecast)


def _add_overlap(commands: Any) -> None:
    told = commands.add_parser("overlap", help="halos over slow links: plain, interiors first, as planned, in turn")
    told.add_argument("--sizes", type=int, nargs="+", default=[64, 80, 96], metavar="N", help="voxels along each axis")
    told.add_argument("--delays", type=float, nargs="+", default=[0, 2, 10], metavar="MS", help="of every message")
    told.add_argument("--mesh", default="depth=2", help="as for partition --mesh")
    told.add_argument("--repeats", type=int, default=7, help="runs of each side, after one to warm up")
    told.add_argument("--profile", type=Path, metavar="FILE", help="for the forecasts (default: this machine's)")
    told.add_argument("--output", type=Path, metavar="FILE", help="write the figures as JSON")
    told.set_defaults(command=_overlap)


def _add_planner(commands: Any) -> None:
    told = commands.add_parser("planner", help="the planner's mesh against every other one, measured on gloo ranks")
    told.add_argument("--filter", default="", metavar="TEXT", help="only networks with this in their name")
    told.add_argument("--ranks", type=int, nargs="+", default=[2, 4], metavar="N", help="numbers of ranks")
    told.add_argument("--rounds", type=int, default=5, help="runs of every mesh, after one to warm up")
    told.add_argument("--processes", type=int, default=3, help="groups of fresh processes that run so many rounds each")
    told.add_argument("--shrink", type=int, default=1, metavar="N", help="axes are so many times shorter")
    told.add_argument("--profile", type=Path, metavar="FILE", help="for the planner (default: this machine's)")
    told.add_argument("--output", type=Path, metavar="FILE", help="write the figures as JSON")
    told.set_defaults(command=_planner)


if __name__ == "__main__":
    code = main()
    if code == _INTERRUPTED:
        # CPython does not notice that an interruption inside exec() was handled, and would end by the signal.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
