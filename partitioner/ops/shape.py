"""Operators that move cells without computing: concatenation, slices, padding, reshapes, transposition."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from partitioner.geometry import Box, Interval, Pieces
from partitioner.maps import AxisMap, Identity, Shift, Taps, identity
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
    whole,
)
from partitioner.ops.registry import register
from partitioner.ops.resize import local_positions

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as functional

    from partitioner.ops.emitter import Emitter
else:
    from partitioner.lazy import functional, torch


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
    )

    axis: int
    starts: tuple[int, ...]

    @classmethod
    def read(cls, view: NodeView) -> Self:
        types = [view.input(i) for i in range(len(view.inputs))]
        rank = types[0].rank
        axis = view.int("axis", 1)
        if not -rank <= axis < rank:
            raise Unsupported(f"axis {axis} on tensors of {rank} axes; correct the file")
        axis %= rank
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

    def run(self, call: Call) -> tuple[torch.Tensor, ...]:
        present = [x for x in call.tensors if x is not None and x.shape[self.axis]]
        if call.into is None:
            return (torch.cat(present, self.axis) if len(present) > 1 else present[0],)
        position = 0
        for x in present:
            call.into.narrow(self.axis, position, x.shape[self.axis]).copy_(x)
            position += x.shape[self.axis]
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


def _list(view: NodeView, name: str, index: int) -> tuple[int, ...] | None:
    """Integers that older opsets keep in an attribute and newer ones in a constant input."""
    given = view.ints(name)
    if given is not None:
        return given
    array = view.constant(index, name)
    return None if array is None else tuple(int(v) for v in array.reshape(-1))


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
    )

    @classmethod
    def read(cls, view: NodeView) -> Self:
        data = view.input(0)
        starts, ends = _list(view, "starts", 1), _list(view, "ends", 2)
        if starts is None or ends is None:
            raise Unsupported("starts or ends are missing; correct the file")
        axes = _list(view, "axes", 3) or tuple(range(len(starts)))
        steps = _list(view, "steps", 4) or (1,) * len(starts)
        maps: list[AxisMap] = [identity(n) for n in data.shape]
        for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
            n = data.shape[axis]
            cells = range(n)[slice(start, None if step < 0 and end < -n else end, step)]
            if step == 1:
                maps[axis] = Shift(n, len(cells), cells.start)
            else:
                maps[axis] = Taps(n, len(cells), tuple((c,) for c in cells))
        if any(m.n_out == 0 for m in maps):
            raise WrongExtents(f"it leaves nothing of extents {list(data.shape)}; use a larger volume")
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
    )

    @classmethod
    def read(cls, view: NodeView) -> Self:
        data, mode = view.input(0), view.text("mode", "constant")
        pads = _list(view, "pads", 1)
        axes = tuple(range(data.rank)) if view.version < 18 else _list(view, "axes", 3) or tuple(range(data.rank))
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


@register
@dataclass(frozen=True)
class Reshape(Operator):
    """The same elements in other extents; axes that keep their extent keep their shards.

    Source: ONNX Reshape (5 to 25), Flatten (1 to 25), Squeeze and Unsqueeze (1, 11, 13, 21 to 25).
    """

    op_types: ClassVar[tuple[str, ...]] = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")
    examples: ClassVar[tuple[Example, ...]] = (
        Example("Reshape", ((2, 3, 4, 5), np.array([0, -1, 5], np.int64))),
        Example("Flatten", ((2, 3, 4, 5),)),
        Example("Squeeze", ((2, 1, 7, 1), np.array([1, -1], np.int64))),
        Example("Unsqueeze", ((2, 7), np.array([0, 3], np.int64))),
        Example("Squeeze", ((2, 1, 7),), {"axes": [1]}, opset=11),
    )

    needs_in: tuple[Need, ...]

    @classmethod
    def read(cls, view: NodeView) -> Self:
        data = view.input(0)
        target = _TARGETS[view.op_type](view, data.shape)
        if math.prod(target) != math.prod(data.shape):
            raise WrongExtents(f"extents {list(data.shape)} do not become {list(target)}; the network cannot take "
                              "this volume's extents")
        return cls(view.inputs, (TensorType(target, data.dtype),), _reshape_needs(data.shape, target))

    def needs(self, output: int = 0) -> Needs:
        return (self.needs_in, *(None for _ in self.inputs[1:]))

    def run(self, call: Call) -> tuple[torch.Tensor, ...]:
        return (call.tensor(0).contiguous().reshape(call.outs[0].shape),)

    def emit(self, emitter: Emitter, names: Sequence[str | None], boxes: Sequence[Box | None],
             outs: Sequence[Box]) -> tuple[str, ...]:
        assert names[0] is not None
        return (emitter.reshape(names[0], outs[0].shape),)

    def flops(self, out: float) -> float:
        return 0.0


def _reshape_target(view: NodeView, shape: tuple[int, ...]) -> tuple[int, ...]:
    given = _list(view, "shape", 1)
    if given is None:
        raise Unsupported("its target shape is missing; correct the file")
    keep_zero = bool(view.int("allowzero", 0))
    target = [shape[i] if n == 0 and not keep_zero and i < len(shape) else n for i, n in enumerate(given)]
    if target.count(-1) == 1:
        known = math.prod(n for n in target if n != -1)
        target[target.index(-1)] = math.prod(shape) // known if known else 0
    return tuple(target)


def _flatten_target(view: NodeView, shape: tuple[int, ...]) -> tuple[int, ...]:
    axis = view.int("axis", 1)
    axis = axis + len(shape) if axis < 0 else axis
    return math.prod(shape[:axis]), math.prod(shape[axis:])


def _squeeze_target(view: NodeView, shape: tuple[int, ...]) -> tuple[int, ...]:
    given = _list(view, "axes", 1)
    axes = {a % len(shape) for a in given} if given is not None else {a for a, n in enumerate(shape) if n == 1}
    if any(shape[a] != 1 for a in axes):
        raise Unsupported(f"it squeezes axes {sorted(axes)} of extents {list(shape)}; correct the file")
    return tuple(n for a, n in enumerate(shape) if a not in axes)


def _unsqueeze_target(view: NodeView, shape: tuple[int, ...]) -> tuple[int, ...]:
    given = _list(view, "axes", 1) or ()
    rank = len(shape) + len(given)
    axes = {a % rank for a in given}
    rest = iter(shape)
    return tuple(1 if a in axes else next(rest) for a in range(rank))


_TARGETS: dict[str, Any] = {
    "Reshape": _reshape_target, "Flatten": _flatten_target,
    "Squeeze": _squeeze_target, "Unsqueeze": _unsqueeze_target,
}


def _reshape_needs(shape: tuple[int, ...], target: tuple[int, ...]) -> tuple[Need, ...]:
    """Axes pair up where the products of the extents before them agree; the others are needed whole."""
    needs = list(whole(shape))
    for ins, outs in _groups(shape, target):
        large_in = [a for a in ins if shape[a] != 1]
        large_out = [a for a in outs if target[a] != 1]
        if len(large_in) == 1 and len(large_out) == 1:
            needs[large_in[0]] = Need(large_out[0], identity(shape[large_in[0]]))
    return tuple(needs)


def _groups(shape: tuple[int, ...], target: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Consecutive axes of both sides with equal products, as few axes per group as possible."""
    groups: list[tuple[list[int], list[int]]] = []
    left, right = list(range(len(shape))), list(range(len(target)))
    while left and right:
        ins, outs = [left.pop(0)], [right.pop(0)]
        a, b = shape[ins[0]], target[outs[0]]
        while a != b and (left or right):
            grow_left = bool(left) and (a < b or not right)
            if grow_left:
                ins.append(left.pop(0))
                a *= shape[ins[-1]]
            else:
                outs.append(right.pop(0))
                b *= target[outs[-1]]
        groups.append((ins, outs))
    return groups


