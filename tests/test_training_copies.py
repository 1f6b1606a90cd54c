"""Copies of the network beside the mesh, parameters cut over processes, segments that run again: one gradient."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import partitioner as pt
from partitioner.segments import StepBytes, choose_segments
from tests.training import as_exported, gradients, in_processes, off, whole

SHAPE = (2, 1, 12, 9, 8)


class Network(nn.Module):
    """Batch and group norms, a stride, a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv3d(1, 6, 3, padding=1), nn.BatchNorm3d(6)
        self.down, self.group = nn.Conv3d(6, 8, 3, stride=2, padding=1), nn.GroupNorm(2, 8)
        self.up, self.head = nn.Upsample(size=SHAPE[2:], mode="trilinear"), nn.Conv3d(14, 2, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skip = torch.relu(self.norm(self.first(x)))
        return self.head(torch.cat([skip, self.up(torch.relu(self.group(self.down(skip))))], 1))


def network() -> Network:
    torch.manual_seed(0)
    built = Network().double().train()
    as_exported(built)
    return built


def samples(copies: int) -> torch.Tensor:
    return torch.randn(copies, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def expected(copies: int, together: bool) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Gradients of the mean loss of all copies, and running statistics, by torch on whole volumes."""
    model = network()
    xs = samples(copies)
    if together:
        model(xs.flatten(0, 1)).square().mean().backward()
        return gradients(model), dict(model.named_buffers())
    found: dict[str, torch.Tensor] = {}
    statistics: dict[str, torch.Tensor] = {}
    for x in xs:
        part = network()
        part(x).square().mean().backward()
        for name, grad in gradients(part).items():
            found[name] = found.get(name, torch.zeros_like(grad)) + grad / copies
        for name, buffer in part.named_buffers():
            statistics[name] = statistics.get(name, torch.zeros_like(buffer, dtype=torch.float64)) + buffer / copies
    return found, statistics


def check(rank: int, mesh: str, cuts: dict[str, Any] | None, options: dict[str, Any], shard: str | None) -> None:
    model = network()
    if rank:  # weights are those of the first process
        nn.init.zeros_(model.head.weight)
    plan = pt.partition(model, samples(1)[0], mesh=mesh, cuts=cuts, train=True)
    module = plan.module(**options)
    assert module.replicas * plan.mesh.size == dist.get_world_size()
    if shard is not None:
        module.fully_shard(shard)  # type: ignore[arg-type]
    optimiser = torch.optim.SGD(module.parameters(), lr=0.1)
    found = module(samples(module.replicas)[module.replica])
    pt.losses.mse(module, found, torch.zeros_like(found)).backward()
    grads, statistics = expected(module.replicas, options.get("global_statistics", False))
    mine = gradients(module)
    largest = max(float(g.abs().max()) for g in grads.values())
    for name, grad in grads.items():
        assert off(mine[name], grad, largest / 100) < 1e-10, name
    for name, buffer in module.named_buffers():
        if "running" in name:
            assert off(buffer, statistics[name]) < 1e-10, name
    optimiser.step()
    everywhere = module.gather({name: whole(p) for name, p in module.named_parameters()})
    assert all(torch.equal(other[name], p) for other in everywhere for name, p in everywhere[0].items())


EVEN = {"depth": (0, 5, 12)}
EMPTY = {"depth": (0, 12, 12)}


@pytest.mark.parametrize(("mesh", "cuts", "options", "shard", "size"), [
    pytest.param("depth=2", EVEN, {}, None, 4, marks=pytest.mark.slow),
    ("depth=2", EMPTY, {"global_statistics": True}, None, 4),
    (None, None, {"checkpoint": True}, None, 2),
    pytest.param(None, None, {"global_statistics": True}, None, 3, marks=pytest.mark.slow),
    ("depth=2", EVEN, {"checkpoint": True}, "batch", 4),
    pytest.param("depth=2", EMPTY, {}, "batch", 4, marks=pytest.mark.slow),
    ("depth=2", EMPTY, {"checkpoint": True}, "all", 4),
    pytest.param("batch=2,depth=2", EVEN, {}, "all", 4, marks=pytest.mark.slow),
])
def test_gradients_are_summed_over_shards_and_averaged_over_copies(
        mesh: str | None, cuts: dict[str, Any] | None, options: dict[str, Any], shard: str | None, size: int) -> None:
    in_processes(size, check, mesh, cuts, options, shard)


@pytest.mark.parametrize("mesh", [None, "depth=2,width=2"])
@pytest.mark.parametrize("cuts", [None, {"width": (0, 0, 8)}])
def test_segments_give_the_gradients_of_the_whole(mesh: str | None, cuts: dict[str, Any] | None) -> None:
    if mesh is None and cuts is not None:
        return
    plan = pt.partition(network(), samples(1)[0], mesh=mesh, cuts=cuts, train=True)
    found: list[dict[str, torch.Tensor]] = []
    saved: list[int] = []
    for checkpoint in (False, True):
        module = plan.module(checkpoint=checkpoint)
        sizes: dict[int, int] = {}

        def keep(tensor: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = module(samples(1)[0]).square().mean()
        saved.append(sum(sizes.values()))
        loss.backward()
        found.append(gradients(module))
    assert all(off(found[1][name], grad) < 1e-10 for name, grad in found[0].items())
    assert saved[1] < 0.6 * saved[0]


def test_segments_are_cut_where_little_crosses() -> None:
    """A chain of large values with a small one in the middle, and a long skip that crosses wherever."""
    values = [StepBytes(100, i, i + 1) for i in range(4)] + [StepBytes(1, 4, 5)]
    values += [StepBytes(100, i, i + 1) for i in range(5, 9)] + [StepBytes(10, 0, 8)]
    segments = choose_segments(values, 9)
    assert (0, 5) in segments or any(start == 5 for start, _ in segments)
    assert segments[0][0] == 0 and segments[-1][1] == 9
    assert all(a[1] == b[0] for a, b in itertools.pairwise(segments))
    assert choose_segments([StepBytes(1, 0, 0)], 1) == ((0, 1),)


# --- what is wrong on some rank, all ranks say -----------------------------------------------------------


def wrong_models(rank: int) -> None:
    model = network()
    if rank == 1:
        model.norm = nn.Identity()
    plan = pt.partition(model, samples(1)[0], mesh="depth=3", train=True)
    with pytest.raises(pt.PartitionError, match="the model or plan of rank 1 differs from that of rank 0"):
        plan.module()


def wrong_sharding(rank: int) -> None:
    plan = pt.partition(network(), samples(1)[0], mesh="depth=2", train=True)
    with pytest.raises(pt.PartitionError, match="2 ranks but there are 3 processes; start 2, or a multiple"):
        plan.module()
    module = pt.partition(network(), samples(1)[0], mesh="depth=3", train=True).module()
    fully_shard(module)
    with pytest.raises(pt.PartitionError, match=r"call module.fully_shard\(\) instead"):
        module(samples(1)[0])


def test_another_model_on_one_rank_is_refused_by_all() -> None:
    in_processes(3, wrong_models)


def test_processes_that_are_no_whole_meshes_and_torchs_own_sharding_are_refused() -> None:
    in_processes(3, wrong_sharding)


def test_sharding_needs_processes() -> None:
    module = pt.partition(network(), samples(1)[0], train=True).module()
    with pytest.raises(pt.PartitionError, match="nobody to share parameters with"):
        module.fully_shard()
