"""Convolutions that are differentiated, by oneDNN's own interface (see `onednn`).

torch's own way through a convolution of a shard is a long one.  Its kernels pad both sides of an axis alike, so that
at a cut the result is cropped, and its gradient first copied into a larger tensor of zeros; that has channels first
and has to be reordered; small batches of one leave oneDNN, or are taken there by further copies.  oneDNN itself pads
either side by its own amount, and reads and writes channels last.  A step of a 3D U-Net on two ranks of 32x64x64
voxels took 0.57 s torch's way and takes 0.42 s this way, on one process of two threads 0.45 s and 0.37 s.

A first gradient is all that there is: these have no second one.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from partitioner.ops.kernels.onednn import (
    ALGORITHMS,
    WEIGHTS_LAYOUT,
    Task,
    any_weight,
    describe_forward,
    geometry,
    is_dense,
    last,
    tensors_of,
    weight_order,
)
from partitioner.ops.kernels.onednn_library import (
    SOURCE,
    TARGET,
    WEIGHTS,
    Library,
    Object,
    Step,
    Unimplemented,
    is_available,
    load,
)

_BY_SOURCE, _BY_TARGET, _BY_WEIGHTS = 129, 145, 161
_BY_WEIGHTS_LAYOUT = 132
"""Numbers of arguments and of a query in dnnl_types.h."""


def suits(data: torch.Tensor, weight: torch.Tensor, task: Task) -> bool:
    """Whether a convolution is to be differentiated here: of images or volumes in float32 on the CPU."""
    if not (torch.is_grad_enabled() and (data.requires_grad or weight.requires_grad)):
        return False
    if data.device.type != "cpu" or data.dim() not in (4, 5) or torch.is_autocast_enabled("cpu"):
        return False
    if data.dtype != torch.float32 or weight.dtype != torch.float32 or min(data.numel(), weight.numel(), 1) < 1:
        return False
    if min(task.result) < 1 or not is_available():
        return False
    passes = _passes(task, _strides(weight), torch.get_num_threads())
    return passes is not None and passes.has(data.requires_grad, weight.requires_grad)


def convolution(data: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, task: Task) -> torch.Tensor:
    """The convolution of what `suits`."""
    if weight.stride() != _strides(weight):
        weight = weight.contiguous()
    found = _Convolution.apply(data, weight, bias, task)  # type: ignore[no-untyped-call]
    assert isinstance(found, torch.Tensor)
    return found


def _strides(weight: torch.Tensor) -> tuple[int, ...]:
    """How a weight lies, or its copy, where it does not lie densely in one of two orders."""
    if weight.is_contiguous() or is_dense(weight):
        return tuple(weight.stride())
    return tuple(math.prod(weight.shape[axis + 1 :]) for axis in range(weight.dim()))


class _Weight:
    """A weight, or its gradient, in the order that a primitive wants."""

    def __init__(self, library: Library, layout: Object, plain: Object) -> None:
        self._nbytes = max(1, library.size_of(layout))
        self._pack, self._unpack = library.reorder(plain, layout), library.reorder(layout, plain)

    def empty(self) -> torch.Tensor:
        """Room for it."""
        return torch.empty(self._nbytes, dtype=torch.uint8)

    def packed(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight in that order."""
        cells = self.empty()
        self._pack.run(weight, cells)
        return cells

    def unpacked(self, cells: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Bring it back to the order of a tensor."""
        found = torch.empty_like(like)
        self._unpack.run(cells, found)
        return found


class _Passes:
    """The passes of one convolution; those backward are made when they are first asked for.

    Args:
        strides: of the weight.
    """

    def __init__(self, library: Library, task: Task, strides: tuple[int, ...]) -> None:
        self._library, self._task, self._strides = library, task, strides
        self._described = describe_forward(library, task)
        self._layouts = tensors_of(library, task)
        layout = library.layout_of(self._described, WEIGHTS_LAYOUT)
        self._weight = self._order(layout)
        given = {SOURCE: self._layouts[SOURCE], TARGET: self._layouts[TARGET], WEIGHTS: layout}
        self._forward = Step(library, self._described, {**given, **self._layouts})

    def has(self, by_data: bool, by_weight: bool) -> bool:
        """Whether there are fast passes backward."""
        return (not by_data or self._by_data is not None) and (not by_weight or self._by_weight is not None)

    def forward(self, data: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The convolution itself."""
        found = torch.empty(self._task.result, memory_format=last(data))
        self._forward.run(data, found, self._weight.packed(weight), *([] if bias is None else [bias.contiguous()]))
        return found

    def by_data(self, grad: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The gradient by the data."""
        assert self._by_data is not None
        order, step = self._by_data
        found = torch.empty(self._task.data, memory_format=last(grad))
        step.run(found, order.packed(weight), grad)
        return found

    def by_weight(self, grad: torch.Tensor, data: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The gradient by the weight."""
        assert self._by_weight is not None
        order, step = self._by_weight
        cells = order.empty()
        step.run(data, cells, grad)
        return order.unpacked(cells, weight)

    @functools.cached_property
    def _by_data(self) -> tuple[_Weight, Step] | None:
        return self._backward("data", WEIGHTS_LAYOUT, (_BY_SOURCE, WEIGHTS, _BY_TARGET))

    @functools.cached_property
    def _by_weight(self) -> tuple[_Weight, Step] | None:
        return self._backward("weights", _BY_WEIGHTS_LAYOUT, (SOURCE, _BY_WEIGHTS, _BY_TARGET), None)

    def _backward(self, way: str, query: int, numbers: tuple[int, int, int],
                  *bias: None) -> tuple[_Weight, Step] | None:
        """A pass backward, and the order of the weight that it takes or makes; None where there is no fast one.

        Args:
            query: for that order.
            numbers: of the arguments: data, weight and result, or their gradients.
            bias: where there may be one, its gradient's layout.
        """
        library, task, layouts = self._library, self._task, self._layouts
        try:
            described = library.describe(
                f"{task.kind}_backward_{way}", ALGORITHMS[task.kind], layouts[SOURCE], any_weight(library, task), *bias,
                layouts[TARGET], *geometry(task), self._described, library.attributes())
        except Unimplemented:
            return None
        layout = library.layout_of(described, query)
        open_ = zip(numbers, (layouts[SOURCE], layout, layouts[TARGET]), strict=True)
        return self._order(layout), Step(library, described, dict(open_))

    def _order(self, layout: Object) -> _Weight:
        return _Weight(self._library, layout, self._library.layout(*weight_order(self._task, self._strides)))


@functools.lru_cache(512)
def _passes(task: Task, strides: tuple[int, ...], threads: int) -> _Passes | None:
    """The passes, for a number of threads; None where the first has no fast kernel."""
    library = load()
    assert library is not None and threads > 0
    try:
        return _Passes(library, task, strides)
    except Unimplemented:
        return None


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, data: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
                task: Task) -> torch.Tensor:
        data = data.contiguous(memory_format=last(data))
        ctx.save_for_backward(data, weight)
        ctx.task = task
        return _known(task, weight).forward(data, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        data, weight = ctx.saved_tensors
        grad = grad_outputs[0].contiguous(memory_format=last(data))
        passes = _known(ctx.task, weight)
        by_data = passes.by_data(grad, weight) if ctx.needs_input_grad[0] else None
        by_weight = passes.by_weight(grad, data, weight) if ctx.needs_input_grad[1] else None
        # torch adds in a tree, oneDNN one by one: of 10^5 cells of one sign it loses a thousandth
        by_bias = grad.sum([a for a in range(grad.dim()) if a != 1]) if ctx.needs_input_grad[2] else None
        return by_data, by_weight, by_bias, None


def _known(task: Task, weight: torch.Tensor) -> _Passes:
    found = _passes(task, _strides(weight), torch.get_num_threads())
    assert found is not None
    return found
