"""Operators without a rule, control flow, operators that are functions of others, and a user's own."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper

import partitioner as pt
from partitioner import dialect
from partitioner.ops import plugins, registry
from tests.command import kernel, model, refused, run_apart, value, volume, works
from tests.oracle import error

SHAPE = (1, 2, 7, 11, 5)
MESHES = ["depth=2", "depth=3,height=2", "depth=2,height=2,width=2"]


def check(source: onnx.ModelProto, feeds: dict[str, np.ndarray], mesh: str, folder: Path | None = None,
          reference: onnx.ModelProto | None = None) -> pt.Plan:
    """The plan's run, its file in onnxruntime, its expanded form and its copy from a file, all against onnxruntime."""
    results = run_ort(reference or source, feeds)
    expected = dict(zip([o.name for o in source.graph.output], results, strict=True))
    plan = pt.partition(source, mesh=mesh)
    found = plan.run(feeds)
    forms: list[dict[str, Any]] = [found]
    proto = ir.to_proto(plan.model)
    onnx.checker.check_model(proto)
    for form in (proto, ir.to_proto(plan.expand())):
        forms.append(dict(zip(found, run_ort(form, feeds), strict=True)))
    if folder is not None:
        plan.save(folder / "p.onnx")
        forms.append(pt.load(folder / "p.onnx").run(feeds))
        assert all(forms[-1][name].tobytes() == found[name].tobytes() for name in found)
    for form in forms:
        for name, array in expected.items():
            assert form[name].shape == array.shape and form[name].dtype == array.dtype
            assert error(form[name], array) < 1e-5
    return plan


