"""The planner: meshes, estimates that are bounds, the fastest plan within the memory, and all of its plans exact."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from onnx import helper

import partitioner as pt
from partitioner.api import Plan
from partitioner.compiler import compile_plan, prepare
from partitioner.cost import plan_cost
from partitioner.dialect import get_layout, get_schedule
from partitioner.loader import load_model
from partitioner.mesh import Mesh
from partitioner.planner.choice import Way
from partitioner.planner.cuts import aligned_cuts, extents_of, strides_of
from partitioner.planner.estimate import Estimates
from partitioner.planner.meshes import counts_of, meshes_of
from partitioner.planner.search import MOST_REFUSED, laid_out_everywhere
from partitioner.planning import Devices, Request
from partitioner.profile import Link
from partitioner.timing import plan_time
from tests.builder import Style
from tests.command import count_tensors_only, kernel, model, refused, value, volume, works
from tests.oracle import as_double, error, reference64, run_lockstep
from tests.strategies import Network, networks

CPU, GPU = pt.Profile.shipped("default"), pt.Profile.shipped("h100")


def linked(latency: float, bandwidth: float = 1e15, profile: pt.Profile = CPU) -> pt.Profile:
    """A machine on which messages over gloo take so long."""
    return replace(profile, links={**profile.links, "gloo": Link(latency, bandwidth)})


FREE, SLOW = linked(1e-15), linked(3e-3)


# --- networks ----------------------------------------------------------------------------------------


def conv(name: str, source: str, weight: str, pads: int = 1, **more: Any) -> onnx.NodeProto:
    return helper.make_node("Conv", [source, weight], [name], name=name, pads=[pads] * 6, **more)


def chain(shape: Sequence[int] = (1, 2, 24, 10, 9), count: int = 5, relu: bool = False) -> onnx.ModelProto:
    """Convolutions of width 3 in a row."""
    names = ["x", *(f"c{i}" for i in range(count))]
    nodes = [conv(b, a, "w") for a, b in itertools.pairwise(names)]
    if relu:
        nodes = [n for c in nodes for n in (c, helper.make_node("Relu", [c.output[0]], [f"{c.output[0]}r"]))]
        for node in nodes[2::2]:
            node.input[0] += "r"
    last = nodes[-1].output[0]
    return model(nodes, [value("x", shape)], [value(last, shape)], {"w": kernel(2) / 8})


def pyramid(shape: Sequence[int] = (1, 2, 24, 12, 8), deep: int = 3) -> onnx.ModelProto:
    """Two strides of 2, small convolutions, and back up to a skip."""
    half = [n // 2 for n in shape[2:]]
    assert all(n % 4 == 0 for n in shape[2:]), half
    up = {"kernel_shape": [2, 2, 2], "strides": [2, 2, 2]}
    names = ["d2", *(f"m{i}" for i in range(deep))]
    nodes = [conv("a", "x", "w"), conv("d1", "a", "w", strides=[2, 2, 2]), conv("d2", "d1", "w", strides=[2, 2, 2]),
             *(conv(after, before, "w") for before, after in itertools.pairwise(names)),
             helper.make_node("ConvTranspose", [names[-1], "u"], ["u1"], name="u1", **up),
             helper.make_node("ConvTranspose", ["u1", "u"], ["u2"], name="u2", **up),
             helper.make_node("Concat", ["a", "u2"], ["cat"], name="cat", axis=1), conv("y", "cat", "v")]
    weights = {"w": kernel(2) / 8, "v": kernel(2, 4) / 8,
               "u": np.random.default_rng(1).standard_normal((2, 2, 2, 2, 2)).astype(np.float32) / 3}
    return model(nodes, [value("x", shape)], [value("y", shape)], weights)


def halving(extent: int, levels: int = 3) -> onnx.ModelProto:
    """Convolutions of width and stride 2: shards need nothing of one another when they are cut at its multiples."""
    nodes = [conv(f"d{i}", f"d{i - 1}" if i else "x", "w", pads=0, strides=[2, 2, 2]) for i in range(levels)]
    weight = np.random.default_rng(2).standard_normal((2, 2, 2, 2, 2)).astype(np.float32) / 4
    out = [n // 2**levels for n in (extent, 32, 16)]
    return model(nodes, [value("x", (1, 2, extent, 32, 16))], [value(f"d{levels - 1}", (1, 2, *out))], {"w": weight})


def lopsided(shape: Sequence[int] = (1, 2, 32, 16, 16)) -> onnx.ModelProto:
    """Many convolutions on one end of the volume only."""
    bounds = {name: np.array([n]) for name, n in (("begin", 0), ("end", shape[2] // 2), ("axis", 2))}
    names = ["part", *(f"c{i}" for i in range(6))]
    nodes = [helper.make_node("Slice", ["x", "begin", "end", "axis"], ["part"], name="part"),
             *(conv(b, a, "w") for a, b in itertools.pairwise(names))]
    out = (*shape[:2], shape[2] // 2, *shape[3:])
    return model(nodes, [value("x", shape)], [value(names[-1], out)], {**bounds, "w": kernel(2) / 8})


MODELS = {"chain": chain, "pyramid": pyramid}


def check_exact(proto: onnx.ModelProto, **asked: Any) -> pt.Plan:
    """The plan that is chosen for a model in float64, after its result was held against the unpartitioned model's."""
    double = as_double(proto)
    plan = pt.partition(double, **asked)
    shape = [d.dim_value for d in double.graph.input[0].type.tensor_type.shape.dim]
    inputs = {"x": volume(shape, dtype=np.float64)}
    found = run_lockstep(load_model(ir.to_proto(plan.model)), inputs).outputs
    for name, expected in reference64(double, inputs).items():
        assert error(found[name], expected) < 1e-12, name
    return plan


