"""One tensor into several along an axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
import onnx_ir as ir

from partitioner.geometry import Box
from partitioner.maps import Whole, identity
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
)
from partitioner.ops.registry import register
from partitioner.ops.shape import checked_axis

if TYPE_CHECKING:
    import torch

    from partitioner.ops.emitter import Emitter


@register
@dataclass(frozen=True)
class Split(Operator):
    """Parts of a tensor along an axis, which is gathered first; the other axes stay as they are cut.

    Source: ONNX Split (2, 11, 13, 18).
    """

    op_types: ClassVar[tuple[str, ...]] = ("Split",)
    examples: ClassVar[tuple[Example, ...]] = (
        Example("Split", ((2, 6, 5, 3),), {"axis": 1}, opset=13, outputs=3, checked=3),
        Example("Split", ((2, 6, 5, 3),), {"axis": 1, "split": [1, 5]}, opset=11, outputs=2, checked=2),
        Example("Split", ((1, 7, 5), np.array([2, 4, 1], np.int64)), {"axis": -2}, opset=13, outputs=3, checked=3),
        Example("Split", ((1, 7, 5, 2),), {"axis": 1, "num_outputs": 3}, outputs=3, checked=3),
        Example("Split", ((1, 2, 7, 5),), {"axis": 2, "num_outputs": 2}, outputs=2, checked=2),
        Example("Split", ((1, 2, 9), np.array([2, 3, 4], np.int64)), {"axis": 2}, outputs=3, checked=3),
        Example("Split", ((4, 2, 3),), {"split": [1, 3]}, opset=9, outputs=2, checked=2),
        Example("Split", ((1, 4, 3, 2, 3),), {"axis": 1, "num_outputs": 2}, outputs=2, checked=1),
        Example("Split", ((1, 4, 7),), {"axis": 1}, opset=7, outputs=2, checked=2, dtype=ir.DataType.FLOAT),
    )

    axis: int
    starts: tuple[int, ...]

    @classmethod
    def read(cls, view: NodeView) -> Self:
        data, count = view.input(0), len(view.used_outputs)
        axis = checked_axis(view.int("axis", 0), data.rank)
        sizes = listed_integers(view, "split", 1) or _equal_parts(view, data.shape[axis], count)
        if len(sizes) != count or sum(sizes) != data.shape[axis] or min(sizes) < 0:
            raise WrongExtents(f"{count} parts of {list(sizes)} cells do not make an axis of {data.shape[axis]}; "
                               "the network cannot take this volume's extents")
        outputs = tuple(TensorType((*data.shape[:axis], n, *data.shape[axis + 1 :]), data.dtype) for n in sizes)
        return cls(view.inputs, outputs, axis, tuple(sum(sizes[:i]) for i in range(count)))

    def needs(self, output: int = 0) -> Needs:
        data, out = self.inputs[0], self.outputs[output].shape
        assert data is not None
        own = tuple(Need(None, Whole(n, out[a])) if a == self.axis else Need(a, identity(n))
                    for a, n in enumerate(data.shape))
        return (own, *(None for _ in self.inputs[1:]))

    def run(self, call: Call) -> tuple[torch.Tensor, ...]:
        parts = zip(self.starts, call.outs, strict=True)
        return tuple(call.tensor(0).narrow(self.axis, start, out.shape[self.axis]).clone() for start, out in parts)

    def emit(self, emitter: Emitter, names: Sequence[str | None], boxes: Sequence[Box | None],
             outs: Sequence[Box]) -> tuple[str, ...]:
        return emitter.same(names, len(outs))

    def flops(self, out: float) -> float:
        return 0.0


def _equal_parts(view: NodeView, extent: int, count: int) -> tuple[int, ...]:
    """Parts of equal size; from opset 18 on the last may be smaller."""
    if view.version >= 18:
        if view.int("num_outputs", count) != count:
            raise Unsupported(f"num_outputs is not {count}, the number of its outputs; correct the file")
        size = -(-extent // count)
        return (*(size for _ in range(count - 1)), extent - size * (count - 1))
    if extent % count:
        raise WrongExtents(f"an axis of {extent} cells does not split into {count} equal parts; the network cannot "
                           "take this volume's extents")
    return (extent // count,) * count
