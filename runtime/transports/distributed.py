"""One rank per process, over torch.distributed: gloo or NCCL, on one host or many."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from runtime.group import peers
from runtime.transports.base import Handle, Job, Parcel, Traffic, as_bytes, pieces

REST = 2e-5
"""Seconds that gloo's own thread is left the core when messages have come: it holds their buffers a little longer than
it says, and who lets go of them meanwhile spins for them until the system's next tick (4 ms, where measured)."""


@dataclass
class _Wire:
    """A parcel as one flat buffer of bytes; `unpack` tells whether it must be copied to its views."""

    parcel: Parcel
    flat: torch.Tensor
    unpack: bool


@dataclass(frozen=True)
class _Flight:
    """Messages under way, and the memory that they travel in."""

    incoming: tuple[_Wire, ...]
    outgoing: tuple[_Wire, ...]
    works: tuple[Any, ...]
    whom: tuple[int, ...]
    rests: bool

    def wait(self) -> None:
        """See `Handle`."""
        with peers(self.whom):
            for work in self.works:
                work.wait()
        if self.rests:
            time.sleep(REST)
        for wire in self.incoming:
            if wire.unpack:
                _scatter(wire.flat, wire.parcel)


class Distributed:
    """Point-to-point messages of a process group that is already initialised.

    A dense view travels as it is; others are packed into one buffer per message.  Gloo moves host
    memory only, so that GPU tensors pass through pinned buffers.

    Args:
        processes: which process has which rank; all of the group, in order, when not given.
    """

    def __init__(self, device: torch.device, backend: str, processes: Sequence[int] | None = None) -> None:
        self._processes = processes or range(dist.get_world_size())
        self.ranks = (self._processes.index(dist.get_rank()),)
        self.traffic = Traffic()
        self._staged = device.type != "cpu" and backend == "gloo"
        self._batched = backend == "nccl"

    def exchange(self, jobs: Sequence[Job]) -> None:
        """Send and receive all parcels of one step; see `Transport`."""
        self.post(jobs).wait()

    def post(self, jobs: Sequence[Job]) -> Handle:
        """Begin to send and receive all parcels of one step; see `Transport`."""
        (job,) = jobs
        incoming = [self._inbound(parcel) for parcel in job.receives]
        outgoing = [self._outbound(parcel) for parcel in job.sends]
        if self._staged:
            torch.cuda.current_stream().synchronize()
        whom = sorted({w.parcel.peer for w in (*incoming, *outgoing)})
        with peers(whom):
            works = self._begin(incoming, outgoing)
        for wire in outgoing:
            self.traffic.count(job.rank, wire.parcel.nbytes)
        return _Flight(tuple(incoming), tuple(outgoing), tuple(works), tuple(whom), bool(works) and not self._batched)

    def _begin(self, incoming: Sequence[_Wire], outgoing: Sequence[_Wire]) -> list[Any]:
        if self._batched:
            operations = [dist.P2POp(dist.irecv, w.flat, self._processes[w.parcel.peer]) for w in incoming]
            operations += [dist.P2POp(dist.isend, w.flat, self._processes[w.parcel.peer]) for w in outgoing]
            return dist.batch_isend_irecv(operations) if operations else []
        works: list[Any] = [dist.irecv(w.flat, self._processes[w.parcel.peer]) for w in incoming]
        return works + [dist.isend(w.flat, self._processes[w.parcel.peer]) for w in outgoing]

    def _inbound(self, parcel: Parcel) -> _Wire:
        dense = None if self._staged else as_bytes(parcel)
        if dense is not None:
            return _Wire(parcel, dense, unpack=False)
        device = "cpu" if self._staged else parcel.views[0].device
        flat = torch.empty(parcel.nbytes, dtype=torch.uint8, device=device, pin_memory=self._staged)
        return _Wire(parcel, flat, unpack=True)

    def _outbound(self, parcel: Parcel) -> _Wire:
        dense = None if self._staged else as_bytes(parcel)
        if dense is not None:
            return _Wire(parcel, dense, unpack=False)
        device = "cpu" if self._staged else parcel.views[0].device
        flat = torch.empty(parcel.nbytes, dtype=torch.uint8, device=device, pin_memory=self._staged)
        for view, part in pieces(flat, parcel):
            part.copy_(view, non_blocking=True)
        return _Wire(parcel, flat, unpack=False)


def _scatter(flat: torch.Tensor, parcel: Parcel) -> None:
    for view, part in pieces(flat, parcel):
        view.copy_(part)
