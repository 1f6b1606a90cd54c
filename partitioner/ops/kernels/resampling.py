"""Where resized cells come from: per output cell of an axis, input cells and their weights, as onnxruntime has them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from partitioner.maps import Taps
from partitioner.ops.base import NodeView

_TIE = 1e-6
"""How near to the middle of two cells onnxruntime lets `nearest_mode` decide."""

Row = Mapping[int, float]
"""The weight of every input cell that an output cell depends on."""


@dataclass(frozen=True)
class Resampling:
    """One resized axis: output cell i is the sum of weights[i][t] * input cell map.rows[i][t].

    A row of no taps lies outside a cropped region and takes the extrapolation value.
    """

    map: Taps
    weights: tuple[tuple[float, ...], ...]

    @property
    def copies(self) -> bool:
        """Whether every output is a copy of one input cell."""
        return all(len(row) == 1 for row in self.weights)


@dataclass(frozen=True)
class Interpolation:
    """What a node says of the way to interpolate, the same for all of its axes."""

    mode: str
    coordinate: str
    rounding: str
    antialias: bool
    exclude_outside: bool
    cubic: float

    @classmethod
    def read(cls, view: NodeView) -> Interpolation:
        """From the attributes; Upsample and Resize 10 know one way only."""
        legacy = view.op_type == "Upsample" or view.version < 11
        return cls(
            mode=view.text("mode", "nearest"),
            coordinate="asymmetric" if legacy else view.text("coordinate_transformation_mode", "half_pixel"),
            rounding="simple" if legacy else view.text("nearest_mode", "round_prefer_floor"),
            antialias=bool(view.int("antialias", 0)),
            exclude_outside=bool(view.int("exclude_outside", 0)),
            cubic=view.float("cubic_coeff_a", -0.75),
        )


def resample(how: Interpolation, n: int, out: int, scale: float, roi: tuple[float, float]) -> Resampling:
    """The taps of one axis that goes from `n` to `out` cells."""
    nearest = how.mode == "nearest"
    # onnxruntime picks the nearest cell from float32 coordinates; a weight is better from float64 ones
    number = np.float32 if nearest else np.float64
    exact = scale if nearest or abs(scale * n - out) >= 1 else _exact_scale(scale, n, out)
    positions = _coordinates(how.coordinate, n, out, exact, roi, number)
    coarse = _coordinates(how.coordinate, n, out, scale, roi, np.float32)
    rows: list[Row] = []
    for cell, (position, rough) in enumerate(zip(positions, coarse, strict=True)):
        if how.coordinate == "tf_crop_and_resize" and not 0 <= rough <= n - 1:
            rows.append({})
        elif nearest:
            rows.append({_nearest(position, n, how.rounding, scale): 1.0})
        elif how.antialias and n == out:  # onnxruntime's filter leaves an axis alone that keeps its extent
            rows.append({cell: 1.0})
        elif how.antialias:
            rows.append(_filtered(how, position, n, exact))
        else:
            rows.append(_linear(position, n) if how.mode == "linear" else _cubic(how, position, n))
    return Resampling(Taps(n, out, tuple(tuple(row) for row in rows)), tuple(tuple(row.values()) for row in rows))


def _exact_scale(scale: float, n: int, out: int) -> float:
    """out / n when the float32 scale is its rounding, else the scale itself."""
    return out / n if float(np.float32(out) / np.float32(n)) == scale else scale


def _coordinates(mode: str, n: int, out: int, scale: float, roi: tuple[float, float],
                 number: type[np.floating]) -> list[float]:
    i = np.arange(out).astype(number)
    half, one = number(0.5), number(scale)
    if mode == "asymmetric":
        x = i / one
    elif mode == "align_corners":
        x = i * number(n - 1) / number(out - 1) if out > 1 else np.zeros(out, number)
    elif mode == "pytorch_half_pixel":
        x = (i + half) / one - half if out > 1 else np.zeros(out, number)
    elif mode == "tf_half_pixel_for_nn":
        x = (i + half) / one
    elif mode == "tf_crop_and_resize":
        start, stop = number(roi[0]), number(roi[1])
        if out > 1:
            x = start * number(n - 1) + (i * (stop - start) * number(n - 1)) / number(out - 1)
        else:
            x = np.full(out, 0.5 * float(start + stop) * (n - 1), number)
    elif mode == "half_pixel_symmetric":
        adjustment = number(out) / (one * number(n))
        offset = number(n) / number(2) * (number(1) - adjustment)
        x = (offset + (np.arange(out) + 0.5) / scale - 0.5).astype(number)  # in float64 in onnxruntime, too
    else:
        x = (i + half) / one - half
    return [float(v) for v in x]


def _nearest(x: float, n: int, rounding: str, scale: float) -> int:
    if rounding == "simple":
        cell = math.ceil(x) if scale < 1 else int(x)
    elif rounding == "floor":
        cell = math.floor(x)
    elif rounding == "ceil":
        cell = math.ceil(x)
    elif abs(x - math.floor(x) - 0.5) < _TIE:
        cell = math.ceil(x) if rounding == "round_prefer_ceil" else math.floor(x)
    else:
        cell = math.floor(x + 0.5)
    return min(max(cell, 0), n - 1)


def _linear(x: float, n: int) -> Row:
    x = min(max(x, 0.0), float(n - 1))
    low = min(int(x), n - 1)
    if low == n - 1 or x == low:
        return {low: 1.0}
    return {low: low + 1 - x, low + 1: x - low}


def _cubic(how: Interpolation, x: float, n: int) -> Row:
    base = math.floor(x)
    return _collect({cell: _cubic_filter(cell - x, how.cubic) for cell in range(base - 1, base + 3)}, n,
                    how.exclude_outside)


def _filtered(how: Interpolation, x: float, n: int, scale: float) -> Row:
    """A filter as wide as the output's cells are, when these are wider than the input's."""
    stretch = max(1.0, 1.0 / scale)
    support = stretch * (1.0 if how.mode == "linear" else 2.0)
    cells = range(math.floor(x - support + 1), math.floor(x + support + 1))
    if how.mode == "linear":
        weights = {cell: max(0.0, 1.0 - abs(cell - x) / stretch) for cell in cells}
    else:
        weights = {cell: _cubic_filter((cell - x) / stretch, how.cubic) for cell in cells}
    return _collect(weights, n, how.exclude_outside)


def _cubic_filter(x: float, a: float) -> float:
    """Keys' convolution kernel."""
    x = abs(x)
    if x < 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * a if x < 2 else 0.0


def _collect(weights: Row, n: int, exclude_outside: bool) -> Row:
    """Weights of sum 1 on cells of the tensor: those outside are the border's, or nobody's."""
    found: dict[int, float] = {}
    for cell, weight in weights.items():
        if not exclude_outside or 0 <= cell < n:
            inside = min(max(cell, 0), n - 1)
            found[inside] = found.get(inside, 0.0) + weight
    total = sum(found.values()) or 1.0
    return {cell: weight / total for cell, weight in found.items() if weight}
