"""Checkpoints: training goes on as if nothing had been, on the same mesh or another, by processes or in one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import partitioner as pt
from runtime.training import checkpoint as module_under_test
from tests.test_training_copies import network, samples
from tests.training import in_processes

STEPS = 4


def train(module: Any, optimiser: torch.optim.Optimizer, first: int, last: int) -> list[float]:
    losses = []
    for step in range(first, last):
        optimiser.zero_grad()
        y = module(samples(STEPS)[step])
        loss = pt.losses.mse(module, y, torch.ones_like(y))
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    return losses


def start(mesh: str | None, **options: Any) -> tuple[Any, torch.optim.Optimizer]:
    module = pt.partition(network(), samples(1)[0], mesh=mesh, train=True).module(**options)
    return module, torch.optim.Adam(module.parameters(), lr=1e-2)


def curve() -> list[float]:
    return train(*start(None), 0, STEPS)


def saved_by_ranks(rank: int, folder: str, shard: bool) -> None:
    module, optimiser = start("depth=2")
    if shard:
        module.fully_shard("all")
        optimiser = torch.optim.Adam(module.parameters(), lr=1e-2)
    losses = train(module, optimiser, 0, 2)
    pt.checkpoint.save(folder, module, optimiser, {"step": 2, "losses": losses})


def resumed_by_ranks(rank: int, folder: str, expected: list[float]) -> None:
    module, optimiser = start("height=3")
    extra = pt.checkpoint.load(folder, module, optimiser)
    assert extra["step"] == 2
    assert train(module, optimiser, 2, STEPS) == pytest.approx(expected[2:], rel=1e-8)


@pytest.mark.parametrize("shard", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_training_goes_on_on_another_mesh(shard: bool, tmp_path: Path) -> None:
    expected, folder = curve(), tmp_path / "last"
    in_processes(2, saved_by_ranks, str(folder), shard)
    module, optimiser = start("depth=2,width=2")
    extra = pt.checkpoint.load(folder, module, optimiser)
    assert extra["losses"] == pytest.approx(expected[:2], rel=1e-8)
    assert train(module, optimiser, extra["step"], STEPS) == pytest.approx(expected[2:], rel=1e-8)
    in_processes(3, resumed_by_ranks, str(folder), expected)


def test_an_older_checkpoint_is_replaced_and_one_that_fails_leaves_it(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, optimiser = start(None)
    train(module, optimiser, 0, 1)
    module.seed = 17
    folder = tmp_path / "deep" / "last"
    pt.checkpoint.save(folder, module, optimiser, {"step": 1})
    pt.checkpoint.save(folder, module, optimiser, {"step": 2})
    assert [p.name for p in folder.parent.iterdir()] == ["last"]

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module_under_test.state_dict_saver, "save", full)
    with pytest.raises(pt.ExecutionError, match=r"last: the checkpoint cannot be written \(.*No space left"):
        pt.checkpoint.save(folder, module, optimiser, {"step": 3})
    assert [p.name for p in folder.parent.iterdir()] == ["last"]
    module.seed = 0
    assert pt.checkpoint.load(folder, module) == {"step": 2}  # without the optimiser's state
    assert module.seed == 17


def test_checkpoints_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    module, optimiser = start(None)
    train(module, optimiser, 0, 1)
    with pytest.raises(pt.PartitionError, match=r"nowhere: is no checkpoint"):
        pt.checkpoint.load(tmp_path / "nowhere", module, optimiser)
    with pytest.raises(pt.PartitionError, match=r"give numbers, texts, lists and dicts"):
        pt.checkpoint.save(tmp_path / "c", module, optimiser, {"x": torch.zeros(1)})
    pt.checkpoint.save(tmp_path / "c", module, optimiser)
    other = pt.partition(torch.nn.Conv3d(1, 2, 3).double(), samples(1)[0], train=True).module()
    with pytest.raises(pt.PartitionError, match=r"is a checkpoint of another model: 'weight' is nothing there"):
        pt.checkpoint.load(tmp_path / "c", other)
    shutil.copytree(tmp_path / "c", tmp_path / "cut")
    for part in (tmp_path / "cut").glob("*.distcp"):
        part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(pt.PartitionError, match=r"cut: the checkpoint is damaged"):
        pt.checkpoint.load(tmp_path / "cut", module, optimiser)
    about = tmp_path / "c" / "about.json"
    about.write_text(json.dumps({**json.loads(about.read_text()), "version": 7}))
    with pytest.raises(pt.PartitionError, match=r"format 7, this program reads format 1"):
        pt.checkpoint.load(tmp_path / "c", module, optimiser)
    about.write_text("{")
    with pytest.raises(pt.PartitionError, match=r"damaged \(about.json\)"):
        pt.checkpoint.load(tmp_path / "c", module, optimiser)
