"""`pt.forecast`: what a model takes on few and many devices, at several sizes, before any of them is there."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from partitioner.api import Progress, source_of
from partitioner.axes import named_axes
from partitioner.compiler import prepare
from partitioner.errors import PartitionError, refuse_all
from partitioner.guards import source_problems, whole_numbers
from partitioner.planning import Faults, device_problems, devices_of, held_on, usual_transport
from partitioner.profile import Profile
from partitioner.shapes import with_nearest_shapes

if TYPE_CHECKING:
    from partitioner.planner.choice import Form, Goal
    from partitioner.planner.scaling import Ground, Scaling, Size

LOOKED_AT = 3
"""Meshes that are laid out for every row."""

LONGEST = 1 << 16
"""Cells along an axis, at most."""

SizeLike = int | str | Sequence[int]


def forecast(  # noqa: PLR0913 (the words of the command)
    model: Any,
    example: Any = None,
    *,
    devices: Sequence[int],
    sizes: Sequence[SizeLike],
    shapes: Mapping[str, Sequence[int]] | None = None,
    memory: str | int | None = None,
    profile: Profile | str | Path | None = None,
    backend: str | None = None,
    strict: bool = False,
    progress: Progress | None = None,
) -> Scaling:
    """Strong and weak scaling, memory and traffic by the planner's choice per size and number of devices.

    Args:
        model, example: as for `partition`.
        devices: how many there are, once per row: `[1, 2, 4, 8]`.
        sizes: spatial extents of the volume: `256` along every axis, `"256x512x512"` or `(256, 512, 512)`.
        shapes: extents of inputs, for what no size says: batch, channels, other inputs.  An open batch is 1.
        memory: what each device has; the largest cube that fits is told too.
        profile: what each device can do; that of this machine by default.
        backend: how messages travel between them; by default what suits the profile and their number.
        strict: refuse operators without a sharded rule.
        progress: called with (done, in all, what is looked at).

    Returns:
        the rows; `table()` to print, `save(path)` for .csv, .json and .png.

    Raises:
        PartitionError: for a size that the network cannot take, and for what is not understood.
    """
    source, found = source_of(model, example, False)
    given = {**found, **whole_numbers(shapes, "shapes", "{'volume': (1, 1, 64, 64, 64)}")}
    return forecast_of(source, given, devices=devices, sizes=sizes, memory=memory, profile=profile, backend=backend,
                       strict=strict, progress=progress)


@dataclass(frozen=True)
class _Model:
    """A model, and what is known of its inputs' extents."""

    source: ir.Model
    shapes: Mapping[str, Sequence[int]]
    strict: bool

    @property
    def volume(self) -> ir.Value:
        """The input with most axes.

        Raises:
            PartitionError: when it has no spatial axes.
        """
        inputs = [v for v in self.source.graph.inputs if v.name not in self.source.graph.initializers]
        found = max(inputs, key=lambda v: 0 if v.shape is None else len(v.shape), default=None)
        if found is None or not self.axes(found):
            raise PartitionError("forecast: the model has no input with spatial axes, whose size could be given")
        return found

    def axes(self, value: ir.Value) -> list[int]:
        """The spatial axes of an input, in the order depth, height, width."""
        names = named_axes(self.source)[str(value.name)]
        return [axis for name, axis in names.items() if name != "batch"]

    def shapes_for(self, size: Size) -> dict[str, tuple[int, ...]]:
        """Extents of the inputs when the volume has a size; inputs that are open like it have it too."""
        volume, found = self.volume, {name: tuple(shape) for name, shape in self.shapes.items()}
        for value in self.source.graph.inputs:
            name, axes = str(value.name), self.axes(value) if value.shape is not None else []
            if value is volume or (name not in found and len(axes) == len(size) and self._is_open(value, axes)):
                found[name] = self._shape(value, dict(zip(axes, size, strict=True)))
        return found

    def _is_open(self, value: ir.Value, axes: Sequence[int]) -> bool:
        assert value.shape is not None
        return not any(isinstance(value.shape[axis], int) for axis in axes)

    def _shape(self, value: ir.Value, extents: Mapping[int, int]) -> tuple[int, ...]:
        assert value.shape is not None
        known: Sequence[int | None] = [d if isinstance(d, int) else None for d in value.shape]
        given = self.shapes.get(str(value.name))
        if given is not None and len(given) == len(known):
            known = given
        found: list[int] = []
        for axis, extent in enumerate(known):
            if axis in extents:
                found.append(extents[axis])
            elif extent is not None or axis == named_axes(self.source)[str(value.name)].get("batch"):
                found.append(1 if extent is None else extent)
            else:
                raise PartitionError(f"input '{value.name}' has an open axis {axis}, which no size gives; give its "
                                     f"shape, as {value.name}={'x'.join('N' for _ in known)}")
        return tuple(found)

    def ground(self, size: Size) -> Ground:
        """The model at a size, ready to be laid out."""
        from partitioner.planner.scaling import Ground
        from partitioner.planner.search import laid_out_everywhere

        shapes = self.shapes_for(size)
        with Faults(self.source), with_nearest_shapes(self.source, shapes):
            prepared = prepare(self.source, shapes, self.strict)

        def lay_out(form: Form) -> ir.Model:
            return prepared.lay_out(form.mesh, form.cuts, form.order, form.steering)

        return Ground(laid_out_everywhere(prepared.model), lay_out)


