"""Operators that choose cells by index: known beforehand, or computed from the data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
import onnx_ir as ir

from partitioner.geometry import Box, Pieces
from partitioner.maps import Shift, Taps, Whole, identity
from partitioner.ops.base import (
    Array,
    Backward,
    Call,
    Example,
    Need,
    Needs,
    NodeView,
    Operator,
    TensorType,
    Unsupported,
)
from partitioner.ops.kernels.unsigned import moved
from partitioner.ops.registry import register
from partitioner.ops.standard.resize import local_positions
from partitioner.ops.standard.shape import checked_axis

if TYPE_CHECKING:
    import torch

    from partitioner.ops.emitter import Emitter
else:
    from partitioner.lazy import torch


def from_front(index: torch.Tensor, extent: int) -> torch.Tensor:
    """Indices as int64, negative ones counted from the front."""
    index = index.to(torch.int64)
    return torch.where(index < 0, index + extent, index)


def known_indices(view: NodeView, index: int, extent: int) -> Array | None:
    """Constant indices, counted from the front; None when they are computed from the data.

    Raises:
        Unsupported: when one lies outside the axis.
    """
    constant = view.constants[index]
    return None if constant is None else _counted(constant.numpy().astype(np.int64), extent)


def _counted(found: Array, extent: int) -> Array:
    """Indices counted from the front."""
    if found.size and not (-extent <= int(found.min()) and int(found.max()) < extent):
        raise Unsupported(f"an index lies outside an axis of {extent} cells; correct the file")
    return np.where(found < 0, found + extent, found)


def _places(held: Pieces) -> Array:
    """By cell, where it lies in the local tensor; 0 for cells that are not held."""
    found = np.zeros(held[-1].stop if held else 0, np.int64)
    for cell, position in local_positions(held).items():
        found[cell] = position
    return found


def narrowest(cells: Array, extent: int, axes: Sequence[int]) -> Need | None:
    """How an axis of `extent` cells is needed along that axis of constant indices along which fewest are named."""
    found: Need | None = None
    least = math.inf
    for axis in axes:
        rows = tuple(tuple(int(i) for i in np.unique(row)) for row in np.moveaxis(cells, axis, 0))
        breadth = sum(map(len, rows)) / len(rows)
        if breadth < least:
            found, least = Need(axis, Taps(extent, len(rows), rows)), breadth
    return found


@register
@dataclass(frozen=True)
class Gather(Operator):
    """Slices of a tensor along an axis, in the order and shape of the indices.

    Constant indices need only the cells that they name; others need the axis whole.
    Source: ONNX Gather (1, 11, 13).
    """

    op_types: ClassVar[tuple[str, ...]] = ("Gather",)
    examples: ClassVar[tuple[Example, ...]] = (
        Example("Gather", ((2, 3, 7, 5), np.array(-2, np.int64)), {"axis": 2}),
        Example("Gather", ((2, 3, 7, 5), np.array([1, 2, 4, 5], np.int64)), {"axis": 2}, opset=13),
        Example("Gather", ((2, 3, 7, 5), np.array([6, 0, 3, 3, -1], np.int32)), {"axis": -2}, opset=11),
        Example("Gather", ((3, 2, 5), np.array([2, 0], np.int64)), opset=9),
        Example("Gather", ((2, 5, 7), np.array([[0, 6], [3, 1], [2, 5]], np.int64)), {"axis": 2}),
        Example("Gather", ((2, 4, 7), np.array([3, 1], np.int64)), {"axis": 1}),
        Example("Gather", ((2, 4, 7), np.array(1, np.int64)), {"axis": 0}),
        Example("Gather", ((1, 2, 4, 3, 9), np.array([[8, 0]], np.int64)), {"axis": 4}),
        Example("Gather", ((2, 9, 3), (2, 3, 5)), {"axis": 1}, dtype=ir.DataType.INT64),
        Example("Gather", ((1, 2, 9, 3), np.arange(8) + np.arange(2)[:, None]), {"axis": 2}),
        Example("Gather", ((9, 4), (2, 1, 7)), dtype=ir.DataType.INT32),
        Example("Gather", ((1, 3, 9), (4,)), {"axis": -1}, opset=11, dtype=ir.DataType.INT64),
    )

    axis: int
    cells: tuple[int, ...] | None

    @classmethod
    def read(cls, view: NodeView) -> Self:
        data, index = view.input(0), view.input(1)
        axis = checked_axis(view.int("axis", 0), data.rank)
        cells = known_indices(view, 1, data.shape[axis])
        shape = (*data.shape[:axis], *index.shape, *data.shape[axis + 1 :])
        known = None if cells is None else tuple(int(i) for i in cells.reshape(-1))
        return cls(view.inputs, (TensorType(shape, data.dtype),), axis, known)

    @property
    def index_shape(self) -> tuple[int, ...]:
        """Extents of the indices."""
        index = self.inputs[1]
        assert index is not None
        return index.shape

    def needs(self, output: int = 0) -> Needs:
        data, shape = self.inputs[0], self.index_shape
        assert data is not None
        shift = len(shape) - 1
        own = [Need(a if a < self.axis else a + shift, identity(n)) for a, n in enumerate(data.shape)]
        own[self.axis] = self._axis_need(data.shape[self.axis])
        index = tuple(Need(self.axis + j, identity(n)) for j, n in enumerate(shape))
        return (tuple(own), index if self.cells is None else None)

    def _axis_need(self, extent: int) -> Need:
        if self.cells is None or not all(self.index_shape):
            return Need(None, Whole(extent, 1))
        cells = np.asarray(self.cells, np.int64).reshape(self.index_shape)
        found = narrowest(cells, extent, range(cells.ndim))
        return Need(None, Whole(extent, 1)) if found is None else replace(found, axis=self.axis + (found.axis or 0))

    def _positions(self, box: Box, out: Box) -> Array:
        """The known indices of the output's cells, by their places in the local tensor."""
        wanted = out.intervals()[self.axis : self.axis + len(self.index_shape)]
        cells = np.asarray(self.cells, np.int64).reshape(self.index_shape)
        return _places(box.axes[self.axis])[cells[tuple(slice(i.start, i.stop) for i in wanted)]]

    def run(self, call: Call) -> tuple[torch.Tensor, ...]:
        x, out = call.tensor(0), call.outs[0]
        if self.cells is None:
            index = from_front(call.tensor(1), x.shape[self.axis]).reshape(-1)
        else:
            index = torch.from_numpy(self._positions(call.box(0), out).reshape(-1)).to(x.device)
        return (x.index_select(self.axis, index).reshape(out.shape),)

    def emit(self, emitter: Emitter, names: Sequence[str | None], boxes: Sequence[Box | None],
             outs: Sequence[Box]) -> tuple[str, ...]:
        if self.cells is None:
            return emitter.same(names, 1)
        assert boxes[0] is not None
        index = emitter.constant(self._positions(boxes[0], outs[0]))
        return (emitter.op("Gather", [names[0], index], {"axis": self.axis}),)

    def flops(self, out: float) -> float:
        return 0.0


