"""Losses on shards: value and gradient equal to those over the whole volume, on three ranks and in one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn import functional

import partitioner as pt
from partitioner import losses
from runtime.training.module import PartitionedModule
from tests.models import NETWORKS
from tests.training import as_exported, gradients, in_processes, off

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
WEIGHT = torch.arange(1, 100, dtype=torch.float64) / 3
SEGMENTER, CLASSIFIER = "unet3d-maxpool-batch-trilinear", "resnet3d"


def dice(logits: torch.Tensor, labels: torch.Tensor, per_case: bool) -> torch.Tensor:
    """Written out, on whole tensors."""
    p, t = logits.softmax(1), functional.one_hot(labels, logits.shape[1]).movedim(-1, 1).double()
    axes = (2, 3, 4) if per_case else (0, 2, 3, 4)
    found = (2 * (p * t).sum(axes) + 1e-5) / ((p + t).sum(axes) + 1e-5)
    return 1 - found.mean()


WHOLE: dict[str, Loss] = {
    "cross entropy": functional.cross_entropy,
    "weighted": lambda y, t: functional.cross_entropy(y, t, WEIGHT[: y.shape[1]], ignore_index=0),
    "bce": lambda y, t: functional.binary_cross_entropy_with_logits(y, one_hot(y, t)),
    "mse": lambda y, t: functional.mse_loss(y, one_hot(y, t)),
    "dice": lambda y, t: dice(y, t, True),
    "global dice": lambda y, t: dice(y, t, False),
    "both": lambda y, t: 0.8 * functional.cross_entropy(y, t, WEIGHT[: y.shape[1]]) + 0.2 * dice(y, t, True),
}


def sharded(module: PartitionedModule) -> dict[str, Loss]:
    return {
        "cross entropy": lambda y, t: losses.cross_entropy(module, y, t),
        "weighted": lambda y, t: losses.cross_entropy(module, y, t, WEIGHT[: y.shape[1]], ignore_index=0),
        "bce": lambda y, t: losses.bce_with_logits(module, y, one_hot(y, t)),
        "mse": lambda y, t: losses.mse(module, y, one_hot(y, t)),
        "dice": lambda y, t: losses.soft_dice(module, y, t),
        "global dice": lambda y, t: losses.soft_dice(module, y, t, per_case=False),
        "both": lambda y, t: losses.cross_entropy_and_dice(module, y, t, WEIGHT[: y.shape[1]]),
    }


def one_hot(y: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return functional.one_hot(t, y.shape[1]).movedim(-1, 1).double()


def data(name: str) -> torch.Tensor:
    return torch.randn(NETWORKS[name].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def labels_for(y: torch.Tensor) -> torch.Tensor:
    return torch.randint(0, y.shape[1], (y.shape[0], *y.shape[2:]), generator=torch.Generator().manual_seed(1))


def compare(module: PartitionedModule, name: str, kinds: list[str]) -> None:
    """Every loss on this rank's part, against the torch module on the whole."""
    reference, x = as_exported(NETWORKS[name].build().double().train()), data(name)
    whole = labels_for(reference(x))
    output = module.output_names[0]
    for kind in kinds:
        reference.zero_grad()
        module.zero_grad()
        expected = WHOLE[kind](reference(x), whole)
        expected.backward()
        y = module(x)
        mine = whole
        if module.is_distributed:  # the labels have no channel axis
            cells = [slice(i.start, i.stop) for i in module.own_box(output).intervals()]
            mine = whole[(cells[0], *cells[2:])]
        loss = sharded(module)[kind](y, mine)
        losses.agree(loss)
        loss.backward()
        assert abs(float(loss.detach() - expected.detach())) < 1e-10, kind
        found, exact = gradients(module), gradients(reference)
        largest = max(float(g.abs().max()) for g in exact.values())
        for key, grad in exact.items():
            assert off(found[key], grad, largest / 100) < 1e-10, (kind, key)


def export(name: str, folder: Path) -> str:
    return str(NETWORKS[name].export(folder / "m.onnx", dtype="float64", keep_batch_norm=True))


@pytest.mark.parametrize("mesh", ["depth=3", "batch=2,width=2"])
def test_in_one_process(mesh: str, tmp_path: Path) -> None:
    module = pt.partition(export(SEGMENTER, tmp_path), mesh=mesh).module()
    compare(module, SEGMENTER, list(WHOLE))


def work(rank: int, path: str, name: str, mesh: str, kinds: list[str]) -> None:
    module = pt.partition(path, mesh=mesh, cuts={"depth": (0, 4, 4, NETWORKS[name].shape[2])}).module()
    compare(module, name, kinds)
    with pytest.raises(pt.PartitionError, match="the ranks have different losses"):
        losses.agree(torch.tensor(float(rank)))


@pytest.mark.parametrize(("name", "kinds"), [(SEGMENTER, list(WHOLE)), (CLASSIFIER, ["cross entropy", "mse"])])
def test_on_three_ranks(name: str, kinds: list[str], tmp_path: Path) -> None:
    """One of them has no cells; a classifier's logits are on all three."""
    in_processes(3, work, export(name, tmp_path), name, "depth=3", kinds)
