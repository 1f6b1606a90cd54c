"""Forecast for many devices: how far more of them help, what each holds and sends, and which volume still fits.

    strong scaling   one size on more devices:   speed-up = t(base) / t,  efficiency = speed-up * base / devices
    weak scaling     as many cells per device:   efficiency = t(base) / t

Every row is the planner's choice for its size and devices, with few meshes laid out.  The base is the row of the fewest
devices that fits.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from partitioner.errors import PartitionError
from partitioner.mesh import Mesh
from partitioner.planner.choice import Form, Goal, Way
from partitioner.planner.cuts import extents_of, strides_of
from partitioner.planner.estimate import Estimates
from partitioner.planner.explain import mesh_text
from partitioner.planner.meshes import meshes_of
from partitioner.planner.search import LayOut, Progress, Search, fixed_bytes

if TYPE_CHECKING:
    from rich.console import Group

Size = tuple[int, ...]
"""Extents along the spatial axes of the volume."""

LARGEST_EXTENT = 1 << 14
"""Up to this extent the largest cube is looked for."""

LAID_OUT = 2
"""Meshes that hold least by the estimate, of which plans are laid out to see whether a cube fits."""

GUESSES = 8
"""Steps of the search for a cube that go by how memory grows; later ones halve."""


@dataclass(frozen=True)
class Ground:
    """A model at some extents, as far as no mesh is needed.

    Args:
        seeds: laid out along every axis that a mesh can split, on one rank each.
        lay_out: lays it out in a form.
    """

    seeds: ir.Model
    lay_out: LayOut


GroundOf = Callable[[Size], Ground]
"""The model for a size; raises PartitionError where the network cannot take it."""

GoalOf = Callable[[int], Goal]
"""What is asked for on so many devices."""


@dataclass(frozen=True)
class Row:
    """The planner's choice for one size on up to so many devices.

    Args:
        mesh: of the plan; it may use fewer devices.
        seconds: forecast time of a run.
        speedup, efficiency: against the same size on the fewest devices that hold it.
        weak_efficiency: against the smallest size with as many cells per device, where the table has one.
        memory_bytes: activations, weights and the process, of the device that holds most.
        fits: whether that is within the memory given, in whole shards; None when none is.
        sent_bytes, messages: of the device that sends most.
        note: what is special about the plan.
    """

    devices: int
    size: Size
    mesh: str
    seconds: float
    memory_bytes: int
    fits: bool | None
    sent_bytes: int
    messages: int
    transport: str
    note: str = ""
    speedup: float = 1.0
    efficiency: float = 1.0
    weak_efficiency: float | None = None

    @property
    def cells(self) -> int:
        """Cells of the volume."""
        return math.prod(self.size)


@dataclass(frozen=True)
class Largest:
    """The largest cube that up to so many devices hold in whole-shard steps.

    Args:
        size: a multiple of the network's strides; None where not even the smallest fits.
        mesh: one on which it fits.
        memory_bytes: of the device that holds most.
        seconds: forecast time of a run on that mesh.
    """

    devices: int
    size: Size | None
    mesh: str = ""
    memory_bytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Scaling:
    """What `partition forecast` tells.

    Args:
        profile: name of the profile.
        measured: whether its figures are.
        memory: bytes of each device, if they are limited.
        rows: by size, then by devices.
        largest: by devices; none where the memory is not limited.
    """

    profile: str
    measured: bool
    memory: int | None
    rows: tuple[Row, ...]
    largest: tuple[Largest, ...] = ()

    def table(self) -> Group:
        """Rows and largest cubes, to be printed by rich."""
        from partitioner.planner.scaling_files import render

        return render(self)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data for programs."""
        from partitioner.planner.scaling_files import to_dict

        return to_dict(self)

    def save(self, path: str | Path) -> None:
        """Write it as .csv (rows), .json (all) or .png (curves, by matplotlib).

        Raises:
            PartitionError: for another ending, without matplotlib, or when the path cannot be written.
        """
        from partitioner.planner.scaling_files import save

        save(self, Path(path))


