"""Forecast against measurement of training steps: the rise of anonymous memory in the largest process.

    python -m benchmarks forecast --training

Every case is a process of its own (over gloo one per rank), with the allocator's settings of the command.  It takes
steps of Adam with a cross entropy, a first one to warm up: the level after it, which is taken off, has weights, input,
the optimiser's state and what libraries keep (some 20 to 40 MB of compiled kernels and the like).
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.errors import SideError, UsageError
from benchmarks.forecasts import run_python
from benchmarks.liver_network import LiverConfig
from benchmarks.memory import give_back_memory, level, sampled
from benchmarks.models import UNetConfig

_NETWORKS = {"batch": UNetConfig(norm="batch", down="maxpool"), "instance": UNetConfig(norm="instance"),
             "liver": LiverConfig()}
_CLASSES = 3


@dataclass(frozen=True)
class Step:
    """One way to take steps: a network on a cube of so many voxels along each axis."""

    network: str
    extent: int
    mesh: str = "single"
    backend: str = "lockstep"
    checkpoint: bool = False

    @property
    def name(self) -> str:
        """In words."""
        again = ", checkpoint" if self.checkpoint else ""
        return f"{self.network}-{self.extent}, {self.backend} {self.mesh}{again}"


STEPS = tuple(
    Step(network, extent, mesh, backend, checkpoint)
    for network, extent, ways in (
        ("batch", 48, (("single", "lockstep"), ("depth=2", "lockstep"), ("depth=2", "gloo"))),
        ("instance", 64, (("single", "lockstep"), ("depth=2", "lockstep"), ("depth=2", "gloo"))),
        ("batch", 96, (("single", "lockstep"), ("depth=2", "lockstep"), ("depth=2", "gloo"))),
        ("liver", 96, (("single", "lockstep"), ("depth=2", "gloo"))),
    )
    for mesh, backend in ways for checkpoint in (False, True)
)


@dataclass(frozen=True)
class Rises:
    """Bytes by which the largest process rises, as forecast and as measured."""

    forecast: int
    measured: int


def run_steps(text: str, threads: int, output: Path | None, console: Console) -> int:
    """Measure all cases and print the table; returns 1 when one failed.

    Raises:
        UsageError: for a filter that leaves no case.
    """
    steps = [step for step in STEPS if text in step.name]
    if not steps:
        raise UsageError(f"--filter '{text}' leaves no case")
    found: dict[Step, Rises] = {}
    failed: dict[Step, str] = {}
    for step in steps:
        with console.status(step.name):
            try:
                told = json.dumps({"step": asdict(step), "threads": threads})
                found[step] = Rises(**json.loads(run_python(["-m", "benchmarks.training_forecasts", told], threads)))
            except SideError as error:
                failed[step] = str(error)
    console.print(table(found, failed))
    if output is not None:
        rows = [{"case": step.name, **asdict(rises)} for step, rises in found.items()]
        output.write_text(json.dumps(rows, indent=1) + "\n")
    return 1 if failed else 0


def table(found: dict[Step, Rises], failed: dict[Step, str]) -> Table:
    """Measured rises per case, forecast over measured, and the median of how far off they are."""
    shown = Table(title="training steps: forecast against measurement", box=SIMPLE_HEAD, title_justify="left")
    for column in ("case", "measured MB", "forecast MB", "ratio"):
        shown.add_column(column, justify="left" if column == "case" else "right", no_wrap=True)
    for step, rises in found.items():
        shown.add_row(step.name, f"{rises.measured / 1e6:.0f}", f"{rises.forecast / 1e6:.0f}",
                      f"{rises.forecast / rises.measured:.3f}")
    for step, reason in failed.items():
        shown.add_row(f"{step.name} failed: {reason[:60]}")
    if found:
        off = statistics.median(abs(r.forecast / r.measured - 1) for r in found.values())
        shown.add_section()
        shown.add_row("median off by", "", "", f"{100 * off:.1f} %")
    return shown


# --- the process of one case --------------------------------------------------------------------------


def main() -> int:
    """One case, told as JSON; prints both sides as JSON."""
    told = json.loads(sys.argv[1])
    step, threads = Step(**told["step"]), told["threads"]
    if step.backend == "lockstep":
        forecast, measured = _taken(step, threads)
    else:
        forecast, measured = _in_processes(step, threads)
    sys.stdout.write(json.dumps({"forecast": forecast, "measured": measured}))
    return 0


def _taken(step: Step, threads: int, rank: int | None = None) -> tuple[int, int]:
    """Take two steps here: bytes forecast for this process and measured."""
    import torch

    import partitioner as pt

    torch.set_num_threads(threads)
    extents = (step.extent,) * 3
    plan = pt.partition(_NETWORKS[step.network].build(), torch.zeros(1, 1, *extents), mesh=step.mesh, train=True)
    module = plan.module(checkpoint=step.checkpoint).train()
    optimiser = torch.optim.Adam(module.parameters(), lr=1e-3)
    # all random numbers of this rank's own cells: what is below the level before does not count
    own = [tuple(len(i) for i in module.own_box(name).intervals())
           for name in (module.input_names[0], module.output_names[0])]
    volume, labels = torch.rand(own[0]), torch.randint(0, _CLASSES, (own[1][0], *own[1][2:]))

    def take() -> None:
        pt.losses.cross_entropy(module, module(volume), labels).backward()
        optimiser.step()
        optimiser.zero_grad()

    take()
    give_back_memory()
    before = level(os.getpid()).private[os.getpid()]
    with sampled(os.getpid()) as sampler:
        take()
        peak = sampler.stop()
    cost = plan.training_cost(step.checkpoint, "adam")
    total = cost.total_together if rank is None else int(cost.total.reshape(-1)[rank])
    below = cost.weights + cost.optimiser + volume.numel() * volume.element_size()
    return total - below, peak.private[os.getpid()] - before


def _in_processes(step: Step, threads: int) -> tuple[int, int]:
    """A process per rank; the largest of their forecasts and of their rises."""
    spawn = multiprocessing.get_context("spawn")
    size = int(step.mesh.partition("=")[2])
    with tempfile.TemporaryDirectory() as folder:
        answers: Any = spawn.Queue()
        ranks = [spawn.Process(target=_rank, args=(rank, size, folder, step, threads, answers)) for rank in range(size)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            raise SideError("a rank has failed")
        found = [answers.get() for _ in ranks]
    return max(f for f, _ in found), max(m for _, m in found)


def _rank(rank: int, size: int, folder: str, step: Step, threads: int, answers: Any) -> None:
    import torch.distributed as dist

    if Path("/sys/class/net/lo").exists():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    answers.put(_taken(step, threads, rank))
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
