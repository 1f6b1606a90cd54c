"""Products of tensors whose axes are kept apart: a contracted axis becomes several, and each may be sharded.

    Flatten (N, C, H, W), Gemm with (O, C*H*W)      Einsum nchw,ochw->no: every rank multiplies its own cells
    Conv whose kernel is all of space               the same
    queries (B, H*W, D) times keys (B, D, H*W)      Einsum of queries apart and keys as one: keys are gathered
    (B, C, H*W) times (B, H*W, D)                   Einsum of both apart: sums of products
"""

from __future__ import annotations

import string
from collections.abc import Sequence

import onnx_ir as ir

from partitioner.dialect import shape_of
from partitioner.ops.standard.conv import Conv
from partitioner.ops.standard.dense import Gemm, MatMul
from passes.apart.factors import Axis, Factors, as_one, extents, is_plain, joined, plain
from passes.apart.rules import Change, Given, Inputs, fit, fits
from passes.apart.writer import Writer

_EINSUM = 12
"""The opset that introduced it."""
_SUMMED = (ir.DataType.FLOAT, ir.DataType.DOUBLE)
"""Element types of which onnxruntime has sums of products."""


def read_gemm(node: ir.Node, operator: Gemm, given: Given) -> Change | None:
    """Gemm by a constant matrix, as a layer over the last axis."""
    data = given[0]
    weight, *rest = node.inputs[1:]
    bias = rest[0] if rest else None
    assert data is not None
    if operator.flip_a or operator.alpha != 1 or (bias is not None and operator.beta != 1):
        return None
    if weight is None or weight.const_value is None or not _is_row(bias):
        return None
    return _layer(node, data, operator.outputs[0].shape[1], operator.flip_b, bias is not None)


def _is_row(bias: ir.Value | None) -> bool:
    """Whether a summand is one per column, or there is none."""
    if bias is None:
        return True
    return bias.const_value is not None and all(n == 1 for n in shape_of(bias)[:-1])


def read_matmul(node: ir.Node, operator: MatMul, given: Given) -> Change | None:
    """MatMul by a constant matrix, or of matrices whose leading axes are apart alike."""
    left, right = given
    assert left is not None and right is not None
    weight = node.inputs[1]
    if len(left) > 1 and len(right) == 2 and weight is not None and weight.const_value is not None:
        return _layer(node, left, operator.outputs[0].shape[-1], False, False)
    if min(len(left), len(right)) < 2:
        return None
    shape = operator.outputs[0].shape
    if not (is_plain(left[-2:]) and is_plain(right[-2:])):
        return _crossed(node, shape, left, _met(left, right))
    lead = joined(shape[:-2], [left[:-2], right[:-2]])
    if lead is None:
        return None
    wholes: list[Factors] = [(*lead, *axes[-2:]) for axes in (left, right)]
    if not all(fits(v, axes, out) for v, axes, out in zip(node.inputs, given, wholes, strict=True)):
        return None

    def build(write: Writer, inputs: Inputs) -> Sequence[ir.Value]:
        return write.same([fit(write, *pair) for pair in zip(inputs, node.inputs, wholes, strict=True)])

    return Change(((*lead, *left[-2:-1], *right[-1:]),), build)


def _met(left: Factors, right: Factors) -> Factors:
    """The axes of the right matrix, some of them one again: those that every row of the left one needs whole."""
    (rows, inner), (other, columns) = left[-2:], right[-2:]
    if len(inner) == 1 and len(other) > 1:
        other = as_one([other])[0]
    if len(rows) > 1 and len(columns) > 1:
        columns = as_one([columns])[0]
    return (*right[:-2], other, columns)