@register
@dataclass(frozen=True)
class GatherElements(Operator):
    """Cells chosen along one axis, with an index of their own for every cell of the output.

    Constant indices that do not vary along the other axes need only the cells that they name; others the axis whole.
    Source: ONNX GatherElements (11, 13).
    """

    op_types: ClassVar[tuple[str, ...]] = ("GatherElements",)
    examples: ClassVar[tuple[Example, ...]] = (
        Example("GatherElements", ((2, 9, 5), (2, 4, 5)), {"axis": 1}, dtype=ir.DataType.INT64),
        Example("GatherElements", ((2, 3, 9), (2, 3, 11)), {"axis": -1}, opset=11, dtype=ir.DataType.INT32),
        Example("GatherElements", ((9, 5), (4, 3)), dtype=ir.DataType.INT64),
        Example("GatherElements", ((2, 1, 5, 3), np.array([[[[4, -1, 0]], ], [[[-5, 2, 3]]]], np.int64)), {"axis": 2}),
        Example("GatherElements", ((2, 2, 9), np.tile(np.arange(8, -2, -1), (2, 2, 1))), {"axis": 2}),
        Example("GatherElements", ((1, 3, 7, 4), np.tile(np.array([[5], [-7], [2]]), (1, 2, 1, 4))), {"axis": -2}),
    )

    axis: int
    cells: tuple[int, ...] | None

    @classmethod
    def read(cls, view: NodeView) -> Self:
        data, index = view.input(0), view.input(1)
        axis = checked_axis(view.int("axis", 0), data.rank)
        fits = index.rank == data.rank and all(
            m <= n or a == axis for a, (m, n) in enumerate(zip(index.shape, data.shape, strict=True)))
        if not fits:
            raise Unsupported(f"indices of {list(index.shape)} on extents {list(data.shape)}; correct the file")
        known = known_indices(view, 1, data.shape[axis])
        return cls(view.inputs, (TensorType(index.shape, data.dtype),), axis,
                   None if known is None else _agreed(known, axis))

    def needs(self, output: int = 0) -> Needs:
        data, out = self.inputs[0], self.outputs[0].shape
        assert data is not None
        own = [Need(a, Shift(n, out[a], 0)) for a, n in enumerate(data.shape)]
        if self.cells is None:
            own[self.axis] = Need(None, Whole(data.shape[self.axis], 1))
            return (tuple(own), tuple(Need(a, identity(n)) for a, n in enumerate(out)))
        rows = tuple((cell,) for cell in self.cells)
        own[self.axis] = Need(self.axis, Taps(data.shape[self.axis], len(rows), rows))
        return (tuple(own), None)

    def _positions(self, box: Box, out: Box) -> Array:
        """The known indices of the output's cells, by their places in the local tensor."""
        wanted = out.intervals()[self.axis]
        return _places(box.axes[self.axis])[np.asarray(self.cells, np.int64)[wanted.start : wanted.stop]]

    def backward(self, ins: Sequence[float], outs: Sequence[float]) -> Backward:
        return Backward(inputs=(0,), beside=8 * outs[0]) if self.cells is None else Backward()

    def run(self, call: Call) -> tuple[torch.Tensor, ...]:
        x = call.tensor(0)
        if self.cells is not None:
            places = torch.from_numpy(self._positions(call.box(0), call.outs[0])).to(x.device)
            return (moved(lambda cells: cells.index_select(self.axis, places), x),)
        index = from_front(call.tensor(1), x.shape[self.axis])
        return (moved(lambda cells: cells.gather(self.axis, index), x),)

    def emit(self, emitter: Emitter, names: Sequence[str | None], boxes: Sequence[Box | None],
             outs: Sequence[Box]) -> tuple[str, ...]:
        if self.cells is None:
            return emitter.same(names, 1)
        assert boxes[0] is not None
        index = emitter.constant(self._positions(boxes[0], outs[0]))
        return (emitter.op("Gather", [names[0], index], {"axis": self.axis}),)

    def flops(self, out: float) -> float:
        return 0.0


