"""What the page shows, as plain data: figures of few ranks where there are many, layouts as numbers of tables.

Everything is stored per axis or per step, so that 1000 nodes on 4096 ranks are some hundred kilobytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
import onnx_ir as ir

from partitioner import dialect
from partitioner.cost import PlanCost, StepCost
from partitioner.errors import PartitionError
from partitioner.exchange import IntArray
from partitioner.page.tables import Tables
from partitioner.report import halo_widths, is_fallback, is_gather, plan_dict, replicated_axes, short_layout

LISTED_RANKS = 4096
"""Up to this many ranks the totals of each are on the page."""

FOLLOWED_RANKS = 32
"""Up to this many ranks the memory of each is followed over the steps; of more, that of a few."""

_KINDS = {dialect.HALO_EXCHANGE: "halo", dialect.RESHARD: "reshard"}


class Alternative(TypedDict, total=False):
    """Another way to partition the same model, a row of the page's table; only `mesh` must be there.

    Keys:
        mesh: as the command takes it, `depth=2,height=2`.
        seconds: forecast time of a run.
        peak_bytes: activations of the rank that holds most.
        sent_bytes: payload sent by all ranks together.
        messages: messages of all ranks together.
        chosen: whether it is the plan that the page shows.
        note: a few words, such as why it was not chosen.
    """

    mesh: str
    seconds: float
    peak_bytes: int
    sent_bytes: int
    messages: int
    chosen: bool
    note: str


def page_data(model: ir.Model, cost: PlanCost, name: str = "", alternatives: Sequence[Alternative] = (),
              explain: str = "") -> dict[str, Any]:
    """All that the page shows of a plan.

    Args:
        name: what the heading calls the model; the graph's name otherwise.
        alternatives: other partitions of the model, best first.
        explain: why this one was chosen; paragraphs with blank lines between them.

    Raises:
        PartitionError: when an alternative has no mesh, a key that is unknown, or a figure that is no number.
    """
    plan = plan_dict(model, cost)
    tables = Tables(model)
    items = [*(_input(v, tables) for v in model.graph.inputs if v.name not in model.graph.initializers),
             *(_node(step, cost, tables) for step in cost.steps)]
    _connect(model, items)
    return {
        "name": name or str(model.graph.name or "model"),
        "mesh": [list(axis) for axis in cost.mesh.axes],
        "ranks": cost.mesh.size,
        "schedule": plan["schedule"],
        "inputs": [{"name": v["name"], "shape": v["shape"], "dtype": v["dtype"]} for v in plan["inputs"]],
        "outputs": [{"name": v["name"], "shape": v["shape"], "dtype": v["dtype"]} for v in plan["outputs"]],
        "totals": plan["totals"],
        "remarks": list(_remarks(cost)),
        "items": items,
        "layouts": tables.layouts,
        "axes": tables.axes,
        "per_rank": _per_rank(cost),
        "memory": _memory(cost),
        "alternatives": [_checked(a, i) for i, a in enumerate(alternatives)],
        "explain": explain,
    }


def _input(value: ir.Value, tables: Tables) -> dict[str, Any]:
    layout = dialect.get_layout(value)
    return {"name": str(value.name), "op": "Input", "kind": "input", "layout": tables.number(layout),
            "text": short_layout(layout)}


def _node(step: StepCost, cost: PlanCost, tables: Tables) -> dict[str, Any]:
    """A node with its figures; what is zero is left out."""
    node = step.node
    layout = dialect.get_layout(node.outputs[0])
    found: dict[str, Any] = {"name": str(node.name), "op": node.op_type, "kind": _kind(node, cost),
                             "layout": tables.number(layout), "text": short_layout(layout)}
    if dialect.is_exchange(node) and node.inputs[0] is not None:
        owned = dialect.get_layout(node.inputs[0])
        found |= {"owned": tables.number(owned), "owned_text": short_layout(owned)}
        found["halo"] = {str(axis): list(widths) for axis, widths in halo_widths(node).items()}
        found |= {"overlapped": True} if dialect.is_overlapped(node) else {}
    live = 0 if cost.slab_peak is not None else int(step.live.max(initial=0))
    figures = {"sent": int(step.sent.sum()), "sent_max": int(step.sent.max(initial=0)), "live": live,
               "messages": int(step.messages.sum()), "flops": _number(float(step.flops.sum()))}
    return found | {key: figure for key, figure in figures.items() if figure}


def _kind(node: ir.Node, cost: PlanCost) -> str:
    if is_gather(node):
        return "gather"
    if dialect.is_exchange(node):
        return _KINDS.get(node.op_type, "reshard")
    if dialect.is_all_reduce(node):
        return "reduce"
    if is_fallback(node):
        return "fallback"
    return "replicated" if replicated_axes(node, cost) else "compute"


def _connect(model: ir.Model, items: list[dict[str, Any]]) -> None:
    """Give every item the numbers of those that it reads."""
    inputs = [v for v in model.graph.inputs if v.name not in model.graph.initializers]
    made = {v: i for i, v in enumerate(inputs)}
    for number, node in enumerate(model.graph, start=len(inputs)):
        reads = dict.fromkeys(made[v] for v in node.inputs if v is not None and v in made)
        if reads:
            items[number]["reads"] = list(reads)
        made |= dict.fromkeys(node.outputs, number)


def _remarks(cost: PlanCost) -> list[dict[str, Any]]:
    """What is gathered, or computed on more ranks than one, with its cost."""
    found: list[dict[str, Any]] = []
    for step in cost.steps:
        node = step.node
        if is_gather(node):
            users = sorted({str(use.node.name) for use in node.outputs[0].uses()})
            found.append({"kind": "gather", "name": str(node.name), "users": users, "sent": int(step.sent.sum())})
        elif is_fallback(node):
            found.append({"kind": "fallback", "name": str(node.name), "op": node.op_type,
                          "workspace": int(step.workspace.max(initial=0))})
        elif axes := replicated_axes(node, cost):
            copies = math.prod(cost.mesh.count(axis) for axis in axes)
            found.append({"kind": "replicated", "name": str(node.name), "op": node.op_type, "axes": list(axes),
                          "copies": copies, "flops": _number(float(step.flops.sum()) * (1 - 1 / copies))})
    return found


def _per_rank(cost: PlanCost) -> dict[str, list[Any]]:
    """The totals of every rank, or of none where there are very many."""
    if cost.mesh.size > LISTED_RANKS:
        return {}
    figures = {"peak": cost.peak, "sent": cost.sent, "received": cost.received, "messages": cost.messages}
    flops = [_number(f) for f in np.broadcast_to(cost.flops, cost.mesh.shape).reshape(-1).tolist()]
    return {**{key: array.reshape(-1).tolist() for key, array in figures.items()}, "flops": flops}


def _memory(cost: PlanCost) -> dict[str, Any] | None:
    """Bytes of activations per step: of some ranks, and the least and most over all; None for slabs."""
    if cost.slab_peak is not None:
        return None
    live = [step.live.reshape(-1) for step in cost.steps]
    ranks = _followed(cost)
    return {
        "largest": int(cost.peak.reshape(-1).argmax()) if cost.steps else 0,
        "ranks": ranks,
        "live": [[int(array[rank]) for array in live] for rank in ranks],
        "most": [int(array.max()) for array in live],
        "least": [int(array.min()) for array in live],
    }


def _followed(cost: PlanCost) -> list[int]:
    """All ranks, or the first, the middle one, the last, and those with extreme figures."""
    if cost.mesh.size <= FOLLOWED_RANKS:
        return list(cost.mesh)
    middle = cost.mesh.rank({name: count // 2 for name, count in cost.mesh.axes})
    extremes: list[IntArray] = [cost.peak, -cost.peak, cost.sent, -cost.sent]
    return sorted({0, middle, cost.mesh.size - 1, *(int(a.reshape(-1).argmax()) for a in extremes)})


def _number(value: float) -> int | float | None:
    """A number as JSON has it, short where it is whole."""
    if not math.isfinite(value):
        return None
    return int(value) if value == int(value) else value


def _checked(given: Mapping[str, Any], index: int) -> dict[str, Any]:
    unknown = sorted(set(given) - set(Alternative.__annotations__))
    if unknown or not isinstance(given.get("mesh"), str):
        what = f"does not know {', '.join(unknown)}" if unknown else "has no mesh"
        raise PartitionError(f"alternative {index}: {what}; the keys are {', '.join(Alternative.__annotations__)}")
    wrong = [key for key in ("seconds", "peak_bytes", "sent_bytes", "messages")
             if key in given and not isinstance(given[key], int | float)]
    if wrong:
        raise PartitionError(f"alternative {index}: {wrong[0]}={given[wrong[0]]!r} is no number")
    return {key: _number(value) if isinstance(value, float) else value for key, value in given.items()}
