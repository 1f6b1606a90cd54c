"""Max and average pooling over windows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
import onnx_ir as ir

from partitioner.geometry import Box, Interval
from partitioner.maps import Window, identity
from partitioner.ops.base import Backward, Call, Example, Need, Needs, NodeView, Operator, TensorType, Unsupported
from partitioner.ops.kernels.windows import (
    crop_outputs,
    explicit_pads,
    local_padding,
    needed_end,
    pad_explicitly,
    plan_border,
    read_windows,
    strided_taps,
    window_needs,
)
from partitioner.ops.registry import register

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as functional

    from partitioner.ops.emitter import Emitter
else:
    from partitioner.lazy import functional, torch


@dataclass(frozen=True)
class Pool(Operator):
    """What max and average pooling share: windows on the spatial axes, batch and channel as they are.

    `ends` is the declared padding after each axis; a ceil_mode output may reach beyond it.
    """

    windows: tuple[Window, ...]
    ends: tuple[int, ...]

    def needs(self, output: int = 0) -> Needs:
        shape = self.outputs[0].shape
        leading = (Need(0, identity(shape[0])), Need(1, identity(shape[1])))
        return ((*leading, *window_needs(self.windows)),)

    @property
    def explicit(self) -> Mapping[str, tuple[int, ...]] | None:
        pads = explicit_pads(self.windows)
        largest = [w.kernel for w in self.windows] * 2  # onnxruntime refuses pools that pad a kernel or more
        return pads if all(p < k for p, k in zip(pads["pads"], largest, strict=True)) else None

    def flops(self, out: float) -> float:
        return out * math.prod(w.kernel for w in self.windows)

    def _local_pads(self, box: Box, out: Box) -> tuple[list[int], list[int]]:
        pairs = [
            local_padding(w, h, o)
            for w, h, o in zip(self.windows, box.intervals()[2:], out.intervals()[2:], strict=True)
        ]
        return [lo for lo, _ in pairs], [hi for _, hi in pairs]

    def _node_pads(self, lo: Sequence[int], hi: Sequence[int]) -> bool:
        """Whether a pooling node takes these pads itself: ONNX wants them smaller than the kernel."""
        return all(max(a, b) < w.kernel for w, a, b in zip(self.windows, lo, hi, strict=True))


def _read_pool(view: NodeView) -> tuple[tuple[TensorType], tuple[Window, ...], tuple[int, ...]]:
    data = view.input(0)
    if not 3 <= data.rank <= 5:
        raise Unsupported(f"its input has {data.rank} axes; 3 to 5 (batch, channel, 1 to 3 spatial) are supported")
    kernel = view.ints("kernel_shape")
    if kernel is None:
        raise Unsupported("kernel_shape is missing; correct the file")
    windows, ends = read_windows(view, data.shape[2:], kernel, ceil_mode=bool(view.int("ceil_mode", 0)),
                             pooling=True)
    shape = (*data.shape[:2], *(w.n_out for w in windows))
    return (TensorType(shape, data.dtype),), windows, ends


FEW_TAPS = 8
"""Cells of a window up to which they are compared all at once, in the memory of the result."""


def lowest(dtype: torch.dtype) -> float:
    """The value that never wins a maximum."""
    return float("-inf") if dtype.is_floating_point else float(torch.iinfo(dtype).min)


@register
@dataclass(frozen=True)
class MaxPool(Pool):
    """Maximum over windows; padding never wins.  Indices are flat positions in the whole input, as global cells say.

    Source: ONNX MaxPool (1, 8, 10, 11, 12, 22).

    Args:
        column_major: whether indices count the spatial axes from the first one on (storage_order 1).
    """

    op_types: ClassVar[tuple[str, ...]] = ("MaxPool",)
    examples: ClassVar[tuple[Example, ...]] = (
        Example("MaxPool", ((1, 2, 13),), {"kernel_shape": [2], "strides": [2]}),
        Example("MaxPool", ((1, 2, 9, 11),), {"kernel_shape": [3, 2], "strides": [2, 3], "pads": [1, 0, 1, 1]}),
        Example("MaxPool", ((1, 1, 7, 8, 9),), {"kernel_shape": [3, 3, 2], "dilations": [2, 1, 1], "pads": [1] * 6}),
        Example("MaxPool", ((1, 2, 10),), {"kernel_shape": [3], "strides": [2], "ceil_mode": 1}),
        Example("MaxPool", ((1, 2, 9),), {"kernel_shape": [3], "pads": [1, 2]}, dtype=ir.DataType.INT8),
        Example("MaxPool", ((2, 1, 9, 10),), {"kernel_shape": [3, 2], "auto_pad": "SAME_LOWER"}, outputs=2),
        Example("MaxPool", ((1, 3, 23, 21),), {"kernel_shape": [3, 2], "dilations": [2, 1]}, dtype=ir.DataType.UINT8),
        Example("MaxPool", ((1, 1, 7, 8, 9),), {"kernel_shape": [2, 3, 2], "strides": [1, 2, 1], "pads": [1] * 6},
                dtype=ir.DataType.INT8),
        Example("MaxPool", ((2, 3, 13),), {"kernel_shape": [3], "strides": [2], "pads": [1, 1]}, outputs=2, checked=2),
        Example("MaxPool", ((2, 3, 9, 11),), {"kernel_shape": [3, 4], "strides": [2, 3], "pads": [2, 0, 1, 3]},
                outputs=2, checked=2, opset=11),
        Example("MaxPool", ((2, 3, 9, 7),), {"kernel_shape": [3, 2], "storage_order": 1, "dilations": [2, 3]},
                outputs=2, checked=2, opset=12),
        Example("MaxPool", ((1, 2, 7, 8, 9),), {"kernel_shape": [2, 2, 3], "strides": [2, 2, 2], "ceil_mode": 1,
                                                "storage_order": 1}, outputs=2, checked=2),
        Example("MaxPool", ((2, 3, 9, 7),), {"kernel_shape": [2, 2]}, outputs=2, checked=2, dtype=ir.DataType.UINT8),
    )

    column_major: bool = False

    @classmethod
    def read(cls, view: NodeView) -> Self:
        outputs, windows, ends = _read_pool(view)
        if len(view.used_outputs) > 1 and view.used_outputs[1]:
            outputs = (*outputs, TensorType(outputs[0].shape, ir.DataType.INT64))
        return cls(view.inputs, outputs, windows, ends, bool(view.int("storage_order", 0)))

    def backward(self, ins: Sequence[float], outs: Sequence[float]) -> Backward:
        """Torch keeps 64-bit indices whether they are asked for or not."""
        if len(self.outputs) == 1:
            return Backward(inputs=(0,), beside=8 * outs[0])
        padded = math.prod((w.n_in + w.lo + needed_end(w)) / w.n_in for w in self.windows)
        return Backward(beside=8 * outs[0] + self.outputs[0].itemsize * padded * ins[0])

    @property
    def writes_into(self) -> bool:
        """Of few cells without padding, cell by cell."""
        padded = any(w.lo > 0 or needed_end(w) > 0 for w in self.windows)
        return (len(self.outputs) == 1 and self.outputs[0].dtype.is_floating_point() and not padded
                and 1 < math.prod(w.kernel for w in self.windows) <= FEW_TAPS)

    def run(self, call: Call) -> tuple[torch.Tensor, ...]:
        if len(self.outputs) > 1:
            return self._with_indices(call)
        if self.writes_into and call.tensor(0).device.type == "cpu" and not torch.is_grad_enabled():
            return (self._maximum_of_taps(call),)
        result = self._whole_windows(call)
        return (result if call.into is None else call.into.copy_(result),)

    def _maximum_of_taps(self, call: Call) -> torch.Tensor:
        """Maxima of all cells of a window at once."""
        taps = [call.tensor(0)]
        for axis, (window, out) in enumerate(zip(self.windows, call.outs[0].intervals()[2:], strict=True)):
            taps = [tap for data in taps for tap in strided_taps(data, axis + 2, window, len(out))]
        result = torch.maximum(taps[0], taps[1], out=call.into)
        for tap in taps[2:]:
            torch.maximum(result, tap, out=result)
        return result

    def _whole_windows(self, call: Call) -> torch.Tensor:
        data = call.tensor(0)
        if not data.is_floating_point():  # torch's own counts cells in the element type itself
            return self._integer_maximum(call)
        held, outs = call.box(0).intervals()[2:], call.outs[0].intervals()[2:]
        borders = [plan_border(w, h, o, limit=w.kernel // 2)
                   for w, h, o in zip(self.windows, held, outs, strict=True)]
        if not torch.is_grad_enabled() and data.device.type == "cpu" and not any(b.lo or b.hi for b in borders):
            return self._separate_maximum(data, outs)
        data = pad_explicitly(data, borders, lowest(data.dtype))
        kernel, stride = [w.kernel for w in self.windows], [w.stride for w in self.windows]
        padding, dilation = [b.kernel_pad for b in borders], [w.dilation for w in self.windows]
        pool = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)[len(outs) - 1]
        return crop_outputs(pool(data, kernel, stride, padding, dilation), borders, outs)

    def _separate_maximum(self, data: torch.Tensor, outs: Sequence[Interval]) -> torch.Tensor:
        """Maxima axis by axis of what needs no padding: torch's own pools compute int64 indices, asked or not."""
        for axis, (window, out) in enumerate(zip(self.windows, outs, strict=True)):
            taps = strided_taps(data, axis + 2, window, len(out))
            data = torch.maximum(taps[0], taps[1]) if len(taps) > 1 else taps[0]
            for tap in taps[2:]:
                torch.maximum(data, tap, out=data)
        return data if any(w.kernel > 1 for w in self.windows) else data.clone()

    def _integer_maximum(self, call: Call) -> torch.Tensor:
        """Maxima tap by tap, axis by axis."""
        data, outs = call.tensor(0), call.outs[0].intervals()[2:]
        for axis, (window, have, out) in enumerate(zip(self.windows, call.box(0).intervals()[2:], outs, strict=True)):
            amounts = [0, 0] * (len(outs) - 1 - axis) + list(local_padding(window, have, out))
            data = functional.pad(data, amounts, value=lowest(data.dtype))
            taps = strided_taps(data, axis + 2, window, len(out))
            data = taps[0].clone()
            for tap in taps[1:]:
                torch.maximum(data, tap, out=data)
        return data

    def _with_indices(self, call: Call) -> tuple[torch.Tensor, ...]:
        held, outs = call.box(0).intervals()[2:], call.outs[0].intervals()[2:]
        kind = call.tensor(0).dtype
        data = call.tensor(0) if kind.is_floating_point else call.tensor(0).to(torch.float64)
        pads = [local_padding(w, h, o) for w, h, o in zip(self.windows, held, outs, strict=True)]
        data = functional.pad(data, [p for pair in reversed(pads) for p in pair], value=float("-inf"))
        kernel, stride = [w.kernel for w in self.windows], [w.stride for w in self.windows]
        pool = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)[len(outs) - 1]
        found, local = pool(data, kernel, stride, 0, [w.dilation for w in self.windows], return_indices=True)
        origin = [h.start - lo for h, (lo, _) in zip(held, pads, strict=True)]
        return found.to(kind), self._global_indices(local, data.shape[2:], origin, call.outs[0])

    def _global_indices(self, local: torch.Tensor, extents: Sequence[int], origin: Sequence[int],
                        out: Box) -> torch.Tensor:
        """Positions in the whole input from those in one channel's local cells, which begin at `origin`."""
        steps, (plane, case) = self._steps()
        cells, channels = out.intervals()[0], out.intervals()[1]
        result = torch.zeros_like(local)
        for n, step, start in reversed(list(zip(extents, steps, origin, strict=True))):
            result += (local % n + start) * step
            local = torch.div(local, n, rounding_mode="floor")
        lead = [1] * len(extents)
        result += (torch.arange(channels.start, channels.stop, device=local.device) * plane).reshape(1, -1, *lead)
        return result + (torch.arange(cells.start, cells.stop, device=local.device) * case).reshape(-1, 1, *lead)

    def _steps(self) -> tuple[list[int], tuple[int, int]]:
        """How far apart in the flat input neighbours along each spatial axis are; and channels, and cases."""
        extents = [w.n_in for w in self.windows]
        count = len(extents)
        steps = [math.prod(extents[:a] if self.column_major else extents[a + 1 :]) for a in range(count)]
        return steps, (math.prod(extents), math.prod(extents) * self.outputs[0].shape[1])

    def emit(self, emitter: Emitter, names: Sequence[str | None], boxes: Sequence[Box | None],
             outs: Sequence[Box]) -> tuple[str, ...]:
        name, box = names[0], boxes[0]
        assert box is not None and name is not None
        lo, hi = self._local_pads(box, outs[0])
        if self._node_pads(lo, hi):
            told, extents, origin = [*lo, *hi], box.shape[2:], [h.start for h in box.intervals()[2:]]
        else:
            info = self.outputs[0].dtype
            least = -np.inf if info.is_floating_point() else np.iinfo(info.numpy()).min
            name = emitter.pad(name, [0, 0, *lo], [0, 0, *hi], np.asarray(least, info.numpy()))
            told = [0] * len(lo + hi)
            extents = tuple(a + n + b for a, n, b in zip(lo, box.shape[2:], hi, strict=True))
            origin = [h.start - a for h, a in zip(box.intervals()[2:], lo, strict=True)]
        found = emitter.same([name], len(outs), {"pads": told}, drop=("auto_pad", "ceil_mode", "storage_order"))
        if len(outs) == 1:
            return found
        return found[0], self._emit_indices(emitter, found[1], extents, origin, outs[1])

    def _emit_indices(self, emitter: Emitter, local: str, extents: Sequence[int], origin: Sequence[int],
                      out: Box) -> str:
        """`_global_indices` as nodes; the local indices count channels and cases too, which comes off first."""
        steps, (plane, case) = self._steps()
        shape, (cells, channels) = out.shape, out.intervals()[:2]
        size, lead = math.prod(extents), [1] * len(extents)
        first = (np.arange(shape[0])[:, None] * shape[1] + np.arange(shape[1])) * size
        start = np.arange(cells.start, cells.stop)[:, None] * case + np.arange(channels.start, channels.stop) * plane
        rest = emitter.op("Sub", [local, emitter.constant(first.reshape(*shape[:2], *lead))])
        result = emitter.constant(start.reshape(*shape[:2], *lead))
        for n, step, begin in reversed(list(zip(extents, steps, origin, strict=True))):
            length = emitter.constant(np.asarray(n, np.int64))
            outer = emitter.op("Div", [rest, length])
            inner = emitter.op("Sub", [rest, emitter.op("Mul", [outer, length])])
            place = emitter.op("Add", [inner, emitter.constant(np.asarray(begin, np.int64))])
            far = emitter.op("Mul", [place, emitter.constant(np.asarray(step, np.int64))])
            result = emitter.op("Add", [result, far])
            rest = outer
        return result

    def workspace(self, ins: Sequence[float], outs: Sequence[float]) -> float:
        if self.writes_into:
            return 0.0
        # torch's max pools compute int64 indices, asked or not; maxima axis by axis leave those of the axes before
        steps = [w.stride for w in self.windows]
        before = sum(math.prod(steps[a:]) for a in range(1, len(steps)))
        return max(8, before * self.outputs[0].itemsize) * outs[0]


