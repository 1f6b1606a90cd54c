"""Interior before boundary: the same results, bytes and messages while halos travel, nothing where there are none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, note, settings
from onnx import TensorProto, helper

import partitioner as pt
from partitioner import dialect, interior
from partitioner.cost import plan_cost
from partitioner.geometry import Interval, Pieces, span
from partitioner.interior import can_overlap, find_overlaps
from partitioner.layout import AxisLayout
from partitioner.lifetime import find_lifetimes
from partitioner.loader import load_model
from partitioner.maps import AxisMap, Window
from partitioner.mesh import Mesh
from partitioner.profile import Link
from partitioner.timing import plan_time
from passes.checks import OVERLAPS
from passes.overlap_halos import OverlapHalos
from passes.pipeline import Pipeline
from runtime.executor import Executor, make_shards
from runtime.feeds import ArrayDrain, ArrayFeed
from runtime.forecast import forecast
from runtime.program import Compute, Exchange, Finish, Post, Program, localise
from runtime.transports.lockstep import Lockstep
from tests.builder import Style, wide
from tests.drawn import DRAWN, IN_FLOAT32
from tests.examples import one_graph
from tests.oracle import Array, as_double, close, error, pipeline, run_lockstep
from tests.strategies import Network, networks
from tests.test_graphs import quick, thorough


def lay_out(model: onnx.ModelProto, mesh: str, names: Sequence[str] | None = None, **options) -> ir.Model:
    """The plan of a model, overlapped wherever it can be (or at some exchanges), as its file has it."""
    *passes, join = pipeline(Mesh.parse(mesh), **options).passes
    return load_model(ir.to_proto(Pipeline((*passes, OverlapHalos(names), join)).run(load_model(model))))


def check(network: Network) -> bool:
    """Equal to the reference to 1e-12; whether anything overlapped.  run_lockstep counts bytes and messages."""
    note(str(network))
    inputs = {name: wide(array) for name, array in network.inputs.items()}
    plan = lay_out(as_double(network.model), network.mesh, cuts=network.cuts, storage=network.storage)
    found = run_lockstep(plan, inputs).outputs
    for name, expected in network.expected.items():
        assert close(found[name], expected, 1e-12), f"{name}: error {error(found[name], expected)}"
    return bool(find_overlaps(plan))


def check_all(style: Style, profile: settings, least: float) -> None:
    fired: list[bool] = []

    @settings(profile)
    @given(networks(style))
    def check_one(network: Network) -> None:
        fired.append(check(network))

    check_one()
    assert sum(fired) >= least * len(fired), f"{sum(fired)} of {len(fired)} networks overlap"


def test_convolutional_networks() -> None:
    check_all(Style(convolutional=True), settings(quick, max_examples=60), 0.3)


def test_graphs() -> None:
    check_all(Style(), settings(quick, max_examples=60), 0.1)


@pytest.mark.parametrize("name", sorted(DRAWN - IN_FLOAT32)[::4])
def test_operators(name: str) -> None:
    check_all(Style(steps=4, focus=name), settings(quick, max_examples=3), 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(DRAWN - IN_FLOAT32))
def test_operators_thoroughly(name: str) -> None:
    check_all(Style(steps=5, focus=name), settings(thorough, max_examples=20), 0)


# --- a network to look into ----------------------------------------------------------------------------

SHAPE = (1, 2, 13, 11, 9)


def random(*shape: int) -> Array:
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)


def volume(shape: Sequence[int] = SHAPE) -> dict[str, Array]:
    return {"x": random(*shape)}


def chain(shape: Sequence[int] = SHAPE) -> onnx.ModelProto:
    """A value that a convolution and a pooling read, and a transposed convolution."""
    nodes = [helper.make_node("Conv", ["x", "w"], ["a"], pads=[1] * 6),
             helper.make_node("Relu", ["a"], ["b"]),
             helper.make_node("Conv", ["b", "u"], ["c"], pads=[1] * 6, strides=[2] * 3),
             helper.make_node("MaxPool", ["b"], ["d"], kernel_shape=[3] * 3, strides=[2] * 3, pads=[1] * 6),
             helper.make_node("Add", ["c", "d"], ["e"]),
             helper.make_node("ConvTranspose", ["e", "v"], ["y"], strides=[2] * 3, pads=[1] * 6)]
    weights = {"w": random(3, 2, 3, 3, 3), "u": random(3, 3, 3, 3, 3), "v": random(3, 2, 3, 3, 3)}
    return one_graph(nodes, volume(shape), weights, {"y": (TensorProto.FLOAT, None)}, 18)


def three_convolutions() -> onnx.ModelProto:
    """Both ranks send before each: whichever begins later, the other waits for every message of its own."""
    nodes = [helper.make_node("Conv", [a, "w"], [b], pads=[1] * 6) for a, b in (("x", "a"), ("a", "b"), ("b", "y"))]
    return one_graph(nodes, volume(SHAPE), {"w": random(2, 2, 3, 3, 3)}, {"y": (TensorProto.FLOAT, None)}, 18)


def programs(plan: ir.Model) -> list[Program]:
    return [localise(plan, rank) for rank in dialect.get_mesh(plan)]


MESHES = ("depth=2", "height=3", "depth=3,width=2", "depth=2,height=2,width=2")


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("storage", ["channels_last", "channels_first"])
def test_bytes_and_messages_stay(mesh: str, storage: str) -> None:
    model = as_double(chain())
    x = {"x": wide(volume()["x"])}
    plain = pipeline(Mesh.parse(mesh), storage=storage).run(load_model(model))
    plan = lay_out(model, mesh, storage=storage)
    expected, found = (run_lockstep(p, x) for p in (plain, plan))
    assert close(found.outputs["y"], expected.outputs["y"], 1e-14)
    assert (found.sent == expected.sent).all() and (found.messages == expected.messages).all()
    assert len(find_overlaps(plan)) == 3


def test_steps_are_the_same_on_all_ranks_and_cover_everything_once() -> None:
    """Post, interior, finish, boundary; at most two slabs per split axis; every cell in one of them."""
    plan = lay_out(chain(), "depth=3,height=2")
    found = programs(plan)
    kinds = [[(type(step.action), step.action.name) for step in program.steps] for program in found]
    assert all(kind == kinds[0] for kind in kinds)
    for overlap in find_overlaps(plan).values():
        assert 2 <= len(overlap.parts) <= 5
        for program in found:
            steps = [s.action for s in program.steps if s.action.name == overlap.node.name]
            layout = dialect.get_layout(overlap.node.outputs[0])
            counts = np.zeros(layout.shape, int)
            for step in steps:
                assert isinstance(step, Compute)
                for axes in [step.writes[0].box]:
                    counts[tuple(slice(i.start, i.stop) for i in axes.intervals())] += bool(axes)
            own = np.zeros(layout.shape, int)
            own[tuple(slice(i.start, i.stop) for i in layout.box(dialect.get_mesh(plan).coordinates(program.rank))
                      .intervals())] = 1
            assert np.array_equal(counts, own)


def test_messages_are_posted_before_the_interior_and_finished_after_it() -> None:
    program = programs(lay_out(chain(), "depth=2"))[0]
    actions = [step.action for step in program.steps]
    posts = [i for i, action in enumerate(actions) if isinstance(action, Post)]
    assert len(posts) == 3 and not any(isinstance(action, Exchange) for action in actions)
    for index in posts:
        post, compute, finish, *_ = actions[index:]
        assert isinstance(compute, Compute) and isinstance(finish, Finish) and finish.name == post.name


def test_an_interior_that_is_too_large_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lock-step copies as late as messages can come: what was read before is NaN."""
    def everything(parts: tuple[Pieces, ...], axis_map: AxisMap, owned: AxisLayout) -> tuple[Pieces, ...]:
        return parts

    monkeypatch.setattr(interior, "_interiors", everything)
    assert np.isnan(run_lockstep(lay_out(chain(), "depth=2"), volume()).outputs["y"]).any()


