"""Group normalisation: the moments of channels, merged into those of groups."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
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
    Unsupported,
    statistics,
    whole,
)
from partitioner.ops.dtypes import torch_dtype
from partitioner.ops.kernels.decomposing import merged_moments, number, type_of, wide_type
from partitioner.ops.kernels.moments import affine, group_moments, moments, scale_and_shift
from partitioner.ops.registry import register
from partitioner.ops.standard.norm import is_centred, normalize, per_channel

if TYPE_CHECKING:
    import torch


@register
@dataclass(frozen=True)
class GroupNormalization(Operator):
    """Normalisation of every group of channels of every case by its own mean and variance.

    onnx's checker refuses opset 18's definition (it is marked as deprecated); onnxruntime runs it.
    16-bit floats are computed in float32 throughout, whatever stash_type says (ONNX before opset 21 and
    onnxruntime round in between).

    Source: ONNX GroupNormalization (18: scale and bias per group, 21: per channel).
    """

    op_types: ClassVar[tuple[str, ...]] = ("GroupNormalization",)
    examples: ClassVar[tuple[Example, ...]] = (
        Example("GroupNormalization", ((2, 6, 7, 5), (6,), (6,)), {"num_groups": 2}, opset=21),
        Example("GroupNormalization", ((2, 6, 7, 5), (6,), (6,)), {"num_groups": 3, "epsilon": 1e-2}, opset=21),
        Example("GroupNormalization", ((1, 4, 5, 3, 7), (4,), (4,)), {"num_groups": 1}, opset=21),
        Example("GroupNormalization", ((2, 3, 11), (3,), (3,)), {"num_groups": 3, "stash_type": 1}, opset=21),
        Example("GroupNormalization", ((3, 2, 1, 9), np.array([1, 2], np.float32), np.array([0, -1], np.float32)),
                {"num_groups": 2}, opset=22),
    )

    groups: int
    epsilon: float

    @classmethod
    def read(cls, view: NodeView) -> Self:
        data, groups = view.input(0), view.int("num_groups", 0)
        if data.rank < 3:
            raise Unsupported(f"its input has {data.rank} axes; at least one spatial axis is needed")
        channels = data.shape[1]
        if groups < 1 or channels % groups:
            raise Unsupported(f"{channels} channels are no {groups} groups; correct the file")
        given = groups if view.version < 21 else channels
        if any(view.input(i).shape != (given,) for i in (1, 2)):
            raise Unsupported(f"scale of {list(view.input(1).shape)} for {given} numbers; correct the file")
        return cls(view.inputs, (data,), groups, view.float("epsilon", 1e-5))

    @property
    def writes_into(self) -> bool:
        return True

    @property
    def reduction(self) -> Reduction:
        return Reduction(tuple(range(2, self.outputs[0].rank)))

    def needs(self, output: int = 0) -> Needs:
        shape = self.outputs[0].shape
        spatial = (statistics(a, n) for a, n in enumerate(shape) if a >= 2)
        given = self.inputs[1]
        assert given is not None
        vector = whole(given.shape)
        return ((Need(0, identity(shape[0])), whole(shape)[1], *spatial), vector, vector)

    def decompose(self, write: Decomposer, inputs: Sequence[ir.Value | None]) -> ir.Value:
        x, scale, bias = inputs
        assert x is not None and scale is not None and bias is not None
        (data,) = self.outputs
        _, mean, m2 = merged_moments(write, x, data.shape, self.reduction.axes, wide_type(data.dtype))
        merged = self._group(write, mean, m2)
        return normalize(write, [x, *merged, self._spread(write, scale), self._spread(write, bias)], self.epsilon)

    def _group(self, write: Decomposer, mean: ir.Value, m2: ir.Value) -> list[ir.Value]:
        """`group_moments`, written with nodes."""
        cases, channels, *spatial = self.outputs[0].shape
        each, dtype, cells = channels // self.groups, type_of(mean), math.prod(spatial)
        shape = write.constant(np.asarray([cases, self.groups, each], np.int64))
        back = write.constant(np.asarray([cases, channels, *[1] * len(spatial)], np.int64))
        nothing = write.constant(np.zeros((1, 1, each), dtype.numpy()))
        (means,), (m2s,) = write.op("Reshape", [mean, shape]), write.op("Reshape", [m2, shape])
        centre = write.reduce("ReduceMean", means, [2], True)
        (apart,) = write.op("Sub", [means, centre])
        between = write.reduce("ReduceSum", write.op("Mul", [apart, apart])[0], [2], True)
        (between,) = write.op("Mul", [between, number(write, cells, dtype)])
        (total,) = write.op("Add", [write.reduce("ReduceSum", m2s, [2], True), between])
        spread = [write.op("Add", [v, nothing])[0] for v in (centre, total)]
        return [number(write, cells * each, ir.DataType.INT64), *(write.op("Reshape", [v, back])[0] for v in spread)]

    def _spread(self, write: Decomposer, vector: ir.Value) -> ir.Value:
        """Numbers per group repeated for every channel; numbers per channel as they are."""
        given, channels = self.inputs[1], self.outputs[0].shape[1]
        assert given is not None
        if given.shape == (channels,):
            return vector
        each = channels // self.groups
        (column,) = write.op("Reshape", [vector, write.constant(np.asarray([self.groups, 1], np.int64))])
        (table,) = write.op("Add", [column, write.constant(np.zeros((1, each), type_of(vector).numpy()))])
        return write.op("Reshape", [table, write.constant(np.asarray([channels], np.int64))])[0]

    def backward(self, ins: Sequence[float], outs: Sequence[float]) -> Backward:
        word = self.outputs[0].itemsize * outs[0]
        return Backward(inputs=(0,), beside=word if is_centred(self.outputs[0].shape) else 0.0, workspace=word)

    def run(self, call: Call) -> tuple[torch.Tensor, ...]:
        x = call.tensor(0)
        kept = torch_dtype(wide_type(self.outputs[0].dtype))
        count, mean, m2 = group_moments(moments(x.to(kept), self.reduction.axes), self.groups)
        each = x.shape[1] // call.tensor(1).shape[0]
        scale, bias = (per_channel(call.tensor(i).repeat_interleave(each), x.dim()).to(kept) for i in (1, 2))
        return (affine(x, *scale_and_shift(scale, bias, mean, m2 / count, self.epsilon), call.into),)

    def flops(self, out: float) -> float:
        return 6 * out
