"""Numbers of 8 and 16 bits with scales and zero points."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.builder import MICROSOFT, Array, Builder, Value, draws
from tests.drawn_nodes import fits, window

SCALES = (0.0173, 0.0471, 0.0313)
"""No sum of products of these lies midway between two whole numbers."""


def scale(b: Builder, *shape: int) -> Array:
    return np.asarray(b.random.choice(SCALES, shape), np.float32)


def zero(b: Builder, kind: np.dtype | type, *shape: int) -> Array:
    low = 0 if np.dtype(kind).kind == "u" else -9
    return np.asarray(b.random.integers(low, 20, shape)).astype(kind)


def eight(b: Builder) -> Value:
    """Numbers of eight bits."""
    there = [v for v in b.values if v.cells.dtype in (np.uint8, np.int8) and v.shape]
    if there and b.integer(0, 3):
        return b.choose(*there)
    x, kind = b.last, b.choose(np.uint8, np.int8)
    if b.flag() and not b.style.integers and b.add("QuantizeLinear", [x, scale(b), zero(b, kind)]):
        return b.values[-1]
    array = b.whole_data(kind, *x.shape, low=-100, high=101)
    return b.feed_array(array)


@draws("QuantizeLinear", f"{MICROSOFT}:QuantizeLinear")
def quantize(b: Builder) -> bool:
    op, x = b.op("QuantizeLinear", f"{MICROSOFT}:QuantizeLinear"), b.last
    kinds = [np.uint8, np.int8, *([np.uint16, np.int16] if b.opset >= 21 or MICROSOFT in op else [])]
    kind = b.choose(*kinds)
    if (b.opset < 13 and MICROSOFT not in op) or b.flag():
        return b.add(op, [x, scale(b), *([zero(b, kind)] if b.flag() else [])])
    axis = b.axis(x)
    n = x.shape[axis]
    if b.opset >= 21 and MICROSOFT not in op and b.flag():
        block = b.integer(1, n)
        shape = [-(-n // block) if a == axis else m for a, m in enumerate(x.shape)]
        points = [zero(b, kind, *shape)] if b.flag() else []
        return b.add(op, [x, scale(b, *shape), *points], {"axis": axis, "block_size": block})
    return b.add(op, [x, scale(b, n), zero(b, kind, n)], {"axis": b.signed(axis, x)})


@draws("DequantizeLinear", f"{MICROSOFT}:DequantizeLinear")
def dequantize(b: Builder) -> bool:
    op = b.op("DequantizeLinear", f"{MICROSOFT}:DequantizeLinear")
    x = eight(b)
    kind = x.cells.dtype
    if b.opset < 13 or b.flag():
        return b.add(op, [x, scale(b), *([zero(b, kind)] if b.flag() or MICROSOFT in op else [])])
    axis = b.axis(x)
    n = x.shape[axis]
    if b.opset >= 21 and MICROSOFT not in op and b.flag():
        block = b.integer(1, n)
        shape = [-(-n // block) if a == axis else m for a, m in enumerate(x.shape)]
        return b.add(op, [x, scale(b, *shape), zero(b, kind, *shape)], {"axis": axis, "block_size": block})
    return b.add(op, [x, scale(b, n), zero(b, kind, n)], {"axis": b.signed(axis, x)})


@draws("ConvInteger", "QLinearConv")
def convolution(b: Builder) -> bool:
    op, x = b.op("ConvInteger", "QLinearConv"), eight(b)
    if not 3 <= len(x.shape) <= 5 or not op:
        return False
    if op == "ConvInteger" and x.cells.dtype != np.uint8:
        return False
    kernel, strides, dilations = (list(v) for v in zip(*(window(b, n, 3) for n in x.spatial), strict=True))
    auto = b.choose(None, None, None, "VALID", "SAME_UPPER")
    pads = None if auto else [b.integer(0, 2) for _ in kernel * 2]
    dilations = [1] * len(kernel) if auto == "SAME_UPPER" else dilations
    if not fits(x.spatial, kernel, dilations, pads or [0] * 6):
        return False
    group = b.choose(*(g for g in range(1, x.shape[1] + 1) if x.shape[1] % g == 0))
    filters = group * b.integer(1, 2)
    kind = x.cells.dtype
    other = np.dtype(np.uint8) if kind == np.uint8 and b.flag() else np.dtype(np.int8)
    weight = b.whole_data(other, filters, x.shape[1] // group, *kernel, low=-20, high=21)
    attributes: dict[str, Any] = {"kernel_shape": kernel, "strides": strides, "dilations": dilations, "group": group,
                                  "auto_pad": auto, "pads": pads}
    if op == "ConvInteger":
        weight = weight.astype(np.uint8) if weight.min() >= 0 else (weight + 20).astype(np.uint8)
        points = [zero(b, np.uint8), *([zero(b, np.uint8)] if b.flag() else [])] if b.flag() else []
        return b.add(op, [x, weight, *points], attributes)
    per = [filters] if b.flag() else []
    point = np.zeros(per, other) if per else zero(b, other)
    bias = [b.whole_data(np.int32, filters, low=-300, high=301)] if b.flag() else []
    return b.add(op, [x, scale(b), zero(b, kind), weight, scale(b, *per), point, np.float32(b.choose(0.0391, 0.713)),
                      zero(b, kind), *bias], attributes)


@draws("MatMulInteger", "QLinearMatMul")
def matrix(b: Builder) -> bool:
    op, x = b.op("MatMulInteger", "QLinearMatMul"), eight(b)
    if len(x.shape) < 2 or not op:
        return False
    kind = x.cells.dtype
    if op == "MatMulInteger" and kind != np.uint8:
        return False
    columns = b.integer(1, 4)
    other = np.dtype(np.uint8) if kind == np.uint8 and b.flag() else np.dtype(np.int8)
    weight: Array | Value = b.whole_data(other, x.shape[-1], columns, low=-20, high=21)
    weight = b.feed_array(weight) if b.integer(0, 2) == 0 else weight
    if op == "MatMulInteger":
        return b.add(op, [x, weight, *([zero(b, kind), zero(b, other)] if b.flag() else [])])
    per = [columns] if b.flag() else []
    return b.add(op, [x, scale(b), zero(b, kind), weight, scale(b, *per), zero(b, other, *per),
                      np.float32(b.choose(0.0391, 0.713)), zero(b, kind)])


@draws(*(f"{MICROSOFT}:QLinear{name}" for name in ("Add", "Mul", "GlobalAveragePool")))
def contrib(b: Builder) -> bool:
    op = b.op(*(f"{MICROSOFT}:QLinear{name}" for name in ("Add", "Mul", "GlobalAveragePool")))
    if b.opset < 11:
        return False  # onnxruntime's quantiser writes opset 11 and up
    x = eight(b)
    kind = x.cells.dtype
    if op.endswith("Pool"):
        last = b.integer(0, 1)
        return 3 <= len(x.shape) <= 5 and b.add(op, [x, scale(b), zero(b, kind), scale(b), zero(b, kind)],
                                           {"channels_last": last})
    shape = [n if b.flag() else 1 for n in x.shape]
    there = [v for v in b.values if v.cells.dtype == kind and v.shape == x.shape]
    other: Value | Array = b.choose(*there) if b.flag() else b.whole_data(kind, *shape, low=-60, high=61)
    return b.add(op, [x, scale(b), zero(b, kind), other, scale(b), zero(b, kind), np.float32(b.choose(0.0891, 0.713)),
                      zero(b, kind)])
