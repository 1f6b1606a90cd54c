"""Matrix products: a classifier's head.  Rows keep their shards; the contracted axis is needed whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np

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
    aligned,
    whole,
)
from partitioner.ops.registry import register
from partitioner.ops.threads import one_thread

if TYPE_CHECKING:
    import torch
else:
    from partitioner.lazy import torch


@register
@dataclass(frozen=True)
class Gemm(Operator):
    """alpha * A' B' + beta * C.

    Source: ONNX Gemm (1 to 13).
    """

    op_types: ClassVar[tuple[str, ...]] = ("Gemm",)
    examples: ClassVar[tuple[Example, ...]] = (
        Example("Gemm", ((5, 3), (3, 4), (4,)), {"alpha": 0.5, "beta": 2.0}),
        Example("Gemm", ((5, 3), (4, 3)), {"transB": 1}),
        Example("Gemm", ((3, 5), (3, 4), (5, 1)), {"transA": 1}),
    )

    alpha: float
    beta: float
    flip_a: bool
    flip_b: bool

    @classmethod
    def read(cls, view: NodeView) -> Self:
        a, b = view.input(0), view.input(1)
        if a.rank != 2 or b.rank != 2:
            raise Unsupported(f"its inputs have {a.rank} and {b.rank} axes instead of 2; correct the file")
        flip_a, flip_b = bool(view.int("transA", 0)), bool(view.int("transB", 0))
        (rows, inner), (inner_b, columns) = (s[::-1] if f else s for s, f in ((a.shape, flip_a), (b.shape, flip_b)))
        if inner != inner_b:
            raise WrongExtents(f"it multiplies {inner} features by a matrix of {inner_b} rows; the network takes "
                              "one extent of volume only: give the one that it was exported for")
        return cls(view.inputs, (TensorType((rows, columns), a.dtype),),
                   view.float("alpha", 1.0), view.float("beta", 1.0), flip_a, flip_b)

    def needs(self, output: int = 0) -> Needs:
        a, b, *rest = self.inputs
        assert a is not None and b is not None
        rows, columns = self.outputs[0].shape
        left = [Need(0, identity(rows)), whole(a.shape)[0 if self.flip_a else 1]]
        right = [whole(b.shape)[1 if self.flip_b else 0], Need(1, identity(columns))]
        left, right = left[::-1] if self.flip_a else left, right[::-1] if self.flip_b else right
        return (tuple(left), tuple(right),
                *(None if c is None else aligned(c.shape, (rows, columns)) for c in rest))

    def run(self, call: Call) -> tuple[torch.Tensor, ...]:
        a, b, c = call.tensor(0), call.tensor(1), call.optional(2)
        with one_thread(a):
            product = torch.matmul(a.T if self.flip_a else a, b.T if self.flip_b else b)
        product = product if self.alpha == 1 else product * self.alpha
        if c is None:
            return (product,)
        return (product + (c if self.beta == 1 else c * self.beta),)

    def flops(self, out: float) -> float:
        a = self.inputs[0]
        assert a is not None
        return 2.0 * out * a.shape[0 if self.flip_a else 1]


@register
@dataclass(frozen=True)
class MatMul(Operator):
    """Matrix product over the last two axes, the others broadcast.

    Source: ONNX MatMul (1, 9, 13).
    """

    op_types: ClassVar[tuple[str, ...]] = ("MatMul",)
    examples: ClassVar[tuple[Example, ...]] = (
        Example("MatMul", ((2, 5, 3), (3, 4))),
        Example("MatMul", ((2, 3, 5, 4), (3, 4, 7))),
    )

    @classmethod
    def read(cls, view: NodeView) -> Self:
        a, b = view.input(0), view.input(1)
        if a.rank < 2 or b.rank < 2:
            raise Unsupported("a product with a vector has no sharded rule; export it as a matrix of one column")
        if a.shape[-1] != b.shape[-2]:
            raise WrongExtents(f"it multiplies {list(a.shape)} by {list(b.shape)}; the network takes one extent of "
                              "volume only: give the one that it was exported for")
        lead = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        return cls(view.inputs, (TensorType((*lead, a.shape[-2], b.shape[-1]), a.dtype),))

    def needs(self, output: int = 0) -> Needs:
        a, b = self.inputs
        assert a is not None and b is not None
        out = self.outputs[0].shape
        rank = len(out)
        left = aligned(a.shape[:-2], out[:-2])
        right = aligned(b.shape[:-2], out[:-2])
        rows, columns = Need(rank - 2, identity(out[-2])), Need(rank - 1, identity(out[-1]))
        return ((*left, rows, whole(a.shape)[-1]), (*right, whole(b.shape)[-2], columns))

    def run(self, call: Call) -> tuple[torch.Tensor, ...]:
        with one_thread(call.tensor(0)):
            return (torch.matmul(call.tensor(0), call.tensor(1)),)

    def flops(self, out: float) -> float:
        a = self.inputs[0]
        assert a is not None
        return 2.0 * out * a.shape[-1]
