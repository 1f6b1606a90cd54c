"""A convolution that reads the parts of a concatenation where they lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from partitioner.dialect import CONCAT_CONV, DOMAIN
from partitioner.geometry import Box
from partitioner.ops.base import Call, Example, Needs, NodeView, Unsupported
from partitioner.ops.registry import register
from partitioner.ops.standard.conv import Conv, Direct

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as functional

    from partitioner.ops.emitter import Emitter
else:
    from partitioner.lazy import functional


@register
@dataclass(frozen=True)
class ConcatConv(Conv):
    """Conv(Concat(x, x2; channels), Concat(w, w2)) of inputs (x, w, bias, x2, w2): one convolution added to the other.

    Nothing is concatenated.  Plans for training keep the concatenation.
    Source: put in by read-parts.
    """

    op_types: ClassVar[tuple[str, ...]] = (CONCAT_CONV,)
    domain: ClassVar[str] = DOMAIN
    examples: ClassVar[tuple[Example, ...]] = ()

    @classmethod
    def read(cls, view: NodeView) -> Self:
        found = super().read(view)
        data, other, weight = view.input(0), view.input(3), view.input(4)
        if other.shape != (data.shape[0], weight.shape[1], *data.shape[2:]):
            raise Unsupported(f"parts of {list(data.shape)} and {list(other.shape)}; correct the file")
        return found

    def needs(self, output: int = 0) -> Needs:
        return (*self._part((0, 1, 2)).needs(output), *self._part((3, 4)).needs(output))

    @property
    def channels_read(self) -> int:
        return sum(t.shape[1] for t in (self.inputs[1], self.inputs[4]) if t is not None)

    def direct(self, call: Call) -> Direct | None:
        first = self._part((0, 1, 2)).kernel(_only(call, (0, 1, 2)))
        second = self._part((3, 4), self.slope).kernel(_only(call, (3, 4)), adds=True)
        return None if first is None or second is None else Direct(first, then=Direct(second, (3, 4)))

    def by_torch(self, call: Call) -> torch.Tensor:
        result, more = (self._part(part).by_torch(_only(call, part)) for part in ((0, 1, 2), (3, 4)))
        result = result.add_(more)
        return result if self.slope is None else functional.leaky_relu_(result, self.slope)

    def _part(self, numbers: tuple[int, ...], slope: float | None = None) -> Conv:
        """The convolution of one part."""
        return Conv(tuple(self.inputs[n] for n in numbers), self.outputs, self.windows, self.group, slope)

    def emit(self, emitter: Emitter, names: Sequence[str | None], boxes: Sequence[Box | None],
             outs: Sequence[Box]) -> tuple[str, ...]:
        box = boxes[0]
        assert box is not None
        pads = self.local_pads(box, outs[0])
        if names[0] is None or names[3] is None:  # every window lies wholly in the padding
            extents = [n + lo + hi for n, (lo, hi) in zip(box.shape[2:], pads, strict=True)]
            data = emitter.zeros([box.shape[0], self.channels_read, *extents], self.outputs[0].dtype)
            pads = [(0, 0)] * len(pads)
        else:
            data = emitter.op("Concat", [names[0], names[3]], {"axis": 1})
        weight = emitter.op("Concat", [names[1], names[4]], {"axis": 1})
        return (emitter.op("Conv", [data, weight, names[2]], {
            "strides": [w.stride for w in self.windows], "dilations": [w.dilation for w in self.windows],
            "pads": [pair[side] for side in (0, 1) for pair in pads]}),)


def _only(call: Call, numbers: tuple[int, ...]) -> Call:
    return Call(tuple(call.tensors[n] for n in numbers), tuple(call.boxes[n] for n in numbers), call.outs)
