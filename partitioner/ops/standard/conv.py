"""Convolution and transposed convolution in one to three dimensions."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np

from partitioner.geometry import Box
from partitioner.maps import TransposedWindow, Window, identity
from partitioner.ops.base import (
    Backward,
    Bound,
    Call,
    Example,
    Need,
    Needs,
    NodeView,
    Operator,
    TensorType,
    Unsupported,
    WrongExtents,
    whole,
)
from partitioner.ops.kernels import onednn
from partitioner.ops.kernels.convolve import Geometry, convolve
from partitioner.ops.kernels.windows import (
    crop_outputs,
    explicit_pads,
    local_padding,
    pad_explicitly,
    plan_border,
    read_windows,
    window_needs,
)
from partitioner.ops.registry import register

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as functional

    from partitioner.ops.emitter import Emitter
else:
    from partitioner.lazy import functional, torch

_SMALL = 20480
"""Cells of a batch of one without its last axis, up to which torch has convolutions of its own."""


def _check_ranks(data: TensorType, weight: TensorType) -> None:
    if not 3 <= data.rank <= 5:
        raise Unsupported(f"its input has {data.rank} axes; 3 to 5 (batch, channel, 1 to 3 spatial) are supported")
    if weight.rank != data.rank:
        raise Unsupported(f"weight of {weight.rank} axes on an input of {data.rank}; correct the file")


@dataclass(frozen=True)
class Direct:
    """oneDNN's own kernel on some tensors of a call.

    Args:
        places: those of data, weight and, where there may be one, bias.
        then: adds to the result what it makes of other tensors.
    """

    kernel: onednn.Kernel
    places: tuple[int, ...] = (0, 1, 2)
    then: Direct | None = None

    def serves(self, call: Call) -> bool:
        """Whether it can be used for a call with the boxes that it was made for."""
        data, weight = (call.tensor(place) for place in self.places[:2])
        return self.kernel.serves(data, weight) and (self.then is None or self.then.serves(call))

    def run(self, call: Call, into: torch.Tensor | None) -> torch.Tensor:
        """The result, into memory that is given."""
        data, biases = call.tensor(self.places[0]), [call.optional(place) for place in self.places[2:]]
        room = into if self.then is None or (into is not None and onednn.is_dense(into)) else None
        result = self.kernel.run(data, biases[0] if biases else None, room)
        if self.then is None:
            return result
        result = self.then.run(call, result)
        return result if into is None or result is into else into.copy_(result)


@dataclass(frozen=True)
class Convolution(Operator):
    """A kernel that slides: oneDNN's own where it has one, which writes to the place of the result, else torch's."""

    @abstractmethod
    def task(self, call: Call) -> onednn.Task | None:
        """What oneDNN would have to do for a call; None where it cannot."""

    def direct(self, call: Call) -> Direct | None:
        """oneDNN's own kernel for a call, if it has one."""
        kernel = self.kernel(call)
        return None if kernel is None else Direct(kernel)

    def kernel(self, call: Call, adds: bool = False) -> onednn.Kernel | None:
        """oneDNN's own kernel, which pads either side by itself.

        Args:
            adds: to what is in the memory that it is given.
        """
        if not onednn.suits(call.tensor(0)):
            return None
        task = self.task(call)
        return None if task is None else onednn.kernel_for(call.tensor(1), replace(task, adds=adds))

    @abstractmethod
    def by_torch(self, call: Call) -> torch.Tensor:
        """The same by torch's kernels, in new memory."""

    @property
    def writes_into(self) -> bool:
        return onednn.makes(self.outputs[0])

    def run(self, call: Call) -> tuple[torch.Tensor, ...]:
        direct = self.direct(call)
        if direct is not None:
            return (direct.run(call, call.into),)
        result = self._differentiated(call) if torch.is_grad_enabled() else None
        if result is None:
            result = self.by_torch(call)
        return (result if call.into is None else call.into.copy_(result),)

    def _differentiated(self, call: Call) -> torch.Tensor | None:
        """By oneDNN's own kernels, with a gradient, if it has them for all passes."""
        from partitioner.ops.kernels import onednn_gradients

        task = self.task(call)
        if task is None or not onednn_gradients.suits(call.tensor(0), call.tensor(1), task):
            return None
        return onednn_gradients.convolution(call.tensor(0), call.tensor(1), call.optional(2), task)

    def bind(self, call: Call) -> Bound:
        direct = self.direct(call)
        if direct is None:
            return self.run
        return lambda call: (direct.run(call, call.into),) if direct.serves(call) else self.run(call)


