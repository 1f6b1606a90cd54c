"""Which values of a program live when, and what enters a run of its steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir
import torch

from partitioner import dialect, segments
from runtime.program import Action, Load, Program, Store, buffers_written, windows_read


@dataclass(frozen=True)
class Use:
    """The first step that writes a buffer, the last one that writes it, and the last one that touches it."""

    born: int
    extended: int
    dies: int


@dataclass(frozen=True)
class Slot:
    """A tensor that enters a segment: of a rank, an `input` of the model, a `weight` or a `value`."""

    rank: int
    kind: Literal["input", "weight", "value"]
    name: str


def touched(action: Action) -> tuple[list[str], list[str]]:
    """Names that an action reads, and buffers that it writes."""
    inputs = [action.name] if isinstance(action, Load) else []
    return [*inputs, *(w.buffer for w in windows_read(action))], list(buffers_written(action))


def find_uses(program: Program) -> dict[str, Use]:
    """Per buffer the steps between which it lives."""
    born: dict[str, int] = {}
    extended: dict[str, int] = {}
    dies: dict[str, int] = {}
    for index, step in enumerate(program.steps):
        reads, writes = touched(step.action)
        for name in writes:
            born.setdefault(name, index)
            extended[name] = index
        for name in (*reads, *writes):
            dies[name] = index
    return {name: Use(first, extended[name], dies[name]) for name, first in born.items()}


def find_segments(plan: ir.Model, program: Program) -> tuple[tuple[int, int], ...]:
    """The plan's segments in steps: inputs are loaded before their first reader, outputs stored after their maker."""
    names = [str(node.name) for node in plan.graph]
    starts, first = [0], 0
    for index, step in enumerate(program.steps):
        if len(starts) <= len(names) and _name_of(step.action) == names[len(starts) - 1]:
            starts[-1] = first
            starts.append(index + 1)
        if not isinstance(step.action, Load):
            first = index + 1
    starts[-1] = len(program.steps)
    return tuple((starts[start], starts[stop]) for start, stop in segments.find_segments(plan))


def _name_of(action: Action) -> str | None:
    return None if isinstance(action, Load | Store) else getattr(action, "name", None)


def entering(programs: Sequence[Program], weights: Sequence[Mapping[str, torch.Tensor]], uses: Mapping[str, Use],
              start: int, stop: int) -> list[Slot]:
    """All that the steps of a segment read and do not make themselves, each tensor once."""
    slots: dict[Slot, None] = {}
    shared: set[int] = set()
    for index in range(start, stop):
        for number, program in enumerate(programs):
            action = program.steps[index].action
            for name in touched(action)[0]:
                weight = weights[number].get(name)
                if isinstance(action, Load):
                    slots[Slot(number, "input", name)] = None
                elif weight is not None and id(weight) not in shared:
                    shared.add(id(weight))
                    slots[Slot(number, "weight", name)] = None
                elif weight is None and uses[name].born < start:
                    slots[Slot(number, "value", name)] = None
    return list(slots)


def some_empty(plan: ir.Model) -> bool:
    """Whether some rank has no cells of some value."""
    layouts = [dialect.get_layout(v) for node in plan.graph for v in node.outputs]
    return any(not part for layout in layouts for axis in layout.axes if axis is not None for part in axis.parts)


def find_batch_statistics(plan: ir.Model) -> frozenset[str]:
    """Names of the merges of statistics that the module keeps running: batch norms', not instance norms'."""
    found: set[str] = set()
    for value in plan.graph.outputs:
        node = value.producer() if dialect.get_statistic(value) is not None else None
        while node is not None and not dialect.is_all_reduce(node):
            source = node.inputs[0]
            node = None if source is None else source.producer()
        if node is not None:
            found.add(str(node.name))
    return frozenset(found)
