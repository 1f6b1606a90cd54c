"""The planner's mesh against all others: every mesh of 2 and 4 gloo ranks is run, in turn, over several networks.

Ranks have one thread each.  Every round runs every mesh once, in another order; meshes are compared round by round,
over several groups of fresh processes: where a process lies in memory makes it a tenth faster or slower for good.
"""

from __future__ import annotations

import json
import random
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
from benchmarks.cpu_clock import cpu_seconds_below
from benchmarks.errors import SideError, UsageError
from benchmarks.models import INPUT_NAME, ResNetConfig, UNetConfig, export

NEAR = 1.05
"""A mesh that takes at most so many times the best one's time is as good."""

_BATCH = UNetConfig(norm="batch", down="maxpool", base=8, levels=3)
_INSTANCE = UNetConfig(norm="instance", base=8, levels=3)

CASES: dict[str, tuple[UNetConfig | ResNetConfig, tuple[int, ...]]] = {
    "cube": (_BATCH, (1, 1, 80, 80, 80)),
    "flat": (_BATCH, (1, 1, 24, 160, 136)),
    "long": (_BATCH, (1, 1, 320, 40, 40)),
    "norms": (_INSTANCE, (1, 1, 72, 88, 64)),
    "image": (UNetConfig(dims=2, in_channels=3, norm="batch", down="maxpool", base=16), (1, 3, 640, 384)),
    "classifier": (ResNetConfig(filters=(8, 16, 32)), (1, 1, 96, 80, 112)),
}
"""Networks and inputs: cubes, flat and long volumes, statistics that are merged, two axes, a dense head."""


@dataclass(frozen=True)
class Options:
    """What is measured.

    Args:
        ranks: numbers of ranks.
        rounds: of every group of processes, after one to warm up.
        processes: how many groups of fresh processes.
        shrink: by how many times axes are shorter.
        profile: of the planner.
    """

    ranks: tuple[int, ...]
    rounds: int
    processes: int
    shrink: int
    profile: Path | None
    text: str
    output: Path | None


@dataclass(frozen=True)
class Runs:
    """What one mesh took, round by round: seconds of the slowest rank, and of CPUs by all ranks."""

    mesh: str
    forecast: float
    seconds: tuple[float, ...]
    cpu: tuple[float, ...]


@dataclass(frozen=True)
class Contest:
    """All meshes of one network and number of ranks.

    Args:
        chosen: the planner's mesh; it may have fewer ranks.
        note: what the planner would do besides.
    """

    network: str
    ranks: int
    chosen: str
    note: str
    runs: tuple[Runs, ...]

    @property
    def best(self) -> Runs:
        """The mesh of least median time."""
        return min(self.runs, key=lambda runs: statistics.median(runs.seconds))

    def ratio(self, figure: str) -> float:
        """The planner's mesh over the best one, the median of the rounds."""
        mine = next(runs for runs in self.runs if runs.mesh == self.chosen)
        pairs = zip(getattr(mine, figure), getattr(self.best, figure), strict=True)
        return statistics.median(a / b for a, b in pairs if b > 0) if any(getattr(self.best, figure)) else 1.0

    @property
    def is_near(self) -> bool:
        """Whether the planner's mesh is as good as the best."""
        return self.ratio("seconds") <= NEAR


def run_planner(options: Options, console: Console) -> int:
    """Measure all contests and print the table; returns 1 when the planner missed one.

    Raises:
        UsageError: for a filter that leaves no case, or a profile that cannot be read.
        SideError: when a run fails.
    """
    cases = [name for name in CASES if options.text in name]
    if not cases:
        raise UsageError(f"--filter '{options.text}' leaves no case; there are {', '.join(CASES)}")
    found: list[Contest] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in cases:
            for ranks in options.ranks:
                with console.status(f"{name} on {ranks} ranks"):
                    found.append(_contest(name, ranks, Path(folder), options))
    console.print(table(found))
    if options.output is not None:
        options.output.write_text(json.dumps([asdict(contest) for contest in found], indent=1) + "\n")
    return 0 if all(contest.is_near for contest in found) else 1


def meshes(ranks: int, extents: Sequence[int]) -> list[str]:
    """All meshes of so many ranks over spatial axes, in the short form: 4 over two axes -> 4x1, 2x2, 1x4."""
    return ["x".join(map(str, shape)) for shape in _shapes(ranks, list(extents))]


