"""The text form of a plan, word by word."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from partitioner.errors import PartitionError
from partitioner.printer import print_plan
from tests.examples import one_graph
from tests.oracle import compile_plan

GOLDEN = """\
plan 1, opset 18, mesh depth=2,width=2 (4 ranks), channels_last
passes: canonicalize keep-apart read-parts assign-shards insert-reshards split-reductions insert-halo-exchanges \
merge-exchanges schedule join-exchanges
weights: 6 tensors, 1844 bytes
input %volume : float32 [1, 2, depth(0|5|9), 6, width(0|4|7)]
%volume/halo_1 = HaloExchange(%volume) : float32 [1, 2, depth(0|5|9), 6, width(0|4|7)] -> \
[1, 2, depth(0:6 4:9), 6, width(0:5 3:7)]  halo depth -1+1; halo width -1+1
%a = Conv(%volume/halo_1, @w) {pads=[1, 1, 1, 1, 1, 1]} : float32 [1, 8, depth(0|5|9), 6, width(0|4|7)]
%norm/Moments, %norm/Moments.1, %norm/Moments.2 = Moments(%a) {axes=[2, 3, 4], count=378, dtype=1} : \
int64 [], float32 [1, 8, 1, 1, 1], float32 [1, 8, 1, 1, 1]  partial over depth, width
%norm/all_reduce, %norm/all_reduce.1, %norm/all_reduce.2 = \
AllReduceMoments(%norm/Moments, %norm/Moments.1, %norm/Moments.2) : \
int64 [], float32 [1, 8, 1, 1, 1], float32 [1, 8, 1, 1, 1]  moments over depth, width
%b = Normalize(%a, %norm/all_reduce, %norm/all_reduce.1, %norm/all_reduce.2, @s, @t) \
{dtype=1, epsilon=1e-05, spatial=[1, 2, 3], to=1} : float32 [1, 8, depth(0|5|9), 6, width(0|4|7)]
%b/halo_1 = HaloExchange(%b) : float32 [1, 8, depth(0|5|9), 6, width(0|4|7)] -> \
[1, 8, depth(0:6 5:9), 6, width(0|4|7)]  halo depth -0+1
%c = MaxPool(%b/halo_1) {kernel_shape=[2, 1, 1], strides=[2, 1, 1]} : float32 [1, 8, depth(0|3|4), 6, width(0|4|7)]
%reduce/apart/ReduceSum = ReduceSum(%c, [1, 2, 3, 4]) {keepdims=1} : float32 [1, 1, 1, 1, 1]  \
partial over depth, width
%d/reduce/apart = AllReduce(%reduce/apart/ReduceSum) : float32 [1, 1, 1, 1, 1]  sum over depth, width
%d/reduce = Reshape(%d/reduce/apart, [1, 1]) : float32 [1, 1]
%y = Mul(%d/reduce, @half) : float32 [1, 1]
output %y : float32 [1, 1]
"""


def classifier() -> onnx.ModelProto:
    nodes = [
        helper.make_node("Conv", ["volume", "w"], ["a"], "conv", pads=[1] * 6),
        helper.make_node("InstanceNormalization", ["a", "s", "t"], ["b"], "norm", epsilon=1e-5),
        helper.make_node("MaxPool", ["b"], ["c"], "pool", kernel_shape=[2, 1, 1], strides=[2, 1, 1]),
        helper.make_node("Flatten", ["c"], ["d"], "flatten", axis=1),
        helper.make_node("ReduceSum", ["d", "axes"], ["d/reduce"], "reduce", keepdims=1),
        helper.make_node("Mul", ["d/reduce", "half"], ["y"], "scale"),
    ]
    weights = {"w": np.ones((8, 2, 3, 3, 3), np.float32), "s": np.ones(8, np.float32), "t": np.ones(8, np.float32),
               "axes": np.array([1], np.int64), "half": np.full((1, 1), 0.5, np.float32)}
    return one_graph(nodes, {"volume": np.zeros((1, 2, 9, 6, 7), np.float32)}, weights,
                     {"y": (TensorProto.FLOAT, (1, 1))}, 18)


def test_golden() -> None:
    assert print_plan(compile_plan(classifier(), "depth=2,width=2")) == GOLDEN


def test_one_line_per_node() -> None:
    plan = compile_plan(classifier(), "depth=3")
    lines = print_plan(plan).splitlines()
    nodes = list(plan.graph)
    assert len(lines) == 3 + len(plan.graph.inputs) + len(nodes) + len(plan.graph.outputs)
    for line, node in zip(lines[4:], nodes, strict=False):
        assert line.startswith(f"%{node.outputs[0].name}") and f" {node.op_type}(" in line


def test_a_file_prints_as_it_was_made() -> None:
    plan = compile_plan(classifier(), "depth=2,width=2", {"depth": (0, 0, 9)})
    assert print_plan(ir.from_proto(ir.to_proto(plan))) == print_plan(plan)


def test_pieces_and_halos_from_afar() -> None:
    """A wrapped border needs cells from the other end of the axis."""
    pads = np.array([0, 0, 2, 0, 0, 1], np.int64)
    node = helper.make_node("Pad", ["x", "pads"], ["y"], "pad", mode="wrap")
    model = one_graph([node], {"x": np.zeros((1, 1, 9), np.float32)}, {"pads": pads},
                      {"y": (TensorProto.FLOAT, (1, 1, 12))}, 19)
    text = print_plan(compile_plan(model, "width=3"))
    assert "[1, 1, width(0:3+7:9 2:6 0:1+5:9)]  halo width -1+0, 2 cells from elsewhere" in text


def test_only_plans_have_a_text_form() -> None:
    with pytest.raises(PartitionError, match="no plan"):
        print_plan(ir.from_proto(classifier()))
