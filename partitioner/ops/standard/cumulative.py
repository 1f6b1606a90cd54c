"""Running sums and products: an output cell needs all input cells before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
import onnx_ir as ir

from partitioner.geometry import Box
from partitioner.maps import Prefix, Suffix, identity
from partitioner.ops.base import Backward, Call, Example, Need, Needs, NodeView, Operator, Unsupported
from partitioner.ops.registry import register

if TYPE_CHECKING:
    import torch

    from partitioner.ops.emitter import Emitter
else:
    from partitioner.lazy import torch


def _along(axis: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    return np.array(axis, np.int64)


@register
@dataclass(frozen=True)
class Cumulative(Operator):
    """Sums or products of the cells up to each cell of an axis; `exclusive` without it, `reverse` from the end.

    Every shard starts at the axis' own beginning, so that the additions have the same order everywhere.

    Source: ONNX CumSum (11, 14), CumProd (26).
    """

    op_types: ClassVar[tuple[str, ...]] = ("CumSum", "CumProd")
    examples: ClassVar[tuple[Example, ...]] = (
        Example("CumSum", ((2, 3, 7, 5), _along(2)), opset=14),
        Example("CumSum", ((2, 3, 7, 5), _along(-1)), {"exclusive": 1}, opset=11),
        Example("CumSum", ((2, 3, 11), np.array([2], np.int32)), {"reverse": 1}, opset=14),
        Example("CumSum", ((1, 2, 5, 3, 7), _along(2)), {"reverse": 1, "exclusive": 1}, opset=14),
        Example("CumSum", ((3, 2, 7), _along(0)), opset=14, dtype=ir.DataType.INT32),
        Example("CumSum", ((3, 2, 7), _along(1)), opset=11, dtype=ir.DataType.INT64),
        Example("CumProd", ((2, 3, 7, 5), _along(2)), opset=26),
        Example("CumProd", ((2, 3, 11), _along(2)), {"reverse": 1, "exclusive": 1}, opset=26),
        Example("CumProd", ((2, 3, 11), _along(-1)), {"exclusive": 1}, opset=26),
    )

    axis: int
    exclusive: bool
    reverse: bool
    multiplies: bool

    @classmethod
    def read(cls, view: NodeView) -> Self:
        data, given = view.input(0), view.constant(1, "axis")
        if given is None or given.size != 1 or not -data.rank <= int(given.reshape(-1)[0]) < data.rank:
            raise Unsupported(f"axis {given} on a tensor of {data.rank} axes; correct the file")
        return cls(view.inputs, (data,), int(given.reshape(-1)[0]) % data.rank, bool(view.int("exclusive", 0)),
                   bool(view.int("reverse", 0)), view.op_type == "CumProd")

    def needs(self, output: int = 0) -> Needs:
        shape = self.outputs[0].shape
        along = (Suffix if self.reverse else Prefix)(shape[self.axis], shape[self.axis])
        return (tuple(Need(a, along if a == self.axis else identity(n)) for a, n in enumerate(shape)), None)

    def backward(self, ins: Sequence[float], outs: Sequence[float]) -> Backward:
        """A product keeps what it multiplies and its result, turned round or shifted where its own is."""
        if not self.multiplies:
            return Backward()
        word = self.outputs[0].itemsize
        if self.reverse:
            return Backward(beside=2 * word * ins[0])
        if self.exclusive:
            return Backward(inputs=(0,), beside=word * ins[0])
        return Backward(inputs=(0,), outputs=(0,))

    def run(self, call: Call) -> tuple[torch.Tensor, ...]:
        x = call.tensor(0)
        x = x.flip(self.axis) if self.reverse else x
        result = (torch.cumprod if self.multiplies else torch.cumsum)(x, self.axis, dtype=x.dtype)
        if self.exclusive:
            first = torch.full_like(x.narrow(self.axis, 0, 1), 1 if self.multiplies else 0)
            result = torch.cat([first, result.narrow(self.axis, 0, x.shape[self.axis] - 1)], self.axis)
        result = result.flip(self.axis) if self.reverse else result
        start, stop = self._place(call.box(0), call.outs[0])
        return (result.narrow(self.axis, start, stop - start),)

    def _place(self, box: Box, out: Box) -> tuple[int, int]:
        """Where the wanted cells lie among those held."""
        held, wanted = box.intervals()[self.axis], out.intervals()[self.axis]
        return wanted.start - held.start, wanted.stop - held.start

    def emit(self, emitter: Emitter, names: Sequence[str | None], boxes: Sequence[Box | None],
             outs: Sequence[Box]) -> tuple[str, ...]:
        assert boxes[0] is not None
        (result,) = emitter.same(names, 1)
        place, held = self._place(boxes[0], outs[0]), boxes[0].shape[self.axis]
        return (emitter.crop(result, {} if place == (0, held) else {self.axis: place}),)
