"""The transports between processes, by the name of their backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from partitioner.profile import Link
from runtime.transports.base import Transport
from runtime.transports.delayed import Delayed
from runtime.transports.distributed import Distributed
from runtime.transports.shared import SharedMemory


def make_transport(backend: str, device: torch.device, link: Link | None = None,
                   processes: Sequence[int] | None = None) -> Transport:
    """The transport of this process, which is in a process group; every process asks for the same.

    Args:
        backend: gloo, nccl or shm.
        link: a slower network that is emulated.
        processes: which process has which rank; all of the group, in order, when not given.

    Raises:
        PartitionError: when the ranks cannot reach one another in this way.
    """
    if backend == "shm":
        return SharedMemory(processes)
    direct = Distributed(device, backend, processes)
    return direct if link is None else Delayed(direct, link)
