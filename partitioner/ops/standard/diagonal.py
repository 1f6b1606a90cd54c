"""Operators whose results depend on where a cell lies: triangles, identity matrices, one-hot vectors, reversals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
import onnx_ir as ir

from partitioner.geometry import Box, Interval
from partitioner.maps import identity
from partitioner.ops.base import (
    Backward,
    Call,
    Example,
    Need,
    Needs,
    NodeView,
    Operator,
    TensorType,
    Unsupported,
    aligned,
    statistics,
    whole,
)
from partitioner.ops.dtypes import is_known, torch_dtype
from partitioner.ops.registry import register
from partitioner.ops.standard.shape import checked_axis

if TYPE_CHECKING:
    import torch

    from partitioner.ops.emitter import Emitter
else:
    from partitioner.lazy import torch


def diagonals(rows: Interval, columns: Interval, device: torch.device) -> torch.Tensor:
    """column - row of every cell of a matrix's part."""
    down = torch.arange(rows.start, rows.stop, device=device)
    across = torch.arange(columns.start, columns.stop, device=device)
    return across[None, :] - down[:, None]


@register
@dataclass(frozen=True)
class Trilu(Operator):
    """The triangle of each matrix (last two axes) above or below its k-th diagonal; zeros elsewhere.

    Source: ONNX Trilu (14).
    """

    op_types: ClassVar[tuple[str, ...]] = ("Trilu",)
    examples: ClassVar[tuple[Example, ...]] = (
        Example("Trilu", ((1, 2, 5, 7),)),
        Example("Trilu", ((1, 2, 5, 7), np.array(2, np.int64)), {"upper": 0}),
        Example("Trilu", ((2, 1, 7, 4), np.array(-3, np.int64)), {"upper": 1}, opset=14),
        Example("Trilu", ((3, 5, 6), np.array([1], np.int64)), {"upper": 0}, dtype=ir.DataType.INT64),
    )

    upper: bool
    k: int

    @classmethod
    def read(cls, view: NodeView) -> Self:
        data, k = view.input(0), view.constant(1, "diagonal")
        if data.rank < 2:
            raise Unsupported(f"extents {list(data.shape)} are no matrix; correct the file")
        return cls(view.inputs, (data,), bool(view.int("upper", 1)), 0 if k is None else int(k.reshape(-1)[0]))

    def needs(self, output: int = 0) -> Needs:
        shape = self.outputs[0].shape
        return (aligned(shape, shape), *(None for _ in self.inputs[1:]))

    def backward(self, ins: Sequence[float], outs: Sequence[float]) -> Backward:
        return Backward(beside=math.prod(self.outputs[0].shape[-2:]))

    def run(self, call: Call) -> tuple[torch.Tensor, ...]:
        x = call.tensor(0)
        rows, columns = call.outs[0].intervals()[-2:]
        diagonal = diagonals(rows, columns, x.device)
        kept = diagonal >= self.k if self.upper else diagonal <= self.k
        return (torch.where(kept, x, torch.zeros((), dtype=x.dtype, device=x.device)),)

    def emit(self, emitter: Emitter, names: Sequence[str | None], boxes: Sequence[Box | None],
             outs: Sequence[Box]) -> tuple[str, ...]:
        rows, columns = outs[0].intervals()[-2:]
        k = emitter.constant(np.asarray(self.k - columns.start + rows.start, np.int64))
        return (emitter.op("Trilu", [names[0], k], {"upper": int(self.upper)}),)


@register
@dataclass(frozen=True)
class EyeLike(Operator):
    """Ones on the k-th diagonal of a matrix of the input's extents, zeros elsewhere.

    Source: ONNX EyeLike (9, 22).
    """

    op_types: ClassVar[tuple[str, ...]] = ("EyeLike",)
    examples: ClassVar[tuple[Example, ...]] = (
        Example("EyeLike", ((5, 7),)),
        Example("EyeLike", ((7, 4),), {"k": -2}, opset=9),
        Example("EyeLike", ((4, 4),), {"k": 1, "dtype": int(ir.DataType.INT64)}),
    )

    k: int

    @classmethod
    def read(cls, view: NodeView) -> Self:
        data = view.input(0)
        dtype = ir.DataType(view.int("dtype", int(data.dtype)))
        if data.rank != 2 or not is_known(dtype):
            raise Unsupported(f"a matrix of {dtype.name} like extents {list(data.shape)}; correct the file")
        return cls(view.inputs, (TensorType(data.shape, dtype),), view.int("k", 0))

    def needs(self, output: int = 0) -> Needs:
        shape = self.outputs[0].shape
        return (aligned(shape, shape),)

    def run(self, call: Call) -> tuple[torch.Tensor, ...]:
        rows, columns = call.outs[0].intervals()
        diagonal = diagonals(rows, columns, call.tensor(0).device)
        return ((diagonal == self.k).to(torch_dtype(self.outputs[0].dtype)),)

    def emit(self, emitter: Emitter, names: Sequence[str | None], boxes: Sequence[Box | None],
             outs: Sequence[Box]) -> tuple[str, ...]:
        rows, columns = outs[0].intervals()
        return emitter.same(names, 1, {"k": self.k - columns.start + rows.start})


