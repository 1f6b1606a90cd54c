"""Normalisation over the last axes, or over any axes: layer, root mean square, mean and variance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import onnx_ir as ir

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
    statistics,
    whole,
)
from partitioner.ops.dtypes import torch_dtype
from partitioner.ops.kernels.decomposing import cast, merged_sum, merged_variance, number, type_of, wide_type
from partitioner.ops.kernels.moments import moments
from partitioner.ops.registry import register
from partitioner.ops.standard.reduce import reduced

if TYPE_CHECKING:
    import torch
else:
    from partitioner.lazy import torch

_TYPES = (ir.DataType.FLOAT, ir.DataType.DOUBLE)


def _first_axis(view: NodeView) -> int:
    """The first of the axes that are normalised together."""
    rank, axis = view.input(0).rank, view.int("axis", -1)
    if not -rank <= axis < rank:
        raise Unsupported(f"axis {axis} on a tensor of {rank} axes; correct the file")
    return axis % rank


def _stash_type(view: NodeView) -> ir.DataType:
    """The type that the file wants the statistics in."""
    return ir.DataType(view.int("stash_type", int(ir.DataType.FLOAT)))


def _kept_type(data: ir.DataType, stash: ir.DataType) -> ir.DataType:
    """The type to compute in: the wider of data and stash_type (onnxruntime does not narrow float64 either)."""
    wider = ir.DataType.DOUBLE if ir.DataType.DOUBLE in (data, stash) else ir.DataType.FLOAT
    return wider if stash in _TYPES else wide_type(data)


def _check_broadcast(view: NodeView, index: int) -> None:
    shape, given = view.input(0).shape, view.input(index).shape
    pairs = zip(reversed(given), reversed(shape), strict=False)
    if len(given) > len(shape) or any(a not in (1, b) for a, b in pairs):
        raise WrongExtents(f"scale or bias of {list(given)} does not fit extents {list(shape)}; "
                           "the network cannot take this volume's extents")


@dataclass(frozen=True)
class _Normalization(Operator):
    """Every cell is divided by a statistic over `axes`.

    Args:
        axes: axes that the statistics are taken over.
        epsilon: added to the variance, or to the deviation.
        kept: type of the statistics.
    """

    axes: tuple[int, ...]
    epsilon: float
    kept: ir.DataType

    @property
    def reduction(self) -> Reduction | None:
        return Reduction(self.axes)

    def needs(self, output: int = 0) -> Needs:
        shape = self.outputs[0].shape
        if output > 0:  # statistics: neither scale nor bias
            own = tuple(whole(shape)[a] if a in self.axes else Need(a, identity(n)) for a, n in enumerate(shape))
            return (own, *(None for _ in self.inputs[1:]))
        own = tuple(statistics(a, n) if a in self.axes else Need(a, identity(n)) for a, n in enumerate(shape))
        return (own, *(None if t is None else aligned(t.shape, shape) for t in self.inputs[1:]))

    def _scaled(self, write: Decomposer, value: ir.Value, inputs: Sequence[ir.Value | None]) -> ir.Value:
        """The value in the data's type, times scale, plus bias."""
        result = cast(write, value, self.outputs[0].dtype)
        for op_type, weight in zip(("Mul", "Add"), inputs[1:], strict=False):
            if weight is not None:
                (result,) = write.op(op_type, [result, weight])
        return result

    def _scale(self, call: Call, value: torch.Tensor) -> torch.Tensor:
        """The value times scale, plus bias, in the data's type."""
        scale, bias = call.optional(1), call.optional(2)
        if scale is not None:
            value = value * scale.to(value.dtype)
        if bias is not None:
            value = value + bias.to(value.dtype)
        return value.to(torch_dtype(self.outputs[0].dtype))

    def flops(self, out: float) -> float:
        return 6 * out


