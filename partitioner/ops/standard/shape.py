"""Operators that move cells without computing: concatenation, slices, padding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
import onnx_ir as ir

from partitioner.geometry import Box, Interval, Pieces
from partitioner.maps import AxisMap, Identity, Shift, Taps, identity
from partitioner.ops.base import (
    Array,
    Backward,
    Call,
    Example,
    Need,
    Needs,
    NodeView,
    NothingLeft,
    Operator,
    TensorType,
    Unsupported,
    WrongExtents,
    listed_integers,
)
from partitioner.ops.registry import register
from partitioner.ops.standard.resize import local_positions

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as functional

    from partitioner.ops.emitter import Emitter
else:
    from partitioner.lazy import functional, torch


def _ints(*values: int) -> Array:
    return np.array(values, np.int64)


def checked_axis(axis: int, rank: int) -> int:
    """An axis counted from the front.

    Raises:
        Unsupported: when there is no such axis.
    """
    if not -rank <= axis < rank:
        raise Unsupported(f"axis {axis} on a tensor of {rank} axes; correct the file")
    return axis % rank


@register
@dataclass(frozen=True)
class Concat(Operator):
    """Tensors side by side along an axis; a shard takes the pieces that fall into its cells.

    Source: ONNX Concat (4, 11, 13).
    """

    op_types: ClassVar[tuple[str, ...]] = ("Concat",)
    examples: ClassVar[tuple[Example, ...]] = (
        Example("Concat", ((1, 2, 7, 5), (1, 3, 7, 5)), {"axis": 1}),
        Example("Concat", ((1, 2, 7), (1, 2, 4), (1, 2, 1)), {"axis": -1}),
        Example("Concat", ((2, 2, 5, 3), (1, 2, 5, 3), (3, 2, 5, 3)), {"axis": 0}, opset=11),
        Example("Concat", ((1, 1, 3, 4, 2), (1, 1, 8, 4, 2)), {"axis": 2}, opset=9),
        Example("Concat", ((1, 2, 4), np.ones((1, 2, 3), np.float32), (1, 2, 4)), {"axis": 2}, opset=13),
        Example("Concat", ((1, 2, 5, 7), (1, 2, 1, 7)), {"axis": -2}, opset=13),
        Example("Concat", ((1, 2, 5),), {"axis": 2}, opset=13),
    )

    axis: int
    starts: tuple[int, ...]

    @classmethod
    def read(cls, view: NodeView) -> Self:
        types = [view.input(i) for i in range(len(view.inputs))]
        rank = types[0].rank
        axis = checked_axis(view.int("axis", 1), rank)
        for other in types[1:]:
            pairs = zip(types[0].shape, other.shape, strict=False)
            if other.rank != rank or any(a != b for i, (a, b) in enumerate(pairs) if i != axis):
                shapes = ", ".join(str(list(t.shape)) for t in types)
                raise WrongExtents(f"extents {shapes} differ beside axis {axis}; the network cannot take this "
                                  "volume's extents")
        sizes = [t.shape[axis] for t in types]
        starts = tuple(sum(sizes[:i]) for i in range(len(sizes)))
        shape = (*types[0].shape[:axis], sum(sizes), *types[0].shape[axis + 1 :])
        return cls(view.inputs, (TensorType(shape, types[0].dtype),), axis, starts)

    @property
    def writes_into(self) -> bool:
        return True

    def needs(self, output: int = 0) -> Needs:
        out = self.outputs[0].shape
        found: list[tuple[Need, ...]] = []
        for start, given in zip(self.starts, self.inputs, strict=True):
            assert given is not None
            part = Need(self.axis, Shift(given.shape[self.axis], out[self.axis], -start))
            found.append(tuple(part if a == self.axis else Need(a, identity(n)) for a, n in enumerate(given.shape)))
        return tuple(found)

    def backward(self, ins: Sequence[float], outs: Sequence[float]) -> Backward:
        return Backward(hands_on=True)

    def run(self, call: Call) -> tuple[torch.Tensor, ...]:
        present = [x for x in call.tensors if x is not None and x.shape[self.axis]]
        if call.into is None:
            return (torch.cat(present, self.axis),)
        places = call.into.split([x.shape[self.axis] for x in present], self.axis)
        missing = [(x, place) for x, place in zip(present, places, strict=True)
                   if x.data_ptr() != place.data_ptr() or x.stride() != place.stride()]
        if len(missing) == len(present):
            return (torch.cat(present, self.axis, out=call.into),)
        for x, place in missing:  # the others have been computed in their place
            place.copy_(x)
        return (call.into,)

    def emit(self, emitter: Emitter, names: Sequence[str | None], boxes: Sequence[Box | None],
             outs: Sequence[Box]) -> tuple[str, ...]:
        present = [name for name, box in zip(names, boxes, strict=True) if name is not None and box]
        return (emitter.op("Concat", present, {"axis": self.axis}),)


def take(x: torch.Tensor, axis: int, axis_map: Taps, held: Pieces, out: Interval) -> torch.Tensor:
    """The cells of a local tensor that a one-tap map names, in its order."""
    position = local_positions(held)
    index = [position[row[0]] for row in axis_map.rows[out.start : out.stop]]
    if index == list(range(index[0], index[0] + len(index))):
        return x.narrow(axis, index[0], len(index)).clone()
    return x.index_select(axis, torch.tensor(index, device=x.device))


def emit_take(emitter: Emitter, name: str, axis: int, axis_map: Taps, held: Pieces, out: Interval) -> str:
    """`take` as an ONNX Gather."""
    position = local_positions(held)
    index = [position[row[0]] for row in axis_map.rows[out.start : out.stop]]
    return emitter.op("Gather", [name, emitter.integers(index)], {"axis": axis})


@dataclass(frozen=True)
class Move(Operator):
    """Every axis is shifted or re-ordered by its own map; cells outside take `fill`."""

    axes: tuple[AxisMap, ...]
    fill: float

    def needs(self, output: int = 0) -> Needs:
        own = tuple(Need(a, axis_map) for a, axis_map in enumerate(self.axes))
        return (own, *(None for _ in self.inputs[1:]))

    @property
    def is_view(self) -> bool:
        """A crop that keeps most of its input; a small one is copied, so that the rest can go."""
        source = self.inputs[0]
        assert source is not None
        inside = all(isinstance(m, Shift | Identity) and getattr(m, "offset", 0) >= 0
                     and getattr(m, "offset", 0) + m.n_out <= m.n_in for m in self.axes)
        return inside and 2 * math.prod(self.outputs[0].shape) >= math.prod(source.shape)

    def backward(self, ins: Sequence[float], outs: Sequence[float]) -> Backward:
        return Backward(shares=self.is_view)

    def _padding(self, box: Box, out: Box) -> list[tuple[int, int]]:
        """Cells to add before and after every axis: what a shift left outside the tensor."""
        found: list[tuple[int, int]] = []
        for axis_map, held, wanted in zip(self.axes, box.axes, out.intervals(), strict=True):
            if not isinstance(axis_map, Shift):
                found.append((0, 0))
            elif not held:
                found.append((len(wanted), 0))
            else:
                start = wanted.start + axis_map.offset
                found.append((held[0].start - start, start + len(wanted) - held[-1].stop))
        return found

    def run(self, call: Call) -> tuple[torch.Tensor, ...]:
        result, box, out = call.tensor(0), call.box(0), call.outs[0]
        if not all(box.shape):
            return (torch.full(out.shape, self.fill, dtype=result.dtype, device=result.device),)
        for axis, axis_map in enumerate(self.axes):
            if isinstance(axis_map, Taps):
                result = take(result, axis, axis_map, box.axes[axis], out.intervals()[axis])
        amounts = [n for pair in reversed(self._padding(box, out)) for n in pair]
        if any(amounts):
            return (functional.pad(result, amounts, value=self.fill),)
        copied = any(isinstance(m, Taps) for m in self.axes)
        return (result if self.is_view or copied else result.clone(),)

    def emit(self, emitter: Emitter, names: Sequence[str | None], boxes: Sequence[Box | None],
             outs: Sequence[Box]) -> tuple[str, ...]:
        result, box, out = names[0], boxes[0], outs[0]
        assert box is not None
        if result is None:  # nothing but padding
            return (emitter.full(out.shape, self.fill, self.outputs[0].dtype),)
        for axis, axis_map in enumerate(self.axes):
            if isinstance(axis_map, Taps) and box.axes[axis]:
                result = emit_take(emitter, result, axis, axis_map, box.axes[axis], out.intervals()[axis])
        padding = self._padding(box, out)
        if any(any(pair) for pair in padding):
            fill = np.asarray(self.fill, self.outputs[0].dtype.numpy())
            result = emitter.pad(result, [lo for lo, _ in padding], [hi for _, hi in padding], fill)
        return (emitter.op("Identity", [result]),)

    def flops(self, out: float) -> float:
        return 0.0


@register
@dataclass(frozen=True)
class Slice(Move):
    """A part of a tensor, with steps of any sign.

    Source: ONNX Slice (1, 10, 11, 13).
    """

    op_types: ClassVar[tuple[str, ...]] = ("Slice",)
    examples: ClassVar[tuple[Example, ...]] = (
        Example("Slice", ((1, 2, 13, 7), np.array([2, 1], np.int64), np.array([-1, 6], np.int64),
                          np.array([2, 3], np.int64))),
        Example("Slice", ((1, 2, 13),), {"axes": [2], "starts": [3], "ends": [100]}, opset=9),
        Example("Slice", ((1, 2, 13), np.array([1], np.int64), np.array([12], np.int64),
                          np.array([2], np.int64), np.array([3], np.int64))),
        Example("Slice", ((1, 2, 13), np.array([-1], np.int64), np.array([-100], np.int64),
                          np.array([2], np.int64), np.array([-2], np.int64))),
        Example("Slice", ((2, 3, 7, 9), _ints(1, -8), _ints(2**31 - 1, 2**63 - 1), _ints(2, -1))),
        Example("Slice", ((2, 3, 7, 9), _ints(-1, 8), _ints(-(2**63), 1), _ints(2, 3), _ints(-1, -3)), opset=11),
        Example("Slice", ((2, 3, 7, 9), _ints(0, 1, -5, 2), _ints(2, 9, -1, 9), None, _ints(1, 2, 1, 3)), opset=10),
        Example("Slice", ((3, 2, 7), np.array([2], np.int32), np.array([-9], np.int32), np.array([0], np.int32),
                          np.array([-1], np.int32)), opset=13),
        Example("Slice", ((2, 3, 7, 9), _ints(1, 1), _ints(2, 2))),
        Example("Slice", ((1, 1, 9, 5, 7), _ints(1, 0, 6), _ints(8, 5, 0), _ints(2, 3, 4), _ints(3, 2, -2))),
        Example("Slice", ((2, 3, 8),), {"starts": [0, -3, 1], "ends": [1, 2147483647, -1]}, opset=7),
        Example("Slice", ((1, 2, 9), _ints(-100), _ints(-200), _ints(2), _ints(-1))),
        Example("Slice", ((1, 2, 9), _ints(5), _ints(-5), _ints(2), _ints(-4)), dtype=ir.DataType.INT64),
    )

    @classmethod
    def read(cls, view: NodeView) -> Self:
        data = view.input(0)
        starts, ends = listed_integers(view, "starts", 1), listed_integers(view, "ends", 2)
        if starts is None or ends is None:
            raise Unsupported("starts or ends are missing; correct the file")
        axes = listed_integers(view, "axes", 3) or tuple(range(len(starts)))
        steps = listed_integers(view, "steps", 4) or (1,) * len(starts)
        maps: list[AxisMap] = [identity(n) for n in data.shape]
        if not len(starts) == len(ends) == len(axes) == len(steps):
            raise Unsupported("starts, ends, axes and steps differ in length; correct the file")
        for start, end, given, step in zip(starts, ends, axes, steps, strict=True):
            axis = checked_axis(given, data.rank)
            n = data.shape[axis]
            if step == 0:
                raise Unsupported("a step of 0; correct the file")
            first = 0 if step < 0 and start < -n else start  # clamped, where Python's slices are empty
            cells = range(n)[slice(first, None if step < 0 and end < -n else end, step)]
            if step == 1:
                maps[axis] = Shift(n, len(cells), cells.start)
            else:
                maps[axis] = Taps(n, len(cells), tuple((c,) for c in cells))
        if any(m.n_out == 0 for m in maps):
            raise NothingLeft(f"it leaves nothing of extents {list(data.shape)}; use a larger volume")
        return cls(view.inputs, (TensorType(tuple(m.n_out for m in maps), data.dtype),), tuple(maps), 0.0)


@register
@dataclass(frozen=True)
class Pad(Move):
    """Cells added around a tensor: constant, reflected, repeated or wrapped; negative amounts crop.

    Source: ONNX Pad (2, 11, 13, 18, 19).
    """

    op_types: ClassVar[tuple[str, ...]] = ("Pad",)
    examples: ClassVar[tuple[Example, ...]] = (
        Example("Pad", ((1, 2, 7, 5), np.array([0, 0, 1, 2, 0, 0, 3, 0], np.int64), np.float32(0.5))),
        Example("Pad", ((1, 2, 11), np.array([0, 0, 3, 0, 0, 2], np.int64)), {"mode": "reflect"}),
        Example("Pad", ((1, 2, 11), np.array([0, 0, 3, 0, 0, 2], np.int64)), {"mode": "edge"}),
        Example("Pad", ((1, 2, 11), np.array([0, 0, 3, 0, 0, 2], np.int64)), {"mode": "wrap"}, opset=19),
        Example("Pad", ((1, 2, 11), np.array([0, 0, -3, 0, 0, 2], np.int64))),
        Example("Pad", ((1, 2, 9),), {"pads": [0, 0, 1, 0, 0, 2], "mode": "constant", "value": 1.5}, opset=10),
        Example("Pad", ((1, 2, 9, 4),), {"pads": [0, 0, 2, 1, 0, 0, 0, 3], "mode": "reflect"}, opset=7),
        Example("Pad", ((2, 1, 5, 4), _ints(1, 0, -2, 3, 0, 0, 1, -1), np.float32(-2.5)), opset=11),
        Example("Pad", ((1, 2, 5, 4), _ints(0, 0, -1, 3, 0, 0, 2, -2)), {"mode": "edge"}, opset=13),
        Example("Pad", ((1, 2, 6, 7), _ints(-2, 2, 3, -1), None, _ints(2, -1)), {"mode": "reflect"}),
        Example("Pad", ((1, 2, 6, 7), _ints(4, 1), np.float32(0.25), _ints(3)), opset=18),
        Example("Pad", ((1, 1, 3, 4, 5), _ints(0, 0, 1, 2, 3, 0, 0, 2, 0, 4)), {"mode": "edge"}, opset=19),
        Example("Pad", ((1, 1, 3, 4, 5), _ints(2, 1, 4, 0, 3, 2), None, _ints(2, 3, 4)), {"mode": "reflect"}, opset=21),
        Example("Pad", ((1, 1, 3, 4, 5), _ints(2, 1, 4, 0, 3, 5), None, _ints(2, 3, 4)), {"mode": "wrap"}, opset=21),
        Example("Pad", ((1, 2, 5), _ints(0, 0, 4, 0, 0, 4)), {"mode": "reflect"}, opset=13),
        Example("Pad", ((2, 2, 5), _ints(0, 0, 2, 0, 0, 1), np.int32(7)), opset=13, dtype=ir.DataType.INT32),
    )

    @classmethod
    def read(cls, view: NodeView) -> Self:
        data, mode = view.input(0), view.text("mode", "constant")
        pads = listed_integers(view, "pads", 1)
        chosen = None if view.version < 18 else listed_integers(view, "axes", 3)
        axes = chosen or tuple(range(data.rank))
        if pads is None or len(pads) != 2 * len(axes):
            raise Unsupported("pads do not fit its input; correct the file")
        if mode not in ("constant", "reflect", "edge", "wrap"):
            raise Unsupported(f"mode '{mode}' is unknown; correct the file")
        maps: list[AxisMap] = [identity(n) for n in data.shape]
        for i, axis in enumerate(axes):
            maps[axis] = _pad_map(mode, data.shape[axis], pads[i], pads[len(axes) + i])
        if any(m.n_out < 1 for m in maps):
            raise WrongExtents(f"it leaves nothing of extents {list(data.shape)}; use a larger volume")
        value = view.attributes.get("value") if view.version < 11 else view.constant(2, "padding value")
        fill = 0.0 if value is None or np.size(value) == 0 else float(np.asarray(value).reshape(-1)[0])
        return cls(view.inputs, (TensorType(tuple(m.n_out for m in maps), data.dtype),), tuple(maps), fill)


def _pad_map(mode: str, n: int, lo: int, hi: int) -> AxisMap:
    out = max(0, n + lo + hi)
    if mode == "constant" or (lo <= 0 and hi <= 0):
        return Shift(n, out, -lo)
    rest = np.arange(max(0, -lo), n - max(0, -hi))  # negative amounts crop first, as onnxruntime does
    most = {"reflect": len(rest) - 1, "wrap": len(rest)}.get(mode, max(lo, hi))
    if max(lo, hi) > most or not len(rest):
        raise WrongExtents(f"{mode} padding of {max(lo, hi)} cells on an axis of {len(rest)}; use a larger volume")
    cells = np.pad(rest, (max(lo, 0), max(hi, 0)), mode=mode)  # pyright: ignore
    return Taps(n, out, tuple((int(c),) for c in cells))
