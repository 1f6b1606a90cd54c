"""merge-exchanges: one exchange per value, and none that feeds another.

    before                                    after
    a = HaloExchange(x)  depth(0:62 ...)      h = HaloExchange(x)  owned and all that anyone needs
    y = Conv(a)                               y = Conv(h)
    b = HaloExchange(x)  depth(0:63 ...)      z = Conv(h)
    z = Conv(b)                               p = MaxPool(h)
    p = MaxPool(x)

The merged value holds what was owned too, so later uses read it and x itself need not be kept.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from partitioner import dialect
from partitioner.layout import AxisLayout, Layout
from passes.base import Check, Pass
from passes.checks import EXCHANGES, MET, NO_CHAIN, holds
from passes.rewrite import Namer


@dataclass(frozen=True)
class MergeExchanges(Pass):
    """Fewest messages: merge the halo exchanges of one value and equal re-layouts."""

    name: ClassVar[str] = "merge-exchanges"
    requires: ClassVar[tuple[Check, ...]] = (MET, EXCHANGES)
    ensures: ClassVar[tuple[Check, ...]] = (NO_CHAIN,)

    def apply(self, model: ir.Model) -> None:
        _merge_reshards(model.graph)
        _shorten_chains(model.graph)
        _merge_halos(model.graph)
        dialect.declare(model)


def _of_type(graph: ir.Graph, op_type: str) -> dict[ir.Value, list[ir.Node]]:
    """Exchanges of one type by the value that they read, in the graph's order."""
    found: defaultdict[ir.Value, list[ir.Node]] = defaultdict(list)
    for node in graph:
        if dialect.is_exchange(node) and node.op_type == op_type and node.inputs[0] is not None:
            found[node.inputs[0]].append(node)
    return found


def _merge_reshards(graph: ir.Graph) -> None:
    for nodes in _of_type(graph, dialect.RESHARD).values():
        kept: dict[Layout, ir.Node] = {}
        for node in nodes:
            first = kept.setdefault(dialect.get_layout(node.outputs[0]), node)
            if first is not node:
                node.outputs[0].replace_all_uses_with(first.outputs[0])
                graph.remove(node, safe=True)


def _shorten_chains(graph: ir.Graph) -> None:
    """A halo exchange of a re-laid-out value starts from the original instead."""
    for value, nodes in _of_type(graph, dialect.HALO_EXCHANGE).items():
        producer = value.producer()
        if producer is None or not dialect.is_exchange(producer):
            continue
        for node in nodes:
            node.replace_input_with(0, producer.inputs[0])
        if not value.uses() and not value.is_graph_output():
            graph.remove(producer, safe=True)


def _merge_halos(graph: ir.Graph) -> None:
    namer, position = Namer(graph), {node: index for index, node in enumerate(graph)}
    for value, nodes in _of_type(graph, dialect.HALO_EXCHANGE).items():
        groups = _same_mesh_axes(dialect.get_layout(value), nodes)
        for target, members in groups:
            name = namer(f"{value.name}/halo")
            merged = dialect.new_exchange(dialect.HALO_EXCHANGE, value, target, name)
            graph.insert_before(members[0], merged)
            first = position[members[0]]
            _redirect(graph, value, merged, members, {u.node for u in value.uses() if position.get(u.node, 0) > first})


def _same_mesh_axes(owned: Layout, nodes: list[ir.Node]) -> list[tuple[Layout, list[ir.Node]]]:
    """Exchanges that split the same axes alike, with the union of what they and the owner hold."""
    groups: dict[tuple[str | None, ...], tuple[Layout, list[ir.Node]]] = {}
    for node in nodes:
        target = dialect.get_layout(node.outputs[0])
        key = tuple(None if a is None else a.mesh_axis for a in target.axes)
        start, members = groups.get(key, (_join(target, owned), []))
        groups[key] = (_join(start, target), [*members, node])
    return list(groups.values())


def _join(left: Layout, right: Layout) -> Layout:
    axes: list[AxisLayout | None] = []
    for a, b in zip(left.axes, right.axes, strict=True):
        if a is None or b is None or a.mesh_axis != b.mesh_axis:
            axes.append(a)
        else:
            axes.append(a.joined(b))
    return Layout(left.shape, tuple(axes))


def _redirect(graph: ir.Graph, value: ir.Value, merged: ir.Node, members: list[ir.Node], later: set[ir.Node]) -> None:
    """Let all later readers that find what they need in the merged value read it."""
    for node in members:
        node.outputs[0].replace_all_uses_with(merged.outputs[0])
        graph.remove(node, safe=True)
    if not holds(dialect.get_layout(merged.outputs[0]), dialect.get_layout(value)):
        return
    for use in list(value.uses()):
        node = use.node
        if node in later and not dialect.is_communication(node) and not dialect.get_partial(node):
            node.replace_input_with(use.idx, merged.outputs[0])
