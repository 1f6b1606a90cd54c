"""Where the extreme is: ArgMax, ArgMin and Hardmax; over a sharded axis by a merged extreme and a merged index."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
import onnx_ir as ir

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
from partitioner.ops.kernels.decomposing import cast, number, squeezed, type_of
from partitioner.ops.registry import register
from partitioner.ops.standard.softmax import read_axes

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as functional
else:
    from partitioner.lazy import functional, torch

_SMALL = frozenset({ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT16})


def merged_index(write: Decomposer, x: ir.Value, shape: Sequence[int], axes: Sequence[int], *,
                 smallest: bool = False, last: bool = False) -> ir.Value:
    """Row-major index over `axes` (kept) of the extreme; the first or the last one of equal cells, any of NaN.

    extreme = AllReduce(max of x);  index = AllReduce(min over cells of: ramp where x is the extreme, else far).
    """
    if type_of(x) in _SMALL:  # onnxruntime compares 32 bits and more
        x = cast(write, x, ir.DataType.INT32)
    kind, index_kind = ("min" if smallest else "max"), ("max" if last else "min")
    reduces = {"max": "ReduceMax", "min": "ReduceMin"}
    (extreme,) = write.all_reduce(kind, [write.reduce(reduces[kind], x, axes, True)])
    extents = [n if a in axes else 1 for a, n in enumerate(shape)]
    cells = math.prod(extents)
    ramp = np.arange(cells, dtype=np.int64).reshape(extents)
    places = _choose(write, _is_extreme(write, x, extreme, smallest), ramp, -1 if last else cells)
    return write.all_reduce(index_kind, [write.reduce(reduces[index_kind], places, axes, True)])[0]


def _is_extreme(write: Decomposer, x: ir.Value, extreme: ir.Value, smallest: bool) -> ir.Value:
    if write.opset < 11:  # Equal does not take floating point yet
        return write.op("Not", list(write.op("Greater" if smallest else "Less", [x, extreme])))[0]
    (found,) = write.op("Equal", [x, extreme])
    if not type_of(x).is_floating_point():
        return found
    return write.op("Or", [found, *write.op("IsNaN", [x])])[0]


def _choose(write: Decomposer, chosen: ir.Value, ramp: np.ndarray[tuple[int, ...], np.dtype[np.int64]],
            other: int) -> ir.Value:
    """The ramp where cells are chosen, another number elsewhere."""
    rest = number(write, other, ir.DataType.INT64)
    if write.opset >= 9:
        return write.op("Where", [chosen, write.constant(ramp), rest])[0]
    (offset,) = write.op("Mul", [cast(write, chosen, ir.DataType.INT64), write.constant(ramp - other)])
    return write.op("Add", [offset, rest])[0]


@register
@dataclass(frozen=True)
class ArgExtreme(Operator):
    """Index of the largest or smallest cell along an axis: the first of equal ones, or the last.

    NaN wins, as in numpy; onnxruntime's answer depends on where the NaN stands.

    Source: ONNX ArgMax, ArgMin (1, 11, 12, 13).
    """

    op_types: ClassVar[tuple[str, ...]] = ("ArgMax", "ArgMin")
    examples: ClassVar[tuple[Example, ...]] = tuple(
        example for name in ("ArgMax", "ArgMin") for example in (
            Example(name, ((2, 5, 7, 5),), {"axis": 1, "keepdims": 0}, opset=13),
            Example(name, ((2, 3, 7, 5),), {"axis": 2}, opset=13),
            Example(name, ((3, 2, 7),), opset=11),
            Example(name, ((2, 2, 5, 3, 7),), {"axis": -1, "keepdims": 0}, opset=8),
            Example(name, ((2, 2, 11),), {"axis": 2}, opset=10),
            Example(name, ((2, 3, 29),), {"axis": 2}, opset=12, dtype=ir.DataType.INT32),
            Example(name, ((2, 3, 29),), {"axis": 2, "select_last_index": 1}, dtype=ir.DataType.INT64),
            Example(name, ((2, 3, 17, 5),), {"axis": -2, "select_last_index": 1, "keepdims": 0}, opset=13,
                    dtype=ir.DataType.UINT8),
            Example(name, ((2, 3, 17, 5),), {"axis": 0}, opset=13, dtype=ir.DataType.INT8),
            Example(name, ((2, 9, 5),), {"axis": 1, "select_last_index": 1}, opset=13, dtype=ir.DataType.INT32),
        )
    )

    axis: int
    keepdims: bool
    last: bool
    smallest: bool

    @classmethod
    def read(cls, view: NodeView) -> Self:
        data, axis, keep = view.input(0), view.int("axis", 0), bool(view.int("keepdims", 1))
        if not -data.rank <= axis < data.rank:
            raise Unsupported(f"axis {axis} on a tensor of {data.rank} axes; correct the file")
        axis %= data.rank
        shape = tuple(1 if a == axis else n for a, n in enumerate(data.shape) if keep or a != axis)
        return cls(view.inputs, (TensorType(shape, ir.DataType.INT64),), axis, keep,
                   bool(view.int("select_last_index", 0)), view.op_type == "ArgMin")

    @property
    def reduction(self) -> Reduction:
        return Reduction((self.axis,))

    @property
    def shape_in(self) -> tuple[int, ...]:
        """Extents of the input."""
        data = self.inputs[0]
        assert data is not None
        return data.shape

    def needs(self, output: int = 0) -> Needs:
        shape = self.shape_in
        kept = [a for a in range(len(shape)) if self.keepdims or a != self.axis]
        return (tuple(whole(shape)[a] if a == self.axis else Need(kept.index(a), identity(n))
                      for a, n in enumerate(shape)),)

    def decompose(self, write: Decomposer, inputs: Sequence[ir.Value | None]) -> ir.Value:
        assert inputs[0] is not None
        index = merged_index(write, inputs[0], self.shape_in, [self.axis], smallest=self.smallest, last=self.last)
        if self.keepdims:
            return index
        return squeezed(write, index, [self.axis])

    def run(self, call: Call) -> tuple[torch.Tensor, ...]:
        x = call.tensor(0)
        find = torch.argmin if self.smallest else torch.argmax
        if not self.last:
            return (find(x, self.axis, self.keepdims),)
        return (x.shape[self.axis] - 1 - find(x.flip(self.axis), self.axis, self.keepdims),)

    def flops(self, out: float) -> float:
        return out * self.shape_in[self.axis]


@register
@dataclass(frozen=True)
class Hardmax(Operator):
    """1 at the first largest cell, 0 elsewhere; before opset 13 over all axes from `axis` on.

    Source: ONNX Hardmax (1, 11, 13).
    """

    op_types: ClassVar[tuple[str, ...]] = ("Hardmax",)
    examples: ClassVar[tuple[Example, ...]] = (
        Example("Hardmax", ((2, 3, 7, 5),), {"axis": 1}),
        Example("Hardmax", ((2, 3, 7, 5),), {"axis": 2}),
        Example("Hardmax", ((2, 3, 11),)),
        Example("Hardmax", ((2, 3, 7),), opset=11),
        Example("Hardmax", ((2, 3, 7, 5),), {"axis": 2}, opset=8),
        Example("Hardmax", ((3, 2, 7),), {"axis": 0}, opset=11),
        Example("Hardmax", ((2, 3, 7),), {"axis": 2}, between=(0.0, 0.0)),
    )

    axes: tuple[int, ...]

    @classmethod
    def read(cls, view: NodeView) -> Self:
        return cls(view.inputs, (view.input(0),), read_axes(view))

    @property
    def reduction(self) -> Reduction:
        return Reduction(self.axes)

    def needs(self, output: int = 0) -> Needs:
        shape = self.outputs[0].shape
        return (tuple(statistics(a, n) if a in self.axes else Need(a, identity(n)) for a, n in enumerate(shape)),)

    def decompose(self, write: Decomposer, inputs: Sequence[ir.Value | None]) -> ir.Value:
        assert inputs[0] is not None
        shape = self.outputs[0].shape
        index = merged_index(write, inputs[0], shape, self.axes)
        extents = [n if a in self.axes else 1 for a, n in enumerate(shape)]
        ramp = write.constant(np.arange(math.prod(extents), dtype=np.int64).reshape(extents))
        return cast(write, write.op("Equal", [ramp, index])[0], self.outputs[0].dtype)

    def run(self, call: Call) -> tuple[torch.Tensor, ...]:
        x = call.tensor(0)
        if len(self.axes) == 1:
            (axis,) = self.axes
            return (torch.zeros_like(x).scatter(axis, x.argmax(axis, keepdim=True), 1),)
        flat = x.flatten(self.axes[0])
        return (functional.one_hot(flat.argmax(-1), flat.shape[-1]).to(x.dtype).reshape(x.shape),)
