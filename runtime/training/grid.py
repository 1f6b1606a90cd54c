"""Where a process stands when many train: copies of the network (replicas), each over the ranks of the plan's mesh.

    process = replica * ranks + rank          two replicas of depth=3:   0 1 2 | 3 4 5
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from partitioner.errors import PartitionError
from partitioner.mesh import Mesh
from runtime.group import Group, gather, peers

SPACE = "space"
"""The dimension of `ProcessGrid.hybrid` along which ranks hold shards of one replica."""


@dataclass(frozen=True)
class ProcessGrid:
    """This process among replicas x ranks.

    Args:
        mesh: the plan's.
        replicas: copies of the network, each trained on samples of its own.
        replica, rank: this process's copy, and its rank in the mesh.
        devices: the same as a torch DeviceMesh: the replicas (`batch`, or `replica` where the plan's mesh has a batch
            axis of its own), then the mesh's axes.
        space: the process group of this replica.
    """

    mesh: Mesh
    replicas: int
    replica: int
    rank: int
    devices: DeviceMesh
    space: Group

    @property
    def space_processes(self) -> Sequence[int]:
        """The processes of this replica, by rank."""
        first = self.replica * self.mesh.size
        return range(first, first + self.mesh.size)

    @property
    def replica_processes(self) -> Sequence[int]:
        """The processes that hold this rank, by replica."""
        return range(self.rank, self.replicas * self.mesh.size, self.mesh.size)

    def hybrid(self) -> DeviceMesh:
        """Two dimensions for `fully_shard`: parameters are alike along `space`, cut along the replicas."""
        processes = torch.arange(self.replicas * self.mesh.size).view(self.replicas, self.mesh.size).T.contiguous()
        return DeviceMesh(self.devices.device_type, processes, mesh_dim_names=(SPACE, self.axis))

    def everyone(self) -> DeviceMesh:
        """All processes in one dimension."""
        return DeviceMesh(self.devices.device_type, list(range(self.replicas * self.mesh.size)),
                          mesh_dim_names=(f"{self.axis}_{SPACE}",))

    def mean_over_replicas(self, tensor: torch.Tensor) -> torch.Tensor:
        """The mean of a tensor over the copies of the network.

        Raises:
            ExecutionError: when a rank is gone.
        """
        total = tensor.clone()
        with peers():
            dist.all_reduce(total, group=self.devices.get_group(self.axis))
        return total / self.replicas

    @property
    def axis(self) -> str:
        """The name of the replicas' dimension."""
        return replica_axis(self.mesh)

    def gather_space(self, value: Any) -> list[Any]:
        """A value of every rank of this replica, in order.

        Raises:
            ExecutionError: when a rank is gone.
        """
        found: list[Any] = [None] * self.mesh.size
        with peers():
            dist.all_gather_object(found, value, group=self.space.resolve())
        return found


def replica_axis(mesh: Mesh) -> str:
    """What the replicas' dimension is called beside the axes of a mesh."""
    return "replica" if "batch" in mesh.names else "batch"


def make_grid(mesh: Mesh, device_type: str) -> ProcessGrid:
    """The grid of all processes of the default group.

    Raises:
        PartitionError: when they are no whole number of meshes.
    """
    size = dist.get_world_size()
    if size % mesh.size:
        raise PartitionError(f"the mesh {mesh} has {mesh.size} ranks but there are {size} processes; start "
                             f"{mesh.size}, or a multiple of that for several copies of the network")
    replicas = size // mesh.size
    devices = init_device_mesh(device_type, (replicas, *mesh.shape), mesh_dim_names=(replica_axis(mesh), *mesh.names))
    replica, rank = divmod(dist.get_rank(), mesh.size)
    groups = [Group.of(range(r * mesh.size, (r + 1) * mesh.size)) for r in range(replicas)]
    return ProcessGrid(mesh, replicas, replica, rank, devices, groups[replica])


def agree_on(value: Any, what: str, remedy: str) -> None:
    """Make sure that all processes have the same of something that can be compared.

    Raises:
        PartitionError: on every rank, naming those that differ from rank 0.
        ExecutionError: when a rank is gone.
    """
    found = gather(value)
    others = [rank for rank, other in enumerate(found) if other != found[0]]
    if others:
        raise PartitionError(f"{what} of rank{'s' if len(others) > 1 else ''} {', '.join(map(str, others[:8]))} "
                             f"differ{'' if len(others) > 1 else 's'} from that of rank 0; {remedy}")
