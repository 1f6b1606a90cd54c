"""The Python API: what goes in, what comes back, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

import partitioner as pt
from partitioner.api import Plan
from partitioner.verify import verify
from tests.command import SHAPE, Array, convolution, environment, kernel, model, value, volume
from tests.models import NETWORKS, UNetConfig, export
from tests.oracle import reference64

Node = helper.make_node
NETWORK = NETWORKS["unet3d-maxpool-batch-trilinear"]
WEIGHTS = {"w": kernel()}
CONV = Node("Conv", ["x", "w"], ["y"], name="conv", pads=[1] * 6)
X, Y = value("x", SHAPE), value("y", (1, 3, *SHAPE[2:]))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A U-Net with open axes."""
    return NETWORK.export(tmp_path_factory.mktemp("api") / "unet.onnx", dynamic=True)


@pytest.fixture(scope="module")
def plan(path: Path) -> pt.Plan:
    return pt.partition(path, mesh="batch=2,depth=2", shapes={"volume": NETWORK.shape})


@pytest.fixture(scope="module")
def expected(path: Path) -> Array:
    return ort(onnx.load(path), {"volume": volume(NETWORK.shape)})["logits"]


def ort(source: onnx.ModelProto, inputs: dict[str, Array]) -> dict[str, Array]:
    session = onnxruntime.InferenceSession(source.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def near(found: Array, reference: Array, limit: float = 1e-5) -> bool:
    scale = np.abs(reference.astype(np.float64)).max(initial=1e-30)
    return found.shape == reference.shape and found.dtype == reference.dtype and (
        np.abs(found.astype(np.float64) - reference.astype(np.float64)).max(initial=0) <= limit * scale)


# --- arrays ------------------------------------------------------------------------------------------

BASE = volume(NETWORK.shape)


def read_only(array: Array) -> Array:
    copy = array.copy()
    copy.flags.writeable = False
    return copy


ARRAYS: dict[str, Callable[[Array], Array]] = {
    "as it is": lambda a: a,
    "Fortran order": np.asfortranarray,
    "negative strides": lambda a: a[:, :, ::-1, :, ::-1].copy()[:, :, ::-1, :, ::-1],
    "every other cell": lambda a: np.repeat(np.repeat(a, 2, axis=3), 3, axis=0)[::3, :, :, ::2],
    "transposed": lambda a: np.ascontiguousarray(a.T).T,
    "read-only": read_only,
    "broadcast": lambda a: np.broadcast_to(a[:1], a.shape),
    "big-endian": lambda a: a.astype(">f4"),
    "masked": lambda a: np.ma.masked_array(a),
    "a subclass": lambda a: a.view(type("Image", (np.ndarray,), {})),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_numpy_arrays_of_all_kinds(plan: pt.Plan, name: str) -> None:
    array = ARRAYS[name](BASE)
    before = array.copy()
    found = plan.run({"volume": array})["logits"]
    assert type(found) is np.ndarray and found.dtype == np.float32 and found.flags.writeable
    assert np.array_equal(found, plan.run({"volume": np.array(array, np.float32)})["logits"])
    assert np.array_equal(array, before)


def test_a_mapped_file(plan: pt.Plan, tmp_path: Path, expected: Array) -> None:
    np.save(tmp_path / "x.npy", BASE)
    assert near(plan.run({"volume": np.load(tmp_path / "x.npy", mmap_mode="r")})["logits"], expected)


TENSORS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "as it is": lambda t: t,
    "channels last": lambda t: t.to(memory_format=torch.channels_last_3d),
    "transposed": lambda t: t.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0),
    "a window": lambda t: nn.functional.pad(t, (1, 2, 3, 1))[..., 3:-1, 1:-2],
    "with a gradient": lambda t: t.clone().requires_grad_(),
    "a parameter": nn.Parameter,
    "a result": lambda t: t.clone().requires_grad_() * 1,
}


@pytest.mark.parametrize("name", TENSORS)
def test_torch_tensors_of_all_kinds(plan: pt.Plan, name: str) -> None:
    expected = plan.run({"volume": BASE})["logits"]
    found = plan.run({"volume": TENSORS[name](torch.from_numpy(BASE.copy()))})["logits"]
    assert isinstance(found, torch.Tensor) and found.dtype == torch.float32 and found.device.type == "cpu"
    assert not found.requires_grad and not found.is_inference()
    assert np.array_equal(found.numpy(), expected)


