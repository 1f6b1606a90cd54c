"""Reductions over axes and global pools: local partials, one merge, a local finish when sharded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

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
    whole,
)
from partitioner.ops.dtypes import torch_dtype
from partitioner.ops.kernels.decomposing import cast, clip, number, squeezed, through_float, type_of, wide_type
from partitioner.ops.kernels.rows import as_slices, rows_of, suit, sums
from partitioner.ops.kernels.threads import one_thread
from partitioner.ops.registry import register
from partitioner.ops.standard.pool import lowest

if TYPE_CHECKING:
    import torch

    from partitioner.ops.emitter import Emitter
else:
    from partitioner.lazy import torch

_GLOBAL = {"GlobalAveragePool": "ReduceMean", "GlobalMaxPool": "ReduceMax"}
_MERGES = {
    "ReduceSum": ("ReduceSum", "sum"),
    "ReduceMean": ("ReduceSum", "sum"),
    "ReduceMax": ("ReduceMax", "max"),
    "ReduceMin": ("ReduceMin", "min"),
    "ReduceProd": ("ReduceProd", "prod"),
    "ReduceL1": ("ReduceL1", "sum"),
    "ReduceL2": ("ReduceSumSquare", "sum"),
    "ReduceSumSquare": ("ReduceSumSquare", "sum"),
    "ReduceLogSum": ("ReduceSum", "sum"),
    "ReduceLogSumExp": ("ReduceSum", "sum"),
}
"""Every reduction's local partial, and how partials merge."""

_AXES_2_4 = np.array([2, -1], np.int64)
_FLOATS = ("ReduceL1", "ReduceL2", "ReduceLogSumExp", "ReduceSumSquare", "ReduceProd", "ReduceSum", "ReduceMax")


