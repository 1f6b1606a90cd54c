"""insert-reshards: an operator's inputs lie along the mesh axes that it needs.

    before                                    after
    x [1, 8, depth(0|3|5)]                    x [1, 8, depth(0|3|5)]
    y = Flatten(x)                            r = Reshard(x)    [1, 8, 5]      gathered: shown in the plan
                                              y = Flatten(r)

Where one cell of a split axis is chosen, it is cut out first, and only it is brought to all:

    y = Gather(x, 2)  axis=2                  c = Gather(x, [2])   [1, 8, depth(0|1|1)]
                                              r = Reshard(c)       [1, 8, 1]
                                              y = Gather(r, 0)  axis=2

Reductions over sharded axes are left alone (they are split into partial results instead); of inputs that are
contracted, the others follow the first one that is sharded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from partitioner import dialect
from partitioner.layout import AxisLayout, Layout, even_cuts
from partitioner.ops.nodes import data_needs, forget, operator_of
from partitioner.ops.standard.gather import Gather
from passes.assign_shards import assign_new
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
            _cut_out(model.graph, node, namer)
            for index, value, want in list(data_needs(node, split=True)):
                if same_mesh_axes(dialect.get_layout(value), want):
                    continue
                target = _disjoint(dialect.get_layout(value), want)
                reshard = dialect.new_exchange(dialect.RESHARD, value, target, namer(f"{value.name}/reshard"))
                model.graph.insert_before(node, reshard)
                node.replace_input_with(index, reshard.outputs[0])
        dialect.declare(model)


def _cut_out(graph: ir.Graph, node: ir.Node, namer: Namer) -> None:
    """Let a Gather of one known cell of a split axis read that cell, kept by the rank that has it."""
    operator, data = operator_of(node), node.inputs[0] if node.inputs else None
    if not isinstance(operator, Gather) or operator.cells is None or operator.index_shape or data is None:
        return
    if dialect.get_layout(data).axes[operator.axis] is None:
        return
    (cell,) = operator.cells
    part = ir.Node("", "Gather", [data, _indices(graph, namer(f"{node.name}/cell"), [cell])],
                   [ir.AttrInt64("axis", operator.axis)], name=namer(f"{node.name}/part"))
    graph.insert_before(node, part)
    (value,) = part.outputs
    value.name = namer(f"{data.name}/part")
    value.shape, value.type = ir.Shape(operator_of(part).outputs[0].shape), data.type
    assign_new(part)
    node.replace_input_with(0, value)
    node.replace_input_with(1, _indices(graph, namer(f"{node.name}/first"), 0))
    forget(node)


def _indices(graph: ir.Graph, name: str, cells: int | list[int]) -> ir.Value:
    tensor = ir.tensor(np.asarray(cells, np.int64), name=name)
    made = ir.Value(name=name, shape=ir.Shape(np.shape(cells)), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(made)
    return made


def _disjoint(have: Layout, want: Layout) -> Layout:
    """Shards without overlap along the mesh axes that are wanted."""
    axes: list[AxisLayout | None] = []
    for a, b, n in zip(have.axes, want.axes, want.shape, strict=True):
        if b is None or (a is not None and a.mesh_axis == b.mesh_axis):
            axes.append(None if b is None else a)
        else:
            axes.append(AxisLayout.from_cuts(b.mesh_axis, even_cuts(n, len(b.parts))))
    return Layout(want.shape, tuple(axes))
