"""The nodes that a drawn network may have: each function draws the parameters of one and takes it up if it can."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st

from tests.builder import Array, Builder, Value


def window(b: Builder, n: int, widest: int = 4) -> tuple[int, int, int]:
    """Kernel, stride and dilation for an axis of n cells."""
    kernel = b.integer(1, min(widest, n + 1))
    dilation = b.integer(1, 3) if b.integer(0, 3) == 0 else 1
    return kernel, b.integer(1, 3), dilation


def fits(extents: Sequence[int], kernel: Sequence[int], dilations: Sequence[int], pads: Sequence[int]) -> bool:
    """Whether every window fits its padded axis."""
    count = len(extents)
    return all((k - 1) * d + 1 <= n + pads[a] + pads[a + count]
               for a, (n, k, d) in enumerate(zip(extents, kernel, dilations, strict=True)))


def conv(b: Builder) -> bool:
    x = b.last
    if len(x.shape) < 3:
        return False
    kernel, strides, dilations = (list(v) for v in zip(*(window(b, n) for n in x.spatial), strict=True))
    group = b.choose(*(g for g in range(1, x.shape[1] + 1) if x.shape[1] % g == 0))
    filters = group * b.integer(1, 2 if group > 1 else 4)
    auto = b.choose(None, None, None, "SAME_UPPER", "SAME_LOWER", "VALID")
    pads = None if auto else [b.integer(0, 3) for _ in range(2 * len(kernel))]
    if auto in ("SAME_UPPER", "SAME_LOWER") and b.style.runtime:
        dilations = [1] * len(kernel)
    if not (auto or "").startswith("SAME") and not fits(x.spatial, kernel, dilations, pads or [0] * 6):
        return False
    weight = b.data(filters, x.shape[1] // group, *kernel)
    inputs = [x, weight, b.data(filters)] if b.flag() else [x, weight]
    return b.add("Conv", inputs, {"kernel_shape": kernel, "strides": strides, "dilations": dilations,
                                  "group": group, "auto_pad": auto, "pads": pads})


def conv_transpose(b: Builder) -> bool:
    x = b.last
    if len(x.shape) < 3:
        return False
    kernel, strides, dilations = (list(v) for v in zip(*(window(b, n) for n in x.spatial), strict=True))
    full = [(n - 1) * s + (k - 1) * d + 1
            for n, k, s, d in zip(x.spatial, kernel, strides, dilations, strict=True)]
    group = b.choose(*(g for g in range(1, x.shape[1] + 1) if x.shape[1] % g == 0))
    attributes: dict[str, Any] = {"kernel_shape": kernel, "strides": strides, "dilations": dilations, "group": group}
    how = b.choose("plain", "pads", "pads", "auto", "shape")
    if how == "pads":
        attributes["pads"] = [b.integer(0, 2) for _ in range(2 * len(kernel))]
        most = [s if b.style.runtime else max(s, d) for s, d in zip(strides, dilations, strict=True)]
        attributes["output_padding"] = [b.integer(0, m - 1) for m in most]
        rest = [n - attributes["pads"][a] - attributes["pads"][a + len(full)] for a, n in enumerate(full)]
        if min(rest) < 1:
            return False
    elif how == "auto":
        attributes["auto_pad"] = b.choose("SAME_UPPER", "SAME_LOWER", "VALID")
    elif how == "shape":
        # onnxruntime loads no model whose output_shape is smaller than the input
        least = [n if b.style.runtime else 1 for n in x.spatial]
        attributes["output_shape"] = [b.integer(max(low, n - 3), n) for low, n in zip(least, full, strict=True)]
    weight = b.data(x.shape[1], b.integer(1, 3), *kernel)
    bias = [b.data(weight.shape[1] * group)] if b.flag() else []
    return b.add("ConvTranspose", [x, weight, *bias], attributes)


def pool(b: Builder) -> bool:
    x = b.last
    if len(x.shape) < 3:
        return False
    op = "MaxPool" if b.style.integers else b.choose("MaxPool", "MaxPool", "AveragePool")
    kernel, strides, dilations = (list(v) for v in zip(*(window(b, n) for n in x.spatial), strict=True))
    dilates = b.opset >= (10 if op == "MaxPool" else 19)
    dilations = dilations if dilates else [1] * len(kernel)
    auto = b.choose(None, None, None, "SAME_UPPER", "SAME_LOWER", "VALID")
    if auto in ("SAME_UPPER", "SAME_LOWER") and b.style.runtime:  # it knows no other SAME pools
        dilations = [1] * len(kernel)
        strides = [min(s, k) for s, k in zip(strides, kernel, strict=True)]
    pads = None if auto else [b.integer(0, min(2, k - 1)) for k in kernel * 2]
    ceil = b.integer(0, 1) if b.opset >= 10 and not auto else None
    if not (auto or "").startswith("SAME") and not fits(x.spatial, kernel, dilations, pads or [0] * 6):
        return False
    if any((k - 1) * d >= n for k, d, n in zip(kernel, dilations, x.spatial, strict=True) if d > 1):
        return False  # a window of padding alone has no mean, and no maximum
    attributes: dict[str, Any] = {"kernel_shape": kernel, "strides": strides, "auto_pad": auto, "pads": pads,
                                  "ceil_mode": ceil, "dilations": dilations if dilates else None}
    if ceil and b.style.runtime and b.opset < 22 and not _infers(x, kernel, strides, dilations, pads or [0] * 6):
        return False
    if op == "AveragePool":
        attributes["count_include_pad"] = b.integer(0, 1)
    return b.add(op, [x], attributes)


def _infers(x: Value, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int],
            pads: Sequence[int]) -> bool:
    """Whether shape inference before opset 22 finds the right extents: no window of ceil_mode starts in the padding."""
    count = len(kernel)
    for a, (n, k, s, d) in enumerate(zip(x.spatial, kernel, strides, dilations, strict=True)):
        last = -(-(n + pads[a] + pads[a + count] - (k - 1) * d - 1) // s)
        if last * s >= n + pads[a]:
            return False
    return True


def global_pool(b: Builder) -> bool:
    x = b.last
    names = ["GlobalMaxPool"] if b.style.integers else ["GlobalMaxPool", "GlobalAveragePool"]
    return len(x.shape) >= 3 and b.integer(0, 1) == 0 and b.add(b.choose(*names), [x])


def norm(b: Builder) -> bool:
    x = b.last
    if len(x.shape) < 3:
        return False
    channels, epsilon = x.shape[1], float(np.float32(b.choose(1e-3, 1e-1)))
    scale, bias, mean = (b.data(channels) for _ in range(3))
    if b.flag():
        variance = np.abs(b.data(channels)) + np.float32(0.5)
        return b.add("BatchNormalization", [x, scale, bias, mean, variance], {"epsilon": epsilon})
    spread = x.cells.var(tuple(range(2, len(x.shape))))
    if spread.min() < 1e-4 and (b.style.runtime or math.prod(x.spatial) > 1):
        return False  # what is nearly constant loses its digits, sharded or not
    return b.add("InstanceNormalization", [x, scale, bias], {"epsilon": epsilon})


def unary(b: Builder) -> bool:
    x = b.last
    if b.style.integers:
        return b.add(b.choose("Relu", "Neg", "Abs", "Identity"), [x])
    op = b.choose("Relu", "LeakyRelu", "Sigmoid", "Tanh", "Elu", "Softplus", "Neg", "Abs", "Identity", "Dropout",
                  "Clip")
    if op == "Clip" and b.opset < 11:
        return b.add(op, [x], {"min": -0.5, "max": 0.75})
    if op == "Clip":
        return b.add(op, [x, np.array(-0.5, np.float32), np.array(0.75, np.float32)])
    return b.add(op, [x])


def binary(b: Builder) -> bool:
    x = b.last
    op = b.choose("Add", "Sub", "Max", "Min") if b.style.integers else b.choose("Add", "Sub", "Mul", "Max", "Min")
    partners = [v for v in b.values if _broadcasts(v.shape, x.shape)]
    if b.flag():
        other: Value | Array = b.choose(*partners)
    else:
        shape = [n if b.flag() else 1 for n in x.shape][b.integer(0, len(x.shape)) :]
        other = b.data(*shape)
    return b.add(op, [x, other] if b.flag() else [other, x])


def _broadcasts(one: tuple[int, ...], two: tuple[int, ...]) -> bool:
    return len(one) <= len(two) and all(a in (1, n) for a, n in zip(one[::-1], two[::-1], strict=False))


def concat(b: Builder) -> bool:
    x = b.last
    axis = b.integer(0, len(x.shape) - 1)
    partners = [v for v in b.values if len(v.shape) == len(x.shape)
                and v.shape[:axis] + v.shape[axis + 1 :] == x.shape[:axis] + x.shape[axis + 1 :]]
    parts: list[Value | Array] = [x, *(b.choose(*partners) for _ in range(b.integer(1, 2)))]
    if b.integer(0, 3) == 0:
        parts.append(b.data(*x.shape[:axis], b.integer(1, 3), *x.shape[axis + 1 :]))
    return b.add("Concat", parts, {"axis": axis - (len(x.shape) if b.flag() else 0)})


def resize(b: Builder) -> bool:
    x = b.last
    rank = len(x.shape)
    if rank < 3:
        return False
    nearest = b.style.integers or b.flag()
    mode = "nearest" if nearest else "linear"
    factors = [1.0, 1.0, *(b.choose(1.0, 2.0, 3.0, 0.5, 1.5, 0.75, 1.3, 0.4, 2.6) for _ in x.spatial)]
    scales = np.array(factors, np.float32)
    sizes = [math.floor(np.float32(n) * s) for n, s in zip(x.shape, scales, strict=True)]
    inferred = [math.floor(n * float(s)) for n, s in zip(x.shape, scales, strict=True)]
    if min(sizes) < 1 or (b.style.runtime and sizes != inferred):
        return False  # onnxruntime multiplies in float32, shape inference does not
    if b.opset < 10:
        scales = np.array([1, 1, *(b.choose(1.0, 2.0, 3.0, 1.5) for _ in x.spatial)], np.float32)
        return b.add("Upsample", [x, scales], {"mode": mode})
    if b.opset < 11:
        return b.add("Resize", [x, scales], {"mode": mode})
    coordinates = ["half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric"]
    coordinates += ["tf_half_pixel_for_nn"] if b.opset < 13 else []
    coordinates += ["half_pixel_symmetric"] if b.opset >= 19 else []
    attributes = {"mode": mode, "coordinate_transformation_mode": b.choose(*coordinates, "tf_crop_and_resize"),
                  "extrapolation_value": 0.25}
    if nearest:
        attributes["nearest_mode"] = b.choose("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")
    roi = None
    if attributes["coordinate_transformation_mode"] == "tf_crop_and_resize":
        starts = [0.0, 0.0, *(b.choose(0.0, 0.25, -0.25, 0.6) for _ in x.spatial)]
        ends = [1.0, 1.0, *(b.choose(1.0, 0.75, 1.25, 0.1) for _ in x.spatial)]
        roi = np.array(starts + ends, np.float32)
        attributes["extrapolation_value"] = 1.0 if b.style.integers else 0.25
    elif b.opset < 13:
        roi = np.zeros(0, np.float32)
    if b.flag():
        return b.add("Resize", [x, roi, scales], attributes)
    sizes = np.array([*x.shape[:2], *(b.integer(1, 2 * n + 1) for n in x.spatial)], np.int64)
    return b.add("Resize", [x, roi, np.zeros(0, np.float32) if b.opset < 13 else None, sizes], attributes)


def pad(b: Builder) -> bool:
    x = b.last
    mode = b.choose("constant", "reflect", "edge", *(["wrap"] if b.opset >= 19 else []))
    lows, highs = [], []
    for n in x.shape:
        most = {"reflect": n - 1, "wrap": n}.get(mode, 3)
        touched = b.integer(0, 2) != 0
        lo, hi = (b.integer(-min(2, n - 1), min(3, most)) if touched else 0 for _ in range(2))
        if n + min(lo, 0) + min(hi, 0) < 1:
            return False
        left = n + min(lo, 0) + min(hi, 0)
        if max(lo, hi) > {"reflect": left - 1, "wrap": left}.get(mode, 3):
            return False
        lows.append(lo)
        highs.append(hi)
    if b.opset < 11:
        return b.add("Pad", [x], {"mode": mode, "pads": lows + highs, "value": 1.0})
    value = np.array(1.0, np.float32) if b.flag() else None
    return b.add("Pad", [x, np.array(lows + highs, np.int64), value], {"mode": mode})


def slice_(b: Builder) -> bool:
    x = b.last
    axes = sorted(b.draw(st.sets(st.integers(0, len(x.shape) - 1), min_size=1, max_size=2)))
    starts, ends, steps = [], [], []
    for axis in axes:
        n = x.shape[axis]
        step = b.choose(1, 1, 1, 2, 3, -1, -2) if b.opset >= 10 else 1
        low, high = sorted((b.integer(0, n), b.integer(0, n)))
        starts.append(low if step > 0 else high - 1)
        ends.append(high if step > 0 else low - 1 - n)
        steps.append(step)
        if low == high:
            return False
    if b.opset < 10:
        return b.add("Slice", [x], {"axes": axes, "starts": starts, "ends": ends})
    arrays = [np.array(v, np.int64) for v in (starts, ends, axes, steps)]
    return b.add("Slice", [x, *arrays])


def softmax(b: Builder) -> bool:
    x = b.last
    return b.add(b.choose("Softmax", "LogSoftmax"), [x], {"axis": b.integer(0, len(x.shape) - 1)})


def reduce(b: Builder) -> bool:
    x = b.last
    names = ["ReduceMax", "ReduceMin", "ReduceSum"] + ([] if b.style.integers else ["ReduceMean"])
    op = b.choose(*names)
    axes = sorted(b.draw(st.sets(st.integers(0, len(x.shape) - 1), min_size=1, max_size=3)))
    keep = 1 if len(x.shape) - len(axes) < 2 else b.choose(1, 1, 0)
    if b.opset < (13 if op == "ReduceSum" else 18):
        return b.add(op, [x], {"axes": axes, "keepdims": keep})
    return b.add(op, [x, np.array(axes, np.int64)], {"keepdims": keep})


def transpose(b: Builder) -> bool:
    x = b.last
    return b.add("Transpose", [x], {"perm": list(b.draw(st.permutations(range(len(x.shape)))))})


def reshape(b: Builder) -> bool:
    """Two neighbouring axes become one, or one becomes two."""
    x = b.last
    axis = b.integer(0, len(x.shape) - 1)
    if b.flag() and axis + 1 < len(x.shape) and len(x.shape) > 3:
        shape = [*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :]]
    else:
        divisor = b.choose(*(d for d in range(1, x.shape[axis] + 1) if x.shape[axis] % d == 0))
        shape = [*x.shape[:axis], divisor, x.shape[axis] // divisor, *x.shape[axis + 1 :]]
    if len(shape) > 5:
        return False
    shape[b.integer(0, len(shape) - 1)] = -1
    return b.add("Reshape", [x, np.array(shape, np.int64)])


def skip(b: Builder) -> bool:
    """A convolution and the sum with what went in: a residual block."""
    x = b.last
    if len(x.shape) < 3:
        return False
    weight = b.data(x.shape[1], x.shape[1], *[3] * len(x.spatial))
    return (b.add("Conv", [x, weight], {"pads": [1] * (2 * len(x.spatial))})
            and b.add("Relu", [b.values[-1]]) and b.add("Add", [b.values[-1], x]))


def join(b: Builder) -> bool:
    """A sum, or channels side by side, of values of equal extents: the skips of a U-Net."""
    x = b.last
    partners = [v for v in b.values if v.shape == x.shape]
    pair = [x, b.choose(*partners)]
    return b.add("Add", pair) if b.flag() else b.add("Concat", pair, {"axis": 1})


def head(b: Builder) -> bool:
    """Flatten and a matrix product: nothing spatial comes after it."""
    x = b.values[-1]
    if math.prod(x.shape[1:]) > 400 or not b.add("Flatten", [x], {"axis": 1}):
        return False
    features, classes = b.values[-1].shape[1], b.integer(1, 4)
    if b.flag():
        return b.add("Gemm", [b.values[-1], b.data(classes, features), b.data(classes)], {"transB": 1})
    return b.add("MatMul", [b.values[-1], b.data(features, classes)])


EXACT = (conv, conv, conv_transpose, pool, unary, binary, concat, resize, pad, slice_, reduce, transpose, reshape,
         global_pool, skip)
ALL = (*EXACT, conv, conv_transpose, pool, norm, softmax, resize)
CONVOLUTIONAL = (conv, conv, skip, conv_transpose, pool, norm, unary, resize, join)
