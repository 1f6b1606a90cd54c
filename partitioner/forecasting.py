"""The command `partition forecast`: what a model takes on few and many devices, as tables, files and curves."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from partitioner.arguments import add_link_option, add_operator_options, add_profile_option
from partitioner.console import ProgressBar, print_json, say, show
from partitioner.errors import PartitionError

MOST = 4096
"""Numbers that a list may have."""


def add_forecast_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("model", metavar="MODEL", help="an ONNX model with open spatial axes")
    parser.add_argument("--devices", metavar="N,N,...", required=True,
                        help="how many there are; 1,2,4,...,4096 goes on as it began")
    parser.add_argument("--sizes", metavar="N,N,...", required=True,
                        help="spatial extents of the volume: 256 for 256 cells along every axis, or 256x512x512")
    parser.add_argument("--shape", metavar="[NAME=]1x1xDxHxW", action="append", default=[],
                        help="extents of an input that no size gives: batch and channels where they are open")
    parser.add_argument("--memory", metavar="SIZE",
                        help="what each device has, as 40GiB; the largest cube that fits is told too")
    add_profile_option(parser)
    add_link_option(parser)
    add_operator_options(parser)
    parser.add_argument("-o", "--output", metavar="FILE", action="append", default=[],
                        help="file to write: .csv, .json, or .png with curves (repeat)")
    parser.add_argument("--json", action="store_true", help="print the forecast as JSON")


def forecast_devices(options: argparse.Namespace) -> int:
    """The command `forecast`; returns the exit code.

    Raises:
        PartitionError: for what is not understood, sizes that the network cannot take, files that cannot be written.
    """
    from partitioner import dialect
    from partitioner.options import asked_model, given_shapes
    from partitioner.outlook import forecast_of
    from partitioner.planner.scaling_files import check_targets

    targets = [Path(path) for path in options.output]
    check_targets(targets)
    devices = numbers(options.devices, "--devices")
    sizes = listed_sizes(options.sizes)
    asked = asked_model(options)
    if dialect.is_plan(asked.model):
        raise PartitionError(f"{options.model}: is a plan, for one mesh and size; give the model")
    with ProgressBar(options, True) as progress:
        found = forecast_of(asked.model, given_shapes(options, asked), sizes=sizes, devices=devices,
                            memory=options.memory, profile=options.profile, backend=options.backend,
                            strict=options.strict, progress=progress)
    for target in targets:
        found.save(target)
    if options.json:
        print_json(found.to_dict())
        return 0
    show(found.table())
    for target in targets:
        say(f"wrote {target}")
    return 0


def listed_sizes(text: str) -> list[str]:
    """The sizes of a list; `...` stands between plain numbers."""
    if "..." not in text:
        return [word.strip() for word in text.split(",")]
    return [str(n) for n in numbers(text, "--sizes")]


def numbers(text: str, option: str) -> list[int]:
    """The numbers of a list, `...` filled in.

        1,2,4,...,32 -> 1,2,4,8,16,32        64,96,128,...,192 -> 64,96,128,160,192

    Raises:
        PartitionError: for anything else, and for a pattern that does not lead to the number behind it.
    """
    found: list[int] = []
    goes_on = False
    for word in text.split(","):
        if word.strip() == "..." and found and not goes_on:
            goes_on = True
            continue
        if not word.strip().isdecimal() or int(word) < 1:
            raise PartitionError(f"{option} {text}: '{word.strip()}' is not understood; give whole numbers from 1 with "
                                 "commas, as 1,2,4 or 1,2,4,...,64")
        if goes_on:
            found += _between(found, int(word), option, text)
            goes_on = False
        found.append(int(word))
    if goes_on:
        raise PartitionError(f"{option} {text}: nothing is behind the '...'; end with a number, as 1,2,4,...,64")
    return found


def _between(before: Sequence[int], end: int, option: str, text: str) -> list[int]:
    """What '...' stands for between the numbers before it and the next one."""
    step = _step(before)
    found: list[int] = []
    at = before[-1] + step if step else 2 * before[-1]
    while at < end and len(found) < MOST:
        found.append(at)
        at = at + step if step else 2 * at
    if at != end:
        way = f"steps of {step}" if step else "doubling"
        raise PartitionError(f"{option} {text}: {way} from {before[-1]} does not lead to {end}; give every number, or "
                             "another end")
    return found


def _step(before: Sequence[int]) -> int:
    """The difference of equal steps, of the last three numbers or of two that do not double; 0 where they double."""
    steps = [b - a for a, b in pairwise(before[-3:])]
    doubles = all(b == 2 * a for a, b in pairwise(before[-3:]))
    return 0 if doubles or len(set(steps)) != 1 or steps[0] < 1 else steps[0]