def chosen(plan: pt.Plan) -> Way:
    assert plan.choice is not None
    return plan.choice.chosen


# --- meshes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("devices", "extents", "fixed"), [
    (1, {"batch": 1, "depth": 5}, {}), (6, {"batch": 2, "height": 3, "width": 9}, {}),
    (8, {"batch": 1, "depth": 64, "height": 4, "width": 64}, {"depth": 2}), (12, {"width": 7}, {"width": 3}),
    (64, {"batch": 3, "depth": 64, "height": 64, "width": 1}, {}),
])
def test_meshes_are_all_factorisations_within_the_extents(devices: int, extents: dict[str, int],
                                                          fixed: dict[str, int]) -> None:
    counts = set(counts_of(devices))
    ranges = [[fixed[name]] if name in fixed else range(1, min(devices, n) + 1) for name, n in extents.items()]
    wanted = {shape for shape in itertools.product(*ranges) if math.prod(shape) in counts}
    found = [tuple(mesh.count(name) for name in extents) for mesh in meshes_of(devices, extents, fixed)]
    assert len(found) == len(set(found)) and set(found) == wanted
    sizes = [math.prod(shape) for shape in found]
    assert sizes == sorted(sizes, reverse=True)


def test_few_devices_may_be_used_in_any_number_and_many_in_divisors() -> None:
    assert counts_of(7) == [7, 6, 5, 4, 3, 2, 1]
    assert counts_of(36) == [36, 18, 12, 9, 6, 4, 3, 2, 1]
    assert len(meshes_of(4096, dict.fromkeys(("batch", "depth", "height", "width"), 4096), {})) < 2000


# --- estimates ---------------------------------------------------------------------------------------


def estimates(proto: onnx.ModelProto, meshes: Sequence[Mesh], profile: pt.Profile, transport: str,
              shapes: Mapping[str, Sequence[int]] | None = None) -> list[tuple[float, float, float, float]]:
    """Per mesh the estimated and the forecast seconds, and the estimated and the forecast peak."""
    prepared = prepare(load_model(proto), shapes or {})
    found = Estimates(laid_out_everywhere(prepared.model), meshes, profile, transport)
    rows = []
    for index, mesh in enumerate(meshes):
        plan = prepared.lay_out(mesh)
        cost = plan_cost(plan)
        seconds = plan_time(plan, cost, profile, transport).seconds
        rows.append((float(found.seconds[index]), seconds, float(found.peak[index]), int(cost.peak.max(initial=0))))
    return rows