@register
@dataclass(frozen=True)
class LayerNormalization(_Normalization):
    """Normalisation by mean and variance over all axes from `axis` on; both may be outputs too.

    Source: ONNX LayerNormalization (17).
    """

    op_types: ClassVar[tuple[str, ...]] = ("LayerNormalization",)
    examples: ClassVar[tuple[Example, ...]] = (
        Example("LayerNormalization", ((2, 7, 5, 6), (6,), (6,)), opset=17),
        Example("LayerNormalization", ((2, 7, 5, 6), (6,)), {"epsilon": 1e-2}, opset=17),
        Example("LayerNormalization", ((2, 3, 7, 5), (3, 7, 5), (3, 7, 5)), {"axis": 1}, opset=17),
        Example("LayerNormalization", ((2, 3, 7, 5), (7, 1), (1, 5)), {"axis": 2, "stash_type": 1}, opset=17),
        Example("LayerNormalization", ((2, 3, 7, 5), (7, 5), None), {"axis": -2}, opset=17, outputs=3, checked=3),
        Example("LayerNormalization", ((3, 2, 9), (2, 9), (9,)), {"axis": 1}, opset=17, outputs=3, checked=3),
        Example("LayerNormalization", ((3, 2, 9), (9,), (9,)), opset=17, outputs=3),
        Example("LayerNormalization", ((1, 2, 5, 3, 7), (5, 3, 7), (1, 3, 7)), {"axis": 2}, opset=17, outputs=2,
                checked=2),
    )

    stash: ir.DataType

    @classmethod
    def read(cls, view: NodeView) -> Self:
        data, axis, stash = view.input(0), _first_axis(view), _stash_type(view)
        for index in (1, 2):
            if index == 1 or view.has(index):
                _check_broadcast(view, index)
        used = [i for i, use in enumerate(view.used_outputs) if use]
        axes = tuple(range(axis, data.rank))
        statistic = TensorType((*data.shape[:axis], *[1] * len(axes)), stash)
        outputs = (data, *[statistic] * max(used, default=0))
        return cls(view.inputs, outputs, axes, view.float("epsilon", 1e-5), _kept_type(data.dtype, stash), stash)

    def decompose(self, write: Decomposer, inputs: Sequence[ir.Value | None]) -> tuple[ir.Value, ...]:
        assert inputs[0] is not None
        x = cast(write, inputs[0], self.kept)
        mean, variance = merged_variance(write, x, self.outputs[0].shape, self.axes)
        (shifted,) = write.op("Add", [variance, number(write, self.epsilon, self.kept)])
        (inverse,) = write.op("Reciprocal", list(write.op("Sqrt", [shifted])))
        (result,) = write.op("Mul", [write.op("Sub", [x, mean])[0], inverse])
        statistics_ = [cast(write, v, self.stash) for v in (mean, inverse)[: len(self.outputs) - 1]]
        return (self._scaled(write, result, inputs), *statistics_)

    def backward(self, ins: Sequence[float], outs: Sequence[float]) -> Backward:
        return Backward(inputs=(0, 1), beside=2 * self.kept.itemsize * outs[0])

    def run(self, call: Call) -> tuple[torch.Tensor, ...]:
        x = call.tensor(0).to(torch_dtype(self.kept))
        count, mean, m2 = moments(x, self.axes)
        inverse = torch.rsqrt(m2 / count + self.epsilon)
        found = [v.to(torch_dtype(self.stash)) for v in (mean, inverse)]
        return (self._scale(call, (x - mean) * inverse), *found[: len(self.outputs) - 1])


