"""Nothing moves that need not: no concatenation before a convolution, its parts in one message, no pad by nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

import partitioner as pt
from partitioner import dialect
from partitioner.compiler import Steering
from partitioner.compiler import compile_plan as compile_source
from partitioner.cost import plan_cost
from partitioner.exchange import plan_exchange
from partitioner.layout import parse_layout
from partitioner.loader import load_model
from partitioner.mesh import Mesh
from passes.checks import JOINED
from passes.expand import expand
from passes.join_exchanges import JoinExchanges
from tests.examples import one_graph
from tests.oracle import as_double, close, compile_plan, error, pipeline, reference64, run_lockstep, run_ort

Array = np.ndarray


def random(*shape: int) -> Array:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def with_skip(rank: int = 3, parts: tuple[int, int] = (5, 8), bias: bool = True,
              **attributes: object) -> onnx.ModelProto:
    """A skip around a lower resolution, both read by one convolution."""
    one, three = [1] * rank, [3] * rank
    attributes = {"pads": [1] * (2 * rank), **attributes}
    nodes = [helper.make_node("Conv", ["x", "a"], ["fine"], pads=[1] * (2 * rank)),
             helper.make_node("LeakyRelu", ["fine"], ["skip"]),
             helper.make_node("Conv", ["skip", "b"], ["coarse"], strides=[2] * rank),
             helper.make_node("ConvTranspose", ["coarse", "c"], ["up"], strides=[2] * rank,
                              output_padding=[0] * rank),
             helper.make_node("Concat", ["skip", "up"], ["both"], "beside", axis=1),
             helper.make_node("Conv", ["both", "d", *(["e"] if bias else [])], ["joined"], "joined", **attributes),
             helper.make_node("LeakyRelu", ["joined"], ["y"], alpha=0.3)]
    weights = {"a": random(parts[0], 2, *three), "b": random(6, parts[0], *(2 * n for n in one)),
               "c": random(6, parts[1], *(2 * n for n in one)), "d": random(7, sum(parts), *three)}
    if bias:
        weights["e"] = random(7)
    shape = (2, 2, 12, 10, 8)[: rank + 2]
    return one_graph(nodes, {"x": random(*shape)}, weights, {"y": (TensorProto.FLOAT, None)}, 18)


def inputs_of(model: onnx.ModelProto) -> dict[str, Array]:
    shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    return {"x": random(*shape)}


FORMS = [{"rank": 1}, {"rank": 2}, {"rank": 3}, {"rank": 3, "bias": False}, {"rank": 3, "strides": [2, 1, 3]},
         {"rank": 3, "pads": [0, 1, 2, 1, 1, 0]}, {"rank": 2, "dilations": [2, 1], "pads": [2, 1, 2, 1]},
         {"rank": 2, "auto_pad": "SAME_LOWER", "pads": None}]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("mesh", [None, "width=3", "batch=2,width=2"])
def test_it_is_the_convolution_of_the_concatenation(form: dict, mesh: str | None) -> None:
    model = with_skip(**{k: v for k, v in form.items() if v is not None} | (
        {"pads": [0] * 4} if form.get("auto_pad") else {}))
    if form.get("auto_pad"):
        node = next(n for n in model.graph.node if n.name == "joined")
        del node.attribute[[a.name for a in node.attribute].index("pads")]
    x = inputs_of(model)
    expected = reference64(model, {"x": x["x"].astype(np.float64)})["y"]
    plan = compile_plan(as_double(model), mesh)
    assert [n.op_type for n in plan.graph].count("ConcatConv") == 1 and "Concat" not in [n.op_type for n in plan.graph]
    assert close(run_lockstep(load_model(ir.to_proto(plan)), {"x": x["x"].astype(np.float64)}).outputs["y"], expected,
                 1e-12)
    limit = 3 * error(run_ort(model, x)["y"], expected)
    plan = compile_plan(model, mesh)
    assert close(run_lockstep(plan, x).outputs["y"], expected, limit)
    assert run_ort(ir.to_proto(plan), x)["y"].tobytes() == run_ort(model, x)["y"].tobytes()
    assert close(run_ort(ir.to_proto(expand(plan)), x)["y"], expected, max(limit, 1e-6))


@pytest.mark.parametrize("thickness", [1, 2, 5])
def test_slab_by_slab(thickness: int) -> None:
    model = with_skip()
    x = {"x": inputs_of(model)["x"].astype(np.float64)}
    plan = compile_plan(as_double(model), None, rolled="depth", thickness=thickness)
    assert close(run_lockstep(plan, x).outputs["y"], reference64(model, x)["y"], 1e-12)


def refused(model: onnx.ModelProto) -> None:
    assert "ConcatConv" not in [n.op_type for n in compile_plan(model, "depth=2").graph]


def test_what_others_read_stays() -> None:
    model = with_skip()
    model.graph.output.append(helper.make_tensor_value_info("both", TensorProto.FLOAT, None))
    refused(model)
    model = with_skip()
    model.graph.node.insert(5, helper.make_node("Relu", ["both"], ["more"]))
    model.graph.output.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, None))
    refused(model)


def test_a_value_beside_itself_stays() -> None:
    model = with_skip(parts=(5, 5))
    node = next(n for n in model.graph.node if n.op_type == "Concat")
    node.input[1] = "skip"
    refused(model)


def test_what_is_pinned_stays() -> None:
    source = load_model(with_skip())
    for name in ("beside", "joined"):
        plan = compile_source(source, Mesh.parse("depth=2"), {}, {}, steering=Steering(pinned={name: ("depth",)}))
        assert {"beside", "joined"} <= {n.name for n in plan.graph}


@pytest.mark.parametrize("mesh", ["depth=2", "depth=3,width=2"])
def test_both_parts_travel_in_one_message(mesh: str) -> None:
    model = with_skip()
    x = {"x": inputs_of(model)["x"].astype(np.float64)}
    together = compile_plan(as_double(model), mesh)
    *passes, _ = pipeline(Mesh.parse(mesh)).passes
    apart = type(pipeline(Mesh.parse(mesh)))(tuple(passes)).run(load_model(as_double(model)))
    joined = [n for n in together.graph if dialect.is_exchange(n) and dialect.joined_exchange(n)]
    assert len(joined) == 1 and not list(JOINED.problems(together))
    found, other = run_lockstep(together, x), run_lockstep(apart, x)
    assert found.outputs["y"].tobytes() == other.outputs["y"].tobytes()
    assert (found.sent == other.sent).all() and (found.messages <= other.messages).all()
    assert found.messages.sum() < other.messages.sum()


def test_an_exchange_goes_with_one_that_sends_wherever_it_does() -> None:
    """Before and after the cut, before it alone, after it alone, from everywhere; split along another axis."""
    mesh, owned = Mesh.parse("height=2"), "[1, 2, height(0|5|9), 5]"
    both, before, after, everything = (plan_exchange(mesh, parse_layout(owned), parse_layout(f"[1, 2, {needed}, 5]"))
                                       for needed in ("height(0:6 4:9)", "height(0:5 4:9)", "height(0:6 5:9)", "9"))
    assert before.goes_with(both) and after.goes_with(both) and both.goes_with(both)
    assert not before.goes_with(after) and not both.goes_with(before)
    assert not before.goes_with(everything) and not everything.goes_with(both)
    across = plan_exchange(mesh, parse_layout("[1, 2, 9, height(0|3|5)]"), parse_layout("[1, 2, 9, height(0:4 2:5)]"))
    assert across.goes_with(both)


def test_a_joined_exchange_that_stands_alone_is_noticed() -> None:
    plan = compile_plan(with_skip(), "depth=2")
    exchanges = [n for n in plan.graph if dialect.is_exchange(n)]
    dialect.set_joined(exchanges[0], "nobody")
    (problem,) = JOINED.problems(plan)
    assert problem == f"{exchanges[0].name} is to travel with nobody, which does not stand before it"


def test_exchanges_are_moved_up_to_one_that_goes_the_same_way() -> None:
    """Two branches of one input: the second one's halo comes with the first one's."""
    nodes = [helper.make_node("Relu", ["x"], ["r"]), helper.make_node("Neg", ["x"], ["n"]),
             helper.make_node("Conv", ["r", "w"], ["a"], pads=[1, 0, 1, 0]), helper.make_node("Tanh", ["a"], ["t"]),
             helper.make_node("Conv", ["n", "w"], ["b"], pads=[1, 0, 1, 0]), helper.make_node("Add", ["t", "b"], ["y"])]
    model = one_graph(nodes, {"x": random(1, 2, 9, 5)}, {"w": random(3, 2, 3, 1)}, {"y": (TensorProto.FLOAT, None)}, 18)
    plan = compile_plan(as_double(model), "height=3")
    x = {"x": random(1, 2, 9, 5).astype(np.float64)}
    assert sum(bool(dialect.joined_exchange(n)) for n in plan.graph if dialect.is_exchange(n)) == 1
    assert close(run_lockstep(plan, x).outputs["y"], reference64(model, x)["y"], 1e-12)
    assert plan_cost(plan).messages.ravel().tolist() == [1, 2, 1]


def test_inputs_wait_until_they_are_read() -> None:
    """The second input is read from its file after the first one's messages are gone."""
    nodes = [helper.make_node("Conv", ["x", "w"], ["a"], pads=[1, 0, 1, 0]),
             helper.make_node("Conv", ["z", "w"], ["b"], pads=[1, 0, 1, 0]), helper.make_node("Add", ["a", "b"], ["y"])]
    x = {name: random(1, 2, 9, 5) for name in "xz"}
    model = one_graph(nodes, x, {"w": random(3, 2, 3, 1)}, {"y": (TensorProto.FLOAT, None)}, 18)
    found = run_lockstep(compile_plan(model, "height=2"), x).outputs["y"]
    assert close(found, reference64(model, {k: v.astype(np.float64) for k, v in x.items()})["y"], 1e-6)


