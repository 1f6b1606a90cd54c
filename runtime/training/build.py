"""A module for the place where this process stands: alone, or one rank of a process group."""

from __future__ import annotations

import os

import onnx_ir as ir
import torch.distributed as dist

from partitioner import dialect
from partitioner.errors import PartitionError
from runtime.group import Place, check_device, rank_device
from runtime.training.module import PartitionedModule
from runtime.transports.distributed import Distributed
from runtime.transports.lockstep import Lockstep


def build_module(training: ir.Model, evaluation: ir.Model, weights: frozenset[str], device: str,
                 biased_variance: bool) -> PartitionedModule:
    """The module of two plans of one network; see `partitioner.Plan.module`.

    Args:
        weights: names of the file's initialisers; other constants neither train nor belong to the state.

    Raises:
        PartitionError: when the process group has another size than the mesh, or the device does not exist.
    """
    mesh = dialect.get_mesh(training)
    if not dist.is_initialized():
        names = device.split(",")
        devices = [check_device(names[rank % len(names)], rank) for rank in mesh]
        return PartitionedModule(training, evaluation, weights, Lockstep(mesh.size), devices, biased_variance)
    if dist.get_world_size() != mesh.size:
        raise PartitionError(f"the mesh {mesh} has {mesh.size} ranks but the process group has "
                             f"{dist.get_world_size()}; make them equal")
    place = Place(dist.get_rank(), mesh.size, int(os.environ.get("LOCAL_RANK", dist.get_rank())))
    here = rank_device(device, place)
    transport = Distributed(here, "nccl" if dist.get_backend() == "nccl" else "gloo")
    return PartitionedModule(training, evaluation, weights, transport, [here], biased_variance)
