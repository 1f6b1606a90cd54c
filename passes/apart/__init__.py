"""Axes that the mesh splits are not merged behind others: what follows works on several axes in place of one.

    before                                              after, where the mesh splits the batch
    a = Reshape(x (L, N, E), (L*N, E))                  c = MatMul(x, w')
    b = Gemm(a, w)                                      y = Add(c, bias)
    y = Reshape(b, (L, N, E))
                                                        after, where it splits H or W
    a = Flatten(x (N, C, H, W))                         b = Einsum(x, w' (O, C, H, W))  nchw,ochw->no
    y = Gemm(a, w, bias)                                y = Add(b, bias)
    y = Conv(x, w (O, C, H, W), bias)                   likewise, followed by Reshape

A run of merged cells begins and ends anywhere in the axes behind the first; a shard of these is no run.  So the
merged axis is followed to the nodes that split or contract it, and all between take the axes apart.  Where one
needs them as one, nothing is changed, and insert-reshards gathers.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from partitioner import dialect
from partitioner.axes import named_axes
from partitioner.mesh import Mesh
from partitioner.ops.base import Operator
from partitioner.ops.nodes import forget, operator_of
from partitioner.ops.standard.conv import Conv
from partitioner.ops.standard.dense import Gemm, MatMul
from partitioner.ops.standard.pointwise import BROADCAST, Pointwise
from partitioner.ops.standard.reshape import Reshape
from passes.apart.factors import Factor, Factors, as_one, is_plain, plain
from passes.apart.products import read_conv, read_gemm, read_matmul
from passes.apart.rules import RULES, Change, Rule, axes_after, read_reshape
from passes.apart.writer import Writer
from passes.rewrite import Namer

_RULES: Mapping[type[Operator], Rule] = {**RULES, Gemm: read_gemm, MatMul: read_matmul}
_NOTHING = frozenset[ir.Node]()


def keep_apart(model: ir.Model, mesh: Mesh, trains: bool = False) -> bool:
    """Rewrite what merges an axis that the mesh splits behind another one, in place; whether anything has changed.

    Args:
        trains: whether weights must stay as they are but for their extents, and dropouts need their axes as they are.
    """
    split = frozenset(name for name, count in mesh.axes if count > 1)
    if not split:
        return False
    changed = _broadcast(model.graph)
    left: set[ir.Node] = set()
    while (found := _followed(model, split, left, trains)).failed:
        left |= found.failed
    _rewrite(model, found, trains)
    return changed or bool(found.changes)


def _broadcast(graph: ir.Graph) -> bool:
    """Let what works cell by cell read a tensor that it broadcasts in place of one that was expanded before."""
    changed = False
    for node in [n for n in graph if n.domain == "" and n.op_type == "Expand"]:
        source, (result,) = node.inputs[0], node.outputs
        assert source is not None
        for user, index in list(result.uses()):
            if not isinstance(operator_of(user), Pointwise) or user.op_type not in BROADCAST:
                continue
            read = [dialect.shape_of(source if v is result else v) for v in user.inputs if v is not None]
            if np.broadcast_shapes(*read) == dialect.shape_of(user.outputs[0]):
                user.replace_input_with(index, source)
                forget(user)
                changed = True
        if not result.uses() and not result.is_graph_output():
            graph.remove(node, safe=True)
            changed = True
    return changed


@dataclass
class _Found:
    """What is known of the graph.

    Args:
        axes: of every value.
        origins: the nodes from which a value has axes that are apart.
        changes: the nodes that change.
        failed: the origins of what could not be followed to its end.
    """

    axes: dict[ir.Value, Factors] = field(default_factory=dict[ir.Value, Factors])
    origins: dict[ir.Value, frozenset[ir.Node]] = field(default_factory=dict[ir.Value, frozenset[ir.Node]])
    changes: dict[ir.Node, Change] = field(default_factory=dict[ir.Node, Change])
    failed: set[ir.Node] = field(default_factory=set[ir.Node])

    def given(self, node: ir.Node) -> list[Factors | None]:
        """The axes of a node's inputs."""
        return [None if v is None else self._axes_of(v) for v in node.inputs]

    def _axes_of(self, value: ir.Value) -> Factors:
        return self.axes.get(value) or plain(dialect.shape_of(value))

    def settle(self, node: ir.Node, axes: Sequence[Factors], origins: frozenset[ir.Node]) -> None:
        """Note the axes of a node's results."""
        for value, found in zip(node.outputs, axes, strict=False):
            self.axes[value] = found
            if not is_plain(found):
                self.origins[value] = origins
                self.failed |= origins if value.is_graph_output() else _NOTHING


def _followed(model: ir.Model, split: frozenset[str], left: Container[ir.Node], trains: bool) -> _Found:
    """What changes when all axes but those merged by the nodes `left` are kept apart."""
    found = _Found()
    named = named_axes(model)
    for value in model.graph.inputs:
        names = {axis: frozenset([name]) for name, axis in named.get(str(value.name), {}).items() if name in split}
        found.axes[value] = tuple((Factor(n, names.get(axis, frozenset())),)
                                  for axis, n in enumerate(dialect.shape_of(value)))
    for node in model.graph:
        given = found.given(node)
        origins = _NOTHING.union(*(found.origins.get(v, _NOTHING) for v in node.inputs if v is not None))
        change = _change(node, given, node not in left, bool(origins))
        if origins and (change is None or (trains and node.op_type == "Dropout")):
            found.failed |= origins
            change, given = None, [None if axes is None else as_one(axes) for axes in given]
        if change is None:
            found.settle(node, axes_after(node, given), _NOTHING)
            continue
        found.changes[node] = change
        found.settle(node, change.outputs, origins | {node} if change.starts else origins)
    return found


def _change(node: ir.Node, given: Sequence[Factors | None], may_start: bool, follows: bool) -> Change | None:
    """The change of a node: where its inputs are apart, or where it would merge what the mesh splits."""
    operator = operator_of(node)
    if isinstance(operator, Reshape) and node.inputs[0] is not None and node.inputs[0].const_value is None:
        change = read_reshape(node, operator, given, may_start)
        return change if follows or (change is not None and change.starts) else None
    if isinstance(operator, Conv) and not follows:
        return read_conv(node, operator, given)
    rule = _RULES.get(type(operator)) if follows else None
    return None if rule is None else rule(node, operator, given)


def _rewrite(model: ir.Model, found: _Found, trains: bool) -> None:
    """Build all changes, and let what is as it was before be read in place of the old."""
    graph, namer = model.graph, Namer(model.graph)
    now: dict[ir.Value, ir.Value] = {}
    for node, change in found.changes.items():
        inputs = [None if v is None else now.get(v, v) for v in node.inputs]
        now.update(zip(node.outputs, change.build(Writer(graph, node, namer, trains), inputs), strict=False))
    for node in reversed(found.changes):
        _take_over(graph, node, [(old, now[old]) for old in node.outputs if old in now], found)


def _take_over(graph: ir.Graph, node: ir.Node, results: Sequence[tuple[ir.Value, ir.Value]], found: _Found) -> None:
    """Remove a node; what takes its place has its name, and its results' where they are as before."""
    before, own, names = node.predecessors(), node.name, [old.name for old, _ in results]
    for old, new in results:
        if is_plain(found.axes[old]):
            old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    for (_, new), name in zip(results, names, strict=True):
        maker = new.producer()
        if maker is None or maker in before:  # nothing was left to do
            continue
        maker.name = own
        new.name = name
