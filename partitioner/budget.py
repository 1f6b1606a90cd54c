"""A memory budget: what a process may hold, what it holds already, and what a plan holds slab by slab."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import onnx_ir as ir
import torch

from partitioner import dialect
from partitioner.cost import PlanCost, cells
from partitioner.errors import PartitionError
from partitioner.exchange import IntArray
from partitioner.lifetime import find_lifetimes
from partitioner.profile import Profile
from partitioner.timing import LOCKSTEP
from runtime.forecast import forecast
from runtime.monitor import anonymous_memory
from runtime.program import Program, localise

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
          "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}

RESERVE = 9 * 2**20
"""Bytes that libraries take while they work, and what the allocator cannot hand on."""

STRIPS_RESERVE = 16 * 2**20
"""Bytes beside them where strips take turns: more gaps between small tensors, more plans that were looked at."""

SEARCHED = 7 << 9
"""Bytes of a step of a program that is looked at, which the interpreter keeps."""

PER_THREAD = 4 * 2**20
"""Bytes of each thread's scratch memory."""


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


class Searched:
    """What the interpreter keeps, for programs only, after the largest of those that this process has looked at.

    It is told apart from what the process holds otherwise: programs that are executed go there.
    """

    nbytes = 0

    @classmethod
    def after(cls, steps: int) -> int:
        """What it would be after programs of so many steps."""
        return max(cls.nbytes, SEARCHED * steps)

    @classmethod
    def note(cls, steps: int) -> None:
        """Programs of so many steps were looked at."""
        cls.nbytes = cls.after(steps)


def held_now() -> int:
    """Bytes that this process holds, but for what searches left, and that its libraries will take beside."""
    return max(0, anonymous_memory() - Searched.nbytes) + RESERVE + PER_THREAD * torch.get_num_threads()


@dataclass(frozen=True)
class Budget:
    """What one process may hold.

    Args:
        total: bytes of anonymous memory, the program and its libraries included.
        resting: bytes of that which tensors may take that rest from chain to chain; others rest in mapped files.
        arrays: whether inputs and outputs are arrays in the process too, not files.
        together: whether the process holds all ranks of the mesh, not one.
        held: what the process and its libraries hold; as it is now when not given.
        profile: what the machine can do, to tell which schedule is fastest; that of this machine when not given.
        transport: how messages travel between ranks.
    """

    total: int
    resting: int | None = None
    arrays: bool = True
    together: bool = True
    held: int | None = None
    profile: Profile | None = None
    transport: str = LOCKSTEP

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

    @classmethod
    def unlimited(cls, profile: Profile) -> Self:
        """Of a process that may hold anything."""
        return cls(1 << 62, profile=profile)

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


def largest_rank(model: ir.Model) -> int:
    """The rank with the largest part of the inputs."""
    mesh = dialect.get_mesh(model)
    total = sum((cells(dialect.get_layout(v), mesh) for v in model.graph.inputs), start=np.zeros(mesh.shape))
    return int(np.argmax(total))


def programs_of(model: ir.Model) -> list[Program]:
    """Those of all strips, or of the rank with the most cells."""
    schedule = dialect.get_schedule(model)
    if schedule is None or not schedule.strips:
        return [localise(model, largest_rank(model))]
    lifetimes = find_lifetimes(model)
    return [localise(model, rank, lifetimes) for rank in dialect.get_mesh(model)]


def memory_text(count: float) -> str:
    """Bytes as an amount that can be asked for: rounded up."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= size:
            return f"{-(-count * 100 // size) / 100:.2f} {unit}"
    return f"{count:.0f} bytes"


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
        programs = programs_of(model)
        each = [forecast([program]).peak for program in programs]
        return np.array(each, np.int64).reshape(mesh.shape), forecast(programs).peak
    if mesh.size > _FOLLOWED:
        found = np.full(mesh.shape, forecast([localise(model, largest_rank(model))]).peak, np.int64)
    else:
        found = np.array([forecast([localise(model, rank)]).peak for rank in mesh], np.int64).reshape(mesh.shape)
    return found, int(found.sum())


_FOLLOWED = 16
"""Ranks whose programs are followed one by one."""
