"""One differentiable pass over the programs of all local ranks: every value a tensor of its own.

Where inference writes into a buffer with room for the halo, here the owned cells are one tensor and the cells
after the exchange another, for autograd keeps both sides of every step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from partitioner.geometry import Box, local_slices
from partitioner.ops.base import Call
from partitioner.ops.dtypes import torch_dtype
from runtime.executor import merge
from runtime.memory import view
from runtime.program import AllReduce, Compute, Exchange, Load, Program, Store, Window
from runtime.training.communication import Leg, Link, exchange, gather_partials, make_leg, tie
from runtime.transports import Transport

Shards = list[torch.Tensor]
"""A value's cells on every local rank."""


@dataclass(frozen=True)
class Held:
    """Cells of a value, and which they are."""

    tensor: torch.Tensor
    box: Box

    def read(self, box: Box) -> torch.Tensor:
        """Some of the cells."""
        if box == self.box:
            return self.tensor
        slices = tuple(local_slices(h, w) or (slice(0, 0),) for h, w in zip(self.box.axes, box.axes, strict=True))
        return view(self.tensor, Window("", box, slices))


@dataclass
class Rank:
    """One local rank during a pass."""

    program: Program
    device: torch.device
    weights: Mapping[str, torch.Tensor]
    values: dict[str, Held] = field(default_factory=dict[str, Held])

    def read(self, window: Window) -> torch.Tensor:
        """The cells of a window of a value or a weight."""
        weight = self.weights.get(window.buffer)
        return self.values[window.buffer].read(window.box) if weight is None else view(weight, window)


class Differentiable:
    """Runs the programs of the ranks of this process under autograd.

    Args:
        programs: of the local ranks, in the transport's order.
        devices: per local rank.
        on_backward: called on every rank when a backward pass begins.
    """

    def __init__(self, programs: Sequence[Program], devices: Sequence[torch.device], transport: Transport,
                 on_backward: Callable[[], None] | None = None) -> None:
        self.programs = tuple(programs)
        self.devices = tuple(devices)
        self.link = Link(transport, transport.ranks, programs[0].storage, on_backward)
        self._legs: dict[int, tuple[Leg, ...]] = {}

    def run(self, inputs: Mapping[str, Shards], weights: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, Shards]:
        """Outputs per name, on every local rank the cells that it owns.

        Args:
            inputs: per name, on every local rank the cells that it owns.
            weights: per local rank, by the names of the model.
        """
        ranks = [Rank(p, d, w) for p, d, w in zip(self.programs, self.devices, weights, strict=True)]
        outputs: dict[str, Shards] = {}
        token = self.link.new_token(self.devices[0])
        for index, steps in enumerate(zip(*(p.steps for p in self.programs), strict=True)):
            actions = [step.action for step in steps]
            first = actions[0]
            if isinstance(first, Exchange):
                token = self._exchange(index, ranks, [a for a in actions if isinstance(a, Exchange)], token)
            elif isinstance(first, AllReduce):
                token = self._all_reduce(ranks, [a for a in actions if isinstance(a, AllReduce)], token)
            elif isinstance(first, Store):
                outputs[first.name] = [r.read(a.window) for r, a in zip(ranks, actions, strict=True)
                                       if isinstance(a, Store)]
            else:
                for number, (rank, action) in enumerate(zip(ranks, actions, strict=True)):
                    if isinstance(action, Load):
                        rank.values[action.window.buffer] = Held(inputs[action.name][number], action.window.box)
                    elif isinstance(action, Compute):
                        compute(rank, action)
            for rank, step in zip(ranks, steps, strict=True):
                for name in step.releases:
                    rank.values.pop(name, None)
        tied = iter(tie(self.link, token, [t for shards in outputs.values() for t in shards]))
        return {name: [next(tied) for _ in shards] for name, shards in outputs.items()}

    def _exchange(self, index: int, ranks: Sequence[Rank], actions: Sequence[Exchange],
                  token: torch.Tensor) -> torch.Tensor:
        if index not in self._legs:
            self._legs[index] = tuple(make_leg(a, r.program.buffers[a.target].box)
                                      for r, a in zip(ranks, actions, strict=True))
        legs = self._legs[index]
        owned = [r.read(a.source) for r, a in zip(ranks, actions, strict=True)]
        token, held = exchange(self.link, legs, token, owned)
        for rank, action, leg, tensor in zip(ranks, actions, legs, held, strict=True):
            rank.values[action.target] = Held(tensor, leg.target)
        return token

    def _all_reduce(self, ranks: Sequence[Rank], actions: Sequence[AllReduce], token: torch.Tensor) -> torch.Tensor:
        partials = [tuple(r.read(w) for w in a.sources) for r, a in zip(ranks, actions, strict=True)]
        for stage in range(len(actions[0].groups)):
            groups = [a.groups[stage] for a in actions]
            token, gathered = gather_partials(self.link, groups, token, partials)
            partials = [tuple(merge(a.kind, parts)) for a, parts in zip(actions, gathered, strict=True)]
        for rank, action, merged in zip(ranks, actions, partials, strict=True):
            for window, tensor in zip(action.targets, merged, strict=True):
                rank.values[window.buffer] = Held(tensor, window.box)
        return token


def compute(rank: Rank, action: Compute) -> None:
    """Run one kernel on fresh memory."""
    outs = tuple(w.box for w in action.writes)
    if any(map(bool, outs)):
        tensors = tuple(None if w is None else rank.read(w) for w in action.reads)
        boxes = tuple(None if w is None else w.box for w in action.reads)
        results = action.operator.run(Call(tensors, boxes, outs))
    else:
        results = tuple(torch.empty(box.shape, dtype=torch_dtype(t.dtype), device=rank.device)
                        for box, t in zip(outs, action.operator.outputs, strict=False))
    for window, result in zip(action.writes, results, strict=False):
        rank.values[window.buffer] = Held(result, window.box)
