"""Synthetic CT volumes with a liver and lesions, as files that every rank reads its own part of.

A volume is a phantom of its own patient with some other soft tissue as bright as the liver.  Values are prepared as
in the paper: Hounsfield units / 1024 + 0.5, between 0 and 1.  Labels: 0 background, 1 liver, 2 lesion.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from benchmarks.phantom import CLASS_NAMES, phantom

Kind: TypeAlias = Literal["train", "held-out"]

_FIRST_SEED = {"train": 0, "held-out": 1_000_000}
_VARIETY = 0.12
_LIVER, _LESION = CLASS_NAMES.index("liver"), CLASS_NAMES.index("lesion")
_BODY = CLASS_NAMES.index("body")
_DISTRACTORS = 3
_BRIGHTER = 180
"""Hounsfield units by which the liver is brighter than the tissue around the organs, nearly."""


@dataclass(frozen=True)
class Sample:
    """The two files of a volume: float32 and uint8 of extents (depth, height, width)."""

    volume: Path
    labels: Path


def make(size: Sequence[int], kind: Kind, number: int) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """A volume and its labels, of extents `size`; the same number gives the same ones."""
    seed = _FIRST_SEED[kind] + number
    scan = phantom(size, seed, _VARIETY)
    hounsfield = scan.hounsfield.astype(np.float32)
    for inside in _distractors(np.random.default_rng([seed, 1]), size):
        hounsfield[inside & (scan.classes == _BODY)] += _BRIGHTER
    labels = np.zeros(scan.classes.shape, np.uint8)
    labels[scan.classes == _LIVER] = 1
    labels[scan.classes == _LESION] = 2
    return np.clip(hounsfield / 1024 + 0.5, 0, 1).astype(np.float32), labels


def files(folder: Path, kind: Kind, count: int) -> list[Sample]:
    """Where the volumes of a kind stand."""
    return [Sample(folder / f"{kind}-{n:03}-volume.npy", folder / f"{kind}-{n:03}-labels.npy") for n in range(count)]


def write(folder: Path, kind: Kind, count: int, size: Sequence[int]) -> None:
    """Make the volumes that are not there yet.

    Raises:
        OSError: when they cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number, sample in enumerate(files(folder, kind, count)):
        if sample.volume.exists() and sample.labels.exists():
            continue
        volume, labels = make(size, kind, number)
        _save(sample.labels, labels)
        _save(sample.volume, volume)


def _distractors(random: np.random.Generator, size: Sequence[int]) -> list[NDArray[np.bool_]]:
    """Small ellipsoids in the body: other organs, to be told from the liver by their size and place."""
    grid = np.meshgrid(*(np.linspace(-1, 1, n, dtype=np.float32) for n in size), indexing="ij", sparse=True)
    found: list[NDArray[np.bool_]] = []
    for _ in range(_DISTRACTORS):
        centre = random.uniform((-0.8, -0.5, -0.7), (0.8, 0.5, 0.7))
        radii = random.uniform(0.1, 0.2, 3)
        distance = sum(((g - c) / r) ** 2 for g, c, r in zip(grid, centre, radii, strict=True))
        found.append(np.asarray(distance) < 1)
    return found


def _save(path: Path, array: NDArray[np.generic]) -> None:
    """Write beside and rename."""
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with beside.open("wb") as file:
            np.save(file, array)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
