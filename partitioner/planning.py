"""From a model and what a user asks for to a plan: compiled as asked, or searched for by the planner."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

from partitioner.axes import named_axes
from partitioner.compiler import DepthFirst, Shapes, Steering, compile_plan, prepare
from partitioner.cost import plan_cost
from partitioner.errors import PartitionError, refuse_all
from partitioner.guards import MeshLike, parse_mesh, source_problems
from partitioner.layout import Cuts
from partitioner.loader import fault_of
from partitioner.mesh import AXIS_NAMES, LARGEST
from partitioner.profile import Profile
from partitioner.rolling import SMALL
from partitioner.shapes import with_nearest_shapes

if TYPE_CHECKING:
    from partitioner.budget import Budget
    from partitioner.planner.choice import Choice
    from partitioner.planner.search import Progress
    from partitioner.training_cost import Optimiser

GPUS_OF_A_NODE = 8
"""More ranks than these reach one another over the network."""

GPU_HELD = 768 * 2**20
"""Bytes that a GPU's context and libraries take, about."""


@dataclass(frozen=True)
class Request:
    """How a model is to be partitioned.

    Args:
        mesh: in any form that a user may give; one rank when not given.
        shapes: extents per input.
        cuts: by mesh axis.
        strict: refuse operators without a sharded rule.
        budget: what a process may hold.
        steering: what is decided beside mesh and cuts.
        slabs: whether a rank may go through its shard slab by slab; else every step takes a whole shard.
    """

    mesh: MeshLike = None
    shapes: Shapes = field(default_factory=dict[str, Sequence[int]])
    cuts: Mapping[str, Cuts] = field(default_factory=dict[str, Cuts])
    strict: bool = False
    budget: Budget | None = None
    steering: Steering = field(default_factory=Steering)
    slabs: bool = True


@dataclass(frozen=True)
class Devices:
    """What the planner is to choose a mesh for.

    Args:
        count: devices; a plan may use fewer.
        profile: what each can do; that of this machine when not given.
        transport: how messages travel; when not given what suits the profile.
        memory: bytes of each.
        steers: whether cuts, replicated layers and deeper halos are searched for too.
        all_of_them: whether the plan has to use every one.
        optimiser: that of the training steps for which it is chosen; None for inference.
    """

    count: int
    profile: Profile | None = None
    transport: str | None = None
    memory: int | None = None
    steers: bool = True
    all_of_them: bool = False
    optimiser: Optimiser | None = None


def devices_of(count: int, profile: Profile | str | Path | None = None, transport: str | None = None,
               memory: str | int | None = None, host_memory: str | int | None = None,
               train: bool | str = False) -> Devices:
    """Devices as a user describes them.

    Args:
        train: whether training steps are what they do, or the optimiser of these; Adam where it is not told.

    Raises:
        PartitionError: for a profile that cannot be read, no amount of memory, or an unknown optimiser.
    """
    from partitioner.budget import parse_bytes
    from partitioner.training_cost import known_optimiser

    if host_memory is not None:
        raise PartitionError("host_memory is for one process under a budget; leave it out with devices")
    found = profile if profile is None or isinstance(profile, Profile) else Profile.find(profile)
    optimiser = None if train is False else known_optimiser("adam" if train is True else train)
    return Devices(count, found, transport, None if memory is None else parse_bytes(memory), optimiser=optimiser)


def compile_request(source: ir.Model, request: Request, dump_dir: Path | None = None) -> ir.Model:
    """The plan of a model, as asked.

    Raises:
        PartitionError: when the model cannot be kept exact so, or the budget cannot be kept; every reason is listed.
    """
    refuse_all(source_problems(source))
    mesh = parse_mesh(request.mesh, source)
    with Faults(source), with_nearest_shapes(source, request.shapes):
        def lay_out(order: DepthFirst | None) -> ir.Model:
            return compile_plan(source, mesh, request.shapes, request.cuts, dump_dir, request.strict, order=order,
                                steering=request.steering)

        if request.budget is None and (mesh.size > 1 or not request.slabs):
            return lay_out(None)
        free = [n for n in (*AXIS_NAMES[1:], AXIS_NAMES[0]) if request.slabs and mesh.count(n) == 1
                and any(n in axes for axes in named_axes(source).values())]
        if request.budget is None:
            return _fastest(lay_out, free)
        from partitioner.schedules import fit

        return fit(lay_out, free, request.budget).model


def _fastest(lay_out: Callable[[DepthFirst | None], ir.Model], free: Sequence[str]) -> ir.Model:
    """The plan with the schedule that suits this machine; small ones, and those for a GPU, take all at once."""
    whole = lay_out(None)
    if not free or plan_cost(whole).peak_together < SMALL:
        return whole
    import torch

    profile = Profile.find(None)
    if profile.device != "cpu" or torch.cuda.is_available():
        return whole
    from partitioner.budget import Budget
    from partitioner.schedules import fastest

    return fastest(lay_out, whole, free, Budget.unlimited(profile)).model


