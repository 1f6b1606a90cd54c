"""The float64 reference: an ONNX graph on whole tensors, by numpy alone.

Written from the ONNX operator definitions, one formula per operator, without a line of the package under
test; `test_reference.py` ties it to onnxruntime.  Where the definition leaves a choice (the split of the
padding of transposed convolutions, float32 coordinates of nearest resizing, divisors under ceil_mode) it
does what onnxruntime does.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from tests.reference_pointwise import POINTWISE
from tests.reference_resize import resize

Array = np.ndarray


@dataclass(frozen=True)
class Node:
    """A node with its attributes as plain values."""

    op: str
    version: int
    attributes: Mapping[str, Any]

    def get(self, name: str, default: Any = None) -> Any:
        return self.attributes.get(name, default)

    def ints(self, name: str, xs: Sequence[Array | None], index: int) -> list[int] | None:
        """Integers from an attribute (old opsets) or a constant input (new ones)."""
        if name in self.attributes:
            return list(self.attributes[name])
        if index < len(xs) and xs[index] is not None:
            return [int(v) for v in np.asarray(xs[index]).reshape(-1)]
        return None


Rule = Callable[[Node, list[Any]], Array | tuple[Array, ...]]
"""The output of a node, or all of its outputs."""
RULES: dict[str, Rule] = dict(POINTWISE)


def rule(*names: str) -> Callable[[Rule], Rule]:
    def add(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return add


def reference64(model: onnx.ModelProto, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """All outputs of the model, floating-point numbers in float64 throughout."""
    opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    values: dict[str, Any] = {"": None}
    values |= {t.name: widen(numpy_helper.to_array(t)) for t in model.graph.initializer}
    values |= {name: widen(np.asarray(array)) for name, array in inputs.items()}
    for node in model.graph.node:
        found = evaluate(node, opset, [values[name] for name in node.input])
        values |= dict(zip(node.output, found, strict=False))
    return {o.name: values[o.name] for o in model.graph.output}


def evaluate(node: onnx.NodeProto, opset: int, xs: list[Any]) -> list[Array]:
    """The outputs of one node: by our own formula, else by onnx's reference implementation in float64."""
    attributes = {a.name: _plain(onnx.helper.get_attribute_value(a)) for a in node.attribute}
    if node.op_type not in RULES:
        return _onnx_reference(node, opset, xs)
    found = RULES[node.op_type](Node(node.op_type, opset, attributes), xs)
    return [np.asarray(a) for a in found] if isinstance(found, tuple) else [np.asarray(found)]


def _onnx_reference(node: onnx.NodeProto, opset: int, xs: list[Any]) -> list[Array]:
    """Operators for which onnx's own implementation is right (it is wrong for LRN and opset-11 Softmax)."""
    fed = {name: x for name, x in zip(node.input, xs, strict=True) if name}
    graph = onnx.helper.make_graph(
        [node], "one", [onnx.helper.make_value_info(name, onnx.TypeProto()) for name in fed],
        [onnx.helper.make_value_info(name, onnx.TypeProto()) for name in node.output if name])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    return [np.asarray(a) for a in ReferenceEvaluator(model).run(None, fed)]


def widen(array: Array) -> Array:
    """Floating-point numbers as float64, others as they are."""
    return array.astype(np.float64) if array.dtype.kind == "f" else array


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    return widen(numpy_helper.to_array(value)) if isinstance(value, onnx.TensorProto) else value


# --- convolutions ------------------------------------------------------------------------------------


def paddings(node: Node, extents: Sequence[int], kernel: Sequence[int]) -> list[tuple[int, int]]:
    """Padding before and after every spatial axis."""
    count, auto = len(extents), node.get("auto_pad", "NOTSET")
    strides, dilations = node.get("strides", [1] * count), node.get("dilations", [1] * count)
    given = node.get("pads", [0] * (2 * count))
    if auto == "NOTSET":
        return [(given[a], given[a + count]) for a in range(count)]
    if auto == "VALID":
        return [(0, 0)] * count
    found: list[tuple[int, int]] = []
    for n, k, s, d in zip(extents, kernel, strides, dilations, strict=True):
        windows = math.ceil(n / s)
        total = max(0, (windows - 1) * s + d * (k - 1) + 1 - n)
        less = total // 2
        found.append((less, total - less) if auto == "SAME_UPPER" else (total - less, less))
    return found


