"""Operators that read a tensor at computed places: the tensor is needed whole, the places as the output is cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
import onnx_ir as ir

from partitioner.geometry import Box
from partitioner.maps import Whole, identity
from partitioner.ops.base import (
    Backward,
    Call,
    Example,
    Need,
    Needs,
    NodeView,
    Operator,
    TensorType,
    Unsupported,
    listed_integers,
)
from partitioner.ops.registry import register

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as functional

    from partitioner.ops.emitter import Emitter
else:
    from partitioner.lazy import functional, torch

_MODES = {"bilinear": "bilinear", "linear": "bilinear", "nearest": "nearest", "bicubic": "bicubic", "cubic": "bicubic"}
_HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@register
@dataclass(frozen=True)
class GridSample(Operator):
    """Cells interpolated at the places that a grid names, in coordinates from -1 to 1 over the whole input.

    Source: ONNX GridSample (16, 20, 22).
    """

    op_types: ClassVar[tuple[str, ...]] = ("GridSample",)
    examples: ClassVar[tuple[Example, ...]] = (
        Example("GridSample", ((2, 3, 5, 7), (2, 4, 6, 2)), between=(-1.3, 1.3)),
        *(Example("GridSample", ((1, 2, 5, 6), (1, 3, 7, 2)), {"mode": mode, "padding_mode": padding,
                                                               "align_corners": corners}, opset=16,
                  between=(-1.4, 1.4))
          for mode, padding, corners in (
              ("bilinear", "zeros", 1), ("bilinear", "border", 0), ("bilinear", "reflection", 1),
              ("bilinear", "reflection", 0), ("nearest", "zeros", 0), ("nearest", "border", 1),
              ("bicubic", "zeros", 0), ("bicubic", "border", 1), ("bicubic", "reflection", 1))),
        Example("GridSample", ((1, 2, 3, 4, 5), (1, 4, 2, 3, 3)), {"mode": "linear"}, opset=20, between=(-1.2, 1.2)),
        Example("GridSample", ((1, 1, 3, 4, 5), (1, 3, 2, 5, 3)), {"mode": "nearest", "padding_mode": "border"},
                opset=20, between=(-1.2, 1.2)),
        Example("GridSample", ((1, 2, 5, 4), (1, 6, 3, 2)), {"mode": "cubic", "align_corners": 1}, opset=22,
                between=(-1.0, 1.0)),
    )

    mode: str
    padding: str
    corners: bool

    @classmethod
    def read(cls, view: NodeView) -> Self:
        data, grid = view.input(0), view.input(1)
        mode, padding = _MODES.get(view.text("mode", "linear")), view.text("padding_mode", "zeros")
        if mode is None or padding not in ("zeros", "border", "reflection"):
            raise Unsupported("its mode or padding_mode is unknown; correct the file")
        if data.rank not in (4, 5) or grid.rank != data.rank or grid.shape[-1] != data.rank - 2:
            raise Unsupported(f"a grid of {list(grid.shape)} on extents {list(data.shape)}; images and volumes only")
        if mode == "bicubic" and data.rank == 5:
            raise Unsupported("cubic sampling of volumes, which onnxruntime does not have either; use linear")
        shape = (*data.shape[:2], *grid.shape[1:-1])
        return cls(view.inputs, (TensorType(shape, data.dtype),), mode, padding, bool(view.int("align_corners", 0)))

    def needs(self, output: int = 0) -> Needs:
        data, grid = self.inputs
        assert data is not None and grid is not None
        channels = (Need(0, identity(data.shape[0])), Need(1, identity(data.shape[1])))
        places = tuple(Need(a + 1 if a else 0, identity(n)) for a, n in enumerate(grid.shape[:-1]))
        return ((*channels, *(Need(None, Whole(n, 1)) for n in data.shape[2:])),
                (*places, Need(None, Whole(grid.shape[-1], 1))))

    def backward(self, ins: Sequence[float], outs: Sequence[float]) -> Backward:
        return Backward(inputs=(0, 1))

    def run(self, call: Call) -> tuple[torch.Tensor, ...]:
        x, grid = call.tensor(0), call.tensor(1)
        wide = torch.float32 if self.outputs[0].dtype in _HALVES else x.dtype
        result = functional.grid_sample(x.to(wide), grid.to(wide), self.mode, self.padding, self.corners)
        return (result.to(x.dtype),)

    def flops(self, out: float) -> float:
        return 16 * out


@register
@dataclass(frozen=True)
class AffineGrid(Operator):
    """The places of a regular grid under an affine map, for `GridSample`: theta @ (x, y, [z,] 1).

    Source: ONNX AffineGrid (20).
    """

    op_types: ClassVar[tuple[str, ...]] = ("AffineGrid",)
    examples: ClassVar[tuple[Example, ...]] = (
        Example("AffineGrid", ((2, 2, 3), np.array([2, 3, 5, 7], np.int64)), opset=20),
        Example("AffineGrid", ((1, 2, 3), np.array([1, 1, 4, 3], np.int64)), {"align_corners": 1}, opset=20),
        Example("AffineGrid", ((2, 3, 4), np.array([2, 1, 3, 4, 2], np.int64)), opset=20),
    )

    corners: bool

    @classmethod
    def read(cls, view: NodeView) -> Self:
        theta, size = view.input(0), listed_integers(view, "size", 1)
        if size is None or len(size) not in (4, 5) or theta.shape != (size[0], len(size) - 2, len(size) - 1):
            raise Unsupported("its size does not fit theta; correct the file")
        shape = (size[0], *size[2:], len(size) - 2)
        return cls(view.inputs, (TensorType(shape, theta.dtype),), bool(view.int("align_corners", 0)))

    def needs(self, output: int = 0) -> Needs:
        shape, count = self.outputs[0].shape, self.outputs[0].shape[-1]
        batch, rows, columns = identity(shape[0]), Whole(count, shape[1]), Whole(count + 1, shape[2])
        return ((Need(0, batch), Need(1, rows), Need(2, columns)), None)

    def run(self, call: Call) -> tuple[torch.Tensor, ...]:
        theta, out = call.tensor(0), call.outs[0]
        wide = torch.float32 if self.outputs[0].dtype in _HALVES else theta.dtype
        lines: list[torch.Tensor] = []
        for n, cells in zip(self.outputs[0].shape[1:-1], out.intervals()[1:-1], strict=True):
            line = torch.arange(cells.start, cells.stop, dtype=wide, device=theta.device)
            step = line * 2 / max(n - 1, 1) if self.corners else (line * 2 + 1) / n
            lines.append(step - 1)
        result = theta.new_zeros((), dtype=wide)
        matrix = theta.to(wide).reshape(theta.shape[0], *[1] * len(lines), *theta.shape[1:])
        for axis, line in enumerate(lines):  # theta's columns are x first, the axes z or y first
            spread = line.reshape([-1 if a == axis else 1 for a in range(len(lines))]).unsqueeze(-1)
            result = result + matrix[..., len(lines) - 1 - axis] * spread
        result = (result + matrix[..., -1])[..., out.intervals()[-1].start : out.intervals()[-1].stop]
        return (result.to(theta.dtype),)

    def emit(self, emitter: Emitter, names: Sequence[str | None], boxes: Sequence[Box | None],
             outs: Sequence[Box]) -> tuple[str, ...]:
        size = [outs[0].shape[0], 1, *self.outputs[0].shape[1:-1]]
        result = emitter.op("AffineGrid", [names[0], emitter.integers(size)], {"align_corners": int(self.corners)})
        spans = {a: (i.start, i.stop) for a, i in enumerate(outs[0].intervals())
                 if a and len(i) < self.outputs[0].shape[a]}
        return (emitter.crop(result, spans),)

    def flops(self, out: float) -> float:
        return 8 * out
