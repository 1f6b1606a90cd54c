"""A module for the place where this process stands: alone, or one of many."""

from __future__ import annotations

import hashlib
import os

import torch
import torch.distributed as dist

from partitioner import dialect
from partitioner.mesh import Mesh
from partitioner.printer import print_plan
from runtime.group import Place, check_device, peers, rank_device
from runtime.training.grid import agree_on, make_grid
from runtime.training.module import Network, Options, PartitionedModule, Ranks
from runtime.transports.distributed import Distributed
from runtime.transports.lockstep import Lockstep


def build_module(network: Network, device: str, options: Options) -> PartitionedModule:
    """The module of a network; see `partitioner.Plan.module`.

    In a process group all processes must have the same plan; the weights are those of the first one.

    Raises:
        PartitionError: when the processes are no whole number of meshes or have different plans, or the device does
            not exist.
    """
    mesh = dialect.get_mesh(network.training)
    if not dist.is_initialized():
        names = device.split(",")
        devices = tuple(check_device(names[rank % len(names)], rank) for rank in mesh)
        return PartitionedModule(network, Ranks(Lockstep(mesh.size), devices), options)
    module = PartitionedModule(network, _ranks(mesh, network, device), options)
    _broadcast(module)
    return module


def _ranks(mesh: Mesh, network: Network, device: str) -> Ranks:
    here = rank_device(device, Place(dist.get_rank(), dist.get_world_size(),
                                     int(os.environ.get("LOCAL_RANK", dist.get_rank()))))
    digest = hashlib.sha256(print_plan(network.training).encode()).hexdigest()
    agree_on(digest, "the model or plan", "give every rank the same file, mesh, cuts and shapes")
    backend = "nccl" if "nccl" in dist.get_backend() else "gloo"
    grid = make_grid(mesh, here.type if backend == "nccl" else "cpu")
    across = Distributed(here, backend, grid.replica_processes) if grid.replicas > 1 else None
    return Ranks(Distributed(here, backend, grid.space_processes), (here,), grid, across)


@torch.no_grad()
def _broadcast(module: PartitionedModule) -> None:
    """Give all processes the weights of the first one."""
    for tensor in module.state_dict().values():
        with peers():
            dist.broadcast(tensor, 0)
