"""join-exchanges: several values in the messages of one exchange.

    before                                    after
    g = HaloExchange(a)                       g = HaloExchange(a)
    h = HaloExchange(b)                       h = HaloExchange(b)      in the messages of g
    y = ConcatConv(g, w, bias, h, v)          y = ConcatConv(g, w, bias, h, v)

An exchange joins one that sends between the same ranks, or more, if its value is there by then and its halo lies in the
value's own memory: it is moved up to it.  What is overlapped waits for messages of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from partitioner import dialect
from partitioner.exchange import Exchange, plan_exchange
from partitioner.lifetime import shared_buffers
from passes.base import Check, Pass
from passes.checks import JOINED, MET, NO_CHAIN, OVERLAPS, SCHEDULED


@dataclass(frozen=True)
class JoinExchanges(Pass):
    """Fewer messages: let exchanges of different values travel together."""

    name: ClassVar[str] = "join-exchanges"
    requires: ClassVar[tuple[Check, ...]] = (MET, NO_CHAIN, SCHEDULED)
    ensures: ClassVar[tuple[Check, ...]] = (OVERLAPS, JOINED)

    def apply(self, model: ir.Model) -> None:
        if dialect.get_schedule(model) is not None:
            return
        graph, mesh = model.graph, dialect.get_mesh(model)
        nodes = list(graph)
        position = {node: index for index, node in enumerate(nodes)}
        shared = shared_buffers(nodes)
        group: list[ir.Node] = []
        told: Exchange | None = None
        for previous, node in zip([None, *nodes], nodes, strict=False):
            if not _is_halo(node) or dialect.is_overlapped(node):
                continue
            source, target = node.inputs[0], node.outputs[0]
            assert source is not None
            plan = plan_exchange(mesh, dialect.get_layout(source), dialect.get_layout(target))
            can_move = previous in group or shared.get(str(source.name)) == str(target.name)
            if told is None or not plan.goes_with(told) or not can_move or _born(source, position) > position[group[0]]:
                group, told = [node], plan
                continue
            dialect.set_joined(node, str(group[0].name))
            graph.remove(node)
            graph.insert_after(group[-1], node)
            group.append(node)


def _is_halo(node: ir.Node) -> bool:
    return dialect.is_exchange(node) and node.op_type == dialect.HALO_EXCHANGE


def _born(value: ir.Value, position: Mapping[ir.Node, int]) -> int:
    """Where a value comes into being; inputs are read just before their first use."""
    maker = value.producer()
    return min(position[use.node] for use in value.uses()) if maker is None else position[maker]
