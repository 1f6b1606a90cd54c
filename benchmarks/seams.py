"""MONAI's sliding window beside the whole volume: how far each is from the torch module run whole, and where.

The U-Net learns on whole small phantoms, so that windows meet its instance norms with statistics it has never seen;
one that learnt on windows would flip fewer labels, or others.
"""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.errors import UsageError
from benchmarks.memory import give_back_memory, level, sampled
from benchmarks.phantom import phantom
from benchmarks.picture import Slice
from benchmarks.suite import DEMO_NETWORK
from benchmarks.training import fit

_MIB = 2**20
_TOGETHER = 4  # windows: with one, torch leaves oneDNN for slower kernels


@dataclass(frozen=True)
class Seams:
    """What is compared.

    Args:
        size: voxels along each axis of the volume.
        window: voxels along each axis of a window.
        overlap: share of a window, from 0 to below 1.
        blend: MONAI's weights where windows overlap, constant or gaussian.
        memory: the whole volume's budget; None for none.
        base: the U-Net's filters at the finest level.
        train_steps: 0 leaves the weights random.
        output: the picture.
    """

    size: int
    window: int
    overlap: float
    blend: str
    memory: str | None
    base: int
    train_steps: int
    output: Path


@dataclass(frozen=True)
class Measured:
    """One way's logits (1, classes, depth, height, width), seconds, and bytes beside what the process held before."""

    name: str
    logits: torch.Tensor
    seconds: float
    rise: int


def run_seams(seams: Seams, console: Console) -> int:
    """Compare, print a table and write the picture; 0 when done.

    Raises:
        UsageError: without MONAI or matplotlib, for a window or budget that does not fit, or a path not writable.
    """
    import partitioner as pt

    _check(seams)
    from monai.inferers import SlidingWindowInferer

    scan = phantom((seams.size,) * 3)
    inputs = torch.from_numpy(scan.hounsfield).float()[None, None]
    network = replace(DEMO_NETWORK, base=seams.base).build()
    console.print(f"a 3D U-Net with instance norms learns the phantom ({seams.train_steps} steps)")
    fit(network, seams.train_steps)
    sliding = SlidingWindowInferer((seams.window,) * 3, _TOGETHER, seams.overlap, mode=seams.blend)
    try:
        with torch.no_grad(), pt.monai.WholeVolumeInferer(memory=seams.memory) as whole:
            plain = _measure("torch, whole", lambda: network(inputs))
            started = time.perf_counter()
            whole(inputs, network)
            prepared = time.perf_counter() - started
            exact = _measure("whole volume", lambda: whole(inputs, network))
            tiled = _measure("sliding window", lambda: sliding(inputs, network))
    except pt.PartitionError as error:
        raise UsageError(str(error)) from None
    console.print(_table(seams, plain, (exact, tiled)))
    console.print("errors are from torch, whole, also in standard deviations of its output; MiB are those beside what "
                  "the process held before", highlight=False)
    console.print(f"the first call of WholeVolumeInferer, with export and plan, took {prepared:.1f} s", highlight=False)
    _draw(seams, scan.hounsfield, (plain, exact, tiled))
    console.print(f"wrote {seams.output}", highlight=False)
    return 0


def _check(seams: Seams) -> None:
    """Find the user's mistakes before the minutes of work."""
    if importlib.util.find_spec("monai") is None:
        raise UsageError("seams needs MONAI: pip install 'partitioner[monai]'")
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("seams needs matplotlib: pip install 'partitioner[plot]'")
    if seams.window > seams.size:
        raise UsageError(f"--window {seams.window}: is larger than the volume (--size {seams.size})")
    if not 0 <= seams.overlap < 1:
        raise UsageError(f"--overlap {seams.overlap}: must lie from 0 to below 1")
    if seams.output.suffix != ".png" or not os.access(seams.output.absolute().parent, os.W_OK):
        raise UsageError(f"--output {seams.output}: give a .png file in a folder that can be written")


def _measure(name: str, call: Callable[[], torch.Tensor]) -> Measured:
    give_back_memory()
    before = level(os.getpid()).total
    started = time.perf_counter()
    with sampled(os.getpid()) as sampler:
        logits = call()
        seconds = time.perf_counter() - started
        peak = sampler.stop()
    return Measured(name, logits, seconds, peak.total - before)


def _table(seams: Seams, plain: Measured, others: Sequence[Measured]) -> Table:
    windows = len(window_starts(seams.size, seams.window, seams.overlap)) ** 3
    budget = f"memory {seams.memory}" if seams.memory else "no budget"
    table = Table(title=f"{seams.size}³ voxels; {windows} windows of {seams.window}³, overlap {seams.overlap:g}, "
                        f"{seams.blend}; {budget}")
    for column in ("", "largest error", "deviations", "labels flip", "seconds", "MiB"):
        table.add_column(column, justify="right" if column else "left")
    table.add_row(plain.name, "", "", "", f"{plain.seconds:.2f}", f"{plain.rise / _MIB:.0f}")
    for other in others:
        largest = (other.logits - plain.logits).abs().max().item()
        flipped = (labels(other) != labels(plain)).mean()
        table.add_row(other.name, f"{largest:.2g}", f"{largest / plain.logits.std().item():.2g}", f"{flipped:.3%}",
                      f"{other.seconds:.2f}", f"{other.rise / _MIB:.0f}")
    return table


def labels(measured: Measured) -> NDArray[np.uint8]:
    """The class of every voxel, (depth, height, width)."""
    return measured.logits[0].argmax(0).numpy().astype(np.uint8)


def window_starts(size: int, window: int, overlap: float) -> list[int]:
    """Where MONAI's windows begin along an axis; the last one is moved back to end with the volume."""
    step = max(1, int(window * (1 - overlap)))
    count = -(-(size - window) // step) + 1
    return [min(i * step, size - window) for i in range(count)]


def _draw(seams: Seams, scan: NDArray[np.int16], measured: tuple[Measured, Measured, Measured]) -> None:
    from benchmarks.seams_picture import draw_seams

    plain, exact, tiled = measured
    deviation = plain.logits.std().item()
    differences = [((m.logits - plain.logits).abs().amax((0, 1)) / deviation).numpy() for m in (exact, tiled)]
    seen = sum(np.sqrt((labels(plain) == kind).sum((1, 2))) for kind in range(plain.logits.shape[1]))
    place = Slice(0, int(np.argmax(seen)))  # with most of every class
    starts = window_starts(seams.size, seams.window, seams.overlap)
    borders = sorted({edge for start in starts for edge in (start, start + seams.window)} - {0, seams.size})
    try:
        draw_seams(seams.output, scan, (labels(exact), labels(tiled)), differences, borders, place)
    except OSError as error:
        raise UsageError(f"--output {seams.output}: {error.strerror}; choose another") from None
