"""Measures what this machine can do, with the kernels and transports that run plans: `partition calibrate`."""

from __future__ import annotations

import itertools
import math
import os
import platform
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from partitioner.curves import Curve, Grid
from partitioner.errors import ExecutionError
from partitioner.profile import Kernels, Link, Profile
from runtime.executor import Executor, Progress
from runtime.feeds import ArrayDrain, ArrayFeed
from runtime.gauge import Gauge, Trial
from runtime.gauge_link import copy_times, process_times
from runtime.gauge_trials import CONVOLUTIONS, KINDS, block
from runtime.group import check_device
from runtime.program import Step
from runtime.session import cpu_threads
from runtime.transports.lockstep import Lockstep

KIB, MIB = 1 << 10, 1 << 20


@dataclass(frozen=True)
class Extent:
    """How much is measured.

    Args:
        patience: seconds spent on one kernel at one size.
        most_flops, most_bytes: of one call.
        sizes: bytes, read and written, for which kernels are timed that memory bounds.
        cells: output cells per channel for which convolutions are.
        channels: channels in and out for which they are.
        messages: bytes of messages.
        file: bytes of the file that is written and read.
    """

    patience: float
    most_flops: float
    most_bytes: float
    sizes: tuple[int, ...]
    cells: tuple[int, ...]
    channels: tuple[tuple[int, ...], tuple[int, ...]]
    messages: tuple[int, ...]
    file: int


# Twice somewhat less and more than 4 MiB: larger results of kernels that cannot write to given memory take pages anew.
FULL = Extent(0.006, 32e9, 300e6, (16 * KIB, 128 * KIB, MIB, 4 * MIB, 7680 * KIB, 9 * MIB, 32 * MIB, 128 * MIB),
              (64, 512, 4096, 32768, 262144, 2097152), ((1, 4, 16, 64, 256), (1, 16, 64, 256)),
              (64, 4 * KIB, 64 * KIB, 512 * KIB, 4 * MIB, 16 * MIB), 64 * MIB)
QUICK = Extent(0.002, 0.5e9, 80e6, (16 * KIB, MIB, 7680 * KIB, 9 * MIB, 32 * MIB),
               (64, 4096, 32768, 262144), ((1, 16, 64), (1, 16, 64)),
               (64, 64 * KIB, MIB, 8 * MIB), 16 * MIB)


def calibrate(device: str = "cpu", threads: int | None = None, quick: bool = False,
              progress: Progress | None = None) -> Profile:
    """Measure this machine.

    Args:
        device: cpu, cuda or cuda:N.
        threads: CPU threads for which kernels are measured; 1 and all cores when not given.
        quick: fewer points, less precise.
        progress: called with (points done, points in all, what is measured).

    Raises:
        PartitionError: when there is no such device.
        ExecutionError: when messages between two processes fail.
    """
    found = check_device(device)
    extent = QUICK if quick else FULL
    counts = [threads] if threads else sorted({1, torch.get_num_threads()})
    if found.type != "cpu":
        counts = [1]
    points = list(_points(extent))
    said = _Said(progress, len(counts) * len(points) + 3)
    kernels = []
    for count in counts:
        with cpu_threads(count if found.type == "cpu" else None):
            kernels.append(_kernels(found, count, extent, points, said))
    said("messages")
    links = _links(extent)
    said("files")
    read, write = _files(extent.file)
    said("done")
    name = torch.cuda.get_device_name(found) if found.type == "cuda" else "cpu"
    versions = {"torch": torch.__version__, "numpy": np.__version__}
    on = f" on {os.cpu_count()} cores of {platform.processor() or platform.machine()}" if name == "cpu" else ""
    how = f"partition calibrate{' --quick' if quick else ''}{on}, {time.strftime('%Y-%m-%d')}"
    return Profile("this machine", how, name, True, versions, tuple(kernels), links, read, write)


class _Said:
    """Counts points and tells whoever wants to know."""

    def __init__(self, progress: Progress | None, count: int) -> None:
        self._progress, self._count, self._done = progress, count, 0

    def __call__(self, what: str) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress(min(self._done, self._count), self._count, what)


# --- kernels ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Point:
    """One measurement: where it goes, and what is timed."""

    table: str
    key: tuple[float, ...]
    trial: Trial
    flops: float = 0.0


