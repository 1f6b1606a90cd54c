"""Which layouts the passes choose, and faults that the drawn graphs once found, each in its smallest form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from partitioner import dialect
from partitioner.errors import PartitionError
from tests.builder import wide
from tests.examples import one_graph
from tests.oracle import Cuts, as_double, close, compile_plan, error, reference64, run_lockstep

Array = np.ndarray
Step = tuple[str, Sequence[Any], Mapping[str, Any]]
"""Operator, inputs (names or constant arrays), attributes; the result of step i is `vi`, the last one is the output."""


def random(*shape: int) -> Array:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def chain(inputs: Mapping[str, Array], *steps: Step, opset: int = 18) -> onnx.ModelProto:
    constants: dict[str, Array] = {}
    nodes = []
    for index, (op, given, attributes) in enumerate(steps):
        names = []
        for item in given:
            if isinstance(item, str):
                names.append(item)
            else:
                names.append(f"c{len(constants)}")
                constants[names[-1]] = np.asarray(item)
        nodes.append(helper.make_node(op, names, [f"v{index}"], f"{op.lower()}{index}", **attributes))
    last = f"v{len(steps) - 1}"
    model = one_graph(nodes, inputs, constants, {last: (TensorProto.FLOAT, None)}, opset)
    return model


def check(inputs: Mapping[str, Array], *steps: Step, mesh: str, cuts: Cuts | None = None, opset: int = 18) -> ir.Model:
    """Sharded equals whole in float64; returns the plan."""
    model = as_double(chain(inputs, *steps, opset=opset))
    values = {name: wide(array) for name, array in inputs.items()}
    plan = compile_plan(model, mesh, cuts)
    found = run_lockstep(plan, values).outputs
    for name, expected in reference64(model, values).items():
        assert close(found[name], expected, 1e-12), f"{name}: error {error(found[name], expected)}"
    return plan


def layout(plan: ir.Model, name: str) -> str:
    """The layout of the value that a step yielded."""
    values = {str(v.name): v for v in (*plan.graph.inputs, *(o for n in plan.graph for o in n.outputs))}
    return str(dialect.get_layout(values[name]))


def kinds(plan: ir.Model) -> list[str]:
    return [n.op_type for n in plan.graph]


# --- inputs ------------------------------------------------------------------------------------------


def test_cuts_hold_for_the_inputs_of_their_extent() -> None:
    """A coarse second volume is cut evenly, a vector that is broadcast not at all."""
    inputs = {"x": random(1, 2, 9, 6), "coarse": random(1, 2, 4, 6), "scale": random(1, 2, 1, 1)}
    plan = check(inputs, ("Mul", ["x", "scale"], {}), ("Concat", ["v0", "coarse"], {"axis": 2}),
                 mesh="height=2", cuts={"height": (0, 7, 9)})
    assert layout(plan, "x") == "[1, 2, height(0|7|9), 6]"
    assert layout(plan, "coarse") == "[1, 2, height(0|2|4), 6]"
    assert layout(plan, "scale") == "[1, 2, 1, 1]"


@pytest.mark.parametrize(("mesh", "cuts", "message"), [
    ("height=10", {}, "axis 2 of input 'x' has only 9 cells; use at most height=9"),
    ("depth=2", {}, "no input has such an axis"),
    ("height=2", {"height": (0, 7, 8)}, "need 1 ascending positions between 0 and 9"),
    ("height=2", {"height": (0, 5, 4, 9)}, "ascending positions"),
    ("height=2", {"width": (0, 3, 6)}, "the mesh does not split that axis"),
])
def test_meshes_and_cuts_that_do_not_fit(mesh: str, cuts: Cuts, message: str) -> None:
    with pytest.raises(PartitionError, match=message):
        compile_plan(chain({"x": random(1, 2, 9, 6)}, ("Relu", ["x"], {})), mesh, cuts)


def test_every_problem_is_told_at_once() -> None:
    with pytest.raises(PartitionError) as caught:
        compile_plan(chain({"x": random(1, 2, 9, 6)}, ("Relu", ["x"], {})), "depth=2,height=10,width=7")
    assert len(str(caught.value).splitlines()) == 3


def test_weights_of_a_norm_may_be_inputs_of_the_model() -> None:
    inputs = {"x": random(1, 3, 7, 5), "scale": random(3), "bias": random(3)}
    check(inputs, ("InstanceNormalization", ["x", "scale", "bias"], {}), mesh="height=2")


# --- layouts follow the data -------------------------------------------------------------------------


def test_skips_meet_without_a_relayout() -> None:
    weight = random(2, 2, 3)
    plan = check({"x": random(1, 2, 23)},
                 ("Conv", ["x", weight], {"strides": [2], "pads": [1, 1]}),
                 ("ConvTranspose", ["v0", random(2, 2, 2)], {"strides": [2]}),
                 ("Slice", ["v1", np.array([0]), np.array([23]), np.array([2])], {}),
                 ("Concat", ["x", "v2"], {"axis": 1}), mesh="width=3")
    assert dialect.RESHARD not in kinds(plan)
    assert layout(plan, "v2") == layout(plan, "x")


def test_concatenation_along_the_split_axis() -> None:
    check({"x": random(1, 2, 7)}, ("Concat", ["x", "x", random(1, 2, 3)], {"axis": 2}), mesh="width=3",
          cuts={"width": (0, 0, 5, 7)})


def test_what_mixes_axes_is_gathered_and_told() -> None:
    plan = check({"x": random(2, 3, 4, 5)}, ("Flatten", ["x"], {}), ("Softmax", ["v0"], {"axis": 1}),
                 mesh="height=2,width=2")
    assert kinds(plan)[0] == dialect.RESHARD
    assert layout(plan, "v1") == "[2, 60]"


def test_batches_stay_apart_through_a_head() -> None:
    plan = check({"x": random(3, 2, 4, 5)}, ("Flatten", ["x"], {}), ("MatMul", ["v0", random(40, 3)], {}),
                 mesh="batch=3")
    assert dialect.RESHARD not in kinds(plan)
    assert layout(plan, "v1") == "[batch(0|1|2|3), 3]"


# --- once wrong --------------------------------------------------------------------------------------


def test_channels_that_carry_a_mesh_axis() -> None:
    """After a transposition the channel axis is split: norms take the scales of their own channels."""
    turn: Step = ("Transpose", ["x"], {"perm": [0, 2, 1, 3]})
    x = {"x": random(1, 3, 6, 5)}
    vectors = [random(6), random(6)]
    check(x, turn, ("InstanceNormalization", ["v0", *vectors], {}), mesh="height=2", cuts={"height": (0, 1, 6)})
    check(x, turn, ("BatchNormalization", ["v0", *vectors, random(6), np.abs(random(6))], {}), mesh="height=3")
    check(x, turn, ("InstanceNormalization", ["v0", *vectors], {}), mesh="height=2,width=2")


def test_a_convolution_computes_all_its_channels() -> None:
    """The sum ties its channel axis to a split one; the convolution itself cannot be split there."""
    plan = check({"x": random(1, 4, 9, 5)}, ("Transpose", ["x"], {"perm": [1, 2, 3, 0]}),
                 ("Conv", ["v0", random(9, 9, 3, 3)], {"pads": [1] * 4}), ("Add", ["v1", "v0"], {}), mesh="height=4")
    assert layout(plan, "v1") == "[4, 9, 5, 1]"


def test_a_merged_reduction_gets_room_for_its_halo() -> None:
    """The maximum over one split axis is convolved along another."""
    check({"x": random(1, 2, 6, 7)}, ("ReduceMax", ["x", np.array([2])], {"keepdims": 1}),
          ("Conv", ["v0", random(1, 2, 1, 3)], {"pads": [0, 1, 0, 1]}), mesh="height=2,width=2")


def test_an_empty_part_of_the_batch_has_no_statistics() -> None:
    check({"x": random(2, 3, 7)}, ("InstanceNormalization", ["x", random(3), random(3)], {}), mesh="batch=2,width=2",
          cuts={"batch": (0, 0, 2)})


def test_messages_of_several_pieces() -> None:
    """Wrapped padding: the first rank needs both ends, which lie apart with one rank and together with another."""
    amounts = np.array([0, 0, 4, 0, 0, 3])
    plan = check({"x": random(1, 2, 11)}, ("Pad", ["x", amounts], {"mode": "wrap"}), mesh="width=3", opset=19)
    assert "+" in layout(plan, str(plan.graph[0].outputs[0].name))


def test_reflections_of_what_a_negative_pad_has_left() -> None:
    check({"x": random(1, 1, 7)}, ("Pad", ["x", np.array([0, 0, -2, 0, 0, 4])], {"mode": "wrap"}), mesh="width=2",
          opset=19)


def test_an_average_of_a_shard_narrower_than_its_kernel() -> None:
    check({"x": random(1, 1, 7, 6, 9)},
          ("AveragePool", ["x"], {"kernel_shape": [3, 3, 2], "pads": [1] * 6, "count_include_pad": 1}),
          mesh="depth=3", cuts={"depth": (0, 1, 6, 7)})


def test_a_shard_wholly_outside_a_cropped_region() -> None:
    roi, scales = np.array([0, 0, -1, 1, 1, 0.5], np.float32), np.array([1, 1, 2], np.float32)
    attributes = {"coordinate_transformation_mode": "tf_crop_and_resize", "extrapolation_value": 0.25}
    for mode in ("nearest", "linear"):
        check({"x": random(1, 2, 8)}, ("Resize", ["x", roi, scales], attributes | {"mode": mode}), mesh="width=4")


def test_views_of_views_share_memory_safely() -> None:
    """Crops and transpositions of a value whose halo comes later."""
    check({"x": random(1, 2, 12, 6)},
          ("Slice", ["x", np.array([1]), np.array([12]), np.array([2])], {}),
          ("Transpose", ["v0"], {"perm": [0, 1, 3, 2]}),
          ("Conv", ["v1", random(2, 2, 3, 3)], {"pads": [1] * 4}),
          ("Conv", ["x", random(2, 2, 3, 3)], {"pads": [1] * 4}),
          ("ReduceSum", ["v3", np.array([2, 3])], {"keepdims": 1}),
          ("Add", ["v2", "v4"], {}), mesh="height=3")


def test_ceil_mode_and_auto_pad_become_plain_padding() -> None:
    """Shape inference misjudges this one before opset 22; spelt out it passes the checker, and onnxruntime agrees."""
    attributes = {"kernel_shape": [2], "strides": [2], "pads": [0, 1], "ceil_mode": 1}
    plan = compile_plan(chain({"x": random(1, 2, 6)}, ("AveragePool", ["x"], attributes)), "width=2")
    (pool,) = [n for n in plan.graph if n.op_type == "AveragePool"]
    assert dialect.shape_of(pool.outputs[0]) == (1, 2, 3)
    assert "ceil_mode" not in pool.attributes
    assert list(pool.attributes["pads"].as_ints()) == [0, 0]
    onnx.checker.check_model(ir.to_proto(plan), full_check=True)
    plan = compile_plan(chain({"x": random(1, 2, 7)}, ("Conv", ["x", random(1, 2, 4)], {
        "auto_pad": "SAME_UPPER", "strides": [2], "dilations": [2]})), "width=2")
    (convolution,) = [n for n in plan.graph if n.op_type == "Conv"]
    assert list(convolution.attributes["pads"].as_ints()) == [3, 3]


def test_linear_interpolation_of_integers_is_refused() -> None:
    node = helper.make_node("Resize", ["x", "", "s"], ["y"], "resize", mode="linear")
    model = one_graph([node], {"x": np.ones((1, 1, 4, 4), np.int32)}, {"s": np.array([1, 1, 2, 2], np.float32)},
                      {"y": (TensorProto.INT32, None)}, 18)
    with pytest.raises(PartitionError, match=r"resize \(Resize\): linear interpolation of integers"):
        compile_plan(model, "height=2")


def test_a_merge_is_cut_as_its_partials_are() -> None:
    """A later operator's class wants other cuts of what a contraction yields: it gets them by an exchange."""
    check({"x": random(2, 3, 19), "i": np.zeros((3, 1, 1), np.int64)},
          ("Einsum", ["x", random(19, 1)], {"equation": "abc,ck->bk"}), ("GatherND", ["v0", "i"], {"batch_dims": 1}),
          mesh="batch=2,width=2", cuts={"batch": (0, 0, 3)}, opset=13)


