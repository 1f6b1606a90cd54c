"""The adjoints of the communication steps: what training sends backward where inference sends forward.

    exchange      y[r] = the cells that rank r needs, copied from their owners
    adjoint       x[s] += what every y[r] holds of the cells that s owns      messages reversed, received cells added

    all-reduce    y[r] = sum over the group of x[s]
    adjoint       x[s] = sum over the group of y[r]                           the same messages

Both are linear in what the ranks hold, and <E x, y> == <x, E' y> summed over ranks holds to the last bit
in integers.  Cells that several ranks hold alike count once per rank.  Received cells are added in rank
order, so that every transport gives the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from runtime.memory import in_storage_order, views
from runtime.program import AllReduce, Exchange, Message
from runtime.transports import Job, Parcel, Transport


@dataclass(frozen=True)
class ExchangeSide:
    """One local rank's part of the adjoint of an exchange.

    Args:
        rank: the rank.
        action: the exchange as it runs forward.
        target: cotangents of what the exchange yields, of its target buffer's extents; read only.
        source: cotangents of what it takes, of its source buffer's extents; added to, in the owned cells only.
    """

    rank: int
    action: Exchange
    target: torch.Tensor
    source: torch.Tensor


@dataclass(frozen=True)
class AllReduceSide:
    """One local rank's part of the adjoint of an all-reduce: the cotangents of its results."""

    rank: int
    action: AllReduce
    targets: Sequence[torch.Tensor]


def exchange_adjoint(transport: Transport, sides: Sequence[ExchangeSide], storage: str = "channels_first") -> None:
    """Carry cotangents back through an exchange, for all ranks of this process at once.

    Args:
        sides: per local rank; `source` and `target` must not share memory.
        storage: axis order of the messages, the program's own.

    Raises:
        ExecutionError: when a peer is gone.
    """
    jobs: list[Job] = []
    inboxes: list[list[list[torch.Tensor]]] = []
    for side in sides:
        _add_kept(side)
        sends = tuple(Parcel(m.peer, tuple(_cells(side.target, m, storage))) for m in side.action.receives)
        inbox = [[torch.empty_like(v, memory_format=torch.contiguous_format) for v in _cells(side.source, m, storage)]
                 for m in side.action.sends]
        receives = tuple(Parcel(m.peer, tuple(cells)) for m, cells in zip(side.action.sends, inbox, strict=True))
        jobs.append(Job(side.rank, sends, receives))
        inboxes.append(inbox)
    transport.exchange(jobs)
    for side, inbox in zip(sides, inboxes, strict=True):
        for message, cells in zip(side.action.sends, inbox, strict=True):
            for place, received in zip(_cells(side.source, message, storage), cells, strict=True):
                place.add_(received)


def all_reduce_adjoint(transport: Transport, sides: Sequence[AllReduceSide]) -> list[list[torch.Tensor]]:
    """Cotangents of every local rank's partial results: the all-reduce of the cotangents of the sums.

    Raises:
        ValueError: for an all-reduce other than `sum`, which is not linear.
        ExecutionError: when a peer is gone.
    """
    kinds = sorted({side.action.kind for side in sides} - {"sum"})
    if kinds:
        raise ValueError(f"an all-reduce of kind {', '.join(kinds)} is not linear and has no adjoint; use sums")
    found = [[t.clone(memory_format=torch.contiguous_format) for t in side.targets] for side in sides]
    for stage in reversed(range(len(sides[0].action.groups))):
        found = _sum_stage(transport, sides, found, stage)
    return found


def _add_kept(side: ExchangeSide) -> None:
    """What a rank has from itself: a copy forward, an addition backward."""
    action = side.action
    in_place = action.source.buffer == action.target
    kept = (action.source, action.source) if in_place else action.keep
    if kept is None:
        return
    for place, cells in zip(views(side.source, kept[0]), views(side.target, kept[1]), strict=True):
        place.add_(cells)


def _cells(tensor: torch.Tensor, message: Message, storage: str) -> list[torch.Tensor]:
    """The cells of a message in a buffer, axes in storage order."""
    return [in_storage_order(v, storage) for w in message.windows for v in views(tensor, w)]


def _sum_stage(transport: Transport, sides: Sequence[AllReduceSide], tensors: list[list[torch.Tensor]],
               stage: int) -> list[list[torch.Tensor]]:
    """Sums over the groups of one mesh axis, in rank order."""
    jobs: list[Job] = []
    boxes: list[dict[int, list[torch.Tensor]]] = []
    for side, mine in zip(sides, tensors, strict=True):
        peers = [r for r in side.action.groups[stage] if r != side.rank]
        inbox = {peer: [torch.empty_like(t) for t in mine] for peer in peers}
        jobs.append(Job(side.rank, tuple(Parcel(p, tuple(mine)) for p in peers),
                        tuple(Parcel(p, tuple(inbox[p])) for p in peers)))
        boxes.append({**inbox, side.rank: mine})
    transport.exchange(jobs)
    return [_sums([box[r] for r in side.action.groups[stage]]) for side, box in zip(sides, boxes, strict=True)]


def _sums(parts: Sequence[Sequence[torch.Tensor]]) -> list[torch.Tensor]:
    found = [t.clone() for t in parts[0]]
    for part in parts[1:]:
        for total, term in zip(found, part, strict=True):
            total.add_(term)
    return found
