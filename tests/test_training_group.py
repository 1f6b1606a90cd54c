"""Training in a process group: real processes over gloo, gradients equal to those of the whole network."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import partitioner as pt
from tests.models import NETWORKS

NAME = "unet3d-maxpool-batch-trilinear"
SIZE = 3


def gradients(module: nn.Module) -> dict[str, torch.Tensor]:
    return {key: p.grad.clone() for key, p in module.named_parameters() if p.grad is not None}


def passes(module: nn.Module, count: int, seed: int = 0) -> list[torch.Tensor]:
    """Several backward passes into the same gradients, each with data of its own; the losses' cotangents."""
    generator = torch.Generator().manual_seed(seed)
    shape = NETWORKS[NAME].shape
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(count)]


def reference(count: int, cotangent: torch.Tensor) -> dict[str, torch.Tensor]:
    module = NETWORKS[NAME].build().double().train()
    for x in passes(module, count):
        (module(x) * cotangent).sum().backward()
    return gradients(module)


def work(rank: int, port: int, path: str, cuts: tuple[int, ...] | None) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(SIZE),
                      LOCAL_RANK=str(rank), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        plan = pt.partition(path, mesh=f"depth={SIZE}", cuts=None if cuts is None else {"depth": cuts})
        module = plan.module()
        name = str(plan.model.graph.outputs[0].name)
        cotangent = torch.randn(module._extents[name], dtype=torch.float64, generator=torch.Generator().manual_seed(9))
        (mine,) = module.cut(name, cotangent)
        inputs = passes(module, 3)
        with module.no_sync():
            (module(inputs[0]) * mine).sum().backward()
        for x in inputs[1:]:  # the first of these sums the paused pass too, the second only its own
            part = module.cut("volume", x)[0]
            (module(part) * mine).sum().backward()
        found = gradients(module)
        everywhere: list[dict[str, torch.Tensor] | None] = [None] * SIZE
        dist.all_gather_object(everywhere, found)
        statistics: list[dict[str, torch.Tensor] | None] = [None] * SIZE
        dist.all_gather_object(statistics, dict(module.named_buffers()))
        if rank == 0:
            expected = reference(3, cotangent)
            for other, buffers in zip(everywhere, statistics, strict=True):
                assert other is not None and buffers is not None
                for key, grad in expected.items():
                    off = float((other[key] - grad).abs().max() / grad.abs().max().clamp_min(1e-3))
                    assert off < 1e-8, (key, off)
                    assert torch.equal(other[key], found[key]), key
                assert all(torch.equal(buffers[k], b) for k, b in statistics[0].items())  # type: ignore[union-attr]
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("cuts", [None, (0, 5, 5, 13)], ids=["even", "a rank without cells"])
def test_gradients_are_summed_over_ranks(cuts: tuple[int, ...] | None, tmp_path: Path) -> None:
    path = NETWORKS[NAME].export(tmp_path / "m.onnx", dtype="float64", keep_batch_norm=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, args=(port, str(path), cuts), nprocs=SIZE)
