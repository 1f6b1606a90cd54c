"""What the expanded form looks like, and the proof that it is not blind to a missing or wrong halo."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from partitioner.errors import PartitionError
from partitioner.mesh import Mesh
from passes.expand import Expand, expand
from passes.pipeline import Pipeline, PipelineError
from tests.examples import one_graph
from tests.oracle import close, compile_plan, error, pipeline, run_ort
from tests.test_expand import expanded

Array = np.ndarray
MOVES = {"Slice", "Concat", "Constant", "Identity"}


def random(*shape: int) -> Array:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def convolutions(*spatial: int) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """Two convolutions of kernel 3 with a ReLU between them."""
    pads = [1] * (2 * len(spatial))
    nodes = [
        helper.make_node("Conv", ["x", "v"], ["a"], "first", pads=pads),
        helper.make_node("Relu", ["a"], ["b"], "relu"),
        helper.make_node("Conv", ["b", "w"], ["y"], "second", pads=pads),
    ]
    kernel = [3] * len(spatial)
    weights = {"v": random(3, 2, *kernel), "w": random(2, 3, *kernel)}
    inputs = {"x": random(1, 2, *spatial)}
    return one_graph(nodes, inputs, weights, {"y": (TensorProto.FLOAT, (1, 2, *spatial))}, 18), inputs


def one_node(node: onnx.NodeProto, x: Array, constants: dict[str, Array], shape: tuple[int, ...]) -> onnx.ModelProto:
    return one_graph([node], {"x": x}, constants, {"y": (TensorProto.FLOAT, shape)}, 18)


def functions(proto: onnx.ModelProto, op_type: str) -> list[onnx.FunctionProto]:
    return [f for f in proto.functions if f.name.startswith(op_type)]


def attribute(node: onnx.NodeProto, name: str) -> list[int]:
    return next(list(a.ints) for a in node.attribute if a.name == name)


# --- the oracle sees what an exchange brings ----------------------------------------------------------


def damaged(proto: onnx.ModelProto) -> Iterator[tuple[str, onnx.ModelProto]]:
    """Copies of a model, each with one piece of one halo exchange wrong: other cells, or zeros."""
    for f, function in enumerate(proto.functions):
        if not function.name.startswith("HaloExchange"):
            continue
        for n, node in enumerate(function.node):
            if node.op_type == "Slice":
                yield f"{function.name}: other cells in {node.name}", with_other_cells(proto, f, n)
                yield f"{function.name}: zeros in {node.name}", with_zeros(proto, f, n)


def copied(proto: onnx.ModelProto) -> onnx.ModelProto:
    found = onnx.ModelProto()
    found.CopyFrom(proto)
    return found


def with_other_cells(proto: onnx.ModelProto, f: int, n: int) -> onnx.ModelProto:
    """A slice moved by one cell: back where it can, else forward."""
    model = copied(proto)
    function = model.functions[f]
    known = {node.output[0]: numpy_helper.to_array(node.attribute[0].t)
             for node in function.node if node.op_type == "Constant"}
    node = function.node[n]
    starts, stops = known[node.input[1]].copy(), known[node.input[2]].copy()
    step = -1 if starts[0] > 0 else 1
    starts[0] += step
    stops[0] += step
    for name, array in (("other_starts", starts), ("other_stops", stops)):
        constant = helper.make_node("Constant", [], [name], value=numpy_helper.from_array(array))
        function.node.insert(0, constant)
    moved = function.node[n + 2]
    moved.input[1], moved.input[2] = "other_starts", "other_stops"
    return model


def with_zeros(proto: onnx.ModelProto, f: int, n: int) -> onnx.ModelProto:
    """The piece never arrived."""
    model = copied(proto)
    function = model.functions[f]
    name = function.node[n].output[0]
    function.node[n].output[0] = "arrived"
    function.node.insert(n + 1, helper.make_node("Sub", ["arrived", "arrived"], [name]))
    return model


@pytest.mark.parametrize(("spatial", "mesh"),
                         [((11,), "width=3"), ((9, 7), "height=2,width=2"), ((5, 6, 4), "depth=2,width=2")])
def test_a_wrong_halo_is_seen(spatial: tuple[int, ...], mesh: str) -> None:
    model, inputs = convolutions(*spatial)
    plan = compile_plan(model, mesh)
    expected = run_ort(model, inputs)["y"]
    proto = expanded(plan)
    assert close(run_ort(proto, inputs)["y"], expected, 1e-6)
    count = 0
    for what, wrong in damaged(proto):
        assert error(run_ort(wrong, inputs)["y"], expected) > 1e-2, f"not seen: {what}"
        count += 1
    assert count >= 4


def test_wrong_local_pads_are_seen() -> None:
    model, inputs = convolutions(11)
    proto = expanded(compile_plan(model, "width=2"))
    node = next(n for n in proto.graph.node if n.name == "first@0")
    pads = next(a for a in node.attribute if a.name == "pads")
    assert list(pads.ints) == [1, 0]
    pads.ints[:] = [0, 1]
    del proto.graph.value_info[:]
    assert error(run_ort(proto, inputs)["y"], run_ort(model, inputs)["y"]) > 1e-2


# --- its form ----------------------------------------------------------------------------------------


def test_every_device_has_its_own_nodes_with_its_own_pads() -> None:
    model, _ = convolutions(13)
    proto = expanded(compile_plan(model, "width=3"))
    nodes = {n.name: n for n in proto.graph.node}
    for name in ("first", "relu", "second"):
        assert all(nodes[f"{name}@{rank}"].op_type in ("Conv", "Relu") for rank in range(3))
    assert [attribute(nodes[f"first@{rank}"], "pads") for rank in range(3)] == [[1, 0], [0, 0], [0, 1]]
    halo = nodes["x/halo_1@1"] if "x/halo_1@1" in nodes else nodes["x/halo@1"]
    assert list(halo.input) == ["x@1", "x@0", "x@2"], "own shard first, then the others by rank"
    assert [n.op_type for n in proto.graph.node if n.output[0] == "y"] == ["Concat"]
    assert sorted(t.name for t in proto.graph.initializer if t.name in "vw") == ["v", "w"], "weights are shared"


def test_exchanges_are_slice_and_concat() -> None:
    model, _ = convolutions(9, 7)
    proto = expanded(compile_plan(model, "height=2,width=2"))
    bodies = functions(proto, "HaloExchange")
    assert bodies
    assert all({n.op_type for n in f.node} <= MOVES and "Slice" in {n.op_type for n in f.node} for f in bodies)


def test_equal_bodies_are_one_function() -> None:
    model, _ = convolutions(40)
    proto = expanded(compile_plan(model, "width=8"))
    assert len(functions(proto, "HaloExchange")) == 3, "the first, the last, and all between them"


def test_what_is_empty_is_not_there() -> None:
    model, inputs = convolutions(9)
    proto = expanded(compile_plan(model, "width=4", {"width": (0, 0, 3, 3, 9)}))
    assert {n.name.split("@")[1] for n in proto.graph.node if n.name.startswith("first@")} == {"1", "3"}
    assert close(run_ort(proto, inputs)["y"], run_ort(model, inputs)["y"], 1e-6)


def test_an_output_without_cells() -> None:
    x = random(1, 2, 5)
    nodes = [helper.make_node("Split", ["x", "parts"], ["none", "y"], "split", axis=2)]
    outputs = {"none": (TensorProto.FLOAT, (1, 2, 0)), "y": (TensorProto.FLOAT, (1, 2, 5))}
    model = one_graph(nodes, {"x": x}, {"parts": np.array([0, 5])}, outputs, 18)
    found = run_ort(expanded(compile_plan(model, "width=2")), {"x": x})
    assert found["none"].shape == (1, 2, 0) and np.array_equal(found["y"], x)


def test_a_replicated_output_comes_from_the_first_rank() -> None:
    node = helper.make_node("Flatten", ["x"], ["y"], "flatten")
    proto = expanded(compile_plan(one_node(node, random(1, 2, 5), {}, (1, 10)), "width=2"))
    (last,) = [n for n in proto.graph.node if "y" in n.output]
    assert (last.op_type, list(last.input)) == ("Identity", ["y@0"])
    (reshard,) = [n for n in proto.graph.node if n.op_type.startswith("Reshard") and n.name.endswith("@1")]
    assert list(reshard.input) == ["x@1", "x@0"]


def test_names_that_look_like_ours_stay_apart() -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["x@0"], "relu"),
        helper.make_node("Add", ["x@0", "x@1"], ["y@1"], "relu@0"),
        helper.make_node("Neg", ["y@1"], ["y"], "y@0"),
    ]
    x, weight = random(1, 2, 7), random(7)
    model = one_graph(nodes, {"x": x}, {"x@1": weight}, {"y": (TensorProto.FLOAT, x.shape)}, 18)
    proto = expanded(compile_plan(model, "width=2"))
    assert np.array_equal(run_ort(proto, {"x": x})["y"], -(np.maximum(x, 0) + weight))


def test_the_plan_stays_as_it_is() -> None:
    model, _ = convolutions(13)
    plan = compile_plan(model, "width=3")
    before = ir.to_proto(plan).SerializeToString(deterministic=True)
    first, second = (ir.to_proto(expand(plan)).SerializeToString(deterministic=True) for _ in range(2))
    assert ir.to_proto(plan).SerializeToString(deterministic=True) == before
    assert first == second


def test_as_a_pass() -> None:
    model, inputs = convolutions(13)
    found = Pipeline((*pipeline(Mesh.parse("width=3")).passes, Expand())).run(ir.from_proto(model))
    assert close(run_ort(ir.to_proto(found), inputs)["y"], run_ort(model, inputs)["y"], 1e-6)
    with pytest.raises(PipelineError, match="expand requires"):
        Pipeline((Expand(),))


def test_refusals() -> None:
    model, _ = convolutions(70)
    assert len(ir.to_proto(expand(compile_plan(model, "width=64"))).graph.node) > 3 * 64
    with pytest.raises(PartitionError, match="65 ranks; the expanded form is for up to 64"):
        expand(compile_plan(model, "width=65"))
    with pytest.raises(PartitionError, match="no plan"):
        expand(ir.from_proto(model))


def test_nodes_say_where_they_run() -> None:
    model, _ = convolutions(13)
    proto = expanded(compile_plan(model, "width=3"))
    (configuration,) = proto.configuration
    assert (configuration.num_devices, list(configuration.device)) == (3, ["rank0", "rank1", "rank2"])
    placed = 0
    for node in proto.graph.node:
        if "@" not in node.name:
            assert "y" in node.output, "only the whole output belongs to nobody"
            continue
        (device,) = node.device_configurations
        assert device.configuration_id == configuration.name
        assert [spec.tensor_name for spec in device.sharding_spec] == list(node.output)
        rank = int(node.name.split("@")[1].split("/")[0])
        assert all(list(spec.device) == [rank] for spec in device.sharding_spec)
        placed += 1
    assert placed >= 5 * 3


# --- reductions --------------------------------------------------------------------------------------


def norm(x: Array) -> tuple[onnx.ModelProto, Array]:
    """An instance normalisation, and its result in float64."""
    node = helper.make_node("InstanceNormalization", ["x", "s", "b"], ["y"], "norm", epsilon=1e-5)
    scale, bias = random(x.shape[1]), random(x.shape[1], 1).reshape(-1)
    wide, axes = x.astype(np.float64), tuple(range(2, x.ndim))
    centred = wide - wide.mean(axes, keepdims=True)
    shape = (1, -1, *[1] * len(axes))
    exact = centred / np.sqrt(wide.var(axes, keepdims=True) + 1e-5) * scale.reshape(shape) + bias.reshape(shape)
    return one_node(node, x, {"s": scale, "b": bias}, x.shape), exact


def test_merged_moments_are_the_same_bits_everywhere() -> None:
    x = random(2, 3, 7, 9, 5)
    proto = expanded(compile_plan(norm(x)[0], "depth=3,width=2", {"depth": (0, 1, 1, 7)}))
    names = {o for n in proto.graph.node if n.name.startswith("norm/all_reduce@") and n.name.count("/") == 1
             for o in n.output}
    proto.graph.output.extend(v for v in proto.graph.value_info if v.name in names)
    found = run_ort(proto, {"x": x})
    parts = ("norm/all_reduce", "norm/all_reduce.1", "norm/all_reduce.2")
    per_rank = [[found[f"{part}@{rank}"].tobytes() for part in parts] for rank in range(6)]
    assert all(bits == per_rank[0] for bits in per_rank)
    assert found["norm/all_reduce@0"] == 7 * 9 * 5


def test_variances_do_not_cancel() -> None:
    """Mean 1000, deviation 1: E[x^2] - E[x]^2 would be off by a fifth."""
    x = random(1, 2, 31, 37) + np.float32(1000)
    model, exact = norm(x)
    found = run_ort(expanded(compile_plan(model, "height=3,width=2")), {"x": x})["y"]
    assert error(found, exact) < 5e-4


@pytest.mark.parametrize("kind", ["ReduceSum", "ReduceMax", "ReduceMin", "ReduceMean"])
def test_partial_results_of_empty_shards_do_not_count(kind: str) -> None:
    x = random(1, 2, 9) - np.float32(5)
    node = helper.make_node(kind, ["x", "axes"], ["y"], "reduce")
    model = one_node(node, x, {"axes": np.array([2], np.int64)}, (1, 2, 1))
    proto = expanded(compile_plan(model, "width=4", {"width": (0, 0, 4, 4, 9)}))
    assert close(run_ort(proto, {"x": x})["y"], run_ort(model, {"x": x})["y"], 1e-6)
    (count,) = {len(n.input) for n in proto.graph.node if n.op_type.startswith("AllReduce")}
    assert count == 2
