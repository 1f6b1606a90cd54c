"""What is put around a network becomes part of the graph, exact over every mesh: held against numpy and onnxruntime."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import partitioner as pt
from partitioner.compose import (
    Wrapping,
    averaged,
    compose,
    with_channels_split,
    with_flips,
    with_output_ops,
    with_preprocess,
)
from partitioner.loader import load_model
from tests.command import Array, convolution, kernel, model, value, volume

SHAPE = (1, 2, 7, 11, 5)
MESHES = ("depth=3", "height=2,width=2", "depth=2,height=3")
OPSETS = (8, 11, 13, 18, 21)


def network(opset: int = 18, shape: Sequence[int | str] = SHAPE, seed: int = 0) -> onnx.ModelProto:
    """One convolution, `x` to `y`."""
    found = convolution(shape)
    found.opset_import[0].version, found.ir_version = opset, 8
    if seed:
        weights = kernel(3, int(shape[1]), len(shape) - 2) + np.float32(seed)
        found.graph.initializer[0].CopyFrom(numpy_helper.from_array(weights, "w"))
    return found


def whole(source: ir.Model | onnx.ModelProto, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """What onnxruntime makes of a model, after the checker has seen it."""
    proto = ir.to_proto(source) if isinstance(source, ir.Model) else source
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [v.name for v in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def parts(source: ir.Model, feeds: Mapping[str, Array], mesh: str, **options: Any) -> dict[str, Array]:
    """What the shards make of it; nothing may be gathered."""
    plan = pt.partition(source, mesh=mesh, strict=True, shapes={n: x.shape for n, x in feeds.items()}, **options)
    assert plan.to_dict()["gathered"] == []
    return plan.run(feeds)


def close(found: Array, wanted: Array, tolerance: float = 2e-6) -> bool:
    assert found.shape == wanted.shape
    return bool(np.abs(found.astype(np.float64) - wanted).max() <= tolerance * max(np.abs(wanted).max(), 1e-30))


def softmax(y: Array, axis: int = 1) -> Array:
    powers = np.exp(y.astype(np.float64) - y.max(axis, keepdims=True))
    return powers / powers.sum(axis, keepdims=True)


# --- operations on outputs ---------------------------------------------------------------------------


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("mesh", MESHES[1:])
def test_operations_on_outputs(opset: int, mesh: str) -> None:
    x = volume(SHAPE)
    y = whole(network(opset), {"x": x})["y"]
    sigmoid = 1 / (1 + np.exp(-y.astype(np.float64)))
    wanted: dict[tuple[str, ...], Array] = {
        ("softmax",): softmax(y), ("sigmoid",): sigmoid, ("argmax",): y.argmax(1)[:, None],
        ("softmax", "argmax"): y.argmax(1)[:, None], ("y=sigmoid", "y=threshold=0.25"): sigmoid > 0.25}
    for ops, reference in wanted.items():
        found = with_output_ops(load_model(network(opset)), ops)
        result = parts(found, {"x": x}, mesh)["y"]
        assert close(result, reference), ops
        again = whole(found, {"x": x})["y"]
        assert result.dtype == again.dtype == (np.uint8 if reference.dtype.kind in "bi" else np.float32)


def test_many_classes_need_more_than_a_byte() -> None:
    for classes, dtype in ((256, np.uint8), (257, np.int32)):
        source = model([helper.make_node("Conv", ["x", "w"], ["y"])], [value("x", (1, 1, 6, 5))],
                       [value("y", (1, classes, 6, 5))], {"w": volume((classes, 1, 1, 1))})
        found = parts(with_output_ops(load_model(source), ["argmax"]), {"x": volume((1, 1, 6, 5))}, "height=2")["y"]
        assert found.dtype == dtype and found.max() == whole(source, {"x": volume((1, 1, 6, 5))})["y"].argmax(1).max()


def test_the_number_of_classes_is_inferred() -> None:
    source = network()
    source.graph.output[0].type.tensor_type.ClearField("shape")
    found = parts(with_output_ops(load_model(source), ["argmax"]), {"x": volume(SHAPE)}, "depth=2")["y"]
    assert found.dtype == np.uint8


def test_one_of_several_outputs() -> None:
    nodes = [helper.make_node("Relu", ["x"], ["a"]), helper.make_node("Neg", ["a"], ["b"])]
    source = load_model(model(nodes, [value("x", SHAPE)], [value("a", SHAPE), value("b", SHAPE)]))
    x = volume(SHAPE)
    found = parts(with_output_ops(source, ["a=threshold=0.5"]), {"x": x}, "depth=2")
    assert np.array_equal(found["a"], (x > 0.5).astype(np.uint8)) and np.array_equal(found["b"], -np.maximum(x, 0))
    assert str(source.graph.outputs[0].name) == "a" and len(source.graph) == 2  # the model given stays


def test_channels_last() -> None:
    nodes = [helper.make_node("Transpose", ["x"], ["t"], perm=[0, 4, 1, 2, 3]),
             helper.make_node("Conv", ["t", "w"], ["c"], pads=[1] * 6),
             helper.make_node("Transpose", ["c"], ["y"], perm=[0, 2, 3, 4, 1])]
    source = model(nodes, [value("x", (1, 7, 11, 5, 2))], [value("y", (1, 7, 11, 5, 3))], {"w": kernel(3, 2)})
    x = volume((1, 7, 11, 5, 2))
    y = whole(source, {"x": x})["y"]
    wrapped = compose(load_model(source), Wrapping(output_ops=("argmax",)))
    assert np.array_equal(parts(wrapped, {"x": x}, "depth=2,height=2")["y"][..., 0], y.argmax(-1))
    z = (x - x.mean((1, 2, 3), keepdims=True)) / x.std((1, 2, 3), keepdims=True)
    found = parts(with_preprocess(load_model(source), ["zscore"]), {"x": x}, "depth=2,width=2")["y"]
    assert close(found, whole(source, {"x": z})["y"], 1e-5)
    flips = sum(np.flip(whole(source, {"x": np.flip(x, 2).copy() if f else x})["y"], [2] if f else [])
                for f in (False, True)) / 2
    assert close(parts(with_flips(load_model(source), "flips=height"), {"x": x}, "height=3")["y"], flips)


@pytest.mark.parametrize(("ops", "says"), [
    (["argmix"], "'argmix' is unknown; use softmax, sigmoid, argmax, threshold"),
    (["threshold"], "--output-op threshold: a threshold is a number, as threshold=0.5"),
    (["threshold=half"], "a threshold is a number"), (["threshold=nan"], "a threshold is a number"),
    (["softmax=1"], "softmax takes no number"), (["z=softmax"], "output 'z' is unknown; the model has y"),
    (["argmax", "softmax"], "argmax has made labels of it; give argmax last"), ([3], "give a list of texts"),
])
def test_operations_that_make_no_sense(ops: list[Any], says: str) -> None:
    with pytest.raises(pt.PartitionError) as error:
        pt.partition(network(), output_ops=ops)
    assert says in str(error.value) and len(str(error.value).splitlines()) == 1


def test_operations_on_outputs_that_do_not_take_them() -> None:
    one = model([helper.make_node("Relu", ["x"], ["y"])], [value("x", (1, 1, 6, 5))], [value("y", (1, 1, 6, 5))])
    with pytest.raises(pt.PartitionError, match="one channel, so that the result is 0 everywhere; use sigmoid or"):
        with_output_ops(load_model(one), ["argmax"])
    two = model([helper.make_node("Relu", ["x"], ["a"]), helper.make_node("Abs", ["x"], ["b"])],
                [value("x", SHAPE)], [value("a", SHAPE), value("b", SHAPE)])
    with pytest.raises(pt.PartitionError, match=r"the model has 2 outputs \(a, b\); write NAME=argmax"):
        with_output_ops(load_model(two), ["argmax"])
    whole_numbers = model([helper.make_node("Abs", ["x"], ["y"])], [value("x", SHAPE, TensorProto.INT32)],
                          [value("y", SHAPE, TensorProto.INT32)])
    with pytest.raises(pt.PartitionError, match="it is INT32, no score"):
        with_output_ops(load_model(whole_numbers), ["softmax"])
    x = volume(SHAPE, dtype=np.int32) * 9
    found = parts(with_output_ops(load_model(whole_numbers), ["argmax"]), {"x": x}, "depth=2")["y"]
    assert np.array_equal(found, np.abs(x).argmax(1)[:, None])


# --- steps before the network ------------------------------------------------------------------------


def ct(seed: int = 0) -> Array:
    """Numbers like those of a CT, some of them 0."""
    found = (volume(SHAPE, seed) * 500).astype(np.float32)
    found[found < -300] = 0
    return found


def nonzero_scores(x: Array) -> Array:
    found = np.zeros(x.shape)
    for place in itertools.product(range(x.shape[0]), range(x.shape[1])):
        inside = x[place] != 0
        cells = x[place][inside].astype(np.float64)
        found[place][inside] = (cells - cells.mean()) / cells.std()
    return found


STEPS: dict[tuple[str, ...], Any] = {
    ("window=-160:240",): lambda x: (x.clip(-160, 240) + 160) / 400,
    ("clip=-100:1e2",): lambda x: x.clip(-100, 100),
    ("normalize=77.9:176.6",): lambda x: (x - 77.9) / 176.6,
    ("normalize=77.9,3:176.6,2",): lambda x: (x - np.array([77.9, 3]).reshape(1, 2, 1, 1, 1)) / np.array(
        [176.6, 2]).reshape(1, 2, 1, 1, 1),
    ("zscore",): lambda x: (x - x.mean((2, 3, 4), keepdims=True)) / x.std((2, 3, 4), keepdims=True),
    ("zscore=nonzero",): nonzero_scores,
    ("clip=-100:100", "x=zscore"): lambda x: STEPS["zscore",](x.clip(-100, 100)),
    ("zscore", "clip=-1:1"): lambda x: STEPS["zscore",](x).clip(-1, 1),
}


@pytest.mark.parametrize("steps", STEPS, ids="+".join)
@pytest.mark.parametrize("opset", OPSETS)
def test_steps_before_the_network(steps: tuple[str, ...], opset: int) -> None:
    x = ct()
    wrapped = with_preprocess(load_model(network(opset)), steps)
    wanted = whole(network(opset), {"x": STEPS[steps](x.astype(np.float64)).astype(np.float32)})["y"]
    assert close(whole(wrapped, {"x": x})["y"], wanted, 1e-5)
    for mesh in MESHES:
        assert close(parts(wrapped, {"x": x}, mesh)["y"], wanted, 3e-6)


def test_statistics_of_a_volume_far_from_zero() -> None:
    """Means and squares merge as deviations, never as a difference of large sums."""
    x = (volume(SHAPE).astype(np.float64) + 30_000).astype(np.float32)
    for steps, tolerance in ((("zscore",), 2e-3), (("zscore=nonzero",), 1e-5)):  # a mean in float32 is off by 1e-3
        wanted = whole(network(), {"x": STEPS[steps](x.astype(np.float64)).astype(np.float32)})["y"]
        found = parts(with_preprocess(load_model(network()), steps), {"x": x}, "depth=3,height=2")["y"]
        assert close(found, wanted, tolerance)


def test_a_constant_volume_has_no_deviation() -> None:
    for steps, number in (("zscore", 3.25), ("zscore=nonzero", 3.25), ("zscore=nonzero", 0.0)):
        x = np.full(SHAPE, number, np.float32)
        assert not parts(with_preprocess(load_model(network()), [steps]), {"x": x}, "depth=2")["y"].any()


@pytest.mark.parametrize("name", ["int16", "uint8", "float64", "int32"])
def test_files_of_another_type(name: str) -> None:
    x = ct().clip(0, 200).astype(name)
    wrapped = with_preprocess(load_model(network()), ["window=-160:240", f"dtype={name}"])
    wanted = whole(network(), {"x": ((x.astype(np.float32) + 160) / 400).astype(np.float32)})["y"]
    plan = pt.partition(wrapped, mesh="depth=2,width=2")
    assert close(plan.run({"x": x})["y"], wanted)
    assert str(plan.model.graph.inputs[0].dtype.numpy()) == name  # type: ignore[union-attr]


@pytest.mark.parametrize(("text", "order"), [("zyx", (2, 1, 0)), ("yzx", (1, 2, 0)), ("2,0,1", (2, 0, 1))])
def test_files_of_another_order(text: str, order: tuple[int, ...]) -> None:
    """The input comes in the file's order, and outputs go back to it; the mesh names the network's axes."""
    x = volume(SHAPE)
    perm = (0, 1, *(a + 2 for a in order))
    back = [perm.index(a) for a in range(5)]
    wanted = whole(network(), {"x": x})["y"].transpose(back)
    wrapped = with_preprocess(load_model(network()), [f"axes={text}", "clip=-9:9"])
    given = np.ascontiguousarray(x.transpose(back))
    plan = pt.partition(wrapped, mesh="depth=3,height=2", strict=True)
    assert close(plan.run({"x": given})["y"], wanted) and close(whole(wrapped, {"x": given})["y"], wanted)
    layout = plan.to_dict()["inputs"][0]["layout"].strip("[]").split(", ")
    assert layout[perm[2]].startswith("depth(0|3|5|7)") and layout[perm[3]].startswith("height")
    labels = compose(load_model(network()), Wrapping((f"axes={text}",), ("argmax",)))
    assert np.array_equal(parts(labels, {"x": given}, "width=2,depth=2")["y"], wanted.argmax(1)[:, None])


def test_steps_in_half_precision_are_done_in_single() -> None:
    source = convolution(SHAPE, TensorProto.FLOAT16)
    wrapped = with_preprocess(load_model(source), ["window=-160:240"])
    assert wrapped.graph.inputs[0].dtype == ir.DataType.FLOAT
    found = parts(wrapped, {"x": ct()}, "depth=2")["y"]
    wanted = whole(source, {"x": STEPS["window=-160:240",](ct()).astype(np.float16)})["y"]
    assert found.dtype == np.float16 and close(found, wanted, 3e-3)


@pytest.mark.parametrize(("steps", "says"), [
    (["windows=1:2"], "'windows' is unknown; use window, clip, normalize, zscore, dtype, axes"),
    (["window=3"], "--preprocess window=3: is not understood; write window=LOW:HIGH, as window=-160:240"),
    (["window=3:1"], "write window=LOW:HIGH"), (["clip=a:b"], "write clip=LOW:HIGH"),
    (["normalize=1:0"], "write normalize=MEAN:DEVIATION"), (["zscore=all"], "write zscore or zscore=nonzero"),
    (["normalize=1,2,3:1"], "3 numbers for 2 channels; give one number, or one for each channel"),
    (["dtype=int17"], "write dtype=TYPE with one of int8, uint8, int16"),
    (["dtype=int16", "dtype=int8"], "dtype of input 'x' is given twice"),
    (["axes=xy"], "the input has 3 spatial axes; name each once, as axes=zyx or axes=2,1,0"),
    (["axes=xyw"], "is not understood; write axes=ORDER"), (["v=zscore"], "input 'v' is unknown; the model has x"),
])
def test_steps_that_make_no_sense(steps: list[str], says: str) -> None:
    with pytest.raises(pt.PartitionError) as error:
        pt.partition(network(), preprocess=steps)
    assert says in str(error.value) and len(str(error.value).splitlines()) == 1


# --- channels from several files ---------------------------------------------------------------------


def test_channels_of_several_inputs() -> None:
    source, x = network(18, (1, 4, 7, 11, 5)), volume((1, 4, 7, 11, 5))
    wanted = whole(source, {"x": x})["y"]
    for counts in ((1, 1, 1, 1), (2, 1, 1), (4,)):
        ends = np.cumsum((0, *counts))
        feeds = {f"x/{i}": x[:, a:b].copy() for i, (a, b) in enumerate(itertools.pairwise(ends))}
        wrapped = with_channels_split(load_model(source), "x", counts)
        for mesh in MESHES:
            assert close(parts(wrapped, feeds, mesh)["y"], wanted)
    with pytest.raises(pt.PartitionError, match="input 'x' takes 4 channels, 3 files hold 3; give files for all"):
        with_channels_split(load_model(source), "x", (1, 1, 1))
    with pytest.raises(pt.PartitionError, match="input 'v' is unknown; the model has x"):
        with_channels_split(load_model(source), "v", (1,) * 4)


def test_a_step_for_one_of_several_files() -> None:
    x = ct()
    wrapped = compose(load_model(network()), Wrapping(("x/0=window=-160:240", "x/1=zscore"), channels={"x": (1, 1)}))
    wanted = np.concatenate([STEPS["window=-160:240",](x[:, :1]), STEPS["zscore",](x.astype(np.float64))[:, 1:]], 1)
    feeds = {"x/0": x[:, :1].copy(), "x/1": x[:, 1:].copy()}
    reference = whole(network(), {"x": wanted.astype(np.float32)})["y"]
    assert close(parts(wrapped, feeds, "depth=2,height=2")["y"], reference)
    both = compose(load_model(network()), Wrapping(("x=zscore",), channels={"x": (1, 1)}))
    assert close(parts(both, feeds, "width=2")["y"], parts(with_preprocess(load_model(network()), ["zscore"]), {"x": x},
                                                           "width=2")["y"], 1e-6)


# --- flips and several models ------------------------------------------------------------------------


def flipped_mean(source: onnx.ModelProto, x: Array, axes: Sequence[int]) -> Array:
    chosen = [c for count in range(len(axes) + 1) for c in itertools.combinations(axes, count)]
    found = [np.flip(whole(source, {"x": np.ascontiguousarray(np.flip(x, c))})["y"], c).astype(np.float64)
             for c in chosen]
    return np.mean(found, 0)


@pytest.mark.parametrize(("tta", "axes"), [("flips", (2, 3, 4)), ("flips=width", (4,)), ("flips=height,depth", (2, 3))])
def test_flips(tta: str, axes: tuple[int, ...]) -> None:
    x = volume(SHAPE)
    wanted = flipped_mean(network(), x, axes)
    wrapped = with_flips(load_model(network()), tta)
    assert close(whole(wrapped, {"x": x})["y"], wanted)
    assert len(ir.to_proto(wrapped).graph.initializer) == 1  # the weights are there once
    for mesh in MESHES:
        assert close(parts(wrapped, {"x": x}, mesh)["y"], wanted)


@pytest.mark.parametrize("shape", [(2, 3, 9), (1, 3, 9, 13)])
def test_flips_of_fewer_axes(shape: tuple[int, ...]) -> None:
    source, x = network(18, shape), volume(shape)
    mesh = "height=2,width=3" if len(shape) == 4 else "width=4,batch=2"
    found = parts(with_flips(load_model(source), "flips"), {"x": x}, mesh)["y"]
    assert close(found, flipped_mean(source, x, tuple(range(2, len(shape)))))


def test_flips_of_two_volumes_and_a_vector() -> None:
    """Images are flipped together, a vector is not; an output without spatial axes is averaged as it is."""
    nodes = [helper.make_node("Concat", ["x", "p"], ["c"], axis=1),
             helper.make_node("Conv", ["c", "w"], ["d"], pads=[1] * 6),
             helper.make_node("Mul", ["d", "v"], ["y"]), helper.make_node("GlobalAveragePool", ["y"], ["g"]),
             helper.make_node("Flatten", ["g"], ["s"])]
    source = model(nodes, [value("x", SHAPE), value("p", SHAPE), value("v", (1,))],
                   [value("y", (1, 3, *SHAPE[2:])), value("s", (1, 3))], {"w": kernel(3, 4)})
    feeds = {"x": volume(SHAPE), "p": volume(SHAPE, 1), "v": np.array([0.7], np.float32)}
    runs = []
    for axes in [c for k in range(4) for c in itertools.combinations((2, 3, 4), k)]:
        given = {n: a if n == "v" else np.ascontiguousarray(np.flip(a, axes)) for n, a in feeds.items()}
        found = whole(source, given)
        runs.append((np.flip(found["y"], axes), found["s"]))
    plan = pt.partition(source, mesh="depth=2,width=2", tta="flips")
    results = plan.run(feeds)
    assert close(results["y"], np.mean([y for y, _ in runs], 0))
    assert close(results["s"], np.mean([s for _, s in runs], 0), 1e-5)


def test_weights_are_made_ready_once() -> None:
    """Nodes that no input decides are not copied, nor are the weights that they make."""
    nodes = [helper.make_node("Mul", ["w", "f"], ["u"]), helper.make_node("Conv", ["x", "u"], ["c"], pads=[1] * 6),
             helper.make_node("BatchNormalization", ["c", "s", "s", "s", "s"], ["y"])]
    ones = np.ones(3, np.float32) * 2
    source = model(nodes, [value("x", SHAPE)], [value("y", (1, 3, *SHAPE[2:]))],
                   {"w": kernel(), "f": np.array(0.5, np.float32), "s": ones})
    single, wrapped = pt.partition(source), pt.partition(source, tta="flips", mesh="depth=2")
    assert close(wrapped.run({"x": volume(SHAPE)})["y"], flipped_mean(source, volume(SHAPE), (2, 3, 4)))
    assert wrapped.cost.weight_bytes < single.cost.weight_bytes + 1000


def test_copies_run_one_after_the_other() -> None:
    """The memory of many copies is that of one, and of the sum."""
    source = network(18, (1, 2, 32, 16, 16))
    single, eight = pt.partition(source), pt.partition(source, tta="flips")
    volume_bytes = 4 * 2 * 32 * 16 * 16
    assert eight.cost.peak.max() <= single.cost.peak.max() + 5 * volume_bytes


def test_the_mean_of_several_models() -> None:
    x = volume(SHAPE)
    sources = [network(seed=seed) for seed in range(3)]
    before = [s.SerializeToString() for s in sources]
    wanted = np.mean([whole(s, {"x": x})["y"].astype(np.float64) for s in sources], 0)
    wrapped = averaged([load_model(s) for s in sources])
    assert close(whole(wrapped, {"x": x})["y"], wanted)
    for mesh in MESHES:
        assert close(parts(wrapped, {"x": x}, mesh)["y"], wanted)
    assert [s.SerializeToString() for s in sources] == before
    flips = pt.partition(sources[0], mesh="depth=2", ensemble=sources[1:], tta="flips=depth", output_ops="argmax")
    both = np.mean([flipped_mean(s, x, (2,)) for s in sources], 0)
    assert np.array_equal(flips.run({"x": x})["y"], both.argmax(1)[:, None])


def test_half_floats_are_summed_up_in_single() -> None:
    source = convolution(SHAPE, TensorProto.FLOAT16)
    x = volume(SHAPE, dtype=np.float16)
    found = pt.partition(source, mesh="depth=2", tta="flips").run({"x": x})["y"]
    assert found.dtype == np.float16 and close(found, flipped_mean(source, x, (2, 3, 4)), 2e-3)


def test_other_extents_keep_what_is_around() -> None:
    source = network(18, (1, 2, "d", "h", "w"))
    plan = pt.partition(source, mesh="depth=2", shapes={"x": SHAPE}, preprocess=["zscore"], output_ops=["argmax"])
    x = ct()[:, :, :6, :9]
    labels = plan.with_shapes({"x": x.shape}).run({"x": x})["y"]
    wanted = whole(source, {"x": STEPS["zscore",](x.astype(np.float64)).astype(np.float32)})["y"].argmax(1)
    assert np.array_equal(labels[:, 0], wanted)
    with plan.session() as session:
        assert np.array_equal(session.run({"x": x})["y"], labels)


def test_a_torch_module_with_all_around() -> None:
    import torch

    net = torch.nn.Conv3d(2, 3, 3, padding=1)
    x = torch.from_numpy(ct())
    plan = pt.partition(net, x, mesh="depth=2", preprocess=["window=-160:240", "axes=xyz"], output_ops=["softmax"])
    (found,) = plan.run({name: x for name in plan.input_shapes}).values()
    wanted = net((x.clip(-160, 240) + 160) / 400).softmax(1)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("around", "says"), [
    ({"tta": "turns"}, "--tta turns: 'turns' is unknown; use flips, or flips=depth,height"),
    ({"tta": "flips=time"}, "the volume has no axis 'time'; use depth, height, width"),
    ({"tta": "flips=depth,depth"}, "an axis is named twice"), ({"tta": 3}, "tta=3: give a text"),
    ({"ensemble": [network(13)]}, "--ensemble: model 2 is in opset ai.onnx 13, the first in ai.onnx 18; export both"),
    ({"ensemble": [network(18, (1, 3, 7, 11, 5))]}, "input 'x' is float [1, 3, 7, 11, 5], in the first float [1, 2"),
    ({"ensemble": ["none.onnx"]}, "none.onnx: no such file"), ({"preprocess": [1]}, "give a list of texts"),
])
def test_what_cannot_be_put_around(around: dict[str, Any], says: str) -> None:
    with pytest.raises(pt.PartitionError) as error:
        pt.partition(network(), **around)
    assert says in str(error.value)
    with pytest.raises(TypeError, match="unexpected keyword argument 'postprocess'"):
        pt.partition(network(), postprocess=["argmax"])  # type: ignore[call-arg]


def test_labels_have_no_mean() -> None:
    source = with_output_ops(load_model(network()), ["argmax"])
    for around in ({"tta": "flips"}, {"ensemble": [network()]}):
        with pytest.raises(pt.PartitionError, match="output 'y' is uint8, of which there is no mean; leave the last"):
            pt.partition(source, **around)  # type: ignore[arg-type]


@pytest.mark.parametrize("steps", STEPS, ids="+".join)
def test_steps_in_double_precision(steps: tuple[str, ...]) -> None:
    """All that is put around computes in the network's own precision, and statistics merge without loss."""
    source = load_model(convolution(SHAPE, TensorProto.DOUBLE))
    x = ct().astype(np.float64)
    prepared = pt.partition(source).run({"x": STEPS[steps](x)})["y"]
    flips = np.mean([pt.partition(source).run({"x": np.ascontiguousarray(np.flip(STEPS[steps](x), a))})["y"][
        tuple(slice(None, None, -1 if axis in a else 1) for axis in range(5))] for a in ((), (3,))], 0)
    for mesh in MESHES:
        assert close(parts(with_preprocess(source, steps), {"x": x}, mesh)["y"], prepared, 1e-12)
        assert close(parts(compose(source, Wrapping(steps, tta="flips=height")), {"x": x}, mesh)["y"], flips, 1e-12)
