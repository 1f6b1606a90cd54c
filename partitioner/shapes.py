"""Extents that a network can take: the nearest ones when those given do not work."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping, Sequence

import onnx_ir as ir

from partitioner.errors import PartitionError, ShapeError
from partitioner.mesh import spatial_names
from passes.canonicalize import bind_inputs, infer_and_fold, prepare

FARTHEST = 64
"""How many cells smaller or larger an axis is tried."""


def spatial_rank(model: ir.Model) -> int:
    """Spatial axes of the volume: of the input with most axes."""
    ranks = [len(v.shape) for v in model.graph.inputs if v.shape is not None]
    return max(0, min(max(ranks, default=2) - 2, 3))


def axis_extents(shape: Sequence[int]) -> dict[str, int]:
    """Extents of the axes that a mesh can split, by their names: batch, and the spatial axes of a volume."""
    if not shape:
        return {}
    names = spatial_names(len(shape) - 2) if 3 <= len(shape) <= 5 else ()
    return {"batch": int(shape[0]), **{name: int(n) for name, n in zip(names, shape[2:], strict=False)}}


@contextlib.contextmanager
def with_nearest_shapes(source: ir.Model, shapes: Mapping[str, Sequence[int]]) -> Generator[None]:
    """Add the nearest extents that work to an error about extents.

    Raises:
        PartitionError: the error of the block, with a line more where other extents would do.
    """
    try:
        yield
    except ShapeError as error:
        nearest = nearest_shapes(source, shapes)
        if not nearest:
            raise
        raise PartitionError(f"{error}\nnearest extents that work: {' or '.join(nearest)}") from None


def nearest_shapes(source: ir.Model, shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """The nearest smaller and larger extents of the volume that the network takes, as text.

    Each axis is searched on its own, in cubes, since what a network can take is mostly a rule per axis.
    """
    name = max(shapes, key=lambda n: len(shapes[n]), default=None)
    if name is None or len(shapes[name]) < 3:
        return []
    given = tuple(shapes[name])
    known: dict[int, bool] = {}

    def works(n: int) -> bool:
        if n not in known:
            known[n] = n > 0 and takes(source, {**shapes, name: (*given[:2], *(n for _ in given[2:]))})
        return known[n]

    found: list[str] = []
    for direction in (-1, 1):
        extents = [_search(n, direction, works) for n in given[2:]]
        candidate = (*given[:2], *(n for n in extents if n is not None))
        text = f"{name}={'x'.join(map(str, candidate))}"
        if None not in extents and text not in found and takes(source, {**shapes, name: candidate}):
            found.append(text)
    return found


def _search(n: int, direction: int, works: Callable[[int], bool]) -> int | None:
    return next((n + direction * step for step in range(FARTHEST + 1) if works(n + direction * step)), None)


def takes(source: ir.Model, shapes: Mapping[str, Sequence[int]]) -> bool:
    """Whether a network takes these extents."""
    model = source.clone()
    try:
        prepare(model)
        bind_inputs(model, shapes)
        return not infer_and_fold(model)
    except PartitionError:
        return False
