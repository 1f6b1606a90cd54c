"""One differentiable pass over the programs of all local ranks: every value a tensor of its own.

Where inference writes into a buffer with room for the halo, here the owned cells are one tensor and the cells
after the exchange another, for autograd keeps both sides of every step.  Steps are whole: marks by which inference
computes an interior while messages travel are not heeded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
import torch

from partitioner.geometry import Box, local_slices
from partitioner.ops.base import Call
from partitioner.ops.dtypes import torch_dtype
from runtime.executor import merge
from runtime.memory import view
from runtime.program import Action, AllReduce, Compute, Exchange, Load, Program, Store, Window
from runtime.training.communication import Leg, Link, exchange, gather_partials, in_order, make_leg, tie
from runtime.training.liveness import Slot, entering, find_batch_statistics, find_segments, find_uses, some_empty
from runtime.training.segments import run_segment

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


@dataclass(frozen=True)
class Wiring:
    """How the ranks of this process reach all others.

    Args:
        space: the ranks of the mesh.
        across: the same rank in the other copies of the network, when batch statistics go over them too.
        gather: a value of every process of this copy, in order; only called where a rank may have no cells.
    """

    space: Link
    across: Link | None = None
    gather: Callable[[Any], list[Any]] = lambda value: [value]


class Differentiable:
    """Runs the programs of the ranks of this process under autograd.

    Args:
        plan: whose programs they are.
        programs: of the local ranks, in the transport's order.
        devices: per local rank.
        checkpoint: keep only what crosses a few cuts of the program and compute the rest again.
    """

    def __init__(self, plan: ir.Model, programs: Sequence[Program], devices: Sequence[torch.device], wiring: Wiring,
                 checkpoint: bool = False) -> None:
        self.programs = tuple(programs)
        self.devices = tuple(devices)
        self.wiring = wiring
        self._legs: dict[int, tuple[Leg, ...]] = {}
        self._dtypes: dict[tuple[int, bool, torch.dtype], torch.dtype] = {}
        self._statistics = find_batch_statistics(plan) if wiring.across is not None else frozenset[str]()
        self._some_empty = some_empty(plan)
        steps = len(programs[0].steps)
        self._uses = find_uses(programs[0])
        self.segments = find_segments(plan, programs[0]) if checkpoint else ((0, steps),)

    def run(self, inputs: Mapping[str, Shards], weights: Sequence[Mapping[str, torch.Tensor]],
            touched: Sequence[torch.Tensor] = ()) -> dict[str, Shards]:
        """Outputs per name, on every local rank the cells that it owns.

        Args:
            inputs: per name, on every local rank the cells that it owns.
            weights: per local rank, by the names of the model.
            touched: parameters of which every rank needs a gradient, those without cells too.
        """
        ranks = [Rank(p, d, w) for p, d, w in zip(self.programs, self.devices, weights, strict=True)]
        outputs: dict[str, Shards] = {}
        token = self.wiring.space.new_token(self.devices[0])
        for start, stop in self.segments:
            if len(self.segments) == 1 or not torch.is_grad_enabled():
                token = self._steps(ranks, start, stop, inputs, outputs, token)
            else:
                token = self._segment(ranks, start, stop, inputs, outputs, token)
        tied = iter(tie(self.wiring.space, token, [t for shards in outputs.values() for t in shards],
                        touched if self._some_empty else ()))
        return {name: [next(tied) for _ in shards] for name, shards in outputs.items()}

    def _segment(self, ranks: Sequence[Rank], start: int, stop: int, inputs: Mapping[str, Shards],
                 outputs: dict[str, Shards], token: torch.Tensor) -> torch.Tensor:
        """Some steps, of which only what enters and what leaves is kept.

        What runs again must not hold on to results: they hold on to it.
        """
        slots = entering(self.programs, [r.weights for r in ranks], self._uses, start, stop)
        given = [_content(slot, ranks, inputs) for slot in slots]
        boxes = [ranks[s.rank].values[s.name].box if s.kind == "value" else None for s in slots]
        weights, uses = [r.weights for r in ranks], self._uses
        labels: list[tuple[int, str, Box | None]] = []

        def run(tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            inside, own = self._enter(slots, boxes, weights, tensors[1:])
            stored: dict[str, Shards] = {}
            found = [self._steps(inside, start, stop, own, stored, tensors[0])]
            labels.clear()
            for name, shards in stored.items():
                labels.extend((-1, name, None) for _ in shards)
                found.extend(shards)
            for number, rank in enumerate(inside):
                kept = {n: held for n, held in rank.values.items() if uses[n].extended >= start}
                labels.extend((number, name, held.box) for name, held in kept.items())
                found.extend(held.tensor for held in kept.values())
            return tuple(found)

        token, *found = run_segment(run, token, tuple(given))
        for (number, name, box), tensor in zip(labels, found, strict=True):
            if box is None:
                outputs.setdefault(name, []).append(tensor)
            else:
                ranks[number].values[name] = Held(tensor, box)
        for rank in ranks:
            for name in [n for n in rank.values if uses[n].dies < stop]:
                del rank.values[name]
        return token

    def _enter(self, slots: Sequence[Slot], boxes: Sequence[Box | None], weights: Sequence[Mapping[str, torch.Tensor]],
               tensors: Sequence[torch.Tensor]) -> tuple[list[Rank], dict[str, Shards]]:
        """Ranks and inputs that have the given tensors in the slots."""
        inputs: dict[str, Shards] = {}
        own = [dict(w) for w in weights]
        values: list[dict[str, Held]] = [{} for _ in weights]
        for slot, box, tensor in zip(slots, boxes, tensors, strict=True):
            if slot.kind == "input":
                inputs.setdefault(slot.name, []).append(tensor)
            elif slot.kind == "weight":
                for mine, theirs in zip(own, weights, strict=True):
                    if theirs.get(slot.name) is weights[slot.rank][slot.name]:
                        mine[slot.name] = tensor
            elif box is not None:
                values[slot.rank][slot.name] = Held(tensor, box)
        found = zip(self.programs, self.devices, own, values, strict=True)
        return [Rank(program, device, mine, held) for program, device, mine, held in found], inputs

    def _steps(self, ranks: Sequence[Rank], start: int, stop: int, inputs: Mapping[str, Shards],
               outputs: dict[str, Shards], token: torch.Tensor) -> torch.Tensor:
        for index in range(start, stop):
            steps = [p.steps[index] for p in self.programs]
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
                _act(ranks, actions, inputs)
            for rank, step in zip(ranks, steps, strict=True):
                for name in step.releases:
                    rank.values.pop(name, None)
        return token

    def _exchange(self, index: int, ranks: Sequence[Rank], actions: Sequence[Exchange],
                  token: torch.Tensor) -> torch.Tensor:
        if index not in self._legs:
            self._legs[index] = tuple(make_leg(a, r.program.buffers[a.target].box)
                                      for r, a in zip(ranks, actions, strict=True))
        legs = self._legs[index]
        owned = [r.read(a.source) for r, a in zip(ranks, actions, strict=True)]
        if self._some_empty:
            dtype = self._dtype(index, owned)
            owned = [t if t.dtype == dtype else t.to(dtype) for t in owned]
        token, held = exchange(self.wiring.space, legs, token, owned)
        for rank, action, leg, tensor in zip(ranks, actions, legs, held, strict=True):
            rank.values[action.target] = Held(tensor, leg.target)
        return token

    def _dtype(self, index: int, owned: Shards) -> torch.dtype:
        """The type of the cells that are exchanged: autocast chooses it, and only ranks that have cells know."""
        kind = self.devices[0].type
        key = index, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        if key not in self._dtypes:
            mine = next((t.dtype for t in owned if t.numel()), None)
            found = self.wiring.gather(mine)
            self._dtypes[key] = next((dtype for dtype in found if dtype is not None), owned[0].dtype)
        return self._dtypes[key]

    def _all_reduce(self, ranks: Sequence[Rank], actions: Sequence[AllReduce], token: torch.Tensor) -> torch.Tensor:
        partials = [tuple(r.read(w) for w in a.sources) for r, a in zip(ranks, actions, strict=True)]
        stages = [(self.wiring.space, [a.groups[i] for a in actions]) for i in range(len(actions[0].groups))]
        across = self.wiring.across
        if across is not None and actions[0].name in self._statistics:
            stages.append((across, [across.everyone for _ in actions]))
        for link, groups in stages:
            token, gathered = gather_partials(link, groups, token, partials)
            partials = [tuple(merge(a.kind, parts)) for a, parts in zip(actions, gathered, strict=True)]
        for rank, action, merged in zip(ranks, actions, partials, strict=True):
            for window, tensor in zip(action.targets, merged, strict=True):
                rank.values[window.buffer] = Held(tensor, window.box)
        return token


def _act(ranks: Sequence[Rank], actions: Sequence[Action], inputs: Mapping[str, Shards]) -> None:
    """What every rank does by itself."""
    for number, (rank, action) in enumerate(zip(ranks, actions, strict=True)):
        if isinstance(action, Load):
            found = in_order(inputs[action.name][number], rank.program.storage)
            rank.values[action.window.buffer] = Held(found, action.window.box)
        elif isinstance(action, Compute):
            compute(rank, action)


def compute(rank: Rank, action: Compute) -> None:
    """Run one kernel on fresh memory."""
    outs = tuple(w.box for w in action.writes)
    if any(map(bool, outs)):
        tensors = tuple(None if w is None else rank.read(w) for w in action.reads)
        boxes = tuple(None if w is None else w.box for w in action.reads)
        results = tuple(in_order(r, rank.program.storage) for r in action.operator.run(Call(tensors, boxes, outs)))
    else:
        results = tuple(torch.empty(box.shape, dtype=torch_dtype(t.dtype), device=rank.device)
                        for box, t in zip(outs, action.operator.outputs, strict=False))
    for window, result in zip(action.writes, results, strict=False):
        rank.values[window.buffer] = Held(result, window.box)


def _content(slot: Slot, ranks: Sequence[Rank], inputs: Mapping[str, Shards]) -> torch.Tensor:
    if slot.kind == "input":
        return inputs[slot.name][slot.rank]
    return ranks[slot.rank].weights[slot.name] if slot.kind == "weight" else ranks[slot.rank].values[slot.name].tensor
