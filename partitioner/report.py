"""What a plan looks like: a dict for programs, tables for people."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import onnx_ir as ir
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from partitioner import dialect
from partitioner.cost import PlanCost, StepCost, cells, operations_done_twice
from partitioner.geometry import hull
from partitioner.layout import AxisLayout, Layout
from partitioner.ops.nodes import operator_of
from partitioner.ops.opaque import Opaque

MANY_RANKS = 16
"""Above this many ranks the tables show extremes instead of a row for each."""

MANY_PARTS = 6
"""Above this many shards of an axis the table names only some of them."""


def plan_dict(model: ir.Model, cost: PlanCost) -> dict[str, Any]:
    """A plan as plain data: mesh, inputs, outputs, nodes, ranks, totals.

    Bytes are payload; `sent_bytes` of a node is the sum over all ranks, `peak_bytes` counts activations
    with halos and workspace, without weights.
    """
    mesh = cost.mesh
    return {
        "mesh": dict(mesh.axes),
        "ranks": mesh.size,
        "passes": list(dialect.get_passes(model)),
        "storage": dialect.get_storage(model),
        "schedule": _schedule(model),
        "inputs": [_value(v) for v in model.graph.inputs],
        "outputs": [_value(v) for v in model.graph.outputs],
        "nodes": [_node(step, cost) for step in cost.steps],
        "per_rank": _per_rank(cost),
        "totals": {
            "weight_bytes": cost.weight_bytes,
            "peak_bytes_max": int(cost.peak.max(initial=0)),
            "peak_bytes_lockstep": cost.peak_together,
            "sent_bytes": int(cost.sent.sum()),
            "messages": int(cost.messages.sum()),
            "flops": float(cost.flops.sum()),
            "flops_twice": operations_done_twice(model),
        },
        "gathered": [str(s.node.name) for s in cost.steps if is_gather(s.node)],
        "without_rule": [str(s.node.name) for s in cost.steps if is_fallback(s.node)],
        "replicated": [str(s.node.name) for s in cost.steps if replicated_axes(s.node, cost)],
    }


def _schedule(model: ir.Model) -> dict[str, Any] | None:
    """How the plan is executed depth-first: the axis, the cells of a slab per chain, strips, what rests in files."""
    schedule = dialect.get_schedule(model)
    if schedule is None:
        return None
    return {"axis": schedule.axis, "thickness": list(schedule.thickness), "strips": list(schedule.strips),
            "files": filed_values(model)}


def filed_values(model: ir.Model) -> list[str]:
    """The values that lie in mapped files from one chain to a later one."""
    values = (*model.graph.inputs, *(v for node in model.graph for v in node.outputs))
    return [str(v.name) for v in values if dialect.rests_in_file(v)]


def _value(value: ir.Value) -> dict[str, Any]:
    layout = dialect.get_layout(value)
    return {
        "name": str(value.name),
        "shape": list(layout.shape),
        "dtype": "" if value.dtype is None else value.dtype.name,
        "layout": str(layout),
        "splits": _splits(layout),
    }


def _splits(layout: Layout) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for axis, split in enumerate(layout.axes):
        if split is None:
            continue
        bounds = [[[i.start, i.stop] for i in part] for part in split.parts]
        cuts = split.cuts
        found.append({"axis": axis, "mesh_axis": split.mesh_axis, "cuts": None if cuts is None else list(cuts),
                      "parts": bounds})
    return found


def halo_widths(node: ir.Node) -> dict[int, tuple[int, int]]:
    """Largest halo before and after per axis of an exchange, over all shards; axes without one left out."""
    source, target = node.inputs[0], node.outputs[0]
    assert source is not None
    owned, needed = dialect.get_layout(source), dialect.get_layout(target)
    found: dict[int, tuple[int, int]] = {}
    for axis, (a, b) in enumerate(zip(owned.axes, needed.axes, strict=True)):
        if a is None or b is None or a.mesh_axis != b.mesh_axis:
            continue
        pairs = [(hull(p), hull(q)) for p, q in zip(a.parts, b.parts, strict=True) if p and q]
        widths = (max((p.start - q.start for p, q in pairs), default=0),
                  max((q.stop - p.stop for p, q in pairs), default=0))
        if max(widths) > 0:
            found[axis] = (max(0, widths[0]), max(0, widths[1]))
    return found


def is_gather(node: ir.Node) -> bool:
    """Whether a re-layout brings a split axis together on every rank."""
    if node.op_type != dialect.RESHARD or not dialect.is_exchange(node) or node.inputs[0] is None:
        return False
    before, after = dialect.get_layout(node.inputs[0]), dialect.get_layout(node.outputs[0])
    return bool(before.mesh_axes - after.mesh_axes)


def is_fallback(node: ir.Node) -> bool:
    """Whether a node has no rule and is computed on whole inputs by onnxruntime."""
    return not dialect.is_communication(node) and isinstance(operator_of(node), Opaque)


def replicated_axes(node: ir.Node, cost: PlanCost) -> tuple[str, ...]:
    """Mesh axes along which every rank computes the same (larger than a vector) result."""
    if dialect.is_communication(node) or dialect.get_partial(node):
        return ()
    layout = dialect.get_layout(node.outputs[0])
    is_vector = len(layout.shape) < 2 or (len(layout.shape) > 2 and all(n == 1 for n in layout.shape[2:]))
    if is_vector:
        return ()
    return tuple(n for n in cost.mesh.names if cost.mesh.count(n) > 1 and n not in layout.mesh_axes)


def _node(step: StepCost, cost: PlanCost) -> dict[str, Any]:
    node = step.node
    value = node.outputs[0]
    layout = dialect.get_layout(value)
    found: dict[str, Any] = {
        "name": str(node.name),
        "op": node.op_type,
        "shape": list(layout.shape),
        "layout": str(layout),
        "splits": _splits(layout),
        "largest_part": int(cells(layout, cost.mesh).max(initial=0)),
        "sent_bytes": int(step.sent.sum()),
        "sent_bytes_max": int(step.sent.max(initial=0)),
        "messages": int(step.messages.sum()),
        "live_bytes_max": int(step.live.max(initial=0)),
        "flops": float(step.flops.sum()),
    }
    if dialect.is_exchange(node):
        assert node.inputs[0] is not None
        found["owned"] = str(dialect.get_layout(node.inputs[0]))
        found["needed"] = str(layout)
        found["halo"] = {str(axis): list(widths) for axis, widths in halo_widths(node).items()}
        found["gather"] = is_gather(node)
        found["overlapped"] = dialect.is_overlapped(node)
    found["replicated"] = list(replicated_axes(node, cost))
    return found


def _per_rank(cost: PlanCost) -> list[dict[str, Any]]:
    if cost.mesh.size > 4096:
        return []
    peak, sent = cost.peak.reshape(-1), cost.sent.reshape(-1)
    received, messages, flops = cost.received.reshape(-1), cost.messages.reshape(-1), cost.flops.reshape(-1)
    return [
        {"rank": r, "at": cost.mesh.coordinates(r), "peak_bytes": int(peak[r]), "sent_bytes": int(sent[r]),
         "received_bytes": int(received[r]), "messages": int(messages[r]), "flops": float(flops[r])}
        for r in cost.mesh
    ]


def size_text(count: float) -> str:
    """Bytes with a binary unit: 1536 -> `1.5 KiB`."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def seconds_text(value: float) -> str:
    """A time with three digits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value * 1e6:.3g} us"


def render(model: ir.Model, cost: PlanCost) -> Group:
    """The plan as tables: nodes, ranks, totals, and what is gathered or replicated."""
    return Group(_node_table(cost), _rank_table(cost), *_remarks(model, cost))


def short_layout(layout: Layout) -> str:
    """A layout for a table: long lists of shards are cut short."""
    items = [str(n) if axis is None else _short_axis(axis) for n, axis in zip(layout.shape, layout.axes, strict=True)]
    return "[" + ", ".join(items) + "]"


def _short_axis(axis: AxisLayout) -> str:
    name, _, body = str(axis).partition("(")
    mark = "|" if axis.cuts is not None else " "
    parts = body.removesuffix(")").split(mark)
    if len(parts) > MANY_PARTS:
        parts = [*parts[:3], "...", parts[-1]]
    return f"{name}({mark.join(parts)})"


def _layout_text(node: ir.Node) -> str:
    """The layout of a node's result; for an exchange what is owned before and needed after, where they differ."""
    target = dialect.get_layout(node.outputs[0])
    if not dialect.is_exchange(node) or node.inputs[0] is None:
        return short_layout(target)
    pairs = zip(dialect.get_layout(node.inputs[0]).axes, target.axes, strict=True)
    changes = [f"axis {i} {'whole' if a is None else _short_axis(a)} -> {'whole' if b is None else _short_axis(b)}"
               for i, (a, b) in enumerate(pairs) if a != b]
    return "\n".join(changes)