def forecast_of(  # noqa: PLR0913 (the words of the command)
    source: ir.Model,
    shapes: Mapping[str, Sequence[int]],
    *,
    devices: Sequence[int],
    sizes: Sequence[SizeLike],
    memory: str | int | None = None,
    profile: Profile | str | Path | None = None,
    backend: str | None = None,
    strict: bool = False,
    progress: Progress | None = None,
) -> Scaling:
    """See `forecast`."""
    from partitioner.planner.choice import Goal
    from partitioner.planner.scaling import Scaler

    refuse_all(source_problems(source))
    model, counts = _Model(source, shapes, strict), _counts(devices)
    wanted = [_size(size, len(model.axes(model.volume))) for size in _listed(sizes, "sizes")]
    asked = devices_of(counts[0], profile, backend, memory)
    machine = Profile.find(None) if asked.profile is None else asked.profile
    held = held_on(machine)

    def goal(count: int) -> Goal:
        return Goal(count, machine, backend or usual_transport(machine, count), memory=asked.memory, held=held,
                    steers=False, most=LOOKED_AT, slabs=False)

    machine.message_seconds(0.0, 0.0, goal(counts[-1]).transport)  # refuses what it does not know
    return Scaler(model.ground, goal, progress).run(list(dict.fromkeys(wanted)), counts)


def _counts(devices: Sequence[int]) -> list[int]:
    found = _listed(devices, "devices")
    refuse_all([problem for count in found for problem in device_problems(count)])
    return sorted(set(found))


def _listed(given: Sequence[Any], what: str) -> list[Any]:
    if isinstance(given, str | bytes) or not isinstance(given, Sequence) or not given:
        raise PartitionError(f"{what}={given!r}: give a list of at least one, as {what}=[1, 2, 4]")
    return list(given)


def _size(given: SizeLike, axes: int) -> Size:
    """The spatial extents that a user means.

    Raises:
        PartitionError: for what is no size, and for one of another number of axes.
    """
    words = given.lower().split("x") if isinstance(given, str) else [given] if isinstance(given, int) else given
    try:
        found = tuple(int(n) if isinstance(n, str) else operator.index(n) for n in words)
    except (TypeError, ValueError):
        found = ()
    if not found or isinstance(given, bool) or not all(1 <= n <= LONGEST for n in found):
        raise PartitionError(f"size {given}: give whole numbers from 1 to {LONGEST}, as 256 or 256x512x512")
    if len(found) == 1:
        return found * axes
    if len(found) != axes:
        raise PartitionError(f"size {given}: has {len(found)} axes, the volume has {axes}; give one number for all, "
                             "or one for each")
    return found
