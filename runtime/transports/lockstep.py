"""All ranks in this process: a message is a copy from the sender's view to the receiver's."""

from __future__ import annotations

from collections.abc import Sequence

from runtime.transports.base import Job, Traffic


class Lockstep:
    """The reference transport; shards may lie on several devices."""

    def __init__(self, size: int) -> None:
        self.ranks = tuple(range(size))
        self.traffic = Traffic()

    def exchange(self, jobs: Sequence[Job]) -> None:
        """Copy every parcel; see `Transport`."""
        sent = {(job.rank, parcel.peer): parcel for job in jobs for parcel in job.sends}
        for job in jobs:
            for parcel in job.receives:
                source = sent.pop((parcel.peer, job.rank))
                self.traffic.count(parcel.peer, source.nbytes)
                for target, cells in zip(parcel.views, source.views, strict=True):
                    target.copy_(cells)
        assert not sent, f"parcels that nobody expects: {sorted(sent)}"