def test_only_named_exchanges_overlap() -> None:
    every = [e.name for o in can_overlap(lay_out(chain(), "depth=2")) for e in o.exchanges]
    plan = lay_out(chain(), "depth=2", every[1:2])
    assert [e.name for o in find_overlaps(plan).values() for e in o.exchanges] == every[1:2]
    actions = [step.action for step in programs(plan)[1].steps]
    assert sum(isinstance(a, Exchange) for a in actions) == 2 and sum(isinstance(a, Post) for a in actions) == 1
    assert close(run_lockstep(plan, volume()).outputs["y"], run_lockstep(lay_out(chain(), "depth=2", ()), volume())
                 .outputs["y"], 1e-6)


def test_two_exchanges_that_one_node_waits_for() -> None:
    """MaxUnpool reads values and indices across the cut."""
    nodes = [helper.make_node("MaxPool", ["x"], ["p", "i"], kernel_shape=[2], strides=[2]),
             helper.make_node("MaxUnpool", ["p", "i"], ["y"], kernel_shape=[2], strides=[2])]
    x = {"x": random(1, 2, 22)}
    model = one_graph(nodes, x, {}, {"y": (TensorProto.FLOAT, None)}, 18)
    plain = pipeline(Mesh.parse("width=3"), {"width": (0, 5, 13, 22)}).run(load_model(model))
    plan = lay_out(model, "width=3", cuts={"width": (0, 5, 13, 22)})
    assert np.array_equal(run_lockstep(plan, x).outputs["y"], run_lockstep(plain, x).outputs["y"])


