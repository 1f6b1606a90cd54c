"""Extents that a network can take: the nearest ones when those given do not work."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping, Sequence

import onnx_ir as ir

from partitioner.errors import PartitionError
from passes.canonicalize import bind_inputs, infer_and_fold, prepare

MULTIPLES = (2, 4, 8, 16, 32, 64)
"""Extents tried first: networks that halve n times take multiples of 2^n."""


def spatial_rank(model: ir.Model) -> int:
    """Spatial axes of the volume: of the input with most axes."""
    ranks = [len(v.shape) for v in model.graph.inputs if v.shape is not None]
    return max(0, min(max(ranks, default=2) - 2, 3))


@contextlib.contextmanager
def with_nearest_shapes(source: ir.Model, shapes: Mapping[str, Sequence[int]]) -> Generator[None]:
    """Add the nearest extents that work to an error about extents.

    Raises:
        PartitionError: the error of the block, with a line more where other extents would do.
    """
    try:
        yield
    except PartitionError as error:
        if "this volume's extents" not in str(error) and "larger volume" not in str(error):
            raise
        nearest = nearest_shapes(source, shapes)
        if not nearest:
            raise
        raise PartitionError(f"{error}\nnearest extents that work: {' or '.join(nearest)}") from None


def nearest_shapes(source: ir.Model, shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """The nearest smaller and larger extents of the first volume that the network takes, as text."""
    name = next((n for n, s in shapes.items() if len(s) >= 3), None)
    if name is None:
        return []
    given = tuple(shapes[name])
    for multiple in MULTIPLES:
        found: list[str] = []
        for up in (False, True):
            extents = tuple(n if a < 2 else _round(n, multiple, up) for a, n in enumerate(given))
            if min(extents) > 0 and extents != given and takes(source, {**shapes, name: extents}):
                text = f"{name}={'x'.join(map(str, extents))}"
                found += [text] if text not in found else []
        if found:
            return found
    return []


def _round(n: int, multiple: int, up: bool) -> int:
    return -(-n // multiple) * multiple if up else n // multiple * multiple


def takes(source: ir.Model, shapes: Mapping[str, Sequence[int]]) -> bool:
    """Whether a network takes these extents."""
    model = source.clone()
    try:
        prepare(model)
        bind_inputs(model, shapes)
        return not infer_and_fold(model)
    except PartitionError:
        return False
