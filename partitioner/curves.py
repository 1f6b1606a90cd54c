"""Measured figures between which is interpolated: seconds over bytes, operations per second over extents.

Both are straight lines between the measured points on logarithmic axes.  Neither ever says that more work takes less
time, whatever noise the measurement had.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
Number = float | NDArray[np.floating[Any]] | NDArray[np.integer[Any]]
"""One figure, or an array of them: one per rank of a mesh."""


@dataclass(frozen=True)
class Curve:
    """Seconds over an amount of work, such as bytes.

    Below the first point the time is that of the first (what a call takes whatever it does), above the last one it
    grows in proportion.

    Args:
        sizes: ascending, from above 0.
        seconds: as many; never descending.
    """

    sizes: tuple[float, ...]
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        _check_axis("sizes", self.sizes)
        if len(self.seconds) != len(self.sizes) or any(not 0 < s < math.inf for s in self.seconds):
            raise ValueError("a curve has one positive time for every size")
        if any(b < a for a, b in itertools.pairwise(self.seconds)):
            raise ValueError("the times of a curve never descend")

    @classmethod
    def of(cls, points: Mapping[float, float]) -> Self:
        """The curve through measured points (size -> seconds), noise that would let more work be faster levelled."""
        sizes = sorted(points)
        times = np.maximum.accumulate([_rounded(points[n]) for n in sizes])
        return cls(tuple(map(float, sizes)), tuple(map(float, times)))

    def at(self, size: Number) -> FloatArray:
        """Seconds for an amount of work, elementwise; 0 for none."""
        x = np.maximum(np.asarray(size, np.float64), 1e-300)
        found = np.exp(np.interp(np.log(x), np.log(self.sizes), np.log(self.seconds)))
        found = found * np.maximum(x / self.sizes[-1], 1.0)
        return np.where(np.asarray(size) > 0, found, 0.0)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"sizes": list(self.sizes), "seconds": list(self.seconds)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """See `to_dict`."""
        return cls(_numbers(data["sizes"]), _numbers(data["seconds"]))


@dataclass(frozen=True)
class Grid:
    """Operations per second over several features, the last of which is the amount of work done at once.

    Outside the measured range a feature counts as the nearest that was measured; below the smallest amount the time is
    that of the smallest.

    Args:
        axes: per feature its name and the measured values, ascending, from above 0.
        rates: one for every combination, the last feature fastest.
    """

    axes: tuple[tuple[str, tuple[float, ...]], ...]
    rates: tuple[float, ...]

    def __post_init__(self) -> None:
        for name, values in self.axes:
            _check_axis(name, values)
        if len(self.rates) != math.prod(len(values) for _, values in self.axes):
            raise ValueError("a grid has one rate for every combination of its axes")
        if any(not 0 < r < math.inf for r in self.rates):
            raise ValueError("the rates of a grid are positive")
        *_, (name, amounts) = self.axes
        times = np.log(amounts) - np.log(np.asarray(self.rates)).reshape(-1, len(amounts))
        if (np.diff(times, axis=-1) < -0.01).any():  # rates in a file are rounded
            raise ValueError(f"more {name} take less time in this grid")

    @classmethod
    def of(cls, axes: Sequence[tuple[str, Sequence[float]]], rates: Mapping[tuple[float, ...], float]) -> Self:
        """The grid of measured rates; combinations that were not measured are like the nearest amount that was.

        Raises:
            ValueError: when nothing was measured for some combination of the other features.
        """
        *others, (_, amounts) = axes
        found: list[float] = []
        for features in itertools.product(*(values for _, values in others)):
            row = {n: rates[*features, n] for n in amounts if (*features, n) in rates}
            if not row:
                raise ValueError(f"nothing was measured at {features}")
            known = sorted(row)
            nearest = [row[min(known, key=lambda n, m=m: abs(math.log(n / m)))] for m in amounts]
            times = np.maximum.accumulate([n / rate for n, rate in zip(amounts, nearest, strict=True)])
            found += [_rounded(n / float(t)) for n, t in zip(amounts, times, strict=True)]
        return cls(tuple((n, tuple(map(float, values))) for n, values in axes), tuple(found))

    def _table(self) -> FloatArray:
        """Logarithms of the rates, none so high that more work took less time."""
        amounts = np.log(self.axes[-1][1])
        times = amounts - np.log(np.asarray(self.rates)).reshape([len(values) for _, values in self.axes])
        return amounts - np.maximum.accumulate(times, axis=-1)

    def seconds(self, operations: Number, features: Sequence[float], amount: Number) -> FloatArray:
        """Time of `operations` in one call.

        Args:
            operations: in proportion to `amount`.
            features: all but the last, in order.
            amount: the last one, elementwise.
        """
        table = self._table()
        for (_, values), feature in zip(self.axes[:-1], features, strict=True):
            table = _between(table, np.log(values), math.log(max(feature, 1e-300)))
        amounts = np.asarray(self.axes[-1][1])
        x = np.maximum(np.asarray(amount, np.float64), 1e-300)
        rate = np.exp(np.interp(np.log(x), np.log(amounts), table))
        found = np.asarray(operations) / rate * np.maximum(amounts[0] / x, 1.0)
        return np.where(np.asarray(amount) > 0, found, 0.0)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"axes": {name: list(values) for name, values in self.axes}, "rates": list(self.rates)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """See `to_dict`."""
        return cls(tuple((str(n), _numbers(v)) for n, v in data["axes"].items()), _numbers(data["rates"]))


def _between(table: FloatArray, points: FloatArray, x: float) -> FloatArray:
    """The table without its first axis, taken at x."""
    high = int(np.clip(np.searchsorted(points, x), 1, max(1, len(points) - 1)))
    if len(points) == 1:
        return table[0]
    share = float(np.clip((x - points[high - 1]) / (points[high] - points[high - 1]), 0.0, 1.0))
    return table[high - 1] * (1 - share) + table[high] * share


def _rounded(x: float) -> float:
    """Four digits: more were not measured."""
    return float(f"{x:.4g}")


def _check_axis(name: str, values: Sequence[float]) -> None:
    if not values or any(not 0 < v < math.inf for v in values):
        raise ValueError(f"{name}: positive numbers are needed")
    if any(b <= a for a, b in itertools.pairwise(values)):
        raise ValueError(f"{name}: the numbers must ascend")


def _numbers(values: Sequence[Any]) -> tuple[float, ...]:
    if any(isinstance(v, bool) or not isinstance(v, int | float) for v in values):
        raise TypeError("numbers are needed")
    return tuple(float(v) for v in values)