def _shapes(count: int, extents: Sequence[int]) -> Iterator[tuple[int, ...]]:
    if not extents:
        if count == 1:
            yield ()
        return
    for first in range(min(count, extents[0]), 0, -1):
        if count % first == 0:
            yield from ((first, *rest) for rest in _shapes(count // first, extents[1:]))


def _contest(name: str, ranks: int, folder: Path, options: Options) -> Contest:
    network, full = CASES[name]
    shape = (*full[:2], *(max(16, n // options.shrink) for n in full[2:]))
    model = folder / f"{name}.onnx"
    if not model.exists():
        export(network.build(), shape, model)
    try:
        profile = pt.Profile.find(options.profile)
        planned = pt.partition(model, devices=ranks, profile=profile, backend="gloo")
        plans = {plan.mesh: plan for plan in (pt.partition(model, mesh=mesh) for mesh in meshes(ranks, shape[2:]))}
        plain = pt.Mesh(tuple(axis for axis in planned.mesh.axes if axis[1] > 1))
        own = next((mesh for mesh in plans if _counts(mesh) == _counts(plain)), plain)
        plans.setdefault(own, pt.partition(model, mesh=plain))
    except pt.PartitionError as error:
        raise UsageError(str(error)) from None
    assert planned.choice is not None
    runs = _measured(plans, shape, profile, options)
    return Contest(name, ranks, _text(own), planned.choice.chosen.note, tuple(runs))


def _counts(mesh: pt.Mesh) -> dict[str, int]:
    return {name: count for name, count in mesh.axes if count > 1}


def _text(mesh: pt.Mesh) -> str:
    return ",".join(f"{name}={count}" for name, count in _counts(mesh).items()) or "single"


def _measured(plans: dict[pt.Mesh, pt.Plan], shape: Sequence[int], profile: pt.Profile,
              options: Options) -> list[Runs]:
    volume = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    seconds: dict[pt.Mesh, list[float]] = {mesh: [] for mesh in plans}
    cpu: dict[pt.Mesh, list[float]] = {mesh: [] for mesh in plans}
    draw = random.Random(0)
    for _ in range(options.processes):
        with ExitStack() as stack:
            sessions = {mesh: stack.enter_context(plan.session("gloo", threads=1)) for mesh, plan in plans.items()}
            for turn in range(options.rounds + 1):
                for mesh in draw.sample(list(sessions), len(sessions)):
                    before = cpu_seconds_below()
                    try:
                        sessions[mesh].run({INPUT_NAME: volume})
                    except pt.ExecutionError as error:
                        raise SideError(str(error)) from None
                    report = sessions[mesh].last_run
                    assert report is not None
                    if turn:
                        seconds[mesh].append(max(rank.seconds for rank in report.ranks))
                        cpu[mesh].append(cpu_seconds_below() - before)
    return [Runs(_text(mesh), plan.time(profile, "gloo", 1).seconds, tuple(seconds[mesh]), tuple(cpu[mesh]))
            for mesh, plan in plans.items()]


def table(contests: Sequence[Contest]) -> Table:
    """Per contest the planner's mesh, the best one measured, and how they compare."""
    shown = Table(title="the planner's mesh against all meshes of as many ranks", box=SIMPLE_HEAD,
                  title_justify="left", caption_justify="left",
                  caption="ratios are planner / best, medians over rounds; seconds are those of the slowest rank")
    for column in ("network", "ranks", "planner", "best", "seconds", "ratio", "CPU ratio", f"within {NEAR - 1:.0%}"):
        shown.add_column(column, justify="left" if column in ("network", "planner", "best") else "right", no_wrap=True)
    for contest in contests:
        shown.add_row(contest.network, str(contest.ranks), contest.chosen, contest.best.mesh,
                      f"{statistics.median(contest.best.seconds):.3f}", f"{contest.ratio('seconds'):.2f}",
                      f"{contest.ratio('cpu'):.2f}", "yes" if contest.is_near else "NO")
    near = sum(contest.is_near for contest in contests)
    shown.add_section()
    shown.add_row("all", "", "", "", "", "", "", f"{near} of {len(contests)}")
    return shown
