"""Operators that repeat, crop or choose cells along axes, where to is known beforehand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np

from partitioner.geometry import Box
from partitioner.maps import AxisMap, Shift, Taps, Whole, identity
from partitioner.ops.base import (
    Call,
    Example,
    Need,
    Needs,
    NodeView,
    Operator,
    TensorType,
    Unsupported,
    WrongExtents,
    listed_integers,
    whole,
)
from partitioner.ops.registry import register
from partitioner.ops.standard.shape import Move, checked_axis

if TYPE_CHECKING:
    import torch

    from partitioner.ops.emitter import Emitter
else:
    from partitioner.lazy import torch


@register
@dataclass(frozen=True)
class Expand(Operator):
    """A tensor repeated along its axes of one cell, and along new leading axes.

    Source: ONNX Expand (8, 13).
    """

    op_types: ClassVar[tuple[str, ...]] = ("Expand",)
    examples: ClassVar[tuple[Example, ...]] = (
        Example("Expand", ((2, 3, 1, 7), np.array([2, 1, 5, 7], np.int64))),
        Example("Expand", ((3, 1), np.array([2, 1, 6], np.int64)), opset=9),
        Example("Expand", ((2, 1, 1, 1), np.array([3, 4, 5], np.int64)), opset=13),
        Example("Expand", ((1, 2, 7), np.array([1], np.int64))),
        Example("Expand", ((1, 2, 7), np.array([3, 1, 1, 1], np.int64)), opset=11),
    )

    @classmethod
    def read(cls, view: NodeView) -> Self:
        data, target = view.input(0), listed_integers(view, "shape", 1)
        if target is None:
            raise Unsupported("its target shape is missing; correct the file")
        try:
            shape = np.broadcast_shapes(data.shape, target)
        except ValueError:
            raise WrongExtents(f"extents {list(data.shape)} do not expand to {list(target)}; the network cannot take "
                               "this volume's extents") from None
        return cls(view.inputs, (TensorType(shape, data.dtype),))

    def needs(self, output: int = 0) -> Needs:
        data, out = self.inputs[0], self.outputs[0].shape
        assert data is not None
        new = len(out) - data.rank
        own = tuple(Need(new + a, identity(n) if n == out[new + a] else Whole(n, out[new + a]))
                    for a, n in enumerate(data.shape))
        return (own, None)

    def run(self, call: Call) -> tuple[torch.Tensor, ...]:
        return (call.tensor(0).expand(call.outs[0].shape).clone(memory_format=torch.contiguous_format),)

    def emit(self, emitter: Emitter, names: Sequence[str | None], boxes: Sequence[Box | None],
             outs: Sequence[Box]) -> tuple[str, ...]:
        return (emitter.op("Expand", [names[0], emitter.integers(outs[0].shape)]),)

    def flops(self, out: float) -> float:
        return 0.0


@register
@dataclass(frozen=True)
class Tile(Move):
    """A tensor side by side with itself: output cell i is input cell i mod n.

    Source: ONNX Tile (1, 6, 13).
    """

    op_types: ClassVar[tuple[str, ...]] = ("Tile",)
    examples: ClassVar[tuple[Example, ...]] = (
        Example("Tile", ((2, 3, 5, 3), np.array([1, 1, 2, 3], np.int64))),
        Example("Tile", ((2, 3, 7), np.array([2, 2, 1], np.int64)), opset=11),
        Example("Tile", ((1, 2, 1, 4), np.array([1, 1, 5, 1], np.int64)), opset=9),
        Example("Tile", ((1, 1, 3, 2, 3), np.array([1, 1, 2, 1, 2], np.int64)), opset=13),
        Example("Tile", ((1, 2, 5), np.array([1, 1, 1], np.int64)), opset=13),
    )

    @classmethod
    def read(cls, view: NodeView) -> Self:
        data, repeats = view.input(0), listed_integers(view, "repeats", 1)
        if view.version < 6 and repeats is not None:
            axis = listed_integers(view, "axis", 2) or (0,)
            repeats = tuple(repeats[0] if a == checked_axis(axis[0], data.rank) else 1 for a in range(data.rank))
        if repeats is None or len(repeats) != data.rank:
            raise Unsupported("its repeats do not fit its input; correct the file")
        if min(repeats, default=1) < 1:
            raise WrongExtents(f"repeats {list(repeats)} leave nothing of it; correct the file")
        maps = tuple(identity(n) if count == 1 else Taps(n, n * count, tuple((i % n,) for i in range(n * count)))
                     for n, count in zip(data.shape, repeats, strict=True))
        return cls(view.inputs, (TensorType(tuple(m.n_out for m in maps), data.dtype),), maps, 0.0)


@register
@dataclass(frozen=True)
class CenterCropPad(Move):
    """A tensor cropped or padded with zeros around its centre.

    Source: ONNX CenterCropPad (18).
    """

    op_types: ClassVar[tuple[str, ...]] = ("CenterCropPad",)
    examples: ClassVar[tuple[Example, ...]] = (
        Example("CenterCropPad", ((1, 2, 9, 6), np.array([4, 9], np.int64)), {"axes": [2, 3]}),
        Example("CenterCropPad", ((1, 2, 8, 7), np.array([5, 10], np.int64)), {"axes": [-2, -1]}),
        Example("CenterCropPad", ((1, 3, 7), np.array([1, 2, 12], np.int64))),
        Example("CenterCropPad", ((1, 1, 7, 4, 5), np.array([4, 4, 8], np.int64)), {"axes": [2, 3, 4]}),
    )

    @classmethod
    def read(cls, view: NodeView) -> Self:
        data, target = view.input(0), listed_integers(view, "shape", 1)
        axes = view.ints("axes") or tuple(range(data.rank))
        if target is None or len(target) != len(axes):
            raise Unsupported("its target shape does not fit its axes; correct the file")
        maps: list[AxisMap] = [identity(n) for n in data.shape]
        for given, wanted in zip(axes, target, strict=True):
            axis = checked_axis(given, data.rank)
            n = data.shape[axis]
            maps[axis] = Shift(n, wanted, (n - wanted) // 2 if wanted <= n else -((wanted - n) // 2))
        if any(m.n_out < 1 for m in maps):
            raise WrongExtents(f"it leaves nothing of extents {list(data.shape)}; use a larger volume")
        return cls(view.inputs, (TensorType(tuple(m.n_out for m in maps), data.dtype),), tuple(maps), 0.0)


@register
@dataclass(frozen=True)
class Compress(Operator):
    """The cells along an axis, or of the flattened tensor, for which a constant condition holds.

    Source: ONNX Compress (9, 11).
    """

    op_types: ClassVar[tuple[str, ...]] = ("Compress",)
    examples: ClassVar[tuple[Example, ...]] = (
        Example("Compress", ((1, 2, 7), np.array([1, 0, 1, 1, 0, 0, 1], bool)), {"axis": 2}),
        Example("Compress", ((1, 2, 7, 5), np.array([0, 1, 1, 0, 1], bool)), {"axis": -2}, opset=11),
        Example("Compress", ((3, 2, 5), np.array([0, 1, 1], bool)), {"axis": 0}, opset=9),
        Example("Compress", ((2, 2, 3), np.array([0, 1, 1, 0, 0, 1, 0, 0, 1], bool))),
    )

    axis: int | None
    cells: tuple[int, ...]

    @classmethod
    def read(cls, view: NodeView) -> Self:
        data, condition = view.input(0), view.constant(1, "condition")
        if condition is None:
            raise Unsupported("its condition is missing; correct the file")
        axis = checked_axis(view.int("axis", 0), data.rank) if "axis" in view.attributes else None
        most = math.prod(data.shape) if axis is None else data.shape[axis]
        cells = tuple(int(i) for i in np.flatnonzero(condition.reshape(-1)[:most]))
        if not cells:
            raise WrongExtents("its condition leaves nothing; correct the file")
        shape = (len(cells),) if axis is None else (*data.shape[:axis], len(cells), *data.shape[axis + 1 :])
        return cls(view.inputs, (TensorType(shape, data.dtype),), axis, cells)

    def needs(self, output: int = 0) -> Needs:
        data = self.inputs[0]
        assert data is not None
        if self.axis is None:
            return (whole(data.shape), None)
        return (tuple(Need(a, self._map(n) if a == self.axis else identity(n)) for a, n in enumerate(data.shape)), None)

    def _map(self, extent: int) -> Taps:
        return Taps(extent, len(self.cells), tuple((i,) for i in self.cells))

    def _positions(self, box: Box, out: Box) -> list[int]:
        """The chosen cells by their places in the local tensor."""
        axis = self.axis or 0
        wanted = out.intervals()[axis]
        first = 0 if self.axis is None else box.intervals()[axis].start
        return [i - first for i in self.cells[wanted.start : wanted.stop]]

    def run(self, call: Call) -> tuple[torch.Tensor, ...]:
        x = call.tensor(0)
        index = torch.tensor(self._positions(call.box(0), call.outs[0]), device=x.device)
        return ((x.reshape(-1) if self.axis is None else x).index_select(self.axis or 0, index),)

    def emit(self, emitter: Emitter, names: Sequence[str | None], boxes: Sequence[Box | None],
             outs: Sequence[Box]) -> tuple[str, ...]:
        name, box = names[0], boxes[0]
        assert name is not None and box is not None
        source = emitter.reshape(name, [-1]) if self.axis is None else name
        index = emitter.integers(self._positions(box, outs[0]))
        return (emitter.op("Gather", [source, index], {"axis": self.axis or 0}),)

    def flops(self, out: float) -> float:
        return 0.0
