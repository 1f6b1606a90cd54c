"""Operators that give the same elements another shape: reshapes and transposition."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from partitioner.geometry import Box
from partitioner.maps import identity
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

if TYPE_CHECKING:
    import torch

    from partitioner.ops.emitter import Emitter


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


def _squeeze_target(view: NodeView, shape: tuple[int, ...]) -> tuple[int, ...]:
    given = listed_integers(view, "axes", 1)
    axes = {a % len(shape) for a in given} if given is not None else {a for a, n in enumerate(shape) if n == 1}
    if any(shape[a] != 1 for a in axes):
        raise Unsupported(f"it squeezes axes {sorted(axes)} of extents {list(shape)}; correct the file")
    return tuple(n for a, n in enumerate(shape) if a not in axes)


def _unsqueeze_target(view: NodeView, shape: tuple[int, ...]) -> tuple[int, ...]:
    given = listed_integers(view, "axes", 1) or ()
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

