"""What a measurement is made of, as values: suites of cases; a case is a network, a shape, the sides and the bars."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from benchmarks.errors import UsageError
from benchmarks.models import DType, ResNetConfig, UNetConfig, export
from benchmarks.phantom import CLASS_NAMES, phantom

Kind: TypeAlias = Literal[
    "partitioned",
    "torch eager",
    "torch channels last",
    "torch.compile",
    "onnxruntime",
    "jax",
    "naive gloo",
    "careful gloo",
    "sliding window",
    "float64",
]
Backend: TypeAlias = Literal["lockstep", "gloo"]
Task: TypeAlias = Literal["inference", "training", "budgets"]
Device: TypeAlias = Literal["cpu", "cuda"]
Measure: TypeAlias = Literal["time", "memory", "process", "sent per rank", "messages per rank"]

# The network of the demo: Hounsfield units go in, so its first step is a soft-tissue window.
DEMO_NETWORK = UNetConfig(classes=len(CLASS_NAMES), levels=4, base=16, window=(40.0, 200.0))


@dataclass(frozen=True)
class Window:
    """A cube of `extent` voxels that slides over the volume; neighbours share the part `overlap` of it."""

    extent: int
    overlap: float


@dataclass(frozen=True)
class Side:
    """One way of computing a case; `mesh` is that of a side that splits the volume.

    Args:
        backend: a partitioned side's.
        processes: those that share the threads.
        share: a partitioned side's memory budget: this part of what the case's first side takes over its idle
            process, added to that idle process; 0 for the least that a side refused before it was told to give.
        window: a sliding window's.
        slabs: whether a partitioned side may go through shards slab by slab.
        reuse: the process keeps freed memory for its next blocks instead of giving it back to the system.
    """

    name: str
    kind: Kind
    mesh: str = "single"
    backend: Backend = "lockstep"
    processes: int = 1
    share: float | None = None
    window: Window | None = None
    reuse: bool = False
    slabs: bool = True

    @property
    def own(self) -> bool:
        """Whether this is the toolkit, and no peer."""
        return self.kind == "partitioned"

    @property
    def shards(self) -> int:
        """Parts of the volume: `depth=2,height=2` has 4."""
        return 1 if self.mesh == "single" else int(np.prod([int(axis.split("=")[1]) for axis in self.mesh.split(",")]))


@dataclass(frozen=True)
class Bar:
    """What a case must reach: the side's measure over that of another side, or alone, is at most this.

    Measures: `time` in seconds; `memory` of all processes and `process` of the largest one, as rises over idle
    processes in bytes; `sent per rank` in bytes and `messages per rank`, both of the rank that sends most.
    """

    measure: Measure
    side: str
    of: str | None
    most: float

    @property
    def name(self) -> str:
        """In words: `time: ours / onnxruntime`."""
        return f"{self.measure}: {self.side}" + (f" / {self.of}" if self.of else "")


@dataclass(frozen=True)
class Case:
    """A network on an input of shape (batch, channels, *spatial), computed by every side.

    Args:
        task: a forward pass, a whole step of training, or a forward pass under memory budgets; there, errors are
            against float64, and every process gives freed memory back at once.
        optional: measured only when it is asked for by name.
        limits: measure the best convolution and copy that the machine does, beside the sides.
        dtype: of weights and volume.
    """

    name: str
    what: str
    network: UNetConfig | ResNetConfig
    shape: tuple[int, ...]
    sides: tuple[Side, ...]
    task: Task = "inference"
    optional: bool = False
    bars: tuple[Bar, ...] = ()
    limits: bool = False
    dtype: DType = "float32"


@dataclass(frozen=True)
class Suite:
    """Cases that are measured together, on one device."""

    name: str
    what: str
    cases: tuple[Case, ...]
    device: Device = "cpu"

    def only(self, cases: Sequence[str] = (), peers: Sequence[str] = ()) -> Suite:
        """The suite with the named cases alone, or with all that are not optional where none is named.

        Args:
            cases: names; each must be there.
            peers: names of sides; with any, the other sides that are not our own are left out, each case's first
                excepted, which differences are against.

        Raises:
            UsageError: for an unknown name.
        """
        chosen = tuple(map(self.case, cases)) or tuple(c for c in self.cases if not c.optional)
        known = {side.name: side for case in chosen for side in case.sides if not side.own}
        unknown = next((peer for peer in peers if peer not in known), None)
        if unknown is not None:
            raise UsageError(f"peer '{unknown}' is in no case of this run; they have {'; '.join(known) or 'none'}")
        return replace(self, cases=tuple(_with_peers(case, peers) for case in chosen) if peers else chosen)

    def case(self, name: str) -> Case:
        """The case of this name.

        Raises:
            UsageError: for an unknown name.
        """
        found = next((case for case in self.cases if case.name == name), None)
        if found is None:
            raise UsageError(f"case '{name}' is not in suite '{self.name}'; it has {names(self.cases)}")
        return found


def _with_peers(case: Case, peers: Sequence[str]) -> Case:
    sides = tuple(side for side in case.sides if side.own or side.name in peers or side is case.sides[0])
    kept = {side.name for side in sides}
    return replace(case, sides=sides, bars=tuple(b for b in case.bars if {b.side, b.of or b.side} <= kept))


def example_input(case: Case) -> NDArray[np.float32]:
    """The phantom for one-channel volumes (one seed per volume of the batch), otherwise normal noise."""
    batch, channels, *spatial = case.shape
    if channels != 1 or len(spatial) != 3:
        return np.random.default_rng(0).standard_normal(case.shape, dtype=np.float32)
    scans = [phantom(spatial, seed).hounsfield[None] for seed in range(batch)]
    return np.stack(scans).astype(np.float32)


def example_classes(case: Case) -> NDArray[np.uint8]:
    """A class for every voxel, to train on: the phantom's, otherwise by the sign of the input; (batch, *spatial)."""
    batch, channels, *spatial = case.shape
    if channels != 1 or len(spatial) != 3:
        return (example_input(case)[:, 0] > 0).astype(np.uint8)
    return np.stack([phantom(spatial, seed).classes for seed in range(batch)])


def exported(case: Case, folder: Path) -> Path:
    """The case's ONNX file in the folder, exported unless an equal one is there; training begins with the module."""
    key = hashlib.sha256(repr((case.network, case.shape, case.dtype)).encode()).hexdigest()[:12]
    path = folder / f"{case.name}-{key}.onnx"
    if path.exists() or case.task == "training":
        return path
    return export(case.network.build(), case.shape, path, dtype=case.dtype)


def names(items: Sequence[Suite] | Sequence[Case]) -> str:
    """Names in a row, for messages."""
    return ", ".join(item.name for item in items)
