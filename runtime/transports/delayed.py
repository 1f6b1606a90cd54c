"""Another transport as it would be over a slower network: for measurements, and to try what such a network would do."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from partitioner.errors import ExecutionError
from partitioner.profile import Link
from runtime.transports.base import Handle, Job, Parcel, Traffic, Transport


class Delayed:
    """Messages of another transport, each sent once the link would have brought it.

    It arrives no earlier than `latency + bytes / bandwidth` after it was posted; messages of one process follow one
    another.  Until then its cells are kept in a copy, and a thread sleeps.

    Args:
        inner: of one rank, and safe to be used by two threads, as gloo is.
    """

    def __init__(self, inner: Transport, link: Link) -> None:
        self.ranks = inner.ranks
        self.traffic = Traffic()
        self._inner = inner
        self._link = link
        self._free = 0.0
        self._waiting: deque[tuple[float, Job]] = deque()
        self._sends = False
        self._lock = threading.Lock()
        self.failure: ExecutionError | None = None

    def exchange(self, jobs: Sequence[Job]) -> None:
        """See `Transport`."""
        self.post(jobs).wait()

    def post(self, jobs: Sequence[Job]) -> Handle:
        """Receive at once, send later; see `Transport`."""
        (job,) = jobs
        arriving = self._inner.post([Job(job.rank, (), job.receives)])
        for parcel in job.sends:
            self.traffic.count(job.rank, parcel.nbytes)
            cells = tuple(v.clone(memory_format=torch.contiguous_format) for v in parcel.views)
            self._free = max(self._free, time.monotonic()) + parcel.nbytes / self._link.bandwidth
            self._send_at(self._free + self._link.latency, Job(job.rank, (Parcel(parcel.peer, cells),), ()))
        return _Arrival(arriving, self)

    def _send_at(self, due: float, job: Job) -> None:
        with self._lock:
            self._waiting.append((due, job))
            if not self._sends:
                self._sends = True
                threading.Thread(target=self._send, name="partitioner-link", daemon=True).start()

    def _send(self) -> None:
        """Send what is due, one after the other, until nothing is left."""
        while True:
            with self._lock:
                if not self._waiting:
                    self._sends = False
                    return
                due, job = self._waiting.popleft()
            time.sleep(max(0.0, due - time.monotonic()))
            try:
                with torch.inference_mode():
                    self._inner.post([job]).wait()
            except ExecutionError as error:
                self.failure = error


@dataclass(frozen=True)
class _Arrival:
    """Messages that come; those that go are of no concern, for they were copied."""

    arriving: Handle
    transport: Delayed

    def wait(self) -> None:
        """See `Handle`."""
        self.arriving.wait()
        if self.transport.failure is not None:
            raise self.transport.failure