def test_results_are_the_users_own(plan: pt.Plan) -> None:
    """A later run does not write into them."""
    with plan.session() as session:
        first = session.run({"volume": BASE})["logits"]
        kept = first.copy()
        session.run({"volume": 2 * BASE})
    assert np.array_equal(first, kept)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tensors_on_a_gpu_come_back_there(plan: pt.Plan, expected: Array) -> None:
    found = plan.run({"volume": torch.from_numpy(BASE).cuda()})["logits"]
    assert found.device.type == "cuda" and near(found.cpu().numpy(), expected, 1e-4)


@pytest.mark.parametrize(("inputs", "says"), [
    ({}, "input 'volume' is missing; give it"), ({"scan": BASE}, "input 'scan' is unknown; the model has volume"),
    ({"volume": BASE[0]}, "has 4 axes"), ({"volume": BASE.astype(np.float64)}, "is float64; the model takes float32"),
    ({"volume": torch.from_numpy(BASE).double()}, "is float64; the model takes float32"),
    ({"volume": BASE.astype(np.int32)}, "is int32"), ({"volume": BASE.tolist()}, "is a list; give a numpy array"),
    ({"volume": 3.0}, "is a float"), ({"volume": None}, "is a NoneType"),
    (BASE, "the inputs are a ndarray; give a dict from name to array: volume"),
    (None, "the inputs are a NoneType"), ([BASE], "the inputs are a list"),
    ({"volume": torch.from_numpy(BASE).to_sparse()}, "is a tensor of torch.sparse_coo; give a dense one"),
    ({"volume": torch.empty(BASE.shape, device="meta")}, "is a tensor of no data"),
    ({"volume": BASE[:, :0]}, "not 2x0x"), ({"volume": BASE[:, :, :0]}, "extent 0 of axis 2"),
    ({"volume": BASE, "more": BASE}, "input 'more' is unknown"),
])
def test_inputs_that_are_refused(plan: pt.Plan, inputs: Any, says: str) -> None:
    with pytest.raises(pt.PartitionError) as caught:
        plan.run(inputs)
    assert says in str(caught.value)
    with plan.session() as session:  # and a session goes on
        with pytest.raises(pt.PartitionError):
            session.run(inputs)
        session.run({"volume": BASE})


def test_every_problem_is_told_at_once() -> None:
    two = model([Node("Add", ["a", "b"], ["s"])], [value("a", SHAPE), value("b", SHAPE)], [value("s", SHAPE)])
    with pytest.raises(pt.PartitionError) as caught:
        pt.partition(two, mesh="depth=2").run({"a": volume().astype(np.float64), "c": volume()})
    assert len(str(caught.value).splitlines()) == 3


# --- element types -----------------------------------------------------------------------------------


def test_float64(tmp_path: Path) -> None:
    network = NETWORKS["unet1d-maxpool-none"]
    source = network.export(tmp_path / "m.onnx", dtype="float64")
    x = volume(network.shape, dtype=np.float64)
    plan = pt.partition(source, mesh="width=3")
    found = plan.run({"volume": x})["logits"]
    plain = ir.to_proto(Plan(plan.model).unpartitioned())
    assert found.dtype == np.float64 and near(found, reference64(plain, {"volume": x})["logits"], 1e-12)


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64", "uint8", "bool", "float16"])
def test_other_element_types(dtype: str) -> None:
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    source = model([Node("Cast", ["x"], ["f"], to=TensorProto.FLOAT), Node("Conv", ["f", "w"], ["c"], pads=[1] * 6),
                    Node("Cast", ["c"], ["y"], to=kind)], [value("x", SHAPE, kind)],
                   [value("y", (1, 3, *SHAPE[2:]), kind)], {"w": np.ones((3, 2, 3, 3, 3), np.float32)})
    x = np.random.default_rng(0).integers(0, 2, SHAPE).astype(dtype)
    expected = ort(source, {"x": x})["y"]
    for given in (x, torch.from_numpy(x)):
        found = pt.partition(source, mesh="depth=2,width=2").run({"x": given})["y"]
        assert type(found) is type(given)
        assert np.array_equal(np.asarray(found), expected) and np.asarray(found).dtype == expected.dtype


