"""The communication steps as autograd functions, in one order on every rank.

Forward they do what inference does.  Backward an exchange sends its messages in reverse and adds what comes
back; a merge of partial results hands every rank the cotangents of its own partial, summed over the group.

A rank without cells has no graph of its own through its layers, yet must take part in every message backward
too.  So a token, a number that nobody reads, goes through all communication steps one after the other and is
tied to the outputs: the backward pass visits them all, in reverse order, on every rank alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from partitioner.geometry import Box, local_slices
from runtime.adjoint import ExchangeSide, exchange_adjoint
from runtime.memory import allocate, in_storage_order, views
from runtime.program import Exchange, Window
from runtime.transports import Job, Parcel, Transport

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Link:
    """What the communication of all local ranks has in common.

    Args:
        ranks: the local ranks, in the order in which their tensors are listed.
        size: how many ranks there are in all.
        storage: axis order of the messages.
        on_backward: called on every rank when a backward pass begins.
    """

    transport: Transport
    ranks: tuple[int, ...]
    size: int
    storage: str
    on_backward: Callable[[], None] | None = None

    @property
    def everyone(self) -> tuple[int, ...]:
        """All ranks."""
        return tuple(range(self.size))

    def new_token(self, device: torch.device) -> torch.Tensor:
        """The token that enters the first communication step."""
        return torch.zeros((), device=device, requires_grad=torch.is_grad_enabled())


@dataclass(frozen=True)
class Leg:
    """One local rank's part of an exchange, its windows relative to the cells that it owns.

    Args:
        target: the cells that the rank holds afterwards.
    """

    action: Exchange
    target: Box


def make_leg(action: Exchange, target: Box) -> Leg:
    """The part of a rank, from its action in the program."""
    owned = action.source.box
    in_place = action.source.buffer == action.target
    kept = (action.source, action.source) if in_place else action.keep
    keep = None
    if kept is not None:
        keep = (_within(owned, kept[0]), kept[1])
    sends = tuple(replace(m, windows=tuple(_within(owned, w) for w in m.windows)) for m in action.sends)
    whole = _within(owned, action.source)
    return Leg(replace(action, source=whole, keep=keep, sends=sends), target)


def _within(owned: Box, window: Window) -> Window:
    """A window of a buffer as one of the tensor of owned cells."""
    slices = tuple(local_slices(o, w, joined=False) or (slice(0, 0),)
                   for o, w in zip(owned.axes, window.box.axes, strict=True))
    return Window("owned", window.box, slices)


def exchange(link: Link, legs: Sequence[Leg], token: torch.Tensor,
             owned: Sequence[torch.Tensor]) -> tuple[torch.Tensor, Tensors]:
    """The cells that every local rank holds after an exchange, and the token."""
    token, *held = _Exchange.apply(link, tuple(legs), token, *owned)  # type: ignore[no-untyped-call]
    return token, tuple(held)


def gather_partials(link: Link, groups: Sequence[tuple[int, ...]], token: torch.Tensor,
                    partials: Sequence[Tensors]) -> tuple[torch.Tensor, list[list[Tensors]]]:
    """Per local rank the partial results of its whole group, in the group's order, and the token."""
    width = len(partials[0])
    flat = [t for own in partials for t in own]
    token, *found = _Gather.apply(link, tuple(groups), width, token, *flat)  # type: ignore[no-untyped-call]
    results: list[list[Tensors]] = []
    for group in groups:
        results.append([tuple(found[i * width : (i + 1) * width]) for i in range(len(group))])
        found = found[len(group) * width :]
    return token, results


def tie(link: Link, token: torch.Tensor, outputs: Sequence[torch.Tensor],
        touched: Sequence[torch.Tensor] = ()) -> Tensors:
    """The outputs, whose backward pass begins with the last communication step on every rank.

    Args:
        touched: tensors that get a gradient, of zeros, even where nothing was computed from them.
    """
    if not token.requires_grad:
        return tuple(outputs)
    return tuple(_Tie.apply(link, len(outputs), token, *outputs, *touched))  # type: ignore[no-untyped-call]


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, link: Link, legs: tuple[Leg, ...], token: torch.Tensor, *owned: torch.Tensor) -> Tensors:
        ctx.link, ctx.legs, ctx.like = link, legs, [(t.shape, t.dtype, t.device) for t in owned]
        return (token.clone(), *_forward(link, legs, owned))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
        grad_token, *grads = grad_outputs
        grads = [grad.to(dtype) for grad, (_, dtype, _) in zip(grads, ctx.like, strict=True)]
        found = [_kept(leg, grad, like, ctx.link.storage)
                 for leg, grad, like in zip(ctx.legs, grads, ctx.like, strict=True)]
        sides = [ExchangeSide(rank, replace(leg.action, keep=None), grad, source)
                 for rank, leg, grad, source in zip(ctx.link.ranks, ctx.legs, grads, found, strict=True)]
        exchange_adjoint(ctx.link.transport, sides, ctx.link.storage)
        return (None, None, grad_token, *found)