def test_ranks_over_gloo(tmp_path: Path) -> None:
    """What a process sends is what the plan foretells, and the bits are those of one process."""
    model = with_skip()
    onnx.save(model, tmp_path / "m.onnx")
    plan = pt.partition(tmp_path / "m.onnx", mesh="depth=2")
    x = inputs_of(model)
    with plan.session() as session:
        alone = session.run(x)["y"]
    with plan.session(backend="gloo") as session:
        found, report = session.run(x)["y"], session.last_run
    assert found.tobytes() == alone.tobytes() and report is not None
    assert [r.messages for r in report.ranks] == plan_cost(plan.model).messages.ravel().tolist()


def test_it_can_be_switched_off() -> None:
    source = load_model(with_skip(parts=(8, 8)))
    for joined in (True, False):
        plan = compile_source(source, Mesh.parse("depth=2"), {}, {}, steering=replace(Steering(), joined=joined))
        assert any(dialect.joined_exchange(n) for n in plan.graph if dialect.is_exchange(n)) is joined


def test_the_pass_alone_changes_no_schedule() -> None:
    plan = compile_plan(with_skip(), None, rolled="depth", thickness=2)
    before = [n.name for n in plan.graph]
    JoinExchanges().apply(plan)
    assert [n.name for n in plan.graph] == before