@register
@dataclass(frozen=True)
class Reduce(Operator):
    """Sums, products, extremes and norms over axes; the global pools are reductions over the spatial ones.

    Source: ONNX ReduceSum/Mean/Prod/Max/Min/L1/L2/SumSquare/LogSum/LogSumExp (1, 11, 12, 13, 18, 20),
    GlobalAveragePool, GlobalMaxPool (1, 22).  Without axes but with noop_with_empty_axes, what does not
    reduce still happens (squares, logarithms), as in onnxruntime.
    """

    op_types: ClassVar[tuple[str, ...]] = (*_MERGES, *_GLOBAL)
    examples: ClassVar[tuple[Example, ...]] = (
        Example("ReduceSum", ((2, 3, 7, 5), np.array([2], np.int64)), {"keepdims": 1}),
        Example("ReduceSum", ((2, 3, 7, 5),), {"axes": [0, 2], "keepdims": 0}, opset=11),
        Example("ReduceMean", ((2, 3, 7, 5),), {"axes": [-1, 2], "keepdims": 0}, opset=13),
        Example("ReduceMean", ((2, 3, 7, 5), np.array([1, 3], np.int64)), opset=18),
        Example("ReduceMax", ((1, 2, 7, 5, 3),), {"axes": [2, 3, 4]}, opset=13),
        Example("ReduceMin", ((2, 3, 11),), opset=13),
        Example("ReduceMean", ((2, 3, 7),), {"axes": [2]}, opset=13, dtype=ir.DataType.INT32),
        Example("GlobalAveragePool", ((2, 3, 7, 5),)),
        Example("GlobalMaxPool", ((1, 2, 7, 5, 3),)),
        Example("GlobalMaxPool", ((2, 3, 11),), opset=22),
        *(Example(name, ((2, 3, 7, 5),), {"axes": [3], "keepdims": 0}, opset=8) for name in _FLOATS),
        *(Example(name, ((2, 3, 7, 5), _AXES_2_4)) for name in _FLOATS),
        *(Example(name, ((2, 2, 5, 3, 7), _AXES_2_4), {"keepdims": 0}, opset=20) for name in _FLOATS),
        *(Example(name, ((2, 3, 7),), {"noop_with_empty_axes": 1}, between=(0.1, 2.0))
          for name in (*_FLOATS, "ReduceLogSum", "ReduceMean", "ReduceMin")),
        *(Example("ReduceLogSum", ((2, 3, 7, 5), _AXES_2_4), {"keepdims": keep}, between=(0.1, 2.0))
          for keep in (0, 1)),
        Example("ReduceLogSum", ((2, 3, 9),), {"axes": [0, 2]}, opset=11, between=(0.1, 2.0)),
        Example("ReduceLogSumExp", ((2, 3, 9),), {"axes": [2]}, opset=13, between=(-1000.0, 1000.0)),
        Example("ReduceLogSumExp", ((2, 3, 9), np.array([0, 1], np.int64)), {"keepdims": 0}),
        *(Example(name, ((2, 3, 7, 5), _AXES_2_4), dtype=ir.DataType.INT32)
          for name in _MERGES if name != "ReduceProd"),
        Example("ReduceProd", ((2, 3, 7), np.array([2], np.int64)), dtype=ir.DataType.INT32),
        *(Example(name, ((2, 3, 7), np.array([2], np.int64)), {"keepdims": 0}, dtype=ir.DataType.INT64)
          for name in ("ReduceSum", "ReduceProd", "ReduceMax", "ReduceMin", "ReduceL2")),
        *(Example(name, ((2, 3, 7, 5), _AXES_2_4), dtype=dtype) for name in ("ReduceMax", "ReduceMin")
          for dtype in (ir.DataType.INT8, ir.DataType.UINT8)),
        *(Example(name, ((2, 3, 7, 5), _AXES_2_4), opset=20, dtype=ir.DataType.BOOL)
          for name in ("ReduceMax", "ReduceMin")),
    )

    kind: str
    axes: tuple[int, ...]
    keepdims: bool

    @classmethod
    def read(cls, view: NodeView) -> Self:
        data = view.input(0)
        if view.op_type in _GLOBAL:
            kind, axes, keep = _GLOBAL[view.op_type], tuple(range(2, data.rank)), True
        else:
            kind, axes, keep = view.op_type, _read_axes(view, data.rank), bool(view.int("keepdims", 1))
        shape = tuple(1 if a in axes else n for a, n in enumerate(data.shape) if keep or a not in axes)
        return cls(view.inputs, (TensorType(shape, data.dtype),), kind, axes, keep)

    @property
    def shape_in(self) -> tuple[int, ...]:
        """Extents of the input."""
        data = self.inputs[0]
        assert data is not None
        return data.shape

    def needs(self, output: int = 0) -> Needs:
        shape = self.shape_in
        kept = [a for a in range(len(shape)) if self.keepdims or a not in self.axes]
        own = tuple(whole(shape)[a] if a in self.axes else Need(kept.index(a), identity(n))
                    for a, n in enumerate(shape))
        return (own, *(None for _ in self.inputs[1:]))

    @property
    def reduction(self) -> Reduction | None:
        return Reduction(self.axes) if self.axes else None

    def decompose(self, write: Decomposer, inputs: Sequence[ir.Value | None]) -> ir.Value:
        x = inputs[0]
        assert x is not None
        dtype, (partial, merge) = self.outputs[0].dtype, _MERGES[self.kind]
        if merge in ("max", "min"):
            return write.all_reduce(merge, [write.reduce(partial, x, self.axes, self.keepdims)])[0]
        x = cast(write, x, wide_type(dtype))
        if self.kind == "ReduceLogSumExp":
            return cast(write, self._log_sum_exp(write, x), dtype)
        (result,) = write.all_reduce(merge, [write.reduce(partial, x, self.axes, self.keepdims)])
        if self.kind in ("ReduceL2", "ReduceLogSum"):
            result = through_float(write, "Sqrt" if self.kind == "ReduceL2" else "Log", result)
        if self.kind == "ReduceMean":
            cells = math.prod(self.shape_in[a] for a in self.axes)
            (result,) = write.op("Div", [result, number(write, cells, type_of(x))])
        return cast(write, result, dtype)

    def _log_sum_exp(self, write: Decomposer, x: ir.Value) -> ir.Value:
        """Relative to the maximum, so that no power overflows."""
        (highest,) = write.all_reduce("max", [write.reduce("ReduceMax", x, self.axes, True)])
        if type_of(x).is_floating_point():
            limits = np.finfo(type_of(x).numpy() if write.opset >= 11 else np.float32)
            highest = clip(write, highest, float(limits.min), float(limits.max))
        powers = through_float(write, "Exp", write.op("Sub", [x, highest])[0])
        (total,) = write.all_reduce("sum", [write.reduce("ReduceSum", powers, self.axes, True)])
        (result,) = write.op("Add", [through_float(write, "Log", total), highest])
        if self.keepdims:
            return result
        return squeezed(write, result, self.axes)

    def backward(self, ins: Sequence[float], outs: Sequence[float]) -> Backward:
        kept = _KEPT.get(self.kind, ((), ()))
        if not self.axes and self.kind in ("ReduceSum", "ReduceProd", "ReduceMax", "ReduceMin"):
            return Backward(shares=True, hands_on=True)
        if not self.axes:
            kept = _KEPT_OF_NO_AXES.get(self.kind, kept)
        powers = self.outputs[0].itemsize * ins[0] if self.kind == "ReduceLogSumExp" else 0.0
        return Backward(*kept, beside=powers)

    def run(self, call: Call) -> tuple[torch.Tensor, ...]:
        dtype = self.outputs[0].dtype
        result = reduced(self.kind, call.tensor(0).to(torch_dtype(wide_type(dtype))), self.axes, self.keepdims)
        return (result.to(torch_dtype(dtype)),)

    def emit(self, emitter: Emitter, names: Sequence[str | None], boxes: Sequence[Box | None],
             outs: Sequence[Box]) -> tuple[str, ...]:
        name = names[0]
        assert name is not None
        if not self.axes:
            return emitter.same(names, 1)
        return (emitter.reduce(self.kind, name, self.axes, self.keepdims),)


