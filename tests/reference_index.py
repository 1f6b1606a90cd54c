"""Operators that move cells by index, in float64, from their ONNX definitions: where onnx's reference has gaps."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.reference import Node, rule

Array = np.ndarray


@rule("OneHot")
def one_hot(node: Node, xs: list[Any]) -> Array:
    """Values [off, on]; indices outside [-depth, depth) are off everywhere."""
    indices, depth, (off, on) = xs[0], int(np.asarray(xs[1]).reshape(-1)[0]), xs[2]
    axis = node.get("axis", -1) % (indices.ndim + 1)
    lines = [np.where((indices == d) | (indices == d - depth), on, off) for d in range(depth)]
    return np.stack(lines, axis)


@rule("Scatter", "ScatterElements")
def scatter_elements(node: Node, xs: list[Any]) -> Array:
    found, indices, updates = xs[0].copy(), xs[1], xs[2]
    axis = node.get("axis", 0) % found.ndim
    for place in np.ndindex(indices.shape):
        target = list(place)
        target[axis] = int(indices[place]) % found.shape[axis]
        _combine(found, tuple(target), updates[place], node)
    return found


@rule("ScatterND")
def scatter_nd(node: Node, xs: list[Any]) -> Array:
    found, indices, updates = xs[0].copy(), xs[1], xs[2]
    for place in np.ndindex(indices.shape[:-1]):
        target = tuple(int(i) % n for i, n in zip(indices[place], found.shape, strict=False))
        _combine(found, target, updates[place], node)
    return found


def _combine(found: Array, target: tuple[int, ...], update: Array, node: Node) -> None:
    step = {"none": lambda a, b: b, "add": np.add, "mul": np.multiply, "max": np.maximum, "min": np.minimum}
    found[target] = step[node.get("reduction", "none")](found[target], update)


@rule("GatherElements")
def gather_elements(node: Node, xs: list[Any]) -> Array:
    x, indices = xs
    axis = node.get("axis", 0) % x.ndim
    found = np.empty(indices.shape, x.dtype)
    for place in np.ndindex(indices.shape):
        source = list(place)
        source[axis] = int(indices[place])
        found[place] = x[tuple(source)]
    return found


@rule("AffineGrid")
def affine_grid(node: Node, xs: list[Any]) -> Array:
    """Every place (x, y, [z,] 1) in [-1, 1] times the matrix of its sample."""
    theta, extents = xs[0], [int(n) for n in xs[1][2:]]
    if node.get("align_corners", 0):
        lines = [np.linspace(-1, 1, n) if n > 1 else np.array([-1.0]) for n in extents]
    else:
        lines = [(2 * np.arange(n) + 1) / n - 1 for n in extents]
    places = np.stack([*np.meshgrid(*lines, indexing="ij")[::-1], np.ones(extents)], -1)
    return np.einsum("nij,...j->n...i", theta, places)


@rule("GridSample")
def grid_sample(node: Node, xs: list[Any]) -> Array:
    """Taps and weights along every axis, place by place; the last coordinate of the grid is the first axis."""
    x, grid = xs
    extents, corners = x.shape[2:], bool(node.get("align_corners", 0))
    mode, padding = node.get("mode", "linear"), node.get("padding_mode", "zeros")
    found = np.zeros((*x.shape[:2], *grid.shape[1:-1]))
    for place in np.ndindex(grid.shape[:-1]):
        axes = []
        for n, g in zip(extents, grid[place][::-1], strict=True):
            at = (g + 1) / 2 * (n - 1) if corners else ((g + 1) * n - 1) / 2
            axes.append(_taps(at, n, mode, padding, corners))
        cells = x[place[0]]
        for taps in axes:  # the front axis goes at each turn
            cells = sum((w * cells[:, i] for i, w in taps if i is not None), np.zeros(cells[:, 0].shape))
        found[(place[0], slice(None), *place[1:])] = cells
    return found


def _taps(at: float, n: int, mode: str, padding: str, corners: bool) -> list[tuple[int | None, float]]:
    """(cell, weight) of an interpolation at a place; cells outside are None where they count as zeros."""
    if mode in ("cubic", "bicubic"):
        first = int(np.floor(at))
        return [(_inside(first + i, n, padding, corners), _cubic(abs(at - first - i))) for i in range(-1, 3)]
    if padding == "border":
        at = min(max(at, 0.0), n - 1.0)
    elif padding == "reflection":
        at = _reflected(at, n, corners)
    if mode == "nearest":
        return [(_inside(int(np.rint(at)), n, padding, corners), 1.0)]
    first = int(np.floor(at))
    return [(_inside(first + i, n, padding, corners), 1 - abs(at - first - i)) for i in (0, 1)]


def _cubic(d: float, a: float = -0.75) -> float:
    if d <= 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0


def _inside(cell: int, n: int, padding: str, corners: bool) -> int | None:
    if 0 <= cell < n:
        return cell
    if padding == "zeros":
        return None
    return min(max(cell, 0), n - 1) if padding == "border" else int(_reflected(cell, n, corners))


def _reflected(at: float, n: int, corners: bool) -> float:
    """A place mirrored at the centres (corners) or outer edges of the first and last cell, then clipped."""
    low, high = (0.0, n - 1.0) if corners else (-0.5, n - 0.5)
    if high == low:
        return 0.0
    turn = abs(at - low) % (2 * (high - low))
    return min(max(low + min(turn, 2 * (high - low) - turn), 0.0), n - 1.0)
