"""Times of plans: sums that hold, waits only where ranks differ, more work never faster, 4096 ranks as fast as few."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
import torch

import partitioner as pt
from benchmarks.models import UNetConfig
from partitioner.api import Plan
from partitioner.budget import Budget
from partitioner.compiler import compile_plan
from partitioner.cost import plan_cost
from partitioner.dialect import Schedule, get_schedule, set_schedule
from partitioner.exporter import export_module
from partitioner.kinds import kernel_seconds, kinds_of
from partitioner.mesh import Mesh
from partitioner.ops.nodes import operator_of
from partitioner.planning import Request
from partitioner.slabs import find_rests
from partitioner.timing import PlanTime, plan_time
from tests.command import count_tensors_only

PROFILE = pt.Profile.shipped("default")


@pytest.fixture(scope="module")
def sources() -> dict:
    """A U-Net with each norm."""
    networks = {
        "batch": UNetConfig(norm="batch", down="maxpool", base=8, levels=3).build(),
        "instance": UNetConfig(norm="instance", base=8, levels=3).build(),
    }
    return {name: export_module(module, torch.zeros(1, 1, 32, 32, 32), False)[0] for name, module in networks.items()}


def timed(source, mesh: str = "single", transport: str = "lockstep", profile: pt.Profile = PROFILE,
          **options) -> PlanTime:
    model = compile_plan(source, Mesh.parse(mesh), {"volume": (1, 1, 32, 32, 32)}, {}, **options)
    return plan_time(model, plan_cost(model), profile, transport, 1)


@pytest.mark.parametrize("name", ["batch", "instance"])
def test_one_rank_only_computes(name: str, sources) -> None:
    found = timed(sources[name])
    assert found.seconds == pytest.approx(sum(float(s.compute.sum()) for s in found.steps))
    assert found.communication.sum() == found.wait.sum() == 0
    assert all((s.compute >= 0).all() for s in found.steps)
    convolutions = sum(float(s.total.sum()) for s in found.steps
                       if s.node is not None and s.node.op_type in ("Conv", "ConcatConv"))
    assert 0.4 < convolutions / found.seconds < 1


def test_one_process_adds_ranks_up_and_several_take_the_slowest(sources) -> None:
    together, apart = (timed(sources["batch"], "depth=2", transport) for transport in ("lockstep", "gloo"))
    assert together.seconds == pytest.approx(together.total.sum())
    assert apart.seconds == pytest.approx(apart.total.max())
    assert apart.seconds < together.seconds
    assert (together.wait == 0).all()
    assert (apart.communication > 0).all()


def test_ranks_wait_for_neighbours_with_more_work_and_for_nobody_else(sources) -> None:
    shapes, cuts = {"volume": (1, 1, 32, 32, 32)}, {"depth": (0, 24, 32)}
    uneven = compile_plan(sources["batch"], Mesh.parse("depth=2"), shapes, cuts)
    found = plan_time(uneven, plan_cost(uneven), PROFILE, "gloo", 1)
    even = timed(sources["batch"], "depth=2", "gloo")
    assert found.wait[1] > 5 * found.wait[0]
    assert found.seconds > even.seconds
    assert found.total[0] >= found.compute[0] + found.communication[0]


def test_depth_first_takes_turns(sources, monkeypatch: pytest.MonkeyPatch) -> None:
    count_tensors_only(monkeypatch)
    shapes = {"volume": (1, 1, 32, 32, 32)}
    whole = pt.partition(sources["batch"], shapes=shapes).cost
    budget = Budget(2 * whole.weight_bytes + int(0.7 * whole.peak.max()), arrays=False, held=0)
    model = Plan.compile(sources["batch"], Request("single", shapes, budget=budget)).model
    schedule = get_schedule(model)
    assert schedule is not None
    chains = len(schedule.thickness)
    times = []
    for thickness in (16, 4, 1):
        set_schedule(model, Schedule(schedule.axis, (thickness,) * chains))
        times.append(plan_time(model, plan_cost(model), PROFILE, "lockstep", 1).seconds)
    assert times[0] < times[1] < times[2]
    rests = find_rests(model)
    moved = {str(value.name): rest for value, rest in rests.items()}
    assert any(rest.waits for rest in moved.values())  # skips
    assert any(rest.moved == 2 for rest in moved.values())  # between 3x3x3 convolutions
    assert any(not rest.is_kept for rest in moved.values())


def test_only_what_runs_right_after_its_maker_finds_it_in_cache(sources) -> None:
    """Normalize works in place on a convolution's result, but after the statistics of all of it were merged."""
    steps = {s.node: s for s in timed(sources["instance"], "depth=2").steps if s.node is not None}
    step = PROFILE.for_threads(1).step
    seconds = {kind: [float(s.compute.min()) for n, s in steps.items() if n.op_type == kind]
               for kind in ("Normalize", "LeakyRelu")}
    assert seconds["Normalize"] and all(found > 2 * step for found in seconds["Normalize"])
    fused = [float(s.compute.max()) for s in timed(sources["batch"]).steps
             if s.node is not None and s.node.op_type == "LeakyRelu"]
    assert fused and all(found == pytest.approx(step) for found in fused)


