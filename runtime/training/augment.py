"""Augmentations of whole volumes that shards can do by themselves: crops, flips, intensities.

    augment = [pt.data.Crop(), pt.data.Flip(("depth", "width")), pt.data.Intensity(noise=0.05)]

What happens to a case is drawn from (seed, epoch, place in the order), so that all ranks draw the same.  A crop moves
and a flip mirrors the cells that a rank reads; the noise of a voxel comes from its index in the whole volume:

    plan, 10 cells   rank 1 owns [6, 10)      file, 14 cells, offset 3, mirrored: it reads [3, 7), turned round
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from partitioner.errors import PartitionError
from partitioner.geometry import Box, Interval
from partitioner.mesh import spatial_names
from partitioner.ops.own.training import uniform


@dataclass(frozen=True)
class Flip:
    """Mirrors each of some spatial axes, or does not, by chance.

    Args:
        axes: numbers from 0, or names: depth, height, width (in 2D height and width).
        p: the probability for each.

    Raises:
        PartitionError: for a p that is no probability.
    """

    axes: tuple[int | str, ...]
    p: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1:
            raise PartitionError(f"Flip: p={self.p} is no probability; give a number from 0 to 1")


@dataclass(frozen=True)
class Crop:
    """Takes the plan's extents from a random place of a larger file; without it the middle is taken."""


@dataclass(frozen=True)
class Intensity:
    """Inputs become `values * scale + shift + noise * normal`, scale and shift drawn once per case.

    Args:
        scale, shift: (lowest, highest).
        noise: standard deviation, in the unit of the values.

    Raises:
        PartitionError: for bounds in the wrong order or a negative noise.
    """

    scale: tuple[float, float] = (0.9, 1.1)
    shift: tuple[float, float] = (-0.1, 0.1)
    noise: float = 0.0

    def __post_init__(self) -> None:
        for name, bounds in (("scale", self.scale), ("shift", self.shift)):
            if len(bounds) != 2 or not bounds[0] <= bounds[1]:
                raise PartitionError(f"Intensity: {name}={bounds}; give (lowest, highest)")
        if not self.noise >= 0:
            raise PartitionError(f"Intensity: noise={self.noise}; give a standard deviation of 0 or more")


Augmentation = Flip | Crop | Intensity


@dataclass(frozen=True)
class Change:
    """What an `Intensity` does to one case."""

    scale: float
    shift: float
    noise: float
    seed: int

    def apply(self, values: torch.Tensor, box: Box, extents: Sequence[int], layer: int) -> torch.Tensor:
        """Changed values of a box of a volume with these extents.

        Args:
            layer: another number gives other noise.
        """
        changed = values * self.scale + self.shift
        if not self.noise:
            return changed
        return changed + normal(box, extents, self.seed, layer).to(values.dtype) * self.noise


@dataclass(frozen=True)
class Draw:
    """What happens to one case.

    Args:
        flips: per spatial axis, whether it is mirrored.
        crop: per spatial axis a number in [0, 1): where in the room that there is; None takes the middle.
    """

    flips: tuple[bool, ...]
    crop: tuple[float, ...] | None = None
    changes: tuple[Change, ...] = ()

    def offset(self, axis: int, room: int) -> int:
        """Where the cells that are taken begin, on an axis of which `room` cells are left over."""
        return room // 2 if self.crop is None else int(self.crop[axis] * (room + 1))


def generator(seed: int, *where: int) -> np.random.Generator:
    """Random numbers of a place in the work, the same on every rank and in every run."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=where)))


def draw(augment: Sequence[Augmentation], numbers: np.random.Generator, axes: int) -> Draw:
    """What happens to a case with this many spatial axes."""
    flips, crop, changes = [False] * axes, None, list[Change]()
    for step in augment:
        match step:
            case Flip():
                for axis in flipped_axes(step, axes):
                    flips[axis] ^= bool(numbers.random() < step.p)
            case Crop():
                crop = tuple(float(u) for u in numbers.random(axes))
            case Intensity():
                scale, shift = (low + (high - low) * float(numbers.random()) for low, high in (step.scale, step.shift))
                changes.append(Change(scale, shift, step.noise, int(numbers.integers(2**63))))
    return Draw(tuple(flips), crop, tuple(changes))


def flipped_axes(flip: Flip, axes: int) -> tuple[int, ...]:
    """The numbers of the axes that may be mirrored.

    Raises:
        PartitionError: for an axis that a volume with this many spatial axes does not have.
    """
    names = spatial_names(axes)
    found = [names.index(a) if isinstance(a, str) and a in names else a for a in flip.axes]
    wrong = [a for a in found if isinstance(a, str) or not 0 <= a < axes]
    if wrong:
        raise PartitionError(f"Flip: there is no spatial axis {wrong[0]!r}; use "
                             f"{', '.join(f'{i} ({name})' for i, name in enumerate(names))}")
    return tuple(a for a in found if isinstance(a, int))


def cells_to_read(wanted: Interval, extent: int, offset: int, is_flipped: bool) -> Interval:
    """The cells of the file behind the cells of an axis of the plan."""
    inside = Interval(extent - wanted.stop, extent - wanted.start) if is_flipped else wanted
    return inside.shift(offset)


def normal(box: Box, extents: Sequence[int], seed: int, layer: int) -> torch.Tensor:
    """Normal numbers for the cells of a box, functions of seed, layer and the cells' indices (Box and Muller).

    Computed in float64 and rounded to float32: a last bit that depends on a cell's place in the shard, as
    vectorised logarithms may have it, does not survive.
    """
    device = torch.device("cpu")
    radius, angle = (uniform(box, extents, seed, 2 * layer + i, device).double() for i in (0, 1))
    return ((-2 * torch.log1p(-radius)).sqrt() * torch.cos(2 * math.pi * angle)).float()
