"""Training in a process group: real processes, gradients equal to those of the whole network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import partitioner as pt
from tests.models import NETWORKS
from tests.training import as_exported, gradients, in_processes, off

NAME = "unet3d-maxpool-batch-trilinear"
SIZE = 3


def passes(count: int) -> list[torch.Tensor]:
    """Inputs of several backward passes into the same gradients."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(NETWORKS[NAME].shape, dtype=torch.float64, generator=generator) for _ in range(count)]


def reference(count: int, cotangent: torch.Tensor) -> dict[str, torch.Tensor]:
    module = as_exported(NETWORKS[NAME].build().double().train())
    for x in passes(count):
        (module(x) * cotangent).sum().backward()
    return gradients(module)


def work(rank: int, path: str, cuts: tuple[int, ...] | None) -> None:
    module = pt.partition(path, mesh=f"depth={SIZE}", cuts=None if cuts is None else {"depth": cuts}).module()
    (name,) = module.output_names
    cotangent = torch.randn(module.extents(name), dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    (mine,) = module.cut(name, cotangent)
    inputs = passes(3)
    with module.no_sync():
        (module(inputs[0]) * mine).sum().backward()
    for x in inputs[1:]:  # the first of these sums the paused pass too, the second only its own
        part = module.cut("volume", x)[0]
        (module(part) * mine).sum().backward()
    everywhere = module.gather((gradients(module), dict(module.named_buffers())))
    if rank:
        return
    expected = reference(3, cotangent)
    largest = max(float(g.abs().max()) for g in expected.values())
    for found, buffers in everywhere:
        for key, grad in expected.items():
            assert off(found[key], grad, largest / 100) < 1e-10, key
            assert torch.equal(found[key], everywhere[0][0][key]), key
        assert all(torch.equal(buffers[k], b) for k, b in everywhere[0][1].items())


@pytest.mark.parametrize("cuts", [pytest.param(None, id="even", marks=pytest.mark.slow),
                                  pytest.param((0, 5, 5, 13), id="a rank without cells")])
def test_gradients_are_summed_over_ranks(cuts: tuple[int, ...] | None, tmp_path: Path) -> None:
    path = NETWORKS[NAME].export(tmp_path / "m.onnx", dtype="float64", keep_batch_norm=True)
    in_processes(SIZE, work, str(path), cuts)


# --- how messages go ----


def by_either(rank: int, path: str) -> None:
    plan = pt.partition(path, mesh="depth=3")
    x = passes(1)[0]
    found: list[dict[str, torch.Tensor]] = []
    for backend in ("gloo", "shm", None):
        module = plan.module(backend=backend)
        (name,) = module.output_names
        cotangent = torch.linspace(-1, 1, module.cells(name), dtype=torch.float64).view(module.extents(name))
        (mine,) = module.cut(name, cotangent)
        (module(x) * mine).sum().backward()
        found.append(gradients(module))
    assert all(torch.equal(other[key], grad) for other in found[1:] for key, grad in found[0].items())
    with pytest.raises(pt.PartitionError, match="backend nccl: the process group is one of gloo; use gloo or shm"):
        plan.module(backend="nccl")
    with pytest.raises(pt.PartitionError, match="the backend of rank 2 differs from that of rank 0; give every rank"):
        plan.module(backend="gloo" if rank == 2 else "shm")


def test_the_backend_changes_no_bit(tmp_path: Path) -> None:
    path = NETWORKS[NAME].export(tmp_path / "m.onnx", dtype="float64", keep_batch_norm=True)
    with pytest.raises(pt.PartitionError, match="backend 'smh' is unknown; use gloo, nccl or shm"):
        pt.partition(path, mesh="depth=3").module(backend="smh")
    in_processes(SIZE, by_either, str(path))


# --- a rank that dies ------------------------------------------------------------------------------------


def dying(rank: int, path: str) -> None:
    import os
    import time

    module = pt.partition(path, mesh=f"depth={SIZE}").module()
    x = passes(1)[0]
    loss = module(x).square().sum()
    if rank == 1:
        os._exit(9)
    began = time.monotonic()
    with pytest.raises((pt.ExecutionError, RuntimeError)):
        loss.backward()
    assert time.monotonic() - began < 30


def test_the_others_end_when_a_rank_dies(tmp_path: Path) -> None:
    path = NETWORKS[NAME].export(tmp_path / "m.onnx", dtype="float64", keep_batch_norm=True)
    with pytest.raises(Exception, match="terminated with exit code 9"):
        in_processes(SIZE, dying, str(path))