def run_ort(source: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[Any]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(source.SerializeToString(), options).run(None, feeds)


def conv_around(inner: Sequence[onnx.NodeProto], shape: Sequence[int] = SHAPE, opset: int = 18,
                domains: Sequence[str] = (), **constants: np.ndarray) -> onnx.ModelProto:
    """Conv, what is given (`a` to `b`), Add with a skip."""
    nodes = [helper.make_node("Conv", ["x", "w"], ["a"], "first", pads=[1] * 2 * (len(shape) - 2)), *inner,
             helper.make_node("Add", ["a", "b"], ["y"], "last")]
    weights = {"w": kernel(2, 2, len(shape) - 2), **constants}
    return model(nodes, [value("x", shape)], [value("y", shape)], weights, opset, domains=domains)


# --- replicated, by onnxruntime -----------------------------------------------------------------------


def no_rule(op_type: str = "GRU") -> onnx.ModelProto:
    """A recurrent layer along the depth: no shard can begin before the one before it has ended."""
    random = np.random.default_rng(0)
    weights = {name: random.standard_normal(shape).astype(np.float32) / 4
               for name, shape in (("w", (1, 12, 5)), ("r", (1, 12, 4)))}
    nodes = [helper.make_node("Relu", ["x"], ["a"]),
             helper.make_node("GRU", ["a", "w", "r"], ["h"], "gru", hidden_size=4),
             helper.make_node("Squeeze", ["h", "one"], ["y"])]
    return model(nodes, [value("x", (7, 3, 5))], [value("y", (7, 3, 4))], {**weights, "one": np.array([1])})


def test_an_operator_without_a_rule_runs_replicated(tmp_path: Path) -> None:
    plan = check(no_rule(), {"x": volume((7, 3, 5))}, "batch=2", tmp_path)
    assert plan.to_dict()["without_rule"] == ["gru"]
    assert len(plan.to_dict()["gathered"]) == 1
    text = plan.report()
    assert "NO RULE" in text and "GATHERED" in text and "--strict refuses it" in text


def test_strict_refuses_it(tmp_path: Path) -> None:
    with pytest.raises(pt.PartitionError, match=r"gru \(GRU\): it has no sharded rule and would run replicated"):
        pt.partition(no_rule(), mesh="batch=2", strict=True)
    onnx.save(no_rule(), tmp_path / "m.onnx")
    assert "--strict" in refused("plan", tmp_path / "m.onnx", "--mesh", "batch=2", "--strict")
    assert "NO RULE" in works("plan", tmp_path / "m.onnx", "--mesh", "batch=2")


def test_its_result_stays_in_shards_where_its_extents_are_the_same() -> None:
    source = conv_around([helper.make_node("NegativeLogLikelihoodLoss", ["a", "t"], ["l"], reduction="none"),
                          helper.make_node("Unsqueeze", ["l", "one"], ["u"]),
                          helper.make_node("Mul", ["a", "u"], ["b"])],
                         t=np.zeros((1, 7, 11, 5), np.int64), one=np.array([1]))
    for mesh in MESHES:
        check(source, {"x": volume(SHAPE)}, mesh)


def test_gloo_ranks_run_it_too() -> None:
    plan = pt.partition(no_rule(), mesh="batch=2")
    x = {"x": volume((7, 3, 5))}
    with plan.session("gloo") as session:
        assert session.run(x)["y"].tobytes() == plan.run(x)["y"].tobytes()


@pytest.mark.parametrize(("nodes", "says"), [
    ([helper.make_node("NonZero", ["a"], ["b"], "n")], r"n \(NonZero\): the extents of its result depend on the data"),
    ([helper.make_node("RandomNormalLike", ["a"], ["b"], "n")], r"n \(RandomNormalLike\): it draws random numbers"),
    ([helper.make_node("Own", ["a"], ["b"], "n", domain="my")], r"n \(my.Own\): domain 'my' is unknown; register"),
    ([helper.make_node("SequenceConstruct", ["a"], ["s"], "n"), helper.make_node("ConcatFromSequence", ["s"], ["b"],
                                                                                 "m", axis=0)],
     r"n \(SequenceConstruct\): its result is a sequence"),
    ([helper.make_node("NoSuch", ["a"], ["b"], "n")], r"n \(NoSuch\): it has no rule, and onnxruntime cannot run it"),
])
def test_what_cannot_run_is_refused_by_name(nodes: list[onnx.NodeProto], says: str) -> None:
    with pytest.raises(pt.PartitionError, match=says):
        pt.partition(conv_around(nodes, domains=["my"]), mesh="depth=2")


def test_all_refusals_at_once() -> None:
    nodes = [helper.make_node("NonZero", ["a"], ["c"], "one"),
             helper.make_node("Own", ["c"], ["d"], "two", domain="my"),
             helper.make_node("Bernoulli", ["d"], ["e"], "three"), helper.make_node("Relu", ["e"], ["b"], "four")]
    with pytest.raises(pt.PartitionError) as caught:
        pt.partition(conv_around(nodes, domains=["my"]), mesh="depth=2")
    assert [line.split(" ")[0] for line in str(caught.value).splitlines()] == ["one", "two", "three"]


# --- control flow -------------------------------------------------------------------------------------


def branches() -> tuple[onnx.GraphProto, onnx.GraphProto]:
    two = onnx.numpy_helper.from_array(np.array([2], np.float32), "two")
    then = helper.make_graph([helper.make_node("Mul", ["a", "two"], ["t"])], "t", [], [value("t", None)], [two])
    other = helper.make_graph([helper.make_node("Neg", ["a"], ["e"])], "e", [], [value("e", None)])
    return then, other


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("sign", [-1, 1])
def test_an_if_that_depends_on_the_data(mesh: str, sign: int, tmp_path: Path) -> None:
    then, other = branches()
    source = conv_around([
        helper.make_node("ReduceMean", ["x"], ["m"], keepdims=0), helper.make_node("Greater", ["m", "zero"], ["c"]),
        helper.make_node("If", ["c"], ["b"], "if", then_branch=then, else_branch=other)], zero=np.float32(0))
    plan = check(source, {"x": sign * np.abs(volume(SHAPE))}, mesh, tmp_path)
    assert [n.name for n in plan.model.graph if dialect.is_region(n)] == ["if"]


def test_branches_that_read_the_input_of_the_network(tmp_path: Path) -> None:
    then = helper.make_graph([helper.make_node("Relu", ["x"], ["t"])], "t", [], [value("t", None)])
    other = helper.make_graph([helper.make_node("Neg", ["x"], ["e"])], "e", [], [value("e", None)])
    source = conv_around([
        helper.make_node("ReduceMean", ["x"], ["m"], keepdims=0), helper.make_node("Greater", ["m", "zero"], ["c"]),
        helper.make_node("If", ["c"], ["b"], "if", then_branch=then, else_branch=other)], zero=np.float32(0))
    plan = check(source, {"x": volume(SHAPE)}, "depth=2,height=2", tmp_path)
    assert plan.cost.steps


@pytest.mark.parametrize("depth", [7, 8])
def test_an_if_that_the_extents_decide_is_gone(depth: int) -> None:
    then, other = branches()
    shape = (1, 2, depth, 11, 5)
    source = conv_around([
        helper.make_node("Shape", ["x"], ["s"]), helper.make_node("Gather", ["s", "two"], ["n"]),
        helper.make_node("Equal", ["n", "seven"], ["c"]),
        helper.make_node("If", ["c"], ["b"], "if", then_branch=then, else_branch=other)],
        shape, two=np.int64(2), seven=np.int64(7))
    plan = check(source, {"x": volume(shape)}, "depth=2,height=2")
    assert ("Mul" if depth == 7 else "Neg") in [n.op_type for n in plan.model.graph]
    assert plan.to_dict()["gathered"] == [] and plan.to_dict()["without_rule"] == []


def loop(keeps: bool = True) -> list[onnx.NodeProto]:
    body = [helper.make_node("Add", ["v", "a"], ["vo"]), helper.make_node("Identity", ["ci"], ["co"])]
    if not keeps:
        body[0] = helper.make_node("Concat", ["v", "a"], ["vo"], axis=2)
    graph = helper.make_graph(body, "body", [value("i", (), TensorProto.INT64), value("ci", (), TensorProto.BOOL),
                                             value("v", None)], [value("co", (), TensorProto.BOOL), value("vo", None)])
    return [helper.make_node("Loop", ["count", "yes", "x"], ["b"], "loop", body=graph)]


def test_a_loop_whose_extents_stay(tmp_path: Path) -> None:
    source = conv_around(loop(), count=np.int64(3), yes=np.bool_(True))
    for mesh in MESHES:
        check(source, {"x": volume(SHAPE)}, mesh, tmp_path)


def test_a_loop_whose_extents_grow_is_refused() -> None:
    with pytest.raises(pt.PartitionError, match=r"loop \(Loop\): the extents of its result depend"):
        pt.partition(conv_around(loop(False), count=np.int64(3), yes=np.bool_(True)), mesh="depth=2")


# --- functions of others ------------------------------------------------------------------------------


def test_an_operator_that_is_a_function_of_others_is_written_out() -> None:
    """Attention: the queries stay sharded, keys and values are gathered."""
    shape = (1, 2, 12, 8)
    node = helper.make_node("Attention", ["x", "k", "v"], ["y"], "attention")
    inputs = [value(name, shape) for name in ("x", "k", "v")]
    source = model([node], inputs, [value("y", shape)], opset=23, ir_version=10)
    feeds = {name: volume(shape, seed) for seed, name in enumerate(("x", "k", "v"))}
    for mesh in ("height=2", "batch=1,height=3"):
        plan = check(source, feeds, mesh)
        assert plan.to_dict()["without_rule"] == []
        assert "height" in str(dialect.get_layout(plan.model.graph.outputs[0]))


# --- channels last ------------------------------------------------------------------------------------


def test_the_mesh_names_the_axes_that_the_network_sees(tmp_path: Path) -> None:
    """As TensorFlow's exporters write it: the volume is transposed first."""
    shape = (1, 9, 7, 5, 2)
    nodes = [helper.make_node("Transpose", ["x"], ["t"], perm=[0, 4, 1, 2, 3]),
             helper.make_node("Conv", ["t", "w"], ["c"], pads=[1] * 6),
             helper.make_node("Transpose", ["c"], ["y"], perm=[0, 2, 3, 4, 1])]
    source = model(nodes, [value("x", shape)], [value("y", (1, 9, 7, 5, 3))], {"w": kernel(3)})
    plan = check(source, {"x": volume(shape)}, "depth=3,height=2", tmp_path)
    assert str(dialect.get_layout(plan.model.graph.inputs[0])) == "[1, depth(0|3|6|9), height(0|4|7), 5, 2]"
    assert plan.to_dict()["gathered"] == []
    cut = pt.partition(source, mesh="depth=2", cuts={"depth": (0, 8, 9)})
    assert "depth(0|8|9)" in str(dialect.get_layout(cut.model.graph.outputs[0]))


# --- a user's own -------------------------------------------------------------------------------------

OWN = '''
from dataclasses import dataclass

import torch

from partitioner.ops import Operator, register
from partitioner.ops.base import aligned


@register
@dataclass(frozen=True)
class Soften(Operator):
    """x / (scale + |x|), cell by cell."""

    op_types = ("Soften",)
    domain = "my.lab"
    scale: float

    @classmethod
    def read(cls, view):
        return cls(view.inputs, (view.input(0),), view.float("scale", 1.0))

    def needs(self, output=0):
        shape = self.outputs[0].shape
        return (aligned(shape, shape),)

    def run(self, call):
        x = call.tensor(0)
        return (x / (self.scale + x.abs()),)
'''


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(plugins.VARIABLE, "")
    path = tmp_path / "own.py"
    path.write_text(OWN)
    source = conv_around([helper.make_node("Soften", ["a"], ["b"], "soften", domain="my.lab", scale=2.0)],
                         domains=["my.lab"])
    onnx.save(source, tmp_path / "m.onnx")
    np.save(tmp_path / "x.npy", volume(SHAPE))
    yield tmp_path
    registry._OPERATORS.pop(("my.lab", "Soften"), None)


def test_an_operator_of_the_users_own(own: Path) -> None:
    with pytest.raises(pt.PartitionError, match=r"soften \(my.lab.Soften\): domain 'my.lab' is unknown; register"):
        pt.partition(own / "m.onnx", mesh="depth=2")
    pt.load_operators(own / "own.py")
    plan = pt.partition(own / "m.onnx", mesh="depth=2,height=2")
    whole = pt.partition(own / "m.onnx").run({"x": volume(SHAPE)})["y"]
    np.testing.assert_allclose(plan.run({"x": volume(SHAPE)})["y"], whole, rtol=1e-5, atol=1e-6)
    assert plan.to_dict()["gathered"] == []
    assert str(own / "own.py") in os.environ[plugins.VARIABLE].split(os.pathsep)
    with plan.session("gloo") as session:
        assert session.run({"x": volume(SHAPE)})["y"].tobytes() == plan.run({"x": volume(SHAPE)})["y"].tobytes()


def test_the_command_takes_it_too(own: Path) -> None:
    found = run_apart("run", "m.onnx", "--mesh", "depth=2", "--operators", "own.py", "--input", "x.npy", "--output",
                      "y.npy", "--backend", "gloo", cwd=own)
    assert found.code == 0, found.err
    assert np.load(own / "y.npy").shape == SHAPE
    found = run_apart("verify", "m.onnx", "--mesh", "depth=2", "--operators", "own.py", cwd=own)
    assert found.code == 0 and "one shard" in found.out, found.err


def test_an_operator_of_this_process_only_is_refused_for_others(own: Path) -> None:
    scope: dict[str, Any] = {"__name__": "elsewhere"}
    import sys
    import types

    sys.modules["elsewhere"] = types.ModuleType("elsewhere")
    exec(OWN, scope)
    plan = pt.partition(own / "m.onnx", mesh="depth=2")
    assert plan.run({"x": volume(SHAPE)})["y"].shape == SHAPE
    with pytest.raises(pt.PartitionError, match=r"soften \(Soften\): its class Soften is registered in this process"):
        plan.session("gloo")


@pytest.mark.parametrize(("name", "text", "says"), [
    ("none.py", None, "no such file"), ("bad.py", "x = 1 / 0", "cannot be imported (ZeroDivisionError"),
    ("no.such.module", None, "cannot be imported (ModuleNotFoundError"),
])
def test_operators_that_cannot_be_imported(own: Path, name: str, text: str | None, says: str) -> None:
    if text is not None:
        (own / name).write_text(text)
    given = own / name if name.endswith(".py") else name
    assert says in refused("plan", own / "m.onnx", "--operators", given)


# --- the way back -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", MESHES)
def test_the_plain_model_in_a_plan_is_the_model(mesh: str, tmp_path: Path) -> None:
    """Statistics of groups are not those of channels: a saved plan gives back what it was made from."""
    node = helper.make_node("GroupNormalization", ["a", "s", "t"], ["b"], "groups", num_groups=2)
    shape = (2, 4, 7, 11, 5)
    nodes = [helper.make_node("Relu", ["x"], ["a"]), node,
             helper.make_node("InstanceNormalization", ["b", "s", "t"], ["y"], "cases")]
    numbers = {"s": np.array([1, 2, 3, 4], np.float32), "t": np.array([0, 1, 0, 2], np.float32)}
    source = model(nodes, [value("x", shape)], [value("y", shape)], numbers, 21, ir_version=10)
    pt.partition(source, mesh=mesh).save(tmp_path / "p.onnx")
    plain = ir.to_proto(pt.load(tmp_path / "p.onnx").unpartitioned())
    assert {n.domain for n in plain.graph.node} == {""}
    (found,), (expected,) = (run_ort(m, {"x": volume(shape)}) for m in (plain, source))
    assert error(found, expected) < 1e-5
