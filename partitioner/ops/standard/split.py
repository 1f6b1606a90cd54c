"""One tensor into several along an axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
import onnx_ir as ir

from partitioner.geometry import Box
from partitioner.maps import Shift, identity
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
from partitioner.ops.standard.shape import checked_axis

if TYPE_CHECKING:
    import torch

    from partitioner.ops.emitter import Emitter


@register
@dataclass(frozen=True)
class Split(Operator):
    """Parts of a tensor along an axis: each is the tensor moved to its own start.

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
        own = tuple(Need(a, Shift(n, out[a], self.starts[output]) if a == self.axis else identity(n))
                    for a, n in enumerate(data.shape))
        return (own, *(None for _ in self.inputs[1:]))

    def run(self, call: Call) -> tuple[torch.Tensor, ...]:
        x, held = call.tensor(0), call.box(0)
        return tuple(self._part(x, held, i, out) for i, out in enumerate(call.outs))

    def _part(self, x: torch.Tensor, held: Box, index: int, out: Box) -> torch.Tensor:
        if not out:
            return x.new_empty(out.shape)
        start, stop = self._cells(held, index, out)
        return x.narrow(self.axis, start, stop - start).clone()

    def _cells(self, held: Box, index: int, out: Box) -> tuple[int, int]:
        """Where a part's cells lie among those held, which may come in pieces."""
        wanted = Shift(self._extent, self.outputs[index].shape[self.axis], self.starts[index])
        (cells,) = wanted.needed_by(out.axes[self.axis])
        before = sum(min(i.stop, cells.start) - i.start for i in held.axes[self.axis] if i.start < cells.start)
        return before, before + len(cells)

    @property
    def _extent(self) -> int:
        return sum(output.shape[self.axis] for output in self.outputs)

    def emit(self, emitter: Emitter, names: Sequence[str | None], boxes: Sequence[Box | None],
             outs: Sequence[Box]) -> tuple[str, ...]:
        name, held = names[0], boxes[0]
        assert name is not None and held is not None
        return tuple(emitter.crop(name, {self.axis: self._cells(held, i, out)}) if out else ""
                     for i, out in enumerate(outs))

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
