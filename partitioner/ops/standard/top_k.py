"""The largest or smallest cells along an axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
import onnx_ir as ir

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
    WrongExtents,
    whole,
)
from partitioner.ops.registry import register

if TYPE_CHECKING:
    import torch
else:
    from partitioner.lazy import torch


def _k(count: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    return np.array([count], np.int64)


@register
@dataclass(frozen=True)
class TopK(Operator):
    """The k largest or smallest cells along an axis, best first, and their indices; of equal ones the first.

    The axis is needed whole.  With sorted=0 the order is free: it is the same as with sorted=1.

    Source: ONNX TopK (1, 10, 11, 24), k a constant.
    """

    op_types: ClassVar[tuple[str, ...]] = ("TopK",)
    examples: ClassVar[tuple[Example, ...]] = (
        Example("TopK", ((2, 5, 7, 3), _k(2)), {"axis": 1}, opset=11, outputs=2, checked=2),
        Example("TopK", ((2, 3, 7, 5), _k(3)), {"axis": 2, "largest": 0}, opset=13, outputs=2, checked=2),
        Example("TopK", ((2, 3, 11), _k(4)), opset=11, outputs=2, checked=2, dtype=ir.DataType.INT64),
        Example("TopK", ((2, 3, 11), _k(5)), {"largest": 0}, opset=11, outputs=2, checked=2,
                dtype=ir.DataType.INT32),
        Example("TopK", ((2, 3, 7),), {"axis": -2, "k": 2}, opset=9, outputs=2, checked=2),
        Example("TopK", ((3, 3, 7), _k(2)), {"axis": 0}, opset=10, outputs=2, checked=2),
        Example("TopK", ((2, 2, 5, 3, 7), _k(1)), {"axis": 4, "sorted": 0}, opset=11, outputs=2, checked=2),
        Example("TopK", ((2, 4, 7), _k(2)), {"axis": 1}, opset=24, outputs=2),
    )

    axis: int
    largest: bool

    @classmethod
    def read(cls, view: NodeView) -> Self:
        data, axis = view.input(0), view.int("axis", -1)
        given = view.constant(1, "k") if view.version >= 10 else view.int("k", 0)
        if given is None or not -data.rank <= axis < data.rank:
            raise Unsupported(f"axis {axis} of {data.rank}, k {given}; correct the file")
        k, axis = int(np.asarray(given).reshape(-1)[0]), axis % data.rank
        if not 0 < k <= data.shape[axis]:
            raise WrongExtents(f"k is {k} on an axis of {data.shape[axis]} cells; use a larger volume")
        shape = tuple(k if a == axis else n for a, n in enumerate(data.shape))
        outputs = (TensorType(shape, data.dtype), TensorType(shape, ir.DataType.INT64))
        return cls(view.inputs, outputs, axis, bool(view.int("largest", 1)))

    def needs(self, output: int = 0) -> Needs:
        data = self.inputs[0]
        assert data is not None
        own = tuple(whole(data.shape)[a] if a == self.axis else Need(a, identity(n)) for a, n in enumerate(data.shape))
        return (own, *(None for _ in self.inputs[1:]))

    def backward(self, ins: Sequence[float], outs: Sequence[float]) -> Backward:
        """The order of all cells."""
        return Backward(beside=8 * ins[0])

    def run(self, call: Call) -> tuple[torch.Tensor, ...]:
        x, k = call.tensor(0), self.outputs[0].shape[self.axis]
        values, indices = torch.sort(x, dim=self.axis, descending=self.largest, stable=True)
        return tuple(t.narrow(self.axis, 0, k).clone() for t in (values, indices))

    def workspace(self, ins: Sequence[float], outs: Sequence[float]) -> float:
        return ins[0] * (self.outputs[0].itemsize + 8)
