"""Resize and Upsample in float64: per axis a matrix of interpolation weights, from the ONNX definition."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Array = np.ndarray


def resize(op: str, version: int, attributes: Mapping[str, Any], xs: Sequence[Any]) -> Array:
    """Output of a Resize or Upsample node; nearest neighbours as float32 coordinates find them."""
    x = xs[0]
    legacy = op == "Upsample" or version < 11
    mode = "asymmetric" if legacy else attributes.get("coordinate_transformation_mode", "half_pixel")
    axes = [a % x.ndim for a in attributes.get("axes", range(x.ndim))]
    scales, sizes = _target(op, version, attributes, xs, axes)
    shape = list(x.shape)
    for i, axis in enumerate(axes):
        grown = np.float32(x.shape[axis]) * np.float32(1 if scales is None else scales[i])
        shape[axis] = sizes[i] if sizes is not None else int(np.floor(grown))
    if shape == list(x.shape):  # onnxruntime copies, whatever the scales and the roi
        return x
    roi = np.asarray(xs[1]).reshape(-1) if mode == "tf_crop_and_resize" else np.zeros(2 * len(axes))
    nearest = attributes.get("mode", "nearest") == "nearest"
    rounding = "simple" if legacy else attributes.get("nearest_mode", "round_prefer_floor")
    for i, axis in enumerate(axes):
        n, size = x.shape[axis], shape[axis]
        scale = np.float32(scales[i]) if scales is not None else np.float32(size) / np.float32(n)
        if scale == 1:
            continue
        bounds = (roi[i], roi[i + len(axes)])
        taps = None if nearest else _filter(attributes)
        kept = bool(attributes.get("antialias", 0)) and size == n  # then onnxruntime only blanks what is outside
        rows = _rows(mode, n, size, scale, bounds, taps, rounding)
        rows = [{i: 1.0} if kept and row is not None else row for i, row in enumerate(rows)]
        x = _apply(x, axis, rows, attributes.get("extrapolation_value", 0.0))
    return x


def _target(op: str, version: int, attributes: Mapping[str, Any], xs: Sequence[Any],
            axes: Sequence[int]) -> tuple[Any, list[int] | None]:
    if "scales" in attributes:
        return attributes["scales"], None
    at = 1 if op == "Upsample" or version < 11 else 2
    if len(xs) > 3 and xs[3] is not None and np.size(xs[3]):
        return _from_sizes(attributes.get("keep_aspect_ratio_policy", "stretch"), xs[0].shape, axes, xs[3])
    return np.asarray(xs[at]).reshape(-1), None


def _from_sizes(policy: str, shape: Sequence[int], axes: Sequence[int], given: Any) -> tuple[Any, list[int]]:
    sizes = [int(v) for v in np.asarray(given).reshape(-1)]
    if policy == "stretch":
        return None, sizes
    pick = min if policy == "not_larger" else max
    ratio = np.float32(pick(np.float32(s) / np.float32(shape[a]) for s, a in zip(sizes, axes, strict=True)))
    return [ratio] * len(axes), [math.floor(ratio * np.float32(shape[a]) + np.float32(0.5)) for a in axes]


Taps = Callable[[float, int, float], dict[int, float]]


def _filter(attributes: Mapping[str, Any]) -> Taps:
    """(coordinate, extent, scale) -> the weight of every cell, from a filter sampled at the cells around."""
    cubic, outside = attributes.get("mode") == "cubic", not attributes.get("exclude_outside", 0)
    a, smooth = attributes.get("cubic_coeff_a", -0.75), attributes.get("antialias", 0)

    def weigh(distance: float) -> float:
        d = abs(distance)
        if not cubic:
            return max(0.0, 1 - d)
        if d <= 1:
            return (a + 2) * d**3 - (a + 3) * d**2 + 1
        return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0

    def taps(x: float, n: int, scale: float) -> dict[int, float]:
        width = 1 / scale if smooth and scale < 1 else 1.0
        reach = math.ceil(2 * width) + 1
        found: dict[int, float] = {}
        for cell in range(math.floor(x) - reach, math.floor(x) + reach + 2):
            if outside or 0 <= cell < n:
                near = min(max(cell, 0), n - 1)
                found[near] = found.get(near, 0.0) + weigh((cell - x) / width)
        return {cell: w / sum(found.values()) for cell, w in found.items()}

    return taps


def _rows(mode: str, n: int, size: int, scale: np.float32, roi: tuple[float, float], taps: Taps | None,
          rounding: str) -> list[dict[int, float] | None]:
    """Per output cell the weight of every input cell; None outside a cropped region."""
    rows: list[dict[int, float] | None] = []
    for i in range(size):
        # float32 decides which cell is nearest and what lies outside, float64 how much neighbours weigh
        coarse = float(_coordinate(np.float32, mode, i, n, size, scale, roi))
        if mode == "tf_crop_and_resize" and not 0 <= coarse <= n - 1:
            rows.append(None)
        elif taps is None:
            rows.append({_nearest(coarse, n, rounding, float(scale)): 1.0})
        else:
            exact = size / n if np.float32(size) / np.float32(n) == scale else float(scale)
            rows.append(taps(float(_coordinate(np.float64, mode, i, n, size, exact, roi)), n, exact))
    return rows


def _coordinate(number: Any, mode: str, index: int, n: int, size: int, scale: Any, roi: tuple[float, float]) -> Any:
    i, length, target, s = number(index), number(n), number(size), number(scale)
    half, one = number(0.5), number(1)
    start, stop = (number(np.float32(v)) for v in roi)
    if mode == "half_pixel" or (mode == "pytorch_half_pixel" and size > 1):
        return (i + half) / s - half
    if mode == "half_pixel_symmetric":
        offset = length / number(2) * (one - target / (s * length))
        return number(float(offset) + (index + 0.5) / float(s) - 0.5)
    if mode == "asymmetric":
        return i / s
    if mode == "tf_half_pixel_for_nn":
        return (i + half) / s
    if mode == "align_corners" and size > 1:
        return i * (length - one) / (target - one)
    if mode == "tf_crop_and_resize" and size > 1:
        return start * (length - one) + (i * (stop - start) * (length - one)) / (target - one)
    if mode == "tf_crop_and_resize":
        return number(0.5 * float(start + stop) * (n - 1))
    return number(0)


def _nearest(x: float, n: int, rounding: str, scale: float) -> int:
    away_from_zero = math.floor(abs(x) + 0.5) * (1 if x >= 0 else -1)
    in_the_middle = abs(x - math.floor(x) - 0.5) < 1e-6
    cell = {
        "round_prefer_floor": math.floor(x) if in_the_middle else away_from_zero,
        "round_prefer_ceil": math.ceil(x) if in_the_middle else away_from_zero,
        "floor": math.floor(x),
        "ceil": math.ceil(x),
        "simple": math.ceil(x) if scale < 1 else int(x),
    }[rounding]
    return min(max(cell, 0), n - 1)


def _apply(x: Array, axis: int, rows: Sequence[dict[int, float] | None], outside: float) -> Array:
    matrix = np.zeros((len(rows), x.shape[axis]))
    for i, row in enumerate(rows):
        for cell, weight in (row or {}).items():
            matrix[i, cell] += weight
    found = np.moveaxis(np.tensordot(matrix, x, (1, axis)), 0, axis)
    blank = [i for i, row in enumerate(rows) if row is None]
    if blank:
        index = [slice(None)] * x.ndim
        index[axis] = blank
        found[tuple(index)] = outside
    return found