def test_bfloat16() -> None:
    """Torch tensors stay what they are; numpy has no such type of its own and gets float32."""
    kind = TensorProto.BFLOAT16
    source = model([Node("Relu", ["x"], ["y"])], [value("x", SHAPE, kind)], [value("y", SHAPE, kind)])
    x = torch.from_numpy(volume()).bfloat16()
    found = pt.partition(source, mesh="depth=2").run({"x": x})["y"]
    assert found.dtype == torch.bfloat16 and torch.equal(found, x.relu())


# --- graphs of all kinds -----------------------------------------------------------------------------

AGAIN = value("o", SHAPE)
GRAPHS: dict[str, tuple[onnx.ModelProto, str]] = {
    "intermediate values leave": (model(
        [CONV, Node("Relu", ["y"], ["r"]), Node("Tanh", ["r"], ["z"])], [X],
        [Y, value("z", (1, 3, *SHAPE[2:])), value("r", (1, 3, *SHAPE[2:]))], WEIGHTS), "depth=2,height=2"),
    "an intermediate value with a halo leaves": (model(
        [Node("Relu", ["x"], ["o"]), Node("Conv", ["o", "w"], ["y"], pads=[1] * 6)], [X], [AGAIN, Y], WEIGHTS),
        "2x2x2"),
    "an input leaves through Identity": (model(
        [CONV, Node("Identity", ["x"], ["o"])], [X], [Y, AGAIN], WEIGHTS), "2x2x1"),
    "an input leaves as it is": (model([CONV], [X], [Y, X], WEIGHTS), "depth=3"),
    "Identity of Identity": (model(
        [CONV, Node("Identity", ["x"], ["o"]), Node("Identity", ["o"], ["p"])], [X], [value("p", SHAPE), Y, AGAIN],
        WEIGHTS), "depth=2"),
    "only Identity": (model([Node("Identity", ["x"], ["o"])], [X], [AGAIN]), "depth=2"),
    "an output leaves twice": (model(
        [CONV, Node("Identity", ["y"], ["o"])], [X], [value("o", (1, 3, *SHAPE[2:])), Y], WEIGHTS), "width=2"),
    "a value is read twice": (model(
        [CONV, Node("Add", ["y", "y"], ["z"]), Node("Concat", ["y", "z", "y"], ["o"], axis=1)], [X],
        [value("o", (1, 9, *SHAPE[2:]))], WEIGHTS), "depth=2"),
    "joined along the axis that is split": (model(
        [CONV, Node("Concat", ["y", "y"], ["o"], axis=2)], [X], [value("o", (1, 3, 14, 11, 5))], WEIGHTS), "depth=3"),
    "an input that nobody reads": (model([CONV], [X, value("u", (4, 4))], [Y], WEIGHTS), "depth=2"),
    "an unread volume first": (model([CONV], [value("u", (1, 1, 3, 3, 3)), X], [Y], WEIGHTS), "depth=2"),
    "a node that nobody reads": (model([CONV, Node("Tanh", ["y"], ["t"])], [X], [Y], WEIGHTS), "depth=2"),
    "weights among the inputs": (model([CONV], [X, value("w", (3, 2, 3, 3, 3))], [Y], WEIGHTS, 9, 3), "depth=2"),
    "a batch": (model(
        [CONV], [value("x", (3, 2, 7, 11, 5))], [value("y", (3, 3, 7, 11, 5))], WEIGHTS), "batch=3,depth=2"),
    "a batch that does not divide": (model(
        [CONV], [value("x", (5, 2, 7, 11, 5))], [value("y", (5, 3, 7, 11, 5))], WEIGHTS), "batch=3"),
    "a scalar": (model([Node("Mul", ["x", "s"], ["o"])], [X, value("s", ())], [AGAIN]), "depth=2"),
    "a vector along the axis that is split": (model(
        [Node("Mul", ["x", "s"], ["o"])], [X, value("s", (5,))], [AGAIN]), "width=2"),
    "a matrix": (model([Node("Relu", ["x"], ["o"])], [value("x", (7, 5))], [value("o", (7, 5))]), "batch=2"),
    "odd names": (model([Node("Conv", ["a b/c:=,", "w"], ["%@{}"], pads=[1] * 6)], [value("a b/c:=,", SHAPE)],
                        [value("%@{}", (1, 3, *SHAPE[2:]))], WEIGHTS), "depth=2"),
}


