"""What is measured, as data: suites of cases; a case is a network, a shape and the sides compared."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from benchmarks.errors import UsageError
from benchmarks.models import Norm, ResNetConfig, UNetConfig, export
from benchmarks.phantom import CLASS_NAMES, DEFAULT_SHAPE, phantom

Kind: TypeAlias = Literal["torch eager", "onnxruntime", "partitioned", "sliding window", "float64"]
Backend: TypeAlias = Literal["lockstep", "gloo"]
Task: TypeAlias = Literal["inference", "training", "budgets"]

# The network of the demo: Hounsfield units go in, so its first step is a soft-tissue window.
DEMO_NETWORK = UNetConfig(classes=len(CLASS_NAMES), levels=4, base=16, window=(40.0, 200.0))


@dataclass(frozen=True)
class Window:
    """A cube of `extent` voxels that slides over the volume; neighbours share the part `overlap` of it."""

    extent: int
    overlap: float


@dataclass(frozen=True)
class Side:
    """One way of computing a case; `mesh` and `backend` are those of a partitioned side.

    Args:
        share: a partitioned side's memory budget: this part of what the case's first side takes over its idle
            process, added to that idle process; 0 for the least that a side refused before it was told to give.
        window: a sliding window's.
    """

    name: str
    kind: Kind
    mesh: str = "single"
    backend: Backend = "lockstep"
    processes: int = 1
    share: float | None = None
    window: Window | None = None


@dataclass(frozen=True)
class Case:
    """A network on an input of shape (batch, channels, *spatial), computed by every side.

    Args:
        task: a forward pass, a whole step of training, or a forward pass under memory budgets; there, errors are
            against float64, and every process gives freed memory back at once.
        optional: measured only when it is asked for by name.
    """

    name: str
    what: str
    network: UNetConfig | ResNetConfig
    shape: tuple[int, ...]
    sides: tuple[Side, ...]
    task: Task = "inference"
    optional: bool = False


@dataclass(frozen=True)
class Suite:
    """Cases that are measured together."""

    name: str
    what: str
    cases: tuple[Case, ...]

    def only(self, case: str | None) -> Suite:
        """The suite with the named case alone, or with all that are not optional for None.

        Raises:
            UsageError: for an unknown name.
        """
        usual = tuple(c for c in self.cases if not c.optional)
        return replace(self, cases=usual if case is None else (self.case(case),))

    def case(self, name: str) -> Case:
        """The case of this name.

        Raises:
            UsageError: for an unknown name.
        """
        found = next((case for case in self.cases if case.name == name), None)
        if found is None:
            raise UsageError(f"case '{name}' is not in suite '{self.name}'; it has {_names(self.cases)}")
        return found


PEERS = (Side("torch eager", "torch eager"), Side("onnxruntime", "onnxruntime"))
SHARDS = (
    Side("1 shard", "partitioned"),
    Side("2 shards", "partitioned", "depth=2", "gloo", 2),
    Side("4 shards", "partitioned", "depth=2,height=2", "gloo", 4),
)

TRAINED_NETWORK = replace(DEMO_NETWORK, norm="batch", down="maxpool")
TRAINERS = (
    Side("torch eager", "torch eager"),
    Side("1 shard", "partitioned"),
    Side("2 shards", "partitioned", "depth=2", "gloo", 2),
)
TRAINING_RANKS = (
    Side("1 rank", "partitioned", "single", "gloo", 1),
    Side("2 ranks", "partitioned", "depth=2", "gloo", 2),
    Side("4 ranks", "partitioned", "depth=2,height=2", "gloo", 4),
    Side("8 ranks", "partitioned", "depth=2,height=2,width=2", "gloo", 8),
)

WHOLE = Side("whole volume", "partitioned")
LEAST = Side("least budget", "partitioned", share=0.0)
BUDGETS = (*(Side(f"budget 1/{n}", "partitioned", share=1 / n) for n in (2, 3, 4, 5, 6)), LEAST)
WINDOWS = tuple(
    Side(f"sliding window, {overlap}", "sliding window", window=Window(96, overlap)) for overlap in (0.25, 0.5)
)
FLOAT64 = Side("float64", "float64")
"""What the errors of the sides under budgets are against; no side of any case, and not measured."""


def _under_budgets(norm: Norm, extent: int, optional: bool = False) -> Case:
    return Case(
        f"{norm}-{extent}",
        f"3D U-Net, 4 levels, base 16, {norm} norm, max pool; {extent} x {extent} x {extent} voxels",
        replace(DEMO_NETWORK, norm=norm, down="maxpool"),
        (1, 1, extent, extent, extent),
        (WHOLE, *BUDGETS, *PEERS, *WINDOWS),
        "budgets",
        optional,
    )


SUITES = (
    Suite(
        "quick",
        "the demo's network and volume on 1, 2 and 4 shards beside torch eager and onnxruntime",
        (
            Case(
                "demo",
                "3D U-Net, 4 levels, base 16, instance norm; 121 x 160 x 143 voxels",
                DEMO_NETWORK,
                (1, 1, *DEFAULT_SHAPE),
                PEERS + SHARDS,
            ),
        ),
    ),
    Suite(
        "smoke",
        "seconds long: whether every side runs and agrees, no figure to quote",
        (
            Case(
                "tiny",
                "3D U-Net, 3 levels, base 4; 29 x 37 x 31 voxels",
                replace(DEMO_NETWORK, levels=3, base=4),
                (1, 1, 29, 37, 31),
                PEERS + SHARDS,
            ),
        ),
    ),
    Suite(
        "training",
        "a step of training (forward, loss, backward, optimiser) beside torch eager, and its memory on 1 to 8 ranks",
        (
            Case(
                "step",
                "3D U-Net, 4 levels, base 16, batch norm; 96 x 96 x 96 voxels",
                TRAINED_NETWORK,
                (1, 1, 96, 96, 96),
                TRAINERS,
                "training",
            ),
            Case(
                "memory",
                "the same network; how the memory of a process (and of all) goes with the number of ranks",
                TRAINED_NETWORK,
                (1, 1, 96, 96, 96),
                TRAINING_RANKS,
                "training",
            ),
        ),
    ),
    Suite(
        "training-smoke",
        "seconds long: whether every side of training runs and agrees, no figure to quote",
        (
            Case(
                "tiny",
                "3D U-Net, 3 levels, base 4, batch norm; 29 x 37 x 31 voxels",
                replace(TRAINED_NETWORK, levels=3, base=4),
                (1, 1, 29, 37, 31),
                TRAINERS + TRAINING_RANKS,
                "training",
            ),
        ),
    ),
    Suite(
        "depth-first",
        "time against memory: the whole volume, memory budgets, torch eager, onnxruntime and MONAI's sliding window",
        (
            *(_under_budgets(norm, extent) for extent in (128, 192) for norm in ("batch", "instance")),
            *(_under_budgets(norm, 256, optional=True) for norm in ("batch", "instance")),
        ),
    ),
    Suite(
        "depth-first-smoke",
        "seconds long: whether budgets are kept or refused and every side agrees, no figure to quote",
        (
            Case(
                "tiny",
                "3D U-Net, 2 levels, base 8, batch norm; 64 x 60 x 62 voxels",
                replace(DEMO_NETWORK, levels=2, base=8, norm="batch", down="maxpool"),
                (1, 1, 64, 60, 62),
                (
                    WHOLE,
                    Side("budget 1/10", "partitioned", share=0.1),
                    LEAST,
                    PEERS[1],
                    Side("sliding window, 0.25", "sliding window", window=Window(48, 0.25)),
                ),
                "budgets",
            ),
        ),
    ),
)


def find_suite(name: str) -> Suite:
    """The suite of this name.

    Raises:
        UsageError: for an unknown name.
    """
    found = next((suite for suite in SUITES if suite.name == name), None)
    if found is None:
        raise UsageError(f"suite '{name}' is unknown; choose from {_names(SUITES)}")
    return found


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
    key = hashlib.sha256(repr((case.network, case.shape)).encode()).hexdigest()[:12]
    path = folder / f"{case.name}-{key}.onnx"
    return path if path.exists() or case.task == "training" else export(case.network.build(), case.shape, path)


def _names(items: Sequence[Suite] | Sequence[Case]) -> str:
    return ", ".join(item.name for item in items)