@dataclass
class Scaler:
    """Forecasts for several sizes and numbers of devices.

    Args:
        ground_of, goal_of: see `GroundOf`, `GoalOf`.
        progress: see `Progress`.
    """

    ground_of: GroundOf
    goal_of: GoalOf
    progress: Progress | None = None
    done: int = 0
    grounds: dict[Size, Ground] = field(default_factory=dict[Size, Ground])

    def run(self, sizes: Sequence[Size], devices: Sequence[int]) -> Scaling:
        """All rows, and the largest cubes where the memory is limited.

        Raises:
            PartitionError: for a size that the network cannot take.
        """
        goal = self.goal_of(devices[0])
        steps = self._strides(sizes)
        self._check(sizes, steps)
        count = len(sizes) * len(devices) + (0 if goal.memory is None else len(devices))
        rows = [row for size in sizes for row in self._rows(size, devices, count)]
        cubes = [] if goal.memory is None else self._cubes(devices, math.lcm(*steps), len(sizes[0]), count)
        return Scaling(goal.profile.name, goal.profile.measured, goal.memory, tuple(_compared(rows)), tuple(cubes))

    def _ground(self, size: Size) -> Ground:
        if size not in self.grounds:
            self.grounds[size] = self.ground_of(size)
        return self.grounds[size]

    def _tell(self, count: int, what: str) -> None:
        if self.progress is not None:
            self.progress(self.done, count, what)
        self.done += 1

    # --- sizes --------------------------------------------------------------------------------

    def _strides(self, sizes: Sequence[Size]) -> Size:
        """Per spatial axis how many cells the network's coarsest value has one for, at the largest size."""
        largest = max(sizes, key=math.prod)
        probe = tuple(max(256, n) for n in largest)
        try:
            seeds = self._ground(probe).seeds
        except PartitionError:
            seeds = self._ground(largest).seeds
        strides = strides_of(seeds)
        return tuple(strides[name] for name in _spatial(seeds))

    def _check(self, sizes: Sequence[Size], strides: Size) -> None:
        """Refuse what is smaller than the strides, and all that the network cannot take, before much is computed."""
        for size in sizes:
            least = next(((n, step) for n, step in zip(size, strides, strict=True) if n < step), None)
            if least is not None:
                raise PartitionError(f"size {size_words(size)}: the network has one cell for {least[1]} at its "
                                     f"coarsest, more than {least[0]}; give at least {least[1]}")
            self._ground(size)

    # --- rows ---------------------------------------------------------------------------------

    def _rows(self, size: Size, devices: Sequence[int], count: int) -> Iterator[Row]:
        before: Way | None = None
        for number in devices:
            self._tell(count, f"{size_words(size)} on {number}")
            goal = self.goal_of(number)
            way, fits = self._way(size, goal)
            if before is not None and before.seconds < way.seconds and fits is not False:
                way = self._not_slower(size, goal, way, before)
            before = way
            yield Row(number, size, mesh_text(way.form.mesh), way.seconds, way.needed, fits,
                      int(way.cost.sent.max(initial=0)), int(way.cost.messages.max(initial=0)), goal.transport,
                      way.note)

    def _way(self, size: Size, goal: Goal) -> tuple[Way, bool | None]:
        """The fastest way that fits; the fastest of all where none does."""
        way = self._chosen(size, replace(goal, memory=None))
        if goal.memory is None:
            return way, None
        if way.needed <= goal.memory:
            return way, True
        within = self._within(size, goal)
        return (way, False) if within is None else (within, True)

    def _not_slower(self, size: Size, goal: Goal, way: Way, before: Way) -> Way:
        """What was chosen for fewer devices, where that is faster: the others can stay unused."""
        ground = self._ground(size)
        again = Search(goal, ground.seeds, ground.lay_out).way(Form(before.form.mesh))
        return again if again is not None and again.seconds < way.seconds else way

    def _chosen(self, size: Size, goal: Goal) -> Way:
        ground = self._ground(size)
        return Search(goal, ground.seeds, ground.lay_out).choose().chosen

    def _within(self, size: Size, goal: Goal) -> Way | None:
        """The fastest way that keeps to the memory in whole shards; None where there is none."""
        try:
            return self._chosen(size, goal)
        except PartitionError:
            return None

    # --- the largest cube ---------------------------------------------------------------------

    def _cubes(self, devices: Sequence[int], step: int, axes: int, count: int) -> list[Largest]:
        found: list[Largest] = []
        guess = 1
        for number in devices:
            self._tell(count, f"largest cube on {number}")
            cube = self._cube(self.goal_of(number), step, axes, guess)
            guess = 1 if cube.size is None else cube.size[0] // step
            found.append(cube)
        return found

    def _cube(self, goal: Goal, step: int, axes: int, guess: int) -> Largest:
        """The largest multiple of the strides that fits: guessed by how memory grows with the cells, then halved.

        A multiple is known not to fit when even the estimate, which is never more than a plan takes, is above the
        memory; one fits when a plan that was laid out does.
        """
        assert goal.memory is not None
        low, high, best = 0, LARGEST_EXTENT // step + 1, Largest(goal.devices, None)
        tries = 0
        while high - low > 1:
            tries += 1
            at = min(max(guess, low + 1), high - 1) if tries <= GUESSES else (low + high) // 2
            least, way = self._least((step * at,) * axes, goal)
            if way is not None and least <= goal.memory:
                low, best = at, Largest(goal.devices, (step * at,) * axes, mesh_text(way.form.mesh), way.needed,
                                        way.seconds)
            else:
                high = at
            guess = at + 1 if least == math.inf else int(at * _growth(least, goal) ** (1 / axes))
        return best

    def _least(self, size: Size, goal: Goal) -> tuple[float, Way | None]:
        """Bytes of the mesh that holds least: as laid out, or by the estimate where that is too much already."""
        assert goal.memory is not None
        try:
            ground = self._ground(size)
        except PartitionError:
            return math.inf, None
        extents = extents_of(ground.seeds)
        meshes = meshes_of(goal.devices, extents, {})
        peaks = Estimates(ground.seeds, meshes, goal.profile, goal.transport).peak + fixed_bytes(ground.seeds, goal)
        order = np.argsort(peaks, kind="stable")[:LAID_OUT]
        if peaks[order[0]] > goal.memory:
            return float(peaks[order[0]]), None
        ways = [way for index in order if (way := self._whole(ground, goal, meshes[index])) is not None]
        best = min(ways, key=lambda way: way.needed, default=None)
        return (math.inf, None) if best is None else (float(best.needed), best)

    def _whole(self, ground: Ground, goal: Goal, mesh: Mesh) -> Way | None:
        """The plan of a mesh in whole-shard steps."""
        return Search(replace(goal, memory=None), ground.seeds, ground.lay_out).way(Form(mesh))


