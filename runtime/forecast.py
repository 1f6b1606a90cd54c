"""What a program will hold in memory, step by step, from its windows alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from partitioner.garbage import kept_for_later
from partitioner.ops.fused import BLOCK, Fused
from runtime.arena import LARGE
from runtime.places import Life, extent_of
from runtime.program import (
    Action,
    BufferSpec,
    Compute,
    Exchange,
    Finish,
    Forget,
    Load,
    Move,
    Post,
    Program,
    Store,
    Window,
    in_turns,
    storage_order,
    windows_read,
    windows_written,
)
from runtime.volumes.raw import TILE_BYTES

KERNEL = 112 << 10
"""Bytes of a kernel that oneDNN makes for one weight and one geometry, about."""

STEP = 3 << 10
"""Bytes of a step of a program, with what the executor finds out once of it, about."""

IDLE = 0.125
"""By which part of the peak a region may raise what is held; else tensors take memory one by one.  Whole shards may
raise it by the copy of a tile on its way to a file too, which is much only where all is small; slabs serve budgets."""


@dataclass(frozen=True)
class Copy:
    """A result that is computed beside its place and copied there, or cells that are moved."""

    name: str
    nbytes: int


@dataclass(frozen=True)
class Memory:
    """The memory of a program, or of those of all strips of one process.

    Args:
        peak: most bytes of activations held at once, what kernels take beside them included: those that are alive,
            and what lies idle in the region of the large ones (`runtime.places`).
        step: the name of the step in which that is.
        resting: most bytes of buffers that rest from chain to chain, at once; part of the peak unless in files.
        filed: bytes in mapped files.
        weights: bytes of weights, of what kernels keep of them in an order of their own, and of these kernels.
        rests: the buffers that rest in memory where the peak is, the largest first.
        crowd: those that rest there when most does.
        copies: what is copied though a kernel that writes in place would not.
        turns: bytes alive at once in every turn (`in_turns`).
        programs: bytes of the programs themselves; thin slabs are many steps.
    """

    peak: int
    step: str
    resting: int
    filed: int
    weights: int
    rests: tuple[str, ...]
    crowd: tuple[str, ...]
    copies: tuple[Copy, ...]
    turns: tuple[int, ...] = ()
    programs: int = 0

    @property
    def spare(self) -> tuple[int, ...]:
        """Bytes below the peak, per turn."""
        return tuple(self.peak - alive for alive in self.turns)


@kept_for_later()
def forecast(programs: Sequence[Program], files: frozenset[str] = frozenset()) -> Memory:
    """Follow the buffers of the ranks of one process through their steps.

    Args:
        programs: of one rank, or of several in the order in which a process takes them.
        files: resting buffers that would lie in files, beside those that do.
    """
    region = _Region()
    books = [_Books(program, files, region) for program in programs]
    highest = _Highest(region, 0 if programs[0].is_rolled else TILE_BYTES)
    for number, places in in_turns(programs):
        for place in places:
            action = programs[place].steps[number].action
            highest.leave(books[place])
            books[place].act(action)
            highest.enter(books[place])
            highest.note(books, action.name)
        highest.turn()
        for place in places:
            highest.leave(books[place])
            books[place].beside = 0
            for name in programs[place].steps[number].releases:
                books[place].release(name)
            highest.enter(books[place])
    weights = sum(t.nbytes for t in programs[0].weights.values()) + _packed(programs)
    rests, crowd = (tuple(sorted(found, key=lambda n: -found[n])) for found in (highest.at_peak, highest.at_most))
    filed = sum(sum(found.filed.values()) for found in books)
    copies = _sums([found.copies for found in books])
    return Memory(highest.held, highest.where, highest.most, filed, weights, rests, crowd,
                  tuple(Copy(name, nbytes) for name, nbytes in copies.items()), tuple(highest.turns),
                  STEP * sum(len(program.steps) for program in programs))


def _packed(programs: Sequence[Program]) -> int:
    """Bytes of the weights that kernels keep in an order of their own, and of the kernels (`kernels.onednn`)."""
    weights: dict[str, int] = {}
    kernels: set[tuple[Any, ...]] = set()
    for program in programs:
        for action in (step.action for step in program.steps):
            operator = action.operator if isinstance(action, Compute) else None
            if not isinstance(action, Compute) or not isinstance(operator, Fused) or not operator.is_direct:
                continue
            for window in action.reads:
                tensor = None if window is None else program.weights.get(window.buffer)
                if window is not None and tensor is not None and len(tensor.shape) > 3:
                    weights[window.buffer] = tensor.nbytes
                    kernels.add((window.buffer, _extents(action.reads[0]), _extents(action.writes[0])))
    return sum(weights.values()) + KERNEL * len(kernels)


def _extents(window: Window | None) -> tuple[int, ...]:
    return () if window is None else window.box.shape


def _sums(counts: Sequence[dict[str, int]]) -> dict[str, int]:
    found: dict[str, int] = {}
    for count in counts:
        for name, nbytes in count.items():
            found[name] = found.get(name, 0) + nbytes
    return found


class _Highest:
    """The most that is alive at once, over all ranks; `idle` are bytes that a region may always hold besides."""

    def __init__(self, region: _Region, idle: int) -> None:
        self.region, self.idle = region, idle
        self.total = self.rests = self.peak = self.most = self.small = 0
        self.within = 0
        self.turns: list[int] = []
        self.where = ""
        self.at_peak: dict[str, int] = {}
        self.at_most: dict[str, int] = {}

    def leave(self, books: _Books) -> None:
        """Take a rank out of the sums while its books change."""
        self.total -= books.lives + books.rests + books.beside
        self.rests -= books.rests

    def enter(self, books: _Books) -> None:
        """Put it back."""
        self.total += books.lives + books.rests + books.beside
        self.rests += books.rests

    @property
    def held(self) -> int:
        """The peak, with the region whole if that takes little more."""
        extent = self.region.extent
        held = self.peak if extent is None else extent + self.small
        return held if self.peak < held <= self.peak + max(IDLE * self.peak, self.idle) else self.peak

    def turn(self) -> None:
        """The end of a turn."""
        self.turns.append(self.within)
        self.within = 0

    def note(self, books: Sequence[_Books], name: str) -> None:
        """Note the peak, if it is here."""
        self.within = max(self.within, self.total)
        self.small = max(self.small, self.total - self.region.alive)
        if self.rests > self.most:
            self.most, self.at_most = self.rests, _sums([found.resting for found in books])
        if self.total > self.peak:
            self.peak, self.where = self.total, name
            self.at_peak = _sums([found.resting for found in books])


class _Region:
    """The large tensors, as they come and go."""

    def __init__(self) -> None:
        self.alive = 0
        self._clock = 0
        self._lives: list[Life] = []
        self._here: dict[tuple[int, str], Life] = {}

    def take(self, rank: int, name: str, nbytes: int) -> None:
        """A tensor comes into being, in the place of one that has its name."""
        self.leave(rank, name)
        if nbytes <= LARGE:
            return
        self._clock += 1
        self._here[rank, name] = life = Life(nbytes, self._clock)
        self._lives.append(life)
        self.alive += nbytes

    def leave(self, rank: int, name: str) -> None:
        """A tensor goes."""
        life = self._here.pop((rank, name), None)
        if life is not None:
            self._clock += 1
            life.died = self._clock
            self.alive -= life.nbytes

    @property
    def extent(self) -> int | None:
        """Bytes of the region, after all have gone; None if there is none."""
        for rank, name in list(self._here):
            self.leave(rank, name)
        return extent_of(self._lives)


class _Books:
    """What one rank has alive at the moment, by buffer: in memory, resting there, and resting in files."""

    def __init__(self, program: Program, files: frozenset[str], region: _Region) -> None:
        self.program = program
        self.region = region
        self.files = files
        self.alive: dict[str, int] = {}
        self.resting: dict[str, int] = {}
        self.filed: dict[str, int] = {}
        self.copies: dict[str, int] = {}
        self.reached: dict[str, dict[tuple[tuple[int, int], ...], int]] = {}
        self.beside = self.lives = self.rests = 0

    def act(self, action: Action) -> None:
        """Take down what an action brings into being, and what it needs beside."""
        self.beside = 0
        for window in windows_written(action):
            self._fill(action, window)
        match action:
            case Compute():
                ins = [0.0 if w is None else float(w.box.size) for w in action.reads]
                self.beside += math.ceil(action.operator.workspace(ins, [float(w.box.size) for w in action.writes]))
                self.beside += sum(self._bytes(w) for w in windows_read(action) if not w.is_dense)
                self.beside += self._blocks_copied(action)
            case Exchange():
                self.beside += self._messages(action)
            case Post():
                self._live(f"{action.name}/messages", self._messages(action.exchange))
            case Finish():
                self.beside += self._messages(action.exchange)
                self.release(f"{action.name}/messages")
            case Load():
                self.beside += self._bytes(action.window)
            case Store():  # a copy is written while the next slab is computed; a whole shard is copied tile by tile
                stored = self._bytes(action.window)
                self.beside += stored if self.program.is_rolled else min(stored, TILE_BYTES)
            case Move():
                self.copies[action.name] = self.copies.get(action.name, 0) + self._bytes(action.source)
            case Forget() if action.buffer in self.resting:
                spec = self.program.buffers[action.buffer]
                plane = spec.nbytes // max(1, spec.box.shape[spec.axis])
                self._rest(action.buffer, max(0, self.resting[action.buffer] - len(action.cells) * plane))
            case _:
                pass

    def _blocks_copied(self, action: Compute) -> int:
        """Blocks of what a kernel that writes where it is told does not take as it lies: an input, and the result."""
        operator = action.operator
        if not isinstance(operator, Fused) or not (operator.in_blocks and operator.is_direct and action.writes[0].box):
            return 0
        out = self._bytes(action.writes[0])
        share = min(1.0, max(BLOCK, out // action.writes[0].box.shape[2]) / out)
        inputs = [self._bytes(w) for w in action.reads if w is not None and not self._lies_dense(w)]
        return math.ceil(share * (max(inputs, default=0) + (0 if self._lies_dense(action.writes[0]) else out)))

    def _lies_dense(self, window: Window) -> bool:
        """Whether cells lie side by side in their buffer, in storage order."""
        spec = self.program.buffers.get(window.buffer)
        if spec is None or window.fills:
            return True
        outer, extents = 1, window.box.shape
        for axis in storage_order(self.program.storage, len(extents)):
            if extents[axis] != spec.box.shape[axis] and outer > 1:
                return False
            outer *= extents[axis]
        return True

    def _messages(self, exchange: Exchange) -> int:
        """Bytes of what is sent and received; the targets are brought into being."""
        for one in exchange.each:
            if one.target not in self.alive:
                self._fill(one, Window(one.target, self.program.buffers[one.target].box, ()))
        return sum(self._bytes(w) for one in exchange.each for m in (*one.sends, *one.receives) for w in m.windows)

    def release(self, name: str) -> None:
        """A buffer that nobody reads any more."""
        self.region.leave(self.program.rank, name)
        self.lives -= self.alive.pop(name, 0)
        self.rests -= self.resting.pop(name, 0)
        self.reached.pop(name, None)

    def _live(self, name: str, nbytes: int) -> None:
        self.lives += nbytes - self.alive.get(name, 0)
        self.alive[name] = nbytes

    def _rest(self, name: str, nbytes: int) -> None:
        self.rests += nbytes - self.resting.get(name, 0)
        self.resting[name] = nbytes

    def _fill(self, action: Action, window: Window) -> None:
        spec, name = self.program.buffers[window.buffer], window.buffer
        if spec.place == "file" or name in self.files:
            self.filed[name] = spec.nbytes
        elif spec.place == "resting":  # pages are there from the first write
            grows = spec.gives_back(self.program.storage)
            there = self.resting.get(name, 0) + self._pages(spec, window) if grows else spec.nbytes
            self._rest(name, min(spec.nbytes, there))
        elif window.fills:
            nbytes = 0 if isinstance(action, Compute) and action.operator.is_view else self._bytes(window)
            self._live(name, nbytes)
            is_given = not isinstance(action, Compute) or (action.operator.writes_into and window is action.writes[0])
            self.region.take(self.program.rank, name, nbytes if is_given else 0)
        elif name not in self.alive:
            self._live(name, spec.nbytes)
            self.region.take(self.program.rank, name, spec.nbytes)
        if isinstance(action, Compute) and not window.fills:
            self._copy(action, window)

    def _pages(self, spec: BufferSpec, window: Window) -> int:
        """Bytes of a resting buffer that a window is the first to write; work in place finds its pages there."""
        if not window.slices:  # all of it
            return spec.nbytes
        along, across = window.slices[spec.axis], (*window.slices[: spec.axis], *window.slices[spec.axis + 1 :])
        places = tuple((s.start, s.stop) for slices in across for s in slices)
        reached = self.reached.setdefault(spec.name, {})
        before, stop = reached.get(places, 0), max(s.stop for s in along)
        reached[places] = max(before, stop)
        cells = sum(s.stop - s.start for s in along)
        return math.ceil(self._bytes(window) * min(cells, max(0, stop - before)) / max(1, cells))

    def _copy(self, action: Compute, window: Window) -> None:
        """A result that is computed beside its place and copied there."""
        if isinstance(action.operator, Fused) and action.operator.is_beside:
            self.beside += self._bytes(window)
        if action.operator.writes_into and window is action.writes[0] and window.is_dense:
            return
        self.copies[action.name] = self.copies.get(action.name, 0) + self._bytes(window)
        self.beside += 0 if action.operator.is_view else self._bytes(window)

    def _bytes(self, window: Window) -> int:
        spec = self.program.buffers.get(window.buffer)
        itemsize = self.program.weights[window.buffer].dtype.itemsize if spec is None else spec.dtype.itemsize
        return math.ceil(window.box.size * itemsize)
