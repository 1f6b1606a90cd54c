"""The search for a schedule: which axis to go along, how thick slabs are, what rests in files, where strips are cut.

The candidates are laid out once per axis; per thickness their programs are followed step by step, so that what is
compared are the buffers that will be there.  Of those that fit, the one with the least forecast time is taken: slabs
add steps and copies, files add traffic, strips across the slabs compute cells near their cuts twice.
"""

from __future__ import annotations

import gc
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import onnx_ir as ir
import psutil

from partitioner import dialect
from partitioner.axes import named_axes
from partitioner.budget import STRIPS_RESERVE, Budget, Searched, largest_rank, memory_text, programs_of
from partitioner.compiler import DepthFirst
from partitioner.cost import plan_cost
from partitioner.errors import BudgetError
from partitioner.profile import Profile
from partitioner.rolling import rolled_axis
from partitioner.strips import CutPoints, Prices
from partitioner.timing import PlanTime, plan_time
from runtime.forecast import Memory, forecast
from runtime.program import Program, localise

MOST_STRIPS = 64
"""Strips into which a shard is cut at most."""

THINNEST_STRIP = 8
"""Cells of a strip, at least."""

THINNEST_SLAB = 4
"""Cells of a slab, at least, where memory asks for no thinner ones: kernels of few cells reach less than forecast."""

HINDERS = 0.2
"""Of the time in which files are written, what kernels lose that run meanwhile: they share cores and pages."""

_MIB = 2**20

AS_FAST = 1.05
"""Of schedules that take at most so many times the least time, and no more than all at once, the one that holds least
is taken."""


@dataclass(frozen=True)
class Candidate:
    """A plan with one schedule, and what it will take.

    Args:
        order: how it was laid out; None for whole-shard steps.
        needed: bytes that the process will hold; of one that was chosen, with what the search left.
        is_exact: whether all strips were followed, not one for all: then a process needs no less, perhaps more.
    """

    model: ir.Model
    order: DepthFirst | None
    schedule: dialect.Schedule | None
    files: tuple[str, ...]
    memory: Memory
    needed: int
    is_exact: bool = True


LayOut = Callable[[DepthFirst | None], ir.Model]
"""Compiles the plan: in whole-shard steps, or depth first."""


def fit(lay_out: LayOut, axes: Sequence[str], budget: Budget, thinnest: int = 1) -> Candidate:
    """The fastest plan that keeps to a budget.

    Slabs along one axis are tried first; where they do not suffice, and one process holds all, strips across them.

    Args:
        axes: those that no rank of the mesh splits.
        thinnest: cells of a slab, at least.

    Raises:
        BudgetError: when none keeps to it, with the smallest budget that one does.
    """
    whole = lay_out(None)
    room = _Room(budget, budget.taken(whole), budget.shards(whole))
    smallest: Candidate | None = None
    for group in _groups(lay_out, axes, room, whole, thinnest):
        for candidate in group:
            if smallest is None or room.needed(candidate) < room.needed(smallest):
                smallest = candidate
        gc.collect()  # the plans that were laid out point back and forth
        fitting = [(seconds, found) for seconds, found in room.fitting if room.fits(found)]
        if fitting:
            _, best = min(fitting, key=lambda each: each[0])
            return replace(_chosen(best), needed=room.needed(best))
    assert smallest is not None
    if not smallest.is_exact:
        _mark(smallest.model, smallest.schedule, ())
        smallest = room.candidate(smallest.model, smallest.order, programs_of(smallest.model), smallest.files)
    activations, needed = smallest.memory.peak * budget.shards(smallest.model), room.needed(smallest)
    raise BudgetError(
        f"memory {memory_text(budget.total)}: this model at these extents needs at least {memory_text(needed)} "
        f"({memory_text(needed - activations)} of it for the process, "
        f"{'arrays, ' if budget.arrays else ''}libraries and weights); give that much"
        + (", or split it over more ranks" if budget.shards(smallest.model) == 1
           else ", or a process per rank (backend gloo)"), needed)


