"""A schedule that keeps to a memory budget: which axis to go along, how thick slabs are, what rests in files.

The candidates are laid out once per axis; per thickness their programs are followed step by step, so that what is
compared are the buffers that will be there.  Of those that fit, the one with the least work beside the arithmetic is
taken: slabs add steps and copies, files add traffic, strips across the slabs compute cells near their cuts twice.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import onnx_ir as ir
import torch

from partitioner import dialect
from partitioner.axes import named_axes
from partitioner.compiler import DepthFirst
from partitioner.cost import PlanCost, cells, operations_done_twice
from partitioner.errors import PartitionError
from partitioner.exchange import IntArray
from partitioner.lifetime import find_lifetimes
from partitioner.rolling import rolled_axis
from partitioner.strips import CutPoints, Prices
from runtime.forecast import Memory, forecast
from runtime.monitor import anonymous_memory
from runtime.program import Program, localise

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
          "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}

RESERVE = 24 * 2**20
"""Bytes that libraries take while they work: packed weights, the allocator's own."""

PER_THREAD = 4 * 2**20
"""Bytes of each thread's scratch memory."""

_STEP_SECONDS = 60e-6
_COPY_BYTES = 5e9
_FILE_BYTES = 5e8
_OPERATION_SECONDS = 1e-11

MOST_STRIPS = 64
"""Strips into which a shard is cut at most."""

THINNEST_STRIP = 8
"""Cells of a strip, at least."""


def parse_bytes(given: str | int, what: str = "memory") -> int:
    """A number of bytes from `2GiB`, `500 MB` or a whole number.

    Raises:
        PartitionError: for anything else, and for nothing at all.
    """
    if isinstance(given, bool) or not isinstance(given, str | int):  # pyright: ignore
        raise PartitionError(f"{what}={given!r} is no amount of memory; write 2GiB, 500MB or a number of bytes")
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(given).lower())
    if match is None or match[2] not in _UNITS:
        raise PartitionError(f"{what} '{given}' is no amount of memory; write 2GiB, 500MB or a number of bytes")
    found = int(float(match[1]) * _UNITS[match[2]])
    if found < 1:
        raise PartitionError(f"{what} '{given}' leaves nothing to work with; give a positive amount, as 2GiB")
    return found


def held_now() -> int:
    """Bytes that this process holds, and that its libraries will take beside."""
    return anonymous_memory() + RESERVE + PER_THREAD * torch.get_num_threads()


@dataclass(frozen=True)
class Budget:
    """What one process may hold.

    Args:
        total: bytes of anonymous memory, the program and its libraries included.
        resting: bytes of that which tensors may take that rest from chain to chain; others rest in mapped files.
        arrays: whether inputs and outputs are arrays in the process too, not files.
        together: whether the process holds all ranks of the mesh, not one.
        held: what the process and its libraries hold; as it is now when not given.
    """

    total: int
    resting: int | None = None
    arrays: bool = True
    together: bool = True
    held: int | None = None

    @classmethod
    def of(cls, memory: str | int | None, host_memory: str | int | None, arrays: bool = True,
           together: bool = True, held: int | None = None) -> Self:
        """The budget that a user gives.

        Raises:
            PartitionError: for no amount of memory, or a part of none.
        """
        if memory is None:
            raise PartitionError("host_memory is a part of memory; give memory too, as memory='4GiB'")
        resting = None if host_memory is None else parse_bytes(host_memory, "host_memory")
        return cls(parse_bytes(memory), resting, arrays, together, held)

    def shards(self, model: ir.Model) -> int:
        """Ranks that are in the process at once."""
        schedule = dialect.get_schedule(model)
        in_turns = schedule is not None and bool(schedule.strips)
        return dialect.get_mesh(model).size if self.together and not in_turns else 1

    def taken(self, model: ir.Model) -> int:
        """Bytes that are there beside activations and weights: the process as it is, arrays, libraries."""
        values = (*model.graph.inputs, *model.graph.outputs) if self.arrays else ()
        arrays = sum(float(np.prod(dialect.shape_of(v))) * v.dtype.itemsize for v in values if v.dtype is not None)
        return (held_now() if self.held is None else self.held) + int(arrays)


@dataclass(frozen=True)
class Candidate:
    """A plan with one schedule, and what it will take.

    Args:
        steps: of all ranks of the process.
        twice: operations that several strips do.
        needed: bytes that the process will hold.
        is_exact: whether all strips were followed, not one for all: then a process needs no less, perhaps more.
    """

    model: ir.Model
    schedule: dialect.Schedule | None
    files: tuple[str, ...]
    memory: Memory
    steps: int
    twice: float
    needed: int
    is_exact: bool = True

    @property
    def seconds(self) -> float:
        """Estimated time beside the arithmetic that all candidates share."""
        copied = sum(copy.nbytes for copy in self.memory.copies)
        return (self.steps * _STEP_SECONDS + copied / _COPY_BYTES + 2 * self.memory.filed / _FILE_BYTES
                + self.twice * _OPERATION_SECONDS)


