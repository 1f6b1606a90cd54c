"""Every combination of parameters along one axis against onnxruntime: many nodes side by side in one model.

Extents, taps, paddings and roundings are per-axis matters, so one dimension shows them all; what several axes
do together is for the drawn graphs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from tests.examples import one_graph
from tests.oracle import compile_plan, run_lockstep, run_ort

Array = np.ndarray


@dataclass(frozen=True)
class Item:
    """One node of a grid, reading x."""

    op: str
    attributes: Mapping[str, Any]
    constants: tuple[Array | None, ...] = ()


def check_grid(items: list[Item], x: Array, opset: int, exact: bool) -> None:
    """All nodes on 1 rank, on 3 even shards and on uneven ones with an empty one: onnxruntime's extents and cells."""
    assert items
    constants: dict[str, Array] = {}
    nodes = []
    for index, item in enumerate(items):
        names = ["x"]
        for array in item.constants:
            names.append("" if array is None else f"c{len(constants)}")
            if array is not None:
                constants[names[-1]] = array
        nodes.append(helper.make_node(item.op, names, [f"y{index}"], f"n{index}", **item.attributes))
    outputs = {f"y{i}": (TensorProto.FLOAT, (None,) * x.ndim) for i in range(len(items))}
    model = one_graph(nodes, {"x": x}, constants, outputs, opset)
    expected = run_ort(model, {"x": x})
    n = x.shape[-1]
    layouts = [(None, {})]
    if n >= 3:
        layouts += [("width=3", {}), ("width=3", {"width": (0, 1, 1, n)})]
    for mesh, cuts in layouts:
        found = run_lockstep(compile_plan(model, mesh, cuts), {"x": x}).outputs
        for index, item in enumerate(items):
            mine, theirs = found[f"y{index}"], expected[f"y{index}"]
            assert mine.shape == theirs.shape, f"{item} on {n} cells, {mesh} {cuts}"
            same = np.array_equal(mine, theirs) if exact else np.allclose(mine, theirs, rtol=1e-5, atol=1e-6)
            assert same, f"{item} on {n} cells, {mesh} {cuts}: {mine} instead of {theirs}"


def grid(*names: str, **axes: list[Any]) -> Iterator[dict[str, Any]]:
    """Every combination of the values given."""
    assert not names
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


def ramp(n: int) -> Array:
    """Cells that tell where they came from."""
    return np.arange(1, n + 1, dtype=np.float32).reshape(1, 1, n)


EXTENTS = pytest.mark.parametrize("n", [1, 3, 7, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 4, 5, 8, 11))])


def windows(n: int, op: str, **more: list[Any]) -> Iterator[Item]:
    for g in grid(k=[1, 2, 3, 4], s=[1, 2, 3], d=[1, 2], lo=[0, 1, 2], hi=[0, 1, 3], **more):
        reach, padded = (g["k"] - 1) * g["d"] + 1, n + g["lo"] + g["hi"]
        if op != "Conv" and max(g["lo"], g["hi"]) >= g["k"]:
            continue  # onnxruntime refuses to pad a kernel or more
        if reach > padded or (op != "Conv" and reach > n):
            continue
        attributes = {"kernel_shape": [g["k"]], "strides": [g["s"]], "dilations": [g["d"]], "pads": [g["lo"], g["hi"]]}
        yield Item(op, attributes | {name: g[name] for name in more},
                   (np.arange(1, g["k"] + 1, dtype=np.float32).reshape(1, 1, -1),) if op == "Conv" else ())


@EXTENTS
def test_convolutions(n: int) -> None:
    check_grid(list(windows(n, "Conv")), ramp(n), 18, exact=True)


@EXTENTS
def test_max_pools(n: int) -> None:
    check_grid(list(windows(n, "MaxPool", ceil_mode=[0, 1])), ramp(n), 18, exact=True)


@EXTENTS
def test_average_pools(n: int) -> None:
    check_grid(list(windows(n, "AveragePool", ceil_mode=[0, 1], count_include_pad=[0, 1])), ramp(n), 22, exact=False)


