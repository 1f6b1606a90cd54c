"""Operators that put cells into a tensor by index."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
import onnx_ir as ir

from partitioner.geometry import Box
from partitioner.maps import AxisMap, Shift, Taps, Whole, identity
from partitioner.ops.base import (
    Array,
    Backward,
    Call,
    Example,
    Need,
    Needs,
    NodeView,
    Operator,
    Unsupported,
    statistics,
)
from partitioner.ops.kernels.unsigned import moved
from partitioner.ops.registry import register
from partitioner.ops.standard.gather import flat_index, from_front
from partitioner.ops.standard.shape import checked_axis

if TYPE_CHECKING:
    import torch

    from partitioner.ops.emitter import Emitter
else:
    from partitioner.lazy import torch

_REDUCTIONS = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


_COMBINE: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "add": lambda a, b: torch.add(a, b),
    "mul": lambda a, b: torch.mul(a, b),
    "max": lambda a, b: torch.maximum(a, b),
    "min": lambda a, b: torch.minimum(a, b),
}


def _reduction(view: NodeView) -> str:
    name = view.text("reduction", "none")
    if name != "none" and name not in _REDUCTIONS:
        raise Unsupported(f"reduction '{name}' is unknown; correct the file")
    return name


def scatter(x: torch.Tensor, axis: int, index: torch.Tensor, updates: torch.Tensor, reduction: str) -> torch.Tensor:
    """A copy of the tensor with updates put in, or combined with what is there."""
    if reduction == "none":
        return moved(lambda cells, put: cells.scatter(axis, index, put), x, updates)
    return x.scatter_reduce(axis, index, updates, _REDUCTIONS[reduction], include_self=True)


def _vectors(*axes: Sequence[int]) -> Array:
    """The index vectors of a grid."""
    return np.stack(np.meshgrid(*axes, indexing="ij"), -1).astype(np.int64)


def _crop(emitter: Emitter, name: str, out: Box, shape: Sequence[int], axes: Sequence[int]) -> str:
    """The wanted cells along axes that were computed whole."""
    spans = {a: (i.start, i.stop) for a, i in enumerate(out.intervals()) if a in axes and len(i) < shape[a]}
    return emitter.crop(name, spans)


@register
@dataclass(frozen=True)
class ScatterElements(Operator):
    """Cells put into a tensor along one axis, which is needed whole, by an index of their own.

    Source: ONNX ScatterElements (11, 13, 16, 18), Scatter (9, 11).
    """

    op_types: ClassVar[tuple[str, ...]] = ("ScatterElements", "Scatter")
    examples: ClassVar[tuple[Example, ...]] = (
        Example("ScatterElements", ((2, 9, 5), np.array([[[1, 0, 3, -1, 2]], [[4, 4, 4, 8, 0]]], np.int64), (2, 1, 5)),
                {"axis": 1}),
        Example("ScatterElements", ((2, 3, 7), np.array([[[6, 0], [3, -2]]], np.int64), (1, 2, 2)), {"axis": 2},
                opset=11),
        Example("ScatterElements", ((2, 9, 5), (2, 4, 5), (2, 4, 5)), {"axis": 1, "reduction": "add"},
                dtype=ir.DataType.INT64),
        Example("ScatterElements", ((9, 5), (7, 3), (7, 3)), {"reduction": "mul"}, dtype=ir.DataType.INT64),
        *(Example("ScatterElements", ((1, 5, 3), np.array([[[1, 0, 3], [1, 2, 3]]], np.int64), (1, 2, 3)),
                  {"axis": 1, "reduction": name}) for name in ("add", "mul", "max", "min")),
        Example("Scatter", ((2, 5, 3), np.array([[[1, 0, 3]], [[1, 2, 4]]], np.int64), (2, 1, 3)), {"axis": 1},
                opset=9),
    )

    axis: int
    reduce: str

    @classmethod
    def read(cls, view: NodeView) -> Self:
        data, index, updates = view.input(0), view.input(1), view.input(2)
        axis = checked_axis(view.int("axis", 0), data.rank)
        fits = index.rank == data.rank and index.shape == updates.shape and all(
            m <= n or a == axis for a, (m, n) in enumerate(zip(index.shape, data.shape, strict=True)))
        if not fits:
            raise Unsupported(f"indices of {list(index.shape)} on extents {list(data.shape)}; correct the file")
        return cls(view.inputs, (data,), axis, _reduction(view))

    def needs(self, output: int = 0) -> Needs:
        data, index = self.inputs[:2]
        assert data is not None and index is not None
        own = tuple(statistics(a, n) if a == self.axis else Need(a, identity(n)) for a, n in enumerate(data.shape))
        put = tuple(Need(None, Whole(n, 1)) if a == self.axis else Need(a, Shift(n, data.shape[a], 0))
                    for a, n in enumerate(index.shape))
        return (own, put, put)

    def backward(self, ins: Sequence[float], outs: Sequence[float]) -> Backward:
        if self.reduce == "none":
            return Backward(beside=8 * ins[1])
        return Backward(inputs=(0, 2), outputs=(0,), beside=8 * ins[1])

    def run(self, call: Call) -> tuple[torch.Tensor, ...]:
        x, wanted = call.tensor(0), call.outs[0].intervals()[self.axis]
        index = from_front(call.tensor(1), x.shape[self.axis])
        result = scatter(x, self.axis, index, call.tensor(2), self.reduce)
        return (result.narrow(self.axis, wanted.start, len(wanted)),)

    def emit(self, emitter: Emitter, names: Sequence[str | None], boxes: Sequence[Box | None],
             outs: Sequence[Box]) -> tuple[str, ...]:
        name = names[0]
        assert name is not None
        result = emitter.same(names, 1)[0] if boxes[1] else emitter.op("Identity", [name])
        return (_crop(emitter, result, outs[0], self.outputs[0].shape, [self.axis]),)

    def flops(self, out: float) -> float:
        return 0.0


@register
@dataclass(frozen=True)
class ScatterND(Operator):
    """Slices put into a tensor at index vectors.

    Constant vectors that form a grid (the assignment to a slice, as exporters write it) leave every axis cut as it
    is; otherwise the axes that they index are needed whole, the others stay as they are cut.

    Args:
        grid: per indexed axis the ascending cells that are written to; None when the vectors form no grid.
    Source: ONNX ScatterND (11, 13, 16, 18).
    """

    op_types: ClassVar[tuple[str, ...]] = ("ScatterND",)
    examples: ClassVar[tuple[Example, ...]] = (
        Example("ScatterND", ((2, 3, 7), _vectors(range(2), range(3), range(2, 5)), (2, 3, 3))),
        Example("ScatterND", ((2, 7, 5), _vectors(range(2), range(1, 7, 2)), (2, 3, 5)), opset=11),
        Example("ScatterND", ((1, 3, 5, 6), _vectors([0], [0, 2], [0, 1, 4], [3]), (1, 2, 3, 1)), {"reduction": "add"}),
        Example("ScatterND", ((5, 3, 4), np.array([[4], [1], [-3]], np.int64), (3, 3, 4)), opset=13),
        Example("ScatterND", ((5, 3, 4), np.array([[1], [3]], np.int64), (2, 3, 4))),
        Example("ScatterND", ((2, 3, 6), np.array([[0, 1], [1, 2], [0, 0]], np.int64), (3, 6))),
        Example("ScatterND", ((2, 3, 6), np.array([[0, 1], [1, 2], [0, 1]], np.int64), (3, 6)), {"reduction": "mul"}),
        Example("ScatterND", ((2, 3, 6), np.array([[0, 1], [1, 2], [0, 1]], np.int64), (3, 6)), {"reduction": "add"},
                opset=16),
        *(Example("ScatterND", ((2, 4, 6), _vectors(range(2), range(2, 4)), (2, 2, 6)), {"reduction": name})
          for name in ("mul", "max", "min")),
        Example("ScatterND", ((9, 9, 5), (3, 2), (3, 5)), {"reduction": "add"}, dtype=ir.DataType.INT64),
    )

    depth: int
    reduce: str
    grid: tuple[tuple[int, ...], ...] | None

    @classmethod
    def read(cls, view: NodeView) -> Self:
        data, index, updates = view.input(0), view.input(1), view.input(2)
        depth = index.shape[-1] if index.rank else 0
        if not 1 <= depth <= data.rank or updates.shape != (*index.shape[:-1], *data.shape[depth:]):
            raise Unsupported(f"indices of {list(index.shape)} on extents {list(data.shape)}; correct the file")
        return cls(view.inputs, (data,), depth, _reduction(view), _grid(view, data.shape, depth))

    def needs(self, output: int = 0) -> Needs:
        data, index = self.inputs[:2]
        assert data is not None and index is not None
        shape, count = data.shape, index.rank - 1
        if self.grid is not None:
            own = tuple(Need(a, identity(n)) for a, n in enumerate(shape))
            put = [Need(a, identity(n)) for a, n in enumerate(shape)]
            for axis, cells in enumerate(self.grid):
                put[axis] = Need(axis, _written(cells, shape[axis]))
            return (own, None, tuple(put))
        own = tuple(statistics(a, n) if a < self.depth else Need(a, identity(n)) for a, n in enumerate(shape))
        vectors = tuple(Need(None, Whole(n, 1)) for n in index.shape)
        slices = tuple(Need(self.depth + a, identity(n)) for a, n in enumerate(shape[self.depth :]))
        return (own, vectors, (*vectors[:count], *slices))

    def _targets(self, out: Box) -> list[list[int]]:
        """Per indexed axis of a grid the local cells that are written to."""
        assert self.grid is not None
        spans = out.intervals()[: self.depth]
        return [[c - i.start for c in cells if i.start <= c < i.stop]
                for cells, i in zip(self.grid, spans, strict=True)]

    def backward(self, ins: Sequence[float], outs: Sequence[float]) -> Backward:
        if self.reduce == "none" or (self.reduce == "add" and self.grid is not None):
            return Backward()
        return Backward(inputs=(0, 2), outputs=(0,) if self.grid is None else ())

    def run(self, call: Call) -> tuple[torch.Tensor, ...]:
        x, out, updates = call.tensor(0), call.outs[0], call.tensor(2)
        if self.grid is not None:
            return (_assign(x, self._targets(out), updates, self.reduce),)
        flat = flat_index(call.tensor(1), x.shape[: self.depth]).reshape(-1, 1)
        cells = x.reshape(math.prod(x.shape[: self.depth]), -1)
        put = updates.reshape(flat.shape[0], cells.shape[1])
        result = scatter(cells, 0, flat.expand(put.shape), put, self.reduce).reshape(x.shape)
        for axis, wanted in enumerate(out.intervals()[: self.depth]):
            result = result.narrow(axis, wanted.start, len(wanted))
        return (result,)

    def emit(self, emitter: Emitter, names: Sequence[str | None], boxes: Sequence[Box | None],
             outs: Sequence[Box]) -> tuple[str, ...]:
        if self.grid is None:
            result = emitter.same(names, 1)[0]
            return (_crop(emitter, result, outs[0], self.outputs[0].shape, range(self.depth)),)
        if names[2] is None:  # nothing is written here
            return (emitter.op("Identity", [names[0]]),)
        vectors = emitter.constant(_vectors(*self._targets(outs[0])))
        return emitter.same([names[0], vectors, names[2]], 1)

    def flops(self, out: float) -> float:
        return 0.0


def _grid(view: NodeView, shape: Sequence[int], depth: int) -> tuple[tuple[int, ...], ...] | None:
    """The cells per axis of constant index vectors of which vector [i, j, ...] is (a[i], b[j], ...), a, b ascending."""
    constant = view.constants[1]
    if constant is None:
        return None
    vectors = constant.numpy()
    if vectors.ndim != depth + 1 or not vectors.size:
        return None
    found: list[tuple[int, ...]] = []
    for axis in range(depth):
        cells = vectors[..., axis].astype(np.int64)
        cells = np.where(cells < 0, cells + shape[axis], cells)
        line = cells[tuple(slice(None) if a == axis else 0 for a in range(depth))]
        spread = line.reshape([-1 if a == axis else 1 for a in range(depth)])
        if (cells != spread).any() or (np.diff(line) <= 0).any() or line[0] < 0 or line[-1] >= shape[axis]:
            return None
        found.append(tuple(int(c) for c in line))
    return tuple(found)


def _written(cells: Sequence[int], extent: int) -> AxisMap:
    """Which updates the cells of an axis need: those that are written to them."""
    if cells[-1] - cells[0] == len(cells) - 1:
        return Shift(len(cells), extent, -cells[0])
    place = {cell: (i,) for i, cell in enumerate(cells)}
    return Taps(len(cells), extent, tuple(place.get(i, ()) for i in range(extent)))


def _assign(x: torch.Tensor, targets: Sequence[Sequence[int]], updates: torch.Tensor, reduction: str) -> torch.Tensor:
    """A copy of the tensor in which the cells of a grid are replaced by updates, or combined with them."""
    result = x.clone()
    if not all(targets) or not updates.numel():
        return result
    chosen = _chosen(targets, x.device)
    if reduction == "none":
        result[chosen] = updates
    else:
        result[chosen] = _COMBINE[reduction](x[chosen], updates)
    return result


def _chosen(targets: Sequence[Sequence[int]], device: torch.device) -> tuple[slice | torch.Tensor, ...]:
    """The cells of a grid as slices where their distances are equal, else as index tensors that broadcast."""
    steps = [set(b - a for a, b in itertools.pairwise(cells)) or {1} for cells in targets]
    if all(len(found) == 1 for found in steps):
        return tuple(slice(cells[0], cells[-1] + 1, *found) for cells, found in zip(targets, steps, strict=True))
    lines = [torch.tensor(list(cells), device=device) for cells in targets]
    return tuple(line.reshape([-1 if a == axis else 1 for a in range(len(lines))]) for axis, line in enumerate(lines))
