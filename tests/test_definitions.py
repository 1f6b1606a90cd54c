"""Operators that onnx defines by functions, among inputs and types that its own inliner or onnxruntime lacks."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import partitioner as pt
from benchmarks.conformance_cases import check


@pytest.mark.parametrize("name", [
    "test_flexattention_causal_mask",  # of another domain, with a graph as attribute
    "test_attention_4d_diff_heads_mask4d_padded_kv",  # optional inputs between given ones are missing
    "test_attention_4d_causal_bf16",  # constants of bfloat16
    "test_affine_grid_3d_expanded",  # Ifs that constants decide, Range of vectors of one cell
])
def test_functions_are_written_out(name: str) -> None:
    result = check(name)
    assert result.outcome == "sharded", result.detail


def one(nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray]) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3, 5])],
        [helper.make_empty_tensor_value_info("y")],
        [numpy_helper.from_array(a, name) for name, a in constants.items()])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def test_a_constant_cast_like_data_is_a_constant() -> None:
    nodes = [helper.make_node("CastLike", ["c", "x"], ["fill"]),
             helper.make_node("Pad", ["x", "pads", "fill"], ["y"])]
    model = one(nodes, {"c": np.array(3, np.int32), "pads": np.array([0, 0, 1, 0, 0, 2])})
    x = np.ones((2, 3, 5), np.float32)
    found = pt.partition(model, mesh={"width": 2}).run({"x": x})["y"]
    np.testing.assert_array_equal(found, np.pad(x, ((0, 0), (0, 0), (1, 2)), constant_values=3))


def test_the_branch_not_taken_reads_nothing() -> None:
    def branch(node: onnx.NodeProto) -> onnx.GraphProto:
        return helper.make_graph([node], node.op_type, [], [helper.make_empty_tensor_value_info(node.output[0])])

    nodes = [helper.make_node("Neg", ["x"], ["a"]), helper.make_node("Relu", ["x"], ["b"]),
             helper.make_node("If", ["c"], ["y"], then_branch=branch(helper.make_node("Exp", ["a"], ["t"])),
                              else_branch=branch(helper.make_node("Abs", ["b"], ["e"])))]
    plan = pt.partition(one(nodes, {"c": np.array(True)}), mesh={"width": 2})
    assert [node.op_type for node in plan.model.graph] == ["Neg", "Exp"]
    x = np.linspace(-1, 1, 30, dtype=np.float32).reshape(2, 3, 5)
    np.testing.assert_allclose(plan.run({"x": x})["y"], np.exp(-x), rtol=1e-6)


def test_constants_that_onnxruntime_cannot_compute() -> None:
    import ml_dtypes

    narrow = np.array([[-3, 1.5, 2], [4, -7, 0]], np.float32).astype(ml_dtypes.bfloat16)
    nodes = [helper.make_node("ReduceMax", ["c", "axes"], ["top"], keepdims=0),
             helper.make_node("Cast", ["top"], ["wide"], to=TensorProto.FLOAT),
             helper.make_node("ReduceSum", ["wide"], ["sum"], keepdims=0),
             helper.make_node("Add", ["x", "sum"], ["y"])]
    x = np.zeros((2, 3, 5), np.float32)
    found = pt.partition(one(nodes, {"c": narrow, "axes": np.array([1])}), mesh={"batch": 2}).run({"x": x})["y"]
    np.testing.assert_array_equal(found, np.full_like(x, 6))