def _node_table(cost: PlanCost) -> Table:
    table = Table(title=f"plan for {cost.mesh.size} ranks ({cost.mesh})", title_justify="left", pad_edge=False)
    for name, justify in (("node", "left"), ("operator", "left"), ("owned, or owned -> needed", "left"),
                          ("halo", "left"), ("sent", "right"), ("messages", "right"), ("live, max", "right")):
        table.add_column(name, justify=justify, overflow="fold")  # pyright: ignore[reportArgumentType]
    for step in cost.steps:
        node = step.node
        halo = ""
        style = "dim" if dialect.is_communication(node) else ""
        if dialect.is_exchange(node):
            halo = ", ".join(f"axis {a}: {lo}+{hi}" for a, (lo, hi) in halo_widths(node).items())
            halo += ", overlapped" if dialect.is_overlapped(node) else ""
            style = "cyan"
        if is_gather(node):
            halo, style = "GATHERED", "bold red"
        elif is_fallback(node):
            halo, style = "NO RULE: REPLICATED", "bold red"
        elif replicated_axes(node, cost):
            halo, style = f"REPLICATED over {','.join(replicated_axes(node, cost))}", "yellow"
        sent, messages = int(step.sent.sum()), int(step.messages.sum())
        table.add_row(str(node.name), node.op_type, Text(_layout_text(node)), halo,
                      size_text(sent) if sent else "", str(messages) if messages else "",
                      "" if cost.slab_peak is not None else size_text(int(step.live.max(initial=0))), style=style)
    return table


