"""What the planner is asked, what it looked at, and what it chose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from partitioner import dialect
from partitioner.budget import Budget
from partitioner.compiler import DepthFirst, Steering
from partitioner.cost import PlanCost
from partitioner.layout import Cuts
from partitioner.mesh import Mesh
from partitioner.profile import Profile
from partitioner.timing import PlanTime
from partitioner.training_cost import Optimiser, TrainingCost
from partitioner.training_time import TrainingTime


@dataclass(frozen=True)
class Goal:
    """What a plan is to be chosen for.

    Args:
        devices: how many there are; a plan may use fewer.
        profile: what each can do.
        transport: how messages travel between them.
        threads: CPU threads of a process; see `partitioner.timing.plan_time`.
        memory: bytes that a device has, if they are limited.
        held: bytes of that which the process and its libraries hold.
        mesh: decided by the user.
        cuts: decided by the user, by mesh axis.
        steering: decided by the user.
        steers: whether cuts, replicated layers and deeper halos are looked for too, not the mesh alone.
        all_of_them: whether every device has to be used.
        most: meshes that are laid out, at most.
        slabs: whether a device may go through its shard slab by slab where the memory asks for it.
        optimiser: that of the training steps for which the plan is chosen; None for inference.
    """

    devices: int
    profile: Profile
    transport: str
    threads: int | None = None
    memory: int | None = None
    held: int = 0
    mesh: Mesh | None = None
    cuts: Mapping[str, Cuts] = field(default_factory=dict[str, Cuts])
    steering: Steering = field(default_factory=Steering)
    steers: bool = True
    all_of_them: bool = False
    most: int = 12
    slabs: bool = True
    optimiser: Optimiser | None = None

    def budget(self, mesh: Mesh) -> Budget | None:
        """What a process may hold that has one rank of a mesh, if memory is limited."""
        if self.memory is None:
            return None
        return Budget(self.memory, None, False, mesh.size == 1, self.held, self.profile, self.transport)


@dataclass(frozen=True)
class Form:
    """All that decides how a model is laid out."""

    mesh: Mesh
    cuts: Mapping[str, Cuts] = field(default_factory=dict[str, Cuts])
    steering: Steering = field(default_factory=Steering)
    order: DepthFirst | None = None


@dataclass(frozen=True)
class TrainingStep:
    """What a training step of a way takes."""

    cost: TrainingCost
    time: TrainingTime

    @property
    def checkpoint(self) -> bool:
        """Whether few activations are kept and the others computed again."""
        return len(self.cost.segments) > 1


@dataclass(frozen=True)
class Way:
    """One way to partition a model, laid out, with what a run of it takes, or a training step.

    Args:
        cost, time: of a run, forward.
        needed: bytes that a device holds: activations, weights, the process.
        what: in a few words how it differs from even shards of every layer.
        step: of training, where that is what the plan is chosen for.
    """

    form: Form
    model: ir.Model
    cost: PlanCost
    time: PlanTime
    needed: int
    what: str = ""
    step: TrainingStep | None = None

    @property
    def seconds(self) -> float:
        """Forecast time of a run, or of a step."""
        return self.time.seconds if self.step is None else self.step.time.seconds

    @property
    def peak(self) -> int:
        """Bytes of activations on the rank that holds most."""
        return int((self.cost if self.step is None else self.step.cost).peak.max(initial=0))

    @property
    def sent(self) -> int:
        """Bytes that all ranks send together."""
        return int((self.cost if self.step is None else self.step.cost).sent.sum())

    @property
    def messages(self) -> int:
        """Messages of all ranks together."""
        return int((self.cost if self.step is None else self.step.cost).messages.sum())

    @property
    def note(self) -> str:
        """What is special about it."""
        schedule = dialect.get_schedule(self.model)
        slabs = "" if schedule is None else f"slab by slab along {schedule.axis}"
        again = "activations computed again" if self.step is not None and self.step.checkpoint else ""
        return "; ".join(filter(None, (self.what, slabs, again)))

    @property
    def words(self) -> str:
        """The mesh, and what is special about it."""
        mesh = str(self.form.mesh) if self.form.mesh.size > 1 else "one device"
        return f"{mesh} ({self.note})" if self.note else mesh


@dataclass(frozen=True)
class Rejected:
    """A way that does not do, or was not looked at; with the bytes that it needs, where these are too many."""

    mesh: Mesh
    reason: str
    needed: int | None = None


@dataclass(frozen=True)
class Choice:
    """The plan that is fastest within the memory, by the forecast, and the others.

    Args:
        chosen: the best way.
        others: the other ways that were laid out, fastest first.
        rejected: meshes that do not fit, or that were estimated to be slower than the chosen one.
        meshes: how many meshes there are.
    """

    goal: Goal
    chosen: Way
    others: tuple[Way, ...]
    rejected: tuple[Rejected, ...]
    meshes: int
