"""Normalisations, and the two halves into which their statistics split over shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
import onnx_ir as ir

from partitioner import dialect
from partitioner.dialect import DOMAIN
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
    aligned,
    statistics,
    whole,
)
from partitioner.ops.dtypes import torch_dtype
from partitioner.ops.kernels.decomposing import merged_moments, type_of, wide_type
from partitioner.ops.kernels.moments import affine, moments, scale_and_shift
from partitioner.ops.registry import register

if TYPE_CHECKING:
    import torch

    from partitioner.ops.emitter import Emitter
else:
    from partitioner.lazy import torch


def _per_channel(shape: Sequence[int]) -> tuple[Need, ...]:
    """A vector of one number per channel, needed for the channels that are computed."""
    return (Need(1, identity(shape[1])),)


def per_channel(vector: torch.Tensor, rank: int) -> torch.Tensor:
    """One number per channel, with an axis of extent 1 for every other one."""
    return vector.reshape(1, -1, *(1,) * (rank - 2))


def is_centred(shape: Sequence[int]) -> bool:
    """Whether statistics over the last axis of a batch's signals keep the deviations from the mean."""
    return len(shape) == 3 and shape[0] > 1


@register
@dataclass(frozen=True)
class BatchNormalization(Operator):
    """Normalisation by stored statistics: an affine function per channel.

    Source: ONNX BatchNormalization (7, 9, 14, 15), inference.
    """

    op_types: ClassVar[tuple[str, ...]] = ("BatchNormalization",)
    examples: ClassVar[tuple[Example, ...]] = (
        Example("BatchNormalization", ((2, 3, 7, 5), (3,), (3,), (3,), (3,)), {"epsilon": 1e-3}, between=(0.1, 2.0)),
        Example("BatchNormalization", ((1, 2, 7, 5, 3), (2,), (2,), (2,), (2,)), between=(0.1, 2.0)),
    )

    epsilon: float

    @classmethod
    def read(cls, view: NodeView) -> Self:
        if view.int("training_mode", 0) or any(view.used_outputs[1:]):
            raise Unsupported("it computes batch statistics (training mode); export the model in eval mode")
        data = view.input(0)
        if data.rank < 2 or view.input(1).shape != (data.shape[1],):
            raise Unsupported(f"scale of {list(view.input(1).shape)} on input {list(data.shape)}; correct the file")
        return cls(view.inputs, (data,), view.float("epsilon", 1e-5))

    @property
    def writes_into(self) -> bool:
        return True

    def needs(self, output: int = 0) -> Needs:
        shape = self.outputs[0].shape
        return (aligned(shape, shape), *(_per_channel(shape) for _ in self.inputs[1:]))

    def backward(self, ins: Sequence[float], outs: Sequence[float]) -> Backward:
        return Backward(inputs=(0,), workspace=self.outputs[0].itemsize * outs[0])

    def run(self, call: Call) -> tuple[torch.Tensor, ...]:
        x = call.tensor(0)
        scale, bias, mean, variance = (per_channel(call.tensor(i), x.dim()) for i in range(1, 5))
        return (affine(x, *scale_and_shift(scale, bias, mean, variance, self.epsilon), call.into),)


@register
@dataclass(frozen=True)
class InstanceNormalization(Operator):
    """Normalisation of every channel of every case by its own mean and variance over the spatial axes.

    Source: ONNX InstanceNormalization (1, 6, 22).
    """

    op_types: ClassVar[tuple[str, ...]] = ("InstanceNormalization",)
    examples: ClassVar[tuple[Example, ...]] = (
        Example("InstanceNormalization", ((2, 3, 11), (3,), (3,)), {"epsilon": 1e-3}),
        Example("InstanceNormalization", ((1, 2, 7, 5, 9), (2,), (2,))),
    )

    epsilon: float

    @classmethod
    def read(cls, view: NodeView) -> Self:
        data = view.input(0)
        if data.rank < 3:
            raise Unsupported(f"its input has {data.rank} axes; at least one spatial axis is needed")
        return cls(view.inputs, (data,), view.float("epsilon", 1e-5))

    @property
    def writes_into(self) -> bool:
        return True

    def needs(self, output: int = 0) -> Needs:
        shape = self.outputs[0].shape
        leading = (Need(0, identity(shape[0])), Need(1, identity(shape[1])))
        own = (*leading, *(statistics(a, n) for a, n in enumerate(shape) if a >= 2))
        return (own, _per_channel(shape), _per_channel(shape))

    @property
    def reduction(self) -> Reduction:
        return Reduction(tuple(range(2, self.outputs[0].rank)))

    def decompose(self, write: Decomposer, inputs: Sequence[ir.Value | None]) -> ir.Value:
        x, scale, bias = inputs
        assert x is not None
        (data,) = self.outputs
        merged = merged_moments(write, x, data.shape, self.reduction.axes, wide_type(data.dtype))
        return normalize(write, [x, *merged, scale, bias], self.epsilon)

    def backward(self, ins: Sequence[float], outs: Sequence[float]) -> Backward:
        word = self.outputs[0].itemsize * outs[0]
        return Backward(inputs=(0,), beside=word if is_centred(self.outputs[0].shape) else 0.0, workspace=word)

    def run(self, call: Call) -> tuple[torch.Tensor, ...]:
        x = call.tensor(0)
        kept = torch_dtype(wide_type(self.outputs[0].dtype))
        count, mean, m2 = moments(x.to(kept), self.reduction.axes)
        scale, bias = (per_channel(call.tensor(i), x.dim()).to(kept) for i in (1, 2))
        return (affine(x, *scale_and_shift(scale, bias, mean, m2 / count, self.epsilon), call.into),)


