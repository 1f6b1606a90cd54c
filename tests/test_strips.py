"""Halos that ranks compute themselves, and strips that one rank takes one after the other."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

import partitioner as pt
from benchmarks.models import UNetConfig, export
from partitioner import dialect
from partitioner.budget import slab_peaks
from partitioner.compiler import DepthFirst
from partitioner.compiler import compile_plan as compile_order
from partitioner.errors import PartitionError
from partitioner.loader import load_model
from partitioner.mesh import Mesh
from partitioner.strips import Prices, values_to_recompute
from tests.builder import Style, wide
from tests.drawn import DRAWN, IN_FLOAT32
from tests.examples import one_graph
from tests.oracle import as_double, close, error, pipeline, run_lockstep
from tests.strategies import Network, extents_of, networks
from tests.test_graphs import quick, thorough


def check_deepened(network: Network) -> None:
    """On the mesh that was drawn, every halo computed twice that can be."""
    note(str(network))
    mesh = Mesh.parse(network.mesh)
    passes = pipeline(mesh, network.cuts, storage=network.storage, deepened=mesh.names)
    check(network, passes.run(load_model(as_double(network.model))))


def check_strips(network: Network, data: st.DataObject) -> None:
    """Slabs of any thickness along one axis, strips along others."""
    note(str(network))
    extents = extents_of(network.model)
    if len(extents) < 2:
        return
    name = data.draw(st.sampled_from(sorted(extents)))
    others = sorted(set(extents) - {name})
    counts = {other: data.draw(st.integers(1, min(3, extents[other]))) for other in others}
    counts = {other: count for other, count in counts.items() if count > 1}
    passes = pipeline(Mesh.parse(counts), storage=network.storage, rolled=name, thickness=data.draw(st.integers(1, 4)),
                      deepened=tuple(counts), strips=tuple(counts))
    check(network, passes.run(load_model(as_double(network.model))))


def check(network: Network, plan: ir.Model) -> None:
    inputs = {name: wide(array) for name, array in network.inputs.items()}
    found = run_lockstep(load_model(ir.to_proto(plan)), inputs).outputs
    for name, expected in network.expected.items():
        assert close(found[name], expected, 1e-12), f"{name}: error {error(found[name], expected)}"


def check_operator(name: str, steps: int, profile: settings) -> None:
    @settings(profile)
    @given(networks(Style(steps=steps, focus=name)), st.data())
    def check_all(network: Network, data: st.DataObject) -> None:
        check_deepened(network)
        check_strips(network, data)

    check_all()


@pytest.mark.parametrize("name", sorted(DRAWN - IN_FLOAT32)[::3])
def test_operators(name: str) -> None:
    check_operator(name, 4, settings(quick, max_examples=2))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(DRAWN - IN_FLOAT32))
def test_operators_thoroughly(name: str) -> None:
    check_operator(name, 5, settings(thorough, max_examples=20))


def test_what_is_exchanged_along_one_axis_is_not_deepened_along_another() -> None:
    nodes = [helper.make_node("Relu", ["x"], ["a"]), helper.make_node("ReduceMax", ["a"], ["m"], axes=[2], keepdims=0),
             helper.make_node("Conv", ["a", "w"], ["y"], pads=[1] * 6)]
    model = one_graph(nodes, {"x": np.zeros((1, 2, 5, 7, 5), np.float32)}, {"w": np.ones((2, 2, 3, 3, 3), np.float32)},
                      {"y": (TensorProto.FLOAT, (1, 2, 5, 7, 5)), "m": (TensorProto.FLOAT, (1, 2, 7, 5))}, 13)
    plan = pipeline(Mesh.parse("depth=2,width=2"), deepened=("depth", "width")).run(load_model(model))
    (exchange,) = [node for node in plan.graph if dialect.is_exchange(node)]
    assert exchange.inputs[0] is not None and dialect.get_layout(exchange.inputs[0]).is_partition


# --- under a budget ------------------------------------------------------------------------------------

SHAPE = (1, 1, 24, 96, 80)


@pytest.fixture(scope="module", params=["batch", "instance"])
def network(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    module = UNetConfig(norm=request.param, base=8, levels=2).build()
    return export(module, (1, 1, 16, 16, 16), tmp_path_factory.mktemp("strips") / f"{request.param}.onnx", dynamic=True)


def lay_out(network: Path, order: DepthFirst | None) -> ir.Model:
    plan = compile_order(load_model(network), Mesh(()), {"volume": SHAPE}, {}, order=order)
    schedule = dialect.get_schedule(plan)
    if schedule is not None:
        dialect.set_schedule(plan, replace(schedule, thickness=(4,) * len(schedule.thickness)))
    return plan


def test_strips_hold_less_and_compute_more(network: Path) -> None:
    x = {"volume": np.random.default_rng(0).standard_normal(SHAPE, dtype=np.float32)}
    whole, slabs, strips = (pt.Plan(lay_out(network, order)) for order in (
        None, DepthFirst("depth"), DepthFirst("depth", (("height", 4), ("width", 2)))))
    expected = next(iter(whole.run(x).values()))
    found = next(iter(strips.run(x).values()))
    assert np.abs(found - expected).max() <= 4e-6 * np.abs(expected).max()
    if "batch" in network.name:  # else what rests for statistics is the most of it, unless in files
        assert strips.cost.peak_together < slabs.cost.peak_together < whole.cost.peak_together
    assert strips.cost.peak.max() < slabs.cost.peak.max() < whole.cost.peak.max()
    assert strips.cost.flops.sum() > slabs.cost.flops.sum()
    assert slab_peaks(strips.model)[1] < 8 * int(strips.cost.peak.max())
    told = strips.to_dict()
    assert "strips one after the other" in strips.report() and told["schedule"]["strips"] == ["height", "width"]
    # what follows from merged statistics is done by every strip
    more = float(strips.cost.flops.sum() - slabs.cost.flops.sum())
    assert told["totals"]["flops_twice"] == pytest.approx(more, abs=0 if "batch" in network.name else 0.01 * more)
    assert slabs.to_dict()["totals"]["flops_twice"] == 0
    with pytest.raises(PartitionError, match="run it with backend lockstep"):
        strips.session(backend="gloo")


def test_the_cheaper_way_is_taken(network: Path) -> None:
    """Where resting is free strips meet wherever they can; where computing is, nowhere."""
    met = lay_out(network, DepthFirst("depth", (("height", 4),), frozenset()))
    often = values_to_recompute(met, ["height"], Prices(1.0, 0.0))
    seldom = values_to_recompute(met, ["height"], Prices(0.0, 1.0))
    assert often < seldom
    work = [float(pt.Plan(lay_out(network, DepthFirst("depth", (("height", 4),), names))).cost.flops.sum())
            for names in (frozenset[str](), often, seldom)]
    assert work[0] <= work[1] < work[2]
    assert all(dialect.get_layout(v).is_partition for v in met.graph.inputs)


def test_a_budget_below_that_of_slabs(network: Path) -> None:
    """What a refusal names as the smallest budget is enough, and strips go below what slabs need."""
    gc.collect()  # what earlier tests left must not go between the two searches: both count what the process holds
    with pytest.raises(PartitionError) as refusal:
        pt.partition(network, shapes={"volume": SHAPE}, memory="1MiB")
    size, unit = str(refusal.value).partition("at least ")[2].split(" ")[:2]
    plan = pt.partition(network, shapes={"volume": SHAPE}, memory=int((float(size) + 1) * 2**20))
    assert unit == "MiB"
    schedule = dialect.get_schedule(plan.model)
    assert schedule is not None
    x = {"volume": np.random.default_rng(1).standard_normal(SHAPE, dtype=np.float32)}
    expected = next(iter(pt.partition(network, shapes={"volume": SHAPE}).run(x).values()))
    found = next(iter(plan.run(x).values()))
    assert np.abs(found - expected).max() <= 4e-6 * np.abs(expected).max()


def test_voxels_that_are_no_numbers_count_once(network: Path, tmp_path: Path) -> None:
    x = np.random.default_rng(2).standard_normal(SHAPE, dtype=np.float32)
    x[0, 0, 5, 24, 40], x[0, 0, 6, 23, 39] = np.nan, np.inf
    np.save(tmp_path / "x.npy", x)
    plan = pt.Plan(lay_out(network, DepthFirst("depth", (("height", 4), ("width", 2)))))
    plan.save(tmp_path / "plan.onnx")
    from partitioner.cli import main

    assert main(["run", str(tmp_path / "plan.onnx"), "--input", str(tmp_path / "x.npy"), "--output",
                 str(tmp_path / "y.npy"), "--json"]) == 0
    expected = next(iter(pt.partition(network, shapes={"volume": SHAPE}).run({"volume": x}).values()))
    assert np.array_equal(np.isfinite(np.load(tmp_path / "y.npy")), np.isfinite(expected))