def all_meshes(proto: onnx.ModelProto, devices: int) -> list[Mesh]:
    prepared = prepare(load_model(proto), {})
    return meshes_of(devices, extents_of(laid_out_everywhere(prepared.model)), {})


def is_fine(proto: onnx.ModelProto, mesh: Mesh) -> bool:
    """Whether every shard of every value has some cells, so that what all of them do is what the largest does."""
    plan = prepare(load_model(proto), {}).lay_out(mesh)
    layouts = [get_layout(v) for v in (*plan.graph.inputs, *(v for node in plan.graph for v in node.outputs))]
    return all(split is None or (n >= 3 * mesh.count(split.mesh_axis) and min(split.extents) > 0)
               for layout in layouts for n, split in zip(layout.shape, layout.axes, strict=True))


@given(networks(Style(convolutional=True)))
@settings(deadline=None, derandomize=True, database=None, max_examples=8, suppress_health_check=list(HealthCheck),
          phases=[Phase.generate])
def test_estimates_are_never_above_what_a_plan_of_a_drawn_network_takes(network: Network) -> None:
    for transport, profile in (("gloo", CPU), ("lockstep", CPU), ("nccl", GPU)):
        meshes = [mesh for mesh in all_meshes(network.model, 4)[::2] if is_fine(network.model, mesh)]
        for mesh, row in zip(meshes, estimates(network.model, meshes, profile, transport), strict=True):
            assert row[0] <= 1.03 * row[1], f"{mesh}, {transport}: {row[0]} s estimated, {row[1]} s forecast"
            assert row[2] <= 1.001 * row[3], f"{mesh}: {row[2]} bytes estimated, {row[3]} forecast"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("transport", "profile"), [("gloo", CPU), ("lockstep", CPU), ("nccl", GPU)])
def test_estimates_are_near(name: str, transport: str, profile: pt.Profile) -> None:
    proto = MODELS[name]((1, 2, 48, 40, 32))
    for seconds, forecast, peak, most in estimates(proto, all_meshes(proto, 8)[::5], profile, transport):
        assert 0.5 * forecast <= seconds <= 1.02 * forecast
        assert 0.5 * most <= peak <= most


# --- the fastest -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("transport", "profile", "devices"), [("gloo", CPU, 4), ("gloo", SLOW, 6), ("nccl", GPU, 4)])
def test_the_chosen_mesh_is_the_fastest_of_all(name: str, transport: str, profile: pt.Profile, devices: int) -> None:
    proto = MODELS[name]()
    plan = Plan.search(load_model(proto), Request(), Devices(devices, profile, transport, steers=False))
    rows = estimates(proto, all_meshes(proto, devices), profile, transport)
    assert chosen(plan).seconds == pytest.approx(min(row[1] for row in rows), rel=1e-9)


def test_devices_that_only_cost_time_stay_unused() -> None:
    plan = pt.partition(chain(), devices=4, profile=linked(10.0), backend="gloo")
    assert plan.mesh.size == 1
    assert "3 of the 4 devices stay unused" in plan.explain()
    assert pt.partition(chain((1, 2, 96, 32, 32)), devices=4, profile=FREE, backend="gloo").mesh.size == 4


def test_every_device_is_used_where_it_has_to_be() -> None:
    devices = Devices(4, linked(10.0), "gloo", all_of_them=True)
    assert Plan.search(load_model(chain()), Request(), devices).mesh.size == 4


# --- what is decided beside the mesh -----------------------------------------------------------------


def test_deep_layers_are_computed_by_all_where_messages_cost_more() -> None:
    asked = {"devices": 2, "mesh": "depth=2", "backend": "gloo"}
    plan = check_exact(pyramid((1, 2, 48, 48, 48)), profile=SLOW, **asked)
    assert chosen(plan).form.steering.pinned and "layers on all ranks" in chosen(plan).note
    plain = chosen(check_exact(pyramid((1, 2, 96, 96, 96)), profile=FREE, **asked)).form.steering
    assert not plain.pinned and not plain.deepened