LayOut = Callable[[DepthFirst | None], ir.Model]
"""Compiles the plan: in whole-shard steps, or depth first."""


def fit(lay_out: LayOut, axes: Sequence[str], budget: Budget) -> ir.Model:
    """The plan that keeps to a budget with the least work.

    Slabs along one axis are tried first; where they do not suffice, and one process holds all, strips across them.

    Args:
        axes: those that no rank of the mesh splits.

    Raises:
        PartitionError: when none keeps to it, with the smallest budget that one does.
    """
    whole = lay_out(None)
    room = _Room(budget, budget.taken(whole), budget.shards(whole))
    smallest: Candidate | None = None
    for group in _groups(lay_out, axes, room, whole):
        fitting: list[Candidate] = []
        for candidate in group:
            if smallest is None or candidate.needed < smallest.needed:
                smallest = candidate
            if candidate.is_exact and room.fits(candidate.memory):
                fitting.append(candidate)
        if fitting:
            best = min(fitting, key=lambda c: c.seconds)
            _mark(best.model, best.schedule, best.files)
            return best.model
    assert smallest is not None
    if not smallest.is_exact:
        _mark(smallest.model, smallest.schedule, ())
        smallest = room.candidate(smallest.model, smallest.schedule, _programs(smallest.model), smallest.files)
    activations = smallest.memory.peak * budget.shards(smallest.model)
    needed = smallest.needed + max(0, budget.taken(smallest.model) - room.taken)  # the search itself leaves something
    raise PartitionError(
        f"memory {_text(budget.total)}: this model at these extents needs at least {_text(needed)} "
        f"({_text(needed - activations)} of it for the process, "
        f"{'arrays, ' if budget.arrays else ''}libraries and weights); give that much"
        + (", or split it over more ranks" if budget.shards(smallest.model) == 1
           else ", or a process per rank (backend gloo)"))


def _groups(lay_out: LayOut, axes: Sequence[str], room: _Room, whole: ir.Model) -> Iterator[Iterable[Candidate]]:
    """Candidates in groups: one is chosen of the first group in which any fits.

    Args:
        whole: the plan in whole-shard steps.
    """
    at_once = room.candidate(whole, None, [localise(whole, _largest_rank(whole))])
    along = (_candidates(lay_out(DepthFirst(axis)), axis, room) for axis in axes)
    yield itertools.chain([at_once], next(along, ()))
    yield from along  # slabs along later axes are not dense in storage
    if not room.budget.together or dialect.get_mesh(whole).size > 1:
        return
    least = math.inf
    for strips in _strips(whole, axes):
        found = _strip_candidates(lay_out, axes[0], strips, room)
        yield found
        smallest = min((candidate.needed for candidate in found), default=math.inf)
        if smallest > 0.97 * least:
            return
        least = smallest


def _strips(model: ir.Model, axes: Sequence[str]) -> Iterator[tuple[tuple[str, int], ...]]:
    """Twice as many strips each time, by cutting the longest of their axes once more; batches first."""
    extents = {name: max((dialect.shape_of(v)[places[name]] for v in model.graph.inputs
                          if name in (places := named_axes(model)[str(v.name)])), default=1) for name in axes[1:]}
    counts = dict.fromkeys(extents, 1)
    while math.prod(counts.values()) < MOST_STRIPS:
        def width(name: str) -> float:
            alone = name == "batch" and extents[name] > counts[name]
            return math.inf if alone else extents[name] / counts[name]

        name = max(counts, key=width, default=None)
        if name is None or extents[name] / counts[name] < (2 if name == "batch" else 2 * THINNEST_STRIP):
            return
        counts[name] = min(2 * counts[name], extents[name])
        yield tuple((name, count) for name, count in counts.items() if count > 1)


def _strip_candidates(lay_out: LayOut, axis: str, strips: tuple[tuple[str, int], ...],
                      room: _Room) -> list[Candidate]:
    """Strips that meet seldom, often, or where the estimated time is least; as thick slabs as fit."""
    met = lay_out(DepthFirst(axis, strips, frozenset()))
    points = CutPoints(met, [name for name, _ in strips])
    found: list[Candidate] = []
    seen: set[frozenset[str]] = set()
    for byte in (0.0, 2 / _FILE_BYTES, 1.0):
        names = points.choose(Prices(_OPERATION_SECONDS, byte))
        if names in seen:
            continue
        seen.add(names)
        model = lay_out(DepthFirst(axis, strips, names))
        found += _candidates(model, axis, room, operations_done_twice(model))
        if not any(c.is_exact for c in found):  # the more seldom strips meet, the more each of them holds
            break
    return found


