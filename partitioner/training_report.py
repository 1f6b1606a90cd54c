"""What a training step of a plan takes, as a table and as plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import onnx_ir as ir
from rich.console import Group
from rich.table import Table
from rich.text import Text

from partitioner.cost import plan_cost
from partitioner.profile import Profile
from partitioner.report import seconds_text, size_text
from partitioner.timing import plan_time
from partitioner.training_cost import Optimiser, training_cost
from partitioner.training_time import training_time


@dataclass(frozen=True)
class TrainingRow:
    """A training step on the rank that takes most, with all activations kept or with few.

    Args:
        kept_bytes: activations that autograd holds between the passes.
        peak_bytes: most at once of activations, gradients, halos and workspace.
        total_bytes: that with weights, their gradients and the optimiser's state.
        sent_bytes, messages: exchanges and merges of both passes, and the sums of the parameters' gradients.
    """

    checkpoint: bool
    seconds: float
    kept_bytes: int
    peak_bytes: int
    total_bytes: int
    sent_bytes: int
    messages: int


@dataclass(frozen=True)
class TrainingReport:
    """Both rows, and what they were forecast for."""

    optimiser: str
    profile: str
    transport: str
    rows: tuple[TrainingRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for programs."""
        return {"optimiser": self.optimiser, "profile": self.profile, "transport": self.transport,
                "steps": [asdict(row) for row in self.rows]}

    def render(self) -> Group:
        """A table, and what it is about."""
        table = Table(title="a training step, on the rank that takes most", title_justify="left", pad_edge=False)
        for name in ("activations", "time", "kept", "at the peak", "with weights", "sent", "messages"):
            table.add_column(name, justify="left" if name == "activations" else "right")
        for row in self.rows:
            table.add_row("few kept (checkpoint=True)" if row.checkpoint else "all kept", seconds_text(row.seconds),
                          *map(size_text, (row.kept_bytes, row.peak_bytes, row.total_bytes, row.sent_bytes)),
                          str(row.messages))
        return Group(table, Text(f"Optimiser {self.optimiser}; time roughly estimated with profile '{self.profile}', "
                                 f"messages over {self.transport}."))


def training_report(plan: ir.Model, optimiser: Optimiser, profile: Profile, transport: str) -> TrainingReport:
    """What a step takes of a plan that was compiled for training.

    Raises:
        PartitionError: when the profile does not know the transport.
    """
    run = plan_time(plan, plan_cost(plan), profile, transport)
    rows: list[TrainingRow] = []
    for checkpoint in (False, True):
        cost = training_cost(plan, checkpoint, optimiser)
        time = training_time(run, cost, profile)
        sums = 2 * (cost.mesh.size - 1) * cost.buckets
        rows.append(TrainingRow(checkpoint, time.seconds, int(cost.kept.max()), int(cost.peak.max()),
                                int(cost.total.max()), int(cost.sent.max()) + cost.summed,
                                int(cost.messages.max()) + sums))
    return TrainingReport(optimiser, profile.name, transport, tuple(rows))