def search_plan(source: ir.Model, request: Request, devices: Devices, dump_dir: Path | None = None,
                progress: Progress | None = None) -> tuple[ir.Model, Request, Choice]:
    """The plan that the planner chooses, as what request it can be compiled again, and the choice.

    What the request decides (mesh, cuts, pinned nodes, overlaps) stays as it is.

    Raises:
        PartitionError: when no mesh of so many devices does, or as `compile_request`.
    """
    from partitioner.planner.choice import Form, Goal
    from partitioner.planner.search import Search, laid_out_everywhere

    refuse_all([*source_problems(source), *device_problems(devices.count)])
    given = None if request.mesh is None or request.mesh == "" else parse_mesh(request.mesh, source)
    if given is not None and given.size > devices.count:
        raise PartitionError(f"mesh {given} has {given.size} ranks, more than the {devices.count} devices; give more "
                             "devices, or a smaller mesh")
    profile = Profile.find(None) if devices.profile is None else devices.profile
    transport = devices.transport or usual_transport(profile, devices.count)
    profile.message_seconds(0.0, 0.0, transport)  # refuses what it does not know
    trains = devices.optimiser is not None
    goal = Goal(devices.count, profile, transport, None, devices.memory, held_on(profile), given, request.cuts,
                Steering(request.steering.pinned) if trains else request.steering, devices.steers,
                devices.all_of_them, slabs=request.slabs and not trains, optimiser=devices.optimiser)
    with Faults(source), with_nearest_shapes(source, request.shapes):
        prepared = prepare(source, request.shapes, request.strict, "training" if trains else "inference")

        def lay_out(form: Form) -> ir.Model:
            return prepared.lay_out(form.mesh, form.cuts, form.order, form.steering)

        choice = Search(goal, laid_out_everywhere(prepared.model), lay_out, progress).choose()
        form, model = choice.chosen.form, choice.chosen.model
        steering = request.steering if trains else form.steering
        if trains or dump_dir is not None:  # a plan is for inference; `Plan.module` makes what trains
            model = compile_plan(source, form.mesh, request.shapes, form.cuts, dump_dir, request.strict,
                                 order=form.order, steering=steering)
    return model, replace(request, mesh=form.mesh, cuts=form.cuts, steering=steering,
                          budget=None if trains else goal.budget(form.mesh)), choice


def usual_transport(profile: Profile, devices: int) -> str:
    """How messages travel between so many devices: in the machine, or over its network where that is known."""
    if devices == 1:
        return "lockstep"
    if devices > GPUS_OF_A_NODE and "network" in profile.links:
        return "network"
    return "nccl" if profile.device != "cpu" and "nccl" in profile.links else "gloo"


def held_on(profile: Profile) -> int:
    """Bytes that a process and its libraries hold on a device."""
    if profile.device != "cpu":
        return GPU_HELD
    from partitioner.budget import held_now

    return held_now()


def device_problems(count: int) -> list[str]:
    """What is wrong with a number of devices."""
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= LARGEST:  # pyright: ignore
        return [f"devices={count!r}: give a whole number from 1 to {LARGEST}"]
    return []


def pinned_axes(given: Mapping[str, str | Sequence[str]] | None) -> dict[str, tuple[str, ...]]:
    """Nodes that a user pins, each with the mesh axes along which all ranks compute it.

    Args:
        given: by node `"replicated"` for all axes, or the names of some.

    Raises:
        PartitionError: for other words.
    """
    found: dict[str, tuple[str, ...]] = {}
    for node, words in (given or {}).items():
        names = [w.strip() for w in words.split(",")] if isinstance(words, str) else list(words)
        unknown = [n for n in names if n not in AXIS_NAMES and n != "replicated"]
        if unknown or not names:
            raise PartitionError(f"pin {node}={words}: '{', '.join(unknown)}' is not understood; write replicated for "
                                 f"all axes of the mesh, or some of {', '.join(AXIS_NAMES)}")
        found[node] = AXIS_NAMES if "replicated" in names else tuple(names)
    return found


class Faults:
    """Tells what is wrong with a damaged model where a pass stumbles over it."""

    def __init__(self, source: ir.Model) -> None:
        self._source = source

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, PartitionError) or not isinstance(error, Exception):
            return
        fault = fault_of(self._source)  # looked for only now, for the checker refuses much that runs
        if fault is not None:
            raise PartitionError(f"the model is damaged ({fault}); export it again") from None