def test_statistics_over_axes_that_were_merged_before() -> None:
    """Old opsets flatten: what Hardmax yields is cut again, so that Softmax takes partial results of it."""
    plan = check({"x": random(1, 3, 2, 5, 8)}, ("Hardmax", ["x"], {"axis": 0}), ("Softmax", ["v0"], {"axis": 0}),
                 mesh="depth=2", opset=11)
    assert layout(plan, "v0") == layout(plan, "v1") == "[1, 3, depth(0|1|2), 5, 8]"


def test_statistics_of_what_every_rank_has_whole() -> None:
    """A merged product is whole everywhere; so is the Softmax of it, though what it is added to is sharded."""
    check({"x": random(1, 6, 14), "z": random(1, 6, 10)},
          ("MatMul", ["x", random(14, 10)], {}), ("Softmax", ["v0"], {"axis": -1}), ("Add", ["v1", "z"], {}),
          mesh="width=2", opset=13)


@pytest.mark.parametrize("reduces", ["ArgMax", "ReduceLogSumExp"])
def test_an_axis_that_goes_is_not_another_one_of_one_cell(reduces: str) -> None:
    """What is dropped after a merge is the axis that was reduced over, not the one behind it, which lies in slabs."""
    attributes = {"axis": 2} if reduces == "ArgMax" else {"axes": [2]}
    x = {"x": random(1, 2, 8, 1).astype(np.float64)}
    model = as_double(chain({"x": random(1, 2, 8, 1)}, (reduces, ["x"], {"keepdims": 0, **attributes}),
                            ("Cast", ["v0"], {"to": TensorProto.FLOAT}), opset=13))
    plan = compile_plan(model, "height=2", rolled="width")
    assert layout(plan, "v0") == "[1, 2, width(0|1)]"
    for name, expected in reference64(model, x).items():
        assert close(run_lockstep(plan, x).outputs[name], expected, 1e-12)