@EXTENTS
def test_average_pools_of_old_opsets(n: int) -> None:
    """Shape inference is wrong for some of these before opset 22; onnxruntime is not, and no more are we."""
    items = [i for i in windows(n, "AveragePool", ceil_mode=[1], count_include_pad=[0, 1])
             if i.attributes["dilations"] == [1]]
    items = [Item(i.op, {k: v for k, v in i.attributes.items() if k != "dilations"}) for i in items]
    check_grid(items, ramp(n), 11, exact=False)


@EXTENTS
@pytest.mark.parametrize("op", ["Conv", "MaxPool", "AveragePool"])
def test_automatic_padding(op: str, n: int) -> None:
    items = []
    for g in grid(k=[1, 2, 3, 4, 5], s=[1, 2, 3], auto=["SAME_UPPER", "SAME_LOWER", "VALID"]):
        if (g["auto"] == "VALID" and g["k"] > n) or (op != "Conv" and (g["s"] > g["k"])):
            continue
        attributes = {"kernel_shape": [g["k"]], "strides": [g["s"]], "auto_pad": g["auto"]}
        weight = np.arange(1, g["k"] + 1, dtype=np.float32).reshape(1, 1, -1)
        for include in (0, 1) if op == "AveragePool" else (None,):
            more = {} if include is None else {"count_include_pad": include}
            items.append(Item(op, attributes | more, (weight,) if op == "Conv" else ()))
    check_grid(items, ramp(n), 18, exact=op != "AveragePool")


@EXTENTS
def test_transposed_convolutions(n: int) -> None:
    items = []
    for g in grid(k=[1, 2, 3, 4], s=[1, 2, 3], d=[1, 2], lo=[0, 1, 2], hi=[0, 2], extra=[0, 1]):
        if g["extra"] >= g["s"] or (n - 1) * g["s"] + (g["k"] - 1) * g["d"] + 1 + g["extra"] - g["lo"] - g["hi"] < 1:
            continue
        weight = np.arange(1, g["k"] + 1, dtype=np.float32).reshape(1, 1, -1)
        items.append(Item("ConvTranspose", {
            "kernel_shape": [g["k"]], "strides": [g["s"]], "dilations": [g["d"]], "pads": [g["lo"], g["hi"]],
            "output_padding": [g["extra"]]}, (weight, np.array([0.5], np.float32))))
    check_grid(items, ramp(n), 18, exact=True)


@EXTENTS
def test_transposed_convolutions_of_given_extents(n: int) -> None:
    """The padding's larger half lies where onnxruntime puts it; a short kernel is not filled up."""
    items = []
    for g in grid(k=[1, 2, 3, 4], s=[1, 2, 3], d=[1, 2], auto=["NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"]):
        full = (n - 1) * g["s"] + (g["k"] - 1) * g["d"] + 1
        weight = np.arange(1, g["k"] + 1, dtype=np.float32).reshape(1, 1, -1)
        attributes = {"kernel_shape": [g["k"]], "strides": [g["s"]], "dilations": [g["d"]], "auto_pad": g["auto"]}
        items.append(Item("ConvTranspose", attributes, (weight,)))
        outs = {n, n + 1, full - 2, full - 1, full, full + 1, full + g["s"] - 1}
        for out in sorted(o for o in outs if n <= o < full + g["s"]):  # onnxruntime loads none below the input's
            items.append(Item("ConvTranspose", attributes | {"output_shape": [out]}, (weight,)))
    check_grid(items, ramp(n), 18, exact=True)


COORDINATES = ["half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric", "half_pixel_symmetric"]
ROUNDINGS = ["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"]
NOTHING = np.zeros(0, np.float32)


def resizes(n: int, mode: str, coordinates: list[str], most: int) -> Iterator[Item]:
    for g in grid(coordinate=coordinates, rounding=ROUNDINGS if mode == "nearest" else [None]):
        attributes = {"mode": mode, "coordinate_transformation_mode": g["coordinate"]}
        attributes |= {} if g["rounding"] is None else {"nearest_mode": g["rounding"]}
        for factor in (1.0, 1.3, 2.0, 2.6, 3.0, 0.7, 1.5, 0.5, 0.4):
            scale = np.array([1, 1, factor], np.float32)
            if n * factor >= 1:
                yield Item("Resize", attributes, (NOTHING, scale))
        for out in range(1, most):
            yield Item("Resize", attributes, (NOTHING, NOTHING, np.array([1, 1, out], np.int64)))