def fastest(lay_out: LayOut, whole: ir.Model, axes: Sequence[str], budget: Budget) -> Candidate:
    """The plan with the best schedule when memory is not limited: the one that holds least of those that are as fast.

    Args:
        whole: the plan in whole-shard steps.
        axes: those that no rank of the mesh splits; slabs go along the first, along which they lie dense in storage.
        budget: as of a process without a limit.
    """
    room = _Room(budget, budget.taken(whole), budget.shards(whole))
    at_once = room.candidate(whole, None, [localise(whole, largest_rank(whole))])
    order = DepthFirst(axes[0])
    model = lay_out(order)
    slabs = [room.candidate(model, order, [localise(model, largest_rank(model))])
             for _ in _thinner(model, order.axis, THINNEST_SLAB)]
    timed = [(room.seconds(candidate), candidate) for candidate in (at_once, *slabs)]
    limit = min(AS_FAST * min(seconds for seconds, _ in timed), timed[0][0])
    return _chosen(min((c for seconds, c in timed if seconds <= limit), key=lambda c: c.needed))


def _chosen(candidate: Candidate) -> Candidate:
    _mark(candidate.model, candidate.schedule, candidate.files)
    return candidate


def _groups(lay_out: LayOut, axes: Sequence[str], room: _Room, whole: ir.Model,
            thinnest: int) -> Iterator[Iterable[Candidate]]:
    """Candidates in groups: one is chosen of the first group in which any fits.

    Args:
        whole: the plan in whole-shard steps.
    """
    at_once = room.offer(room.candidate(whole, None, [localise(whole, largest_rank(whole))]))
    along = (_candidates(lay_out(order), order, room, thinnest) for order in map(DepthFirst, axes))
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
    time, profile = room.time(met), room.profile
    operation = float(time.compute.sum()) / max(1.0, float(plan_cost(met).flops.sum()))
    for byte in (0.0, float(profile.for_threads().page_seconds(_MIB)) / _MIB, 1.0):
        names = points.choose(Prices(operation, byte))
        if names in seen:
            continue
        seen.add(names)
        order = DepthFirst(axis, strips, names)
        found += _candidates(lay_out(order), order, room)
        if not any(c.is_exact for c in found):  # the more seldom strips meet, the more each of them holds
            break
    return found


@dataclass
class _Room:
    """What a budget leaves for a plan: what is taken already, and how many ranks share the rest.

    Args:
        fitting: the plans found that keep the budget, with their forecast times.
    """

    budget: Budget
    taken: int
    shards: int
    fitting: list[tuple[float, Candidate]] = field(default_factory=list[tuple[float, Candidate]])

    def needed(self, candidate: Candidate, steps: int = 0) -> int:
        """What the process will hold, with what the search leaves, after programs of so many steps."""
        return candidate.needed + max(0, Searched.after(steps) - candidate.memory.programs * self.shards)

    def offer(self, candidate: Candidate) -> Candidate:
        """Take down a plan that can be executed, if it fits."""
        if self.fits(candidate):
            self.fitting.append((self.seconds(candidate), candidate))
            _mark(candidate.model, candidate.schedule, ())
        return candidate

    def may_search(self, steps: int) -> bool:
        """Whether a program of so many steps can be looked at without that the fastest plan found fits no more."""
        _, fastest = min(self.fitting, key=lambda each: each[0], default=(0.0, None))
        return fastest is None or self.fits(fastest, steps)

    def crowded(self, memory: Memory) -> bool:
        """Whether more rests in memory than may."""
        return self.budget.resting is not None and memory.resting * self.shards > self.budget.resting

    def fits(self, candidate: Candidate, steps: int = 0) -> bool:
        """Whether a plan keeps the budget, after programs of so many steps were looked at."""
        return self.needed(candidate, steps) <= self.budget.total and not self.crowded(candidate.memory)

    def candidate(self, model: ir.Model, order: DepthFirst | None, programs: Sequence[Program],
                  files: tuple[str, ...] = ()) -> Candidate:
        """A plan, with the schedule that it has now, and what it will take."""
        memory, schedule = forecast(programs, frozenset(files)), dialect.get_schedule(model)
        Searched.note(sum(len(program.steps) for program in programs))
        beside = self.taken + (STRIPS_RESERVE if schedule is not None and schedule.strips else 0)
        needed = (memory.peak + memory.programs) * self.shards + memory.weights + beside
        return Candidate(model, order, schedule, files, memory, needed)

    @cached_property
    def profile(self) -> Profile:
        """What the machine can do."""
        return self.budget.profile or Profile.find(None)

    def time(self, model: ir.Model) -> PlanTime:
        """The forecast time of a plan with its schedule."""
        return plan_time(model, plan_cost(model), self.profile, self.budget.transport)

    def seconds(self, candidate: Candidate) -> float:
        """Forecast time: files are written while others compute, and read from the system's copy while it keeps one."""
        filed, profile = candidate.memory.filed, self.profile
        moving = filed / profile.write + (filed / profile.read if filed > self.copied else 0.0)
        return max(self.time(_chosen(candidate).model).seconds + HINDERS * moving, moving)

    @cached_property
    def copied(self) -> int:
        """Bytes of files that the system keeps in memory, beside the budget; the same on all ranks of a host."""
        return (psutil.virtual_memory().total - self.budget.total) // 2


