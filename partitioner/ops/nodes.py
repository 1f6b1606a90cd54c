"""From a node of the graph to its operator."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Self

import onnx_ir as ir

from partitioner import dialect
from partitioner.geometry import Box, Pieces, union
from partitioner.layout import AxisLayout, Layout
from partitioner.ops.base import Need, Needs, NodeView, Operator, TensorType, Unsupported, need_pieces
from partitioner.ops.dtypes import refuse_mixed
from partitioner.ops.kernels.unsigned import refuse_unsigned
from partitioner.ops.opaque import Opaque
from partitioner.ops.registry import lookup

_OPERATOR = "partitioner.operator"
_NEEDS = "partitioner.needs"
_NEEDED = "partitioner.needed"
_TYPE = "partitioner.type"


def tensor_type(value: ir.Value) -> TensorType:
    """Static type of a value.

    Raises:
        Unsupported: when extents or element type are not known.
    """
    known: TensorType | None = value.meta.data.get(_TYPE)
    if known is not None and value.shape is not None and value.shape.dims == known.shape and value.dtype == known.dtype:
        return known
    if value.shape is None or not value.shape.is_static() or value.dtype is None:
        raise Unsupported(f"the extents of its input '{value.name}' are not known beforehand")
    found = value.meta[_TYPE] = TensorType(dialect.shape_of(value), value.dtype)
    return found


def view_node(node: ir.Node) -> NodeView:
    """What an operator class may know of a node.

    Raises:
        Unsupported: when an input's type is not known.
    """
    graph = node.graph
    imports = graph.opset_imports if graph is not None else {}
    return NodeView(
        op_type=node.op_type,
        version=node.version or imports.get(node.domain, 1),
        inputs=tuple(None if v is None else tensor_type(v) for v in node.inputs),
        constants=tuple(None if v is None else v.const_value for v in node.inputs),
        attributes=dialect.attributes_of(node),
        used_outputs=tuple(bool(v.uses()) or v.is_graph_output() for v in node.outputs),
    )


def operator_of(node: ir.Node) -> Operator:
    """The operator of a compute node, read once.

    Raises:
        Unsupported: when there is no rule or the node cannot be kept exact.
    """
    cached = node.meta.data.get(_OPERATOR)
    if cached is not None:
        return cached
    cls = lookup(node.domain, node.op_type)
    view = view_node(node)
    if cls is not None and node.domain == "":
        refuse_unsigned(view)
        refuse_mixed(view)
    operator = Opaque.of(node, view) if cls is None else cls.read(view)
    node.meta[_OPERATOR] = operator
    return operator


def forget(node: ir.Node) -> None:
    """Read a node anew when next asked: its attributes have changed."""
    for key in (_OPERATOR, _NEEDS, _NEEDED):
        node.meta.pop(key, None)


def needs_of(node: ir.Node, output: int) -> Needs:
    """An operator's needs for one output, computed once."""
    cache: dict[int, Needs] = node.meta.data.setdefault(_NEEDS, {})
    if output not in cache:
        cache[output] = operator_of(node).needs(output)
    return cache[output]


def separable_axes(node: ir.Node, output: int) -> frozenset[int]:
    """Axes of an output that can be computed in parts: those by which some input is needed in parts.

    The others (a convolution's channels, axes that a reshape mixes) are always computed entirely.
    """
    if output >= len(operator_of(node).outputs):
        return frozenset()
    given = [needs for needs in needs_of(node, output) if needs is not None]
    return frozenset(need.axis for needs in given for need in needs if need.axis is not None)


def data_needs(node: ir.Node, split: bool = False) -> Iterator[tuple[int, ir.Value, Layout]]:
    """(index, value, what every rank needs of it) for the inputs that are no constants.

    Args:
        split: take a reduction over sharded axes for the partial results into which it will be split.
    """
    found = _Needed.of(node, split)
    for index, value in enumerate(node.inputs):
        if value is None or value.const_value is not None:
            continue
        want = found.of_input(node, index)
        if want is not None:
            yield index, value, want


def reduction_splits(node: ir.Node) -> dict[int, dict[int, AxisLayout]]:
    """The sharded axes over which a node reduces: per input, axis -> its shards; {} when it reduces over none.

    Of inputs that have a dimension in common, the first one that is sharded along it decides.  A contracted
    dimension stays whole when its mesh axis splits the result, one that is still there in the result when it does not
    (as of a normalisation that all ranks compute).
    """
    reduction = operator_of(node).reduction
    found: dict[int, dict[int, AxisLayout]] = {}
    if reduction is None:
        return found
    laid_out = [dialect.get_layout(value) for value in node.outputs if dialect.has_layout(value)]
    splits_result = {axis for layout in laid_out for axis in layout.mesh_axes}
    taken = set(splits_result)
    for dimension in reduction.dimensions:
        split = _deciding_split(node, dimension)
        if split is None:
            continue
        if _is_kept(node, dimension):
            if laid_out and split.mesh_axis not in splits_result:
                continue
        elif split.mesh_axis in taken:
            continue
        taken.add(split.mesh_axis)
        for index, axis in enumerate(dimension):
            if axis is not None:
                found.setdefault(index, {})[axis] = split
    return found