def random_inputs(source: onnx.ModelProto) -> dict[str, Array]:
    weights = {t.name for t in source.graph.initializer}
    return {v.name: volume([d.dim_value for d in v.type.tensor_type.shape.dim], seed)
            for seed, v in enumerate(source.graph.input) if v.name not in weights}


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_of_all_kinds(name: str, tmp_path: Path) -> None:
    source, mesh = GRAPHS[name]
    inputs = random_inputs(source)
    expected = ort(source, inputs)
    plan = pt.partition(source, mesh=mesh)
    found = plan.run(inputs)
    assert list(found) == list(expected)
    assert all(near(found[n], expected[n]) for n in expected)
    json.dumps(plan.to_dict())
    assert plan.report() and plan.to_text()
    plan.save(tmp_path / "p.onnx")
    again = pt.load(tmp_path / "p.onnx").run(inputs)
    assert all(np.array_equal(again[n], found[n]) for n in expected)
    onnx.checker.check_model(str(tmp_path / "p.onnx"), full_check=True)
    assert all(near(a, expected[n]) for n, a in ort(ir.to_proto(plan.model), inputs).items())
    assert all(near(a, expected[n]) for n, a in ort(ir.to_proto(plan.expand()), inputs).items())
    assert verify(plan, inputs).passed


def test_a_weight_that_is_an_input_is_still_a_weight() -> None:
    source, mesh = GRAPHS["weights among the inputs"]
    with pytest.raises(pt.PartitionError, match="input 'w' is unknown; the model has x"):
        pt.partition(source, mesh=mesh).run({"x": volume(), "w": WEIGHTS["w"]})


def test_weights_given_at_run_time() -> None:
    source = model([CONV], [X, value("w", (3, 2, 3, 3, 3))], [Y])
    inputs = {"x": volume(), "w": WEIGHTS["w"]}
    plan = pt.partition(source, mesh="depth=2,width=2")
    assert near(plan.run(inputs)["y"], ort(source, inputs)["y"])
    assert plan.cost.weight_bytes == 0


def test_numpy_and_torch_mixed_follow_the_first() -> None:
    source = model([Node("Add", ["a", "b"], ["s"])], [value("a", SHAPE), value("b", SHAPE)], [value("s", SHAPE)])
    plan = pt.partition(source, mesh="depth=2")
    tensor = torch.from_numpy(volume(seed=1))
    assert isinstance(plan.run({"a": volume(), "b": tensor})["s"], np.ndarray)
    assert isinstance(plan.run({"b": tensor, "a": volume()})["s"], torch.Tensor)


# --- what `partition` takes --------------------------------------------------------------------------


def test_models_in_every_form(path: Path, expected: Array) -> None:
    forms = (path, str(path), onnx.load(path), ir.load(path))
    for source in forms:
        found = pt.partition(source, mesh="depth=3", shapes={"volume": NETWORK.shape})
        assert near(found.run({"volume": BASE})["logits"], expected)
    assert "partitioner.mesh" not in {p.key for p in forms[2].metadata_props}  # the user's model stays as it was
    assert not forms[3].metadata_props


@pytest.mark.parametrize("mesh", [
    "depth=2,height=3", {"depth": 2, "height": 3}, pt.Mesh((("depth", 2), ("height", 3))), "2x3", "2x3x1",
    {"height": np.int64(3), "depth": np.int32(2)}, " depth=2 , height=3 ",
])
def test_meshes_in_every_form(mesh: Any) -> None:
    found = pt.partition(convolution(), mesh=mesh).mesh
    assert (found.size, found.count("depth"), found.count("height")) == (6, 2, 3)


