"""overlap-halos: let messages travel while the interior of their first reader is computed.

    before                                   after
    h = HaloExchange(x)  halo depth -1+1     h = HaloExchange(x)  halo depth -1+1, overlapped
    y = Conv(h)                              y = Conv(h)

    send, wait, compute y                    send, compute what needs no halo, wait, compute the rest of y

The nodes stay as they are: a mark on the exchange says so, and `localise` makes the steps (see `partitioner.interior`).
A reader that has no interior on any rank, that only looks at its input's memory or that takes statistics is left
alone, and so is a plan that is executed depth-first.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from partitioner import dialect
from partitioner.errors import refuse_all
from partitioner.interior import can_overlap
from passes.base import Check, Pass
from passes.checks import MET, NO_CHAIN, OVERLAPS, SCHEDULED


@dataclass(frozen=True)
class OverlapHalos(Pass):
    """Compute interiors while messages travel.

    Args:
        exchanges: names of the halo exchanges for which that is done; None for all for which it can be done.
    """

    name: ClassVar[str] = "overlap-halos"
    requires: ClassVar[tuple[Check, ...]] = (MET, NO_CHAIN, SCHEDULED)
    ensures: ClassVar[tuple[Check, ...]] = (OVERLAPS,)

    exchanges: Collection[str] | None = None

    def apply(self, model: ir.Model) -> None:
        """Mark them.

        Raises:
            PartitionError: for a name that no halo exchange has.
        """
        known = {node.name for node in model.graph if dialect.is_exchange(node)}
        refuse_all([f"overlapped exchange '{name}': the network has no halo exchange of this name, as it is laid out; "
                    "`partition plan` lists the names" for name in sorted(set(self.exchanges or ()) - known)])
        if dialect.get_schedule(model) is not None:
            return
        for overlap in can_overlap(model):
            for exchange in overlap.exchanges:
                dialect.set_overlapped(exchange, self.exchanges is None or exchange.name in self.exchanges)
