"""Parameters cut over processes by torch's FSDP2, with gradients summed over shards and averaged over copies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from runtime.training.grid import ProcessGrid


def shard_module(module: nn.Module, grid: ProcessGrid, over: str, options: Mapping[str, Any]) -> None:
    """Hand a module's parameters to `fully_shard`.

    Args:
        over: `batch` (hybrid: the ranks of one copy hold the same pieces) or `all` processes.
    """
    mesh = grid.everyone() if over == "all" else grid.hybrid()
    fully_shard(module, mesh=mesh, **options)
    assert isinstance(module, FSDPModule)
    module.set_gradient_divide_factor(float(grid.replicas))
    module.set_force_sum_reduction_for_comms(True)
