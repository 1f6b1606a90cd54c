"""Old and odd files: what exporters of ten years have written, held against onnxruntime."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import partitioner as pt
from tests.command import kernel, model, value, volume, works
from tests.models import NETWORKS
from tests.oracle import error
from tests.test_fallback import check

SHAPE = (1, 2, 7, 11, 5)
MESH = "depth=2,height=2"
W = kernel(2)


def conv(name: str = "conv", x: str = "x", y: str = "y", w: str = "w", **more: object) -> onnx.NodeProto:
    return helper.make_node("Conv", [x, w], [y], name, pads=[1] * 6, **more)


def feeds(shape: Sequence[int] = SHAPE) -> dict[str, np.ndarray]:
    return {"x": volume(shape)}


def test_ir_version_3_lists_its_weights_among_the_inputs(tmp_path: Path) -> None:
    source = model([conv()], [value("x", SHAPE), value("w", W.shape)], [value("y", SHAPE)], {"w": W}, 8, ir_version=3)
    plan = check(source, feeds(), MESH, tmp_path)
    assert list(plan.input_shapes) == ["x"]


@pytest.mark.parametrize("opset", range(7, 25))
def test_every_opset(opset: int) -> None:
    """Layers whose definition has changed most: pads, axes and limits that were attributes and are inputs now."""
    old = opset < 10
    nodes = [conv(y="a"), helper.make_node("BatchNormalization", ["a", "s", "s", "s", "s"], ["b"]),
             helper.make_node("Dropout", ["b"], ["c"]),
             helper.make_node("Clip", ["c"], ["d"], min=-1.0, max=1.0) if opset < 11 else
             helper.make_node("Clip", ["c", "low", "high"], ["d"]),
             helper.make_node("Pad", ["d"], ["e"], pads=[0, 0, 1, 0, 2] * 2) if opset < 11 else
             helper.make_node("Pad", ["d", "pads"], ["e"]),
             helper.make_node("Slice", ["e"], ["f"], axes=[2, 4], starts=[1, 1], ends=[-1, -2]) if old else
             helper.make_node("Slice", ["e", "starts", "ends", "axes"], ["f"]),
             helper.make_node("MaxPool", ["f"], ["g"], kernel_shape=[3] * 3, pads=[1] * 6),
             helper.make_node("Unsqueeze", ["g"], ["h"], axes=[0]) if opset < 13 else
             helper.make_node("Unsqueeze", ["g", "zero"], ["h"]),
             helper.make_node("Squeeze", ["h"], ["i"], axes=[0]) if opset < 13 else
             helper.make_node("Squeeze", ["h", "zero"], ["i"]),
             helper.make_node("ReduceMean", ["i"], ["j"], axes=[2, 3, 4]) if opset < 18 else
             helper.make_node("ReduceMean", ["i", "spatial"], ["j"]),
             helper.make_node("Mul", ["i", "j"], ["k"]), helper.make_node("Softmax", ["k"], ["y"], axis=1)]
    weights = {"w": W, "s": np.array([0.5, 1.5], np.float32), "low": np.float32(-1), "high": np.float32(1),
               "pads": np.array([0, 0, 1, 0, 2] * 2), "starts": np.array([1, 1]), "ends": np.array([-1, -2]),
               "axes": np.array([2, 4]), "zero": np.array([0]), "spatial": np.array([2, 3, 4])}
    read = {name for node in nodes for name in node.input}
    shape = (1, 2, 7, 11, 6)
    source = model(nodes, [value("x", SHAPE)], [value("y", shape)], {n: a for n, a in weights.items() if n in read},
                   opset, ir_version=3 if opset < 9 else 12 if opset > 23 else 8)
    if opset < 9:
        source.graph.input.extend(value(t.name, t.dims, t.data_type) for t in source.graph.initializer)
    check(source, feeds(), MESH)


@pytest.mark.parametrize("kind", ["value", "value_float", "value_floats", "value_int", "value_ints", "sparse_value",
                                  "ConstantOfShape", "Range", "initializer"])
def test_constants_of_all_kinds(kind: str) -> None:
    two = np.array([2, 3], np.float32)
    array = numpy_helper.from_array(two)
    cast = [helper.make_node("Cast", ["n"], ["c"], to=1)]
    made: dict[str, list[onnx.NodeProto]] = {
        "value": [helper.make_node("Constant", [], ["c"], value=array)],
        "value_float": [helper.make_node("Constant", [], ["c"], value_float=2.0)],
        "value_floats": [helper.make_node("Constant", [], ["c"], value_floats=[2.0])],
        "value_int": [helper.make_node("Constant", [], ["n"], value_int=2), *cast],
        "value_ints": [helper.make_node("Constant", [], ["n"], value_ints=[2]), *cast],
        "sparse_value": [helper.make_node("Constant", [], ["c"], sparse_value=helper.make_sparse_tensor(
            numpy_helper.from_array(np.array([2], np.float32), "v"),
            numpy_helper.from_array(np.array([3]), "i"), [5]))],
        "ConstantOfShape": [helper.make_node("ConstantOfShape", ["five"], ["c"],
                                             value=numpy_helper.from_array(np.array([2], np.float32)))],
        "Range": [helper.make_node("Range", ["zero", "end", "one"], ["n"]), *cast],
        "initializer": [helper.make_node("Identity", ["w1"], ["c"])],
    }
    if kind == "value":
        made["value"].append(helper.make_node("ReduceSum", ["c"], ["c2"], keepdims=0))
    last = "c2" if kind == "value" else "c"
    nodes = [*made[kind], conv(y="a"), helper.make_node("Mul", ["a", last], ["y"])]
    weights = {"w": W, "five": np.array([5]), "zero": np.int64(0), "end": np.int64(5), "one": np.int64(1),
               "w1": np.arange(5, dtype=np.float32)}
    check(model(nodes, [value("x", SHAPE)], [value("y", SHAPE)], weights), feeds(), MESH)


def test_functions_are_inlined(tmp_path: Path) -> None:
    """Also with attributes of their own, and calling each other."""
    inner = helper.make_function("own", "Slope", ["x"], ["y"], [helper.make_node("LeakyRelu", ["x"], ["y"])],
                                 [helper.make_opsetid("", 18)], ["alpha"])
    inner.node[0].attribute.append(onnx.AttributeProto(name="alpha", ref_attr_name="alpha",
                                                       type=onnx.AttributeProto.FLOAT))
    outer = helper.make_function("own", "Block", ["x", "w"], ["y"], [
        conv(y="a"), helper.make_node("Slope", ["a"], ["y"], domain="own", alpha=0.3)],
        [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)])
    nodes = [helper.make_node("Block", ["x", "w"], ["b"], domain="own"),
             helper.make_node("Block", ["b", "w"], ["y"], domain="own")]
    source = model(nodes, [value("x", SHAPE)], [value("y", SHAPE)], {"w": W}, domains=["own"])
    source.functions.extend([inner, outer])
    check(source, feeds(), MESH, tmp_path)


def test_several_inputs_and_outputs_and_shared_weights(tmp_path: Path) -> None:
    nodes = [conv("c1", "x", "a"), conv("c2", "z", "b"), helper.make_node("Add", ["a", "b"], ["sum"]),
             helper.make_node("Sub", ["a", "b"], ["d"]), conv("c3", "sum", "y")]
    source = model(nodes, [value("x", SHAPE), value("z", SHAPE)],
                   [value("y", SHAPE), value("d", SHAPE), value("sum", SHAPE)], {"w": W})
    check(source, {"x": volume(SHAPE), "z": volume(SHAPE, 1)}, MESH, tmp_path)


def test_weights_as_inputs() -> None:
    source = model([conv()], [value("x", SHAPE), value("w", W.shape)], [value("y", SHAPE)])
    plan = check(source, {**feeds(), "w": W}, MESH)
    assert plan.to_dict()["gathered"] == []


def test_an_input_that_is_an_output_and_one_that_nobody_reads(tmp_path: Path) -> None:
    source = model([conv()], [value("x", SHAPE), value("unused", (3, 1, 4))], [value("y", SHAPE), value("x", SHAPE)],
                   {"w": W})
    check(source, {**feeds(), "unused": volume((3, 1, 4))}, "depth=2", tmp_path)


NAMES = ["/model/conv.1/Conv_output_0", "a b", "x:0", "größe", "日本", "a\tb", "quote'\"", "@0", "%x", "x/halo",
         "a=b,c",
         "model.0.weight", "é" * 40, "\\", "<&>", "-1"]


@pytest.mark.parametrize("name", NAMES)
def test_names_with_odd_characters(name: str, tmp_path: Path) -> None:
    nodes = [conv(name, "x", f"{name}a", f"{name}w"), helper.make_node("Relu", [f"{name}a"], ["r"], f"{name} relu"),
             conv(f"{name}2", "r", name, f"{name}w")]
    source = model(nodes, [value("x", SHAPE)], [value(name, SHAPE)], {f"{name}w": W})
    plan = check(source, feeds(), MESH, tmp_path)
    assert name in plan.run(feeds()) and plan.to_text() and plan.report()


def test_names_that_are_ours_already() -> None:
    """Values and nodes that are named as our passes would name theirs."""
    nodes = [conv("x/halo", "x", "x/halo_1"), helper.make_node("Relu", ["x/halo_1"], ["x/halo"], "x/halo_1"),
             helper.make_node("InstanceNormalization", ["x/halo", "s", "s"], ["n/Moments"], "n"),
             conv("n/all_reduce", "n/Moments", "y")]
    source = model(nodes, [value("x", SHAPE)], [value("y", SHAPE)], {"w": W, "s": np.ones(2, np.float32)})
    check(source, feeds(), MESH)


def test_nodes_without_names_and_with_the_same_name() -> None:
    def chain(*names: str) -> onnx.ModelProto:
        nodes = [conv(name, *ends) for name, ends in zip(names, ("xa", "ab", "bc", "cy"), strict=True)]
        return model(nodes, [value("x", SHAPE)], [value("y", SHAPE)], {"w": W})

    check(chain("", "same", "same", ""), feeds(), MESH, reference=chain("", "one", "two", ""))


def test_empty_optional_inputs_and_omitted_outputs() -> None:
    nodes = [helper.make_node("Conv", ["x", "w", ""], ["a"], pads=[1] * 6),
             helper.make_node("Clip", ["a", "", "high"], ["b"]),
             helper.make_node("Resize", ["b", "", "scales", ""], ["c"], mode="nearest"),
             helper.make_node("Dropout", ["c", "", ""], ["d", ""]), helper.make_node("MaxPool", ["d"], ["y", ""],
                                                                                 kernel_shape=[1, 1, 1])]
    weights = {"w": W, "high": np.float32(0.5), "scales": np.array([1, 1, 2, 1, 1], np.float32)}
    check(model(nodes, [value("x", SHAPE)], [value("y", (1, 2, 14, 11, 5))], weights), feeds(), MESH)


def test_dead_nodes_are_dropped() -> None:
    nodes = [conv(), helper.make_node("NonZero", ["x"], ["dead"]), helper.make_node("Cast", ["dead"], ["deader"], to=1)]
    plan = check(model(nodes, [value("x", SHAPE)], [value("y", SHAPE)], {"w": W, "nobody": W}), feeds(), MESH)
    assert [n.op_type for n in plan.model.graph] == ["HaloExchange", "Conv"]
    assert list(plan.model.graph.initializers) == ["w"]


def test_stale_annotations_are_replaced() -> None:
    """Extents in the file that are wrong, as some converters leave them, do not matter."""
    source = model([conv(y="a"), helper.make_node("Relu", ["a"], ["y"])], [value("x", SHAPE)], [value("y", None)],
                   {"w": W})
    plan = pt.partition(source, mesh=MESH)
    wrong = onnx.ModelProto.FromString(source.SerializeToString())
    wrong.graph.value_info.append(value("a", (1, 2, 99, 11, 5)))
    found = pt.partition(wrong, mesh=MESH).run(feeds())["y"]
    assert found.tobytes() == plan.run(feeds())["y"].tobytes()


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 5e-3), ("bfloat16", 4e-2)])
@pytest.mark.parametrize("name", ["unet3d-stride-instance", "unet2d-maxpool-instance-bilinear", "resnet3d"])
def test_half_precision(name: str, dtype: str, tolerance: float, tmp_path: Path) -> None:
    """Compared with float32: the formats hold 11 and 8 bits, and a dozen layers round after each other."""
    network = NETWORKS[name]
    x = volume(network.shape)
    whole = pt.partition(network.export(tmp_path / "f.onnx")).run({"volume": x})["logits"]
    half = network.export(tmp_path / "h.onnx", dtype=dtype)  # type: ignore[arg-type]
    given = torch.from_numpy(x).to(getattr(torch, dtype))
    for mesh in (None, "width=2", "height=2,width=3"):
        found = pt.partition(half, mesh=mesh).run({"volume": given})["logits"]
        assert found.dtype == given.dtype
        off = np.abs(found.float().numpy() - whole).max() / np.abs(whole).max()
        assert off < tolerance, f"{mesh}: {off}"


@pytest.mark.parametrize("dtype", [TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE])
def test_one_layer_in_other_formats(dtype: int) -> None:
    """A single convolution is exact up to the rounding of its result."""
    kind = helper.tensor_dtype_to_np_dtype(dtype)
    source = model([conv()], [value("x", SHAPE, dtype)], [value("y", SHAPE, dtype)], {"w": W.astype(kind)}, 22,
                   ir_version=10)
    x = volume(SHAPE).astype(kind)
    wide = model([conv()], [value("x", SHAPE)], [value("y", SHAPE)], {"w": W.astype(kind).astype(np.float32)}, 22,
                 ir_version=10)
    expected = pt.partition(wide).run({"x": x.astype(np.float32)})["y"]
    given = torch.from_numpy(x.astype(np.float32)).to(torch.bfloat16) if dtype == TensorProto.BFLOAT16 else x
    found = pt.partition(source, mesh=MESH).run({"x": given})["y"]
    found = found.float().numpy() if isinstance(found, torch.Tensor) else found.astype(np.float32)
    bits = {TensorProto.FLOAT16: 2**-10, TensorProto.BFLOAT16: 2**-7, TensorProto.DOUBLE: 1e-6}[dtype]
    assert np.abs(found - expected).max() <= bits * np.abs(expected).max()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_of_32_bits_beside_data_of_16(dtype: str) -> None:
    """torch's exporter folds a batch norm into the convolution before it and leaves the weights in float32."""
    kind = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}[dtype]
    source = model([conv(), helper.make_node("Add", ["y", "b"], ["z"], "shift")], [value("x", SHAPE, kind)],
                   [value("z", SHAPE, kind)], {"w": W, "b": np.full((1, 2, 1, 1, 1), 0.3, np.float32)})
    x = torch.from_numpy(volume(SHAPE)).to(getattr(torch, dtype))
    plan = pt.partition(source, mesh=MESH)
    found = plan.run({"x": x})["z"]
    expected = torch.nn.functional.conv3d(x.float(), torch.from_numpy(W), padding=1) + 0.3
    assert found.dtype == x.dtype and error(found.float().numpy(), expected.numpy()) < (2e-3 if kind == 10 else 2e-2)
    assert all(v.dtype == plan.model.graph.inputs[0].dtype for v in plan.model.graph.initializers.values())


