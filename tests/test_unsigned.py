"""Unsigned integers, whose largest values int64 or torch do not have, against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import partitioner as pt

EDGES = (1, 2, 3, 7, 2**15, 2**16 - 1, 2**31, 2**32 - 1, 2**62 + 5, 2**63 - 1, 2**63, 2**63 + 1, 2**64 - 2, 2**64 - 1)

BINARY = {
    "Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Div": np.floor_divide, "Mod": np.mod, "Min": np.minimum,
    "Max": np.maximum, "Sum": np.add, "Greater": np.greater, "GreaterOrEqual": np.greater_equal, "Less": np.less,
    "LessOrEqual": np.less_equal, "Equal": np.equal, "BitwiseAnd": np.bitwise_and, "BitwiseXor": np.bitwise_xor,
}


def pairs(dtype: type) -> tuple[np.ndarray, np.ndarray]:
    """Every pair of edges that the type holds."""
    values = np.array([v for v in EDGES if v <= np.iinfo(dtype).max], dtype)
    left, right = np.meshgrid(values, values, indexing="ij")
    return left.copy(), right.copy()


def run(op_type: str, arrays: dict[str, np.ndarray], constants: dict[str, np.ndarray] | None = None,
        **attributes) -> np.ndarray:
    kind = helper.np_dtype_to_tensor_dtype(arrays["x"].dtype)
    boolean = op_type in ("Equal",) or "Greater" in op_type or "Less" in op_type
    graph = helper.make_graph(
        [helper.make_node(op_type, [*arrays, *(constants or {})], ["z"], **attributes)], "g",
        [helper.make_tensor_value_info(name, kind, a.shape) for name, a in arrays.items()],
        [helper.make_tensor_value_info("z", TensorProto.BOOL if boolean else kind, None)],
        [numpy_helper.from_array(a, name) for name, a in (constants or {}).items()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    return pt.partition(model, mesh={"batch": 3}).run(arrays)["z"]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.uint64])
@pytest.mark.parametrize("op_type", BINARY)
def test_all_pairs(op_type: str, dtype: type) -> None:
    x, y = pairs(dtype)
    with np.errstate(over="ignore"):
        expected = BINARY[op_type](x, y)
    found = run(op_type, {"x": x, "y": y})
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.uint64])
@pytest.mark.parametrize("direction", ["LEFT", "RIGHT"])
def test_bits_move(direction: str, dtype: type) -> None:
    x, _ = pairs(dtype)
    width = np.iinfo(dtype).bits
    places = np.resize(np.array([0, 1, 5, width - 1, width, np.iinfo(dtype).max], dtype), x.shape)
    kept = places < width
    small = np.where(kept, places, 0).astype(dtype)
    expected = np.where(kept, np.left_shift(x, small) if direction == "LEFT" else np.right_shift(x, small), 0)
    np.testing.assert_array_equal(run("BitShift", {"x": x, "y": places}, direction=direction), expected.astype(dtype))


def test_limits() -> None:
    x, _ = pairs(np.uint64)
    low, high = np.array(3, np.uint64), np.array(2**63 + 1, np.uint64)
    np.testing.assert_array_equal(run("Clip", {"x": x, "low": low, "high": high}), np.clip(x, low, high))
    np.testing.assert_array_equal(run("Clip", {"x": x, "low": high}), np.maximum(x, high))


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.int64])
def test_a_sign_fills_up(dtype: type) -> None:
    from partitioner.ops.kernels.unsigned import shifted

    x = np.array([-128, -1, 0, 1, 127, -5], dtype)
    for places in (0, 1, 7, np.iinfo(dtype).bits - 1):
        found = shifted(torch.from_numpy(x), torch.tensor(places), left=False)
        np.testing.assert_array_equal(found.numpy(), x >> np.array(places, dtype))
    far = shifted(torch.from_numpy(x), torch.tensor(100), left=False)
    np.testing.assert_array_equal(far.numpy(), np.where(x < 0, -1, 0))


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.uint64])
def test_what_combines_cells_is_refused(dtype: type) -> None:
    x, index = np.full((3, 4), np.iinfo(dtype).max, dtype), np.array([[0, 1, 0, 2]])
    for op_type, more, attributes in (("ReduceMax", {}, {}), ("CumSum", {"y": np.array(1)}, {}),
                                      ("ScatterElements", {"i": index, "u": x[:1]}, {"reduction": "add"})):
        with pytest.raises(pt.PartitionError, match=f"{op_type}.*arithmetic of {np.dtype(dtype).name.upper()}"):
            run(op_type, {"x": x}, more, **attributes)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.uint64])
def test_cells_move(dtype: type) -> None:
    x = (np.array(np.iinfo(dtype).max, dtype) - np.arange(12, dtype=dtype)).reshape(3, 4)
    index = np.array([[0, 1, 0, 2], [2, 2, 1, 0]])
    np.testing.assert_array_equal(run("GatherElements", {"x": x}, {"i": index}), np.take_along_axis(x, index, 0))
    np.testing.assert_array_equal(run("GatherND", {"x": x}, {"i": index[:, :1]}), x[index[:, 0]])
    put, updates = x.copy(), x[:2] - dtype(100)
    np.put_along_axis(put, index, updates, 0)
    found = run("ScatterElements", {"x": x}, {"i": index, "u": updates})
    np.testing.assert_array_equal(found, put)
