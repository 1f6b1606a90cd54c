"""schedule: the order of steps and the order of axes in storage.

    before                                    after
    nodes in the file's order                 nodes in an order that frees large values early
                                              storage order in the model's metadata

Whole-shard steps, one per node, or chains of nodes that take turns along a rolled axis.  An exchange stands
directly before the first node that reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import onnx_ir as ir

from partitioner import dialect
from partitioner.rolling import order_stages
from passes.base import Check, Pass
from passes.checks import MET, NO_CHAIN, SCHEDULED, SPLIT

Storage = Literal["channels_last", "channels_first"]


@dataclass(frozen=True)
class Schedule(Pass):
    """Order the steps.

    Args:
        storage: axis order of activations in memory; channels_last keeps slabs of the first spatial
            axis dense and is the faster order of CPU convolutions.
        rolled: a mesh axis of one rank along which chains of nodes take turns, slab by slab; they stand side by side.
        thickness: cells of a slab, until `partitioner.schedules` chooses others.
        strips: mesh axes whose shards are strips of one rank.
    """

    name: ClassVar[str] = "schedule"
    requires: ClassVar[tuple[Check, ...]] = (MET, NO_CHAIN, SPLIT)
    ensures: ClassVar[tuple[Check, ...]] = (SCHEDULED,)

    storage: Storage = "channels_last"
    rolled: str | None = None
    thickness: int = 16
    strips: tuple[str, ...] = ()

    def apply(self, model: ir.Model) -> None:
        graph = model.graph
        graph.sort()
        nodes = list(graph)
        position = {node: index for index, node in enumerate(nodes)}
        for node in filter(dialect.is_exchange, nodes):
            _sink(graph, node, position)
        dialect.set_storage(model, self.storage)
        if self.rolled is not None:
            stages = order_stages(list(graph), self.rolled, self.strips)
            _rearrange(graph, [node for stage in stages for node in stage.nodes])
            chains = sum(stage.is_chain for stage in stages)
            dialect.set_schedule(model, dialect.Schedule(self.rolled, (self.thickness,) * chains, self.strips))


def _rearrange(graph: ir.Graph, order: list[ir.Node]) -> None:
    graph.remove(order)
    graph.extend(order)


def _sink(graph: ir.Graph, exchange: ir.Node, position: Mapping[ir.Node, int]) -> None:
    """Move an exchange down to its first reader, so that its copy lives no longer than needed.

    Args:
        position: of the nodes before exchanges were moved; no exchange reads another one's result.
    """
    readers = [use.node for use in exchange.outputs[0].uses()]
    if readers:
        graph.remove(exchange)
        graph.insert_before(min(readers, key=position.__getitem__), exchange)
