"""Resizing, sampling at points, and max pools with the places of their maxima."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tests.builder import Array, Builder, Value, draws
from tests.drawn_nodes import fits, window


@draws("Resize", "Upsample", exact=True)
def resize(b: Builder) -> bool:
    x = b.last
    if not 3 <= len(x.shape) <= 5:
        return False
    mode = "nearest" if b.style.integers or b.flag() else "linear"
    if b.knows("Upsample"):
        scales = np.array([1, 1, *(b.choose(1.0, 2.0, 3.0, 1.5) for _ in x.spatial)], np.float32)
        return b.add("Upsample", [x, scales], {"mode": mode})
    cubic = mode == "linear" and b.opset >= 11 and len(x.shape) == 4 and b.integer(0, 2) == 0
    factors = [1.0, 1.0, *(b.choose(1.0, 2.0, 3.0, 0.5, 1.5, 0.75, 1.3, 0.4, 2.6) for _ in x.spatial)]
    scales = np.array(factors, np.float32)
    sizes = [math.floor(np.float32(n) * s) for n, s in zip(x.shape, scales, strict=True)]
    inferred = [math.floor(n * float(s)) for n, s in zip(x.shape, scales, strict=True)]
    if min(sizes) < 1 or (b.style.runtime and sizes != inferred):
        return False  # onnxruntime multiplies in float32, shape inference does not
    if b.opset < 11:
        return b.add("Resize", [x, scales], {"mode": mode})
    attributes = resize_attributes(b, mode, cubic)
    roi = region(b, x) if attributes["coordinate_transformation_mode"] == "tf_crop_and_resize" else None
    if roi is None and b.opset < 13:
        roi = np.zeros(0, np.float32)
    if b.flag():
        return b.add("Resize", [x, roi, scales], attributes)
    extents = [b.integer(1, 2 * n + 1) for n in x.spatial]
    if b.opset >= 18 and roi is None and b.flag():
        axes = list(range(2, len(x.shape)))
        policy = b.choose(None, "stretch", "not_larger", "not_smaller")
        attributes |= {"axes": axes, "keep_aspect_ratio_policy": policy}
        return b.add("Resize", [x, None, None, np.array(extents, np.int64)], attributes)
    wanted = np.array([*x.shape[:2], *extents], np.int64)
    return b.add("Resize", [x, roi, np.zeros(0, np.float32) if b.opset < 13 else None, wanted], attributes)


def resize_attributes(b: Builder, mode: str, cubic: bool) -> dict[str, Any]:
    coordinates = ["half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric"]
    coordinates += ["tf_half_pixel_for_nn"] if b.opset < 13 else []
    coordinates += ["half_pixel_symmetric"] if b.opset >= 19 else []
    attributes: dict[str, Any] = {"mode": "cubic" if cubic else mode,
                                  "extrapolation_value": 1.0 if b.style.integers else 0.25}
    antialias = b.opset >= 18 and mode == "linear" and b.integer(0, 3) == 0
    if antialias:
        attributes["antialias"] = 1
    elif mode == "linear":
        coordinates.append("tf_crop_and_resize")
    if mode == "nearest":
        coordinates.append("tf_crop_and_resize")
        attributes["nearest_mode"] = b.choose("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")
    if cubic:
        attributes |= {"cubic_coeff_a": b.choose(-0.75, -0.5), "exclude_outside": b.integer(0, 1)}
    attributes["coordinate_transformation_mode"] = b.choose(*coordinates)
    return attributes


def region(b: Builder, x: Value) -> Array:
    starts = [0.0, 0.0, *(b.choose(0.0, 0.25, -0.25, 0.6) for _ in x.spatial)]
    ends = [1.0, 1.0, *(b.choose(1.0, 0.75, 1.25, 0.1) for _ in x.spatial)]
    return np.array(starts + ends, np.float32)


@draws("GridSample")
def grid_sample(b: Builder) -> bool:
    x = b.last
    volume = len(x.shape) == 5 and b.opset >= 20
    if not b.op("GridSample") or (len(x.shape) != 4 and not volume):
        return False
    extents = [b.integer(1, 5) for _ in x.spatial]
    array = b.random.uniform(-1.3, 1.3, (x.shape[0], *extents, len(extents))).astype(np.float32)
    grid: Value | Array = b.feed_array(array) if b.flag() else array
    names = {"bilinear": "linear", "bicubic": "cubic"} if b.opset >= 20 else {}
    mode = b.choose("bilinear", "nearest") if volume else b.choose("bilinear", "nearest", "bicubic")
    return b.add("GridSample", [x, grid], {
        "mode": names.get(mode, mode), "padding_mode": b.choose("zeros", "border", "reflection"),
        "align_corners": b.integer(0, 1)})


@draws("AffineGrid")
def affine_grid(b: Builder) -> bool:
    """A grid from matrices, and often what is sampled at it."""
    x, spatial = b.last, b.choose(2, 3)
    if not b.op("AffineGrid"):
        return False
    sampled = len(x.shape) == spatial + 2
    batch = x.shape[0] if sampled else b.integer(1, 3)
    matrices = b.feed(batch, spatial, spatial + 1)
    extents = [batch, b.integer(1, 3), *(b.integer(2, 6) for _ in range(spatial))]
    done = b.add("AffineGrid", [matrices, np.array(extents, np.int64)], {"align_corners": b.integer(0, 1)})
    if not done or not sampled or b.flag():
        return done
    return b.add("GridSample", [x, b.values[-1]], {"align_corners": b.integer(0, 1)})


@draws("MaxPool", "MaxUnpool", exact=True)
def max_pool_with_places(b: Builder) -> bool:
    """Maxima with their places, and often back to where they came from."""
    x = b.last
    if not 3 <= len(x.shape) <= 5:
        return False
    kernel, strides, _ = (list(v) for v in zip(*(window(b, n, 3) for n in x.spatial), strict=True))
    back = b.style.focus == "MaxUnpool" or b.flag()
    if back:
        kernel = [max(k, s) if b.flag() else k for k, s in zip(kernel, strides, strict=True)]
    pads = [0] * (2 * len(kernel)) if back and b.flag() else [b.integer(0, k - 1) for k in kernel * 2]
    if not fits(x.spatial, kernel, [1] * len(kernel), pads):
        return False
    order = b.integer(0, 1) if not back and b.opset >= 8 else None
    if not b.add("MaxPool", [x], {"kernel_shape": kernel, "strides": strides, "pads": pads, "storage_order": order}, 2):
        return False
    if not back:
        return True
    top, places = b.values[-1], b.values[-2]
    if len(np.unique(places.cells)) < places.cells.size:
        return True  # windows that share a maximum write one cell twice
    shape = np.array(x.shape, np.int64)
    return b.add("MaxUnpool", [top, places, shape], {"kernel_shape": kernel, "strides": strides, "pads": pads})
