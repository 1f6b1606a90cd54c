"""Outputs that constants decide, and inputs that leave as they came: they run as everything else does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper, parser

import partitioner as pt
from passes.expand import expand
from tests.oracle import compile_plan, run_lockstep, run_ort

Array = np.ndarray
SHAPE = (2, 3, 9, 7)
NUMBERS = np.arange(7, dtype=np.float32)
FLOAT, INTEGER = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
Y = ("y", FLOAT, SHAPE)
RELU = "y = Relu(x)"

CASES: dict[str, tuple[Sequence[str], Mapping[str, Array], Sequence[tuple[str, int, Sequence[int]]]]] = {
    "extents": ([RELU, "z = Shape(x)"], {}, [Y, ("z", INTEGER, (4,))]),
    "a number": (["z = Size(x)", RELU], {}, [("z", INTEGER, ()), Y]),
    "a node": ([RELU, "z = Constant<value_float=1.5>()"], {}, [Y, ("z", FLOAT, ())]),
    "constant arithmetic": ([RELU, "s = Shape(x)", "z = Cast<to=1>(s)", "w = Mul(z, z)"], {},
                            [("w", FLOAT, (4,)), Y, ("s", INTEGER, (4,)), ("z", FLOAT, (4,))]),
    "an initialiser": ([RELU], {"z": NUMBERS}, [Y, ("z", FLOAT, (7,))]),
    "an initialiser that is read": (["y = Mul(x, z)"], {"z": NUMBERS}, [Y, ("z", FLOAT, (7,))]),
    "a folded constant that is read": (["z = Neg(k)", "y = Mul(x, z)"], {"k": NUMBERS}, [Y, ("z", FLOAT, (7,))]),
    "copies of one": ([RELU, "z = Identity(k)", "w = Identity(k)"], {"k": NUMBERS},
                      [("z", FLOAT, (7,)), Y, ("w", FLOAT, (7,))]),
    "no cells": ([RELU, "z = Identity(k)"], {"k": np.zeros((0, 3), np.float32)}, [Y, ("z", FLOAT, (0, 3))]),
    "nothing else": (["z = Shape(x)"], {}, [("z", INTEGER, (4,))]),
    "an input": ([RELU], {}, [Y, ("x", FLOAT, SHAPE)]),
    "a copy of an input": ([RELU, "z = Identity(x)"], {}, [Y, ("z", FLOAT, SHAPE)]),
}


def model(name: str) -> onnx.ModelProto:
    lines, constants, outputs = CASES[name]
    graph = helper.make_graph(
        [parser.parse_node(line) for line in lines], "g", [helper.make_tensor_value_info("x", FLOAT, SHAPE)],
        [helper.make_tensor_value_info(*output) for output in outputs],
        [numpy_helper.from_array(array, key) for key, array in constants.items()])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


@pytest.mark.parametrize("name", CASES)
def test_outputs_that_constants_decide(name: str) -> None:
    given = model(name)
    before = given.SerializeToString()
    inputs = {"x": np.random.default_rng(1).standard_normal(SHAPE).astype(np.float32)}
    expected = run_ort(given, inputs)
    for mesh, cuts in (("height=2,width=2", {"height": (0, 2, 9)}), ("batch=2", {}), (None, {})):
        plan = compile_plan(given, mesh, cuts)
        onnx.checker.check_model(ir.to_proto(plan), full_check=True)
        for found in (run_lockstep(plan, inputs).outputs, run_ort(ir.to_proto(plan), inputs),
                      run_ort(ir.to_proto(expand(plan)), inputs)):
            assert list(found) == list(expected)
            for key, array in expected.items():
                assert found[key].dtype == array.dtype and np.array_equal(found[key], array)
    assert given.SerializeToString() == before


def test_a_plan_with_constant_outputs_is_kept(tmp_path: Path) -> None:
    plan = pt.partition(model("constant arithmetic"), mesh="height=3")
    plan.save(tmp_path / "plan.onnx")
    again = pt.load(tmp_path / "plan.onnx")
    inputs = {"x": np.zeros(SHAPE, np.float32)}
    found, kept = plan.run(inputs), again.run(inputs)
    assert list(found) == ["w", "y", "s", "z"] and found["s"].tolist() == list(SHAPE)
    assert all(np.array_equal(found[name], kept[name]) for name in found)