@register
@dataclass(frozen=True)
class AveragePool(Pool):
    """Mean over windows, by the number of cells counted at each output's global position.

    Source: ONNX AveragePool (1, 7, 10, 11, 19, 22); a count covers the tensor, and with
    count_include_pad also the declared padding, but never the surplus of ceil_mode.
    """

    op_types: ClassVar[tuple[str, ...]] = ("AveragePool",)
    examples: ClassVar[tuple[Example, ...]] = (
        Example("AveragePool", ((1, 2, 13),), {"kernel_shape": [2], "strides": [2]}),
        Example("AveragePool", ((1, 2, 9, 10),), {"kernel_shape": [3, 2], "strides": [2, 3], "pads": [1, 0, 1, 1]}),
        Example("AveragePool", ((1, 1, 7, 6, 9),),
                {"kernel_shape": [3, 3, 2], "pads": [1] * 6, "count_include_pad": 1}),
        Example("AveragePool", ((1, 2, 6),), {"kernel_shape": [2], "strides": [2], "pads": [0, 1], "ceil_mode": 1}),
        Example("AveragePool", ((1, 2, 11),), {"kernel_shape": [3], "dilations": [2], "pads": [1, 2]}, opset=19),
    )

    include_pad: bool = False

    @classmethod
    def read(cls, view: NodeView) -> Self:
        outputs, windows, ends = _read_pool(view)
        return cls(view.inputs, outputs, windows, ends, bool(view.int("count_include_pad", 0)))

    @property
    def explicit(self) -> Mapping[str, tuple[int, ...]] | None:
        surplus = any(needed_end(w) > end for w, end in zip(self.windows, self.ends, strict=True))
        return None if self.include_pad and surplus else super().explicit

    def backward(self, ins: Sequence[float], outs: Sequence[float]) -> Backward:
        return Backward(inputs=() if any(w.dilation > 1 for w in self.windows) else (0,))

    def run(self, call: Call) -> tuple[torch.Tensor, ...]:
        held, outs = call.box(0).intervals()[2:], call.outs[0].intervals()[2:]
        if any(w.dilation > 1 for w in self.windows):
            total = self._dilated_sum(call.tensor(0), held, outs)
        else:
            total = self._window_sum(call.tensor(0), held, outs)
        counts = [self._counts(axis, out) for axis, out in enumerate(outs)]
        if all(len(set(c)) == 1 for c in counts):
            return (total / math.prod(c[0] for c in counts),)
        for axis, count in enumerate(counts):
            shape = [1] * total.dim()
            shape[axis + 2] = len(count)
            total = total / torch.tensor(count, dtype=total.dtype, device=total.device).reshape(shape)
        return (total,)

    def _window_sum(self, data: torch.Tensor, held: Sequence[Interval], outs: Sequence[Interval]) -> torch.Tensor:
        # torch's average pools refuse a tensor narrower than the kernel, whatever they pad
        borders = [plan_border(w, h, o, limit=w.kernel // 2 if len(h) >= w.kernel else 0)
                   for w, h, o in zip(self.windows, held, outs, strict=True)]
        data = pad_explicitly(data, borders, 0.0)
        kernel, stride = [w.kernel for w in self.windows], [w.stride for w in self.windows]
        padding = [b.kernel_pad for b in borders]
        if len(outs) == 1:  # avg_pool1d lacks the divisor
            data = data.unsqueeze(2)
            pooled = functional.avg_pool2d(data, [1, *kernel], [1, *stride], [0, *padding], divisor_override=1)
            return crop_outputs(pooled.squeeze(2), borders, outs)
        pool = functional.avg_pool2d if len(outs) == 2 else functional.avg_pool3d
        return crop_outputs(pool(data, kernel, stride, padding, divisor_override=1), borders, outs)

    def _dilated_sum(self, data: torch.Tensor, held: Sequence[Interval], outs: Sequence[Interval]) -> torch.Tensor:
        """Sums tap by tap, axis by axis: torch's average pools know no dilation."""
        for axis, (window, have, out) in enumerate(zip(self.windows, held, outs, strict=True)):
            lo, hi = local_padding(window, have, out)
            amounts = [0, 0] * (len(outs) - 1 - axis) + [lo, hi]
            data = functional.pad(data, amounts)
            data = torch.stack(strided_taps(data, axis + 2, window, len(out))).sum(0)
        return data

    def _counts(self, axis: int, out: Interval) -> list[int]:
        """How many cells of every window are counted along one axis, in global coordinates."""
        window, end = self.windows[axis], self.ends[axis]
        first, last = (-window.lo, window.n_in + end) if self.include_pad else (0, window.n_in)
        starts = [o * window.stride - window.lo for o in range(out.start, out.stop)]
        taps = [[s + t * window.dilation for t in range(window.kernel)] for s in starts]
        return [sum(first <= cell < last for cell in row) for row in taps]

    def emit(self, emitter: Emitter, names: Sequence[str | None], boxes: Sequence[Box | None],
             outs: Sequence[Box]) -> tuple[str, ...]:
        name, box = names[0], boxes[0]
        assert box is not None and name is not None
        lo, hi = self._local_pads(box, outs[0])
        spatial = list(enumerate(outs[0].intervals()[2:]))
        full = all(set(self._counts(a, out)) == {self.windows[a].kernel} for a, out in spatial)
        if self._node_pads(lo, hi) and (full or not self.include_pad):
            return emitter.same([name], 1, {"pads": [*lo, *hi]}, drop=("auto_pad", "ceil_mode"))
        padded = emitter.pad(name, [0, 0, *lo], [0, 0, *hi]) if any(lo + hi) else name
        pads = {"pads": [0] * len(lo + hi)}
        (mean,) = emitter.same([padded], 1, pads, drop=("auto_pad", "ceil_mode", "count_include_pad"))
        dtype = self.outputs[0].dtype.numpy()
        for axis, window in enumerate(self.windows):
            counts = self._counts(axis, outs[0].intervals()[axis + 2])
            if set(counts) == {window.kernel}:
                continue
            shape = [1] * len(outs[0].axes)
            shape[axis + 2] = len(counts)
            factor = (window.kernel / np.asarray(counts, np.float64)).astype(dtype).reshape(shape)
            mean = emitter.op("Mul", [mean, emitter.constant(factor)])
        return (mean,)