def test_larger_volumes_and_slower_machines_never_take_less_time(sources) -> None:
    found = []
    for n in (16, 20, 24, 32, 40):
        model = compile_plan(sources["instance"], Mesh.parse("single"), {"volume": (1, 1, n, n, n)}, {})
        found.append(plan_time(model, plan_cost(model), PROFILE, "lockstep", 1).seconds)
    assert found == sorted(found)
    links = {k: replace(v, curve=None, latency=1e-3, bandwidth=1e6) for k, v in PROFILE.links.items()}
    slow = replace(PROFILE, links=links)
    assert timed(sources["batch"], "depth=2", "gloo", slow).seconds > timed(sources["batch"], "depth=2", "gloo").seconds


def test_many_ranks_cost_what_few_do(sources) -> None:
    model = compile_plan(sources["instance"], Mesh.parse("16x16x16"), {"volume": (1, 1, 256, 256, 256)}, {})
    cost = plan_cost(model)
    start = time.process_time()
    found = plan_time(model, cost, pt.Profile.shipped("h100"), "nccl")
    assert time.process_time() - start < 5
    assert found.total.shape == (16, 16, 16)
    assert np.isfinite(found.total).all()
    assert found.total[0, 0, 0] == pytest.approx(found.total[15, 15, 15], rel=0.5)


def test_unknown_transports_are_refused_at_once(sources) -> None:
    with pytest.raises(pt.PartitionError, match="knows nothing of transport 'nccl'"):
        timed(sources["batch"], "depth=2", "nccl")


def test_plans_tell_their_time(sources, tmp_path) -> None:
    plan = pt.partition(sources["batch"], mesh="depth=2", shapes={"volume": (1, 1, 32, 32, 32)})
    PROFILE.save(tmp_path / "profile.json")
    forecasts = [plan.time(p, threads=1).seconds for p in (PROFILE, "default", tmp_path / "profile.json")]
    assert len(set(forecasts)) == 1
    alone, shared = (plan.time(PROFILE, "gloo", threads).seconds for threads in (1, None))
    assert alone == shared > plan.time(PROFILE, "gloo", 2).seconds
    assert plan.time("h100", "nccl").seconds < forecasts[0]


def test_kinds_follow_operators(sources) -> None:
    model = compile_plan(sources["instance"], Mesh.parse("depth=2"), {"volume": (1, 1, 33, 33, 33)}, {})
    kinds = {n.op_type: kinds_of(operator_of(n)) for n in model.graph if n.domain == "" or n.op_type == "Moments"}
    assert kinds["Moments"] == ("moments",)
    assert kinds["LeakyRelu"] == ("pointwise",)
    assert kinds["Slice"] == ()
    apart = compile_plan(sources["instance"], Mesh.parse("depth=2"), {"volume": (1, 1, 32, 32, 32)}, {},
                         purpose="evaluation")
    assert {kinds_of(operator_of(n)) for n in apart.graph if n.op_type == "Concat"} == {("copy",)}
    whole = compile_plan(sources["instance"], Mesh.parse("single"), {"volume": (1, 1, 32, 32, 32)}, {})
    node = next(n for n in whole.graph if n.op_type == "InstanceNormalization")
    assert kinds_of(operator_of(node)) == ("moments", "affine")


@pytest.mark.parametrize("op_type", ["Conv", "ConvTranspose", "MaxPool", "LeakyRelu"])
def test_more_cells_never_take_less_time(op_type: str, sources) -> None:
    model = compile_plan(sources["batch"], Mesh.parse("single"), {"volume": (1, 1, 32, 32, 32)}, {})
    operator = operator_of(next(n for n in model.graph if n.op_type == op_type))
    cells = np.geomspace(16, 1e9, 300)
    for kernels in PROFILE.kernels:
        ins = [cells, *(None for _ in operator.inputs[1:])]
        times = kernel_seconds(kernels, operator, ins, [cells])
        assert (np.diff(times) >= -1e-12 * times[1:]).all()
        assert kernel_seconds(kernels, operator, [np.zeros(1), *ins[1:]], [np.zeros(1)]) == 0
