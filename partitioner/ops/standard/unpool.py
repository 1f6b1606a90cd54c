"""MaxUnpool: cells put back to where a max pool found them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np

from partitioner.errors import ExecutionError
from partitioner.geometry import Box
from partitioner.maps import TransposedWindow, identity
from partitioner.ops.base import (
    Array,
    Backward,
    Call,
    Example,
    Need,
    Needs,
    NodeView,
    Operator,
    TensorType,
    Unsupported,
    WrongExtents,
)
from partitioner.ops.registry import register

if TYPE_CHECKING:
    import torch

    from partitioner.ops.emitter import Emitter
else:
    from partitioner.lazy import torch


def _indices(shape: Sequence[int], out: Sequence[int], kernel: int, stride: int, lo: int = 0) -> Array:
    """Indices for the examples: any cell of each window, the same window along every spatial axis."""
    result = np.arange(math.prod(shape[:2])).reshape(*shape[:2], *[1] * (len(shape) - 2))
    for axis, (n, extent) in enumerate(zip(shape[2:], out[2:], strict=True)):
        cells = np.clip(np.arange(n) * stride - lo + np.arange(n) * 5 % kernel, 0, extent - 1)
        result = result * extent + cells.reshape([-1 if a == axis + 2 else 1 for a in range(len(shape))])
    return result


@register
@dataclass(frozen=True)
class MaxUnpool(Operator):
    """Zeros, and every input cell where its index says: a flat position in the whole output.

    The cells of a shard come from the windows that may contain them, because a max pool with the same kernel,
    strides and pads has found them there; indices from elsewhere are an error where that matters.  Of several
    cells with one index the last stays.
    Source: ONNX MaxUnpool (9, 11, 22); an index counts in output_shape when that is given, as in onnxruntime.
    """

    op_types: ClassVar[tuple[str, ...]] = ("MaxUnpool",)
    examples: ClassVar[tuple[Example, ...]] = (
        Example("MaxUnpool", ((2, 3, 7), _indices((2, 3, 7), (2, 3, 14), 2, 2)),
                {"kernel_shape": [2], "strides": [2]}, opset=9),
        Example("MaxUnpool", ((2, 3, 5, 4), _indices((2, 3, 5, 4), (2, 3, 9, 7), 3, 2, 1)),
                {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}, opset=11),
        Example("MaxUnpool", ((1, 2, 3, 4, 3), _indices((1, 2, 3, 4, 3), (1, 2, 6, 8, 6), 2, 2)),
                {"kernel_shape": [2, 2, 2], "strides": [2, 2, 2]}),
        Example("MaxUnpool", ((1, 2, 3, 5), _indices((1, 2, 3, 5), (1, 2, 8, 12), 2, 2),
                              np.array([1, 2, 8, 12], np.int64)), {"kernel_shape": [2, 2], "strides": [2, 2]}),
        Example("MaxUnpool", ((2, 1, 5), _indices((2, 1, 5), (2, 1, 13), 1, 3)), {"kernel_shape": [1], "strides": [3]}),
    )

    windows: tuple[TransposedWindow, ...]

    @classmethod
    def read(cls, view: NodeView) -> Self:
        data, kernel = view.input(0), view.ints("kernel_shape")
        count = data.rank - 2
        if kernel is None or not 1 <= count == len(kernel) or view.input(1).shape != data.shape:
            raise Unsupported(f"kernel {kernel} and indices of {list(view.input(1).shape)} on an input of "
                              f"{list(data.shape)}; correct the file")
        strides, pads = view.ints("strides") or (1,) * count, view.ints("pads") or (0,) * (2 * count)
        least = [(n - 1) * s + k - pads[a] - pads[a + count]
                 for a, (n, s, k) in enumerate(zip(data.shape[2:], strides, kernel, strict=True))]
        given = view.constant(2, "output_shape")
        shape = (*data.shape[:2], *least) if given is None else tuple(int(n) for n in given.reshape(-1))
        if len(shape) != data.rank or any(n < m for n, m in zip(shape, (*data.shape[:2], *least), strict=True)):
            raise WrongExtents(f"output_shape {list(shape)} is smaller than {[*data.shape[:2], *least]}, to which its "
                               "windows amount; use a larger one")
        if shape[:2] != data.shape[:2]:
            raise Unsupported(f"output_shape {list(shape)} has more cases or channels than its input; correct the file")
        windows = tuple(TransposedWindow(n, m, k, s, 1, lo) for n, m, k, s, lo in
                        zip(data.shape[2:], shape[2:], kernel, strides, pads[:count], strict=True))
        return cls(view.inputs, (TensorType(shape, data.dtype),), windows)

    def needs(self, output: int = 0) -> Needs:
        shape = self.outputs[0].shape
        own = (Need(0, identity(shape[0])), Need(1, identity(shape[1])),
               *(Need(a + 2, w) for a, w in enumerate(self.windows)))
        return (own, own, *(None for _ in self.inputs[2:]))

    def backward(self, ins: Sequence[float], outs: Sequence[float]) -> Backward:
        if all(w.kernel <= w.stride for w in self.windows):
            return Backward(beside=8 * ins[1])
        return Backward(beside=9 * outs[0])

    def run(self, call: Call) -> tuple[torch.Tensor, ...]:
        x, index, out = call.tensor(0).reshape(-1), call.tensor(1), call.outs[0]
        if x.numel() == 0:
            return (x.new_zeros(out.shape),)
        place, inside = torch.zeros_like(index), torch.ones_like(index, dtype=torch.bool)
        for axis, cells in enumerate(self._cells(index)):
            begin, length = out.intervals()[axis].start, out.shape[axis]
            if length < self.outputs[0].shape[axis]:
                self._check(axis, cells, call.box(0))
            inside &= (cells >= begin) & (cells < begin + length)
            place = place * length + (cells - begin)
        place = torch.where(inside, place, math.prod(out.shape)).reshape(-1)
        return (self._scatter(x, place, math.prod(out.shape)).reshape(out.shape),)

    def _cells(self, index: torch.Tensor) -> list[torch.Tensor]:
        """The global coordinates along every axis."""
        shape = self.outputs[0].shape
        if bool(((index < 0) | (index >= math.prod(shape))).any()):
            raise ExecutionError(f"MaxUnpool: an index is outside of its output of {list(shape)}")
        found: list[torch.Tensor] = []
        for extent in reversed(shape):
            found.append(index % extent)
            index = torch.div(index, extent, rounding_mode="floor")
        return found[::-1]

    def _check(self, axis: int, cells: torch.Tensor, box: Box) -> None:
        """Refuse indices that lie outside of their windows along a sharded axis: another shard would miss them."""
        window = self.windows[axis - 2] if axis >= 2 else None
        stride, lo, kernel = (window.stride, window.lo, window.kernel) if window else (1, 0, 1)
        held = [i for part in box.axes[axis] for i in range(part.start, part.stop)]
        start = torch.tensor(held, device=cells.device).reshape([-1 if a == axis else 1 for a in range(cells.dim())])
        offset = cells - (start * stride - lo)
        if bool(((offset < 0) | (offset >= kernel)).any()):
            raise ExecutionError(f"MaxUnpool: along axis {axis} an index is not in its window of {kernel} cells; split "
                                 "another axis, or take the indices from a MaxPool with the same kernel and strides")

    def _scatter(self, x: torch.Tensor, place: torch.Tensor, size: int) -> torch.Tensor:
        """The cells at their places; those at `size` are not ours."""
        if all(w.kernel <= w.stride for w in self.windows):  # no two windows share a cell
            return x.new_zeros(size + 1).scatter(0, place, x)[:size]
        order = torch.arange(x.numel(), device=x.device)
        last = torch.full((size + 1,), -1, device=x.device).scatter_reduce(0, place, order, "amax")[:size]
        return torch.where(last >= 0, x[last.clamp(min=0)], x.new_zeros(()))

    def emit(self, emitter: Emitter, names: Sequence[str | None], boxes: Sequence[Box | None],
             outs: Sequence[Box]) -> tuple[str, ...]:
        x, index, box, out = names[0], names[1], boxes[0], outs[0]
        assert box is not None
        if x is None or index is None:
            return (emitter.zeros(out.shape, self.outputs[0].dtype),)
        held = box.intervals()
        starts = [held[0].start, held[1].start,
                  *(i.start * w.stride - w.lo for w, i in zip(self.windows, held[2:], strict=True))]
        lengths = [*box.shape[:2], *((n - 1) * w.stride + w.kernel
                                     for w, n in zip(self.windows, box.shape[2:], strict=True))]
        local = self._emit_indices(emitter, index, starts, lengths)
        (found,) = emitter.same([x, local], 1, {"pads": [0] * (2 * len(self.windows))})
        spans: dict[int, tuple[int, int]] = {}
        lo, hi = [0] * len(starts), [0] * len(starts)
        for axis, (start, length, part) in enumerate(zip(starts, lengths, out.intervals(), strict=True)):
            first, last = max(part.start, start), min(part.stop, start + length)
            if (first, last) != (start, start + length):
                spans[axis] = (first - start, last - start)
            lo[axis], hi[axis] = first - part.start, part.stop - last
        found = emitter.crop(found, spans)
        return (emitter.pad(found, lo, hi) if any(lo + hi) else found,)

    def _emit_indices(self, emitter: Emitter, index: str, starts: Sequence[int], lengths: Sequence[int]) -> str:
        """Positions in the cells that the held windows cover, from those in the whole output."""
        terms: list[str] = []
        for axis, extent in reversed(list(enumerate(self.outputs[0].shape))):
            whole = emitter.constant(np.asarray(extent, np.int64))
            rest = emitter.op("Div", [index, whole])
            cell = emitter.op("Sub", [index, emitter.op("Mul", [rest, whole])])
            place = emitter.op("Sub", [cell, emitter.constant(np.asarray(starts[axis], np.int64))])
            step = np.asarray(math.prod(lengths[axis + 1 :]), np.int64)
            terms.append(emitter.op("Mul", [place, emitter.constant(step)]))
            index = rest
        total = terms[0]
        for term in terms[1:]:
            total = emitter.op("Add", [total, term])
        return total

    def workspace(self, ins: Sequence[float], outs: Sequence[float]) -> float:
        return 40 * ins[0] + 8 * outs[0]
