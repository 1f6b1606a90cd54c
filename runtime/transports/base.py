"""The protocol of transports: in one step, every local rank sends and receives some parcels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch


@dataclass(frozen=True)
class Parcel:
    """The content of one message: views to read from or to write to, axes in storage order.

    Sender and receiver list pieces of the same extents in the same order.
    """

    peer: int
    views: tuple[torch.Tensor, ...]

    @property
    def nbytes(self) -> int:
        """Payload in bytes."""
        return sum(v.numel() * v.element_size() for v in self.views)


@dataclass(frozen=True)
class Job:
    """One local rank's messages in one step; at most one per peer and direction."""

    rank: int
    sends: tuple[Parcel, ...]
    receives: tuple[Parcel, ...]


@dataclass
class Traffic:
    """Payload sent so far by the ranks of this process, counted where messages leave."""

    sent: dict[int, int] = field(default_factory=dict[int, int])
    messages: dict[int, int] = field(default_factory=dict[int, int])

    def count(self, rank: int, nbytes: int) -> None:
        """Note one message."""
        self.sent[rank] = self.sent.get(rank, 0) + nbytes
        self.messages[rank] = self.messages.get(rank, 0) + 1


class Handle(Protocol):
    """Messages that are under way."""

    def wait(self) -> None:
        """Return when every receiving view holds its cells, and those that were sent may change.

        Raises:
            ExecutionError: when a peer is gone.
        """
        ...


class Transport(Protocol):
    """Moves parcels; `ranks` are those whose shards live in this process."""

    ranks: tuple[int, ...]
    traffic: Traffic

    def post(self, jobs: Sequence[Job]) -> Handle:
        """Begin all messages of one step; until they are waited for nobody changes what is sent, or reads what comes.

        Raises:
            ExecutionError: when a peer is gone.
        """
        ...

    def exchange(self, jobs: Sequence[Job]) -> None:
        """Carry out all messages of one step: post them and wait.

        Raises:
            ExecutionError: when a peer is gone.
        """
        ...


def as_bytes(parcel: Parcel) -> torch.Tensor | None:
    """The memory of a parcel's only view when it is dense in storage order."""
    if len(parcel.views) != 1 or not parcel.views[0].is_contiguous():
        return None
    (cells,) = parcel.views
    return cells.as_strided((cells.numel(),), (1,)).view(torch.uint8)  # an axis of one cell may have any stride


def pieces(flat: torch.Tensor, parcel: Parcel) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Every view with the part of the flat buffer that has its elements."""
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    position = 0
    for view in sorted(parcel.views, key=lambda v: -v.element_size()):  # wide types first keep them aligned
        size = view.numel() * view.element_size()
        found.append((view, flat[position : position + size].view(view.dtype).view(view.shape)))
        position += size
    return found