@EXTENTS
def test_nearest_resizes(n: int) -> None:
    check_grid(list(resizes(n, "nearest", COORDINATES, 15)), ramp(n), 19, exact=True)


@EXTENTS
def test_linear_resizes(n: int) -> None:
    """onnxruntime interpolates between float32 coordinates; the ramp makes the difference plain."""
    check_grid(list(resizes(n, "linear", COORDINATES, 15)), ramp(n), 19, exact=False)


@EXTENTS
def test_resizes_of_older_opsets(n: int) -> None:
    for opset, coordinates in ((11, ["tf_half_pixel_for_nn", "half_pixel"]), (13, ["asymmetric"])):
        check_grid(list(resizes(n, "nearest", coordinates, 9)), ramp(n), opset, exact=True)
    scales = [np.array([1, 1, f], np.float32) for f in (1.0, 1.5, 2.0, 2.6, 3.0)]
    check_grid([Item("Upsample", {"mode": m}, (s,)) for m in ("nearest", "linear") for s in scales], ramp(n), 9, False)
    scales += [np.array([1, 1, f], np.float32) for f in (0.7, 0.5) if n * f >= 1]
    check_grid([Item("Resize", {"mode": m}, (s,)) for m in ("nearest", "linear") for s in scales], ramp(n), 10, False)


@EXTENTS
@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_crop_and_resize(mode: str, n: int) -> None:
    items = []
    for g in grid(start=[0.0, 0.25, -0.25, 0.6], stop=[1.0, 0.75, 1.25, 0.1], out=[1, 2, 3, 5, n, 9]):
        attributes = {"mode": mode, "coordinate_transformation_mode": "tf_crop_and_resize", "extrapolation_value": 0.5}
        roi = np.array([0, 0, g["start"], 1, 1, g["stop"]], np.float32)
        items.append(Item("Resize", attributes, (roi, NOTHING, np.array([1, 1, g["out"]], np.int64))))
    check_grid(items, ramp(n), 18, exact=False)


@pytest.mark.parametrize("policy", ["stretch", "not_larger", "not_smaller"])
def test_resizes_that_keep_the_aspect(policy: str) -> None:
    x = np.random.default_rng(0).standard_normal((1, 2, 7, 5)).astype(np.float32)
    items = [Item("Resize", {"mode": "nearest", "axes": [2, 3], "keep_aspect_ratio_policy": policy},
                  (None, None, np.array([a, b], np.int64))) for a in (3, 8, 14) for b in (2, 6, 11)]
    check_grid(items, x, 18, exact=True)


@EXTENTS
@pytest.mark.parametrize("mode", ["constant", "reflect", "edge", "wrap"])
def test_pads(mode: str, n: int) -> None:
    items = []
    for lo, hi in itertools.product(range(-3, 4), repeat=2):
        left = n + min(lo, 0) + min(hi, 0)
        most = {"reflect": left - 1, "wrap": left}.get(mode, 3)
        if left >= 1 and max(lo, hi) <= most:
            amounts = np.array([0, 0, lo, 0, 0, hi], np.int64)
            items.append(Item("Pad", {"mode": mode}, (amounts, np.array(0.5, np.float32))))
    check_grid(items, ramp(n), 19, exact=True)


@EXTENTS
def test_slices(n: int) -> None:
    items = []
    for start, end, step in itertools.product((-100, -n, -2, 0, 1, n - 1, n), (-100, -n - 1, -1, 0, 2, n, 100),
                                              (1, 2, 3, -1, -2)):
        if len(range(n)[_python_slice(start, end, step, n)]):
            items.append(Item("Slice", {}, tuple(np.array([v], np.int64) for v in (start, end, 2, step))))
    check_grid(items, ramp(n), 13, exact=True)


def _python_slice(start: int, end: int, step: int, n: int) -> slice:
    return slice(start, None if step < 0 and end < -n else end, step)