def _thinner(model: ir.Model, axis: str, least: int = 1) -> Iterator[dialect.Schedule]:
    """The schedule with ever thinner slabs, down to so many cells; each is set in the model."""
    given = dialect.get_schedule(model)
    assert given is not None
    longest = max((dialect.shape_of(v)[a] for v in model.graph.inputs
                   if (a := rolled_axis(v, axis)) is not None), default=1)
    thickness = 1 << max(0, (longest // 4).bit_length() - 1)
    while thickness >= least and longest > 1 and given.thickness:
        schedule = replace(given, thickness=(thickness,) * len(given.thickness))
        dialect.set_schedule(model, schedule)
        yield schedule
        thickness //= 2


def _candidates(model: ir.Model, order: DepthFirst, room: _Room, thinnest: int = 1) -> Iterator[Candidate]:
    """Thick slabs first, down to where thinner ones need no less or only add steps."""
    least, steps = math.inf, 0
    for schedule in _thinner(model, order.axis, thinnest):
        if not room.may_search(2 * steps):  # of half as thick slabs
            return
        one = localise(model, largest_rank(model))
        steps = len(one.steps) * (dialect.get_mesh(model).size if schedule.strips else 1)
        frugal = room.candidate(model, order, [one], _resting(one))
        fits = room.fits(frugal)
        if not schedule.strips:
            found = room.candidate(model, order, [one])
            yield room.offer(found if room.fits(found) else _with_files(found, [one], room) if fits else frugal)
            if room.fits(found):
                return
        elif fits and room.may_search(steps):
            programs = programs_of(model)
            found = room.offer(_with_files(room.candidate(model, order, programs), programs, room))
            yield found
            if not found.files and room.fits(found):
                return
        else:
            yield replace(frugal, is_exact=False)
        if frugal.needed > 0.99 * least:
            return
        least = frugal.needed


def _resting(program: Program) -> tuple[str, ...]:
    return tuple(name for name, spec in program.buffers.items() if spec.place == "resting")


def _with_files(found: Candidate, programs: Sequence[Program], room: _Room) -> Candidate:
    """The same slabs with as few resting tensors in files as the budget asks for, or as can be."""
    while not room.fits(found):
        over = [n for n in (found.memory.crowd if room.crowded(found.memory) else found.memory.rests)
                if n not in found.files]
        if not over:
            break
        found = room.candidate(found.model, found.order, programs, (*found.files, over[0]))
    return found


def _mark(model: ir.Model, schedule: dialect.Schedule | None, files: Sequence[str]) -> None:
    if schedule is not None:
        dialect.set_schedule(model, schedule)
    chosen = set(files)
    for value in (*model.graph.inputs, *(v for n in model.graph for v in n.outputs)):
        dialect.set_filed(value, value.name in chosen)


