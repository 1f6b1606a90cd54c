"""Losses over shards: the value over the whole volume on every rank, and its exact gradient.

    loss = pt.losses.cross_entropy(module, logits, labels)      loss.backward()

Numerators and denominators are summed over all ranks, with the real number of voxels.  The last sum hands its
cotangent back as it is: every rank back-propagates the share of the loss that its own cells have, and the
parameters' gradients are then summed over the ranks.  (With the true adjoint, which sums the cotangents of all
ranks, each rank's equal loss would count once per rank.)

A loss of your own on a rank's own part must be a sum over cells, divided by what is the same on all ranks:
`(criterion(logits, labels, reduction="sum") / cells_of_the_whole)`.  `agree(loss)` tells whether all ranks have
the same value, as every loss of this module has.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.nn import functional

from partitioner.errors import PartitionError
from runtime.group import Group, gather, peers
from runtime.training.module import PartitionedModule


class _Sum(torch.autograd.Function):
    """Sum over ranks; backward the local cotangent as it is."""

    @staticmethod
    def forward(ctx: Any, local: torch.Tensor, share: float, group: Group) -> torch.Tensor:
        total = local * share
        with peers():
            dist.all_reduce(total, group=group.resolve())
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
        return grad_outputs[0], None, None


def total(module: PartitionedModule, local: torch.Tensor, output: str | None = None) -> torch.Tensor:
    """What the ranks' own parts of an output add up to; parts that several ranks have alike count once.

    Args:
        local: a sum over this rank's own cells (over all cells, where all ranks are in this process).

    Raises:
        ExecutionError: when a rank is gone.
    """
    if module.grid is None:
        return local
    result = _Sum.apply(local, module.share(output), module.grid.space)  # type: ignore[no-untyped-call]
    assert isinstance(result, torch.Tensor)
    return result


def cross_entropy(module: PartitionedModule, logits: torch.Tensor, labels: torch.Tensor,
                  weight: torch.Tensor | None = None, ignore_index: int = -100,
                  output: str | None = None) -> torch.Tensor:
    """The mean cross entropy, as `torch.nn.functional.cross_entropy` has it.

    Args:
        logits: (batch, classes, ...), whole or this rank's own part as the module returns it.
        labels: (batch, ...), integers, of the same cells.
        weight: per class.
        output: the name of the module's output, where it has several.
    """
    chosen = labels != ignore_index
    weights = torch.ones_like(labels, dtype=logits.dtype)
    if weight is not None:
        weights = weight.to(logits)[labels.clamp(0, len(weight) - 1)]
    losses = functional.cross_entropy(logits, labels, weight, ignore_index=ignore_index, reduction="sum")
    return total(module, losses, output) / total(module, (weights * chosen).sum().detach(), output)


def bce_with_logits(module: PartitionedModule, logits: torch.Tensor, target: torch.Tensor,
                    output: str | None = None) -> torch.Tensor:
    """The mean binary cross entropy of logits and targets between 0 and 1 of the same extents."""
    losses = functional.binary_cross_entropy_with_logits(logits, target.to(logits), reduction="sum")
    return total(module, losses, output) / module.cells(output)


def mse(module: PartitionedModule, found: torch.Tensor, target: torch.Tensor,
        output: str | None = None) -> torch.Tensor:
    """The mean squared difference."""
    losses = functional.mse_loss(found, target.to(found), reduction="sum")
    return total(module, losses, output) / module.cells(output)


def soft_dice(module: PartitionedModule, logits: torch.Tensor, labels: torch.Tensor, per_case: bool = True,
              smooth: float = 1e-5, activation: Literal["softmax", "sigmoid"] = "softmax",
              output: str | None = None) -> torch.Tensor:
    """One minus the mean soft Dice coefficient over classes, and over cases or all cases together.

    dice = (2 sum p t + smooth) / (sum p + sum t + smooth)

    Args:
        labels: (batch, ...) integers, or (batch, classes, ...) numbers between 0 and 1.
        per_case: one coefficient per case and class; else one per class over the batch.
    """
    found = logits.softmax(1) if activation == "softmax" else logits.sigmoid()
    wanted = labels.to(found)
    if labels.dim() == logits.dim() - 1:
        wanted = functional.one_hot(labels.long(), logits.shape[1]).movedim(-1, 1).to(found)
    space = tuple(range(2, logits.dim()))
    sums = torch.stack([(found * wanted).sum(space), found.sum(space) + wanted.sum(space)])
    sums = total(module, module.place_cases(sums, output), output)
    if not per_case:
        sums = sums.sum(1)
    return 1 - ((2 * sums[0] + smooth) / (sums[1] + smooth)).mean()


def cross_entropy_and_dice(module: PartitionedModule, logits: torch.Tensor, labels: torch.Tensor,
                           weight: torch.Tensor | None = None, share: float = 0.8,
                           output: str | None = None) -> torch.Tensor:
    """`share` of weighted cross entropy and the rest of soft Dice: 0.8 and 0.2 in Hou et al. 2019."""
    entropy = cross_entropy(module, logits, labels, weight, output=output)
    return share * entropy + (1 - share) * soft_dice(module, logits, labels, output=output)


def agree(loss: torch.Tensor) -> None:
    """Make sure that every rank has the same loss.

    Raises:
        PartitionError: on every rank, when they differ: the loss is not one over the whole volume.
    """
    if not dist.is_initialized():
        return
    found = gather(float(loss.detach()))
    if any(value != found[0] for value in found):
        raise PartitionError(f"the ranks have different losses ({', '.join(f'{v:.6g}' for v in found[:4])}, ...); sum "
                             "over cells, then over ranks: use pt.losses, or pt.losses.total")