def _kept(leg: Leg, grad: torch.Tensor, like: tuple[Any, ...], storage: str) -> torch.Tensor:
    """The cotangents of what a rank has from itself, to which those of others are added."""
    shape, dtype, device = like
    found = allocate(shape, dtype, device, storage)
    keep = leg.action.keep
    if keep is None or keep[0].box != leg.action.source.box:
        found.zero_()
    if keep is not None:
        for place, cells in zip(views(found, keep[0]), views(grad, keep[1]), strict=True):
            place.copy_(cells)
    return found


def _forward(link: Link, legs: Sequence[Leg], owned: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    held: list[torch.Tensor] = []
    jobs: list[Job] = []
    for rank, leg, source in zip(link.ranks, legs, owned, strict=True):
        action = leg.action
        target = allocate(leg.target.shape, source.dtype, source.device, link.storage)
        if action.keep is not None:
            pairs = zip(views(source, action.keep[0]), views(target, action.keep[1]), strict=True)
            for cells, place in pairs:
                place.copy_(cells)
        held.append(target)
        jobs.append(Job(rank, _parcels(link, source, action.sends), _parcels(link, target, action.receives)))
    link.transport.exchange(jobs)
    return held


def _parcels(link: Link, tensor: torch.Tensor, messages: Sequence[Any]) -> tuple[Parcel, ...]:
    return tuple(Parcel(m.peer, tuple(in_storage_order(v, link.storage) for w in m.windows for v in views(tensor, w)))
                 for m in messages)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, link: Link, groups: tuple[tuple[int, ...], ...], width: int, token: torch.Tensor,
                *partials: torch.Tensor) -> Tensors:
        ctx.link, ctx.groups, ctx.width = link, groups, width
        ctx.set_materialize_grads(True)
        own = [[t.contiguous() for t in partials[i * width : (i + 1) * width]] for i in range(len(groups))]
        inboxes = _swap(link, groups, [{peer: mine for peer in group} for group, mine in zip(groups, own, strict=True)])
        results = [t.clone() for group, inbox, mine, rank in zip(groups, inboxes, own, link.ranks, strict=True)
                   for peer in group for t in (mine if peer == rank else inbox[peer])]
        ctx.mark_non_differentiable(*[t for t in results if not t.is_floating_point()])
        return (token.clone(), *results)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
        grad_token, *grads = grad_outputs
        link, groups, width = ctx.link, ctx.groups, ctx.width
        left: list[torch.Tensor] = list(grads)
        boxes: list[dict[int, list[torch.Tensor]]] = []
        for group in groups:
            boxes.append({peer: [g.contiguous() for g in left[i * width : (i + 1) * width]]
                          for i, peer in enumerate(group)})
            left = left[len(group) * width :]
        inboxes = _swap(link, groups, boxes)
        found: list[torch.Tensor] = []
        for rank, group, box, inbox in zip(link.ranks, groups, boxes, inboxes, strict=True):
            terms = [box[rank] if peer == rank else inbox[peer] for peer in group]
            for parts in zip(*terms, strict=True):
                total = parts[0].clone()
                for part in parts[1:]:  # in rank order, so that every transport gives the same bits
                    total = total + part
                found.append(total)
        return (None, None, None, grad_token, *found)


def _swap(link: Link, groups: Sequence[tuple[int, ...]],
          boxes: Sequence[dict[int, list[torch.Tensor]]]) -> list[dict[int, list[torch.Tensor]]]:
    """Every local rank sends each peer of its group what is meant for it, and gets the like from each."""
    jobs: list[Job] = []
    inboxes: list[dict[int, list[torch.Tensor]]] = []
    for rank, group, box in zip(link.ranks, groups, boxes, strict=True):
        peers = [peer for peer in group if peer != rank]
        inbox = {peer: [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in box[rank]] for peer in peers}
        inboxes.append(inbox)
        jobs.append(Job(rank, tuple(Parcel(p, tuple(box[p])) for p in peers),
                        tuple(Parcel(p, tuple(inbox[p])) for p in peers)))
    link.transport.exchange(jobs)
    return inboxes


class _Tie(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, link: Link, count: int, token: torch.Tensor, *tensors: torch.Tensor) -> Tensors:
        ctx.link = link
        ctx.zeros = [(t.shape, t.dtype, t.device) for t in (token, *tensors[count:])]
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
        if ctx.link.on_backward is not None:
            ctx.link.on_backward()
        token, *touched = (torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.zeros)
        grads = [None if g is None else in_order(g, ctx.link.storage) for g in grad_outputs]
        return (None, None, token, *grads, *touched)


_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def in_order(tensor: torch.Tensor, storage: str) -> torch.Tensor:
    """The tensor with its memory in storage order: itself, or a copy.

    Where an input or a loss's gradient is stored otherwise, all that follows is: convolutions of channels first copy
    what they read into an order of their own, and take half as long again.  (In float64 they have no other order.)
    """
    if storage != "channels_last" or tensor.dtype == torch.float64 or tensor.dim() not in _CHANNELS_LAST:
        return tensor
    if tensor.stride(1) == 1:
        return tensor
    return tensor.clone(memory_format=_CHANNELS_LAST[tensor.dim()])


def scale_gradient(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    """The tensor as it is, its cotangent times a factor: the share of one among replicas."""
    result = _Scale.apply(tensor, factor)  # type: ignore[no-untyped-call]
    assert isinstance(result, torch.Tensor)
    return result


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
        return grad_outputs[0] * ctx.factor, None
