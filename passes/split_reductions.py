"""split-reductions: what reduces over sharded axes becomes local partial, AllReduce, local finish.

    before                                    after
    y = InstanceNormalization(x, s, b)        n, m, q = Moments(x)              of this shard
                                              n, m, q = AllReduceMoments(n, m, q)
                                              y = Normalize(x, n, m, q, s, b)
    y = ReduceMean(x, axes)                   t = ReduceSum(x, axes)            of this shard
                                              t = AllReduce(t, op=sum)
                                              y = Div(t, number of cells)

Variances merge by count, mean and M2.  This pass changes arithmetic (rounding), unlike those after it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from partitioner import dialect
from partitioner.layout import Layout
from partitioner.ops.base import Array
from partitioner.ops.nodes import needs_of, operator_of, separable_axes
from passes.assign_shards import assign_new
from passes.base import Check, Pass
from passes.checks import AGREE, KNOWN, LAID_OUT, SPLIT, compute_nodes, sharded_reduction
from passes.rewrite import Namer


@dataclass(frozen=True)
class SplitReductions(Pass):
    """Split every reduction over sharded axes."""

    name: ClassVar[str] = "split-reductions"
    requires: ClassVar[tuple[Check, ...]] = (LAID_OUT, AGREE, KNOWN)
    ensures: ClassVar[tuple[Check, ...]] = (SPLIT,)

    def apply(self, model: ir.Model) -> None:
        namer = Namer(model.graph)
        for node in list(compute_nodes(model)):
            mesh_axes = sharded_reduction(node)
            # batch statistics may be merged over copies of the network beside the mesh
            if not mesh_axes and node.op_type != dialect.TRAINING_BATCH_NORMALIZATION:
                _keep_whole(node)
                continue
            result = operator_of(node).decompose(_Writer(model.graph, node, mesh_axes, namer), node.inputs)
            _take_place(model.graph, node, result if isinstance(result, tuple) else (result,))
        dialect.declare(model)


class _Writer:
    """Puts nodes before the one that they replace, with extents and layouts."""

    def __init__(self, graph: ir.Graph, node: ir.Node, mesh_axes: Sequence[str], namer: Namer) -> None:
        self.graph = graph
        self.node = node
        self.mesh_axes = mesh_axes
        self.namer = namer

    @property
    def opset(self) -> int:
        return self.graph.opset_imports[""]

    def op(self, op_type: str, inputs: Sequence[ir.Value | None], attributes: Mapping[str, Any] | None = None,
           outputs: int = 1, domain: str = "") -> tuple[ir.Value, ...]:
        name = self.namer(f"{self.node.name}/{op_type}")
        node = dialect.new_node(domain, op_type, inputs, attributes or {}, outputs, name)
        self.graph.insert_before(self.node, node)
        operator = operator_of(node)
        for value, found in zip(node.outputs, operator.outputs, strict=True):
            value.shape, value.type = ir.Shape(found.shape), ir.TensorType(found.dtype)
        assign_new(node)
        if operator.reduction is not None and sharded_reduction(node):
            dialect.set_partial(node, self.mesh_axes)
        return tuple(node.outputs)

    def reduce(self, op_type: str, x: ir.Value, axes: Sequence[int], keepdims: bool) -> ir.Value:
        if self.opset < (13 if op_type == "ReduceSum" else 18):
            return self.op(op_type, [x], {"axes": list(axes), "keepdims": int(keepdims)})[0]
        indices = self.constant(np.asarray(list(axes), np.int64))
        return self.op(op_type, [x, indices], {"keepdims": int(keepdims)})[0]

    def all_reduce(self, kind: str, partial: Sequence[ir.Value]) -> tuple[ir.Value, ...]:
        name = self.namer(f"{self.node.name}/all_reduce")
        node = dialect.new_all_reduce(kind, partial, self.mesh_axes, name)
        self.graph.insert_before(self.node, node)
        return tuple(node.outputs)

    def constant(self, array: Array) -> ir.Value:
        name = self.namer(f"{self.node.name}/constant")
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype),
                         const_value=tensor)
        self.graph.register_initializer(value)
        return value


def _take_place(graph: ir.Graph, node: ir.Node, results: Sequence[ir.Value]) -> None:
    """Let `results` be what `node` produced, under the old names and layouts."""
    outputs = node.outputs[: len(results)]
    for old, result in zip(outputs, results, strict=True):
        old.replace_all_uses_with(result, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    for old, result in zip(outputs, results, strict=True):
        result.name = old.name
        result.metadata_props.update(old.metadata_props)
        dialect.set_layout(result, _as_made(result, dialect.get_layout(old)))


def _as_made(value: ir.Value, wanted: Layout) -> Layout:
    """The layout wanted as far as what makes the value can cut it; its readers cut the rest."""
    producer, held = value.producer(), dialect.get_layout(value)
    if producer is None or dialect.is_all_reduce(producer):  # a merge is cut as its partials are
        return held
    separable = separable_axes(producer, value.index() or 0)
    axes = tuple(None if found is None and axis not in separable else split
                 for axis, (found, split) in enumerate(zip(held.axes, wanted.axes, strict=True)))
    return Layout(wanted.shape, axes)


def _keep_whole(node: ir.Node) -> None:
    """An axis over which a node takes statistics stays whole in its results when every rank has it whole."""
    operator = operator_of(node)
    if operator.reduction is None:
        return
    for output, value in enumerate(node.outputs[: len(operator.outputs)]):
        layout, needs = dialect.get_layout(value), needs_of(node, output)[0]
        kept = [needs[axis].axis for axis in operator.reduction.axes] if needs is not None else []
        for axis in kept:
            if axis is not None and layout.axes[axis] is not None:
                layout = layout.with_axis(axis, None)
        if layout != dialect.get_layout(value):
            dialect.set_layout(value, layout)
