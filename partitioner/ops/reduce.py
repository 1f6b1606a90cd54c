"""Reductions over axes, global pools and softmax: local partials, one merge, a local finish when sharded."""

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
    statistics,
    whole,
)
from partitioner.ops.pool import lowest
from partitioner.ops.registry import register
from partitioner.ops.threads import one_thread

if TYPE_CHECKING:
    import torch

    from partitioner.ops.emitter import Emitter
else:
    from partitioner.lazy import torch

_GLOBAL = {"GlobalAveragePool": "ReduceMean", "GlobalMaxPool": "ReduceMax"}
_MERGES = {"ReduceSum": "sum", "ReduceMean": "sum", "ReduceMax": "max", "ReduceMin": "min"}


@register
@dataclass(frozen=True)
class Reduce(Operator):
    """Sum, mean, maximum or minimum over axes; the global pools are reductions over the spatial ones.

    Source: ONNX ReduceSum/Mean/Max/Min (1 to 20), GlobalAveragePool, GlobalMaxPool (1, 22).
    """

    op_types: ClassVar[tuple[str, ...]] = (*_MERGES, *_GLOBAL)
    examples: ClassVar[tuple[Example, ...]] = (
        Example("ReduceSum", ((2, 3, 7, 5), np.array([2], np.int64)), {"keepdims": 1}),
        Example("ReduceMean", ((2, 3, 7, 5),), {"axes": [-1, 2], "keepdims": 0}, opset=13),
        Example("ReduceMean", ((2, 3, 7, 5), np.array([1, 3], np.int64)), opset=18),
        Example("ReduceMax", ((1, 2, 7, 5, 3),), {"axes": [2, 3, 4]}, opset=13),
        Example("ReduceMin", ((2, 3, 11),), opset=13),
        Example("ReduceMean", ((2, 3, 7),), {"axes": [2]}, opset=13, dtype=ir.DataType.INT32),
        Example("GlobalAveragePool", ((2, 3, 7, 5),)),
        Example("GlobalMaxPool", ((1, 2, 7, 5, 3),)),
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
        local = "ReduceSum" if self.kind == "ReduceMean" else self.kind
        partial = write.reduce(local, x, self.axes, self.keepdims)
        (merged,) = write.all_reduce(_MERGES[self.kind], [partial])
        if self.kind != "ReduceMean":
            return merged
        count = np.asarray(math.prod(self.shape_in[a] for a in self.axes), self.outputs[0].dtype.numpy())
        return write.op("Div", [merged, write.constant(count)])[0]

    def run(self, call: Call) -> tuple[torch.Tensor, ...]:
        x = call.tensor(0)
        if not self.axes:
            return (x,)
        result = _reduce(self.kind, x, self.axes)
        if not self.keepdims:
            result = result.reshape([n for a, n in enumerate(result.shape) if a not in self.axes])
        return (result,)

    def emit(self, emitter: Emitter, names: Sequence[str | None], boxes: Sequence[Box | None],
             outs: Sequence[Box]) -> tuple[str, ...]:
        name = names[0]
        assert name is not None
        if not self.axes:
            return (emitter.op("Identity", [name]),)
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


def _sum(x: torch.Tensor, axes: Sequence[int]) -> torch.Tensor:
    return x.sum(tuple(axes), keepdim=True, dtype=x.dtype)


def _max(x: torch.Tensor, axes: Sequence[int]) -> torch.Tensor:
    if x.numel() == 0:  # torch refuses the maximum of nothing: an empty shard never wins
        return _filled(x, axes, lowest(x.dtype))
    return torch.amax(x, tuple(axes), keepdim=True)


def _min(x: torch.Tensor, axes: Sequence[int]) -> torch.Tensor:
    if x.numel() == 0:
        return _filled(x, axes, float("inf") if x.dtype.is_floating_point else float(torch.iinfo(x.dtype).max))
    return torch.amin(x, tuple(axes), keepdim=True)


def _filled(x: torch.Tensor, axes: Sequence[int], value: float) -> torch.Tensor:
    shape = [1 if a in axes else n for a, n in enumerate(x.shape)]
    return torch.full(shape, value, dtype=x.dtype, device=x.device)


_KERNELS = {"ReduceSum": _sum, "ReduceMean": _sum, "ReduceMax": _max, "ReduceMin": _min}


def _reduce(kind: str, x: torch.Tensor, axes: Sequence[int]) -> torch.Tensor:
    """Slices along the first axis first, then over them: the bits do not depend on the thread count."""
    kernel = _KERNELS[kind]
    first, *others = axes
    with one_thread(x, needed=x.numel() <= x.shape[first] * math.prod(x.shape[a] for a in others)):
        result = kernel(kernel(x, others), [first]) if others else kernel(x, [first])
    if kind != "ReduceMean":
        return result
    rounding = None if x.is_floating_point() else "trunc"
    return torch.div(result, math.prod(x.shape[a] for a in axes), rounding_mode=rounding)


@register
@dataclass(frozen=True)
class Softmax(Operator):
    """Softmax and LogSoftmax; before opset 13 over all axes from `axis` on.

    Source: ONNX Softmax, LogSoftmax (1, 11, 13).
    """

    op_types: ClassVar[tuple[str, ...]] = ("Softmax", "LogSoftmax")
    examples: ClassVar[tuple[Example, ...]] = (
        Example("Softmax", ((2, 3, 7, 5),), {"axis": 1}),
        Example("Softmax", ((2, 3, 7, 5),), {"axis": 2}),
        Example("Softmax", ((2, 3, 7),), opset=11),
        Example("LogSoftmax", ((2, 3, 7),), {"axis": -1}),
    )

    axes: tuple[int, ...]
    logarithm: bool

    @classmethod
    def read(cls, view: NodeView) -> Self:
        data = view.input(0)
        axis = view.int("axis", -1 if view.version >= 13 else 1)
        if not -data.rank <= axis < data.rank:
            raise Unsupported(f"axis {axis} on a tensor of {data.rank} axes; correct the file")
        axis %= data.rank
        axes = (axis,) if view.version >= 13 else tuple(range(axis, data.rank))
        return cls(view.inputs, (data,), axes, view.op_type == "LogSoftmax")

    def needs(self, output: int = 0) -> Needs:
        shape = self.outputs[0].shape
        return (tuple(statistics(a, n) if a in self.axes else Need(a, identity(n)) for a, n in enumerate(shape)),)

    @property
    def reduction(self) -> Reduction:
        return Reduction(self.axes)

    def decompose(self, write: Decomposer, inputs: Sequence[ir.Value | None]) -> ir.Value:
        x = inputs[0]
        assert x is not None
        (highest,) = write.all_reduce("max", [write.reduce("ReduceMax", x, self.axes, True)])
        (shifted,) = write.op("Sub", [x, highest])
        (powers,) = write.op("Exp", [shifted])
        (total,) = write.all_reduce("sum", [write.reduce("ReduceSum", powers, self.axes, True)])
        if not self.logarithm:
            return write.op("Div", [powers, total])[0]
        return write.op("Sub", [shifted, write.op("Log", [total])[0]])[0]

    def run(self, call: Call) -> tuple[torch.Tensor, ...]:
        x = call.tensor(0)
        if len(self.axes) == 1:
            axis = self.axes[0]
            return (torch.log_softmax(x, axis) if self.logarithm else torch.softmax(x, axis),)
        flat = x.flatten(self.axes[0])
        result = torch.log_softmax(flat, -1) if self.logarithm else torch.softmax(flat, -1)
        return (result.reshape(x.shape),)

    def flops(self, out: float) -> float:
        return 5 * out