def _rank_table(cost: PlanCost) -> Table:
    table = Table(title="per rank", title_justify="left", pad_edge=False)
    for name in ("rank", "at", "peak activations", "sent", "received", "messages", "GFLOP"):
        table.add_column(name, justify="left" if name in ("rank", "at") else "right")
    columns = [a.reshape(-1) for a in (cost.peak, cost.sent, cost.received, cost.messages, cost.flops)]
    if cost.mesh.size <= MANY_RANKS:
        for rank in cost.mesh:
            at = ",".join(f"{k}={v}" for k, v in cost.mesh.coordinates(rank).items())
            table.add_row(str(rank), at, *_figures([float(c[rank]) for c in columns]))
        return table
    for label, choose in (("least", np.min), ("median", np.median), ("most", np.max)):
        table.add_row(label, "", *_figures([float(choose(c)) for c in columns]))
    return table


def _figures(row: list[float]) -> list[str]:
    peak, sent, received, messages, flops = row
    return [size_text(peak), size_text(sent), size_text(received), f"{messages:.0f}", f"{flops / 1e9:.2f}"]


def _twice(cost: PlanCost, model: ir.Model) -> str:
    """What part of all operations is done by both sides of a cut, in per cent."""
    twice = operations_done_twice(model)
    return f"{100 * twice / max(1.0, float(cost.flops.sum()) - twice):.1f} %"


def _remarks(model: ir.Model, cost: PlanCost) -> list[Text]:
    lines = [Text(f"weights {size_text(cost.weight_bytes)} on every rank; sent in all "
                  f"{size_text(int(cost.sent.sum()))} in {int(cost.messages.sum())} messages; "
                  f"all ranks in one process: {size_text(cost.peak_together)} of activations")]
    schedule, filed = dialect.get_schedule(model), filed_values(model)
    if schedule is not None:
        thickness = sorted(set(schedule.thickness))
        strips = " x ".join(f"{cost.mesh.count(name)} along {name}" for name in schedule.strips)
        lines.append(Text(f"depth-first along {schedule.axis}: {len(schedule.thickness)} chains in slabs of "
                          f"{' or '.join(map(str, thickness))} cells, "
                          + (f"{strips} strips one after the other, {_twice(cost, model)} more operations near "
                             "their cuts; " if strips else "nothing computed twice; ")
                          + f"resting in files: {', '.join(filed) or 'nothing'}"))
    for step in cost.steps:
        if is_gather(step.node):
            value = step.node.inputs[0]
            lines.append(Text(f"GATHERED: {value.name if value else ''} for "
                              f"{', '.join(sorted({str(u.node.name) for u in step.node.outputs[0].uses()}))}, "
                              f"{size_text(int(step.sent.sum()))} on the wire", style="bold red"))
        elif is_fallback(step.node):
            lines.append(Text(f"NO RULE: {step.node.name} ({step.node.op_type}) runs whole on every rank, by "
                              f"onnxruntime; {size_text(int(step.workspace.max(initial=0)))} there "
                              "(--strict refuses it)",
                              style="bold red"))
    return lines


def to_text(renderable: Any, width: int = 160) -> str:
    """A rich renderable as plain text."""
    buffer = io.StringIO()
    Console(file=buffer, width=width, no_color=True, highlight=False).print(renderable)
    return buffer.getvalue()
