"""The planner for training: time and memory of a step, checkpoints where the memory asks for them, exact gradients."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import nn

import partitioner as pt
from partitioner.compiler import prepare
from partitioner.cost import plan_cost
from partitioner.loader import load_model
from partitioner.mesh import Mesh
from partitioner.planner.choice import TrainingStep
from partitioner.planner.estimate import Estimates
from partitioner.planner.search import laid_out_everywhere
from partitioner.timing import plan_time
from partitioner.training_cost import training_cost
from partitioner.training_time import training_time
from tests.command import refused, works
from tests.oracle import as_double
from tests.test_planner import CPU, all_meshes, is_fine, pyramid

SHAPE = (1, 2, 24, 12, 8)


def step_of(plan: pt.Plan) -> TrainingStep:
    assert plan.choice is not None and plan.choice.chosen.step is not None
    return plan.choice.chosen.step


def normed() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(part for a, b in ((1, 6), (6, 6), (6, 6), (6, 2)) for part in (
        nn.Conv3d(a, b, 3, padding=1), nn.BatchNorm3d(b), nn.LeakyReLU(0.1))))


@pytest.mark.parametrize("transport", ["gloo", "lockstep"])
def test_estimates_are_never_above_what_a_step_takes(transport: str) -> None:
    proto = pyramid((1, 2, 48, 40, 32))
    prepared = prepare(load_model(proto), {}, purpose="training")
    seeds = laid_out_everywhere(prepared.model)
    meshes = [mesh for mesh in all_meshes(proto, 4) if is_fine(proto, mesh)]
    assert len(meshes) > 4
    estimates = Estimates(seeds, meshes, CPU, transport, None, training=True)
    for mesh, seconds, peak in zip(meshes, estimates.seconds, estimates.peak, strict=True):
        model = prepared.lay_out(mesh)
        cost = training_cost(model)
        found = training_time(plan_time(model, plan_cost(model), CPU, transport), cost, CPU)
        assert 0.5 * found.seconds <= seconds <= 1.02 * found.seconds, mesh
        assert peak <= cost.peak.max(), mesh


def test_the_chosen_mesh_takes_least_for_a_step() -> None:
    plan = pt.partition(pyramid(SHAPE), devices=4, train=True, profile=CPU, backend="gloo")
    least = min(pt.partition(pyramid(SHAPE), mesh=mesh).training_time(CPU, "gloo").seconds
                for mesh in all_meshes(pyramid(SHAPE), 4))
    assert step_of(plan).time.seconds <= least * (1 + 1e-9)
    assert plan.training_time(CPU, "gloo").seconds == pytest.approx(step_of(plan).time.seconds)
    assert plan.training_cost().total.max() == step_of(plan).cost.total.max()


def test_little_memory_leads_to_checkpoints_and_less_to_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("partitioner.planning.held_on", lambda _: 0)
    volume = torch.zeros(1, 1, 24, 16, 16)

    def chosen(memory: int | None) -> pt.Plan:
        return pt.partition(normed(), volume, devices=2, mesh="depth=2", train="momentum", memory=memory, profile=CPU)

    ample = chosen(None)
    plain, frugal = (int(ample.training_cost(again, "momentum").total.max()) for again in (False, True))
    assert frugal < plain and not step_of(ample).checkpoint
    tight = chosen((frugal + plain) // 2)
    assert step_of(tight).checkpoint and "activations computed again" in tight.explain()
    with pytest.raises(pt.PartitionError, match=r"depth=2 needs .* per device; give more memory, or more devices"):
        chosen(frugal // 2)


def test_the_module_of_a_tight_plan_computes_activations_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("partitioner.planning.held_on", lambda _: 0)
    volume = torch.randn(1, 1, 24, 16, 16)
    plain = pt.partition(normed(), volume, mesh="depth=2", train=True)
    frugal = int(plain.training_cost(True).total.max())
    plan = pt.partition(normed(), volume, devices=2, mesh="depth=2", train=True, memory=int(1.05 * frugal), profile=CPU)
    assert step_of(plan).checkpoint
    kept: list[int] = []
    for module in (plain.module(), plan.module(), plan.module(checkpoint=False)):
        sizes: dict[int, int] = {}

        def keep(tensor: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            module(volume)
        kept.append(sum(sizes.values()))
    assert kept[1] < 0.8 * kept[0] and kept[2] == kept[0]


@pytest.mark.parametrize("words", ["replicated", "depth"])
def test_pinned_layers_train_as_all_others_do(words: str) -> None:
    double = as_double(pyramid(SHAPE))
    volume = torch.from_numpy(np.random.default_rng(3).standard_normal(SHAPE))

    def gradients(plan: pt.Plan) -> dict[str, torch.Tensor]:
        module = plan.module()
        module(volume).square().mean().backward()
        return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}

    expected = gradients(pt.partition(double))
    plan = pt.partition(double, mesh="depth=2,height=2", pinned={"m0": words, "m1": words, "m2": words})
    for name, gradient in gradients(plan).items():
        assert (gradient - expected[name]).abs().max() <= 1e-12 * expected[name].abs().max(), name
    free = pt.partition(double, mesh="depth=2,height=2")
    assert plan.training_cost().messages.sum() != free.training_cost().messages.sum()


def test_optimisers_are_known_or_refused() -> None:
    with pytest.raises(pt.PartitionError, match="optimiser 'lion' is unknown; use none, sgd, momentum, adam"):
        pt.partition(pyramid(SHAPE), devices=2, train="lion")
    with pytest.raises(pt.PartitionError, match="optimiser 'lion' is unknown"):
        pt.partition(normed(), torch.zeros(1, 1, 8, 8, 8), train="lion")  # also where no mesh is chosen
    with pytest.raises(pt.PartitionError, match="a model in a file trains as it is"):
        pt.partition(pyramid(SHAPE), train=True)


def test_the_report_has_the_figures_of_cost_and_time() -> None:
    plan = pt.partition(pyramid(SHAPE), mesh="depth=2")
    report = plan.training_report("momentum", CPU, "gloo")
    for checkpoint, row in zip((False, True), report.rows, strict=True):
        cost = plan.training_cost(checkpoint, "momentum")
        assert (row.checkpoint, row.total_bytes, row.kept_bytes) == (checkpoint, cost.total.max(), cost.kept.max())
        assert row.seconds == plan.training_time(CPU, "gloo", checkpoint=checkpoint).seconds
    assert json.loads(json.dumps(report.to_dict()))["optimiser"] == "momentum"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    onnx.save(ir.to_proto(load_model(pyramid(SHAPE))), tmp_path / "net.onnx")
    return tmp_path / "net.onnx"


def test_the_command_tells_what_a_step_takes(file: Path) -> None:
    said = works("plan", str(file), "--mesh", "depth=2", "--train", "adam", "--profile", "h100")
    assert "a training step, on the rank that takes most" in said and "few kept (checkpoint=True)" in said
    said = works("plan", str(file), "--devices", "4", "--train", "sgd", "--backend", "gloo")
    assert "a training step on" in said and "optimiser sgd" in said.lower()
    found = json.loads(works("plan", str(file), "--devices", "2", "--train", "adam", "--json"))
    assert found["choice"]["optimiser"] == "adam"
    assert [step["checkpoint"] for step in found["training"]["steps"]] == [False, True]
    assert Mesh.parse(found["mesh"]).size <= 2


def test_a_plan_in_a_file_does_not_train(file: Path, tmp_path: Path) -> None:
    works("compile", str(file), "--mesh", "depth=2", "-o", str(tmp_path / "plan.onnx"))
    assert "--train comes too late" in refused("plan", str(tmp_path / "plan.onnx"), "--train", "adam")