def _read_axes(view: NodeView, rank: int) -> tuple[int, ...]:
    given = view.ints("axes")
    if given is None:
        array = view.constant(1, "axes")
        given = None if array is None else tuple(int(a) for a in array.reshape(-1))
    if not given:
        return () if view.int("noop_with_empty_axes", 0) else tuple(range(rank))
    if any(not -rank <= a < rank for a in given):
        raise Unsupported(f"axes {list(given)} on a tensor of {rank} axes; correct the file")
    return tuple(sorted({a % rank for a in given}))


_KEPT: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    **dict.fromkeys(("ReduceMax", "ReduceMin", "ReduceL2", "ReduceProd"), ((0,), (0,))),
    **dict.fromkeys(("ReduceL1", "ReduceSumSquare", "ReduceLogSumExp"), ((0,), ())),
}
"""Inputs and outputs that autograd keeps; nothing large for the others."""

_KEPT_OF_NO_AXES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "ReduceLogSum": ((0,), ()), "ReduceLogSumExp": ((), ())}


# --- kernels -----------------------------------------------------------------------------------------


def reduced(kind: str, x: torch.Tensor, axes: Sequence[int], keepdims: bool = True) -> torch.Tensor:
    """A reduction of a local tensor, of no cells too; its bits do not depend on the thread count."""
    if kind == "ReduceLogSumExp":
        result = _log_sum_exp(x, axes)
    else:
        before, core, after = _STEPS.get(kind, ("", kind, ""))
        result = _core(core, _through(before, x), axes)
        result = _mean(result, x, axes) if after == "mean" else _through(after, result)
    if keepdims or not axes:
        return result
    return result.reshape([n for a, n in enumerate(result.shape) if a not in axes])


_STEPS = {
    "ReduceMean": ("", "ReduceSum", "mean"),
    "ReduceL1": ("abs", "ReduceSum", ""),
    "ReduceL2": ("square", "ReduceSum", "sqrt"),
    "ReduceSumSquare": ("square", "ReduceSum", ""),
    "ReduceLogSum": ("", "ReduceSum", "log"),
}
"""What happens to every cell, the reduction itself, and what happens to its result."""