def _crossed(node: ir.Node, shape: tuple[int, ...], left: Factors, right: Factors) -> Change | None:
    """A product of two tensors of data with rows, columns or contracted axes apart: attention over all of space."""
    lead = joined(shape[:-2], [left[:-2], right[:-2]])
    if lead is None or extents(left[-1:]) != extents(right[-2:-1]) or not _can_sum(node):
        return None
    if any(extents(axes[:-2]) != extents(lead) for axes in (left, right)):
        return None
    letters = iter(string.ascii_letters)
    batch, rows, inner, columns = ("".join(next(letters) for _ in extents(axes))
                                   for axes in (lead, left[-2:-1], left[-1:], right[-1:]))
    equation = f"{batch}{rows}{inner},{batch}{inner}{columns}->{batch}{rows}{columns}"

    def build(write: Writer, inputs: Inputs) -> Sequence[ir.Value]:
        a, b = inputs
        assert a is not None and b is not None
        return [write.op("Einsum", [a, write.reshape(b, extents(right))], {"equation": equation})]

    return Change(((*lead, *left[-2:-1], *right[-1:]),), build)


def _layer(node: ir.Node, data: Factors, columns: int, flipped: bool, has_bias: bool) -> Change | None:
    """A product of the last axis with a constant matrix, (columns, axis) where it is flipped."""
    rows, inner = data[:-1], data[-1]
    if len(inner) > 1 and not _can_sum(node):
        return None

    def build(write: Writer, inputs: Inputs) -> Sequence[ir.Value]:
        x, weight = inputs[:2]
        assert x is not None and weight is not None
        if len(inner) > 1:
            product = _contracted(write, x, weight, rows, (inner, plain([columns])[0]), flipped)
        else:
            product = write.op("MatMul", [x, write.transposed(weight) if flipped else weight])
        bias = inputs[2] if has_bias else None
        return [product if bias is None else write.op("Add", [product, write.reshape(bias, shape_of(bias)[-1:])])]

    return Change(((*rows, *plain([columns])),), build)


def _contracted(write: Writer, x: ir.Value, weight: ir.Value, rows: Factors, matrix: tuple[Axis, Axis],
                flipped: bool) -> ir.Value:
    """The product over an axis that is apart: rows of x by a matrix, (columns, axis) where it is flipped."""
    count, inner = len(extents(rows)), len(matrix[0])
    letters = string.ascii_lowercase
    lead, summed, column = letters[:count], letters[count : count + inner], letters[count + inner]
    second = column + summed if flipped else summed + column
    shaped = write.reshape(weight, extents(matrix[::-1] if flipped else matrix))
    return write.op("Einsum", [x, shaped], {"equation": f"{lead}{summed},{second}->{lead}{column}"})


def _can_sum(node: ir.Node) -> bool:
    graph = node.graph
    return graph is not None and graph.opset_imports[""] >= _EINSUM and node.outputs[0].dtype in _SUMMED


def read_conv(node: ir.Node, operator: Conv, given: Given) -> Change | None:
    """A Conv whose kernel is all of space, which the mesh may split: no halo is as good as sums of products."""
    data, weight = given[0], node.inputs[1]
    if data is None or weight is None or weight.const_value is None or not _can_sum(node):
        return None
    covers = all(w.n_out == 1 and w.lo == 0 and w.dilation == 1 and w.kernel == w.n_in for w in operator.windows)
    channels, outputs = shape_of(weight)[1], shape_of(weight)[0]
    by_channel = operator.group == outputs and channels == 1
    if not covers or not (operator.group == 1 or by_channel) or not any(
            f.extent > 1 and f.names for axis in data[2:] for f in axis) or not is_plain(data):
        return None
    space = string.ascii_lowercase[4 : 4 + len(operator.windows)]
    equation = f"nc{space},c{space}->nc" if by_channel else f"nc{space},oc{space}->no"

    def build(write: Writer, inputs: Inputs) -> Sequence[ir.Value]:
        x, kernel, *rest = inputs
        assert kernel is not None
        if by_channel:
            kernel = write.reshape(kernel, (outputs, *shape_of(kernel)[2:]))
        product = write.op("Einsum", [x, kernel], {"equation": equation})
        if rest and rest[0] is not None:
            product = write.op("Add", [product, rest[0]])
        return [write.reshape(product, operator.outputs[0].shape)]

    return Change((plain(operator.outputs[0].shape),), build)
