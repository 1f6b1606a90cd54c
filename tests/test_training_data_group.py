"""Data in real processes: two copies of a network on two shards each, from HDF5 and Zarr files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import zarr
from torch import nn

import partitioner as pt
from partitioner.geometry import Box
from tests.models import NETWORKS
from tests.training import gradients, in_processes, off

NETWORK = NETWORKS["unet2d-maxpool-instance-bilinear"]
"""No batch statistics, which each copy of a network takes over its own cases."""
CASES = 3


def samples(folder: Path) -> list[dict[str, Any]]:
    return [{"volume": f"{folder}/ct{i}.h5:/scan", "labels": f"{folder}/seg.zarr:/case{i}"} for i in range(CASES)]


def augment() -> list[Any]:
    return [pt.data.Crop(), pt.data.Flip(("height", "width")), pt.data.Intensity(noise=0.1)]


def work(rank: int, folder: Path, shape: tuple[int, ...]) -> None:
    plan = pt.partition(str(folder / "m.onnx"), mesh="height=2")
    module = plan.module()
    assert (module.replicas, module.replica) == (2, rank // 2)
    with pytest.raises(pt.PartitionError, match=r"the samples: rank 3 differs from rank 0; .*sort the list"):
        pt.data.Volumes(module, samples(folder)[::-1] if rank == 3 else samples(folder))
    with pytest.raises(pt.PartitionError, match=r"rank 1: .*none\.npy: no such file"):
        pt.data.Volumes(module, [*samples(folder), *([{"volume": "none.npy", "labels": 0}] if rank == 1 else [])])
    data = pt.data.Volumes(module, samples(folder), augment(), seed=5)
    assert len(data) == 2
    for part in data:
        assert part["volume"].shape[2] < shape[2]
        pt.losses.cross_entropy(module, module(part["volume"]), part["labels"]).backward()
    expected = torch.load(folder / "expected.pt")
    for name, grad in gradients(module).items():
        assert off(grad, expected[name]) < 1e-8, name


def test_copies_of_shards_train_as_the_whole(tmp_path: Path) -> None:
    shape = NETWORK.shape
    module = NETWORK.build().double().train()
    NETWORK.export(tmp_path / "m.onnx", dtype="float64", keep_batch_norm=True)
    larger = tuple(n + 3 for n in shape[2:])
    rng = np.random.default_rng(0)
    classes = module(torch.zeros(shape, dtype=torch.float64)).shape[1]
    group = zarr.open_group(str(tmp_path / "seg.zarr"), mode="w")
    for i in range(CASES):
        with h5py.File(tmp_path / f"ct{i}.h5", "w") as file:
            file.create_dataset("scan", data=rng.standard_normal((shape[1], *larger)), chunks=True, compression="gzip")
        group.create_array(f"case{i}", data=rng.integers(0, classes, larger).astype(np.uint8), chunks=(5, 4))
    alone = pt.partition(str(tmp_path / "m.onnx"), mesh="height=1").module()
    data = pt.data.Volumes(_Pair(alone), samples(tmp_path), augment(), seed=5)
    for part in data:
        nn.functional.cross_entropy(module(part["volume"]), part["labels"]).backward()
    torch.save(gradients(module), tmp_path / "expected.pt")
    in_processes(4, work, tmp_path, shape)


class _Pair:
    """A module with a batch of two, so that one process takes the cases of both copies."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def extents(self, name: str) -> tuple[int, ...]:
        return (2, *self.module.extents(name)[1:])

    def own_box(self, name: str) -> Box:
        return Box.whole(self.extents(name))