def _is_kept(node: ir.Node, dimension: tuple[int | None, ...]) -> bool:
    """Whether a dimension is reduced over for statistics only and is still there in a result."""
    axis = dimension[0]
    if len(dimension) > 1 or axis is None:
        return False
    needs = [needs_of(node, output)[0] for output in range(len(operator_of(node).outputs))]
    return any(need is not None and need[axis].axis is not None for need in needs)


def _deciding_split(node: ir.Node, dimension: tuple[int | None, ...]) -> AxisLayout | None:
    for value, axis in zip(node.inputs, dimension, strict=False):
        if value is not None and axis is not None and value.const_value is None:
            split = dialect.get_layout(value).axes[axis]
            if split is not None:
                return split
    return None


def needed_layout(node: ir.Node, index: int, split: bool = False) -> Layout | None:
    """What every rank needs of an input for its own part of the node's outputs; None for a consumed input.

    For the local part of a reduction, the reduced axes are needed as they are owned.
    """
    return _Needed.of(node, split).of_input(node, index)


@dataclass(frozen=True)
class _Needed:
    """What a node needs of its inputs, found once for the layouts that they and its outputs have.

    Args:
        outs, ins: these layouts; None for inputs that are not given.
        partial: whether it is the local part of a reduction.
    """

    outs: list[Layout]
    ins: list[Layout | None]
    partial: bool
    answers: dict[int, Layout | None] = field(default_factory=dict[int, "Layout | None"], compare=False)

    @classmethod
    def of(cls, node: ir.Node, split: bool) -> Self:
        """What is known already, if the layouts are the same as before."""
        outs = [dialect.get_layout(v) for v in node.outputs[: len(operator_of(node).outputs)]]
        ins = [None if v is None else dialect.get_layout(v) for v in node.inputs]
        partial = split or bool(dialect.get_partial(node))
        known: dict[bool, Self] = node.meta.data.setdefault(_NEEDED, {})
        before = known.get(partial)
        if before is not None and before.outs == outs and before.ins == ins:
            return before
        found = known[partial] = cls(outs, ins, partial)
        return found

    def of_input(self, node: ir.Node, index: int) -> Layout | None:
        """Of one input."""
        if index not in self.answers:
            found = _needed_layout(node, index, self.outs)
            if found is not None and self.partial:
                for axis, shards in reduction_splits(node).get(index, {}).items():
                    found = found.with_axis(axis, shards)
            self.answers[index] = found
        return self.answers[index]


def needed_by_part(node: ir.Node, index: int, part: Layout) -> Layout | None:
    """What every rank needs of an input for a part of each of the node's outputs; None for a consumed input."""
    return _needed_layout(node, index, [part] * len(operator_of(node).outputs))


def _needed_layout(node: ir.Node, index: int, outs: list[Layout]) -> Layout | None:
    value, found = node.inputs[index], None
    if value is None:
        return None
    for output, out in enumerate(outs):
        needs = needs_of(node, output)[index]
        if needs is None:
            continue
        layout = _needed(value, needs, out)
        found = layout if found is None else _union(found, layout)
    return found


def _needed(value: ir.Value, needs: tuple[Need, ...], out: Layout) -> Layout:
    axes: list[AxisLayout | None] = []
    for need in needs:
        split = None if need.axis is None else out.axes[need.axis]
        if split is None or need.is_whole:
            axes.append(None)
        else:
            axes.append(split.through(need.map))
    return Layout(dialect.shape_of(value), tuple(axes))


def _union(left: Layout, right: Layout) -> Layout:
    axes: list[AxisLayout | None] = []
    for a, b in zip(left.axes, right.axes, strict=True):
        if a is None or b is None or a.mesh_axis != b.mesh_axis:
            axes.append(None)
        else:
            axes.append(a.joined(b))
    return Layout(left.shape, tuple(axes))


def _joined(left: Box, right: Box) -> Box:
    """The smallest box that holds both."""
    if not left or not right:
        return left if left else right
    return Box(tuple(union(p, q) for p, q in zip(left.axes, right.axes, strict=True)))


def input_box(node: ir.Node, index: int, outs: tuple[Box, ...], here: Mapping[str, int],
              taken: Mapping[str, Pieces] | None = None) -> Box | None:
    """The cells of an input that local output boxes need; the reduced axes of a partial as they are owned.

    Args:
        here: the rank's coordinates in the mesh.
        taken: of reduced axes along these mesh axes, other cells than all that the rank owns.
    """
    found: list[Box] = []
    for output, out in enumerate(outs):
        needs = needs_of(node, output)[index]
        if needs is not None:
            found.append(Box(tuple(need_pieces(need, out) for need in needs)))
    if not found:
        return None
    box = functools.reduce(_joined, found)
    if not dialect.get_partial(node):
        return box
    axes = list(box.axes)
    for axis, split in reduction_splits(node).get(index, {}).items():
        owned = split.parts[here[split.mesh_axis]]
        axes[axis] = owned if taken is None else taken.get(split.mesh_axis, owned)
    return Box(tuple(axes))
