"""Matrix products: rows and columns keep their shards; a contracted axis that is sharded gives partial sums.

    y = MatMul(a, b)   a [n, k], b [k, m], k over 2 ranks    ->    y = AllReduce(MatMul(a_local, b_local), op=sum)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import onnx_ir as ir

from partitioner.geometry import Box
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
    TensorType,
    Unsupported,
    WrongExtents,
    aligned,
    whole,
)
from partitioner.ops.kernels.equation import Equation
from partitioner.ops.kernels.threads import one_thread
from partitioner.ops.registry import register

if TYPE_CHECKING:
    import torch

    from partitioner.ops.emitter import Emitter
else:
    from partitioner.lazy import torch


def _partial_sum(write: Decomposer, op_type: str, inputs: Sequence[ir.Value | None],
                 attributes: Mapping[str, Any]) -> ir.Value:
    """A product of the local parts, summed over the ranks."""
    (partial,) = write.op(op_type, inputs, attributes)
    (total,) = write.all_reduce("sum", [partial])
    return total


@register
@dataclass(frozen=True)
class Gemm(Operator):
    """alpha * A' B' + beta * C.

    Source: ONNX Gemm (7 to 13).
    """

    op_types: ClassVar[tuple[str, ...]] = ("Gemm",)
    examples: ClassVar[tuple[Example, ...]] = (
        Example("Gemm", ((5, 3), (3, 4), (4,)), {"alpha": 0.5, "beta": 2.0}),
        Example("Gemm", ((5, 3), (4, 3)), {"transB": 1}),
        Example("Gemm", ((3, 5), (3, 4), (5, 1)), {"transA": 1}),
        Example("Gemm", ((7, 5), (7, 4), (4,)), {"transA": 1, "beta": 0.5}, opset=7),
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

    @property
    def reduction(self) -> Reduction:
        return Reduction(contracted=((0 if self.flip_a else 1, 1 if self.flip_b else 0),))

    def decompose(self, write: Decomposer, inputs: Sequence[ir.Value | None]) -> ir.Value:
        dtype = self.outputs[0].dtype.numpy()
        flips = {"transA": int(self.flip_a), "transB": int(self.flip_b), "alpha": self.alpha}
        nothing = write.constant(np.zeros(1, dtype))  # required before opset 11
        result = _partial_sum(write, "Gemm", [inputs[0], inputs[1], nothing], flips)
        bias = inputs[2] if len(inputs) > 2 else None
        if bias is None:
            return result
        if self.beta != 1:
            (bias,) = write.op("Mul", [bias, write.constant(np.asarray(self.beta, dtype))])
        return write.op("Add", [result, bias])[0]

    @property
    def gradient_work(self) -> float:
        return 2.0

    def backward(self, ins: Sequence[float], outs: Sequence[float]) -> Backward:
        return Backward(inputs=(0, 1))

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
    """Matrix product over the last two axes, the others broadcast; a vector is a row or a column.

    Source: ONNX MatMul (1, 9, 13).
    """

    op_types: ClassVar[tuple[str, ...]] = ("MatMul",)
    examples: ClassVar[tuple[Example, ...]] = (
        Example("MatMul", ((2, 5, 3), (3, 4))),
        Example("MatMul", ((2, 3, 5, 4), (3, 4, 7))),
        Example("MatMul", ((2, 3, 4, 7), (2, 3, 7, 5))),
        Example("MatMul", ((7,), (2, 7, 5))),
        Example("MatMul", ((2, 3, 7), (7,))),
        Example("MatMul", ((7,), (7,))),
        Example("MatMul", ((2, 5, 3), (3, 4)), dtype=ir.DataType.INT32),
    )

    @classmethod
    def read(cls, view: NodeView) -> Self:
        a, b = view.input(0), view.input(1)
        if not a.rank or not b.rank:
            raise Unsupported("a product with a single number; correct the file")
        if a.shape[-1] != b.shape[-2 if b.rank > 1 else -1]:
            raise WrongExtents(f"it multiplies {list(a.shape)} by {list(b.shape)}; the network takes one extent of "
                              "volume only: give the one that it was exported for")
        try:
            lead = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        except ValueError:
            raise WrongExtents(f"the leading axes of {list(a.shape)} and {list(b.shape)} do not broadcast; the network "
                               "cannot take this volume's extents") from None
        shape = (*lead, *a.shape[-2:-1], *(b.shape[-1:] if b.rank > 1 else ()))
        return cls(view.inputs, (TensorType(shape, a.dtype),))

    def needs(self, output: int = 0) -> Needs:
        a, b = self.inputs
        assert a is not None and b is not None
        out = self.outputs[0].shape
        rows, columns = int(a.rank > 1), int(b.rank > 1)
        lead = out[: len(out) - rows - columns]
        left = [*aligned(a.shape[:-2], lead), *([Need(len(lead), identity(a.shape[-2]))] if rows else [])]
        right = [*aligned(b.shape[:-2], lead), whole(b.shape)[-2 if columns else -1],
                 *([Need(len(out) - 1, identity(out[-1]))] if columns else [])]
        return ((*left, whole(a.shape)[-1]), tuple(right))

    @property
    def reduction(self) -> Reduction:
        a, b = self.inputs
        assert a is not None and b is not None
        return Reduction(contracted=((a.rank - 1, max(b.rank - 2, 0)),))

    def decompose(self, write: Decomposer, inputs: Sequence[ir.Value | None]) -> ir.Value:
        return _partial_sum(write, "MatMul", inputs, {})

    @property
    def gradient_work(self) -> float:
        return 2.0

    def backward(self, ins: Sequence[float], outs: Sequence[float]) -> Backward:
        a, b = self.inputs
        assert a is not None and b is not None
        lead = self.outputs[0].shape[: max(a.rank, b.rank) - 2]
        repeats = [math.prod(lead) / math.prod(t.shape[:-2]) if min(a.rank, b.rank) > 2 else 1 for t in (a, b)]
        beside = sum(self.outputs[0].itemsize * n * count for n, count in zip(ins, repeats, strict=True) if count > 1)
        return Backward(inputs=tuple(i for i, count in enumerate(repeats) if count <= 1), beside=beside)

    def run(self, call: Call) -> tuple[torch.Tensor, ...]:
        with one_thread(call.tensor(0)):
            return (torch.matmul(call.tensor(0), call.tensor(1)),)

    def flops(self, out: float) -> float:
        a = self.inputs[0]
        assert a is not None
        return 2.0 * out * a.shape[-1]


@register
@dataclass(frozen=True)
class Einsum(Operator):
    """Sums of products by index notation: every letter of the result keeps its shards.

    Source: ONNX Einsum (12), numpy.einsum.
    """

    op_types: ClassVar[tuple[str, ...]] = ("Einsum",)
    examples: ClassVar[tuple[Example, ...]] = (
        Example("Einsum", ((2, 5, 3), (3, 4)), {"equation": "bij,jk->bik"}),
        Example("Einsum", ((2, 5, 7), (2, 5, 3)), {"equation": "bij, bik -> jk"}),
        Example("Einsum", ((2, 3, 5, 4), (2, 3, 7, 4)), {"equation": "bhqd,bhkd->bhqk"}),
        Example("Einsum", ((2, 3, 5), (2, 3, 5)), {"equation": "...i,...i->..."}),
        Example("Einsum", ((2, 3, 7),), {"equation": "bcn->bc"}),
        Example("Einsum", ((5, 5, 3),), {"equation": "iij->ij"}),
        Example("Einsum", ((5, 3), (3, 7)), {"equation": "ik,kj"}),
        Example("Einsum", ((5, 3), (7, 4)), {"equation": "ik,jl->ijkl"}),
        Example("Einsum", ((2, 3, 7), (2, 7), (7, 3)), {"equation": "bcn,bn,nc->bc"}),
    )

    equation: Equation

    @classmethod
    def read(cls, view: NodeView) -> Self:
        given = [view.input(i) for i in range(len(view.inputs))]
        try:
            equation = Equation.parse(view.text("equation", ""), [t.shape for t in given])
        except ValueError as error:
            raise Unsupported(f"equation '{view.text('equation', '')}': {error}; correct the file") from None
        return cls(view.inputs, (TensorType(equation.shape, given[0].dtype),), equation)

    def needs(self, output: int = 0) -> Needs:
        found: list[tuple[Need, ...]] = []
        for letters in self.equation.inputs:
            axes = [self.equation.output.find(letter) for letter in letters]
            extents = [self.equation.extents[letter] for letter in letters]
            found.append(tuple(whole((n,))[0] if axis < 0 else Need(axis, identity(n))
                               for axis, n in zip(axes, extents, strict=True)))
        return tuple(found)

    @property
    def reduction(self) -> Reduction | None:
        """Letters that are summed over; one that stands twice in an input is needed whole."""
        summed = [x for x in self.equation.extents if x not in self.equation.output]
        simple = [x for x in summed if all(letters.count(x) < 2 for letters in self.equation.inputs)]
        dimensions = tuple(tuple(letters.find(x) if x in letters else None for letters in self.equation.inputs)
                           for x in simple)
        return Reduction(contracted=dimensions) if dimensions else None

    def decompose(self, write: Decomposer, inputs: Sequence[ir.Value | None]) -> ir.Value:
        return _partial_sum(write, "Einsum", inputs, {"equation": str(self.equation)})

    @property
    def gradient_work(self) -> float:
        return 2.0

    def backward(self, ins: Sequence[float], outs: Sequence[float]) -> Backward:
        if len(self.inputs) < 2:
            return Backward()
        between = self.outputs[0].itemsize * ins[0] if len(ins) > 2 else 0.0
        return Backward(inputs=tuple(range(len(self.inputs))), beside=between)

    def run(self, call: Call) -> tuple[torch.Tensor, ...]:
        tensors = [call.tensor(i) for i in range(len(self.inputs))]
        with one_thread(tensors[0]):
            result = torch.einsum(str(self.equation), tensors)
        return (result.contiguous(),)

    def emit(self, emitter: Emitter, names: Sequence[str | None], boxes: Sequence[Box | None],
             outs: Sequence[Box]) -> tuple[str, ...]:
        return emitter.same(names, 1, {"equation": str(self.equation)})

    def flops(self, out: float) -> float:
        summed = [n for letter, n in self.equation.extents.items() if letter not in self.equation.output]
        return 2.0 * out * math.prod(summed)
