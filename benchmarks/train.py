"""`python -m benchmarks train`: the 3D U-Net of Hou et al. 2019 learns liver and lesions on shards of volumes.

    plan = pt.partition(network, example, mesh=..., train=True)      every process
    module = plan.module()                                           its shard of it
    loss = pt.losses.cross_entropy_and_dice(module, ...)             the same number everywhere
    pt.checkpoint.save(folder, module, optimiser, ...)               read again on any mesh
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import resource
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import partitioner as pt
from benchmarks.curves import Row, draw, plain, rows_from, write_table
from benchmarks.errors import SideError, UsageError
from benchmarks.liver_network import CLASS_WEIGHTS, CLASSES, LiverConfig
from benchmarks.train_data import LABELS, VOLUME, endless, held_out_volumes, training_volumes, write_volumes
from benchmarks.train_launch import INTERRUPTED, Place, Stop, joined, launch, place
from benchmarks.train_options import TrainOptions
from benchmarks.train_report import Figures, Reporter, title

_RISE = 0.1
"""The share of the steps in which the learning rate rises."""


@dataclass
class Run:
    """A training run of this process.

    Args:
        module: this process's shards of the network.
        done: steps that are finished.
        earlier: seconds that earlier parts of a resumed run took.
    """

    options: TrainOptions
    here: Place | None
    plan: pt.Plan
    module: Any
    optimiser: torch.optim.Optimizer
    done: int = 0
    earlier: float = 0
    rows: list[Row] = field(default_factory=list[Row])
    started: float = field(default_factory=time.monotonic)
    stop: Stop = field(default_factory=Stop)

    @property
    def is_first(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.here is None or self.here.is_first

    @property
    def seconds(self) -> float:
        """Since the start of the run, the pauses of a resumed one left out."""
        return self.earlier + time.monotonic() - self.started


def run_train(options: TrainOptions, arguments: Sequence[str]) -> int:
    """Train, here or in processes that run the same command; returns the exit code.

    Args:
        arguments: of the command, for the processes that are started.

    Raises:
        UsageError: for options that do not go together.
        SideError: when a process is lost.
    """
    here = place()
    ranks = pt.Mesh.parse(options.mesh).size * options.replicas
    if here is None and options.backend != "lockstep" and (options.processes or ranks > 1):
        try:
            return launch(arguments, ranks, options.threads)
        finally:
            _tidy(options)
    if here is not None and here.size != ranks:
        raise UsageError(f"{here.size} processes were started; --mesh and --replicas need {ranks}")
    try:
        return _train(options, here)
    except pt.PartitionError as error:
        raise UsageError(str(error)) from None
    except pt.ExecutionError as error:
        raise SideError(str(error)) from None


def _train(options: TrainOptions, here: Place | None) -> int:
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    network = LiverConfig(options.filters, options.depth, options.dropout, options.seed).build().to(dtype)
    plan = pt.partition(network, torch.zeros(options.shape, dtype=dtype), mesh=options.mesh, train=True)
    with joined(here, _backend(options, here)):
        module = plan.module(options.device, checkpoint=options.checkpoint_activations)
        module.seed = options.seed * 1_000_003
        optimiser = torch.optim.Adam(module.parameters(), lr=options.learning_rate)
        run = Run(options, here, plan, module, optimiser)
        if options.resume:
            _take_up(run)
        if run.is_first:
            _tidy(options)
        write_volumes(module, options, here is None or here.local_rank == 0)
        with Reporter(run.is_first, options, run.done) as reporter, run.stop.on_signals():
            _learn(run, reporter)
            figures = _finish(run)
    if run.is_first:
        figures.show(options)
    return INTERRUPTED if figures.interrupted else 0


def _backend(options: TrainOptions, here: Place | None) -> str:
    if options.backend is not None:
        return options.backend
    on_host = int(os.environ.get("LOCAL_WORLD_SIZE", 1 if here is None else here.size))
    enough = options.device == "cuda" and 0 < on_host <= torch.cuda.device_count()
    return "nccl" if enough else "gloo"


# --- steps -------------------------------------------------------------------------------------------


def _learn(run: Run, reporter: Reporter) -> None:
    """All steps that are left, with evaluations and checkpoints between them, until somebody wants to stop."""
    options = run.options
    held_out = held_out_volumes(run.module, options)
    for batch in endless(training_volumes(run.module, options), run.done):
        row, stopped = _step(run, batch)
        if _is_due(row.step, 0 if stopped else options.evaluate_every, options.steps):
            row = replace(row, **evaluate(run, held_out))
        run.rows.append(row)
        reporter.show(row)
        if row.liver is not None or stopped:
            _write_curves(run)
        if stopped or _is_due(row.step, options.checkpoint_every, options.steps):
            _save(run)
        if stopped or run.done == options.steps:
            return


def _is_due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


def _step(run: Run, batch: dict[str, Tensor]) -> tuple[Row, bool]:
    """One step of the optimiser; also whether any process has been asked to stop."""
    options, module = run.options, run.module
    rate = options.learning_rate * schedule(run.done, options.steps)
    run.optimiser.param_groups[0]["lr"] = rate
    module.train()
    run.optimiser.zero_grad()
    logits, labels = _forward(run, batch)
    weight = torch.tensor(CLASS_WEIGHTS, dtype=logits.dtype, device=logits.device)
    loss = pt.losses.cross_entropy_and_dice(module, logits, labels, weight)
    loss.backward()
    run.optimiser.step()
    run.done += 1
    found = module.gather((float(loss.detach()), run.stop.wanted))
    mean = sum(value for value, _ in found) / len(found)
    if not math.isfinite(mean):
        raise SideError(f"the loss is {mean} at step {run.done}; use a smaller --learning-rate")
    return Row(run.done, run.seconds, rate, mean), any(wanted for _, wanted in found)


def schedule(step: int, steps: int) -> float:
    """The share of the learning rate at a step: up for the first tenth, then down along a cosine."""
    rise = max(1, round(_RISE * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def _forward(run: Run, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    options = run.options
    volume = batch[VOLUME]
    kind = options.device.partition(":")[0].partition(",")[0]
    with torch.autocast(kind, torch.bfloat16) if options.amp == "bfloat16" else contextlib.nullcontext():
        logits = run.module(volume)
    if options.amp != "none":
        logits = logits.float()
    return logits, batch[LABELS].to(logits.device)


@torch.no_grad()
def evaluate(run: Run, volumes: Any) -> dict[str, float]:
    """Dice coefficients on the held-out volumes: the mean over those that have the class, per class.

    dice = 2 |found and true| / (|found| + |true|)
    """
    options, module = run.options, run.module
    module.eval()
    sums: dict[int, list[list[float]]] = {}
    for step, batch in enumerate(volumes):
        logits, labels = _forward(run, batch)
        found = logits.argmax(1)
        local = module.place_cases(torch.stack([_overlap(found, labels, k) for k in range(1, len(CLASSES))], -1))
        first = (step * module.replicas + module.replica) * options.batch
        for case, values in enumerate(pt.losses.total(module, local).transpose(0, 1).tolist(), first):
            sums[case] = values
    for others in module.gather(sums):
        sums.update(others)
    # The last batch is filled up with volumes that have been measured before.
    both, added = torch.tensor([sums[case] for case in range(options.held_out)]).unbind(1)
    dice = (2 * both / added).nanmean(0)
    return {name: float(value) for name, value in zip(CLASSES[1:], dice, strict=True)}


def _overlap(found: Tensor, labels: Tensor, kind: int) -> Tensor:
    """Voxels that are of a class in both, and those of each added up, per case: (2, cases)."""
    cells = tuple(range(1, labels.dim()))
    a, b = found == kind, labels == kind
    return torch.stack([(a & b).sum(cells), a.sum(cells) + b.sum(cells)]).double()


# --- files -------------------------------------------------------------------------------------------


def _tidy(options: TrainOptions) -> None:
    """Remove what an earlier run has left half written when it was killed."""
    for path in (*options.output.glob(".*.part*"), *options.data.glob(".*.part*")):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _save(run: Run) -> None:
    extra = {"step": run.done, "seconds": run.seconds, "rows": plain(run.rows), "options": run.options.decisive()}
    pt.checkpoint.save(run.options.checkpoint, run.module, run.optimiser, extra)


def _take_up(run: Run) -> None:
    """Go on from the checkpoint, which must be of the same network and data; the mesh may be another."""
    options = run.options
    extra = pt.checkpoint.load(options.checkpoint, run.module, run.optimiser)
    for name, value in options.decisive().items():
        before = extra["options"].get(name)
        if before != value:
            raise UsageError(f"the checkpoint in {options.output} was made with {name} {before}, not {value}; give the "
                             "same, or leave out --resume")
    if extra["step"] >= options.steps:
        raise UsageError(f"the checkpoint in {options.output} is at step {extra['step']} already; give more --steps")
    run.done, run.earlier, run.rows = extra["step"], extra["seconds"], rows_from(extra["rows"])


def _write_curves(run: Run) -> None:
    if not run.is_first:
        return
    try:
        write_table(run.rows, run.options.curves)
        if importlib.util.find_spec("matplotlib") is not None:
            draw(run.rows, title(run.options, str(run.plan.mesh)), run.options.picture)
    except OSError as error:
        raise SideError(f"{run.options.output}: the curves cannot be written ({error.strerror or error})") from None


def _finish(run: Run) -> Figures:
    """Write the trained network, and gather what is to be said."""
    interrupted = run.done < run.options.steps
    if not interrupted:
        run.module.to_onnx(run.options.model)
    peaks = run.module.gather(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    return Figures(run.rows, interrupted, run.seconds, tuple(peaks), str(run.plan.mesh), run.options.replicas,
                   sum(p.numel() for p in run.module.parameters()))
