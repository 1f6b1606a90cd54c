"""Col2Im: overlapping blocks added up to an image, the adjoint of taking them out of one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np

from partitioner.geometry import Box, Interval
from partitioner.maps import Flat, Rows, TransposedWindow, identity
from partitioner.ops.base import (
    Call,
    Example,
    Need,
    Needs,
    NodeView,
    Operator,
    TensorType,
    Unsupported,
    WrongExtents,
    listed_integers,
)
from partitioner.ops.registry import register

if TYPE_CHECKING:
    import torch

    from partitioner.ops.emitter import Emitter
else:
    from partitioner.lazy import torch


@register
@dataclass(frozen=True)
class Col2Im(Operator):
    """(N, C * cells of a block, blocks) added up to (N, C, spatial ...); the blocks of an image stand row by row.

    A shard of rows of the image needs the rows of blocks that reach into it.
    Source: ONNX Col2Im (18).
    """

    op_types: ClassVar[tuple[str, ...]] = ("Col2Im",)
    examples: ClassVar[tuple[Example, ...]] = (
        Example("Col2Im", ((2, 12, 20), np.array([6, 5]), np.array([2, 2]))),
        Example("Col2Im", ((1, 18, 16), np.array([7, 5]), np.array([3, 3])), {"strides": [2, 1], "pads": [1, 0, 1, 1]}),
        Example("Col2Im", ((2, 6, 5), np.array([9]), np.array([3])), {"strides": [2], "pads": [1, 1]}),
        Example("Col2Im", ((1, 6, 10), np.array([9, 5]), np.array([3, 2])), {"dilations": [2, 3]}),
        Example("Col2Im", ((1, 4, 9), np.array([11, 8]), np.array([1, 2])), {"strides": [4, 3]}),
        Example("Col2Im", ((1, 8, 8), np.array([5, 3, 4]), np.array([2, 2, 1])), {"strides": [2, 1, 2]}),
    )

    windows: tuple[TransposedWindow, ...]

    @classmethod
    def read(cls, view: NodeView) -> Self:
        data = view.input(0)
        image, block = listed_integers(view, "image_shape", 1), listed_integers(view, "block_shape", 2)
        if image is None or block is None or data.rank != 3 or len(image) != len(block):
            raise Unsupported("image_shape and block_shape do not fit its input; correct the file")
        count = len(image)
        strides, dilations = view.ints("strides") or (1,) * count, view.ints("dilations") or (1,) * count
        if count != 2 and any(d != 1 for d in dilations):
            raise Unsupported("dilations in lines and volumes: onnxruntime computes something else than ONNX says")
        pads = view.ints("pads") or (0,) * (2 * count)
        windows = tuple(
            TransposedWindow((n + lo + hi - (k - 1) * d - 1) // s + 1, n, k, s, d, lo)
            for n, k, s, d, lo, hi in zip(image, block, strides, dilations, pads[:count], pads[count:], strict=True))
        cells = math.prod(block)
        if data.shape[1] % cells or data.shape[2] != math.prod(w.n_in for w in windows):
            raise WrongExtents(f"blocks of {list(block)} in {list(image)} are not {list(data.shape)}; the network "
                               "cannot take this volume's extents")
        return cls(view.inputs, (TensorType((data.shape[0], data.shape[1] // cells, *image), data.dtype),), windows)

    @property
    def _inner(self) -> int:
        """Blocks in a row of blocks."""
        return math.prod(w.n_in for w in self.windows[1:])

    @property
    def _block(self) -> tuple[int, ...]:
        return tuple(w.kernel for w in self.windows)

    def needs(self, output: int = 0) -> Needs:
        data, out = self.inputs[0], self.outputs[0].shape
        assert data is not None
        channel = Flat(data.shape[1], out[1], 1, math.prod(self._block))
        rows = Rows(data.shape[2], out[2], self.windows[0], self._inner)
        return ((Need(0, identity(out[0])), Need(1, channel), Need(2, rows)), *(None for _ in self.inputs[1:]))

    def _reached(self, held: Box) -> tuple[list[int], list[Interval]]:
        """Blocks along every axis, and the cells that they reach, outside the image too."""
        (run,) = held.axes[2]
        first, count = run.start // self._inner, len(run) // self._inner
        counts = [count, *(w.n_in for w in self.windows[1:])]
        starts = [first * self.windows[0].stride - self.windows[0].lo, *(-w.lo for w in self.windows[1:])]
        return counts, [Interval(start, start + (n - 1) * w.stride + w.reach)
                        for start, n, w in zip(starts, counts, self.windows, strict=True)]

    def run(self, call: Call) -> tuple[torch.Tensor, ...]:
        x, held, out = call.tensor(0), call.box(0), call.outs[0]
        if not x.numel():
            return (x.new_zeros(out.shape),)
        counts, reached = self._reached(held)
        wanted = out.intervals()[2:]
        whole = [Interval(min(r.start, w.start), max(r.stop, w.stop)) for r, w in zip(reached, wanted, strict=True)]
        blocks = x.reshape(*out.shape[:2], *self._block, *counts)
        result = x.new_zeros((*out.shape[:2], *map(len, whole)))
        for tap in itertools.product(*map(range, self._block)):
            places = (slice(r.start - a.start + t * w.dilation, r.start - a.start + t * w.dilation
                            + (n - 1) * w.stride + 1, w.stride)
                      for r, a, t, w, n in zip(reached, whole, tap, self.windows, counts, strict=True))
            result[(..., *places)] += blocks[(slice(None), slice(None), *tap)]
        cropped = (slice(w.start - a.start, w.stop - a.start) for a, w in zip(whole, wanted, strict=True))
        return (result[(..., *cropped)].clone(),)

    def emit(self, emitter: Emitter, names: Sequence[str | None], boxes: Sequence[Box | None],
             outs: Sequence[Box]) -> tuple[str, ...]:
        out, held = outs[0], boxes[0]
        if names[0] is None or held is None:  # no block reaches these cells
            return (emitter.zeros(out.shape, self.outputs[0].dtype),)
        _, reached = self._reached(held)
        extents = [emitter.integers([len(r) for r in reached]), emitter.integers(self._block)]
        told = {"pads": [0] * (2 * len(reached))}
        (name,) = emitter.same([names[0], *extents], 1, told)
        pairs = list(zip(reached, out.intervals()[2:], strict=True))
        spans = {axis: (max(w.start - r.start, 0), min(w.stop, r.stop) - r.start)
                 for axis, (r, w) in enumerate(pairs, 2) if w.start > r.start or w.stop < r.stop}
        name = emitter.crop(name, spans)
        lo, hi = [max(r.start - w.start, 0) for r, w in pairs], [max(w.stop - r.stop, 0) for r, w in pairs]
        return (emitter.pad(name, [0, 0, *lo], [0, 0, *hi]) if any((*lo, *hi)) else name,)

    def workspace(self, ins: Sequence[float], outs: Sequence[float]) -> float:
        return outs[0] * self.outputs[0].itemsize

    def flops(self, out: float) -> float:
        return out * math.prod(self._block)
