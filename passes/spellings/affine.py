"""Factors and summands after a layer, taken into its scale and bias or its weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter import pattern

from partitioner import dialect
from partitioner.dialect import shape_of
from partitioner.ops.base import Array
from passes.spellings.values import constant, made_of, own_constant, spread

_FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE)
_CONVOLUTIONS = ("Conv", "ConvTranspose")
_NORMS = (("", "InstanceNormalization"), ("", "LayerNormalization"),
          (dialect.DOMAIN, dialect.GROUP_NORMALIZATION))


def affine_rules() -> Iterator[tuple[str, pattern.RewriteRule]]:
    """A factor after a normalisation whose scale is 1 and bias 0 is its scale; a summand after bias 0 its bias."""
    for domain, op_type in _NORMS:
        for kind in ("Mul", "Add"):
            take = _take_scale if kind == "Mul" else _take_bias
            yield kind, pattern.RewriteRule(_followed(domain, op_type, kind), take)


def folding_rules() -> Iterator[tuple[str, pattern.RewriteRule]]:
    """Batch norms, factors and summands per channel after a convolution go into its weights and bias."""
    for op_type in _CONVOLUTIONS:
        yield "BatchNormalization", pattern.RewriteRule(_batch_normalised(op_type), _fold_batch_norm)
        yield "Mul", pattern.RewriteRule(_followed("", op_type, "Mul"), _fold_factor)
        yield "Add", pattern.RewriteRule(_followed("", op_type, "Add"), _fold_summand)


def _followed(domain: str, op_type: str, kind: str) -> Any:
    def written(op: Any, x: Any, number: Any) -> Any:
        inner = getattr(op, op_type)(x, _domain=domain, _allow_other_inputs=True, _allow_other_attributes=True,
                                     _outputs=["inner"])
        return getattr(op, kind)(inner, number)

    return written


# --- normalisations ----------------------------------------------------------------------------------


def _take_scale(op: Any, x: ir.Value, number: ir.Value, inner: ir.Value) -> ir.Value | None:
    scale, bias = _vectors(inner)
    return _with_vector(op, inner, 1, number) if _holds(scale, 1) and _holds(bias, 0) else None


def _take_bias(op: Any, x: ir.Value, number: ir.Value, inner: ir.Value) -> ir.Value | None:
    return _with_vector(op, inner, 2, number) if _holds(_vectors(inner)[1], 0) else None


def _holds(array: Array | None, number: int) -> bool:
    return array is not None and bool((array == number).all())


def _vectors(inner: ir.Value) -> tuple[Array | None, Array | None]:
    """Scale and bias of a normalisation that has both as constants."""
    node = inner.producer()
    if node is None or len(node.inputs) < 3:
        return None, None
    return constant(node.inputs[1]), constant(node.inputs[2])


def _with_vector(op: Any, inner: ir.Value, index: int, number: ir.Value) -> ir.Value | None:
    """The normalisation with another scale or bias; None where the constant is none per channel (or per cell)."""
    node, shape = inner.producer(), shape_of(inner)
    assert node is not None
    first, stop = 1, 2
    if node.op_type == "LayerNormalization":
        axis = node.attributes.get_int("axis", -1)
        first, stop = axis % len(shape), len(shape)
    vector = spread(number, shape, first, stop)
    if vector is None or len(node.outputs) != 1:
        return None
    inputs = list(node.inputs)
    inputs[index] = made_of(op, vector, number, str(number.name))
    return op.op(node.op_type, *inputs, _domain=node.domain, **dict(node.attributes))


# --- convolutions ------------------------------------------------------------------------------------


def _batch_normalised(op_type: str) -> Any:
    def written(op: Any, x: Any, scale: Any, bias: Any, mean: Any, variance: Any) -> Any:
        inner = getattr(op, op_type)(x, _allow_other_inputs=True, _allow_other_attributes=True, _outputs=["inner"])
        return op.BatchNormalization(inner, scale, bias, mean, variance, _allow_other_attributes=True,
                                     _outputs=["result"])

    return written


def _fold_batch_norm(op: Any, x: ir.Value, scale: ir.Value, bias: ir.Value, mean: ir.Value, variance: ir.Value,
                     inner: ir.Value, result: ir.Value) -> ir.Value | None:
    node = result.producer()
    arrays = [constant(v) for v in (scale, bias, mean, variance)]
    if node is None or any(a is None for a in arrays):
        return None
    a, b, m, v = (np.asarray(array, np.float64) for array in arrays)
    with np.errstate(invalid="ignore", divide="ignore"):  # such a file keeps its node: `_fold` refuses
        factor = a / np.sqrt(v + node.attributes.get_float("epsilon", 1e-5))
    return _fold(op, inner, factor, b - m * factor)


def _fold_factor(op: Any, x: ir.Value, number: ir.Value, inner: ir.Value) -> ir.Value | None:
    vector = spread(number, shape_of(inner), 1, 2)
    return None if vector is None else _fold(op, inner, vector.astype(np.float64), np.zeros(len(vector)))


def _fold_summand(op: Any, x: ir.Value, number: ir.Value, inner: ir.Value) -> ir.Value | None:
    vector = spread(number, shape_of(inner), 1, 2)
    return None if vector is None else _fold(op, inner, np.ones(len(vector)), vector.astype(np.float64))


def _fold(op: Any, inner: ir.Value, factor: Array, summand: Array) -> ir.Value | None:
    """The convolution whose result is multiplied and added to per channel, computed in float64."""
    node = inner.producer()
    if node is None or inner.dtype not in _FLOATS:
        return None
    weight, *rest = node.inputs[1:]
    given = rest[0] if rest else None
    kernel, bias = own_constant(weight), own_constant(given)
    if weight is None or kernel is None or (given is not None and bias is None):
        return None
    groups = node.attributes.get_int("group", 1)
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = (kernel * _per_kernel(node.op_type, kernel.shape, factor, groups)).astype(kernel.dtype)
        total = (summand if bias is None else bias.astype(np.float64) * factor + summand).astype(kernel.dtype)
    if not np.isfinite(scaled).all() or not np.isfinite(total).all():
        return None
    name = f"{weight.name}/bias" if given is None else str(given.name)
    inputs = [node.inputs[0], op.initializer(ir.tensor(scaled), name=str(weight.name)),
              op.initializer(ir.tensor(total), name=name)]
    return op.op(node.op_type, *inputs, **dict(node.attributes))


def _per_kernel(op_type: str, shape: Sequence[int], factor: Array, groups: int) -> Array:
    """A factor per result's channel, laid out as the weights are."""
    ones = (1,) * (len(shape) - 2)
    if op_type == "Conv":
        return factor.reshape(-1, 1, *ones)
    by_group = factor.reshape(groups, 1, shape[1])  # inputs of a group reach the results of that group only
    return np.broadcast_to(by_group, (groups, shape[0] // groups, shape[1])).reshape(shape[0], shape[1], *ones)
