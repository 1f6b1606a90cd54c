"""The choice in words and rows: why this plan, what the others would take, what was decided at one node."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import onnx_ir as ir
from rich.console import Group
from rich.table import Table
from rich.text import Text

from partitioner import dialect
from partitioner.errors import PartitionError
from partitioner.mesh import Mesh
from partitioner.page import Alternative
from partitioner.planner.choice import Choice, Way
from partitioner.report import halo_widths, seconds_text, short_layout, size_text
from partitioner.timing import StepTime

MOST_ROWS = 12
"""Ways that tables show."""


@dataclass(frozen=True)
class Row:
    """A way in a table.

    Args:
        seconds: forecast time of a run.
        peak_bytes: activations of the rank that holds most.
        needed_bytes: with weights and the process.
        sent_bytes, messages: of all ranks together.
    """

    mesh: str
    seconds: float
    peak_bytes: int
    needed_bytes: int
    sent_bytes: int
    messages: int
    chosen: bool
    note: str


def rows_of(choice: Choice) -> list[Row]:
    """The chosen way and the fastest others, fastest first; a mesh that is not the best in any form comes once."""
    ways = [choice.chosen, *choice.others]
    return [_row(way, way is choice.chosen) for way in ways[:MOST_ROWS]]


def _row(way: Way, chosen: bool) -> Row:
    return Row(str(way.form.mesh), way.seconds, way.peak, way.needed, way.sent, way.messages, chosen, way.note)


def choice_dict(choice: Choice) -> dict[str, Any]:
    """The rows and the reasons as plain data for programs."""
    return {"devices": choice.goal.devices, "profile": choice.goal.profile.name, "transport": choice.goal.transport,
            "optimiser": choice.goal.optimiser,
            "ways": [asdict(row) for row in rows_of(choice)], "why": why(choice)}


def alternatives_of(choice: Choice) -> list[Alternative]:
    """The same rows for the page of a plan."""
    return [Alternative(mesh=row.mesh, seconds=row.seconds, peak_bytes=row.peak_bytes, sent_bytes=row.sent_bytes,
                        messages=row.messages, chosen=row.chosen, note=row.note) for row in rows_of(choice)]


def why(choice: Choice) -> str:
    """Why this way was chosen, as paragraphs with blank lines between them."""
    return "\n\n".join(_paragraphs(choice))


def _paragraphs(choice: Choice) -> Iterator[str]:
    goal, best = choice.goal, choice.chosen
    figures = "measured" if goal.profile.measured else "estimated"
    memory = "" if goal.memory is None else f" and {size_text(goal.memory)} each"
    yield (f"For {goal.devices} device{'s' * (goal.devices != 1)}{memory}, with the {figures} figures of profile "
           f"'{goal.profile.name}' and messages over {goal.transport}: {'a training step on ' if best.step else ''}"
           f"{best.words} takes {seconds_text(best.seconds)}, {size_text(best.needed)} per device.")
    unused = goal.devices - best.form.mesh.size
    if unused:
        rivals = [w for w in choice.others if w.form.mesh.size == goal.devices]
        told = f"; the best mesh of all takes {seconds_text(rivals[0].seconds)}" if rivals else ""
        yield f"{unused} of the {goal.devices} devices stay unused: more would not make it faster{told}."
    rival = next((w for w in choice.others if w.form.mesh != best.form.mesh), None)
    if rival is not None:
        yield f"Compared with {rival.words}, the next mesh: {_difference(best, rival)}."
    plain = next((w for w in choice.others if w.form.mesh == best.form.mesh and not w.what), None)
    if best.what and plain is not None:
        yield f"{best.what[0].upper()}{best.what[1:]}: {_difference(best, plain)} than without."
    left = len(choice.rejected)
    if left:
        verb = "does" if left == 1 else "do"
        yield (f"{choice.meshes} meshes there are; {left} of them {verb} not fit, or would be slower by an estimate "
               f"that leaves out what only makes them slower still, as {mesh_text(choice.rejected[0].mesh)}: "
               f"{choice.rejected[0].reason}.")


def mesh_text(mesh: Mesh) -> str:
    """A mesh in words."""
    return str(mesh) if mesh.size > 1 else "one device"


def _difference(one: Way, other: Way) -> str:
    """What one takes more and less than another."""
    pairs = (("computing", one.time.compute.max(initial=0), other.time.compute.max(initial=0)),
             ("messages", one.time.communication.max(initial=0), other.time.communication.max(initial=0)),
             ("waiting", one.time.wait.max(initial=0), other.time.wait.max(initial=0)))
    said = [f"{seconds_text(abs(a - b))} {'less' if a < b else 'more'} {name}" for name, a, b in pairs
            if abs(a - b) > 1e-3 * max(one.seconds, 1e-9)]
    total = other.seconds - one.seconds
    head = f"{seconds_text(abs(total))} {'less' if total >= 0 else 'more'} in all"
    forward = "" if one.step is None else "forward: "
    return head + (f" ({forward}{', '.join(said)})" if said else "")


def render_choice(choice: Choice) -> Group:
    """The ways that were looked at as a table, and why one was chosen."""
    table = Table(title="ways looked at, fastest first", title_justify="left", pad_edge=False)
    for name in ("mesh", "time", "activations", "per device", "sent", "messages", ""):
        table.add_column(name, justify="left" if name in ("mesh", "") else "right", overflow="fold")
    for row in rows_of(choice):
        table.add_row(("> " if row.chosen else "  ") + row.mesh, seconds_text(row.seconds), size_text(row.peak_bytes),
                      size_text(row.needed_bytes), size_text(row.sent_bytes), str(row.messages), row.note)
    return Group(table, Text(why(choice)))


def explain_node(choice: Choice, name: str) -> str:
    """What was decided at one node, and what it would take in the other ways.

    Args:
        name: of a node of the plan, or of a value that it makes.

    Raises:
        PartitionError: when the plan has no such node.
    """
    step = _step_of(choice.chosen, name)
    if step is None or step.node is None:
        names = [str(node.name) for node in choice.chosen.model.graph]
        near = ", ".join(n for n in names if name.lower() in n.lower()) or ", ".join(names[:5]) + ", ..."
        raise PartitionError(f"explain '{name}': the plan has no such node; it has {near}")
    node, output = step.node, step.node.outputs[0]
    lines = [f"{node.name} ({node.op_type}): {output.name} {short_layout(dialect.get_layout(output))}"]
    lines += [f"  reads {text}" for text in _arrivals(choice.chosen, node)]
    forward = "" if choice.goal.optimiser is None else "forward "
    lines.append(f"  {forward}{_figures(step)} on the slowest rank, in {choice.chosen.words}")
    lines += [f"  {forward}{_figures(other)} in {way.words}" for way in choice.others[:MOST_ROWS]
              if (other := _step_of(way, str(output.name))) is not None]
    return "\n".join(lines)


def _step_of(way: Way, name: str) -> StepTime | None:
    """The step of a node, by its own name or that of a result."""
    return next((s for s in way.time.steps if s.node is not None and (
        str(s.node.name) == name or any(str(v.name) == name for v in s.node.outputs))), None)


def _arrivals(way: Way, node: ir.Node) -> Iterator[str]:
    """What is exchanged for a node before it runs."""
    for value in node.inputs:
        maker = None if value is None else value.producer()
        if maker is None or not dialect.is_communication(maker):
            continue
        step = next((s for s in way.cost.steps if s.node is maker), None)
        if step is not None:
            widths = halo_widths(maker) if dialect.is_exchange(maker) else {}
            halo = "".join(f", axis {axis} {before} before and {after} after" for axis, (before, after)
                           in widths.items())
            yield (f"{maker.name} ({maker.op_type}{halo}): at most {size_text(int(step.sent.max(initial=0)))} in "
                   f"{int(step.messages.max(initial=0))} messages of a rank")


def _figures(step: StepTime) -> str:
    worst = step.total.argmax()
    parts = (("computing", step.compute), ("messages", step.communication), ("waiting", step.wait))
    said = [f"{seconds_text(float(array.reshape(-1)[worst]))} {name}" for name, array in parts
            if float(array.reshape(-1)[worst]) > 0]
    return ", ".join(said) or "nothing to compute"
