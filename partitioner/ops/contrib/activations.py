"""Activations that onnxruntime writes into models when it optimises them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from partitioner.ops.base import Backward, Call, Example, Needs, NodeView, Operator, Unsupported, aligned
from partitioner.ops.kernels.gelu import gelu
from partitioner.ops.registry import register

if TYPE_CHECKING:
    import torch
else:
    from partitioner.lazy import torch

_KERNELS: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "Gelu": lambda x, alpha: gelu(x),
    "BiasGelu": lambda x, alpha: gelu(x),
    "FastGelu": lambda x, alpha: gelu(x, "tanh"),
    "QuickGelu": lambda x, alpha: x * torch.sigmoid(x * alpha),
}


@register
@dataclass(frozen=True)
class ContribGelu(Operator):
    """The Gaussian error linear unit of x, or of x + bias: exact, by tanh, or x * sigmoid(alpha * x).

    Source: com.microsoft Gelu, BiasGelu, FastGelu, QuickGelu (1).
    """

    op_types: ClassVar[tuple[str, ...]] = tuple(_KERNELS)
    domain: ClassVar[str] = "com.microsoft"
    examples: ClassVar[tuple[Example, ...]] = (
        Example("Gelu", ((2, 3, 7),)),
        Example("BiasGelu", ((2, 3, 7), (7,))),
        Example("FastGelu", ((2, 3, 7),)),
        Example("FastGelu", ((1, 2, 5, 7), (7,))),
        Example("QuickGelu", ((1, 2, 5, 7),)),
        Example("QuickGelu", ((2, 3, 7),), {"alpha": 1.1}),
    )

    op_type: str
    alpha: float

    @classmethod
    def read(cls, view: NodeView) -> Self:
        data = view.input(0)
        if view.has(1) and view.input(1).shape != data.shape[-1:]:
            raise Unsupported(f"bias of {list(view.input(1).shape)} on an input of {list(data.shape)}; "
                              "correct the file")
        return cls(view.inputs, (data,), view.op_type, view.float("alpha", 1.702))

    def needs(self, output: int = 0) -> Needs:
        out = self.outputs[0].shape
        return tuple(None if t is None else aligned(t.shape, out) for t in self.inputs)

    def backward(self, ins: Sequence[float], outs: Sequence[float]) -> Backward:
        word = self.outputs[0].itemsize * outs[0]
        beside = word if self.op_type == "QuickGelu" else 0.0
        if len(self.inputs) > 1:
            return Backward(beside=beside + word)
        return Backward(inputs=(0,), beside=beside)

    def run(self, call: Call) -> tuple[torch.Tensor, ...]:
        x, bias = call.tensor(0), call.optional(1)
        return (_KERNELS[self.op_type](x if bias is None else x + bias, self.alpha),)

    def flops(self, out: float) -> float:
        return 8 * out
