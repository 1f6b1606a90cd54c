"""Operators that exchange channels for resolution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from partitioner.geometry import Box
from partitioner.maps import Flat, Whole, identity
from partitioner.ops.base import Call, Example, Need, Needs, NodeView, Operator, TensorType, Unsupported, WrongExtents
from partitioner.ops.registry import register

if TYPE_CHECKING:
    import torch

    from partitioner.ops.emitter import Emitter


def _blocksize(view: NodeView) -> tuple[TensorType, int]:
    data, block = view.input(0), view.int("blocksize", 0)
    if data.rank != 4 or block < 1:
        raise Unsupported(f"blocksize {block} on extents {list(data.shape)}; correct the file")
    return data, block


def _rows_first(view: NodeView) -> bool:
    """Whether the place in a block counts before the channel (DCR), not after it (CRD)."""
    mode = view.text("mode", "DCR")
    if mode not in ("DCR", "CRD"):
        raise Unsupported(f"mode '{mode}' is unknown; correct the file")
    return mode == "DCR"


@register
@dataclass(frozen=True)
class DepthToSpace(Operator):
    """Channels become blocks of cells; outputs [a, b) need inputs [floor(a / block), ceil(b / block)).

    DCR: y[n, c, h*r + i, w*r + j] = x[n, (i*r + j)*C + c, h, w];  CRD: x[n, c*r*r + i*r + j, h, w].
    Source: ONNX DepthToSpace (1, 11, 13).
    """

    op_types: ClassVar[tuple[str, ...]] = ("DepthToSpace",)
    examples: ClassVar[tuple[Example, ...]] = (
        Example("DepthToSpace", ((2, 8, 5, 3),), {"blocksize": 2}, opset=13),
        Example("DepthToSpace", ((1, 8, 5, 3),), {"blocksize": 2, "mode": "CRD"}, opset=13),
        Example("DepthToSpace", ((1, 9, 3, 4),), {"blocksize": 3, "mode": "CRD"}, opset=11),
        Example("DepthToSpace", ((1, 18, 4, 3),), {"blocksize": 3, "mode": "DCR"}, opset=11),
        Example("DepthToSpace", ((2, 4, 1, 7),), {"blocksize": 2}, opset=9),
        Example("DepthToSpace", ((1, 2, 5, 3),), {"blocksize": 1}, opset=13),
    )

    block: int
    rows_first: bool

    @classmethod
    def read(cls, view: NodeView) -> Self:
        data, block = _blocksize(view)
        n, c, h, w = data.shape
        if c % block**2:
            raise Unsupported(f"{c} channels are no multiple of {block**2}; correct the file")
        shape = (n, c // block**2, h * block, w * block)
        return cls(view.inputs, (TensorType(shape, data.dtype),), block, _rows_first(view))

    def needs(self, output: int = 0) -> Needs:
        out = self.outputs[0].shape
        spatial = [Need(a, Flat(out[a] // self.block, out[a], self.block, 1)) for a in (2, 3)]
        return ((Need(0, identity(out[0])), Need(None, Whole(out[1] * self.block**2, out[1])), *spatial),)

    def run(self, call: Call) -> tuple[torch.Tensor, ...]:
        x, r = call.tensor(0), self.block
        if self.rows_first:
            blocks = x.unflatten(1, (r, r, -1)).permute(0, 3, 4, 1, 5, 2)
        else:
            blocks = x.unflatten(1, (-1, r, r)).permute(0, 1, 4, 2, 5, 3)
        n, c, h, _, w, _ = blocks.shape
        result = blocks.reshape(n, c, h * r, w * r)
        for axis, (start, stop) in self._spans(call.box(0), call.outs[0]).items():
            result = result.narrow(axis, start, stop - start)
        return (result,)

    def emit(self, emitter: Emitter, names: Sequence[str | None], boxes: Sequence[Box | None],
             outs: Sequence[Box]) -> tuple[str, ...]:
        box = boxes[0]
        assert box is not None
        return (emitter.crop(emitter.same(names, 1)[0], self._spans(box, outs[0])),)

    def _spans(self, box: Box, out: Box) -> dict[int, tuple[int, int]]:
        """Per spatial axis the wanted cells among those that the held ones become, where some are not."""
        found: dict[int, tuple[int, int]] = {}
        for axis in (2, 3):
            first, wanted = box.intervals()[axis].start * self.block, out.intervals()[axis]
            if len(wanted) != box.shape[axis] * self.block:
                found[axis] = (wanted.start - first, wanted.stop - first)
        return found

    def flops(self, out: float) -> float:
        return 0.0


@register
@dataclass(frozen=True)
class SpaceToDepth(Operator):
    """Blocks of cells become channels; outputs [a, b) need inputs [a * block, b * block).

    DCR: y[n, (i*r + j)*C + c, h, w] = x[n, c, h*r + i, w*r + j];  CRD: y[n, c*r*r + i*r + j, h, w].
    Source: ONNX SpaceToDepth (1, 13, 28).
    """

    op_types: ClassVar[tuple[str, ...]] = ("SpaceToDepth",)
    examples: ClassVar[tuple[Example, ...]] = (
        Example("SpaceToDepth", ((2, 3, 6, 10),), {"blocksize": 2}, opset=13),
        Example("SpaceToDepth", ((1, 1, 9, 3),), {"blocksize": 3}, opset=13),
        Example("SpaceToDepth", ((1, 2, 10, 4),), {"blocksize": 2}, opset=9),
        Example("SpaceToDepth", ((1, 3, 6, 4),), {"blocksize": 2, "mode": "DCR"}, opset=28),
        Example("SpaceToDepth", ((2, 3, 6, 10),), {"blocksize": 2, "mode": "CRD"}, opset=28),
    )

    block: int
    rows_first: bool

    @classmethod
    def read(cls, view: NodeView) -> Self:
        data, block = _blocksize(view)
        n, c, h, w = data.shape
        if h % block or w % block:
            raise WrongExtents(f"blocks of {block} do not fill extents {[h, w]}; use multiples of {block}")
        shape = (n, c * block**2, h // block, w // block)
        return cls(view.inputs, (TensorType(shape, data.dtype),), block, _rows_first(view))

    def needs(self, output: int = 0) -> Needs:
        out = self.outputs[0].shape
        spatial = [Need(a, Flat(out[a] * self.block, out[a], 1, self.block)) for a in (2, 3)]
        return ((Need(0, identity(out[0])), Need(None, Whole(out[1] // self.block**2, out[1])), *spatial),)

    def run(self, call: Call) -> tuple[torch.Tensor, ...]:
        blocks = call.tensor(0).unflatten(3, (-1, self.block)).unflatten(2, (-1, self.block))
        return (blocks.permute((0, 3, 5, 1, 2, 4) if self.rows_first else (0, 1, 3, 5, 2, 4)).flatten(1, 3),)

    def flops(self, out: float) -> float:
        return 0.0
