"""How long a step of training takes on every rank: an estimate from the forecast of the forward pass.

    forward       as `partitioner.timing` has it for a run, inputs and outputs apart
    backward      convolutions and products twice their forward time, once for each gradient; all else once
                  exchanges and merges as long as forward; with checkpoint=True the forward pass once more
    sums          the parameters' gradients around a ring, as if nothing were computed meanwhile

The factor of convolutions was measured (1.7 to 2.3 with torch 2.13 on CPUs, 16 to 128 channels); the others were not.
Kernels under autograd work on fresh memory where a run has buffers.  The loss, the optimiser and what Python takes are
not counted.  So this ranks plans and says the order of magnitude; it is no forecast as `Plan.time` is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from partitioner import dialect
from partitioner.curves import FloatArray
from partitioner.mesh import Mesh
from partitioner.ops.nodes import operator_of
from partitioner.profile import Profile
from partitioner.timing import LOCKSTEP, PlanTime, StepTime
from partitioner.training_cost import TrainingCost


@dataclass(frozen=True)
class TrainingTime:
    """Seconds of one training step; arrays are per rank, of the mesh's shape.

    Args:
        transport: how messages travel; `lockstep` has all ranks in one process.
        forward, backward: kernels, messages and waiting of both passes, what runs again included in the second.
        sums: summing up the parameters' gradients over the processes; 0 in lock-step.
    """

    mesh: Mesh
    transport: str
    forward: FloatArray
    backward: FloatArray
    sums: float

    @property
    def total(self) -> FloatArray:
        """Seconds of all of it."""
        return self.forward + self.backward + self.sums

    @property
    def seconds(self) -> float:
        """Seconds of the step: of all ranks after one another in one process, else of the slowest."""
        return float(self.total.sum() if self.transport == LOCKSTEP else self.total.max(initial=0.0))


def training_time(run: PlanTime, cost: TrainingCost, profile: Profile) -> TrainingTime:
    """An estimate of a step of a plan that was compiled for training.

    Args:
        run: the time of that plan's forward pass; see `partitioner.timing.plan_time`.
        cost: of that plan, with or without checkpointing.
        profile: that of the run.
    """
    steps = [step for step in run.steps if step.node is not None]
    forward = _sum([step.total for step in steps], run.mesh)
    backward = _sum([_gradient(step) for step in steps], run.mesh)
    if len(cost.segments) > 1:
        backward = backward + forward
    sums = 0.0
    if run.transport != LOCKSTEP and cost.buckets:
        messages = 2.0 * (run.mesh.size - 1) * cost.buckets
        sums = float(np.asarray(profile.message_seconds(float(cost.summed), messages, run.transport)))
    return TrainingTime(run.mesh, run.transport, forward, backward, sums)


def _gradient(step: StepTime) -> FloatArray:
    """Seconds of a step's pass back."""
    node = step.node
    if node is None or dialect.is_communication(node):
        return step.total
    return step.total + (operator_of(node).gradient_work - 1.0) * step.compute


def _sum(figures: Sequence[FloatArray], mesh: Mesh) -> FloatArray:
    return sum(figures, start=np.zeros(mesh.shape))