def _through(name: str, x: torch.Tensor) -> torch.Tensor:
    """A function of every cell; of integers in float64 and rounded towards zero, as onnxruntime does."""
    if not name:
        return x
    if name in ("abs", "square") or x.is_floating_point():
        return getattr(torch, name)(x)
    return getattr(torch, name)(x.double()).to(x.dtype)


def _mean(total: torch.Tensor, x: torch.Tensor, axes: Sequence[int]) -> torch.Tensor:
    rounding = None if x.is_floating_point() else "trunc"
    return torch.div(total, math.prod(x.shape[a] for a in axes), rounding_mode=rounding)


def _log_sum_exp(x: torch.Tensor, axes: Sequence[int]) -> torch.Tensor:
    highest = _core("ReduceMax", x, axes).detach()
    if x.is_floating_point():
        highest = highest.clamp(torch.finfo(x.dtype).min, torch.finfo(x.dtype).max)
    return _through("log", _core("ReduceSum", _through("exp", x - highest), axes)) + highest


def _sum(x: torch.Tensor, axes: Sequence[int]) -> torch.Tensor:
    return x.sum(tuple(axes), keepdim=True, dtype=x.dtype)


def _prod(x: torch.Tensor, axes: Sequence[int]) -> torch.Tensor:
    for axis in axes:
        x = x.prod(axis, keepdim=True, dtype=x.dtype)
    return x


def _max(x: torch.Tensor, axes: Sequence[int]) -> torch.Tensor:
    if x.numel() == 0:  # torch refuses the maximum of nothing: an empty shard never wins
        return _filled(x, axes, False if x.dtype == torch.bool else lowest(x.dtype))
    return torch.amax(x, tuple(axes), keepdim=True)


def _min(x: torch.Tensor, axes: Sequence[int]) -> torch.Tensor:
    if x.numel() == 0:
        return _filled(x, axes, True if x.dtype == torch.bool else largest(x.dtype))
    return torch.amin(x, tuple(axes), keepdim=True)


def largest(dtype: torch.dtype) -> float:
    """The value that never wins a minimum."""
    return float("inf") if dtype.is_floating_point else torch.iinfo(dtype).max


def _filled(x: torch.Tensor, axes: Sequence[int], value: float) -> torch.Tensor:
    shape = [1 if a in axes else n for a, n in enumerate(x.shape)]
    return torch.full(shape, value, dtype=x.dtype, device=x.device)


_CORES = {"ReduceSum": _sum, "ReduceProd": _prod, "ReduceMax": _max, "ReduceMin": _min}


def _core(kind: str, x: torch.Tensor, axes: Sequence[int]) -> torch.Tensor:
    """Slices along the first axis first, then over them: the bits do not depend on the thread count."""
    if not axes:
        return x
    first, *others = axes
    if kind == "ReduceSum" and suit(x, axes):
        return _over(kind, as_slices(sums(*rows_of(x)), x), [first])
    return _over(kind, _over(kind, x, others) if others else x, [first])


def _over(kind: str, x: torch.Tensor, axes: Sequence[int]) -> torch.Tensor:
    """torch splits a reduction to one cell, and vectors across the cells that stay, differently among threads."""
    alone = x.numel() <= math.prod(x.shape[a] for a in axes)
    across = x.is_floating_point() and kind in ("ReduceSum", "ReduceProd") and not _are_innermost(x, axes)
    with one_thread(x, needed=alone or across):
        return _CORES[kind](x, axes)


def _are_innermost(x: torch.Tensor, axes: Sequence[int]) -> bool:
    """Whether the cells that are added up lie closer together than the others."""
    steps = [(x.stride(a), a in axes) for a in range(x.dim()) if x.shape[a] > 1]
    farthest = max((step for step, inside in steps if inside), default=0)
    return all(step > farthest for step, inside in steps if not inside)
