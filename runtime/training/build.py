"""A module for the place where this process stands: alone, or one of many."""

from __future__ import annotations

import hashlib
import os

import torch
import torch.distributed as dist

from partitioner import dialect
from partitioner.errors import PartitionError
from partitioner.mesh import Mesh
from partitioner.printer import print_plan
from runtime.group import Place, check_device, gather, peers, rank_device
from runtime.training.grid import ProcessGrid, agree_on, make_grid
from runtime.training.module import Network, Options, PartitionedModule, Ranks
from runtime.transports.catalog import make_transport
from runtime.transports.lockstep import Lockstep
from runtime.transports.shared import on_one_host


def build_module(network: Network, device: str, options: Options, backend: str | None = None) -> PartitionedModule:
    """The module of a network; see `partitioner.Plan.module`.

    In a process group all processes must have the same plan; the weights are those of the first one.

    Raises:
        PartitionError: when the processes are no whole number of meshes or have different plans, the device does
            not exist, or the shards' messages cannot go by that backend.
    """
    if backend not in (None, "gloo", "nccl", "shm"):
        raise PartitionError(f"backend '{backend}' is unknown; use gloo, nccl or shm, or leave it out")
    mesh = dialect.get_mesh(network.training)
    if not dist.is_initialized():
        names = device.split(",")
        devices = tuple(check_device(names[rank % len(names)], rank) for rank in mesh)
        return PartitionedModule(network, Ranks(Lockstep(mesh.size), devices), options)
    module = PartitionedModule(network, _ranks(mesh, network, device, backend), options)
    _broadcast(module)
    return module


def _ranks(mesh: Mesh, network: Network, device: str, backend: str | None) -> Ranks:
    here = rank_device(device, Place(dist.get_rank(), dist.get_world_size(),
                                     int(os.environ.get("LOCAL_RANK", dist.get_rank()))))
    digest = hashlib.sha256(print_plan(network.training).encode()).hexdigest()
    agree_on(digest, "the model or plan", "give every rank the same file, mesh, cuts and shapes")
    group = "nccl" if "nccl" in dist.get_backend() else "gloo"
    grid = make_grid(mesh, here.type if group == "nccl" else "cpu")
    across = make_transport(group, here, processes=grid.replica_processes) if grid.replicas > 1 else None
    chosen = _backend(backend, group, here, grid)
    return Ranks(make_transport(chosen, here, processes=grid.space_processes), (here,), grid, across)


def _backend(wanted: str | None, group: str, here: torch.device, grid: ProcessGrid) -> str:
    """How the shards' messages go; on all processes the same."""
    agree_on(wanted, "the backend", "give every rank the same")
    alone = on_one_host(grid.space_processes)
    on_cpu = all(gather(here.type == "cpu"))
    if wanted not in (None, group, "shm"):
        raise PartitionError(f"backend {wanted}: the process group is one of {group}; use {group} or shm")
    if wanted == "shm" and not on_cpu:
        raise PartitionError(f"backend shm moves the memory of this host, not of GPUs; use {group}")
    return wanted or ("shm" if alone and on_cpu else group)


@torch.no_grad()
def _broadcast(module: PartitionedModule) -> None:
    """Give all processes the weights of the first one."""
    for tensor in module.state_dict().values():
        with peers():
            dist.broadcast(tensor, 0)