@register
@dataclass(frozen=True)
class Transpose(Operator):
    """Axes in another order; the shards go with them.

    Source: ONNX Transpose (1, 13, 21, 23, 24).
    """

    op_types: ClassVar[tuple[str, ...]] = ("Transpose",)
    examples: ClassVar[tuple[Example, ...]] = (
        Example("Transpose", ((2, 3, 5, 7),), {"perm": [0, 2, 3, 1]}),
        Example("Transpose", ((2, 3, 5),)),
    )

    order: tuple[int, ...]

    @classmethod
    def read(cls, view: NodeView) -> Self:
        data = view.input(0)
        order = view.ints("perm") or tuple(reversed(range(data.rank)))
        if sorted(order) != list(range(data.rank)):
            raise Unsupported(f"perm {list(order)} on {data.rank} axes; correct the file")
        return cls(view.inputs, (TensorType(tuple(data.shape[a] for a in order), data.dtype),), order)

    def needs(self, output: int = 0) -> Needs:
        shape = self.outputs[0].shape
        return (tuple(Need(self.order.index(a), identity(shape[self.order.index(a)])) for a in range(len(shape))),)

    @property
    def is_view(self) -> bool:
        return True

    def run(self, call: Call) -> tuple[torch.Tensor, ...]:
        return (call.tensor(0).permute(self.order),)

    def flops(self, out: float) -> float:
        return 0.0

