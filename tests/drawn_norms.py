"""Reductions, statistics, running sums and extremes."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from tests.builder import Builder, draws
from tests.drawn_nodes import fits, window


def some_axes(b: Builder, rank: int, most: int = 3) -> list[int]:
    return sorted(b.draw(st.sets(st.integers(0, rank - 1), min_size=1, max_size=most)))


@draws("ReduceMax", "ReduceMin", "ReduceSum", "ReduceL1", "ReduceSumSquare", exact=True)
def reduce(b: Builder) -> bool:
    return _reduce(b, b.op("ReduceMax", "ReduceMin", "ReduceSum", "ReduceL1", "ReduceSumSquare"))


@draws("ReduceMean", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceProd")
def reduce_to_floats(b: Builder) -> bool:
    return _reduce(b, b.op("ReduceMean", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceProd"))


def _reduce(b: Builder, op: str) -> bool:
    x = b.last
    if op == "ReduceLogSum":
        positive = b.within(x, 0.1, 2.0)
        if positive is None:
            return False
        x = positive
    axes: list[int] | None = [b.signed(a, x) for a in some_axes(b, len(x.shape))]
    if op in ("ReduceMax", "ReduceMin", "ReduceSum") and b.opset >= 13 and b.integer(0, 3) == 0:
        x = b.whole(b.choose(np.int32, np.int64))
        axes = some_axes(b, len(x.shape))
    keep = b.choose(1, 1, 0)
    axes = None if keep and b.integer(0, 7) == 0 else axes
    if b.opset < (13 if op == "ReduceSum" else 18):
        return b.add(op, [x], {"axes": axes, "keepdims": keep})
    empty = b.integer(0, 1) if axes is None else None
    given = [] if axes is None else [np.array(axes, np.int64)]
    return b.add(op, [x, *given], {"keepdims": keep, "noop_with_empty_axes": empty})


@draws("ArgMax", "ArgMin", "Hardmax", exact=True)
def extreme(b: Builder) -> bool:
    op, x = b.op("ArgMax", "ArgMin", "Hardmax"), b.last
    if op == "Hardmax":
        return b.add(op, [x], {"axis": b.signed(b.axis(x), x)})
    if b.integer(0, 2) == 0:
        x = b.whole(np.int32)
    keep = b.integer(0, 1)
    last = b.integer(0, 1) if b.opset >= 12 else None
    return b.add(op, [x], {"axis": b.signed(b.axis(x), x), "keepdims": keep, "select_last_index": last})


@draws("TopK", exact=True)
def top_k(b: Builder) -> bool:
    x = b.last
    axis = b.axis(x)
    k, outputs = b.integer(1, min(x.shape[axis], 4)), 2
    if b.opset < 10:
        return b.add("TopK", [x], {"axis": axis, "k": k}, outputs)
    largest = b.integer(0, 1) if b.opset >= 11 else None
    return b.add("TopK", [x, np.array([k], np.int64)], {"axis": b.signed(axis, x), "largest": largest}, outputs)


@draws("CumSum", "CumProd", exact=True)
def cumulative(b: Builder) -> bool:
    op = b.op("CumSum") if b.style.integers else b.op("CumSum", "CumProd")
    x = b.whole(np.int32) if op == "CumSum" and b.integer(0, 3) == 0 else b.last
    axis = np.array(b.signed(b.axis(x), x), b.choose(np.int32, np.int64))
    return bool(op) and b.add(op, [x, axis], {"reverse": b.integer(0, 1), "exclusive": b.integer(0, 1)})


@draws("Softmax", "LogSoftmax")
def softmax(b: Builder) -> bool:
    x = b.last
    return b.add(b.op("Softmax", "LogSoftmax"), [x], {"axis": b.signed(b.axis(x), x)})


@draws("LayerNormalization", "RMSNormalization")
def layer_norm(b: Builder) -> bool:
    op, x = b.op("LayerNormalization", "RMSNormalization"), b.last
    axis = b.axis(x)
    shape = x.shape[axis:]
    if op == "LayerNormalization" and x.cells.reshape(*x.shape[:axis], -1).var(-1).min() < 1e-4:
        return False  # what is nearly constant loses its digits, sharded or not
    scale = b.data(*(n if b.integer(0, 3) else 1 for n in shape)) if b.integer(0, 3) == 0 else b.data(*shape)
    attributes = {"axis": b.signed(axis, x), "epsilon": float(np.float32(b.choose(1e-5, 1e-2)))}
    if op != "LayerNormalization":
        return bool(op) and b.add(op, [x, scale], attributes)
    bias = [b.data(*shape[b.integer(0, len(shape) - 1) :])] if b.flag() else []
    return b.add(op, [x, scale, *bias], attributes, b.choose(1, 1, 2, 3))


@draws("GroupNormalization")
def group_norm(b: Builder) -> bool:
    x = b.last
    if not 3 <= len(x.shape) <= 5:
        return False
    groups = b.choose(*(g for g in range(1, x.shape[1] + 1) if x.shape[1] % g == 0))
    length = x.shape[1] if b.opset >= 21 else groups
    if x.cells.reshape(x.shape[0], groups, -1).var(2).min() < 1e-4:
        return False  # what is nearly constant loses its digits, sharded or not
    return bool(b.op("GroupNormalization")) and b.add(
        "GroupNormalization", [x, b.data(length), b.data(length)],
        {"num_groups": groups, "epsilon": float(np.float32(b.choose(1e-5, 1e-2)))})


@draws("MeanVarianceNormalization")
def mean_variance(b: Builder) -> bool:
    x = b.last
    plain = len(x.shape) == 4 and not b.style.runtime and b.integer(0, 3) == 0  # onnx's checker wants axes
    axes = None if plain else some_axes(b, len(x.shape), 4)
    if x.cells.var(tuple(axes or (0, 2, 3))).min() < 1e-3:
        return False  # the definition divides by it
    return b.add("MeanVarianceNormalization", [x], {"axes": axes})


@draws("LpNormalization", "LRN", "GlobalLpPool")
def local_norm(b: Builder) -> bool:
    op, x = b.op("LpNormalization", "LRN", "GlobalLpPool"), b.last
    if op == "LpNormalization":
        return b.add(op, [x], {"axis": b.signed(b.axis(x), x), "p": b.integer(1, 2)})
    if op == "GlobalLpPool":
        return 3 <= len(x.shape) <= 5 and b.add(op, [x], {"p": b.integer(1, 3)})
    if len(x.shape) != 4 and (b.style.runtime or len(x.shape) < 3):
        return False
    attributes: dict[str, Any] = {"size": 2 * b.integer(0, 4) + 1}
    for name, options in {"alpha": (0.1, 0.5), "beta": (0.6, 0.75), "bias": (1.0, 2.0)}.items():
        attributes[name] = float(np.float32(b.choose(*options)))
    return b.add(op, [x], attributes)


@draws("LpPool")
def lp_pool(b: Builder) -> bool:
    x = b.last
    if not 3 <= len(x.shape) <= 5:
        return False
    kernel, strides, dilations = (list(v) for v in zip(*(window(b, n) for n in x.spatial), strict=True))
    dilations = dilations if b.opset >= 18 else [1] * len(kernel)
    pads = [b.integer(0, k - 1) for k in kernel * 2]
    if not fits(x.spatial, kernel, dilations, pads):
        return False
    return b.add("LpPool", [x], {"kernel_shape": kernel, "strides": strides, "pads": pads, "p": b.integer(1, 3),
                                 "dilations": dilations if b.opset >= 18 else None})
