"""All ranks in this process: a message is a copy from the sender's view to the receiver's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from runtime.transports.base import Handle, Job, Traffic


class Lockstep:
    """The reference transport; shards may lie on several devices."""

    def __init__(self, size: int) -> None:
        self.ranks = tuple(range(size))
        self.traffic = Traffic()

    def exchange(self, jobs: Sequence[Job]) -> None:
        """Copy every parcel; see `Transport`."""
        self.post(jobs).wait()

    def post(self, jobs: Sequence[Job]) -> Handle:
        """Note the parcels; see `Transport`."""
        for job in jobs:
            for parcel in job.sends:
                self.traffic.count(job.rank, parcel.nbytes)
        return _Copies(tuple(jobs))


@dataclass(frozen=True)
class _Copies:
    """Parcels that are copied when they are waited for, as late as messages can come."""

    jobs: tuple[Job, ...]

    def wait(self) -> None:
        """See `Handle`."""
        sent = {(job.rank, parcel.peer): parcel for job in self.jobs for parcel in job.sends}
        for job in self.jobs:
            for parcel in job.receives:
                source = sent.pop((parcel.peer, job.rank))
                for target, cells in zip(parcel.views, source.views, strict=True):
                    target.copy_(cells)
        assert not sent, f"parcels that nobody expects: {sorted(sent)}"
