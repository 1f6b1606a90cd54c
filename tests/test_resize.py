"""Resize in every mode against onnxruntime: random extents, scales, regions; whole and on meshes."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import pytest

from partitioner.errors import PartitionError
from tests.oracle import close, compile_plan, error, reference64, run_lockstep, run_ort
from tests.test_quantized import one_node

FLOAT = np.float32
COORDINATES = ["half_pixel", "half_pixel_symmetric", "pytorch_half_pixel", "align_corners", "asymmetric",
               "tf_crop_and_resize", "tf_half_pixel_for_nn"]
NEAREST_MODES = ["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"]
WAYS: list[dict[str, Any]] = [
    *({"mode": "nearest", "nearest_mode": name} for name in NEAREST_MODES),
    {"mode": "linear"},
    {"mode": "linear", "antialias": 1},
    {"mode": "linear", "antialias": 1, "exclude_outside": 1},
    *({"mode": "cubic", "antialias": antialias, "exclude_outside": exclude, "cubic_coeff_a": a}
      for antialias in (0, 1) for exclude in (0, 1) for a in (-0.75, -0.5)),
]
MESHES = [None, "height=2", "height=3,width=2"]


def check(inputs: list[Any], opset: int, limit: float = 2e-5, **told: Any) -> None:
    """Every mesh against onnxruntime, and float64 shards against the float64 whole by a formula of its own."""
    model, fed = one_node(inputs[0], inputs[1:], opset=opset, **told)
    expected, exact = run_ort(model, fed)["y0"], reference64(model, fed)["y0"]
    assert close(exact.astype(expected.dtype), expected, limit), f"the formula: {error(exact, expected)}"
    for mesh in MESHES:
        found = run_lockstep(compile_plan(model, mesh), fed).outputs["y0"]
        assert close(found, expected, limit), f"{mesh}: {error(found, expected)}"


def draw(name: str) -> tuple[np.random.Generator, np.ndarray]:
    random = np.random.default_rng(zlib.crc32(name.encode()))
    return random, random.standard_normal((1, 2, *random.integers(3, 14, 2))).astype(FLOAT)


@pytest.mark.parametrize("coordinate", COORDINATES)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way.values())))
def test_every_way(way: dict[str, Any], coordinate: str) -> None:
    random, x = draw(f"{way}{coordinate}")
    opset = 19 if coordinate == "half_pixel_symmetric" or way.get("antialias") else 13
    told = {k: v for k, v in way.items() if opset > 13 or k != "antialias"}
    for _ in range(2):
        sizes = np.array([1, 2, *random.integers(1, 20, 2)], np.int64)
        corners = random.uniform([0, 0, -0.2, -0.1, 1, 1, 0.6, 0.5], [0, 0, 0.3, 0.4, 1, 1, 1.2, 1.1]).astype(FLOAT)
        roi = corners if coordinate == "tf_crop_and_resize" else None
        check(["Resize", x, roi, None, sizes], opset, coordinate_transformation_mode=coordinate,
              extrapolation_value=2.5, **told)
        scales = np.array([1, 1, *random.uniform(0.35, 2.7, 2)], FLOAT)
        check(["Resize", x, roi, scales], opset, coordinate_transformation_mode=coordinate,
              extrapolation_value=2.5, **told)


@pytest.mark.parametrize("policy", ["stretch", "not_larger", "not_smaller"])
@pytest.mark.parametrize("axes", [[2, 3], [3, 2], [3]])
def test_aspect_ratio(policy: str, axes: list[int]) -> None:
    random, x = draw(f"{policy}{axes}")
    for mode in ("nearest", "linear", "cubic"):
        sizes = random.integers(2, 20, len(axes)).astype(np.int64)
        check(["Resize", x, None, None, sizes], 18, axes=axes, keep_aspect_ratio_policy=policy, mode=mode)


def test_regions_of_some_axes() -> None:
    _, x = draw("regions")
    check(["Resize", x, np.array([0.1, -0.2, 0.9, 1.1], FLOAT), None, np.array([9, 6], np.int64)], 19, axes=[3, 2],
          mode="cubic", coordinate_transformation_mode="tf_crop_and_resize")


@pytest.mark.parametrize("mode", ["nearest", "linear"])
@pytest.mark.parametrize("opset", [7, 9, 10])
def test_old_opsets(opset: int, mode: str) -> None:
    random, x = draw(f"{opset}{mode}")
    for _ in range(4):
        scales = np.array([1, 1, *random.uniform(1.0 if opset < 10 else 0.4, 2.7, 2)], FLOAT)
        if opset == 7:
            check(["Upsample", x], 7, mode=mode, scales=[float(s) for s in scales])
        else:
            check(["Upsample" if opset == 9 else "Resize", x, scales], opset, mode=mode)


def test_volumes_antialiased() -> None:
    x = np.random.default_rng(5).standard_normal((1, 2, 9, 7, 8)).astype(FLOAT)
    for sizes in ((4, 9, 3), (9, 3, 12)):
        check(["Resize", x, None, None, np.array([1, 2, *sizes], np.int64)], 19, mode="linear", antialias=1)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
def test_integers_of_the_nearest_cells(dtype: Any) -> None:
    x = np.random.default_rng(6).integers(0, 100, (1, 2, 9, 7)).astype(dtype)
    check(["Resize", x, None, None, np.array([1, 2, 13, 5], np.int64)], 13, limit=0.0, mode="nearest")


@pytest.mark.parametrize(("shape", "sizes", "told", "reason"), [
    ((1, 1, 5, 6, 7), (1, 1, 5, 9, 9), {"mode": "cubic"}, "images by cubics only"),
    ((1, 6, 7), (1, 6, 9), {"mode": "cubic"}, "images by cubics only"),
    ((1, 1, 6, 7), (1, 1, 9, 9), {"mode": "nearest", "antialias": 1}, "not antialiased"),
    ((1, 1, 6, 7), (1, 1, 9, 9), {"mode": "linear", "exclude_outside": 1}, "exclude_outside"),
    ((1, 1, 6, 7), (9, 9), {"axes": [-2, -1], "keep_aspect_ratio_policy": "not_larger"}, "negative axes"),
])
def test_what_onnxruntime_lacks_is_refused(shape: tuple[int, ...], sizes: tuple[int, ...], told: dict[str, Any],
                                           reason: str) -> None:
    model, _ = one_node("Resize", [np.zeros(shape, FLOAT), None, None, np.array(sizes, np.int64)], opset=19, **told)
    with pytest.raises(PartitionError, match=reason):
        compile_plan(model, None)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("mode", ["linear", "cubic"])
def test_cells_that_are_no_numbers_stay_with_those_that_read_them(mode: str, bad: float) -> None:
    """The first cell of a shard has no part in rows of fewer taps elsewhere."""
    x = np.random.default_rng(0).standard_normal((1, 2, 7, 6)).astype(FLOAT)
    x[0, 0, 0, 0] = x[0, 1, 4, 3] = bad
    told: dict[str, Any] = {"mode": mode, "coordinate_transformation_mode": "align_corners"}
    model, fed = one_node("Resize", [x, None, None, np.array([1, 2, 13, 11], np.int64)], opset=19, **told)
    expected = run_ort(model, fed)["y0"]
    whole = run_lockstep(compile_plan(model, None), fed).outputs["y0"]
    assert not (~np.isfinite(whole) & np.isfinite(expected)).any()
    for mesh in MESHES[1:]:
        found = run_lockstep(compile_plan(model, mesh), fed).outputs["y0"]
        assert np.array_equal(found, whole, equal_nan=True)
