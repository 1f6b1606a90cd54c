"""Normalisation by neighbours: over a window of channels, or by a norm along an axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
import onnx_ir as ir

from partitioner.geometry import Box
from partitioner.maps import Window, identity
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
    Unsupported,
    statistics,
)
from partitioner.ops.dtypes import torch_dtype
from partitioner.ops.kernels.decomposing import cast, clip, merged_sum, wide_type
from partitioner.ops.kernels.powers import power
from partitioner.ops.registry import register
from partitioner.ops.standard.reduce import reduced

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as functional

    from partitioner.ops.emitter import Emitter
else:
    from partitioner.lazy import functional, torch


@register
@dataclass(frozen=True)
class LRN(Operator):
    """x / (bias + alpha / size * sum of squares over `size` channels) ^ beta.

    Channels c - floor((size - 1) / 2) to c + ceil((size - 1) / 2) count, as far as there are any.

    Source: ONNX LRN (1, 13); onnxruntime refuses even sizes, and tensors of other than 4 axes.
    """

    op_types: ClassVar[tuple[str, ...]] = ("LRN",)
    examples: ClassVar[tuple[Example, ...]] = (
        Example("LRN", ((2, 7, 5, 3),), {"size": 3}, opset=13),
        Example("LRN", ((1, 4, 7, 5),), {"size": 5, "alpha": 0.5, "beta": 0.6, "bias": 2.0}, opset=13),
        Example("LRN", ((2, 3, 5, 7),), {"size": 9, "alpha": 0.1}, opset=8),
        Example("LRN", ((1, 2, 5, 7),), {"size": 1, "alpha": 0.3}, opset=8),
    )

    window: Window
    alpha: float
    beta: float
    bias: float

    @classmethod
    def read(cls, view: NodeView) -> Self:
        data, size = view.input(0), view.int("size", 0)
        if data.rank < 2 or size < 1:
            raise Unsupported(f"size {size} on a tensor of {data.rank} axes; correct the file")
        channels = data.shape[1]
        window = Window(channels, channels, kernel=size, stride=1, dilation=1, lo=(size - 1) // 2)
        return cls(view.inputs, (data,), window, view.float("alpha", 1e-4), view.float("beta", 0.75),
                   view.float("bias", 1.0))

    def needs(self, output: int = 0) -> Needs:
        shape = self.outputs[0].shape
        return (tuple(Need(a, self.window if a == 1 else identity(n)) for a, n in enumerate(shape)),)

    def backward(self, ins: Sequence[float], outs: Sequence[float]) -> Backward:
        between = 3 if self.beta == 0.75 else 2  # a power of quarters is a chain of roots
        return Backward(inputs=(0,), beside=between * self.outputs[0].itemsize * outs[0])

    def run(self, call: Call) -> tuple[torch.Tensor, ...]:
        x, held, out = call.tensor(0), call.box(0).intervals()[1], call.outs[0].intervals()[1]
        want = self.window.unclipped(out)
        wide = x.to(torch_dtype(wide_type(self.outputs[0].dtype)))
        beside = [0, 0] * (x.dim() - 2)
        squares = functional.pad(wide.square(), [*beside, held.start - want.start, want.stop - held.stop])
        total = squares.narrow(1, 0, len(out)).clone()
        for tap in range(1, self.window.kernel):
            total = total + squares.narrow(1, tap, len(out))
        base = self.bias + self.alpha / self.window.kernel * total
        own = wide.narrow(1, out.start - held.start, len(out))
        return ((own * power(base, -self.beta)).to(x.dtype),)

    def emit(self, emitter: Emitter, names: Sequence[str | None], boxes: Sequence[Box | None],
             outs: Sequence[Box]) -> tuple[str, ...]:
        assert boxes[0] is not None
        held, out = boxes[0].intervals()[1], outs[0].intervals()[1]
        (result,) = emitter.same(names, 1)
        crop = {} if held == out else {1: (out.start - held.start, out.stop - held.start)}
        return (emitter.crop(result, crop),)

    def workspace(self, ins: Sequence[float], outs: Sequence[float]) -> float:
        return 3 * outs[0] * self.outputs[0].itemsize

    def flops(self, out: float) -> float:
        return out * (self.window.kernel + 4)


@register
@dataclass(frozen=True)
class LpNormalization(Operator):
    """x divided by its 1- or 2-norm along an axis; zeros stay zeros, as in onnxruntime.

    Source: ONNX LpNormalization (1, 22).
    """

    op_types: ClassVar[tuple[str, ...]] = ("LpNormalization",)
    examples: ClassVar[tuple[Example, ...]] = (
        Example("LpNormalization", ((2, 3, 7, 5),), opset=13),
        Example("LpNormalization", ((2, 3, 7, 5),), {"axis": 1, "p": 1}, opset=22),
        Example("LpNormalization", ((2, 3, 7, 5),), {"axis": 2, "p": 1}, opset=9),
        Example("LpNormalization", ((3, 2, 11),), {"axis": 0, "p": 2}, opset=22),
        Example("LpNormalization", ((2, 2, 3, 7, 5),), {"axis": -2}, opset=13),
        Example("LpNormalization", ((1, 2, 7),), opset=13, between=(0.0, 0.0)),
    )

    axis: int
    p: int

    @classmethod
    def read(cls, view: NodeView) -> Self:
        data, axis, p = view.input(0), view.int("axis", -1), view.int("p", 2)
        if not -data.rank <= axis < data.rank:
            raise Unsupported(f"axis {axis} on a tensor of {data.rank} axes; correct the file")
        if p not in (1, 2):
            raise Unsupported(f"p is {p}, ONNX knows norms 1 and 2; correct the file")
        return cls(view.inputs, (data,), axis % data.rank, p)

    @property
    def reduction(self) -> Reduction:
        return Reduction((self.axis,))

    def needs(self, output: int = 0) -> Needs:
        shape = self.outputs[0].shape
        return (tuple(statistics(a, n) if a == self.axis else Need(a, identity(n)) for a, n in enumerate(shape)),)

    def decompose(self, write: Decomposer, inputs: Sequence[ir.Value | None]) -> ir.Value:
        assert inputs[0] is not None
        dtype = self.outputs[0].dtype
        x = cast(write, inputs[0], wide_type(dtype))
        norm = merged_sum(write, "ReduceL1" if self.p == 1 else "ReduceSumSquare", x, [self.axis])
        if self.p == 2:
            (norm,) = write.op("Sqrt", [norm])
        # zeros are divided by the number nearest to zero; as an attribute (before opset 11) that is a float32
        kept = np.dtype(np.float32) if write.opset < 11 else wide_type(dtype).numpy()
        (result,) = write.op("Div", [x, clip(write, norm, float(np.finfo(kept).smallest_subnormal))])
        return cast(write, result, dtype)

    def backward(self, ins: Sequence[float], outs: Sequence[float]) -> Backward:
        return Backward(inputs=(0,))

    def run(self, call: Call) -> tuple[torch.Tensor, ...]:
        x = call.tensor(0)
        wide = x.to(torch_dtype(wide_type(self.outputs[0].dtype)))
        norm = reduced("ReduceL1" if self.p == 1 else "ReduceL2", wide, (self.axis,))
        return ((wide / torch.where(norm == 0, torch.ones_like(norm), norm)).to(x.dtype),)

    def flops(self, out: float) -> float:
        return 3 * out
