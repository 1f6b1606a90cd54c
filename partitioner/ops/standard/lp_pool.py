"""Pools by a p-norm: over windows, or over all spatial axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

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
from partitioner.ops.kernels.decomposing import cast, merged_sum, number, wide_type
from partitioner.ops.kernels.powers import power
from partitioner.ops.kernels.windows import local_padding, read_windows
from partitioner.ops.registry import register
from partitioner.ops.standard.pool import Pool
from partitioner.ops.standard.reduce import reduced

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as functional

    from partitioner.ops.emitter import Emitter
else:
    from partitioner.lazy import functional


def _read_p(view: NodeView) -> float:
    p = view.float("p", 2.0)  # an integer from opset 2 on
    if p < 1:
        raise Unsupported(f"p is {p}, no norm; correct the file")
    return p


@register
@dataclass(frozen=True)
class LpPool(Pool):
    """p-norm of the cells under a window; padding counts as 0.

    Source: ONNX LpPool (1, 2, 11, 18, 22).
    """

    op_types: ClassVar[tuple[str, ...]] = ("LpPool",)
    examples: ClassVar[tuple[Example, ...]] = (
        Example("LpPool", ((1, 2, 13),), {"kernel_shape": [2], "strides": [2]}, opset=9),
        Example("LpPool", ((2, 2, 9, 10),), {"kernel_shape": [3, 2], "strides": [2, 3], "pads": [1, 0, 1, 1]},
                opset=11),
        Example("LpPool", ((1, 1, 7, 6, 9),), {"kernel_shape": [3, 3, 2], "pads": [1, 2, 0, 2, 1, 1], "p": 1}),
        Example("LpPool", ((1, 2, 11),), {"kernel_shape": [3], "dilations": [2], "pads": [1, 2], "p": 3}, opset=18),
        Example("LpPool", ((1, 2, 10),), {"kernel_shape": [3], "strides": [2], "ceil_mode": 1}, opset=22),
        Example("LpPool", ((1, 2, 10, 7),), {"kernel_shape": [3, 2], "strides": [2, 2], "ceil_mode": 1,
                                             "pads": [1, 0, 1, 1]}, opset=22),
        Example("LpPool", ((2, 1, 9, 10),), {"kernel_shape": [3, 2], "auto_pad": "SAME_LOWER"}, opset=22),
        Example("LpPool", ((2, 1, 9, 10),), {"kernel_shape": [3, 2], "auto_pad": "SAME_UPPER", "strides": [2, 3]},
                opset=11),
        Example("LpPool", ((2, 1, 9, 10),), {"kernel_shape": [2, 2], "auto_pad": "VALID"}, opset=9),
    )

    p: float

    @classmethod
    def read(cls, view: NodeView) -> Self:
        data, kernel = view.input(0), view.ints("kernel_shape")
        if not 3 <= data.rank <= 5 or kernel is None:
            raise Unsupported(f"its input has {data.rank} axes, kernel_shape is {kernel}; 3 to 5 axes (batch, "
                              "channel, 1 to 3 spatial) and a kernel_shape are needed")
        windows, ends = read_windows(view, data.shape[2:], kernel, ceil_mode=bool(view.int("ceil_mode", 0)),
                             pooling=True)
        shape = (*data.shape[:2], *(w.n_out for w in windows))
        return cls(view.inputs, (TensorType(shape, data.dtype),), windows, ends, _read_p(view))

    def backward(self, ins: Sequence[float], outs: Sequence[float]) -> Backward:
        word = self.outputs[0].itemsize
        if self.p == 1:
            return Backward(inputs=(0,))
        if self.p == 2:
            return Backward(inputs=(0,), outputs=(0,), beside=word * ins[0])
        return Backward(inputs=(0,), beside=word * (ins[0] + outs[0]))

    def run(self, call: Call) -> tuple[torch.Tensor, ...]:
        x = call.tensor(0)
        total = power(x.to(torch_dtype(wide_type(self.outputs[0].dtype))).abs(), self.p)
        helds, outs = call.box(0).intervals()[2:], call.outs[0].intervals()[2:]
        for axis, (window, held, out) in enumerate(zip(self.windows, helds, outs, strict=True)):
            lo, hi = local_padding(window, held, out)
            total = functional.pad(total, [*[0, 0] * (len(outs) - 1 - axis), lo, hi])
            reach = (len(out) - 1) * window.stride + 1
            taps = [total.narrow(axis + 2, t * window.dilation, reach) for t in range(window.kernel)]
            total = taps[0].clone()
            for tap in taps[1:]:
                total = total + tap
            if window.stride > 1:
                places = [slice(None)] * total.dim()
                places[axis + 2] = slice(None, None, window.stride)
                total = total[tuple(places)]
        return (power(total, 1 / self.p).to(x.dtype),)

    def emit(self, emitter: Emitter, names: Sequence[str | None], boxes: Sequence[Box | None],
             outs: Sequence[Box]) -> tuple[str, ...]:
        name, box = names[0], boxes[0]
        if name is None:  # nothing but padding
            return (emitter.zeros(outs[0].shape, self.outputs[0].dtype),)
        assert box is not None
        lo, hi = self._local_pads(box, outs[0])
        drop = ("auto_pad", "ceil_mode")
        if self._node_pads(lo, hi):
            return emitter.same([name], 1, {"pads": [*lo, *hi]}, drop=drop)
        padded = emitter.pad(name, [0, 0, *lo], [0, 0, *hi])
        return emitter.same([padded], 1, {"pads": [0] * len(lo + hi)}, drop=drop)

    def workspace(self, ins: Sequence[float], outs: Sequence[float]) -> float:
        return 2 * ins[0] * self.outputs[0].itemsize


@register
@dataclass(frozen=True)
class GlobalLpPool(Operator):
    """p-norm of all cells of a channel.

    Source: ONNX GlobalLpPool (1, 2, 22).
    """

    op_types: ClassVar[tuple[str, ...]] = ("GlobalLpPool",)
    examples: ClassVar[tuple[Example, ...]] = (
        Example("GlobalLpPool", ((2, 3, 7, 5),)),
        Example("GlobalLpPool", ((2, 3, 11),), {"p": 1}),
        Example("GlobalLpPool", ((1, 2, 5, 3, 7),), {"p": 3}, opset=9),
    )

    p: float

    @classmethod
    def read(cls, view: NodeView) -> Self:
        data = view.input(0)
        if data.rank < 3:
            raise Unsupported(f"its input has {data.rank} axes; at least one spatial axis is needed")
        shape = (*data.shape[:2], *[1] * (data.rank - 2))
        return cls(view.inputs, (TensorType(shape, data.dtype),), _read_p(view))

    @property
    def reduction(self) -> Reduction:
        return Reduction(tuple(range(2, self.outputs[0].rank)))

    def needs(self, output: int = 0) -> Needs:
        data = self.inputs[0]
        assert data is not None
        return (tuple(Need(a, identity(n)) if a < 2 else whole(data.shape)[a] for a, n in enumerate(data.shape)),)

    def decompose(self, write: Decomposer, inputs: Sequence[ir.Value | None]) -> ir.Value:
        assert inputs[0] is not None
        dtype, axes = self.outputs[0].dtype, self.reduction.axes
        wide = wide_type(dtype)
        x = cast(write, inputs[0], wide)
        if self.p == 1:
            return cast(write, merged_sum(write, "ReduceL1", x, axes), dtype)
        if self.p == 2:
            (root,) = write.op("Sqrt", [merged_sum(write, "ReduceSumSquare", x, axes)])
            return cast(write, root, dtype)
        (powers,) = write.op("Pow", [*write.op("Abs", [x]), number(write, self.p, wide)])
        (root,) = write.op("Pow", [merged_sum(write, "ReduceSum", powers, axes), number(write, 1 / self.p, wide)])
        return cast(write, root, dtype)

    def backward(self, ins: Sequence[float], outs: Sequence[float]) -> Backward:
        word = self.outputs[0].itemsize
        return Backward(inputs=(0,), outputs=(0,) if self.p == 2 else (), beside=0.0 if self.p == 1 else word * ins[0])

    def run(self, call: Call) -> tuple[torch.Tensor, ...]:
        x = call.tensor(0)
        wide = x.to(torch_dtype(wide_type(self.outputs[0].dtype)))
        total = reduced("ReduceSum", power(wide.abs(), self.p), self.reduction.axes)
        return (power(total, 1 / self.p).to(x.dtype),)
