"""What a program will hold in memory, step by step, from its windows alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from runtime.program import AllReduce, Compute, Exchange, Forget, Load, Merge, Program, Store, Window


@dataclass(frozen=True)
class Copy:
    """A result that is computed beside its place and copied there, or cells that are moved."""

    name: str
    nbytes: int


@dataclass(frozen=True)
class Memory:
    """The memory of one program.

    Args:
        peak: most bytes of activations alive at once, what kernels take beside them included.
        step: the name of the step in which that is.
        resting: most bytes of buffers that rest from chain to chain, at once; part of the peak unless in files.
        filed: bytes in mapped files.
        weights: bytes of weights.
        copies: what is copied though a kernel that writes in place would not.
    """

    peak: int
    step: str
    resting: int
    filed: int
    weights: int
    copies: tuple[Copy, ...]


def forecast(program: Program) -> Memory:
    """Follow a program's buffers through its steps."""
    alive: dict[str, float] = {}
    resting: dict[str, float] = {}
    filed: dict[str, float] = {}
    copies: dict[str, float] = {}
    peak, most, where = 0.0, 0.0, ""
    for step in program.steps:
        action, beside = step.action, 0.0
        for window in _fills(action):
            spec = program.buffers[window.buffer]
            home = {"memory": alive, "resting": resting, "file": filed}[spec.place]
            if window.fills:
                home[window.buffer] = 0.0 if _is_view(action) else _bytes(program, window)
            else:
                home.setdefault(window.buffer, math.prod(spec.box.shape) * spec.dtype.itemsize)
                beside += _beside(action, window, program, copies)
        if isinstance(action, Compute):
            ins = [0.0 if w is None else float(w.box.size) for w in action.reads]
            beside += action.operator.workspace(ins, [float(w.box.size) for w in action.writes])
            beside += sum(_bytes(program, w) for w in action.reads if w is not None and not w.is_dense)
        elif isinstance(action, Exchange):
            beside += sum(_bytes(program, w) for m in (*action.sends, *action.receives) for w in m.windows)
        elif isinstance(action, Store | Load):
            beside += _bytes(program, action.window)
        elif isinstance(action, Forget) and action.buffer in resting:
            spec = program.buffers[action.buffer]
            left = 1 - action.cells / max(1, spec.box.shape[spec.axis])
            resting[action.buffer] = math.prod(spec.box.shape) * spec.dtype.itemsize * left
        total = sum(alive.values()) + sum(resting.values()) + beside
        most = max(most, sum(resting.values()))
        if total > peak:
            peak, where = total, action.name
        for name in step.releases:
            for home in (alive, resting):
                home.pop(name, None)
    weights = sum(t.nbytes for t in program.weights.values())
    return Memory(math.ceil(peak), where, math.ceil(most), math.ceil(sum(filed.values())), weights,
                  tuple(Copy(n, math.ceil(b)) for n, b in copies.items()))


def _fills(action: object) -> Iterator[Window]:
    if isinstance(action, Compute):
        yield from action.writes
    elif isinstance(action, Load):
        yield action.window
    elif isinstance(action, AllReduce | Merge):
        yield from action.targets
    elif isinstance(action, Exchange) and action.receives:
        yield from (w for m in action.receives for w in m.windows)


def _is_view(action: object) -> bool:
    return isinstance(action, Compute) and action.operator.is_view


def _beside(action: object, window: Window, program: Program, copies: dict[str, float]) -> float:
    """Bytes of a result that is copied to its place."""
    if not isinstance(action, Compute) or (action.operator.writes_into and window is action.writes[0]):
        return 0.0
    copies[action.name] = copies.get(action.name, 0.0) + _bytes(program, window)
    return 0.0 if action.operator.is_view else _bytes(program, window)


def _bytes(program: Program, window: Window) -> float:
    spec = program.buffers.get(window.buffer)
    itemsize = program.weights[window.buffer].dtype.itemsize if spec is None else spec.dtype.itemsize
    return window.box.size * itemsize
