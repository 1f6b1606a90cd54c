"""Gelu where x is infinite, not a number, or among the largest: as onnxruntime has it, on every shard."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from onnx_ir import to_proto

from partitioner.ops.kernels.gelu import gelu
from passes.expand import expand
from tests.oracle import close, compile_plan, run_lockstep, run_ort

Array = np.ndarray
SHAPE = (2, 3, 9, 7)
ODD = (np.inf, -np.inf, np.nan, 3.4e38, -3.4e38, 1e30, 2e4, 1e4, -2e4, 20.0, -20.0, -5.5, 0.0)


def cells() -> Array:
    x = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    x.reshape(-1)[:: 7][: 4 * len(ODD)] = np.tile(np.float32(ODD), 4)
    return x


def model(op_type: str, domain: str, **attributes: str) -> onnx.ModelProto:
    bias = [numpy_helper.from_array(np.full(7, 0.25, np.float32), "b")] if op_type == "BiasGelu" else []
    node = helper.make_node(op_type, ["x", *(b.name for b in bias)], ["y"], domain=domain, **attributes)
    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, SHAPE) for name in "xy")
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(helper.make_graph([node], "g", [x], [y], bias), opset_imports=opsets, ir_version=10)


@pytest.mark.parametrize(("op_type", "domain", "attributes"), [
    ("Gelu", "", {}), ("Gelu", "", {"approximate": "tanh"}), ("Gelu", "com.microsoft", {}),
    ("BiasGelu", "com.microsoft", {}), ("FastGelu", "com.microsoft", {})])
def test_as_onnxruntime(op_type: str, domain: str, attributes: dict[str, str]) -> None:
    given, inputs = model(op_type, domain, **attributes), {"x": cells()}
    expected = run_ort(given, inputs)["y"]
    assert np.isposinf(expected).sum() == np.isposinf(inputs["x"]).sum()
    for mesh, cuts in (("height=3", {"height": (0, 1, 1, 9)}), ("height=2,width=2", {"width": (0, 6, 7)}), (None, {})):
        plan = compile_plan(given, mesh, cuts)
        for found in (run_lockstep(plan, inputs).outputs["y"], run_ort(to_proto(expand(plan)), inputs)["y"]):
            assert np.array_equal(np.isnan(found), np.isnan(expected))
            small = np.abs(np.nan_to_num(expected, posinf=0, neginf=0)) < 1e3
            assert np.array_equal(found[~small], expected[~small])
            assert close(np.where(small, found, 0), np.where(small, expected, 0), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 3, 8, 64])
def test_of_any_type_and_number_of_cells(dtype: torch.dtype, count: int) -> None:
    largest = torch.finfo(dtype).max
    for value, wanted in ((np.inf, np.inf), (largest, largest), (-np.inf, np.nan), (np.nan, np.nan), (-largest, 0.0)):
        for approximate in ("none", "tanh"):
            found = gelu(torch.full((count,), value, dtype=dtype), approximate)
            torch.testing.assert_close(found, torch.full((count,), wanted, dtype=dtype), equal_nan=True)
    assert gelu(torch.zeros(0, dtype=dtype)).shape == (0,)


def test_gradients_are_those_of_torch() -> None:
    x = torch.linspace(-30, 3e4, 64, requires_grad=True)
    (found,) = torch.autograd.grad(gelu(x).sum(), x)
    (wanted,) = torch.autograd.grad(torch.nn.functional.gelu(x).sum(), x)
    torch.testing.assert_close(found, wanted)
