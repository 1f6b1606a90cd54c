"""The matrix product that onnxruntime fuses with transpositions and a factor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self, TypeVar

from partitioner.geometry import Box
from partitioner.ops.base import Backward, Call, Example, Needs, NodeView, Operator, TensorType, Unsupported
from partitioner.ops.registry import register
from partitioner.ops.standard.dense import MatMul

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


def _swapped(axes: Sequence[T], flip: bool) -> tuple[T, ...]:
    """The last two exchanged."""
    return (*axes[:-2], axes[-1], axes[-2]) if flip else tuple(axes)


@register
@dataclass(frozen=True)
class FusedMatMul(Operator):
    """alpha * A B, either of them transposed in its last two axes.

    Source: com.microsoft FusedMatMul (1), without transBatchA and transBatchB.
    """

    op_types: ClassVar[tuple[str, ...]] = ("FusedMatMul",)
    domain: ClassVar[str] = "com.microsoft"
    examples: ClassVar[tuple[Example, ...]] = (
        Example("FusedMatMul", ((2, 3, 5, 4), (3, 7, 4)), {"transB": 1, "alpha": 0.5}),
        Example("FusedMatMul", ((2, 4, 5), (4, 3)), {"transA": 1}),
        Example("FusedMatMul", ((2, 4, 5), (2, 3, 4)), {"transA": 1, "transB": 1, "alpha": 1.5}),
        Example("FusedMatMul", ((2, 5, 4), (4, 3))),
    )

    plain: MatMul
    flips: tuple[bool, bool]
    alpha: float

    @classmethod
    def read(cls, view: NodeView) -> Self:
        if view.int("transBatchA", 0) or view.int("transBatchB", 0):
            raise Unsupported("its attributes transBatchA and transBatchB have no rule; export it without fusions")
        sides = (view.input(0), view.input(1))
        if min(side.rank for side in sides) < 2:
            raise Unsupported("a fused product with a vector has no rule; export it without fusions")
        flips = (bool(view.int("transA", 0)), bool(view.int("transB", 0)))
        turned = tuple(TensorType(_swapped(t.shape, f), t.dtype) for t, f in zip(sides, flips, strict=True))
        plain = MatMul.read(replace(view, op_type="MatMul", inputs=turned))
        return cls(view.inputs, plain.outputs, plain, flips, view.float("alpha", 1.0))

    def needs(self, output: int = 0) -> Needs:
        return tuple(None if need is None else _swapped(need, flip)
                     for need, flip in zip(self.plain.needs(output), self.flips, strict=True))

    @property
    def gradient_work(self) -> float:
        return 2.0

    def backward(self, ins: Sequence[float], outs: Sequence[float]) -> Backward:
        return self.plain.backward(ins, outs)

    def run(self, call: Call) -> tuple[torch.Tensor, ...]:
        tensors = [call.tensor(i).transpose(-1, -2) if flip else call.tensor(i) for i, flip in enumerate(self.flips)]
        boxes = [Box(_swapped(call.box(i).axes, flip)) for i, flip in enumerate(self.flips)]
        (product,) = self.plain.run(Call(tuple(tensors), tuple(boxes), call.outs))
        return (product if self.alpha == 1 else product * self.alpha,)

    def flops(self, out: float) -> float:
        return self.plain.flops(out)
