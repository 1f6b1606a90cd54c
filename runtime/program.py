"""One rank's part of a plan: steps over buffers, every cell named in advance.

    plan (an ONNX graph, all ranks)  --localise(rank)-->  program

A step is a node and the interval of its output that is computed; whole-shard execution has one step per
node.  Windows are slices of buffers; buffers are released after the last step that reads them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import onnx_ir as ir

from partitioner import dialect
from partitioner.garbage import kept_for_later
from partitioner.geometry import Box, Interval, local_slices
from partitioner.lifetime import Lifetimes, find_lifetimes
from partitioner.mesh import Mesh
from partitioner.ops.base import Operator
from partitioner.ops.fused import Fused

Slices = tuple[tuple[slice, ...], ...]
"""Per axis the slices of a buffer, in order; several where the wanted cells do not lie side by side."""


Place = Literal["memory", "resting", "file"]
"""Where a buffer lies: in memory; there, but given back in parts; in a file that is mapped."""


MAPPED_FROM = 1 << 20
"""Bytes from which a resting buffer is a mapping of its own, whose pages can be given back one by one."""

PAGE = 1 << 12
"""Bytes of a page, of which a run of cells may share one with the next at either end."""


def storage_order(storage: str, rank: int) -> tuple[int, ...]:
    """Axes from outermost to innermost; `channels_last` concerns images and volumes with a channel."""
    if storage == "channels_last" and rank in (4, 5):
        return (0, *range(2, rank), 1)
    return tuple(range(rank))


@dataclass(frozen=True)
class Window:
    """The cells `box` of a value, and where they lie in the buffer that holds it.

    Args:
        fills: whether they are all that the buffer has room for, so that a kernel's result can be the buffer.
    """

    buffer: str
    box: Box
    slices: Slices
    fills: bool = False

    @cached_property
    def is_dense(self) -> bool:
        """Whether every axis is one slice, so that the window is a view."""
        return set(map(len, self.slices)) <= {1}

    @cached_property
    def place(self) -> tuple[int, ...]:
        """The first and last cells of a dense window in its buffer."""
        return tuple([end for (only,) in self.slices for end in (only.start, only.stop)])


@dataclass(frozen=True)
class BufferSpec:
    """Memory to allocate: the cells it has room for.

    Args:
        place: `resting` for what is written and read in parts, from its front to its end.
        axis: along which it is written then.
    """

    name: str
    box: Box
    dtype: ir.DataType
    place: Place = "memory"
    axis: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all its cells."""
        return math.ceil(self.box.size * self.dtype.itemsize)

    def runs(self, order: Sequence[int]) -> tuple[int, int]:
        """Bytes that lie side by side for a cell along its axis, and how many runs of all its cells there are.

        Args:
            order: axes from outermost to innermost.
        """
        shape, place = self.box.shape, order.index(self.axis)
        plane = math.prod(shape[a] for a in order[place + 1 :]) * self.dtype.itemsize
        return int(plane), math.prod(shape[a] for a in order[:place])

    def gives_back(self, storage: str) -> bool:
        """Whether a resting buffer's pages come and go with its cells, but for few at the ends of runs."""
        plane, blocks = self.runs(storage_order(storage, len(self.box.shape)))
        return plane > 0 and self.nbytes >= max(MAPPED_FROM, 64 * PAGE * blocks)


@dataclass(frozen=True)
class Load:
    """Read this rank's part of an input of the model into its buffer."""

    name: str
    window: Window


@dataclass(frozen=True)
class Store:
    """Hand this rank's part of an output of the model out; `writes` tells whether this rank is its writer."""

    name: str
    window: Window
    writes: bool


@dataclass(frozen=True)
class Compute:
    """Run an operator's kernel on windows; None for inputs that are not given."""

    name: str
    operator: Operator
    reads: tuple[Window | None, ...]
    writes: tuple[Window, ...]

    @cached_property
    def boxes(self) -> tuple[Box | None, ...]:
        """The cells of the inputs."""
        return tuple([None if w is None else w.box for w in self.reads])

    @cached_property
    def outs(self) -> tuple[Box, ...]:
        """The cells to compute."""
        return tuple([w.box for w in self.writes])

    @cached_property
    def is_empty(self) -> bool:
        """Whether no cell is to be computed."""
        return not any(self.outs)

    @cached_property
    def is_direct(self) -> bool:
        """Whether the kernel can write its first result to its place."""
        return self.operator.writes_into and self.writes[0].is_dense


@dataclass(frozen=True)
class Message:
    """What goes to or comes from one peer in one step."""

    peer: int
    windows: tuple[Window, ...]


@dataclass(frozen=True)
class Exchange:
    """Bring a value to another layout; `keep` pairs what is copied locally (none in a shared buffer).

    Args:
        joined: exchanges of other values, which travel in the messages of this one; they have no step of their own.
    """

    name: str
    source: Window
    target: str
    keep: tuple[Window, Window] | None
    sends: tuple[Message, ...]
    receives: tuple[Message, ...]
    joined: tuple[Exchange, ...] = ()

    @property
    def each(self) -> tuple[Exchange, ...]:
        """This one and those that travel with it."""
        return (self, *self.joined)


@dataclass(frozen=True)
class Post:
    """Begin an exchange: what is kept is copied, messages are on their way."""

    exchange: Exchange

    @property
    def name(self) -> str:
        """That of the exchange."""
        return self.exchange.name


@dataclass(frozen=True)
class Finish:
    """Wait until what was posted has arrived."""

    exchange: Exchange

    @property
    def name(self) -> str:
        """That of the exchange."""
        return self.exchange.name