def test_data_of_two_types_is_refused_by_name() -> None:
    nodes = [helper.make_node("Cast", ["x"], ["d"], "wide", to=TensorProto.DOUBLE),
             helper.make_node("Add", ["x", "d"], ["y"], "sum"), helper.make_node("Mul", ["d", "x"], ["z"], "product")]
    source = model(nodes, [value("x", SHAPE)], [value("y", None), value("z", None)])
    with pytest.raises(pt.PartitionError) as caught:
        pt.partition(source, mesh=MESH)
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == ["sum (Add)", "product (Mul)"]
    assert "input 1 is DOUBLE beside inputs of FLOAT" in str(caught.value)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_model_above_two_gigabytes(tmp_path: Path) -> None:
    """More weights than a protobuf message holds: they lie in a file beside the model, and beside the plan."""
    channels = 9600
    shape = (1, channels, 4)
    matrix = np.zeros((channels, channels, 6), np.float32)
    matrix[:, :, 2] = np.eye(channels, dtype=np.float32)
    assert matrix.nbytes > 2**31
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 18}, name="large")
    x = ir.Value(name="x", shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
    w = ir.Value(name="w", shape=ir.Shape(matrix.shape), type=ir.TensorType(ir.DataType.FLOAT),
                 const_value=ir.tensor(matrix, name="w"))
    node = ir.Node("", "Conv", [x, w], [ir.AttrInt64s("pads", [2, 3])], name="conv")
    node.outputs[0].name, node.outputs[0].shape = "y", ir.Shape(shape)
    node.outputs[0].type = x.type
    graph.inputs.append(x)
    graph.outputs.append(node.outputs[0])
    graph.append(node)
    graph.register_initializer(w)
    ir.save(ir.Model(graph, ir_version=9), tmp_path / "m.onnx", external_data="m.data")
    del matrix, graph, w, node
    works("compile", tmp_path / "m.onnx", "--mesh", "width=2", "-o", tmp_path / "p.onnx")
    given = volume(shape)
    found = pt.load(tmp_path / "p.onnx").run({"x": given})["y"]
    np.testing.assert_allclose(found, given, rtol=1e-6)


def test_a_roll_by_zero() -> None:
    """As the tracing exporter writes it: a piece without cells joined to the whole."""
    def cells(name: str, axis: int, start: int, stop: int) -> onnx.NodeProto:
        return helper.make_node("Slice", ["a", f"i{start}", f"i{stop}", f"i{axis}"], [name])

    nodes = [conv(y="a"), cells("all", 2, 0, 7), cells("none", 2, 0, 0),
             helper.make_node("Concat", ["all", "none"], ["y"], axis=2)]
    weights = {"w": W, **{f"i{n}": np.array([n]) for n in (0, 2, 7)}}
    check(model(nodes, [value("x", SHAPE)], [value("y", SHAPE)], weights), feeds(), MESH)
    relu = helper.make_node("Relu", ["none"], ["y"])
    alone = model([*nodes[:3], relu], [value("x", SHAPE)], [value("y", None)], weights)
    with pytest.raises(pt.PartitionError, match=r"Slice_1 \(Slice\): it leaves nothing"):
        pt.partition(alone, mesh=MESH)