@register
@dataclass(frozen=True)
class Conv(Convolution):
    """Convolution: any kernel, stride, dilation, group and padding.

    Args:
        slope: of a LeakyRelu that follows, where a program has joined it (see `partitioner.ops.fused`).

    Source: ONNX Conv (1, 11, 22).
    """

    op_types: ClassVar[tuple[str, ...]] = ("Conv",)
    examples: ClassVar[tuple[Example, ...]] = (
        Example("Conv", ((1, 2, 13), (3, 2, 3), (3,)), {"pads": [1, 1]}),
        Example("Conv", ((2, 4, 11, 9), (6, 2, 3, 2)), {"group": 2, "strides": [2, 3], "pads": [1, 0, 2, 1]}),
        Example("Conv", ((1, 1, 9, 7, 8), (2, 1, 3, 3, 3)), {"dilations": [2, 1, 1], "pads": [2, 1, 1] * 2}),
        Example("Conv", ((1, 2, 10), (3, 2, 4)), {"auto_pad": "SAME_LOWER", "strides": [3]}),
        Example("Conv", ((1, 1, 3), (1, 1, 1)), {"pads": [4, 5], "strides": [3]}),
    )

    windows: tuple[Window, ...]
    group: int
    slope: float | None = None

    @classmethod
    def read(cls, view: NodeView) -> Self:
        data, weight = view.input(0), view.input(1)
        _check_ranks(data, weight)
        group = view.int("group", 1)
        if data.shape[1] != weight.shape[1] * group or weight.shape[0] % group:
            raise Unsupported(
                f"input has {data.shape[1]} channels but the weight expects {weight.shape[1] * group} "
                f"(group {group}); give a volume with that many channels"
            )
        windows, _ = read_windows(view, data.shape[2:], weight.shape[2:])
        shape = (data.shape[0], weight.shape[0], *(w.n_out for w in windows))
        return cls(view.inputs, (TensorType(shape, data.dtype),), windows, group)

    def needs(self, output: int = 0) -> Needs:
        data, weight, *rest = self.inputs
        assert data is not None and weight is not None
        batch = Need(0, identity(data.shape[0]))
        channel = Need(None, whole(data.shape)[1].map)
        own = (batch, channel, *window_needs(self.windows))
        return (own, whole(weight.shape), *(None if r is None else whole(r.shape) for r in rest))

    @property
    def explicit(self) -> Mapping[str, tuple[int, ...]]:
        return explicit_pads(self.windows)

    @property
    def gradient_work(self) -> float:
        return 2.0

    def backward(self, ins: Sequence[float], outs: Sequence[float]) -> Backward:
        return Backward(inputs=(0, 1), workspace=self._backward_workspace(ins[0], outs[0]))

    def _backward_workspace(self, cells: float, results: float) -> float:
        """Where torch would leave oneDNN (see kernels.gradients), data and gradient are copied, and once more in blocks
        of 16 channels."""
        data, weight = self.inputs[:2]
        assert data is not None and weight is not None
        if self.writes_into:
            return 0.0
        wide = data.rank < 4 or (weight.shape[-1] > 3 and weight.shape[-2] > 3)
        if data.shape[0] > 1 or self.group > 1 or wide:
            return 0.0
        shapes = ((cells, data.shape), (results, self.outputs[0].shape))
        blocked = [n * -(-shape[1] // 16) * 16 / shape[1] for n, shape in shapes]
        copies = self.outputs[0].itemsize * (cells + results + sum(blocked))
        return np.where(np.asarray(cells) / data.shape[-1] <= _SMALL, copies, 0.0)  # pyright: ignore

    def task(self, call: Call) -> onednn.Task | None:
        padding = self.local_pads(call.box(0), call.outs[0])
        return _task_for(call, self.windows, padding, self.group, self.slope)

    def by_torch(self, call: Call) -> torch.Tensor:
        held, outs = call.box(0).intervals()[2:], call.outs[0].intervals()[2:]
        borders = [plan_border(w, h, o) for w, h, o in zip(self.windows, held, outs, strict=True)]
        data = pad_explicitly(call.tensor(0), borders, 0.0)
        result = convolve(data, call.tensor(1), call.optional(2), Geometry(
            stride=[w.stride for w in self.windows],
            padding=[b.kernel_pad for b in borders],
            dilation=[w.dilation for w in self.windows],
            groups=self.group,
        ))
        result = crop_outputs(result, borders, outs)
        return result if self.slope is None else functional.leaky_relu(result, self.slope)

    def local_pads(self, held: Box, out: Box) -> list[tuple[int, int]]:
        """Padding before and after every spatial axis of a local input."""
        return [local_padding(w, h, o)
                for w, h, o in zip(self.windows, held.intervals()[2:], out.intervals()[2:], strict=True)]

    def emit(self, emitter: Emitter, names: Sequence[str | None], boxes: Sequence[Box | None],
             outs: Sequence[Box]) -> tuple[str, ...]:
        name, box = names[0], boxes[0]
        assert box is not None
        pairs = self.local_pads(box, outs[0])
        pads = [lo for lo, _ in pairs] + [hi for _, hi in pairs]
        if name is None:  # every window lies wholly in the padding
            extents = [n + lo + hi for n, (lo, hi) in zip(box.shape[2:], pairs, strict=True)]
            name = emitter.zeros([*box.shape[:2], *extents], self.outputs[0].dtype)
            pads = [0] * len(pads)
        return emitter.same([name, *names[1:]], 1, {"pads": pads}, drop=("auto_pad",))

    @property
    def channels_read(self) -> int:
        """Channels that go into one of the result."""
        weight = self.inputs[1]
        assert weight is not None
        return weight.shape[1]

    def flops(self, out: float) -> float:
        return 2.0 * out * self.channels_read * math.prod(w.kernel for w in self.windows)


@register
@dataclass(frozen=True)
class ConvTranspose(Convolution):
    """Transposed convolution with output_padding and output_shape.

    Outputs that no input reaches (kernel shorter than stride, output_padding) hold the bias alone.
    Source: ONNX ConvTranspose (1, 11, 22).
    """

    op_types: ClassVar[tuple[str, ...]] = ("ConvTranspose",)
    examples: ClassVar[tuple[Example, ...]] = (
        Example("ConvTranspose", ((1, 3, 7), (3, 2, 2), (2,)), {"strides": [2]}),
        Example("ConvTranspose", ((1, 2, 5, 6), (2, 3, 3, 4)),
                {"strides": [2, 3], "pads": [1, 0, 1, 2], "output_padding": [1, 0]}),
        Example("ConvTranspose", ((2, 2, 4, 3, 5), (2, 2, 1, 3, 2), (2,)), {"strides": [3, 2, 1]}),
        Example("ConvTranspose", ((1, 4, 6), (4, 1, 3)), {"group": 2, "dilations": [2], "output_shape": [9]}),
        Example("ConvTranspose", ((1, 1, 6), (1, 1, 3)), {"auto_pad": "SAME_UPPER", "strides": [2]}),
    )

    windows: tuple[TransposedWindow, ...]
    group: int

    @classmethod
    def read(cls, view: NodeView) -> Self:
        data, weight = view.input(0), view.input(1)
        _check_ranks(data, weight)
        if data.shape[1] != weight.shape[0]:
            raise Unsupported(
                f"input has {data.shape[1]} channels but the weight expects {weight.shape[0]}; "
                "give a volume with that many channels"
            )
        group = view.int("group", 1)
        windows = _read_transposed(view, data.shape[2:], weight.shape[2:])
        shape = (data.shape[0], weight.shape[1] * group, *(w.n_out for w in windows))
        return cls(view.inputs, (TensorType(shape, data.dtype),), windows, group)

    def needs(self, output: int = 0) -> Needs:
        data, weight, *rest = self.inputs
        assert data is not None and weight is not None
        spatial = [Need(a + 2, w) for a, w in enumerate(self.windows)]
        own = (Need(0, identity(data.shape[0])), whole(data.shape)[1], *spatial)
        return (own, whole(weight.shape), *(None if r is None else whole(r.shape) for r in rest))

    @property
    def explicit(self) -> Mapping[str, tuple[int, ...]] | None:
        ends = [(w.n_in - 1) * w.stride + w.reach - w.lo - w.n_out for w in self.windows]
        if any(-end >= max(w.stride, w.dilation) for end, w in zip(ends, self.windows, strict=True)):
            return None  # output_padding may not be that large
        pads = (*(w.lo for w in self.windows), *(max(0, end) for end in ends))
        return {"pads": pads, "output_padding": tuple(max(0, -end) for end in ends)}

    @property
    def gradient_work(self) -> float:
        return 2.0

    def backward(self, ins: Sequence[float], outs: Sequence[float]) -> Backward:
        return Backward(inputs=(0, 1), workspace=0.0 if self.writes_into else self.outputs[0].itemsize * outs[0])

    def task(self, call: Call) -> onednn.Task | None:
        spans = self._spans(call.box(0), call.outs[0])  # either side is cropped by the kernel itself
        return _task_for(call, self.windows, spans, self.group, transposed=True)

    def by_torch(self, call: Call) -> torch.Tensor:
        data, weight, bias = call.tensor(0), call.tensor(1), call.optional(2)
        out = call.outs[0]
        spans = self._spans(call.box(0), out)
        if not all(call.box(0).shape):
            return self._bias_only(data, bias, out)
        padding = [min(lo, hi) if min(lo, hi) > 0 else 0 for lo, hi in spans]
        spans = [(lo - p, hi - p) for (lo, hi), p in zip(spans, padding, strict=True)]
        complete = all(lo >= 0 and hi >= 0 for lo, hi in spans)
        result = convolve(data, weight, bias if complete else None, Geometry(
            stride=[w.stride for w in self.windows], padding=padding,
            dilation=[w.dilation for w in self.windows], groups=self.group,
        ), transposed=True)
        for axis, (lo, hi) in enumerate(spans):
            keep = result.shape[axis + 2] - max(lo, 0) - max(hi, 0)
            result = result.narrow(axis + 2, max(lo, 0), keep)
        if complete:
            return result
        result = functional.pad(result, [max(0, -v) for pair in reversed(spans) for v in pair])
        return result if bias is None else result + bias.reshape(-1, *(1,) * len(spans))

    def _spans(self, box: Box, out: Box) -> list[tuple[int, int]]:
        """Cells of the full local result to crop before and after each axis; negative where it lacks some."""
        spans: list[tuple[int, int]] = []
        for window, held, wanted in zip(self.windows, box.intervals()[2:], out.intervals()[2:], strict=True):
            start = held.start * window.stride - window.lo
            stop = start + (len(held) - 1) * window.stride + window.reach
            spans.append((wanted.start - start, stop - wanted.stop))
        return spans

    def _bias_only(self, data: torch.Tensor, bias: torch.Tensor | None, out: Box) -> torch.Tensor:
        zeros = torch.zeros(out.shape, dtype=data.dtype, device=data.device)
        return zeros if bias is None else zeros + bias.reshape(-1, *(1,) * len(self.windows))

    def emit(self, emitter: Emitter, names: Sequence[str | None], boxes: Sequence[Box | None],
             outs: Sequence[Box]) -> tuple[str, ...]:
        box, bias = boxes[0], names[2] if len(names) > 2 else None
        assert box is not None
        if names[0] is None:  # no input reaches these outputs
            result = emitter.zeros(outs[0].shape, self.outputs[0].dtype)
        else:
            spans = self._spans(box, outs[0])
            crop = [max(pair[side], 0) for side in (0, 1) for pair in spans]
            lo, hi = ([0, 0, *(max(0, -pair[side]) for pair in spans)] for side in (0, 1))
            lacking = any((*lo, *hi))
            drop = ("auto_pad", "output_shape", "output_padding")
            (result,) = emitter.same(names[:2] if lacking else names, 1, {"pads": crop}, drop=drop)
            if not lacking:
                return (result,)
            result = emitter.pad(result, lo, hi)
        if bias is None:
            return (result,)
        shaped = emitter.reshape(bias, [1, -1, *[1] * len(self.windows)])
        return (emitter.op("Add", [result, shaped]),)

    def flops(self, out: float) -> float:
        weight = self.inputs[1]
        assert weight is not None
        strides = math.prod(w.stride for w in self.windows)
        return 2.0 * out * weight.shape[0] / self.group * math.prod(weight.shape[2:]) / strides


def _task_for(call: Call, windows: Sequence[Window | TransposedWindow], padding: Sequence[tuple[int, int]],
              group: int, slope: float | None = None, transposed: bool = False) -> onednn.Task | None:
    """A call in oneDNN's words."""
    if min(map(min, padding)) < 0:
        return None
    return onednn.Task(
        tuple(call.tensor(0).shape), tuple(call.tensor(1).shape), call.optional(2) is not None,
        tuple(w.stride for w in windows), tuple(w.dilation for w in windows), tuple(padding), group, slope, transposed)


def _read_transposed(view: NodeView, extents: Sequence[int], kernel: Sequence[int]) -> tuple[TransposedWindow, ...]:
    count = len(extents)
    strides = view.ints("strides") or (1,) * count
    dilations = view.ints("dilations") or (1,) * count
    pads = view.ints("pads") or (0,) * (2 * count)
    extra = view.ints("output_padding") or (0,) * count
    wanted = view.ints("output_shape")
    auto = view.text("auto_pad", "NOTSET")
    windows: list[TransposedWindow] = []
    for axis in range(count):
        n, s, d, k = extents[axis], strides[axis], dilations[axis], kernel[axis]
        full = (n - 1) * s + extra[axis] + (k - 1) * d + 1
        lo, hi = pads[axis], pads[count + axis]
        target = wanted[len(wanted) - count + axis] if wanted else None
        if target is None and auto in ("SAME_UPPER", "SAME_LOWER"):
            target = min(n * s, full)  # as onnxruntime: a kernel shorter than its stride is not filled up
        if auto == "VALID" and target is None:
            lo, hi = 0, 0
        if target is not None:
            total = max(0, full - target)
            lo = total // 2 if auto == "SAME_UPPER" else total - total // 2
            hi = full - target - lo
        out = full - lo - hi
        if out < 1:
            raise WrongExtents(f"it leaves no output along axis {axis + 2}; use a larger volume")
        windows.append(TransposedWindow(n, out, k, s, d, lo))
    return tuple(windows)

