"""Convolutions by oneDNN's own interface, which write where they are told.

torch brings the result of every convolution into new memory, from where it has to be copied to its place; oneDNN itself
takes the place.  It also pads either side of an axis by its own amount, and takes weights in the order that it wants
once and for all, where torch reorders them at every call.  The kernels are those that torch calls, and so are the bits.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from partitioner.ops.kernels.onednn_library import (
    BIAS,
    FLOAT32,
    SOURCE,
    TARGET,
    WEIGHTS,
    Library,
    Object,
    Step,
    Unimplemented,
    integers,
    is_available,
    is_installed,
    load,
)

if TYPE_CHECKING:
    import torch

    from partitioner.ops.base import TensorType
else:
    from partitioner.lazy import torch

# Values of the enumerations in dnnl_types.h.
_FORWARD_INFERENCE, _RELU = 96, 0x20
ALGORITHMS = {"convolution": 0x1, "deconvolution": 0xA}
WEIGHTS_LAYOUT = 131


@dataclass(frozen=True)
class Task:
    """A convolution without its data.

    Args:
        data, weight: extents; those of the weight (out, in / groups, ...), or (in, out / groups, ...) when transposed.
        stride, dilation: per spatial axis.
        padding: per spatial axis before and after it (cropping, when transposed), none of them negative.
        slope: of the LeakyRelu that follows, where one does.
        adds: to what is there already.
    """

    data: tuple[int, ...]
    weight: tuple[int, ...]
    has_bias: bool
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    groups: int
    slope: float | None = None
    transposed: bool = False
    adds: bool = False

    @property
    def kind(self) -> str:
        """The library's name for it."""
        return "deconvolution" if self.transposed else "convolution"

    @property
    def channels(self) -> int:
        """Those of the result."""
        return self.weight[1] * self.groups if self.transposed else self.weight[0]

    @property
    def result(self) -> tuple[int, ...]:
        """Extents of the result."""
        spatial = zip(self.data[2:], self.weight[2:], self.stride, self.dilation, self.padding, strict=True)
        if self.transposed:
            extents = [(n - 1) * s + (k - 1) * d + 1 - lo - hi for n, k, s, d, (lo, hi) in spatial]
        else:
            extents = [(n + lo + hi - (k - 1) * d - 1) // s + 1 for n, k, s, d, (lo, hi) in spatial]
        return (self.data[0], self.channels, *extents)


def makes(result: TensorType) -> bool:
    """Whether kernels may write results of this type, in a plan for a machine like this one."""
    return is_installed() and result.rank > 3 and result.dtype == ir.DataType.FLOAT


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether an image or a volume lies densely with channels last: then kernels take it as it is."""
    return tensor.is_contiguous(memory_format=last(tensor))


def last(tensor: torch.Tensor) -> torch.memory_format:
    """Channels last for an image or a volume."""
    return torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d


def suits(data: torch.Tensor) -> bool:
    """Whether data is what the kernels take: images or volumes in float32, on the CPU, without gradients."""
    return (data.device.type == "cpu" and data.dtype == torch.float32 and data.dim() in (4, 5) and data.numel() > 0
            and _plainly() and is_available())


def _plainly() -> bool:
    """Whether torch computes neither gradients nor in another precision now."""
    return not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"))


def kernel_for(weight: torch.Tensor, task: Task) -> Kernel | None:
    """The kernel for a convolution with these weights of data that `suits`, or None where there is no fast one."""
    if min(task.result) < 1 or weight.dtype != torch.float32 or weight.numel() == 0:
        return None
    if not weight.is_inference():
        return _make_kernel(weight, task, ())
    known: dict[tuple[Task, int], Kernel | None] = _kernels().setdefault(weight, {})
    key = (task, torch.get_num_threads())
    if key not in known:
        known[key] = _make_kernel(weight, task, [k.packed for k in known.values() if k is not None])
    return known[key]


class Kernel:
    """A convolution with its weights in the order that it wants."""

    def __init__(self, library: Library, weight: torch.Tensor, task: Task, packed: Sequence[_Packed]) -> None:
        self.task = task
        self._shape, self._adds = task.result, task.adds
        self._weight = weakref.ref(weight) if weight.is_inference() else None  # others may change
        self._threads = torch.get_num_threads()
        described = describe_forward(library, task)
        layout = library.layout_of(described, WEIGHTS_LAYOUT)
        same = (p for p in packed if library.are_equal(p.layout, layout))
        self.packed = next(same, None) or _pack(library, weight, task, layout)
        self._step = Step(library, described, tensors_of(library, task), {WEIGHTS: self.packed.memory})

    def serves(self, data: torch.Tensor, weight: torch.Tensor) -> bool:
        """Whether it is still the one for such a call: the same weights, as many threads, extents as before."""
        return (self._weight is not None and self._weight() is weight and data.shape == self.task.data
                and torch.get_num_threads() == self._threads and _plainly())

    def run(self, data: torch.Tensor, bias: torch.Tensor | None, into: torch.Tensor | None) -> torch.Tensor:
        """The convolution of data, into memory that is given, or added to what is there (which must lie densely)."""
        place = into
        if place is None or not is_dense(place):
            assert not self._adds
            place = torch.empty(self._shape, dtype=data.dtype, memory_format=last(data))
        data = data.contiguous(memory_format=last(data))
        if bias is None:
            self._step.run(data, place)
        else:
            self._step.run(data, place, bias.contiguous())
        return place if into is None or place is into else into.copy_(place)


@dataclass(frozen=True)
class _Packed:
    """Weights in the order that a kernel wants."""

    layout: Object
    memory: Object
    cells: torch.Tensor


def _pack(library: Library, weight: torch.Tensor, task: Task, layout: Object) -> _Packed:
    cells = torch.empty(max(1, library.size_of(layout)), dtype=torch.uint8)
    library.reorder(library.layout(*weight_order(task, weight.stride())), layout).run(weight, cells)
    return _Packed(layout, library.memory(layout, cells), cells)


def describe_forward(library: Library, task: Task) -> Object:
    """The description of a convolution.

    Raises:
        Unimplemented: there is only a slow one.
    """
    attributes, after = library.attributes(), library.make("post_ops")
    if task.adds:
        library.call("post_ops_append_sum", after, ctypes.c_float(1.0), ctypes.c_int32(0), FLOAT32)
    if task.slope is not None:
        library.call("post_ops_append_eltwise", after, _RELU, ctypes.c_float(task.slope), ctypes.c_float(0.0))
    library.call("primitive_attr_set_post_ops", attributes, after)
    layouts = tensors_of(library, task)
    return library.describe(
        f"{task.kind}_forward", _FORWARD_INFERENCE, ALGORITHMS[task.kind], layouts[SOURCE], any_weight(library, task),
        layouts.get(BIAS), layouts[TARGET], *geometry(task), attributes)


def tensors_of(library: Library, task: Task) -> dict[int, Object]:
    """The layouts of data, result and bias."""
    layouts = {SOURCE: library.layout(task.data), TARGET: library.layout(task.result)}
    return layouts | ({BIAS: library.layout((task.channels,))} if task.has_bias else {})


def geometry(task: Task) -> tuple[Any, ...]:
    """Strides, dilations, and paddings before and after, as the library takes them."""
    before, after = zip(*task.padding, strict=True)
    return tuple(map(integers, (task.stride, [d - 1 for d in task.dilation], before, after)))


def any_weight(library: Library, task: Task) -> Object:
    """The weight in whatever order a primitive wants."""
    return library.any_layout(weight_order(task, [0] * len(task.weight))[0])


def weight_order(task: Task, strides: Sequence[int]) -> tuple[list[int], list[int]]:
    """Extents and strides of the weight as the library counts them: (groups, if there are several, out, in, ...)."""
    shape, strides = list(task.weight), list(strides)
    if task.groups > 1:
        shape[:1] = [task.groups, shape[0] // task.groups]
        strides[:1] = [strides[0] * shape[1], strides[0]]
    if task.transposed:
        first = len(shape) - len(task.weight)
        for values in (shape, strides):
            values[first], values[first + 1] = values[first + 1], values[first]
    return shape, strides


@functools.cache
def _kernels() -> Any:
    """Kernels by task, by the weight tensor that they have taken over, as long as that lives."""
    from torch.utils.weak import WeakTensorKeyDictionary

    return WeakTensorKeyDictionary()


def _make_kernel(weight: torch.Tensor, task: Task, packed: Sequence[_Packed]) -> Kernel | None:
    library = load()
    assert library is not None
    try:
        return Kernel(library, weight, task, packed)
    except Unimplemented:
        return None