@register
@dataclass(frozen=True)
class RMSNormalization(_Normalization):
    """Division by the root of the mean square over all axes from `axis` on.

    Source: ONNX RMSNormalization (23).
    """

    op_types: ClassVar[tuple[str, ...]] = ("RMSNormalization",)
    examples: ClassVar[tuple[Example, ...]] = (
        Example("RMSNormalization", ((2, 7, 5, 6), (6,)), opset=23),
        Example("RMSNormalization", ((2, 3, 7, 5), (3, 7, 5)), {"axis": 1, "epsilon": 1e-2}, opset=23),
        Example("RMSNormalization", ((2, 3, 11), (11,)), {"axis": -1, "stash_type": 1}, opset=23),
        Example("RMSNormalization", ((1, 2, 5, 3, 7), (3, 1)), {"axis": 3}, opset=23),
    )

    @classmethod
    def read(cls, view: NodeView) -> Self:
        data, axes = view.input(0), tuple(range(_first_axis(view), view.input(0).rank))
        _check_broadcast(view, 1)
        kept = _kept_type(data.dtype, _stash_type(view))
        return cls(view.inputs, (data,), axes, view.float("epsilon", 1e-5), kept)

    def decompose(self, write: Decomposer, inputs: Sequence[ir.Value | None]) -> ir.Value:
        assert inputs[0] is not None
        x = cast(write, inputs[0], self.kept)
        cells = math.prod(self.outputs[0].shape[a] for a in self.axes)
        total = merged_sum(write, "ReduceSumSquare", x, self.axes)
        (mean,) = write.op("Div", [total, number(write, cells, self.kept)])
        (shifted,) = write.op("Add", [mean, number(write, self.epsilon, self.kept)])
        (result,) = write.op("Div", [x, *write.op("Sqrt", [shifted])])
        return self._scaled(write, result, inputs)

    def backward(self, ins: Sequence[float], outs: Sequence[float]) -> Backward:
        return Backward(inputs=(0, 1), beside=self.kept.itemsize * outs[0])

    def run(self, call: Call) -> tuple[torch.Tensor, ...]:
        x = call.tensor(0).to(torch_dtype(self.kept))
        cells = math.prod(x.shape[a] for a in self.axes)
        mean = reduced("ReduceSumSquare", x, self.axes) / cells
        return (self._scale(call, x * torch.rsqrt(mean + self.epsilon)),)


@register
@dataclass(frozen=True)
class MeanVarianceNormalization(_Normalization):
    """(x - mean) / (deviation + 1e-9) over any axes; the variance is not computed as E[x^2] - E[x]^2.

    Source: ONNX MeanVarianceNormalization (9, 13).
    """

    op_types: ClassVar[tuple[str, ...]] = ("MeanVarianceNormalization",)
    examples: ClassVar[tuple[Example, ...]] = (
        Example("MeanVarianceNormalization", ((3, 2, 7, 5),), {"axes": [0, 2, 3]}, opset=13),
        Example("MeanVarianceNormalization", ((3, 2, 7, 5),), opset=9),
        Example("MeanVarianceNormalization", ((2, 3, 7, 5),), {"axes": [2, 3]}, opset=13),
        Example("MeanVarianceNormalization", ((2, 3, 11),), {"axes": [-1]}, opset=13),
        Example("MeanVarianceNormalization", ((2, 2, 3, 7, 5),), {"axes": [1, 2, 4]}, opset=13),
        Example("MeanVarianceNormalization", ((2, 3, 11),), {"axes": [0, 1]}, opset=9),
    )

    @classmethod
    def read(cls, view: NodeView) -> Self:
        data, given = view.input(0), view.ints("axes") or (0, 2, 3)
        if any(not -data.rank <= a < data.rank for a in given):
            raise Unsupported(f"axes {list(given)} on a tensor of {data.rank} axes; correct the file")
        axes = tuple(sorted({a % data.rank for a in given}))
        return cls(view.inputs, (data,), axes, 1e-9, wide_type(data.dtype))

    def decompose(self, write: Decomposer, inputs: Sequence[ir.Value | None]) -> ir.Value:
        assert inputs[0] is not None
        x = cast(write, inputs[0], self.kept)
        mean, variance = merged_variance(write, x, self.outputs[0].shape, self.axes)
        (deviation,) = write.op("Sqrt", [variance])
        (shifted,) = write.op("Add", [deviation, number(write, self.epsilon, type_of(mean))])
        (result,) = write.op("Div", [write.op("Sub", [x, mean])[0], shifted])
        return cast(write, result, self.outputs[0].dtype)

    def backward(self, ins: Sequence[float], outs: Sequence[float]) -> Backward:
        return Backward(inputs=(0,), beside=self.kept.itemsize * outs[0])

    def run(self, call: Call) -> tuple[torch.Tensor, ...]:
        x = call.tensor(0).to(torch_dtype(self.kept))
        count, mean, m2 = moments(x, self.axes)
        result = (x - mean) / (torch.sqrt(m2 / count) + self.epsilon)
        return (result.to(torch_dtype(self.outputs[0].dtype)),)