def _growth(needed: float, goal: Goal) -> float:
    """How many times the cells may become until the memory is full."""
    assert goal.memory is not None
    room, taken = goal.memory - goal.held, needed - goal.held
    return max(room, 1) / max(taken, 1.0)


def _spatial(seeds: ir.Model) -> list[str]:
    return [name for name in extents_of(seeds) if name != "batch"]


def size_words(size: Size) -> str:
    """Extents as they are given: 256x512x512."""
    return "x".join(map(str, size))


# --- comparing rows -----------------------------------------------------------------------------------


def _compared(rows: Sequence[Row]) -> list[Row]:
    """The rows with how they compare to others."""
    by_size: dict[Size, list[Row]] = defaultdict(list)
    by_share: dict[Fraction, list[Row]] = defaultdict(list)
    for row in rows:
        by_size[row.size].append(row)
        by_share[Fraction(row.cells, row.devices)].append(row)
    strong = {size: _base(group) for size, group in by_size.items()}
    weak = {share: _base(group) for share, group in by_share.items() if len(group) > 1}
    return [_with_ratios(row, strong, weak) for row in rows]


def _base(rows: Sequence[Row]) -> Row:
    """That of the fewest devices which fits; of the fewest where none does."""
    ordered = sorted(rows, key=lambda row: row.devices)
    return next((row for row in ordered if row.fits is not False), ordered[0])


def _with_ratios(row: Row, strong: Mapping[Size, Row], weak: Mapping[Fraction, Row]) -> Row:
    base, other = strong[row.size], weak.get(Fraction(row.cells, row.devices))
    speedup = base.seconds / row.seconds if row.seconds else 1.0
    return replace(row, speedup=speedup, efficiency=speedup * base.devices / row.devices,
                   weak_efficiency=other.seconds / row.seconds if other is not None and row.seconds else None)
