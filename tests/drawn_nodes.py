"""Convolutions, pools and blocks of them: each function draws the parameters of a node and takes it up if it can."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.builder import Builder, Value, draws


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


@draws("Conv", exact=True)
def conv(b: Builder) -> bool:
    x = b.last
    if not 3 <= len(x.shape) <= 5:
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


@draws("ConvTranspose", exact=True)
def conv_transpose(b: Builder) -> bool:
    x = b.last
    if not 3 <= len(x.shape) <= 5:
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


@draws("MaxPool", "AveragePool", exact=True)
def pool(b: Builder) -> bool:
    x = b.last
    if not 3 <= len(x.shape) <= 5:
        return False
    op = "MaxPool" if b.style.integers else b.op("MaxPool", "MaxPool", "AveragePool")
    kernel, strides, dilations = (list(v) for v in zip(*(window(b, n) for n in x.spatial), strict=True))
    dilates = b.opset >= (10 if op == "MaxPool" else 19)
    dilations = dilations if dilates else [1] * len(kernel)
    auto = b.choose(None, None, None, "SAME_UPPER", "SAME_LOWER", "VALID")
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        if b.style.runtime:  # it knows no dilated SAME pools
            dilations = [1] * len(kernel)
        # a window shorter than its stride is refused
        strides = [min(s, (k - 1) * d + 1) for s, k, d in zip(strides, kernel, dilations, strict=True)]
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


@draws("GlobalMaxPool", "GlobalAveragePool", exact=True)
def global_pool(b: Builder) -> bool:
    x = b.last
    names = ["GlobalMaxPool"] if b.style.integers else ["GlobalMaxPool", "GlobalAveragePool"]
    wanted = b.style.focus in names or b.integer(0, 1) == 0
    return 3 <= len(x.shape) <= 5 and wanted and b.add(b.op(*names), [x])


@draws("BatchNormalization", "InstanceNormalization")
def norm(b: Builder) -> bool:
    x = b.last
    if not 3 <= len(x.shape) <= 5:
        return False
    channels, epsilon = x.shape[1], float(np.float32(b.choose(1e-3, 1e-1)))
    scale, bias, mean = (b.data(channels) for _ in range(3))
    if b.op("BatchNormalization", "InstanceNormalization") == "BatchNormalization":
        variance = np.abs(b.data(channels)) + np.float32(0.5)
        return b.add("BatchNormalization", [x, scale, bias, mean, variance], {"epsilon": epsilon})
    spread = x.cells.var(tuple(range(2, len(x.shape))))
    if spread.min() < 1e-4 and (b.style.runtime or math.prod(x.spatial) > 1):
        return False  # what is nearly constant loses its digits, sharded or not
    return b.add("InstanceNormalization", [x, scale, bias], {"epsilon": epsilon})


@draws("Conv", exact=True)
def skip(b: Builder) -> bool:
    """A convolution and the sum with what went in: a residual block."""
    x = b.last
    if not 3 <= len(x.shape) <= 5:
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
    x = b.last
    if math.prod(x.shape[1:]) > 400 or not b.add("Flatten", [x], {"axis": 1}):
        return False
    features, classes = b.values[-1].shape[1], b.integer(1, 4)
    if b.flag():
        return b.add("Gemm", [b.values[-1], b.data(classes, features), b.data(classes)], {"transB": 1})
    return b.add("MatMul", [b.values[-1], b.data(features, classes)])