@pytest.mark.parametrize("mesh", [3, ["depth"], ("depth", 2), {"depth": "2"}, {"depth": 2.0}, {"depth": True}, {1: 2},
                                  pt.Mesh((("time", 2),)), pt.Mesh((("depth", 0),)), {"depth": 0}, b"depth=2"])
def test_meshes_that_are_none(mesh: Any) -> None:
    with pytest.raises(pt.PartitionError, match=r"\Amesh [^\n]*\Z"):
        pt.partition(convolution(), mesh=mesh)


@pytest.mark.parametrize("shape", [SHAPE, list(SHAPE), np.array(SHAPE), torch.Size(SHAPE)])
def test_shapes_in_every_form(shape: Sequence[int]) -> None:
    source = convolution(("n", 2, "d", "h", "w"))
    assert pt.partition(source, mesh="depth=2", shapes={"x": shape}).input_shapes == {"x": SHAPE}


@pytest.mark.parametrize("given", [{"shapes": {"x": "1x2x7x11x5"}}, {"shapes": {"x": (1, 2, 7, 11, 5.5)}},
                                   {"shapes": {"x": 5}}, {"shapes": {"x": (None,) * 5}}, {"shapes": SHAPE},
                                   {"cuts": {"depth": 3}}, {"cuts": {"depth": (0, 3.5, 7)}}, {"cuts": (0, 3, 7)}])
def test_numbers_are_never_rounded(given: dict[str, Any]) -> None:
    with pytest.raises(pt.PartitionError, match=r"\A(shapes|cuts): .*give"):
        pt.partition(convolution(), mesh="depth=2", **given)


def test_cuts_are_where_the_user_wants_them() -> None:
    plan = pt.partition(convolution(), mesh="depth=3,width=2", cuts={"depth": (0, 1, 6, 7)})
    assert plan.to_dict()["inputs"][0]["layout"] == "[1, 2, depth(0|1|6|7), 11, width(0|3|5)]"
    assert near(plan.run({"x": volume()})["y"], ort(convolution(), {"x": volume()})["y"])


@pytest.mark.parametrize("source", [None, 3, b"model", [1], object(), np.zeros(3)])
def test_what_is_no_model(source: Any) -> None:
    with pytest.raises(pt.PartitionError, match=r"\Acannot read a model from \w+; give a path, an onnx\.ModelProto"):
        pt.partition(source)


# --- torch modules -----------------------------------------------------------------------------------


def test_a_torch_module() -> None:
    config = UNetConfig(dims=3, levels=2, base=2, norm="batch")
    module = config.build().train()
    x = torch.from_numpy(volume((1, 1, 13, 11, 9)))
    plan = pt.partition(module, x, mesh="depth=2")
    assert module.training
    with torch.no_grad():
        expected = module.eval()(x)
    (found,) = plan.run({name: x for name in plan.input_shapes}).values()
    assert isinstance(found, torch.Tensor) and near(found.numpy(), expected.numpy())
    other = torch.from_numpy(volume((1, 1, 15, 10, 12)))
    with torch.no_grad():
        expected = module(other)
    (found,) = plan.run({name: other for name in plan.input_shapes}).values()
    assert near(found.numpy(), expected.numpy())


class TwoInTwoOut(nn.Module):
    """(a, b) -> (convolution of the sum, the sum)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(2, 3, 3, padding=1)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.conv(a + b), a + b


def test_a_torch_module_of_several_inputs() -> None:
    module = TwoInTwoOut()
    a, b = (torch.from_numpy(volume(seed=s)) for s in (1, 2))
    plan = pt.partition(module, (a, b), mesh="height=2")
    assert list(plan.input_shapes.values()) == [SHAPE, SHAPE]
    found = list(plan.run(dict(zip(plan.input_shapes, (a, b), strict=True))).values())
    with torch.no_grad():
        expected = module(a, b)
    assert all(near(f.numpy(), e.numpy()) for f, e in zip(found, expected, strict=True))


class DependsOnData(nn.Module):
    """What no exporter can write down."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if float(x.sum()) > 0 else x[..., 1:]


class IgnoresOne(nn.Module):
    """Reads the second of two inputs."""

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return b + 1