@register
@dataclass(frozen=True)
class OneHot(Operator):
    """A new axis of `depth` cells that holds `on` at the index and `off` elsewhere; all `off` out of range.

    Source: ONNX OneHot (9, 11).
    """

    op_types: ClassVar[tuple[str, ...]] = ("OneHot",)
    examples: ClassVar[tuple[Example, ...]] = (
        Example("OneHot", ((2, 3, 5), np.array(9, np.int64), np.array([0, 1], np.float32)), dtype=ir.DataType.INT64),
        Example("OneHot", ((2, 3, 5), np.array([6], np.int64), np.array([0.5, 2], np.float32)), {"axis": 1},
                dtype=ir.DataType.INT64),
        Example("OneHot", ((1, 4, 3, 2), np.array(7, np.int64), np.array([0, 1], np.int64)), {"axis": -3}, opset=9,
                dtype=ir.DataType.INT64),
        Example("OneHot", ((7,), np.array(9, np.int64), np.array([0, 1], np.float32)), {"axis": 0}, opset=11,
                dtype=ir.DataType.INT64),
    )

    axis: int
    depth: int

    @classmethod
    def read(cls, view: NodeView) -> Self:
        indices, depth = view.input(0), view.constant(1, "depth")
        if depth is None or int(depth.reshape(-1)[0]) < 1:
            raise Unsupported("its depth is not positive; correct the file")
        axis, count = checked_axis(view.int("axis", -1), indices.rank + 1), int(depth.reshape(-1)[0])
        shape = (*indices.shape[:axis], count, *indices.shape[axis:])
        return cls(view.inputs, (TensorType(shape, view.input(2).dtype),), axis, count)

    def needs(self, output: int = 0) -> Needs:
        indices = self.inputs[0]
        assert indices is not None
        own = tuple(Need(a + (a >= self.axis), identity(n)) for a, n in enumerate(indices.shape))
        return (own, None, whole((2,)))

    def backward(self, ins: Sequence[float], outs: Sequence[float]) -> Backward:
        return Backward(beside=outs[0])

    def run(self, call: Call) -> tuple[torch.Tensor, ...]:
        index, (off, on) = call.tensor(0).to(torch.int64), call.tensor(2).unbind()
        index = torch.where(index < 0, index + self.depth, index).unsqueeze(self.axis)
        shape = [1] * index.ndim
        shape[self.axis] = -1
        cells = torch.arange(self.depth, device=index.device).reshape(shape)
        return (torch.where(index == cells, on, off),)

    def flops(self, out: float) -> float:
        return 0.0


@register
@dataclass(frozen=True)
class ReverseSequence(Operator):
    """The first lens[b] cells of every sequence b in reverse order, the others as they are.

    Source: ONNX ReverseSequence (10).
    """

    op_types: ClassVar[tuple[str, ...]] = ("ReverseSequence",)
    examples: ClassVar[tuple[Example, ...]] = (
        Example("ReverseSequence", ((7, 3, 4), np.array([7, 2, 4], np.int64))),
        Example("ReverseSequence", ((3, 7, 2, 5), np.array([1, 7, 6], np.int64)), {"batch_axis": 0, "time_axis": 1}),
        Example("ReverseSequence", ((9, 4, 3), (4,)), opset=10, dtype=ir.DataType.INT64),
        Example("ReverseSequence", ((4, 9), (4,)), {"batch_axis": 0, "time_axis": 1}, dtype=ir.DataType.INT64),
    )

    batch: int
    time: int

    @classmethod
    def read(cls, view: NodeView) -> Self:
        data, batch, time = view.input(0), view.int("batch_axis", 1), view.int("time_axis", 0)
        if {batch, time} != {0, 1} or view.input(1).shape != data.shape[batch : batch + 1]:
            raise Unsupported("batch_axis, time_axis and sequence_lens do not fit; correct the file")
        return cls(view.inputs, (data,), batch, time)

    def needs(self, output: int = 0) -> Needs:
        shape = self.outputs[0].shape
        data = tuple(statistics(a, n) if a == self.time else Need(a, identity(n)) for a, n in enumerate(shape))
        return (data, (Need(self.batch, identity(shape[self.batch])),))

    def backward(self, ins: Sequence[float], outs: Sequence[float]) -> Backward:
        return Backward(inputs=(0,), beside=8 * outs[0] / max(1, math.prod(self.outputs[0].shape[2:])))

    def run(self, call: Call) -> tuple[torch.Tensor, ...]:
        x, lens = call.tensor(0), call.tensor(1).reshape(1, -1)
        wanted = call.outs[0].intervals()[self.time]
        cell = torch.arange(wanted.start, wanted.stop, device=x.device).reshape(-1, 1)
        source = torch.where(cell < lens, lens - 1 - cell, cell)
        source = source if self.time == 0 else source.T
        index = source.reshape(*source.shape, *[1] * (x.ndim - 2)).expand(call.outs[0].shape)
        return (x.gather(self.time, index),)

    def emit(self, emitter: Emitter, names: Sequence[str | None], boxes: Sequence[Box | None],
             outs: Sequence[Box]) -> tuple[str, ...]:
        result, wanted = emitter.same(names, 1)[0], outs[0].intervals()[self.time]
        if len(wanted) == self.outputs[0].shape[self.time]:
            return (result,)
        return (emitter.crop(result, {self.time: (wanted.start, wanted.stop)}),)

    def flops(self, out: float) -> float:
        return 0.0
