"""The batches of a training run: every rank reads its own part of every volume's file."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import partitioner as pt
from benchmarks import liver
from benchmarks.errors import SideError
from benchmarks.train_options import TrainOptions

if TYPE_CHECKING:
    from torch import Tensor

VOLUME, LABELS = "volume", "labels"

_MARGIN = 8
"""Files have an eighth more voxels along each axis than a batch, for crops."""


def write_volumes(module: Any, options: TrainOptions, writes: bool) -> None:
    """Make the volumes that are not there yet: one process of every host writes, the others wait.

    Raises:
        SideError: on every process, when they cannot be written.
    """
    problem: str | None = None
    size = tuple(n + n // _MARGIN for n in options.size)
    if writes:
        try:
            liver.write(options.data, "train", options.volumes, size)
            liver.write(options.data, "held-out", options.held_out, size)
        except OSError as error:
            problem = f"{options.data}: the volumes cannot be written ({error.strerror or error})"
    found = next(filter(None, module.gather(problem)), None)
    if found is not None:
        raise SideError(found)


def training_volumes(module: Any, options: TrainOptions) -> Any:
    """The batches that the network learns from, in an order and with flips, crops and brightness of their own."""
    augment = (pt.data.Flip((0, 1, 2)), pt.data.Crop(),
               pt.data.Intensity(scale=(0.95, 1.05), shift=(-0.02, 0.02), noise=0.01))
    return pt.data.Volumes(module, _samples(options, "train", options.volumes), augment if options.augment else (),
                           seed=options.seed)


def held_out_volumes(module: Any, options: TrainOptions) -> Any:
    """The batches that Dice coefficients are measured on: the middle of each volume, as it is."""
    return pt.data.Volumes(module, _samples(options, "held-out", options.held_out), shuffle=False)


def endless(volumes: Any, done: int) -> Generator[dict[str, Tensor]]:
    """Batch after batch, epoch after epoch, from the one after `done` batches."""
    epoch, used = divmod(done, len(volumes))
    while True:
        volumes.set_epoch(epoch)
        for number, batch in enumerate(volumes):
            if number >= used:
                yield batch
        epoch, used = epoch + 1, 0


def _samples(options: TrainOptions, kind: liver.Kind, count: int) -> list[dict[str, str]]:
    return [{VOLUME: str(sample.volume), LABELS: str(sample.labels)}
            for sample in liver.files(options.data, kind, count)]
