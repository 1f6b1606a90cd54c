"""Max pooling with its indices, and its inverse, by numpy alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.reference import Array, Node, pool_axes, rule


@rule("MaxPool")
def max_pool(node: Node, xs: list[Any]) -> tuple[Array, Array]:
    """The first of the largest cells of every window, and where in the flat input it lies."""
    x = xs[0]
    axes = pool_axes(node, x)[0]
    places = _places(x.shape, bool(node.get("storage_order", 0)))
    shape = (*x.shape[:2], *map(len, axes))
    found, indices = np.empty(shape, x.dtype), np.empty(shape, np.int64)
    for cell in itertools.product(*map(range, shape[2:])):
        taps = [[c for c in rows[i] if 0 <= c < n] for rows, i, n in zip(axes, cell, x.shape[2:], strict=True)]
        window = np.ix_(*map(range, x.shape[:2]), *taps)
        values, where = (a[window].reshape(*x.shape[:2], -1) for a in (x, places))
        best = values.argmax(-1)[..., None]
        found[(..., *cell)] = np.take_along_axis(values, best, -1)[..., 0]
        indices[(..., *cell)] = np.take_along_axis(where, best, -1)[..., 0]
    return found, indices


def _places(shape: Sequence[int], column_major: bool) -> Array:
    """Every cell's flat position, the spatial axes of each channel counted in either order."""
    plane = np.arange(math.prod(shape[2:])).reshape(shape[2:], order="F" if column_major else "C")
    starts = np.arange(shape[0] * shape[1]).reshape(*shape[:2], *[1] * (len(shape) - 2)) * plane.size
    return starts + plane


@rule("MaxUnpool")
def max_unpool(node: Node, xs: list[Any]) -> Array:
    x, indices, kernel = xs[0], xs[1], node.get("kernel_shape")
    count = len(kernel)
    strides, pads = node.get("strides", [1] * count), node.get("pads", [0] * (2 * count))
    given = node.ints("output_shape", xs, 2)
    extents = [(n - 1) * s + k - pads[a] - pads[a + count]
               for a, (n, s, k) in enumerate(zip(x.shape[2:], strides, kernel, strict=True))]
    found = np.zeros(given or (*x.shape[:2], *extents), x.dtype)
    for place, value in zip(indices.reshape(-1), x.reshape(-1), strict=True):
        found.reshape(-1)[place] = value
    return found
