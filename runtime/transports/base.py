"""The protocol of transports: in one step, every local rank sends and receives some parcels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
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
