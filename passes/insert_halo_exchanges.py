"""insert-halo-exchanges: every rank holds what its part of every node needs.

    before                                    after
    x [1, 8, depth(0|61|121)]                 h = HaloExchange(x)   depth(0:62 60:121)
    y = Conv(x)  kernel 3                     y = Conv(h)

The needs are computed from the operators' interval maps; a value that is needed in several ways gets one
exchange per way here, which the next pass merges.  Where everyone holds what it needs, none is put in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from partitioner import dialect
from partitioner.ops.nodes import data_needs
from passes.base import Check, Pass
from passes.checks import AGREE, EXCHANGES, MET, SPLIT, compute_nodes, holds
from passes.rewrite import Namer


@dataclass(frozen=True)
class InsertHaloExchanges(Pass):
    """Put a HaloExchange before every use that needs more than its rank owns."""

    name: ClassVar[str] = "insert-halo-exchanges"
    requires: ClassVar[tuple[Check, ...]] = (AGREE, SPLIT)
    ensures: ClassVar[tuple[Check, ...]] = (MET, EXCHANGES)

    def apply(self, model: ir.Model) -> None:
        namer = Namer(model.graph)
        for node in list(compute_nodes(model)):
            for index, value, want in list(data_needs(node)):
                if holds(dialect.get_layout(value), want):
                    continue
                exchange = dialect.new_exchange(dialect.HALO_EXCHANGE, value, want, namer(f"{value.name}/halo"))
                model.graph.insert_before(node, exchange)
                node.replace_input_with(index, exchange.outputs[0])
        dialect.declare(model)