# --- where it must not fire ----------------------------------------------------------------------------


@pytest.mark.parametrize(("nodes", "mesh"), [
    ([helper.make_node("Conv", ["x", "k"], ["y"])], "depth=2"),
    ([helper.make_node("Conv", ["x", "w"], ["y"], pads=[1] * 6)], "single"),
    ([helper.make_node("Slice", ["x", "from", "to", "axes"], ["y"])], "depth=2"),
    ([helper.make_node("InstanceNormalization", ["x", "s", "s"], ["y"])], "depth=2"),
    ([helper.make_node("Softmax", ["x"], ["y"], axis=2)], "depth=2"),
])
def test_without_a_halo_or_an_interior_nothing_is_marked(nodes: list[onnx.NodeProto], mesh: str) -> None:
    weights = {"k": random(3, 2, 1, 1, 1), "w": random(3, 2, 3, 3, 3), "s": random(2),
               "from": np.array([2]), "to": np.array([11]), "axes": np.array([2])}
    used = {name: array for name, array in weights.items() if any(name in node.input for node in nodes)}
    model = one_graph(nodes, volume(), used, {"y": (TensorProto.FLOAT, None)}, 18)
    plan = lay_out(model, mesh)
    assert not any(map(dialect.is_overlapped, plan.graph)) and not find_overlaps(plan)
    assert not any(isinstance(step.action, Post) for program in programs(plan) for step in program.steps)


def test_a_shard_narrower_than_its_halo_has_no_interior() -> None:
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"], pads=[4, 4])]
    x = {"x": random(1, 1, 8)}
    model = one_graph(nodes, x, {"w": random(1, 1, 9)}, {"y": (TensorProto.FLOAT, None)}, 18)
    assert not find_overlaps(lay_out(model, "width=4"))
    some = lay_out(model, "width=2", cuts={"width": (0, 7, 8)})
    (overlap,) = find_overlaps(some).values()
    assert [str(part) for part in overlap.parts] == ["[1, 1, width(0|3|3)]", "[1, 1, width(- 7:8)]",
                                                     "[1, 1, width(3:7 -)]"]
    assert close(run_lockstep(some, x).outputs["y"], run_lockstep(lay_out(model, "single"), x).outputs["y"], 1e-6)


def test_depth_first_and_training_take_whole_steps() -> None:
    rolled = lay_out(chain(), "height=2", rolled="depth", thickness=2)
    assert not any(map(dialect.is_overlapped, rolled.graph))
    marked = pipeline(Mesh.parse("height=2"), rolled="depth", thickness=2).run(load_model(chain()))
    for node in marked.graph:
        dialect.set_overlapped(node, dialect.is_exchange(node))
    assert not list(OVERLAPS.problems(marked))
    assert close(run_lockstep(marked, volume()).outputs["y"], run_lockstep(rolled, volume()).outputs["y"], 1e-6)
    plan = lay_out(chain(), "depth=2")
    steps = localise(plan, 0, overlaps=False).steps
    assert len([s for s in steps if isinstance(s.action, Exchange)]) == 3
    assert not any(isinstance(s.action, Post | Finish) for s in steps)


def test_a_mark_that_does_not_fit_is_found() -> None:
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"], pads=[4, 4])]
    model = one_graph(nodes, {"x": random(1, 1, 8)}, {"w": random(1, 1, 9)}, {"y": (TensorProto.FLOAT, None)}, 18)
    plan = lay_out(model, "width=4")
    assert not list(OVERLAPS.problems(plan))
    (exchange,) = filter(dialect.is_exchange, plan.graph)
    dialect.set_overlapped(exchange, True)
    (problem,) = OVERLAPS.problems(plan)
    assert problem.startswith(str(exchange.name))
    dialect.set_overlapped(exchange, False)
    assert not list(OVERLAPS.problems(plan))