@dataclass(frozen=True)
class AllReduce:
    """Merge partial results over groups of ranks, one mesh axis after the other, in rank order."""

    name: str
    kind: str
    sources: tuple[Window, ...]
    targets: tuple[Window, ...]
    groups: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Merge:
    """Add a partial result of some cells to that of the cells before; the first one is taken as it is."""

    name: str
    kind: str
    sources: tuple[Window, ...]
    targets: tuple[Window, ...]


@dataclass(frozen=True)
class Move:
    """Copy cells that are still needed to the front of their buffer."""

    name: str
    source: Window
    target: Window

    @cached_property
    def overlaps(self) -> bool:
        """Whether cells are written that are still to be read."""
        return any(a[0].start < b[0].stop and b[0].start < a[0].stop and a != b
                   for a, b in zip(self.source.slices, self.target.slices, strict=True))


@dataclass(frozen=True)
class Forget:
    """Give back the memory of some cells of a resting buffer; those before them are gone already."""

    name: str
    buffer: str
    cells: Interval


def nothing(name: str) -> Compute:
    """The action of a step that does nothing."""
    return Compute(name, Fused((), ()), (), ())


Action = Load | Store | Compute | Exchange | Post | Finish | AllReduce | Merge | Move | Forget


def windows_read(action: Action) -> tuple[Window, ...]:
    """The windows whose cells an action takes."""
    match action:
        case Store():
            return (action.window,)
        case Compute():
            return tuple(w for w in action.reads if w is not None)
        case Exchange():
            return tuple(one.source for one in action.each)
        case Move():
            return (action.source,)
        case Post():
            return (action.exchange.source,)
        case AllReduce():
            return action.sources
        case Merge():
            return (*action.sources, *action.targets)
        case Load() | Forget() | Finish():
            return ()


def windows_written(action: Action) -> tuple[Window, ...]:
    """The windows that an action fills; of an exchange what arrives in its target."""
    match action:
        case Load():
            return (action.window,)
        case Compute():
            return action.writes
        case Exchange():
            return tuple(window for one in action.each for window in (*_kept(one), *_received(one)))
        case Post():
            return _kept(action.exchange)
        case Finish():
            return _received(action.exchange)
        case AllReduce() | Merge():
            return action.targets
        case Move():
            return (action.target,)
        case Store() | Forget():
            return ()


def _kept(exchange: Exchange) -> tuple[Window, ...]:
    return () if exchange.keep is None else (exchange.keep[1],)


def _received(exchange: Exchange) -> tuple[Window, ...]:
    return tuple(w for message in exchange.receives for w in message.windows)


def buffers_written(action: Action) -> tuple[str, ...]:
    """The buffers that an action fills, or brings into being."""
    match action:
        case Exchange():
            return tuple(one.target for one in action.each)
        case Post() | Finish():
            return (action.exchange.target,)
        case _:
            return tuple(w.buffer for w in windows_written(action))


@dataclass(frozen=True)
class Step:
    """An action, the buffers that it brings into being, and those that nobody reads after it."""

    action: Action
    allocates: tuple[str, ...]
    releases: tuple[str, ...]


@dataclass(frozen=True)
class Program:
    """Everything one rank does; all ranks have the same steps in the same order.

    Args:
        is_strip: whether one process takes all ranks, one after the other wherever they do not meet.
        is_rolled: whether it goes slab by slab.
    """

    rank: int
    mesh: Mesh
    storage: str
    buffers: dict[str, BufferSpec]
    weights: dict[str, ir.TensorProtocol]
    steps: tuple[Step, ...]
    is_strip: bool = False
    is_rolled: bool = False


def in_turns(programs: Sequence[Program]) -> list[tuple[int, tuple[int, ...]]]:
    """The steps of all ranks of a process in order, each with the places of the ranks that run it then.

    Side by side, step after step; strips one after the other, from one exchange to the next.
    """
    everyone = tuple(range(len(programs)))
    first = programs[0]
    if not first.is_strip:
        return [(step, everyone) for step in range(len(first.steps))]
    found: list[tuple[int, tuple[int, ...]]] = []
    for meets, group in itertools.groupby(range(len(first.steps)), lambda i: _meets(first.steps[i].action)):
        steps = list(group)
        found += [(i, everyone) for i in steps] if meets else [(i, (place,)) for place in everyone for i in steps]
    return found


def _meets(action: Action) -> bool:
    return isinstance(action, Exchange | Post | Finish | AllReduce)


@kept_for_later()
def localise(model: ir.Model, rank: int, lifetimes: Lifetimes | None = None, storage: str | None = None,
             streamed: frozenset[str] = frozenset(), overlaps: bool = True) -> Program:
    """The program of one rank of a plan; the cost grows with the graph, not with the mesh.

    Args:
        lifetimes: found once for all ranks of a process.
        storage: axis order of activations; the plan's own when not given.
        streamed: inputs that can only be read at once, from their file's start to its end.
        overlaps: compute interiors while messages travel, where the plan says so; training takes whole steps.
    """
    from runtime.fuse import fuse
    from runtime.localiser import Localiser
    from runtime.rolled import RolledLocaliser

    lifetimes = lifetimes or find_lifetimes(model)
    if dialect.get_schedule(model) is None:
        program = Localiser(model, rank, lifetimes, overlaps).program()
    else:
        program = RolledLocaliser(model, rank, lifetimes, streamed).program()
    program = program if storage is None else replace(program, storage=storage)
    return fuse(program) if overlaps else program


def place(buffer: str, held: Box, wanted: Box, joined: bool = True) -> Window:
    """Where wanted cells lie in a buffer that holds others too."""
    slices = tuple(local_slices(h, w, joined) or (slice(0, 0),) for h, w in zip(held.axes, wanted.axes, strict=True))
    return Window(buffer, wanted, slices, held.shape == wanted.shape)

