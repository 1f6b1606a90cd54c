"""Operators that give the same elements another shape: reshapes and transposition."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from partitioner.geometry import Box
from partitioner.maps import AxisMap, Flat, identity
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
    WrongExtents,
    listed_integers,
    whole,
)
from partitioner.ops.registry import register

if TYPE_CHECKING:
    import torch

    from partitioner.ops.emitter import Emitter


@register
@dataclass(frozen=True)
class Reshape(Operator):
    """The same elements in other extents; shards follow the leading axes of what is merged or split.

    (N, C*r*r, H, W) -> (N, C, r, r, H, W) and (N, C, H, r, W, r) -> (N, C, H*r, W*r), window partitions,
    flattened space: all are runs of flat cells.
    Source: ONNX Reshape (5 to 25), Flatten (1 to 25), Squeeze and Unsqueeze (1, 11, 13, 21 to 25).
    """

    op_types: ClassVar[tuple[str, ...]] = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")
    examples: ClassVar[tuple[Example, ...]] = (
        Example("Reshape", ((2, 3, 4, 5), np.array([0, -1, 5], np.int64))),
        Example("Flatten", ((2, 3, 4, 5),)),
        Example("Squeeze", ((2, 1, 7, 1), np.array([1, -1], np.int64))),
        Example("Squeeze", ((5, 3, 1, 1), np.array([2], np.int64))),
        Example("Unsqueeze", ((2, 7), np.array([0, 3], np.int64))),
        Example("Squeeze", ((2, 1, 7),), {"axes": [1]}, opset=11),
        Example("Squeeze", ((2, 1, 7, 1),), opset=11),
        Example("Unsqueeze", ((2, 3, 7),), {"axes": [0, -1]}, opset=11),
        Example("Reshape", ((2, 3, 5, 2, 4), np.array([2, 3, 10, 4], np.int64))),
        Example("Reshape", ((2, 3, 10, 4), np.array([2, 3, 5, 2, 4], np.int64))),
        Example("Reshape", ((1, 2, 6, 4), np.array([1, 2, 8, 3], np.int64))),
        Example("Reshape", ((2, 3, 5, 7), np.array([2, 3, -1], np.int64))),
        Example("Reshape", ((2, 3, 35), np.array([2, 3, 7, 5], np.int64))),
        Example("Reshape", ((2, 1, 7, 5), np.array([0, 0, 1, 7, 1, 5, 1], np.int64))),
        Example("Reshape", ((1, 3, 7, 5, 2), np.array([3, 70], np.int64))),
        Example("Reshape", ((1, 1, 7), np.array([7], np.int64))),
    )

    groups: tuple[Group, ...]

    @classmethod
    def read(cls, view: NodeView) -> Self:
        data = view.input(0)
        target = _TARGETS[view.op_type](view, data.shape)
        if math.prod(target) != math.prod(data.shape):
            raise WrongExtents(f"extents {list(data.shape)} do not become {list(target)}; the network cannot take "
                              "this volume's extents")
        squeezes = view.op_type in ("Squeeze", "Unsqueeze") and 0 not in data.shape
        groups = _pairs(view, data.shape, target) if squeezes else find_groups(data.shape, target)
        return cls(view.inputs, (TensorType(target, data.dtype),), groups)

    def needs(self, output: int = 0) -> Needs:
        data = self.inputs[0]
        assert data is not None
        needs = list(whole(data.shape))
        for group in self.groups:
            if group.source is not None and group.target is not None:
                needs[group.source] = Need(group.target, group.map)
        return (tuple(needs), *(None for _ in self.inputs[1:]))

    def backward(self, ins: Sequence[float], outs: Sequence[float]) -> Backward:
        """With channels last, the cells of images and volumes are copied into order."""
        source = self.inputs[0]
        assert source is not None
        shares = source.rank not in (4, 5) or source.shape[1] == 1
        return Backward(shares=shares, hands_on=shares)

    def run(self, call: Call) -> tuple[torch.Tensor, ...]:
        held, out = call.box(0), call.outs[0]
        result = call.tensor(0).contiguous().reshape([g.held(held) for g in self.groups])
        for axis, group in enumerate(self.groups):
            start, stop = group.wanted(held, out)
            if (start, stop) != (0, result.shape[axis]):
                result = result.narrow(axis, start, stop - start)
        return (result.reshape(out.shape),)

    def emit(self, emitter: Emitter, names: Sequence[str | None], boxes: Sequence[Box | None],
             outs: Sequence[Box]) -> tuple[str, ...]:
        name, held, out = names[0], boxes[0], outs[0]
        assert name is not None and held is not None
        spans = {axis: group.wanted(held, out) for axis, group in enumerate(self.groups)
                 if group.wanted(held, out) != (0, group.held(held))}
        if spans:
            name = emitter.crop(emitter.reshape(name, [g.held(held) for g in self.groups]), spans)
        return (emitter.reshape(name, out.shape),)

    def flops(self, out: float) -> float:
        return 0.0


@dataclass(frozen=True)
class Group:
    """Consecutive axes of the input and of the output that hold the same cells in the same order.

    Only the leading axis of each side (the first that has more than one cell) can be cut: the cells of a
    shard are then a run of the flattened group.

    Args:
        ins, outs: the axes; maybe none on one side, where all extents are 1.
        source, target: the leading axis of either side, None where no axis has more than one cell.
        map: from the target's cells to the source's.
        inner_in, inner_out: cells per cell of the leading axes.
    """

    ins: tuple[int, ...]
    outs: tuple[int, ...]
    source: int | None
    target: int | None
    map: AxisMap
    inner_in: int
    inner_out: int

    def held(self, box: Box) -> int:
        """Flat cells of the group in an input box."""
        return math.prod(box.shape[a] for a in self.ins)

    def wanted(self, held: Box, out: Box) -> tuple[int, int]:
        """First and last flat cell of the output, counted from the first held one."""
        if self.source is None or self.target is None:
            return 0, math.prod(out.shape[a] for a in self.outs)
        first = held.intervals()[self.source].start * self.inner_in
        wanted = out.intervals()[self.target]
        return wanted.start * self.inner_out - first, wanted.stop * self.inner_out - first


def find_groups(shape: tuple[int, ...], target: tuple[int, ...]) -> tuple[Group, ...]:
    """The groups of a reshape, as few axes in each as possible."""
    return tuple(_group(shape, target, ins, outs) for ins, outs in _runs(shape, target))


def _group(shape: tuple[int, ...], target: tuple[int, ...], ins: Sequence[int], outs: Sequence[int]) -> Group:
    large_in, large_out = [a for a in ins if shape[a] != 1], [a for a in outs if target[a] != 1]
    if not large_in and len(ins) == len(outs) == 1:  # an axis of one cell may be cut too, if one shard has it
        return Group(tuple(ins), tuple(outs), ins[0], outs[0], identity(1), 1, 1)
    if not large_in or not large_out:
        return Group(tuple(ins), tuple(outs), None, None, identity(1), 1, 1)
    source, goal = large_in[0], large_out[0]
    inner_in = math.prod(shape[a] for a in large_in[1:])
    inner_out = math.prod(target[a] for a in large_out[1:])
    same = len(large_in) == len(large_out) == 1
    axis_map = identity(shape[source]) if same else Flat(shape[source], target[goal], inner_in, inner_out)
    return Group(tuple(ins), tuple(outs), source, goal, axis_map, inner_in, inner_out)


def _reshape_target(view: NodeView, shape: tuple[int, ...]) -> tuple[int, ...]:
    given = listed_integers(view, "shape", 1)
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


def _squeezed_axes(view: NodeView, shape: tuple[int, ...]) -> set[int]:
    given = listed_integers(view, "axes", 1)
    return {a % len(shape) for a in given} if given is not None else {a for a, n in enumerate(shape) if n == 1}


def _squeeze_target(view: NodeView, shape: tuple[int, ...]) -> tuple[int, ...]:
    axes = _squeezed_axes(view, shape)
    if any(shape[a] != 1 for a in axes):
        raise Unsupported(f"it squeezes axes {sorted(axes)} of extents {list(shape)}; correct the file")
    return tuple(n for a, n in enumerate(shape) if a not in axes)


def _new_axes(view: NodeView, shape: tuple[int, ...]) -> set[int]:
    given = listed_integers(view, "axes", 1) or ()
    return {a % (len(shape) + len(given)) for a in given}


def _unsqueeze_target(view: NodeView, shape: tuple[int, ...]) -> tuple[int, ...]:
    axes, rest = _new_axes(view, shape), iter(shape)
    return tuple(1 if a in axes else next(rest) for a in range(len(shape) + len(axes)))


def _pairs(view: NodeView, shape: tuple[int, ...], target: tuple[int, ...]) -> tuple[Group, ...]:
    """The axes that stay, each for itself, whatever other axes have one cell; and those that go or come."""
    squeezes = view.op_type == "Squeeze"
    alone = _squeezed_axes(view, shape) if squeezes else _new_axes(view, shape)
    longer = shape if squeezes else target
    found: list[Group] = []
    stays = 0
    for axis, n in enumerate(longer):
        if axis in alone:
            ins, outs = ((axis,), ()) if squeezes else ((), (axis,))
            found.append(Group(ins, outs, None, None, identity(1), 1, 1))
            continue
        source, goal = (axis, stays) if squeezes else (stays, axis)
        found.append(Group((source,), (goal,), source, goal, identity(n), 1, 1))
        stays += 1
    return tuple(found)


_TARGETS: dict[str, Any] = {
    "Reshape": _reshape_target, "Flatten": _flatten_target,
    "Squeeze": _squeeze_target, "Unsqueeze": _unsqueeze_target,
}


def _runs(shape: tuple[int, ...], target: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Consecutive axes of both sides with equal products; axes of one cell at the end join the last run."""
    runs: list[tuple[list[int], list[int]]] = []
    left, right = list(range(len(shape))), list(range(len(target)))
    if 0 in shape:
        return [(left, right)]
    while left and right:
        ins, outs = [left.pop(0)], [right.pop(0)]
        a, b = shape[ins[0]], target[outs[0]]
        while a != b:
            if a < b:
                ins.append(left.pop(0))
                a *= shape[ins[-1]]
            else:
                outs.append(right.pop(0))
                b *= target[outs[-1]]
        runs.append((ins, outs))
    if not runs:
        return [(left, right)]
    runs[-1][0].extend(left)
    runs[-1][1].extend(right)
    return runs


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