def _agreed(cells: Array, axis: int) -> tuple[int, ...] | None:
    """The indices along an axis where they are the same for all cells beside it."""
    if not cells.size:
        return None
    line = cells[tuple(slice(None) if a == axis else slice(0, 1) for a in range(cells.ndim))]
    return tuple(int(i) for i in line.reshape(-1)) if (cells == line).all() else None


def flat_index(index: torch.Tensor, extents: Sequence[int]) -> torch.Tensor:
    """Index vectors (last axis) as numbers of cells of a tensor of these extents."""
    flat = torch.zeros(index.shape[:-1], dtype=torch.int64, device=index.device)
    for axis, n in enumerate(extents):
        flat = flat * n + from_front(index[..., axis], n)
    return flat


@register
@dataclass(frozen=True)
class GatherND(Operator):
    """Slices of a tensor named by index vectors.

    Constant vectors need only the cells that they name; for others the axes that they index are needed whole.
    Source: ONNX GatherND (11, 12, 13).
    """

    op_types: ClassVar[tuple[str, ...]] = ("GatherND",)
    examples: ClassVar[tuple[Example, ...]] = (
        Example("GatherND", ((9, 9, 5), (4, 2)), dtype=ir.DataType.INT64),
        Example("GatherND", ((2, 9, 4), (2, 3, 1)), {"batch_dims": 1}, opset=12, dtype=ir.DataType.INT64),
        Example("GatherND", ((2, 3, 9, 9, 2), (2, 3, 5, 2)), {"batch_dims": 2}, dtype=ir.DataType.INT64),
        Example("GatherND", ((9, 2, 7), (3, 4, 1)), opset=11, dtype=ir.DataType.INT64),
        Example("GatherND", ((3, 4, 5), np.array([[[0, -1]], [[2, 1]]], np.int64))),
        Example("GatherND", ((3, 4, 5), np.array([0, -1, 2], np.int64))),
        Example("GatherND", ((9, 2, 3), np.array([[0], [0], [2], [-2], [8]], np.int64)), opset=13),
        Example("GatherND", ((2, 9, 4), np.array([[[8], [0], [3]], [[7], [0], [5]]], np.int64)), {"batch_dims": 1}),
        Example("GatherND", ((7, 9, 2), np.array([[[6, 0], [6, 4]], [[1, 0], [1, 4]], [[-7, 0], [-7, 4]]], np.int64))),
    )

    batch: int
    cells: tuple[tuple[int, ...], ...] | None

    @classmethod
    def read(cls, view: NodeView) -> Self:
        data, index = view.input(0), view.input(1)
        batch = view.int("batch_dims", 0)
        depth = index.shape[-1] if index.rank else 0
        if not (0 <= batch < index.rank and 1 <= depth <= data.rank - batch) or index.shape[:batch] != \
                data.shape[:batch]:
            raise Unsupported(f"indices of {list(index.shape)} on extents {list(data.shape)}; correct the file")
        shape = (*index.shape[:-1], *data.shape[batch + depth :])
        return cls(view.inputs, (TensorType(shape, data.dtype),), batch, cls._known(view, batch, depth))

    @staticmethod
    def _known(view: NodeView, batch: int, depth: int) -> tuple[tuple[int, ...], ...] | None:
        """Per indexed axis the constant indices, row by row; None when they are computed from the data."""
        constant = view.constants[1]
        if constant is None:
            return None
        vectors = constant.numpy().astype(np.int64)
        extents = view.input(0).shape[batch : batch + depth]
        columns = [_counted(vectors[..., j], n) for j, n in enumerate(extents)]
        return tuple(tuple(int(i) for i in column.reshape(-1)) for column in columns)

    @property
    def _parts(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        data, index = self.inputs
        assert data is not None and index is not None
        return data.shape, index.shape

    def needs(self, output: int = 0) -> Needs:
        shape, index = self._parts
        first = self.batch + index[-1]
        shift = len(index) - 1 - first
        own = (*(Need(a, identity(n)) for a, n in enumerate(shape[: self.batch])), *self._indexed(),
               *(Need(a + shift, identity(n)) for a, n in enumerate(shape[first:], first)))
        vectors = tuple(Need(a, identity(n)) for a, n in enumerate(index[:-1]))
        return (own, None if self.cells is not None else (*vectors, Need(None, Whole(index[-1], 1))))

    def _indexed(self) -> list[Need]:
        """Every indexed axis by that axis of the indices along which it names fewest cells; none serves twice."""
        shape, index = self._parts
        found = [Need(None, Whole(n, 1)) for n in shape[self.batch : self.batch + index[-1]]]
        if self.cells is None or not all(index):
            return found
        free = list(range(self.batch, len(index) - 1))
        for column, n in enumerate(need.map.n_in for need in found):
            need = narrowest(np.asarray(self.cells[column], np.int64).reshape(index[:-1]), n, free)
            if need is not None and need.axis is not None:
                found[column] = need
                free.remove(need.axis)
        return found

    def _positions(self, box: Box, out: Box) -> Array:
        """The known index vectors of the output's cells, by their places in the local tensor."""
        index = self._parts[1]
        part = tuple(slice(i.start, i.stop) for i in out.intervals()[: len(index) - 1])
        columns: list[Array] = []
        for cells, held in zip(self.cells or (), box.axes[self.batch :], strict=False):
            columns.append(_places(held)[np.asarray(cells, np.int64).reshape(index[:-1])[part]])
        return np.stack(columns, -1)

    def backward(self, ins: Sequence[float], outs: Sequence[float]) -> Backward:
        return Backward(inputs=(0,))

    def run(self, call: Call) -> tuple[torch.Tensor, ...]:
        x, depth = call.tensor(0), self._parts[1][-1]
        if self.cells is None:
            index = call.tensor(1)
        else:
            index = torch.from_numpy(self._positions(call.box(0), call.outs[0])).to(x.device)
        batch = math.prod(x.shape[: self.batch])
        extents = x.shape[self.batch : self.batch + depth]
        flat = flat_index(index, extents).reshape(batch, -1)
        cells = x.reshape(batch, math.prod(extents), -1)
        wanted = flat.unsqueeze(-1).expand(-1, -1, cells.shape[-1])
        return (moved(lambda found: found.gather(1, wanted), cells).reshape(call.outs[0].shape),)

    def emit(self, emitter: Emitter, names: Sequence[str | None], boxes: Sequence[Box | None],
             outs: Sequence[Box]) -> tuple[str, ...]:
        if self.cells is None:
            return emitter.same(names, 1)
        assert boxes[0] is not None
        return emitter.same([names[0], emitter.constant(self._positions(boxes[0], outs[0]))], 1)

    def flops(self, out: float) -> float:
        return 0.0
