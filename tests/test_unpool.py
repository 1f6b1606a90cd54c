"""Max pools with indices and their inverse in one network, and indices from elsewhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from partitioner.errors import ExecutionError
from tests.oracle import compile_plan, run_lockstep, run_ort
from tests.test_expand import expanded
from tests.test_quantized import one_node

FLOAT = np.float32


def segnet(shape: tuple[int, ...], **window: Any) -> onnx.ModelProto:
    """Pool, convolve what was pooled, put it back to where it came from."""
    rank = len(shape) - 2
    weight = np.random.default_rng(1).standard_normal((shape[1], shape[1], *[3] * rank)).astype(FLOAT)
    unpool = {k: v for k, v in window.items() if k in ("kernel_shape", "strides", "pads")}
    nodes = [helper.make_node("MaxPool", ["x"], ["top", "where"], **window),
             helper.make_node("Conv", ["top", "w"], ["inner"], pads=[1] * (2 * rank)),
             helper.make_node("MaxUnpool", ["inner", "where", "extents"], ["back"], **unpool),
             helper.make_node("Relu", ["back"], ["y"])]
    graph = helper.make_graph(
        nodes, "segnet", [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, shape),
         helper.make_empty_tensor_value_info("where")],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(np.array(shape, np.int64), "extents")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


CASES = [
    ((2, 3, 13, 9), {"kernel_shape": [2, 2], "strides": [2, 2]}),
    ((2, 3, 13, 9), {"kernel_shape": [3, 2], "strides": [2, 1], "pads": [1, 0, 1, 0]}),
    ((1, 2, 8, 9, 10), {"kernel_shape": [2, 3, 2], "strides": [2, 3, 2]}),
    ((2, 3, 21), {"kernel_shape": [3], "strides": [2], "pads": [1, 1]}),
]


MESHES: dict[int, list[str | None]] = {
    3: [None, "batch=2", "width=2", "width=3"],
    4: [None, "batch=2", "height=2", "height=3", "height=2,width=2"],
    5: [None, "depth=2", "depth=3", "depth=2,width=2"],
}


@pytest.mark.parametrize(("shape", "window", "mesh"), [(*c, m) for c in CASES for m in MESHES[len(c[0])]], ids=str)
def test_there_and_back(shape: tuple[int, ...], window: dict[str, Any], mesh: str | None) -> None:
    """Windows that overlap give one cell to several: the last one stays, as in onnxruntime."""
    model = segnet(shape, **window)
    x = np.random.default_rng(2).standard_normal(shape).astype(FLOAT)
    expected, plan = run_ort(model, {"x": x}), compile_plan(model, mesh)
    found = run_lockstep(plan, {"x": x}).outputs
    again = run_ort(expanded(plan), {"x": x})
    for result in (found, again):
        assert np.array_equal(result["where"], expected["where"])
        assert np.abs(result["y"] - expected["y"]).max() < 1e-5
        assert np.array_equal(result["y"] != 0, expected["y"] != 0)


def test_indices_from_elsewhere_are_an_error_on_shards_only() -> None:
    x = np.arange(1, 17, dtype=FLOAT).reshape(2, 1, 8)
    indices = np.random.default_rng(3).permutation(32)[:16].reshape(2, 1, 8)
    model, inputs = one_node("MaxUnpool", [x, indices], given=2, kernel_shape=[2], strides=[2])
    whole = run_lockstep(compile_plan(model, None), inputs).outputs["y0"]
    assert np.array_equal(whole, run_ort(model, inputs)["y0"])
    for mesh in ("width=2", "batch=2"):
        with pytest.raises(ExecutionError, match="an index is not in its window"):
            run_lockstep(compile_plan(model, mesh), inputs)


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("mesh", [None, "batch=2", "height=3", "height=2,width=2"])
def test_indices_of_expanded_pools(order: int, mesh: str | None) -> None:
    x = np.random.default_rng(4).standard_normal((2, 3, 11, 9)).astype(FLOAT)
    for window in ({"pads": [2, 1, 0, 2]}, {"dilations": [2, 1]}, {"ceil_mode": 1}, {"auto_pad": "SAME_UPPER"}):
        model, inputs = one_node("MaxPool", [x], outputs=2, kernel_shape=[3, 4], strides=[2, 3], storage_order=order,
                                 **window)
        expected, plan = run_ort(model, inputs), compile_plan(model, mesh)
        for found in (run_lockstep(plan, inputs).outputs, run_ort(expanded(plan), inputs)):
            assert np.array_equal(found["y0"], expected["y0"]) and np.array_equal(found["y1"], expected["y1"])
