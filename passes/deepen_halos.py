"""deepen-halos: compute more than is owned, so that several layers share one exchange.

    before                                       after
    x [1, 8, depth(0|60|121)]                    x [1, 8, depth(0|60|121)]
    y = Conv(x)   depth(0|60|121)                y = Conv(x)   depth(0:61 59:121)      computed twice near the cut
    z = Conv(y)   depth(0|60|121)                z = Conv(y)   depth(0|60|121)         no exchange of y is needed

A value that is deepened holds all that its readers need, along every axis: exchanges start from disjoint shards.  It
cannot be when it leaves the graph, is exchanged or gathered anyway, or goes into a statistic: there every cell counts
once.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from partitioner import dialect
from partitioner.errors import refuse_all
from partitioner.layout import AxisLayout
from partitioner.ops.nodes import needed_layout
from partitioner.strips import can_deepen
from passes.base import Check, Pass
from passes.checks import AGREE, LAID_OUT, SPLIT, holds


@dataclass(frozen=True)
class DeepenHalos(Pass):
    """Let ranks compute the halos of some values themselves.

    Args:
        axes: mesh axes along which that is done.
        values: names of the values; None for all for which it can be done.
    """

    name: ClassVar[str] = "deepen-halos"
    requires: ClassVar[tuple[Check, ...]] = (LAID_OUT, AGREE, SPLIT)
    ensures: ClassVar[tuple[Check, ...]] = (AGREE, SPLIT)

    axes: tuple[str, ...]
    values: Collection[str] | None = None

    def apply(self, model: ir.Model) -> None:
        """Deepen them, the last one first: what it needs more of, those before it hold.

        Raises:
            PartitionError: for a name that no value has.
        """
        known = {value.name for node in model.graph for value in node.outputs} | {v.name for v in model.graph.inputs}
        refuse_all([f"deepened value '{name}': the network has no value of this name, as it is laid out; "
                    "`partition plan` lists the names" for name in sorted(set(self.values or ()) - known)])
        for node in reversed(list(model.graph)):
            for value in node.outputs:
                self._deepen(value)
        for value in model.graph.inputs:
            self._deepen(value)

    def _deepen(self, value: ir.Value) -> None:
        if self.values is not None and value.name not in self.values:
            return
        layout = dialect.get_layout(value)
        for axis, split in enumerate(layout.axes):
            if split is not None and split.mesh_axis in self.axes and can_deepen(value, axis):
                layout = layout.with_axis(axis, _held(value, axis, split))
        if layout == dialect.get_layout(value):
            return
        wants = (needed_layout(use.node, use.idx) for use in value.uses())
        if all(want is None or holds(layout, want) for want in wants):
            dialect.set_layout(value, layout)


def _held(value: ir.Value, axis: int, split: AxisLayout) -> AxisLayout:
    """Per coordinate its own cells and those that it needs, in one piece."""
    found = split
    for use in value.uses():
        want = needed_layout(use.node, use.idx)
        wanted = None if want is None else want.axes[axis]
        if wanted is not None:
            found = found.joined(wanted)
    return found.in_one_piece