def test_halos_are_deepened_where_the_user_says_so() -> None:
    """All, or those of some values; the planner leaves it at that; names that no value has are refused."""
    proto, shape = chain((1, 2, 23, 10, 9)), (1, 2, 23, 10, 9)
    plain = pt.partition(proto, mesh="depth=2")
    names = ["c0", "c1"]
    (expected,) = plain.run({"x": volume(shape)}).values()
    for deepen in (True, names):
        plan = pt.partition(proto, mesh="depth=2", deepen=deepen)
        assert int(plan.cost.messages.sum()) < int(plain.cost.messages.sum())
        (found,) = plan.run({"x": volume(shape)}).values()
        assert np.abs(found - expected).max() <= 4e-6 * np.abs(expected).max()
    asked = {"devices": 2, "mesh": "depth=2", "backend": "gloo", "profile": FREE}
    assert chosen(pt.partition(proto, deepen=names, **asked)).form.steering.deepened == set(names)
    with pytest.raises(pt.PartitionError, match="deepened value 'nowhere': the network has no value of this name"):
        pt.partition(proto, mesh="depth=2", deepen=["nowhere"])
    with pytest.raises(pt.PartitionError, match="deepen='y' is not understood; give True, or names of values"):
        pt.partition(proto, mesh="depth=2", deepen="y")


def test_halos_are_deepened_where_messages_cost_more() -> None:
    asked = {"devices": 2, "mesh": "depth=2", "backend": "gloo"}
    proto = chain((1, 2, 32, 64, 64))
    way, plain = (chosen(pt.partition(proto, profile=profile, **asked)) for profile in (linked(1e-3), FREE))
    assert way.form.steering.deepened and "deeper halos" in way.note
    thick = pt.partition(chain((1, 2, 96, 64, 64)), profile=linked(1e-3), **asked).choice  # interiors hide as much
    assert thick is not None and not thick.chosen.form.steering.deepened
    assert any(other.form.steering.deepened and other.seconds >= thick.chosen.seconds for other in thick.others)
    assert int(way.cost.messages.sum()) < int(plain.cost.messages.sum())
    assert not plain.form.steering.deepened and not plain.form.steering.pinned
    small = load_model(as_double(chain((1, 2, 23, 10, 9))))
    inputs = {"x": volume((1, 2, 23, 10, 9), dtype=np.float64)}
    plan = compile_plan(small, way.form.mesh, {}, {}, steering=way.form.steering)
    (found,) = run_lockstep(load_model(ir.to_proto(plan)), inputs).outputs.values()
    (expected,) = reference64(as_double(chain((1, 2, 23, 10, 9))), inputs).values()
    assert error(found, expected) < 1e-12


def test_cuts_go_to_multiples_of_the_strides_where_that_saves_messages() -> None:
    asked = {"devices": 2, "mesh": "depth=2", "profile": linked(1e-3), "backend": "gloo"}
    way = chosen(check_exact(halving(40), **asked))
    assert way.form.cuts["depth"][1] % 8 == 0 and int(way.cost.messages.sum()) == 0
    even = chosen(check_exact(halving(48), **asked))  # 24 is one already
    assert not even.form.cuts and int(even.cost.messages.sum()) == 0


def test_cuts_balance_the_time() -> None:
    asked = {"devices": 2, "mesh": "depth=2", "profile": FREE, "backend": "gloo"}
    way = chosen(check_exact(lopsided((1, 2, 32, 48, 48)), **asked))
    assert way.form.cuts["depth"][1] < 16 and "balance" in way.note
    assert not chosen(check_exact(chain((1, 2, 32, 16, 16)), **asked)).form.cuts


def test_strides_and_aligned_cuts() -> None:
    seeds = laid_out_everywhere(prepare(load_model(pyramid()), {}).model)
    assert strides_of(seeds) == {"batch": 1, "depth": 4, "height": 4, "width": 4}
    extents = {"batch": 1, "depth": 24, "height": 12, "width": 8}
    assert aligned_cuts(Mesh.parse("depth=4"), extents, strides_of(seeds)) == {"depth": (0, 8, 12, 16, 24)}
    assert aligned_cuts(Mesh.parse("depth=3"), extents, strides_of(seeds)) == {}
    assert aligned_cuts(Mesh.parse("depth=7"), extents, strides_of(seeds)) == {}