# --- interiors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("owned", "part", "inner"), [
    (span(0, 6), span(0, 6), span(0, 5)),
    (span(6, 12), span(6, 12), span(7, 12)),
    (span(4, 8), span(4, 8), span(5, 7)),
    (span(4, 5), span(4, 5), ()),
    ((), (), ()),
    (span(0, 12), span(4, 8), span(4, 8)),
    ((Interval(0, 3), Interval(5, 10)), span(0, 10), span(6, 9)),
])
def test_interiors_are_the_longest_run(owned: Pieces, part: Pieces, inner: Pieces) -> None:
    window = Window(n_in=12, n_out=12, kernel=3, stride=1, dilation=1, lo=1)
    assert interior._interior(part, window, owned) == inner


# --- memory and steps ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", MESHES)
def test_the_forecast_counts_what_is_under_way(mesh: str) -> None:
    plain, plan = (lay_out(chain(), mesh, names) for names in ((), None))
    for model in (plain, plan):
        found = [forecast([program]).peak for program in programs(model)]
        assert found == plan_cost(model).peak.ravel().tolist()
    cost = {step.node.name: step for step in plan_cost(plan).steps}
    whole = {step.node.name: step for step in plan_cost(plain).steps}
    for overlap in find_overlaps(plan).values():
        name = str(overlap.node.name)
        messages = sum(cost[e.name].sent + cost[e.name].received for e in overlap.exchanges)
        assert (cost[name].live >= whole[name].live - whole[name].workspace + messages).all()
        assert (cost[name].flops == whole[name].flops).all()


def test_what_is_sent_stays_until_it_has_arrived() -> None:
    """An exchange that does not share its buffer: the value before it is released after the node that overlaps."""
    nodes = [helper.make_node("Conv", ["x", "w"], ["a"], pads=[1] * 2),
             helper.make_node("Slice", ["a", "from", "to", "axes"], ["s"]),
             helper.make_node("Conv", ["s", "v"], ["y"], pads=[2, 2])]
    constants = {"w": random(1, 1, 3), "v": random(1, 1, 5), "from": np.array([3]), "to": np.array([19]),
                 "axes": np.array([2])}
    x = {"x": random(1, 1, 22)}
    model = one_graph(nodes, x, constants, {"y": (TensorProto.FLOAT, None)}, 18)
    plan = lay_out(model, "width=2")
    position = {node: index for index, node in enumerate(plan.graph)}
    lifetimes = find_lifetimes(plan)
    assert lifetimes.overlaps
    for overlap in lifetimes.overlaps.values():
        for exchange in overlap.exchanges:
            source = lifetimes.buffers[lifetimes.buffer_of[str(exchange.inputs[0].name)]]
            assert source.dies >= position[overlap.node]
    assert close(run_lockstep(plan, x).outputs["y"], run_lockstep(lay_out(model, "single"), x).outputs["y"], 1e-6)


def test_a_run_is_never_saved_while_messages_are_under_way() -> None:
    plan = lay_out(chain(), "depth=2")
    found = programs(plan)
    shards = make_shards(found, [torch.device("cpu")] * 2)
    seen: list[int] = []
    executor = Executor(shards, Lockstep(2))
    result = torch.empty(dialect.shape_of(plan.graph.outputs[0]))
    executor.run(ArrayFeed(volume()), ArrayDrain({"y": result}), after=seen.append)
    flying = 0
    for index, step in enumerate(found[0].steps[:-1], 1):
        flying += isinstance(step.action, Post) - isinstance(step.action, Finish)
        assert (index in seen) == (flying == 0)
    assert not executor.under_way


# --- plan files, text, time ---------------------------------------------------------------------------


def test_the_mark_is_in_the_file_and_in_its_seal(tmp_path: Path) -> None:
    plan = pt.partition(chain(), mesh="depth=2", overlap=True)
    plan.save(tmp_path / "plan.onnx")
    again = pt.load(tmp_path / "plan.onnx")
    assert plan.to_text() == again.to_text() and plan.to_text().count("overlapped") == 3
    assert len(find_overlaps(again.model)) == 3
    assert np.array_equal(plan.run(volume())["y"], again.run(volume())["y"])
    onnx.checker.check_model(str(tmp_path / "plan.onnx"), full_check=True)
    altered = onnx.load(tmp_path / "plan.onnx")
    for node in altered.graph.node:
        for entry in [e for e in node.metadata_props if e.key == "partitioner.overlapped"]:
            node.metadata_props.remove(entry)
    onnx.save(altered, tmp_path / "altered.onnx")
    with pytest.raises(pt.PartitionError, match="not as it was written"):
        pt.load(tmp_path / "altered.onnx")