def _kernels(device: torch.device, threads: int, extent: Extent, points: Sequence[_Point], said: _Said) -> Kernels:
    gauge = Gauge(device, extent.patience)
    curves: dict[str, dict[float, float]] = {}
    rates: dict[str, dict[tuple[float, ...], float]] = {}
    for point in points:
        said(f"{threads} threads: {point.table}")
        seconds = gauge.seconds(point.trial)
        if point.flops:
            rates.setdefault(point.table, {})[point.key] = point.flops / seconds
        else:
            curves.setdefault(point.table, {})[point.trial.nbytes()] = seconds
    for size in extent.sizes:
        shape = (1, 4, *block(size / 32))
        curves.setdefault("reorder", {})[8 * math.prod(shape)] = gauge.reorder_seconds(shape)
    launch = min(min(times.values()) for times in curves.values())
    if device.type == "cpu":
        curves["pages"] = {float(size): gauge.page_seconds(size) for size in extent.sizes}
    axes = _axes(extent)
    return Kernels(
        threads=threads,
        launch=launch,
        step=max(1e-7, _step_seconds(gauge) - launch),
        flops={"float32": _product_rate(gauge), "float64": _product_rate(gauge) / 2},
        bandwidth=max(curves["copy"]) / curves["copy"][max(curves["copy"])],
        lanes=_lanes(device),
        curves={name: Curve.of(times) for name, times in curves.items()},
        grids={name: Grid.of(axes[name], found) for name, found in rates.items()},
    )


def _lanes(device: torch.device) -> int:
    """Floats in a vector register of the CPU: so many output channels convolutions compute at once."""
    if device.type != "cpu":
        return 1
    return {"AVX512": 16, "AVX2": 8}.get(torch.backends.cpu.get_cpu_capability(), 4)


def _points(extent: Extent) -> Iterator[_Point]:
    for kind, size in itertools.product(KINDS, extent.sizes):
        yield _Point(kind, (size,), KINDS[kind](size))
    for table, axes in _axes(extent).items():
        for key in itertools.product(*(values for _, values in axes)):
            trial, flops = CONVOLUTIONS[table](*(int(k) for k in key))
            smallest = key[-1] == min(axes[-1][1])
            if smallest or (flops <= extent.most_flops and trial.nbytes() <= extent.most_bytes):
                yield _Point(table, key, trial, flops)


def _axes(extent: Extent) -> dict[str, list[tuple[str, tuple[float, ...]]]]:
    inputs, outputs = extent.channels
    large = tuple(n for n in extent.cells if n >= 4096)
    wide, many = (tuple(n for n in found if n >= 16) for found in (inputs, outputs))
    return {
        "conv": [("channels in", inputs), ("channels out", outputs), ("window", (1, 9, 27)), ("cells", extent.cells)],
        "transposed": [("channels in", wide), ("channels out", many), ("cells", large)],
        "depthwise": [("window", (9, 27)), ("cells", tuple(8 * n for n in large if n < 1 << 20))],
    }


def _product_rate(gauge: Gauge) -> float:
    """Operations per second of a matrix product."""
    n = 512 if gauge.device.type == "cpu" else 4096
    a, b = torch.ones(n, n, device=gauge.device), torch.ones(n, n, device=gauge.device)
    return 2.0 * n**3 / gauge.usual(lambda: torch.mm(a, b))


def _step_seconds(gauge: Gauge) -> float:
    """What the executor takes for a step, the smallest kernel included."""
    count = 200
    shard, action = gauge.prepare(Trial("Relu", ((1, 4, 2, 2, 2),)))
    steps = tuple(Step(action, (), ()) for _ in range(count))
    shard.program = replace(shard.program, steps=steps)
    executor = Executor([shard], Lockstep(1))
    return gauge.usual(lambda: executor.run(ArrayFeed({}), ArrayDrain({}))) / count


# --- messages and files -------------------------------------------------------------------------------


def _links(extent: Extent) -> dict[str, Link]:
    found: dict[str, Link] = {}
    for name, times in (("lockstep", copy_times(extent.messages, 2 * extent.patience)),
                        *((name, process_times(name, extent.messages, 10 * extent.patience))
                          for name in ("gloo", "shm"))):
        first, last = min(times), max(times)
        found[name] = Link(times[first], last / times[last], Curve.of({float(n): s for n, s in times.items()}))
    return found


def _files(nbytes: int) -> tuple[float, float]:
    """Bytes per second from and to a file in the folder for temporary files, the system's cache left aside.

    Raises:
        ExecutionError: when there is no room.
    """
    data = os.urandom(MIB) * (nbytes // MIB)
    try:
        with tempfile.TemporaryDirectory(prefix="partitioner-") as folder:
            path = Path(folder) / "data"
            start = time.perf_counter()
            with path.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                written = time.perf_counter() - start
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            start = time.perf_counter()
            path.read_bytes()
            read = time.perf_counter() - start
    except OSError as error:
        raise ExecutionError(f"{tempfile.gettempdir()}: no file of {nbytes} bytes can be written there "
                             f"({error.strerror}); set TMPDIR to a folder with room") from None
    return nbytes / read, nbytes / written
