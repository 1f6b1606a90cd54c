"""Cells chosen by indices, constant ones and ones that the model is given or computes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tests.builder import Array, Builder, Value, draws


def indices(b: Builder, extents: Array | int, shape: Sequence[int], negative: bool = True) -> Value | Array:
    """Random indices below extents: a constant, an input or the result of a node."""
    high = np.broadcast_to(np.asarray(extents), shape)
    array = b.random.integers(-high if negative and b.opset >= 11 and b.flag() else 0 * high, high)
    array = np.asarray(array).astype(b.choose(np.int64, np.int64, np.int32))
    if not array.shape or b.flag():
        return array
    given = b.feed_array(array)
    return b.values[-1] if b.flag() and b.add("Identity", [given]) else given


@draws("Gather", exact=True)
def gather(b: Builder) -> bool:
    x = b.any if b.integer(0, 4) == 0 else b.last
    if not x.shape:
        return False
    axis = b.axis(x)
    n = x.shape[axis]
    computed = [v for v in b.values if v.cells.dtype in (np.int64, np.int32) and v.shape
                and v.cells.min() >= 0 and v.cells.max() < n and len(v.shape) + len(x.shape) <= 6]
    if computed and b.integer(0, 2):
        return b.add("Gather", [x, b.choose(*computed)], {"axis": b.signed(axis, x)})
    kind = b.integer(0, 3)
    if kind == 0:
        index: Value | Array = np.array(b.integer(0, n - 1), np.int64)
    elif kind == 1:
        index = np.sort(b.random.permutation(n)[: b.integer(1, n)]).astype(np.int64)
    else:
        index = indices(b, n, [b.integer(1, 6) for _ in range(b.integer(1, 2))])
    fewer = len(np.shape(index)) == 0 and len(x.shape) < 3
    return not fewer and b.add("Gather", [x, index], {"axis": b.signed(axis, x)})


@draws("GatherElements", exact=True)
def gather_elements(b: Builder) -> bool:
    x = b.last
    axis = b.axis(x)
    shape = [b.integer(1, 2 * n) if a == axis else b.choose(n, b.integer(1, n)) for a, n in enumerate(x.shape)]
    if not b.op("GatherElements") or math.prod(shape) > 5000:
        return False
    return b.add("GatherElements", [x, indices(b, x.shape[axis], shape)], {"axis": b.signed(axis, x)})


def vectors(b: Builder, shape: Sequence[int], depth: int, front: Sequence[int]) -> Value | Array:
    """Index vectors of some depth into the first axes of a tensor."""
    return indices(b, np.array(shape[:depth]), [*front, depth])


@draws("GatherND", exact=True)
def gather_nd(b: Builder) -> bool:
    x = b.last
    if not b.op("GatherND"):
        return False
    batch = b.integer(0, len(x.shape) - 1) if b.opset >= 12 else 0
    depth = b.integer(1, len(x.shape) - batch)
    front = [*x.shape[:batch], *(b.integer(1, 4) for _ in range(b.integer(1, 2)))]
    if len(front) + len(x.shape) - batch - depth > 6:
        return False
    index = vectors(b, x.shape[batch:], depth, front)
    index = index.astype(np.int64) if isinstance(index, np.ndarray) else index
    return (index if isinstance(index, np.ndarray) else index.cells).dtype == np.int64 and b.add(
        "GatherND", [x, index], {"batch_dims": batch} if b.opset >= 12 else None)


def updates(b: Builder, shape: Sequence[int]) -> Value | Array:
    array = b.data(*shape)
    same = [v for v in b.values if v.is_float and v.shape == tuple(shape)]
    if same and b.flag():
        return b.choose(*same)
    return b.feed_array(array) if b.flag() else array


def reductions(b: Builder) -> str | None:
    """How written cells merge, as far as the opset knows it."""
    if b.opset < 16:
        return None
    return b.choose("none", "none", "add", "mul", *(["max", "min"] if b.opset >= 18 else []))


@draws("ScatterElements", "Scatter", exact=True)
def scatter_elements(b: Builder) -> bool:
    op, x = b.op("ScatterElements", "Scatter"), b.last
    axis = b.axis(x)
    shape = [b.integer(1, n) for n in x.shape]
    reduction = reductions(b) if op == "ScatterElements" else None
    if reduction in (None, "none", "mul"):  # every cell is written once: the order of writing is not defined
        lines = b.random.permuted(np.broadcast_to(
            np.arange(x.shape[axis]).reshape([-1 if a == axis else 1 for a in range(len(shape))]),
            [n if a == axis else m for a, (m, n) in enumerate(zip(shape, x.shape, strict=True))]), axis=axis)
        array = np.take(lines, range(shape[axis]), axis).astype(np.int64)
        index: Value | Array = b.feed_array(array) if b.flag() else array
    else:
        index = indices(b, x.shape[axis], shape)
    return b.add(op, [x, index, updates(b, shape)], {"axis": b.signed(axis, x), "reduction": reduction})


@draws("ScatterND", exact=True)
def scatter_nd(b: Builder) -> bool:
    x = b.last
    if not b.op("ScatterND"):
        return False
    depth, reduction = b.integer(1, len(x.shape)), reductions(b)
    places = math.prod(x.shape[:depth])
    count = b.integer(1, min(6, places))
    if b.flag():  # a box, as assignments to slices are exported
        lines = [np.sort(b.random.permutation(n)[: b.integer(1, n)]) for n in x.shape[:depth]]
        array = np.stack(np.meshgrid(*lines, indexing="ij"), -1).astype(np.int64)
    else:
        flat = b.random.permutation(places)[:count]
        array = np.stack(np.unravel_index(flat, x.shape[:depth]), -1).astype(np.int64)
    shape = [*array.shape[:-1], *x.shape[depth:]]
    if math.prod(shape) > 5000 or array.ndim > 6:
        return False
    index: Value | Array = b.feed_array(array) if b.integer(0, 2) == 0 else array
    return b.add("ScatterND", [x, index, updates(b, shape)], {"reduction": reduction})


@draws("OneHot", exact=True)
def one_hot(b: Builder) -> bool:
    x = b.whole(np.int64, -3 if b.opset >= 11 else 0, 9)
    depth = b.integer(3, 7)
    values = np.array([0, 1], np.float32) if b.flag() else np.array([-1, 2], np.float32)
    axis = b.choose(None, b.integer(0, len(x.shape)), -1)
    return len(x.shape) < 5 and b.add("OneHot", [x, np.array(b.choose(depth, [depth]), np.int64), values],
                                      {"axis": axis})