def test_other_shapes_overlap_too() -> None:
    plan = pt.partition(chain(), mesh="depth=2", overlap=True)
    assert "overlapped" not in pt.partition(chain(), mesh="depth=2").to_text()
    assert "overlapped" in plan.report() and plan.to_dict()["nodes"][0]["overlapped"] is True
    expanded = ir.to_proto(plan.expand())
    assert not any(e.key == "partitioner.overlapped" for node in expanded.graph.node for e in node.metadata_props)
    for wrong in ("all", 3, [1]):
        with pytest.raises(pt.PartitionError, match="overlap="):
            pt.partition(chain(), mesh="depth=2", overlap=wrong)


LARGE = (1, 2, 64, 48, 48)


@pytest.mark.parametrize("latency", [0.0, 0.002, 0.05])
def test_time_hides_what_the_interior_covers(latency: float) -> None:
    profile, link = pt.Profile.shipped("default"), Link(latency, 1e12)
    plain, plan = (lay_out(chain(LARGE), "depth=2", names) for names in ((), None))
    before, after = (plan_time(p, plan_cost(p), profile, "gloo", 1, link) for p in (plain, plan))
    assert [s.name for s in before.steps] == [s.name for s in after.steps]
    assert (after.communication <= before.communication).all()
    assert after.compute.min() > before.compute.max()  # more calls
    hidden = float((before.communication - after.communication).max())
    if latency:
        assert hidden > 0.5 * min(latency, 1e-4)
    else:  # what messages take of the cores that compute; where no core has to do it, it is hidden
        assert hidden == pytest.approx(0.0, abs=1e-9)
        apart = replace(profile, links={**profile.links, "gloo": Link(1e-4, 1e9)})
        times = [plan_time(p, plan_cost(p), apart, "gloo", 1).communication for p in (plain, plan)]
        assert (times[1] < times[0]).all()
    assert hidden <= float(after.compute.max())
    if latency == 0.002:
        assert after.seconds < before.seconds
    here = [plan_time(p, plan_cost(p), profile, "lockstep", 1).communication.sum() for p in (plain, plan)]
    assert here[0] == pytest.approx(here[1])  # one process hides nothing


# --- processes ----------------------------------------------------------------------------------------


def test_between_processes() -> None:
    """Lock-step's bits, the forecast's bytes and messages, and over a slow link no message before its time."""
    plain, plan = (pt.partition(chain(), mesh="depth=2", overlap=overlap) for overlap in (False, True))
    expected = plan.run(volume())["y"]
    with plan.session("gloo", threads=1) as session:
        for _ in range(3):
            assert np.array_equal(session.run(volume())["y"], expected)
            assert session.last_run is not None
            assert [r.sent_bytes for r in session.last_run.ranks] == plain.cost.sent.tolist()
            assert [r.messages for r in session.last_run.ranks] == plain.cost.messages.tolist()
    link, both_ways = Link(0.1, 1e6), three_convolutions()
    expected = pt.partition(both_ways).run(volume())["y"]
    for overlap in (False, True):
        chosen = pt.partition(both_ways, mesh="depth=2", overlap=overlap)
        with chosen.session("gloo", threads=1, link=link) as session:
            found = session.run(volume())["y"]
            assert close(found, expected, 1e-6)
            assert session.last_run is not None
            assert [r.messages for r in session.last_run.ranks] == chosen.cost.messages.tolist()
            assert [r.sent_bytes for r in session.last_run.ranks] == chosen.cost.sent.tolist()
            assert max(r.seconds for r in session.last_run.ranks) >= 3 * 0.1 + float(chosen.cost.sent.min()) / 1e6


@pytest.mark.parametrize(("link", "backend", "said"), [
    (Link(0.1, 1e6), "lockstep", "for backend gloo"),
    (Link(-1.0, 1e6), "gloo", "impossible"),
    (Link(0.1, 0.0), "gloo", "impossible"),
    (0.1, "gloo", "pt.Link"),
])
def test_links_that_cannot_be_emulated(link: object, backend: str, said: str) -> None:
    with pytest.raises(pt.PartitionError, match=said):
        pt.partition(chain(), mesh="depth=2").session(backend, link=link)  # type: ignore[arg-type]
