"""A schedule that keeps to a memory budget: which axis to go along, how thick slabs are, what rests in files.

The candidates are laid out once per axis; per thickness their programs are followed step by step, so that what is
compared are the buffers that will be there.  Of those that fit, the one with the least work beside the arithmetic is
taken: slabs add steps and copies, files add traffic; nothing is ever computed twice.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import onnx_ir as ir
import torch

from partitioner import dialect
from partitioner.cost import cells
from partitioner.errors import PartitionError
from partitioner.exchange import IntArray
from partitioner.rolling import order_stages, rolled_axis
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
        """Ranks in the process."""
        return dialect.get_mesh(model).size if self.together else 1

    def taken(self, model: ir.Model) -> int:
        """Bytes that are there beside activations and weights: the process as it is, arrays, libraries."""
        values = (*model.graph.inputs, *model.graph.outputs) if self.arrays else ()
        arrays = sum(float(np.prod(dialect.shape_of(v))) * v.dtype.itemsize for v in values if v.dtype is not None)
        return (held_now() if self.held is None else self.held) + int(arrays)


@dataclass(frozen=True)
class Candidate:
    """A plan with one schedule, and what it will take."""

    model: ir.Model
    schedule: dialect.Schedule | None
    files: tuple[str, ...]
    memory: Memory
    steps: int
    needed: int

    @property
    def seconds(self) -> float:
        """Estimated time beside the arithmetic, which all candidates share."""
        copied = sum(copy.nbytes for copy in self.memory.copies)
        return self.steps * _STEP_SECONDS + copied / _COPY_BYTES + 2 * self.memory.filed / _FILE_BYTES


def fit(lay_out: Callable[[str | None], ir.Model], axes: Sequence[str], budget: Budget) -> ir.Model:
    """The plan that keeps to a budget with the least work.

    Args:
        lay_out: compiles the plan, to be rolled along an axis or (None) in whole-shard steps.
        axes: those that no rank of the mesh splits.

    Raises:
        PartitionError: when none keeps to it, with the smallest budget that one does.
    """
    smallest: Candidate | None = None
    fitting: list[Candidate] = []
    for axis in (None, *axes):
        model = lay_out(axis)
        room = _Room(budget, budget.taken(model), budget.shards(model))
        for candidate in _candidates(model, axis, room):
            if smallest is None or candidate.needed < smallest.needed:
                smallest = candidate
            if room.fits(candidate.memory):
                fitting.append(candidate)
        if fitting:  # along a later axis slabs are not dense in storage
            break
    assert smallest is not None
    if not fitting:
        shards = budget.shards(smallest.model)
        raise PartitionError(
            f"memory {_text(budget.total)}: this model at these extents needs at least {_text(smallest.needed)} "
            f"({_text(smallest.needed - smallest.memory.peak * shards)} of it for the process, "
            f"{'arrays, ' if budget.arrays else ''}libraries and weights); give that much"
            + (", or split it over more ranks" if shards == 1 else ", or a process per rank (backend gloo)"))
    best = min(fitting, key=lambda c: c.seconds)
    _mark(best.model, best.schedule, best.files)
    return best.model


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


def _candidates(model: ir.Model, axis: str | None, room: _Room) -> Iterator[Candidate]:
    """Thick slabs first, down to where thinner ones need no less or only add steps."""
    rank = _largest_rank(model)
    if axis is None:
        yield _candidate(model, None, localise(model, rank), (), room)
        return
    chains = sum(stage.is_chain for stage in order_stages(list(model.graph), axis))
    longest = max((dialect.shape_of(v)[a] for v in model.graph.inputs
                   if (a := rolled_axis(v, axis)) is not None), default=1)
    thickness = 1 << max(0, (longest // 4).bit_length() - 1)
    least = math.inf
    while thickness and longest > 1 and chains:
        schedule = dialect.Schedule(axis, (thickness,) * chains)
        dialect.set_schedule(model, schedule)
        program = localise(model, rank)
        found = _candidate(model, schedule, program, (), room)
        frugal = _candidate(model, schedule, program, _resting(program), room)
        if room.fits(found.memory):
            yield found
            return
        yield _with_files(found, program, room) if room.fits(frugal.memory) else frugal
        if frugal.needed > 0.99 * least:
            return
        least, thickness = frugal.needed, thickness // 2


def _resting(program: Program) -> tuple[str, ...]:
    return tuple(name for name, spec in program.buffers.items() if spec.place == "resting")


def _with_files(found: Candidate, program: Program, room: _Room) -> Candidate:
    """The same slabs with as few resting tensors in files as the budget asks for."""
    while not room.fits(found.memory):
        over = found.memory.crowd if room.crowded(found.memory) else found.memory.rests
        found = _candidate(found.model, found.schedule, program, (*found.files, over[0]), room)
    return found


def _candidate(model: ir.Model, schedule: dialect.Schedule | None, program: Program, files: tuple[str, ...],
               room: _Room) -> Candidate:
    memory = forecast(program, frozenset(files))
    return Candidate(model, schedule, files, memory, len(program.steps), room.needed(memory))


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


def slab_peaks(model: ir.Model) -> IntArray:
    """Peak activation memory of every rank of a plan that is executed depth-first; of many ranks the largest's."""
    mesh = dialect.get_mesh(model)
    if mesh.size > _FOLLOWED:
        return np.full(mesh.shape, forecast(localise(model, _largest_rank(model))).peak, np.int64)
    return np.array([forecast(localise(model, rank)).peak for rank in mesh], np.int64).reshape(mesh.shape)


_FOLLOWED = 16
"""Ranks whose programs are followed one by one."""