def normalize(write: Decomposer, inputs: Sequence[ir.Value | None], epsilon: float) -> ir.Value:
    """A `Normalize` node of x, count, mean, M2, scale and bias."""
    x, _, mean, *_ = inputs
    assert x is not None and mean is not None
    dtype = type_of(mean)
    attributes = {
        "epsilon": np.asarray(epsilon, dtype.numpy()),
        "dtype": int(dtype),
        "spatial": list(range(1, len(dialect.shape_of(x)) - 1)),
        "to": int(type_of(x)),
    }
    return write.op("Normalize", inputs, attributes, domain=DOMAIN)[0]


@register
@dataclass(frozen=True)
class LocalMoments(Operator):
    """Count, mean and sum of squared deviations over this shard; `AllReduceMoments` merges them.

    Source: the first half of a normalisation, put in by the pass that splits reductions.
    """

    op_types: ClassVar[tuple[str, ...]] = ("Moments",)
    domain: ClassVar[str] = DOMAIN

    axes: tuple[int, ...]

    @classmethod
    def read(cls, view: NodeView) -> Self:
        data, axes = view.input(0), view.ints("axes") or ()
        shape = tuple(1 if a in axes else n for a, n in enumerate(data.shape))
        reduced = TensorType(shape, ir.DataType(view.int("dtype", int(data.dtype))))
        return cls(view.inputs, (TensorType((), ir.DataType.INT64), reduced, reduced), axes)

    def needs(self, output: int = 0) -> Needs:
        data = self.inputs[0]
        assert data is not None
        if output == 0:  # the count is known from the extents alone
            return (None,)
        return (tuple(whole(data.shape)[a] if a in self.axes else Need(a, identity(n))
                      for a, n in enumerate(data.shape)),)

    @property
    def reduction(self) -> Reduction:
        return Reduction(self.axes)

    def backward(self, ins: Sequence[float], outs: Sequence[float]) -> Backward:
        data = self.inputs[0]
        assert data is not None
        return Backward(inputs=(0,))

    def run(self, call: Call) -> tuple[torch.Tensor, ...]:
        x, out = call.tensor(0).to(torch_dtype(self.outputs[1].dtype)), call.outs[1]
        if not out:  # no case or channel of its own: nothing to count
            empty = x.new_zeros(out.shape)
            return x.new_zeros((), dtype=torch.int64), empty, empty.clone()
        return moments(x, self.axes)

    def emit(self, emitter: Emitter, names: Sequence[str | None], boxes: Sequence[Box | None],
             outs: Sequence[Box]) -> tuple[str, ...]:
        box, x = boxes[0], names[0]
        assert box is not None and x is not None
        count = 1
        for axis in self.axes:
            count *= box.shape[axis]
        return emitter.same([x], 3, {"count": ir.tensor(np.asarray(count, np.float64))})


@register
@dataclass(frozen=True)
class Normalize(Operator):
    """(x - mean) / sqrt(M2 / count + epsilon) * scale + bias, with merged moments.

    Source: the second half of a normalisation, put in by the pass that splits reductions.
    """

    op_types: ClassVar[tuple[str, ...]] = ("Normalize",)
    domain: ClassVar[str] = DOMAIN

    epsilon: float

    @classmethod
    def read(cls, view: NodeView) -> Self:
        return cls(view.inputs, (view.input(0),), view.float("epsilon", 1e-5))

    @property
    def writes_into(self) -> bool:
        return True

    def needs(self, output: int = 0) -> Needs:
        shape = self.outputs[0].shape
        _, count, mean, m2, *_ = self.inputs
        assert count and mean and m2
        return (aligned(shape, shape), whole(count.shape), aligned(mean.shape, shape),
                aligned(m2.shape, shape), _per_channel(shape), _per_channel(shape))

    def backward(self, ins: Sequence[float], outs: Sequence[float]) -> Backward:
        return Backward(inputs=(0,), workspace=self.outputs[0].itemsize * outs[0])

    def run(self, call: Call) -> tuple[torch.Tensor, ...]:
        x, count, mean, m2 = (call.tensor(i) for i in range(4))
        scale, bias = (per_channel(call.tensor(i), x.dim()).to(mean.dtype) for i in (4, 5))
        return (affine(x, *scale_and_shift(scale, bias, mean, m2 / count, self.epsilon), call.into),)
