"""What a program will hold in memory, step by step, from its windows alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from runtime.program import Action, AllReduce, Compute, Exchange, Forget, Load, Merge, Program, Store, Window


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
        rests: the buffers that rest in memory where the peak is, the largest first.
        crowd: those that rest there when most does.
        copies: what is copied though a kernel that writes in place would not.
    """

    peak: int
    step: str
    resting: int
    filed: int
    weights: int
    rests: tuple[str, ...]
    crowd: tuple[str, ...]
    copies: tuple[Copy, ...]


def forecast(program: Program, files: frozenset[str] = frozenset()) -> Memory:
    """Follow a program's buffers through its steps.

    Args:
        files: resting buffers that would lie in files, beside those that do.
    """
    books = _Books(program, files)
    for step in program.steps:
        books.act(step.action)
        books.close(step.action.name)
        for name in step.releases:
            for home in (books.alive, books.resting):
                home.pop(name, None)
    weights = sum(t.nbytes for t in program.weights.values())
    rests, crowd = (tuple(sorted(found, key=lambda n: -found[n])) for found in (books.at_peak, books.at_most))
    return Memory(math.ceil(books.peak), books.where, math.ceil(books.most), math.ceil(sum(books.filed.values())),
                  weights, rests, crowd, tuple(Copy(n, math.ceil(b)) for n, b in books.copies.items()))


class _Books:
    """What is alive at the moment, by buffer: in memory, resting there, and resting in files."""

    def __init__(self, program: Program, files: frozenset[str]) -> None:
        self.program = program
        self.files = files
        self.alive: dict[str, float] = {}
        self.resting: dict[str, float] = {}
        self.filed: dict[str, float] = {}
        self.copies: dict[str, float] = {}
        self.at_peak: dict[str, float] = {}
        self.at_most: dict[str, float] = {}
        self.peak = self.most = self.beside = 0.0
        self.where = ""

    def act(self, action: Action) -> None:
        """Take down what an action brings into being, and what it needs beside."""
        self.beside = 0.0
        for window in _fills(action):
            self._fill(action, window)
        if isinstance(action, Compute):
            ins = [0.0 if w is None else float(w.box.size) for w in action.reads]
            self.beside += action.operator.workspace(ins, [float(w.box.size) for w in action.writes])
            self.beside += sum(_bytes(self.program, w) for w in action.reads if w is not None and not w.is_dense)
        elif isinstance(action, Exchange):
            self.beside += sum(_bytes(self.program, w) for m in (*action.sends, *action.receives) for w in m.windows)
        elif isinstance(action, Store | Load):
            self.beside += _bytes(self.program, action.window)
        elif isinstance(action, Forget) and action.buffer in self.resting:
            self.resting[action.buffer] *= 1 - action.part

    def close(self, name: str) -> None:
        """Note the peak, if it is here."""
        resting = sum(self.resting.values())
        total = sum(self.alive.values()) + resting + self.beside
        if resting > self.most:
            self.most, self.at_most = resting, dict(self.resting)
        if total > self.peak:
            self.peak, self.where, self.at_peak = total, name, dict(self.resting)

    def _fill(self, action: Action, window: Window) -> None:
        spec = self.program.buffers[window.buffer]
        if spec.place == "file" or window.buffer in self.files:
            self.filed[window.buffer] = spec.box.size * spec.dtype.itemsize
        elif spec.place == "resting":  # pages are there from the first write
            self.resting[window.buffer] = self.resting.get(window.buffer, 0.0) + _bytes(self.program, window)
        elif window.fills:
            self.alive[window.buffer] = 0.0 if _is_view(action) else _bytes(self.program, window)
        else:
            self.alive.setdefault(window.buffer, spec.box.size * spec.dtype.itemsize)
        if not window.fills:
            self.beside += _beside(action, window, self.program, self.copies)


def _fills(action: Action) -> Iterator[Window]:
    if isinstance(action, Compute):
        yield from action.writes
    elif isinstance(action, Load):
        yield action.window
    elif isinstance(action, AllReduce | Merge):
        yield from action.targets
    elif isinstance(action, Exchange) and action.receives:
        yield from (w for m in action.receives for w in m.windows)


def _is_view(action: Action) -> bool:
    return isinstance(action, Compute) and action.operator.is_view


def _beside(action: Action, window: Window, program: Program, copies: dict[str, float]) -> float:
    """Bytes of a result that is copied to its place."""
    if not isinstance(action, Compute) or (action.operator.writes_into and window is action.writes[0]):
        return 0.0
    copies[action.name] = copies.get(action.name, 0.0) + _bytes(program, window)
    return 0.0 if action.operator.is_view else _bytes(program, window)


def _bytes(program: Program, window: Window) -> float:
    spec = program.buffers.get(window.buffer)
    itemsize = program.weights[window.buffer].dtype.itemsize if spec is None else spec.dtype.itemsize
    return window.box.size * itemsize
