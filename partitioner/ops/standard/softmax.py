"""Softmax over axes: relative to the maximum, by a sum of powers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import onnx_ir as ir

from partitioner.maps import identity
from partitioner.ops.base import (
    Backward,
    Call,
    Decomposer,
    Example,
    Need,
    Needs,
    NodeView,
    Operator,
    Reduction,
    Unsupported,
    statistics,
)
from partitioner.ops.kernels.decomposing import cast, wide_type
from partitioner.ops.registry import register

if TYPE_CHECKING:
    import torch
else:
    from partitioner.lazy import torch


def read_axes(view: NodeView) -> tuple[int, ...]:
    """The axes over which Softmax, LogSoftmax and Hardmax go: before opset 13 all from `axis` on.

    Raises:
        Unsupported: when there is no such axis.
    """
    rank, axis = view.input(0).rank, view.int("axis", -1 if view.version >= 13 else 1)
    if not -rank <= axis < rank:
        raise Unsupported(f"axis {axis} on a tensor of {rank} axes; correct the file")
    axis %= rank
    return (axis,) if view.version >= 13 else tuple(range(axis, rank))


@register
@dataclass(frozen=True)
class Softmax(Operator):
    """Softmax and LogSoftmax; before opset 13 over all axes from `axis` on.

    Source: ONNX Softmax, LogSoftmax (1, 11, 13).
    """

    op_types: ClassVar[tuple[str, ...]] = ("Softmax", "LogSoftmax")
    examples: ClassVar[tuple[Example, ...]] = (
        Example("Softmax", ((2, 3, 7, 5),), {"axis": 1}),
        Example("Softmax", ((2, 3, 7, 5),), {"axis": 2}),
        Example("Softmax", ((2, 3, 7),), opset=11),
        Example("LogSoftmax", ((2, 3, 7),), {"axis": -1}),
    )

    axes: tuple[int, ...]
    logarithm: bool

    @classmethod
    def read(cls, view: NodeView) -> Self:
        data = view.input(0)
        return cls(view.inputs, (data,), read_axes(view), view.op_type == "LogSoftmax")

    def needs(self, output: int = 0) -> Needs:
        shape = self.outputs[0].shape
        return (tuple(statistics(a, n) if a in self.axes else Need(a, identity(n)) for a, n in enumerate(shape)),)

    @property
    def reduction(self) -> Reduction:
        return Reduction(self.axes)

    def decompose(self, write: Decomposer, inputs: Sequence[ir.Value | None]) -> ir.Value:
        assert inputs[0] is not None
        dtype = self.outputs[0].dtype
        x = cast(write, inputs[0], wide_type(dtype))
        (highest,) = write.all_reduce("max", [write.reduce("ReduceMax", x, self.axes, True)])
        (shifted,) = write.op("Sub", [x, highest])
        (powers,) = write.op("Exp", [shifted])
        (total,) = write.all_reduce("sum", [write.reduce("ReduceSum", powers, self.axes, True)])
        if not self.logarithm:
            return cast(write, write.op("Div", [powers, total])[0], dtype)
        return cast(write, write.op("Sub", [shifted, write.op("Log", [total])[0]])[0], dtype)

    def backward(self, ins: Sequence[float], outs: Sequence[float]) -> Backward:
        return Backward(outputs=(0,))

    def run(self, call: Call) -> tuple[torch.Tensor, ...]:
        x = call.tensor(0)
        if len(self.axes) == 1:
            axis = self.axes[0]
            return (torch.log_softmax(x, axis) if self.logarithm else torch.softmax(x, axis),)
        flat = x.flatten(self.axes[0])
        result = torch.log_softmax(flat, -1) if self.logarithm else torch.softmax(flat, -1)
        return (result.reshape(x.shape),)

    def flops(self, out: float) -> float:
        return 5 * out
