"""How operators work on tensors whose axes are kept apart; one rule per operator class.

A rule returns None where the operator needs an axis as one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from partitioner.dialect import shape_of
from partitioner.maps import Shift
from partitioner.ops.base import Operator
from partitioner.ops.nodes import needs_of, operator_of
from partitioner.ops.standard.gather import Gather
from partitioner.ops.standard.layer_norm import LayerNormalization, RMSNormalization
from partitioner.ops.standard.pointwise import Cast, Pointwise
from partitioner.ops.standard.reduce import Reduce
from partitioner.ops.standard.repeat import Expand
from partitioner.ops.standard.reshape import Reshape, Transpose
from partitioner.ops.standard.shape import Concat, Slice
from partitioner.ops.standard.softmax import Softmax
from partitioner.ops.standard.split import Split
from passes.apart.factors import Factor, Factors, extents, fitted, is_plain, joined, place, plain, reshaped
from passes.apart.writer import Writer

Inputs = Sequence[ir.Value | None]


@dataclass(frozen=True)
class Change:
    """What takes the place of a node.

    Args:
        outputs: the axes of its results.
        build: writes it, given inputs whose axes are apart.
        starts: whether it keeps axes apart that were one before.
    """

    outputs: tuple[Factors, ...]
    build: Callable[[Writer, Inputs], Sequence[ir.Value]]
    starts: bool = False


Given = Sequence[Factors | None]
"""The axes of every input; None for one that is not given."""
Rule = Callable[[ir.Node, Any, Given], Change | None]


def read_reshape(node: ir.Node, operator: Reshape, given: Given, may_start: bool = True) -> Change | None:
    """Reshape, Flatten, Squeeze, Unsqueeze."""
    data, target = given[0], operator.outputs[0].shape
    found = None if data is None or 0 in target else reshaped(data, target, may_start)
    if found is None:
        return None
    axes, starts = found

    def build(write: Writer, inputs: Inputs) -> Sequence[ir.Value]:
        assert inputs[0] is not None
        return [write.reshape(inputs[0], extents(axes), node.outputs[0].is_graph_output())]

    return Change((axes,), build, starts)


def _transpose(node: ir.Node, operator: Transpose, given: Given) -> Change | None:
    data = given[0]
    assert data is not None
    order = [place(data, a) + i for a in operator.order for i in range(len(data[a]))]

    def build(write: Writer, inputs: Inputs) -> Sequence[ir.Value]:
        return write.same(inputs, {"perm": order})

    return Change((tuple(data[a] for a in operator.order),), build)


def _pointwise(node: ir.Node, operator: Pointwise | Cast, given: Given) -> Change | None:
    if node.op_type == "Dropout" and len(node.outputs) > 1:
        return None
    used = [i for i, needs in enumerate(needs_of(node, 0)) if needs is not None]
    shape = operator.outputs[0].shape
    out = joined(shape, [axes for i in used if (axes := given[i]) is not None])
    if out is None or not all(fits(node.inputs[i], given[i], out) for i in used):
        return None

    def build(write: Writer, inputs: Inputs) -> Sequence[ir.Value]:
        return write.same([fit(write, v, node.inputs[i], out) if i in used else v for i, v in enumerate(inputs)])

    return Change((out,), build)


def fits(value: ir.Value | None, axes: Factors | None, out: Factors) -> bool:
    """Whether an input can be had apart as a result is, without a split that is not its own."""
    if value is None or axes is None or value.const_value is not None:
        return True
    pairs = zip(axes, out[len(out) - len(axes):], strict=True)
    return all(extents([a]) in ((1,), extents([b])) for a, b in pairs)


def fit(write: Writer, value: ir.Value | None, old: ir.Value | None, out: Factors) -> ir.Value | None:
    """An input, apart as a result is; `old` is the input as it was."""
    if value is None or old is None:
        return value
    return write.reshape(value, fitted(shape_of(old), out))


def _softmax(node: ir.Node, operator: Softmax, given: Given) -> Change | None:
    data = given[0]
    assert data is not None
    axis = operator.axes[0]
    if len(operator.axes) > 1 or len(data[axis]) > 1:
        return None
    return _same(data, {"axis": place(data, axis)})


def _layer_norm(node: ir.Node, operator: LayerNormalization | RMSNormalization, given: Given) -> Change | None:
    data = given[0]
    assert data is not None
    axis = node.attributes.get_int("axis", -1) % len(data)
    if len(node.outputs) > 1 or not is_plain(data[axis:]):
        return None
    return _same(data, {"axis": axis - len(data)})


def _reduce(node: ir.Node, operator: Reduce, given: Given) -> Change | None:
    """Reductions, of all that an axis stands for."""
    data = given[0]
    assert data is not None
    as_input = len(node.inputs) > 1
    if not operator.axes or not (as_input or "axes" in node.attributes):
        return None
    axes = [place(data, a) + i for a in sorted(operator.axes) for i in range(len(data[a]))]
    out = tuple(plain([1])[0] if a in operator.axes else axis for a, axis in enumerate(data)
                if operator.keepdims or a not in operator.axes)

    def build(write: Writer, inputs: Inputs) -> Sequence[ir.Value]:
        if as_input:
            (result,) = write.same([inputs[0], write.integers(axes)])
        else:
            (result,) = write.same(inputs, {"axes": axes})
        return [write.reshape(result, extents(out))]

    return Change((out,), build)


def _gather(node: ir.Node, operator: Gather, given: Given) -> Change | None:
    data, index = given
    assert data is not None and index is not None
    if not is_plain(index) or len(data[operator.axis]) > 1:
        return None
    out = (*data[: operator.axis], *index, *data[operator.axis + 1 :])
    return _same(data, {"axis": place(data, operator.axis)}, (out,))


def _split(node: ir.Node, operator: Split, given: Given) -> Change | None:
    data, axis = given[0], operator.axis
    assert data is not None
    if len(data[axis]) > 1:
        return None
    outputs = [(*data[:axis], *plain([t.shape[axis]]), *data[axis + 1 :]) for t in operator.outputs]
    return _same(data, {"axis": place(data, axis)}, outputs)


def _slice(node: ir.Node, operator: Slice, given: Given) -> Change | None:
    """Crops with steps of one cell."""
    data = given[0]
    assert data is not None
    crops = {a: m for a, m in enumerate(operator.axes) if not m.is_identity}
    if any(not isinstance(m, Shift) or len(data[a]) > 1 for a, m in crops.items()):
        return None
    starts = [getattr(m, "offset", 0) for m in crops.values()]
    ends = [start + m.n_out for start, m in zip(starts, crops.values(), strict=True)]
    numbers = {"starts": starts, "ends": ends, "axes": [place(data, a) for a in crops]}
    out = tuple(plain([n])[0] if a in crops else data[a] for a, n in enumerate(operator.outputs[0].shape))

    def build(write: Writer, inputs: Inputs) -> Sequence[ir.Value]:
        if len(inputs) == 1:  # before opset 10
            return write.same(inputs, numbers)
        return write.same([inputs[0], *(write.integers(n) for n in numbers.values())])

    return Change((out,), build)


def _concat(node: ir.Node, operator: Concat, given: Given) -> Change | None:
    axis, shape = operator.axis, operator.outputs[0].shape
    whole = [(*axes[:axis], *plain([shape[axis]]), *axes[axis + 1 :]) for axes in given if axes is not None]
    out = joined(shape, whole)
    if out is None or any(axes is None or len(axes[axis]) > 1 for axes in given):
        return None
    parts = [(*out[:axis], *plain([t.shape[axis]]), *out[axis + 1 :]) for t in operator.inputs if t is not None]
    if not all(fits(v, axes, part) for v, axes, part in zip(node.inputs, given, parts, strict=True)):
        return None

    def build(write: Writer, inputs: Inputs) -> Sequence[ir.Value]:
        fitting = [fit(write, *pair) for pair in zip(inputs, node.inputs, parts, strict=True)]
        return write.same(fitting, {"axis": place(out, axis)})

    return Change((out,), build)


def _expand(node: ir.Node, operator: Expand, given: Given) -> Change | None:
    data, shape = given[0], operator.outputs[0].shape
    assert data is not None
    first = len(shape) - len(data)
    kept = [axis if extents([axis]) != (1,) else plain([n])[0] for axis, n in zip(data, shape[first:], strict=True)]
    out = (*plain(shape[:first]), *kept)

    def build(write: Writer, inputs: Inputs) -> Sequence[ir.Value]:
        return write.same([inputs[0], write.integers(extents(out))])

    return Change((out,), build)


def _same(data: Factors, attributes: dict[str, int], outputs: Sequence[Factors] | None = None) -> Change:
    """The same operator with another axis."""

    def build(write: Writer, inputs: Inputs) -> Sequence[ir.Value]:
        return write.same(inputs, attributes)

    return Change(tuple(outputs or (data,)), build)


RULES: dict[type[Operator], Rule] = {
    Reshape: read_reshape, Transpose: _transpose, Pointwise: _pointwise, Cast: _pointwise, Softmax: _softmax,
    LayerNormalization: _layer_norm, RMSNormalization: _layer_norm, Reduce: _reduce, Gather: _gather, Split: _split,
    Slice: _slice, Concat: _concat, Expand: _expand}


def axes_after(node: ir.Node, given: Given) -> list[Factors]:
    """The axes of the results of a node that works on axes as they are: which of them the mesh may split."""
    operator = operator_of(node)
    found: list[Factors] = []
    for output, result in enumerate(operator.outputs[: len(node.outputs)]):
        names = [frozenset[str]() for _ in result.shape]
        for axes, needs in zip(given, needs_of(node, output), strict=False):
            for axis, need in zip(axes or (), needs or (), strict=False):
                if need.axis is not None and (need.map.corresponds or not need.is_whole):
                    names[need.axis] |= axis[0].names
        found.append(tuple((Factor(n, split),) for n, split in zip(result.shape, names, strict=True)))
    return found