@rule("Conv")
def conv(node: Node, xs: list[Any]) -> Array:
    x, w, *bias = xs
    spatial, group = x.ndim - 2, node.get("group", 1)
    strides, dilations = node.get("strides", [1] * spatial), node.get("dilations", [1] * spatial)
    pads = paddings(node, x.shape[2:], w.shape[2:])
    x = np.pad(x, [(0, 0), (0, 0), *pads])
    reach = [(k - 1) * d + 1 for k, d in zip(w.shape[2:], dilations, strict=True)]
    extents = [(n - r) // s + 1 for n, r, s in zip(x.shape[2:], reach, strides, strict=True)]
    assert min(extents) >= 1
    x = x.reshape(x.shape[0], group, -1, *x.shape[2:])
    w = w.reshape(group, w.shape[0] // group, *w.shape[1:])
    out = np.zeros((x.shape[0], group, w.shape[1], *extents))
    for tap in itertools.product(*map(range, w.shape[3:])):
        cells = tuple(slice(t * d, t * d + (n - 1) * s + 1, s)
                      for t, d, s, n in zip(tap, dilations, strides, extents, strict=True))
        out += np.einsum("bgi...,goi->bgo...", x[(..., *cells)], w[(..., *tap)])
    return add_bias(out.reshape(x.shape[0], -1, *extents), bias)


def add_bias(x: Array, bias: Sequence[Any]) -> Array:
    return x if not bias or bias[0] is None else x + bias[0].reshape(-1, *[1] * (x.ndim - 2))


@rule("ConvTranspose")
def conv_transpose(node: Node, xs: list[Any]) -> Array:
    """Every input cell scatters its kernel; then padding is cropped, output_padding appended."""
    x, w, *bias = xs
    spatial, group = x.ndim - 2, node.get("group", 1)
    strides, dilations = node.get("strides", [1] * spatial), node.get("dilations", [1] * spatial)
    extra = node.get("output_padding", [0] * spatial)
    steps = list(zip(x.shape[2:], strides, dilations, w.shape[2:], extra, strict=True))
    full = [(n - 1) * s + (k - 1) * d + 1 for n, s, d, k, _ in steps]
    cells_in = x.reshape(x.shape[0], group, -1, *x.shape[2:])
    weight = w.reshape(group, w.shape[0] // group, *w.shape[1:])
    out = np.zeros((x.shape[0], group, w.shape[1], *full))
    for tap in itertools.product(*map(range, w.shape[2:])):
        cells = tuple(slice(t * d, t * d + (n - 1) * s + 1, s)
                      for t, (n, s, d, _, _) in zip(tap, steps, strict=True))
        out[(..., *cells)] += np.einsum("bgi...,gio->bgo...", cells_in, weight[(..., *tap)])
    out = out.reshape(x.shape[0], -1, *full)
    for axis, (lo, hi) in enumerate(_transposed_paddings(node, steps)):
        out = _crop_or_grow(out, axis + 2, lo, hi - extra[axis])
    assert min(out.shape) >= 1
    return add_bias(out, bias)


def _transposed_paddings(node: Node, steps: Sequence[tuple[int, ...]]) -> list[tuple[int, int]]:
    count, auto = len(steps), node.get("auto_pad", "NOTSET")
    given, wanted = node.get("pads", [0] * (2 * count)), node.get("output_shape")
    found: list[tuple[int, int]] = []
    for axis, (n, s, d, k, extra) in enumerate(steps):
        target = wanted[len(wanted) - count + axis] if wanted else None
        if target is None and auto.startswith("SAME"):
            target = min(n * s, (n - 1) * s + extra + (k - 1) * d + 1)
        if target is None:
            found.append((given[axis], given[axis + count]) if auto == "NOTSET" else (0, 0))
            continue
        total = (n - 1) * s + extra + (k - 1) * d + 1 - target
        less = max(0, total) // 2
        lo = less if auto == "SAME_UPPER" else max(0, total) - less
        found.append((lo, total - lo))
    return found


def _crop_or_grow(x: Array, axis: int, lo: int, hi: int) -> Array:
    grow = [(0, 0)] * x.ndim
    grow[axis] = (max(0, -lo), max(0, -hi))
    crop = [slice(None)] * x.ndim
    crop[axis] = slice(max(0, lo), x.shape[axis] - max(0, hi))
    return np.pad(x[tuple(crop)], grow)


# --- pools -------------------------------------------------------------------------------------------


def window_cells(n: int, k: int, s: int, d: int, pads: tuple[int, int], ceil_mode: bool) -> list[list[int]]:
    """The cells under every window along one axis, those in the padding included; found one by one."""
    lo, hi = pads
    reach, found, start = (k - 1) * d + 1, [], -lo
    while start + reach <= n + hi:
        found.append([start + t * d for t in range(k)])
        start += s
    if ceil_mode and start - s + reach < n + hi and start < n:
        found.append([start + t * d for t in range(k)])
    return found


def pool_axes(node: Node, x: Array) -> tuple[list[list[list[int]]], list[tuple[int, int]]]:
    """The cells under every window along each spatial axis, and the padding."""
    kernel = node.get("kernel_shape")
    count = len(kernel)
    strides, dilations = node.get("strides", [1] * count), node.get("dilations", [1] * count)
    pads, ceil = paddings(node, x.shape[2:], kernel), bool(node.get("ceil_mode", 0))
    return [window_cells(n, k, s, d, p, ceil) for n, k, s, d, p in
            zip(x.shape[2:], kernel, strides, dilations, pads, strict=True)], pads


@rule("AveragePool")
def average_pool(node: Node, xs: list[Any]) -> Array:
    x = xs[0]
    axes, pads = pool_axes(node, x)
    include = bool(node.get("count_include_pad", 0))
    for axis, (rows, (lo, hi)) in enumerate(zip(axes, pads, strict=True)):
        n = x.shape[axis + 2]
        inside = [[c for c in row if 0 <= c < n] for row in rows]
        counted = [[c for c in row if -lo <= c < n + hi] for row in rows] if include else inside
        x = np.stack([np.take(x, row, axis + 2).sum(axis + 2) / len(count)
                      for row, count in zip(inside, counted, strict=True)], axis + 2)
    return x


@rule("GlobalAveragePool")
def global_average(node: Node, xs: list[Any]) -> Array:
    return xs[0].mean(tuple(range(2, xs[0].ndim)), keepdims=True)


@rule("GlobalMaxPool")
def global_max(node: Node, xs: list[Any]) -> Array:
    return xs[0].max(tuple(range(2, xs[0].ndim)), keepdims=True)


# --- normalisation, softmax, reductions --------------------------------------------------------------


@rule("BatchNormalization")
def batch_norm(node: Node, xs: list[Any]) -> Array:
    x = xs[0]
    scale, bias, mean, variance = (v.reshape(-1, *[1] * (x.ndim - 2)) for v in xs[1:5])
    return (x - mean) / np.sqrt(variance + node.get("epsilon", 1e-5)) * scale + bias


@rule("InstanceNormalization")
def instance_norm(node: Node, xs: list[Any]) -> Array:
    x, scale, bias = xs
    axes, shape = tuple(range(2, x.ndim)), (-1, *[1] * (x.ndim - 2))
    deviation = x - x.mean(axes, keepdims=True)
    spread = np.sqrt((deviation**2).mean(axes, keepdims=True) + node.get("epsilon", 1e-5))
    return deviation / spread * scale.reshape(shape) + bias.reshape(shape)


@rule("Softmax", "LogSoftmax")
def softmax(node: Node, xs: list[Any]) -> Array:
    x = xs[0]
    axis = node.get("axis", -1 if node.version >= 13 else 1) % x.ndim
    axes = (axis,) if node.version >= 13 else tuple(range(axis, x.ndim))
    shifted = x - x.max(axes, keepdims=True)
    total = np.exp(shifted).sum(axes, keepdims=True)
    return np.exp(shifted) / total if node.op == "Softmax" else shifted - np.log(total)


@rule("Gemm")
def gemm(node: Node, xs: list[Any]) -> Array:
    a, b, *rest = xs
    product = (a.T if node.get("transA", 0) else a) @ (b.T if node.get("transB", 0) else b)
    found = node.get("alpha", 1.0) * product
    return found if not rest or rest[0] is None else found + node.get("beta", 1.0) * rest[0]


# --- moving cells ------------------------------------------------------------------------------------


@rule("Resize", "Upsample")
def resize_rule(node: Node, xs: list[Any]) -> Array:
    return resize(node.op, node.version, node.attributes, xs)


@rule("Pad")
def pad(node: Node, xs: list[Any]) -> Array:
    """Negative amounts crop first, positive ones then pad what is left (as onnxruntime does)."""
    x, mode = xs[0], node.get("mode", "constant")
    given = node.ints("pads", xs, 1)
    axes = node.ints("axes", xs, 3) or list(range(x.ndim))
    amounts = [(0, 0)] * x.ndim
    for i, axis in enumerate(axes):
        amounts[axis] = (given[i], given[i + len(axes)])
    crop = tuple(slice(max(0, -lo), n - max(0, -hi)) for n, (lo, hi) in zip(x.shape, amounts, strict=True))
    grow = [(max(0, lo), max(0, hi)) for lo, hi in amounts]
    if mode != "constant":
        return np.pad(x[crop], grow, mode=mode)
    value = node.get("value", 0.0) if node.version < 11 else (xs[2] if len(xs) > 2 and xs[2] is not None else 0.0)
    return np.pad(x[crop], grow, constant_values=np.asarray(value).reshape(-1)[0])


@rule("Slice")
def slice_(node: Node, xs: list[Any]) -> Array:
    x, starts, ends = xs[0], node.ints("starts", xs, 1), node.ints("ends", xs, 2)
    axes = node.ints("axes", xs, 3) or list(range(len(starts)))
    steps = node.ints("steps", xs, 4) or [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        n = x.shape[axis]
        start, end = (v + n if v < 0 else v for v in (start, end))
        first, last = (min(max(start, 0), n - 1 if step < 0 else n), min(max(end, -1 if step < 0 else 0), n))
        x = np.take(x, list(range(first, last, step)), axis)
    return x


@rule("Transpose")
def transpose(node: Node, xs: list[Any]) -> Array:
    return np.transpose(xs[0], node.get("perm"))


@rule("Reshape")
def reshape(node: Node, xs: list[Any]) -> Array:
    x, target = xs[0], node.ints("shape", xs, 1)
    return x.reshape([x.shape[i] if n == 0 and not node.get("allowzero", 0) else n for i, n in enumerate(target)])


@rule("Flatten")
def flatten(node: Node, xs: list[Any]) -> Array:
    axis = node.get("axis", 1)
    axis = axis + xs[0].ndim if axis < 0 else axis
    return xs[0].reshape(math.prod(xs[0].shape[:axis]), -1)


@rule("Squeeze")
def squeeze(node: Node, xs: list[Any]) -> Array:
    axes = node.ints("axes", xs, 1)
    return np.squeeze(xs[0], None if axes is None else tuple(axes))


@rule("Unsqueeze")
def unsqueeze(node: Node, xs: list[Any]) -> Array:
    return np.expand_dims(xs[0], tuple(node.ints("axes", xs, 1)))


@rule("Concat")
def concat(node: Node, xs: list[Any]) -> Array:
    return np.concatenate(xs, node.get("axis", 1))


@rule("Cast")
def cast(node: Node, xs: list[Any]) -> Array:
    return widen(xs[0].astype(onnx.helper.tensor_dtype_to_np_dtype(node.get("to"))))


@rule("CastLike")
def cast_like(node: Node, xs: list[Any]) -> Array:
    return xs[0].astype(xs[1].dtype)


@rule("Constant")
def constant(node: Node, xs: list[Any]) -> Array:
    return np.asarray(next(iter(node.attributes.values())))


@rule("ConstantOfShape")
def constant_of_shape(node: Node, xs: list[Any]) -> Array:
    return np.full([int(n) for n in xs[0]], np.asarray(node.get("value", 0.0)).reshape(-1)[0])


@rule("Shape")
def shape(node: Node, xs: list[Any]) -> Array:
    return np.array(xs[0].shape[node.get("start", 0) : node.get("end")], np.int64)


import tests.reference_index  # noqa: E402
import tests.reference_norms  # noqa: E402  registers its rules
import tests.reference_pools  # noqa: E402
import tests.reference_quantized  # noqa: E402, F401
