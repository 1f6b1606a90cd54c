"""insert-reshards: an operator's inputs lie along the mesh axes that it needs.

    before                                    after
    x [1, 8, depth(0|3|5)]                    x [1, 8, depth(0|3|5)]
    y = Flatten(x)                            r = Reshard(x)    [1, 8, 5]      gathered: shown in the plan
                                              y = Flatten(r)

Reductions over sharded axes are left alone (they are split into partial results instead); of inputs that are
contracted, the others follow the first one that is sharded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from partitioner import dialect
from partitioner.layout import AxisLayout, Layout, even_cuts
from partitioner.ops.nodes import data_needs
from passes.base import Check, Pass
from passes.checks import AGREE, COVER, KNOWN, LAID_OUT, compute_nodes, same_mesh_axes
from passes.rewrite import Namer


@dataclass(frozen=True)
class InsertReshards(Pass):
    """Re-lay out inputs whose split axes an operator needs whole or along another mesh axis."""

    name: ClassVar[str] = "insert-reshards"
    requires: ClassVar[tuple[Check, ...]] = (LAID_OUT, COVER, KNOWN)
    ensures: ClassVar[tuple[Check, ...]] = (AGREE,)

    def apply(self, model: ir.Model) -> None:
        namer = Namer(model.graph)
        for node in list(compute_nodes(model)):
            for index, value, want in list(data_needs(node, split=True)):
                if same_mesh_axes(dialect.get_layout(value), want):
                    continue
                target = _disjoint(dialect.get_layout(value), want)
                reshard = dialect.new_exchange(dialect.RESHARD, value, target, namer(f"{value.name}/reshard"))
                model.graph.insert_before(node, reshard)
                node.replace_input_with(index, reshard.outputs[0])
        dialect.declare(model)


def _disjoint(have: Layout, want: Layout) -> Layout:
    """Shards without overlap along the mesh axes that are wanted."""
    axes: list[AxisLayout | None] = []
    for a, b, n in zip(have.axes, want.axes, want.shape, strict=True):
        if b is None or (a is not None and a.mesh_axis == b.mesh_axis):
            axes.append(None if b is None else a)
        else:
            axes.append(AxisLayout.from_cuts(b.mesh_axis, even_cuts(n, len(b.parts))))
    return Layout(want.shape, tuple(axes))