@pytest.mark.parametrize("words", ["replicated", "depth", ("depth", "height")])
def test_pins_are_exact_and_stay(words: Any) -> None:
    plan = check_exact(pyramid(), devices=4, mesh="depth=2,height=2", profile=CPU, backend="gloo",
                       pinned={"m1": words, "u1": words})
    pinned = chosen(plan).form.steering.pinned
    wanted = ("batch", "depth", "height", "width") if words == "replicated" else tuple(np.atleast_1d(words))
    assert pinned["m1"] == pinned["u1"] == wanted


def test_what_the_user_decides_stays() -> None:
    cuts = {"depth": (0, 5, 24)}
    plan = check_exact(pyramid(), devices=8, mesh="depth=2", cuts=cuts, profile=SLOW, backend="gloo")
    assert plan.mesh == Mesh.parse("depth=2") and chosen(plan).form.cuts == cuts
    assert plan.choice is not None and plan.choice.meshes == 1
    free = check_exact(pyramid(), devices=4, cuts=cuts, profile=FREE, backend="gloo")
    assert free.mesh.count("depth") == 2 and chosen(free).form.cuts["depth"] == (0, 5, 24)
    with pytest.raises(pt.PartitionError, match=r"has 4 ranks, more than the 2 devices"):
        pt.partition(pyramid(), devices=2, mesh="2x2x1")
    with pytest.raises(pt.PartitionError, match=r"no mesh of 2 devices has what is asked for \(depth=3\)"):
        pt.partition(pyramid(), devices=2, cuts={"depth": (0, 5, 10, 24)})


# --- memory ------------------------------------------------------------------------------------------