def _text(count: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= size:
            return f"{-(-count * 100 // size) / 100:.2f} {unit}"
    return f"{count:.0f} bytes"


@dataclass(frozen=True)
class _Room:
    """What a budget leaves for a plan: what is taken already, and how many ranks share the rest."""

    budget: Budget
    taken: int
    shards: int

    def needed(self, memory: Memory) -> int:
        """What the process will hold."""
        return memory.peak * self.shards + memory.weights + self.taken

    def crowded(self, memory: Memory) -> bool:
        """Whether more rests in memory than may."""
        return self.budget.resting is not None and memory.resting * self.shards > self.budget.resting

    def fits(self, memory: Memory) -> bool:
        """Whether the budget is kept."""
        return self.needed(memory) <= self.budget.total and not self.crowded(memory)

    def candidate(self, model: ir.Model, schedule: dialect.Schedule | None, programs: Sequence[Program],
                  files: tuple[str, ...] = (), twice: float = 0) -> Candidate:
        """A plan with what it will take."""
        memory = forecast(programs, frozenset(files))
        steps = sum(len(program.steps) for program in programs)
        return Candidate(model, schedule, files, memory, steps, twice, self.needed(memory))


def _candidates(model: ir.Model, axis: str, room: _Room, twice: float = 0) -> Iterator[Candidate]:
    """Thick slabs first, down to where thinner ones need no less or only add steps."""
    given = dialect.get_schedule(model)
    assert given is not None
    longest = max((dialect.shape_of(v)[a] for v in model.graph.inputs
                   if (a := rolled_axis(v, axis)) is not None), default=1)
    thickness = 1 << max(0, (longest // 4).bit_length() - 1)
    least = math.inf
    while thickness and longest > 1 and given.thickness:
        schedule = replace(given, thickness=(thickness,) * len(given.thickness))
        dialect.set_schedule(model, schedule)
        one = localise(model, _largest_rank(model))
        frugal = room.candidate(model, schedule, [one], _resting(one), twice)
        fits = room.fits(frugal.memory)
        if not given.strips:
            found = room.candidate(model, schedule, [one], (), twice)
            yield found if room.fits(found.memory) else _with_files(found, [one], room) if fits else frugal
            if room.fits(found.memory):
                return
        elif fits:
            programs = _programs(model)
            found = _with_files(room.candidate(model, schedule, programs, (), twice), programs, room)
            yield found
            if not found.files and room.fits(found.memory):
                return
        else:
            yield replace(frugal, is_exact=False)
        if frugal.needed > 0.99 * least:
            return
        least, thickness = frugal.needed, thickness // 2


def _programs(model: ir.Model) -> list[Program]:
    """Those of all strips, or of the rank with the most cells."""
    schedule = dialect.get_schedule(model)
    if schedule is None or not schedule.strips:
        return [localise(model, _largest_rank(model))]
    lifetimes = find_lifetimes(model)
    return [localise(model, rank, lifetimes) for rank in dialect.get_mesh(model)]


def _resting(program: Program) -> tuple[str, ...]:
    return tuple(name for name, spec in program.buffers.items() if spec.place == "resting")


def _with_files(found: Candidate, programs: Sequence[Program], room: _Room) -> Candidate:
    """The same slabs with as few resting tensors in files as the budget asks for, or as can be."""
    while not room.fits(found.memory):
        over = [n for n in (found.memory.crowd if room.crowded(found.memory) else found.memory.rests)
                if n not in found.files]
        if not over:
            break
        found = room.candidate(found.model, found.schedule, programs, (*found.files, over[0]), found.twice)
    return found


def _mark(model: ir.Model, schedule: dialect.Schedule | None, files: Sequence[str]) -> None:
    if schedule is not None:
        dialect.set_schedule(model, schedule)
    chosen = set(files)
    for value in (*model.graph.inputs, *(v for n in model.graph for v in n.outputs)):
        dialect.set_filed(value, value.name in chosen)


def _largest_rank(model: ir.Model) -> int:
    """The rank with the largest part of the inputs."""
    mesh = dialect.get_mesh(model)
    total = sum((cells(dialect.get_layout(v), mesh) for v in model.graph.inputs), start=np.zeros(mesh.shape))
    return int(np.argmax(total))


def with_slab_peaks(model: ir.Model, cost: PlanCost) -> PlanCost:
    """The cost of a plan with what it holds when it is executed slab by slab, if it is."""
    if dialect.get_schedule(model) is None:
        return cost
    each, together = slab_peaks(model)
    return replace(cost, slab_peak=each, slab_peak_together=together)


def slab_peaks(model: ir.Model) -> tuple[IntArray, int]:
    """Peak activation memory of a plan that is executed depth-first: of every rank, and of all in one process.

    Of very many ranks the largest one's stands for all.
    """
    mesh, schedule = dialect.get_mesh(model), dialect.get_schedule(model)
    if schedule is not None and schedule.strips:
        programs = _programs(model)
        each = [forecast([program]).peak for program in programs]
        return np.array(each, np.int64).reshape(mesh.shape), forecast(programs).peak
    if mesh.size > _FOLLOWED:
        found = np.full(mesh.shape, forecast([localise(model, _largest_rank(model))]).peak, np.int64)
    else:
        found = np.array([forecast([localise(model, rank)]).peak for rank in mesh], np.int64).reshape(mesh.shape)
    return found, int(found.sum())


_FOLLOWED = 16
"""Ranks whose programs are followed one by one."""
