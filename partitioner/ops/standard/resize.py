"""Resize and Upsample: per axis, every output cell is a weighted sum of a few input cells.

Cells and weights come from the global coordinate, so a shard interpolates as the whole tensor does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np

from partitioner.geometry import Box, Interval, Pieces
from partitioner.maps import identity
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
from partitioner.ops.kernels.resampling import Interpolation, Resampling, resample
from partitioner.ops.registry import register

if TYPE_CHECKING:
    import torch

    from partitioner.ops.emitter import Emitter
else:
    from partitioner.lazy import torch

_NEAREST_MODES = ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil", "simple")
_COORDINATES = (
    "half_pixel", "half_pixel_symmetric", "pytorch_half_pixel", "align_corners", "asymmetric",
    "tf_crop_and_resize", "tf_half_pixel_for_nn",
)


@register
@dataclass(frozen=True)
class Resize(Operator):
    """Interpolation to other extents, nearest, linear or cubic, antialiased or not, in every coordinate mode.

    Source: ONNX Resize (10, 11, 13, 18, 19), Upsample (7, 9).
    """

    op_types: ClassVar[tuple[str, ...]] = ("Resize", "Upsample")
    examples: ClassVar[tuple[Example, ...]] = (
        Example("Resize", ((1, 2, 7), None, np.array([1, 1, 2.0], np.float32)), {"mode": "nearest"}, opset=13),
        Example("Resize", ((1, 2, 7, 5), None, None, np.array([1, 2, 13, 11], np.int64)), {"mode": "linear"}),
        Example("Resize", ((1, 1, 5, 6, 7), None, None, np.array([1, 1, 9, 11, 3], np.int64)),
                {"mode": "linear", "coordinate_transformation_mode": "align_corners"}),
        Example("Resize", ((1, 2, 9, 8), None, np.array([1, 1, 1.7, 0.6], np.float32)),
                {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}),
        Example("Resize", ((1, 2, 9), None, None, np.array([1, 2, 4], np.int64)),
                {"mode": "linear", "coordinate_transformation_mode": "pytorch_half_pixel"}),
        Example("Resize", ((2, 1, 7, 5), np.zeros(0, np.float32), np.array([1, 1, 1.7, 0.6], np.float32)),
                {"mode": "cubic"}, opset=11),
        Example("Resize", ((1, 1, 7, 9), None, None, np.array([1, 1, 12, 5], np.int64)),
                {"mode": "cubic", "exclude_outside": 1, "cubic_coeff_a": -0.5}, opset=13),
        Example("Resize", ((1, 1, 7, 9), None, None, np.array([12, 5], np.int64)),
                {"mode": "cubic", "coordinate_transformation_mode": "align_corners", "axes": [2, 3]}),
        Example("Resize", ((1, 2, 11, 9), None, None, np.array([1, 2, 4, 12], np.int64)),
                {"mode": "linear", "antialias": 1}),
        Example("Resize", ((1, 1, 7, 8, 9), None, None, np.array([1, 1, 4, 3, 11], np.int64)),
                {"mode": "linear", "antialias": 1, "exclude_outside": 1}, opset=19),
        Example("Resize", ((1, 1, 13, 11), None, np.array([1, 1, 0.37, 0.6], np.float32)),
                {"mode": "cubic", "antialias": 1}, opset=19),
        Example("Resize", ((1, 1, 9, 11), None, None, np.array([1, 1, 4, 15], np.int64)),
                {"mode": "cubic", "antialias": 1, "exclude_outside": 1, "cubic_coeff_a": -0.5}),
        Example("Resize", ((1, 1, 9, 11), np.array([0, 0, 0.2, -0.1, 1, 1, 0.7, 0.8], np.float32), None,
                           np.array([1, 1, 6, 8], np.int64)),
                {"mode": "cubic", "coordinate_transformation_mode": "tf_crop_and_resize", "extrapolation_value": 3.0}),
        Example("Resize", ((1, 1, 9, 11), None, None, np.array([6, 20], np.int64)),
                {"mode": "linear", "axes": [2, 3], "keep_aspect_ratio_policy": "not_larger"}),
        Example("Resize", ((1, 1, 9, 11), None, None, np.array([6, 20], np.int64)),
                {"mode": "nearest", "axes": [3, 2], "keep_aspect_ratio_policy": "not_smaller"}),
        Example("Upsample", ((1, 2, 5, 4), np.array([1, 1, 2, 3], np.float32)), {"mode": "linear"}, opset=9),
        Example("Upsample", ((1, 2, 5, 4),), {"mode": "nearest", "scales": [1.0, 1.0, 2.0, 2.0]}, opset=7),
    )

    axes: tuple[Resampling | None, ...]
    extrapolation: float

    @classmethod
    def read(cls, view: NodeView) -> Self:
        data = view.input(0)
        _refuse_unknown(view)
        extents, scales = _read_target(view, data)
        _refuse_cubic(view, scales)
        roi = _read_roi(view, data.rank)
        how, same = Interpolation.read(view), extents == data.shape
        axes = tuple(  # onnxruntime copies when no extent changes, and never touches an axis of scale 1
            None if same or scale == 1.0
            else resample(how, n, out, scale, (0.0, 1.0) if roi is None else roi[a])
            for a, (n, out, scale) in enumerate(zip(data.shape, extents, scales, strict=True))
        )
        return cls(view.inputs, (TensorType(extents, data.dtype),), axes, view.float("extrapolation_value", 0.0))

    def needs(self, output: int = 0) -> Needs:
        shape = self.outputs[0].shape
        own = tuple(Need(a, identity(shape[a]) if axis is None else axis.map) for a, axis in enumerate(self.axes))
        return (own, *(None for _ in self.inputs[1:]))

    def backward(self, ins: Sequence[float], outs: Sequence[float]) -> Backward:
        return Backward(workspace=self.outputs[0].itemsize * outs[0])

    def run(self, call: Call) -> tuple[torch.Tensor, ...]:
        result = call.tensor(0)
        if not call.box(0):  # wholly outside a cropped region
            return (result.new_full(call.outs[0].shape, self.extrapolation),)
        for axis in self._order():
            resampling = self.axes[axis]
            assert resampling is not None
            result = self._along(result, axis, resampling, call.box(0).axes[axis], call.outs[0].intervals()[axis])
        return (result,)

    def _order(self) -> list[int]:
        """Axes that shrink most first, so that the tensors between are small."""
        sizes = {a: r.map.n_out / max(1, r.map.n_in) for a, r in enumerate(self.axes) if r is not None}
        return sorted(sizes, key=lambda a: sizes[a])

    def _along(self, x: torch.Tensor, axis: int, resampling: Resampling, held: Pieces,
               out: Interval) -> torch.Tensor:
        index, weight = local_taps(resampling, held, out)
        gathered = [x.index_select(axis, torch.as_tensor(column, device=x.device)) for column in index]
        if resampling.copies:
            return gathered[0]
        shape = [1] * x.dim()
        shape[axis] = len(out)
        factors = [torch.as_tensor(column, dtype=x.dtype, device=x.device).reshape(shape) for column in weight]
        result = gathered[0] * factors[0]
        for tensor, factor in zip(gathered[1:], factors[1:], strict=True):
            result = torch.addcmul(result, tensor, factor)
        if all(resampling.weights):
            return result
        inside = [bool(row) for row in resampling.weights[out.start : out.stop]]
        mask = torch.tensor(inside, device=x.device).reshape(shape)
        return torch.where(mask, result, torch.full((), self.extrapolation, dtype=x.dtype, device=x.device))

    def emit(self, emitter: Emitter, names: Sequence[str | None], boxes: Sequence[Box | None],
             outs: Sequence[Box]) -> tuple[str, ...]:
        result, box = names[0], boxes[0]
        assert box is not None
        dtype = self.outputs[0].dtype.numpy()
        if result is None:  # wholly outside a cropped region
            return (emitter.full(outs[0].shape, self.extrapolation, self.outputs[0].dtype),)
        for axis in self._order():
            resampling = self.axes[axis]
            assert resampling is not None
            index, weight = local_taps(resampling, box.axes[axis], outs[0].intervals()[axis])
            shape = [1] * len(outs[0].axes)
            shape[axis] = index.shape[1]
            gathered = [emitter.op("Gather", [result, emitter.integers([int(i) for i in column])], {"axis": axis})
                        for column in index]
            if resampling.copies:
                result = gathered[0]
                continue
            terms = [emitter.op("Mul", [g, emitter.constant(w.reshape(shape).astype(dtype))])
                     for g, w in zip(gathered, weight, strict=True)]
            result = terms[0]
            for term in terms[1:]:
                result = emitter.op("Add", [result, term])
            outside = np.array([0.0 if row else self.extrapolation
                                for row in resampling.weights[slice(*_bounds(outs[0].intervals()[axis]))]])
            if outside.any():
                result = emitter.op("Add", [result, emitter.constant(outside.reshape(shape).astype(dtype))])
        return (result,)

    def workspace(self, ins: Sequence[float], outs: Sequence[float]) -> float:
        interpolated = [r for r in self.axes if r is not None and not r.copies]
        return 2.0 * self.outputs[0].itemsize * outs[0] if interpolated else 0.0

    def flops(self, out: float) -> float:
        return out * sum(2 * max(map(len, r.weights), default=0) for r in self.axes if r is not None)


def _bounds(out: Interval) -> tuple[int, int]:
    return out.start, out.stop


def local_taps(resampling: Resampling, held: Pieces, out: Interval) -> tuple[Array, Array]:
    """Local positions and weights of every tap: two arrays of extents (taps, cells of `out`).

    Rows of fewer taps name their own first cell again, with weight 0: no other cell, which may not be finite,
    has a part in the result, and the rows are as long in every shard.
    """
    rows = resampling.map.rows[out.start : out.stop]
    weights = resampling.weights[out.start : out.stop]
    count = max(map(len, resampling.map.rows), default=1) or 1
    position = local_positions(held)
    index = np.zeros((count, len(rows)), np.int64)
    weight = np.zeros((count, len(rows)), np.float64)
    for i, (row, factors) in enumerate(zip(rows, weights, strict=True)):
        for t, (cell, factor) in enumerate(zip(row, factors, strict=True)):
            index[t, i], weight[t, i] = position[cell], factor
        if row:
            index[len(row) :, i] = position[row[0]]
    return index, weight


def local_positions(held: Pieces) -> dict[int, int]:
    """Where every held cell lies in the local tensor."""
    cells = [cell for part in held for cell in range(part.start, part.stop)]
    return {cell: position for position, cell in enumerate(cells)}


def _refuse_unknown(view: NodeView) -> None:
    mode = view.text("mode", "nearest")
    if mode not in ("nearest", "linear", "cubic"):
        raise Unsupported(f"interpolation mode '{mode}' is unknown; correct the file")
    if view.text("coordinate_transformation_mode", "half_pixel") not in _COORDINATES:
        raise Unsupported("its coordinate_transformation_mode is unknown; correct the file")
    if view.text("nearest_mode", "round_prefer_floor") not in _NEAREST_MODES:
        raise Unsupported("its nearest_mode is unknown; correct the file")
    if mode != "nearest" and not view.input(0).dtype.is_floating_point():
        raise Unsupported(f"{mode} interpolation of integers rounds as each runtime likes; cast to float first")
    if view.int("antialias", 0) and mode == "nearest":
        raise Unsupported("nearest neighbours are not antialiased; correct the file")
    if view.int("exclude_outside", 0) and mode != "cubic" and not (mode == "linear" and view.int("antialias", 0)):
        raise Unsupported("exclude_outside is for cubic or antialiased interpolation only; export without it")


def _refuse_cubic(view: NodeView, scales: Sequence[float]) -> None:
    image = len(scales) == 2 or (len(scales) == 4 and scales[0] == scales[1] == 1)
    if view.text("mode", "nearest") == "cubic" and not image:
        raise Unsupported("onnxruntime interpolates images by cubics only, of two axes, or four with a batch and a "
                          "channel; export with linear")


def _axes(view: NodeView, rank: int) -> tuple[int, ...]:
    given = view.ints("axes")
    return tuple(range(rank)) if given is None else tuple(a % rank for a in given)


def _scatter(values: Sequence[float], axes: Sequence[int], default: Sequence[float]) -> list[float]:
    found = list(default)
    for axis, value in zip(axes, values, strict=True):
        found[axis] = value
    return found


def _read_target(view: NodeView, data: TensorType) -> tuple[tuple[int, ...], list[float]]:
    """Output extents, and the scale per axis as onnxruntime has it (float32)."""
    axes, rank = _axes(view, data.rank), data.rank
    scales_at = 1 if view.op_type == "Upsample" or view.version < 11 else 2
    sizes = view.constant(3, "sizes") if scales_at == 2 else None
    if sizes is not None and sizes.size:
        return _from_sizes(view, data, axes, [int(n) for n in sizes.reshape(-1)])
    given = view.attributes.get("scales")
    if given is None:
        array = view.constant(scales_at, "scales")
        given = None if array is None or not array.size else array.reshape(-1)
    if given is None or len(given) != len(axes):
        raise Unsupported("neither scales nor sizes fit its input; correct the file")
    scales = [float(np.float32(s)) for s in _scatter([float(s) for s in given], axes, [1.0] * rank)]
    if min(scales) <= 0:
        raise Unsupported(f"scales {scales} must be positive; correct the file")
    grown = [float(np.float32(n) * np.float32(s)) for n, s in zip(data.shape, scales, strict=True)]
    extents = tuple(math.floor(n) for n in grown)
    if min(extents) < 1:
        raise WrongExtents(f"it leaves extents {list(extents)}; use a larger volume")
    return extents, scales


def _from_sizes(view: NodeView, data: TensorType, axes: Sequence[int],
                sizes: Sequence[int]) -> tuple[tuple[int, ...], list[float]]:
    policy = view.text("keep_aspect_ratio_policy", "stretch")
    if len(sizes) != len(axes) or min(sizes) < 1:
        raise WrongExtents(f"sizes {list(sizes)} do not fit its input of {data.rank} axes; use a larger volume")
    ratios = [float(np.float32(size) / np.float32(data.shape[a])) for size, a in zip(sizes, axes, strict=True)]
    if policy != "stretch" and any(a < 0 for a in view.ints("axes") or ()):
        raise Unsupported("with negative axes onnxruntime leaves the extents as they are, whatever its "
                          "keep_aspect_ratio_policy; count the axes from the first one")
    if policy != "stretch":
        ratio = min(ratios) if policy == "not_larger" else max(ratios)
        ratios = [ratio] * len(axes)
        sizes = [math.floor(float(np.float32(ratio) * np.float32(data.shape[a])) + 0.5) for a in axes]
    scales = _scatter(ratios, axes, [1.0] * data.rank)
    extents = _scatter([float(s) for s in sizes], axes, [float(n) for n in data.shape])
    return tuple(int(n) for n in extents), scales


def _read_roi(view: NodeView, rank: int) -> list[tuple[float, float]] | None:
    if view.text("coordinate_transformation_mode", "half_pixel") != "tf_crop_and_resize":
        return None
    array = view.constant(1, "roi")
    axes = _axes(view, rank)
    if array is None or array.size != 2 * len(axes):
        raise Unsupported("tf_crop_and_resize needs a roi with two numbers per axis; correct the file")
    flat = [float(v) for v in array.reshape(-1)]
    starts = _scatter(flat[: len(axes)], axes, [0.0] * rank)
    ends = _scatter(flat[len(axes) :], axes, [1.0] * rank)
    return list(zip(starts, ends, strict=True))