def test_memory_leads_to_slabs_or_to_a_refusal_with_the_least(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("partitioner.planning.held_on", lambda profile: 0)
    count_tensors_only(monkeypatch)
    proto = chain((1, 2, 64, 12, 12), 3)
    asked = {"devices": 2, "profile": CPU, "backend": "gloo"}
    plenty = chosen(pt.partition(proto, **asked))
    assert get_schedule(plenty.model) is None
    plan = pt.partition(proto, memory=plenty.needed // 3, **asked)
    assert get_schedule(plan.model) is not None and "slab by slab" in chosen(plan).note
    assert chosen(plan).needed <= plenty.needed // 3
    told = r"memory 1024 bytes for each of 2 devices is too little: depth=2 needs [\d.]+ \w+"
    with pytest.raises(pt.PartitionError, match=told):
        pt.partition(proto, memory="1KiB", mesh="depth=2", **asked)


# --- how much is looked at ---------------------------------------------------------------------------


@pytest.mark.parametrize(("devices", "count", "steers"), [
    (64, 20, False), (4096, 20, False), *(pytest.param(devices, 200, steers, marks=pytest.mark.slow)
                                          for devices in (64, 4096) for steers in (False, True))])
def test_few_plans_are_laid_out_however_many_meshes_there_are(devices: int, count: int, steers: bool) -> None:
    """Of up to 400 nodes: by number, for clocks are not to be trusted."""
    looked: list[tuple[int, int, str]] = []
    proto = chain((1, 2, 256, 256, 256), count, relu=True)
    Plan.search(load_model(proto), Request(), Devices(devices, GPU, "nccl", steers=steers),
                progress=lambda done, count, what: looked.append((done, count, what)))
    assert len(looked) <= (12 + 2 * 16 if steers else 12)
    assert [done for done, _, _ in looked] == list(range(1, len(looked) + 1))
    assert all(done <= count for done, count, _ in looked)


def test_a_memory_that_nothing_keeps_to_is_told_after_few_meshes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("partitioner.planning.held_on", lambda profile: 0)
    looked: list[str] = []
    told = r"memory 16 bytes for each of 64 devices is too little: .* needs [\d.]+ \w+"
    with pytest.raises(pt.PartitionError, match=told):
        Plan.search(load_model(chain((1, 2, 8, 8, 4), 1)), Request(), Devices(64, GPU, "nccl", 16),
                    progress=lambda *told: looked.append(told[2]))
    assert len(looked) <= MOST_REFUSED * 12


# --- the command -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with fixed extents."""
    path = tmp_path_factory.mktemp("planner") / "net.onnx"
    onnx.save(pyramid(), path)
    return path


def test_the_command_tells_ways_and_why(file: Path) -> None:
    told = works("plan", file, "--devices", "4", "--profile", "default")
    assert "ways looked at, fastest first" in told and "> " in told
    assert "For 4 devices, with the estimated figures of profile 'default' and messages over gloo:" in " ".join(
        told.split())


def test_a_node_is_explained(file: Path) -> None:
    told = works("plan", file, "--devices", "4", "--mesh", "depth=2", "--profile", "h100", "--explain", "m1")
    assert told.startswith("m1 (Conv): m1 [") and "in depth=2" in told
    assert "halo" in told or "gather" in told or "all ranks" in told
    said = refused("plan", file, "--devices", "2", "--explain", "nothing")
    assert "explain 'nothing': the plan has no such node; it has " in said
    assert "was not chosen among others" in refused("plan", file, "--mesh", "depth=2", "--explain", "m1")


def test_json_has_the_explanation(file: Path) -> None:
    told = json.loads(works("plan", file, "--devices", "2", "--mesh", "depth=2", "--explain", "y", "--json"))
    assert told["explained"][0].startswith("y (Conv)")
    assert "explained" not in json.loads(works("plan", file, "--devices", "2", "--json"))


@pytest.mark.parametrize(("words", "said"), [
    (("--devices", "0"), "--devices"),
    (("--devices", "-3"), "--devices"),
    (("--devices", "two"), "--devices"),
    (("--devices", str(1 << 30)), "give a whole number from 1 to"),
    (("--profile", "h100"), "--profile is for choosing a mesh"),
    (("--devices", "2", "--profile", "nowhere.json"), "nowhere.json: cannot be read"),
    (("--devices", "2", "--backend", "pigeons"), "knows nothing of transport 'pigeons'; it has"),
    (("--devices", "2", "--pin", "m1"), "--pin m1: name the node"),
    (("--devices", "2", "--pin", "m1=somewhere"), "'somewhere' is not understood"),
    (("--devices", "2", "--pin", "nothing=replicated"), "nothing"),
    (("--devices", "2", "--memory", "much"), "is no amount of memory"),
    (("--devices", "2", "--memory", "2GiB", "--host-memory", "1GiB"), "host_memory is for one process"),
    (("--devices", "2", "--mesh", "depth=3"), "more than the 2 devices"),
])
def test_what_is_not_understood_is_refused_in_a_line(words: tuple[str, ...], said: str, file: Path) -> None:
    told = refused("plan", file, *words)
    assert said in told and len(told.splitlines()) == 1


def test_a_plan_file_is_no_model_to_choose_for(file: Path, tmp_path: Path) -> None:
    works("compile", file, "--devices", "2", "--mesh", "depth=2", "-o", tmp_path / "net.plan.onnx")
    for words in (("--devices", "2"), ("--profile", "h100"), ("--pin", "m1=replicated")):
        told = refused("plan", tmp_path / "net.plan.onnx", *words)
        assert f"is a plan, with which {words[0]} comes too late" in told
    with pytest.raises(pt.PartitionError, match="the model is a plan already"):
        pt.partition(str(tmp_path / "net.plan.onnx"), devices=2)


def test_words_of_the_search_need_devices() -> None:
    for word, given_ in (("profile", "h100"), ("backend", "gloo")):
        with pytest.raises(pt.PartitionError, match=f"{word} is for choosing a mesh"):
            pt.partition(chain(), **{word: given_})  # type: ignore[arg-type]
    for count in (0, -1, True, 1.5, "2"):
        with pytest.raises(pt.PartitionError, match="give a whole number from 1"):
            pt.partition(chain(), devices=count)  # type: ignore[arg-type]
    with pytest.raises(pt.PartitionError, match="was not chosen among others"):
        pt.partition(chain()).explain()
