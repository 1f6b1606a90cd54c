"""Normalisations and reductions of the float64 reference, formula by formula from the ONNX definitions.

Where the definition leaves a choice (ties, integers, zeros, what a reduction without axes still does) they do
what onnxruntime does.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np

from tests.reference import Node, rule, window_cells
from tests.reference import paddings as window_paddings

Array = np.ndarray


# --- normalisation -----------------------------------------------------------------------------------


def standardise(x: Array, axes: tuple[int, ...], epsilon: float) -> tuple[Array, Array, Array]:
    """(x - mean) / sqrt(variance + epsilon), the mean and the inverse deviation."""
    mean = x.mean(axes, keepdims=True)
    inverse = 1 / np.sqrt(((x - mean) ** 2).mean(axes, keepdims=True) + epsilon)
    return (x - mean) * inverse, mean, inverse


@rule("GroupNormalization")
def group_norm(node: Node, xs: list[Any]) -> Array:
    x, scale, bias = xs
    groups, channels = node.get("num_groups"), x.shape[1]
    found = np.empty(x.shape)
    per = channels // groups
    for group in range(groups):
        mine = slice(group * per, (group + 1) * per)
        found[:, mine] = standardise(x[:, mine], tuple(range(1, x.ndim)), node.get("epsilon", 1e-5))[0]
    which = [c // per for c in range(channels)] if node.version < 21 else list(range(channels))
    shape = (1, channels, *[1] * (x.ndim - 2))
    return found * scale[which].reshape(shape) + bias[which].reshape(shape)


@rule("LayerNormalization")
def layer_norm(node: Node, xs: list[Any]) -> tuple[Array, ...]:
    x, scale, *bias = xs
    axes = tuple(range(node.get("axis", -1) % x.ndim, x.ndim))
    found, mean, inverse = standardise(x, axes, node.get("epsilon", 1e-5))
    found = found * scale
    return (found + bias[0] if bias and bias[0] is not None else found), mean, inverse


@rule("RMSNormalization")
def rms_norm(node: Node, xs: list[Any]) -> Array:
    x, scale = xs
    axes = tuple(range(node.get("axis", -1) % x.ndim, x.ndim))
    return x / np.sqrt((x * x).mean(axes, keepdims=True) + node.get("epsilon", 1e-5)) * scale


@rule("MeanVarianceNormalization")
def mean_variance_norm(node: Node, xs: list[Any]) -> Array:
    axes = tuple(node.get("axes", (0, 2, 3)))
    deviation = xs[0] - xs[0].mean(axes, keepdims=True)
    return deviation / (np.sqrt((deviation**2).mean(axes, keepdims=True)) + 1e-9)


@rule("LpNormalization")
def lp_norm(node: Node, xs: list[Any]) -> Array:
    x, p = xs[0], node.get("p", 2)
    norm = (np.abs(x) ** p).sum(node.get("axis", -1), keepdims=True) ** (1 / p)
    return np.divide(x, norm, out=np.zeros(x.shape), where=norm != 0)


@rule("LRN")
def local_response_norm(node: Node, xs: list[Any]) -> Array:
    x, size = xs[0], node.get("size")
    total = np.zeros(x.shape)
    for c in range(x.shape[1]):
        first, last = max(0, c - (size - 1) // 2), min(x.shape[1] - 1, c + math.ceil((size - 1) / 2))
        total[:, c] = (x[:, first : last + 1] ** 2).sum(1)
    return x / (node.get("bias", 1.0) + node.get("alpha", 1e-4) / size * total) ** node.get("beta", 0.75)


# --- reductions --------------------------------------------------------------------------------------

_BEFORE = {"ReduceL1": np.abs, "ReduceL2": np.square, "ReduceSumSquare": np.square}
_AFTER = {"ReduceL2": np.sqrt, "ReduceLogSum": np.log}
_CORE = {"ReduceMean": np.mean, "ReduceProd": np.prod, "ReduceMax": np.max, "ReduceMin": np.min}


@rule(*(f"Reduce{kind}" for kind in
        ("Sum", "Mean", "Max", "Min", "Prod", "L1", "L2", "SumSquare", "LogSum", "LogSumExp")))
def reduce(node: Node, xs: list[Any]) -> Array:
    """Integers are truncated after every function."""
    x, given = xs[0], node.ints("axes", xs, 1)
    axes = tuple(a % x.ndim for a in given or range(x.ndim))
    if not given and node.get("noop_with_empty_axes", 0):
        axes = ()
    keep = bool(node.get("keepdims", 1))

    def settle(value: Array) -> Array:
        return value if x.dtype.kind == "f" else np.trunc(value).astype(x.dtype)

    if node.op == "ReduceLogSumExp":
        highest = np.max(x, axis=axes, keepdims=True)
        total = np.sum(settle(np.exp(x - highest)), axis=axes, keepdims=True)
        found = settle(np.log(total)) + highest
        return found if keep else found.squeeze(axes)
    x = _BEFORE.get(node.op, lambda v: v)(x)
    found = settle(_CORE.get(node.op, np.sum)(x, axis=axes, keepdims=keep))
    return settle(_AFTER.get(node.op, lambda v: v)(found))


@rule("GlobalLpPool")
def global_lp_pool(node: Node, xs: list[Any]) -> Array:
    p = node.get("p", 2)
    return (np.abs(xs[0]) ** p).sum(tuple(range(2, xs[0].ndim)), keepdims=True) ** (1 / p)


@rule("LpPool")
def lp_pool(node: Node, xs: list[Any]) -> Array:
    x, kernel, p = xs[0], node.get("kernel_shape"), node.get("p", 2)
    count = len(kernel)
    strides, dilations = node.get("strides", [1] * count), node.get("dilations", [1] * count)
    pads, ceil = window_paddings(node, x.shape[2:], kernel), bool(node.get("ceil_mode", 0))
    rows = [window_cells(n, k, s, d, pad, ceil) for n, k, s, d, pad in
            zip(x.shape[2:], kernel, strides, dilations, pads, strict=True)]
    found = np.zeros((*x.shape[:2], *map(len, rows)))
    for place in itertools.product(*(range(len(r)) for r in rows)):
        cells = x
        for axis, (at, windows) in enumerate(zip(place, rows, strict=True)):
            cells = np.take(cells, [c for c in windows[at] if 0 <= c < x.shape[axis + 2]], axis + 2)
        found[(..., *place)] = (np.abs(cells) ** p).sum(tuple(range(2, x.ndim))) ** (1 / p)
    return found


# --- the place of extremes, running sums -------------------------------------------------------------


@rule("ArgMax", "ArgMin")
def arg_extreme(node: Node, xs: list[Any]) -> Array:
    x, axis = xs[0], node.get("axis", 0)
    function = np.argmax if node.op == "ArgMax" else np.argmin
    if node.get("select_last_index", 0):
        found = x.shape[axis] - 1 - function(np.flip(x, axis), axis)
    else:
        found = function(x, axis)
    return np.expand_dims(found, axis) if node.get("keepdims", 1) else found


@rule("Hardmax")
def hardmax(node: Node, xs: list[Any]) -> Array:
    x = xs[0]
    axis = node.get("axis", -1 if node.version >= 13 else 1) % x.ndim
    flat = np.moveaxis(x, axis, -1) if node.version >= 13 else x.reshape(*x.shape[:axis], -1)
    found = np.eye(flat.shape[-1])[flat.argmax(-1)]
    return np.moveaxis(found, -1, axis) if node.version >= 13 else found.reshape(x.shape)


@rule("CumSum", "CumProd")
def cumulative(node: Node, xs: list[Any]) -> Array:
    x, axis = xs[0], int(np.asarray(xs[1]).reshape(-1)[0])
    x = np.moveaxis(x, axis, 0)
    x = x[::-1] if node.get("reverse", 0) else x
    step, start = (np.add, 0) if node.op == "CumSum" else (np.multiply, 1)
    found, state = np.empty(x.shape, x.dtype), np.full(x.shape[1:], start, x.dtype)
    for i, cells in enumerate(x):
        after = step(state, cells)
        found[i] = state if node.get("exclusive", 0) else after
        state = after
    return np.moveaxis(found[::-1] if node.get("reverse", 0) else found, 0, axis)


@rule("TopK")
def top_k(node: Node, xs: list[Any]) -> tuple[Array, Array]:
    x, axis = xs[0], node.get("axis", -1)
    k = node.ints("k", xs, 1)[0] if node.version >= 10 else node.get("k")
    keys = x if not node.get("largest", 1) else -x.astype(np.int64) if x.dtype.kind in "iu" else -x
    order = np.take(np.argsort(keys, axis, kind="stable"), range(k), axis)
    return np.take_along_axis(x, order, axis), order