def test_a_torch_module_that_ignores_an_input() -> None:
    a, b = torch.zeros(3, 4), torch.from_numpy(volume())
    plan = pt.partition(IgnoresOne(), (a, b), mesh="depth=2")
    (found,) = plan.run(dict(zip(plan.input_shapes, (a, b), strict=True))).values()
    assert torch.equal(found, b + 1)


def test_exporting_leaves_the_module_as_it_was() -> None:
    """Also where a part of it is frozen."""
    module = nn.Sequential(nn.Conv3d(2, 3, 3), nn.BatchNorm3d(3), nn.Dropout(0.5)).train()
    module[1].eval()
    before = {name: t.clone() for name, t in module.state_dict().items()}
    pt.partition(module, torch.from_numpy(volume()), mesh="depth=2")
    assert [m.training for m in module] == [True, False, True] and module.training
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())


def test_torch_modules_that_are_refused() -> None:
    x = torch.from_numpy(volume())
    with pytest.raises(pt.PartitionError, match="a torch module needs an example input"):
        pt.partition(nn.Conv3d(2, 3, 3), mesh="depth=2")
    with pytest.raises(pt.PartitionError, match=r"goes with a torch\.nn\.Module, not with ModelProto"):
        pt.partition(convolution(), x, mesh="depth=2")
    for module, example in ((DependsOnData(), x), (nn.Conv3d(5, 3, 3), x), (nn.Conv3d(2, 3, 3), "x"),
                            (nn.Conv3d(2, 3, 3), volume())):
        with pytest.raises(pt.PartitionError, match=r"\A[^\n]*\Z"):
            pt.partition(module, example, mesh="depth=2")


def test_exporting_is_silent(tmp_path: Path) -> None:
    script = ("import torch, partitioner as pt\n"
              "pt.partition(torch.nn.Conv3d(2, 3, 3), torch.zeros(1, 2, 7, 11, 5), mesh='depth=2')\n")
    done = subprocess.run([sys.executable, "-c", script], env=environment(), cwd=tmp_path, capture_output=True,
                          text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# --- the rest of a plan ------------------------------------------------------------------------------


def test_what_a_plan_says_of_itself(plan: pt.Plan) -> None:
    assert repr(plan) == "<Plan for volume=2x1x13x17x11 on batch=2,depth=2>"
    assert plan.input_shapes == {"volume": NETWORK.shape} and plan.mesh.size == 4
    assert plan.cost is plan.cost
    assert "Conv" in plan.to_text() and plan.expand().graph.name is not None


def test_another_shape_keeps_the_cuts_that_it_can(path: Path) -> None:
    plan = pt.partition(path, mesh="depth=2,height=2", shapes={"volume": (1, 1, 13, 17, 11)},
                        cuts={"depth": (0, 3, 13), "height": (0, 4, 17)})
    other = plan.with_shapes({"volume": (2, 1, 13, 19, 11)})
    assert other.to_dict()["inputs"][0]["layout"] == "[2, 1, depth(0|3|13), height(0|10|19), 11]"


def test_importing_loads_neither_torch_nor_onnx(tmp_path: Path) -> None:
    script = ("import sys, partitioner as pt, partitioner.cli\n"
              "pt.Mesh.parse('depth=2'); assert set(pt.__all__) <= set(dir(pt))\n"
              "heavy = {'torch', 'onnx', 'onnx_ir', 'onnxruntime', 'numpy'} & set(sys.modules)\n"
              "assert not heavy, heavy\n")
    done = subprocess.run([sys.executable, "-c", script], env=environment(), cwd=tmp_path, capture_output=True,
                          text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_names_of_the_package() -> None:
    for name in pt.__all__:
        assert getattr(pt, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = pt.nothing  # type: ignore[attr-defined]


def test_a_dynamic_export_takes_its_shape_from_the_user(tmp_path: Path) -> None:
    source = export(UNetConfig(dims=2, levels=2, base=2).build(), (1, 1, 12, 10), tmp_path / "m.onnx", dynamic=True,
                    exporter="torchscript")
    plan = pt.partition(source, mesh="height=2", shapes={"volume": (2, 1, 17, 13)})
    x = volume((2, 1, 17, 13))
    assert near(plan.run({"volume": x})["logits"], ort(onnx.load(source), {"volume": x})["logits"])
