"""Steps of a program that are run as one: a kernel and those after it that work on its result cell by cell, in place.

    Compute conv   x, w, b -> y              Compute conv   x, w, b -> y        (in blocks, see `partitioner.ops.fused`)
    Compute relu   y -> y

That the second one may write where it reads is known from the lifetimes (`partitioner.lifetime`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from partitioner.ops.base import Operator
from partitioner.ops.fused import BLOCK, PREVIOUS, Fused, follows, starts
from runtime.program import Action, Compute, Program, Step, Window, nothing


def fuse(program: Program) -> Program:
    """The same program with kernels joined, and those that bring new memory into being run in blocks.

    The steps that are joined to others stay as steps that do nothing: which ones they are may differ from rank to rank.
    """
    if program.storage != "channels_last":
        return program
    steps: list[Step] = []
    last = -1  # the step that the next one may be joined to
    made = Made()
    for step in program.steps:
        action = _joined(steps[last].action, step.action, made) if last >= 0 else None
        if action is not None:
            steps[last] = replace(steps[last], action=action)
            steps.append(replace(step, action=nothing(step.action.name)))
            continue
        last = len(steps) if isinstance(step.action, Compute) else -1
        steps.append(replace(step, action=in_blocks(step.action, made)))
    return replace(program, steps=tuple(steps))


class Made:
    """Operators that were joined before: the slabs of a chain have the same ones. They live as long as the program."""

    def __init__(self) -> None:
        self._found: dict[tuple[Any, ...], tuple[Fused, Any]] = {}

    def of(self, operator: Operator, count: int, cells: int) -> Fused:
        """See `Fused.of`."""
        key = (id(operator), count, cells * operator.outputs[0].itemsize > BLOCK)
        if key not in self._found:
            self._found[key] = Fused.of(operator, count, cells), operator
        return self._found[key][0]

    def then(self, first: Fused, operator: Operator, sources: Sequence[int], inputs: int) -> Fused:
        """See `Fused.then`."""
        key = (id(first), id(operator), *sources, inputs)
        if key not in self._found:
            self._found[key] = first.then(operator, sources, inputs), (first, operator)
        return self._found[key][0]


def in_blocks(action: Action, made: Made | None = None) -> Action:
    """A kernel that brings new memory into being as one that is run in blocks; other actions as they are."""
    made = made or Made()
    if not isinstance(action, Compute) or not starts(action.operator) or len(action.writes) != 1:
        return action
    return replace(action, operator=made.of(action.operator, len(action.reads), action.writes[0].box.size))


def _joined(first: Action, second: Action, made: Made) -> Compute | None:
    """Both as one step, where the second one writes where it reads what the first one has written."""
    if not isinstance(first, Compute) or not isinstance(second, Compute):
        return None
    if not isinstance(first.operator, Fused) or not follows(second.operator):
        return None
    if len(second.writes) != 1 or second.writes != first.writes:
        return None
    places = [i for i, window in enumerate(second.reads) if window is not None and _same(window, first.writes[0])]
    if len(places) != 1 or any(_touches(w, first.writes[0]) for i, w in enumerate(second.reads) if i != places[0]):
        return None
    sources, reads = _sources(second.reads, places[0], len(first.reads))
    operator = made.then(first.operator, second.operator, sources, len(first.reads))
    return replace(first, operator=operator, reads=(*first.reads, *reads))


def _sources(reads: Sequence[Window | None], place: int, count: int) -> tuple[list[int], list[Window | None]]:
    """Where a joined step finds the inputs of its second part: the result, or inputs after the first `count` ones."""
    others = [window for index, window in enumerate(reads) if index != place]
    numbers = iter(range(count, count + len(others)))
    return [PREVIOUS if index == place else next(numbers) for index in range(len(reads))], others


def _same(a: Window, b: Window) -> bool:
    return (a.buffer, a.box, a.slices) == (b.buffer, b.box, b.slices)


def _touches(window: Window | None, other: Window) -> bool:
    return window is not None and window.buffer == other.buffer