def test_pads_and_crops_by_nothing_are_dropped() -> None:
    """What they do at other extents, and what moves or turns cells, stays."""
    nodes = [helper.make_node("Pad", ["x", "none"], ["a"]), helper.make_node("Relu", ["a"], ["b"]),
             helper.make_node("Slice", ["b", "zero", "most", "axes"], ["c"]),
             helper.make_node("Pad", ["c", "moved"], ["d"]),
             helper.make_node("Slice", ["d", "last", "least", "axes", "back"], ["e"]),
             helper.make_node("Pad", ["e", "none"], ["y"])]
    numbers = {"none": [0] * 8, "moved": [0, 0, 1, 0, 0, 0, -1, 0], "zero": [0], "most": [1 << 40], "axes": [2],
               "last": [-1], "least": [-(1 << 40)], "back": [-1]}
    data = {"x": np.random.default_rng(0).standard_normal((1, 2, 6, 5)).astype(np.float32)}
    model = one_graph(nodes, data, {name: np.asarray(v, np.int64) for name, v in numbers.items()},
                      {"y": (TensorProto.FLOAT, None)}, 18)
    plan = compile_plan(model, "width=2")
    assert [n.op_type for n in plan.graph if not dialect.is_communication(n)] == ["Relu", "Pad", "Slice", "Pad"]
    assert np.array_equal(run_lockstep(plan, data).outputs["y"], run_ort(model, data)["y"])
