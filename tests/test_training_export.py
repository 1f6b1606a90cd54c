"""From torch and back: exports that can learn, weights that are made of others, trained weights in the file."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import partitioner as pt
from tests.command import kernel, model, value
from tests.models import NETWORKS
from tests.oracle import run_ort
from tests.training import as_exported, gradients, off

SHAPE = (2, 1, 11, 7, 6)


class Learner(nn.Module):
    """Layers that torch's exporter folds away or writes in several nodes."""

    def __init__(self, ratio: float = 0.0) -> None:
        super().__init__()
        self.first = nn.Conv3d(1, 6, 3, padding=1, bias=False)
        self.batch = nn.BatchNorm3d(6)
        self.drop, self.channels = nn.Dropout(ratio), nn.Dropout3d(ratio)
        self.group = nn.GroupNorm(2, 6)
        self.second = weight_norm(nn.Conv3d(6, 4, 3, stride=2, padding=1))
        self.up = nn.ConvTranspose3d(4, 4, 2, stride=2)
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.channels(self.drop(torch.relu(self.batch(self.first(x)))))
        x = self.up(torch.nn.functional.silu(self.second(self.group(x))))
        return self.head(x.movedim(1, -1)).movedim(-1, 1)


def learner(ratio: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    network = Learner(ratio).double().train()
    with torch.no_grad():
        for part in (network.batch, network.group):
            part.weight.uniform_(0.5, 1.5)
            part.bias.normal_()
    return as_exported(network)


@pytest.mark.parametrize("mesh", [None, "depth=2", "batch=2,height=3"])
def test_a_torch_module_trains_as_it_would_in_torch(mesh: str | None) -> None:
    network = learner()
    x = torch.randn(SHAPE, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        module = pt.partition(network, x, mesh=mesh, train=True).module()
    found, expected = module(x), network(x)
    assert off(found.detach(), expected.detach()) < 1e-10
    cotangent = torch.randn(expected.shape, dtype=torch.float64)
    (found * cotangent).sum().backward()
    (expected * cotangent).sum().backward()
    mine, theirs = gradients(module), gradients(network)
    assert set(mine) == set(theirs)
    largest = max(float(g.abs().max()) for g in theirs.values())
    for name, grad in theirs.items():
        assert off(mine[name], grad, largest / 100) < 1e-10, name
    state = module.state_dict()
    assert off(state["batch.running_var"], network.batch.running_var) < 1e-10
    assert network.training and network.batch.training  # as it was


def test_dropouts_drop_cells_or_channels_alike_on_every_mesh() -> None:
    x = torch.ones(SHAPE, dtype=torch.float64)
    network = nn.Sequential(nn.Conv3d(1, 64, 1), nn.Dropout3d(0.4)).double()
    results = []
    for mesh in (None, "depth=3", "batch=2"):
        module = pt.partition(network, x, mesh=mesh, train=True).module()
        module.seed = 5
        results.append(module(x).detach())
        dropped = results[-1].flatten(2) == 0
        assert bool((dropped.all(2) | ~dropped.any(2)).all()) and 0.2 < float(dropped.double().mean()) < 0.6
        assert off(module.eval()(x).detach(), network.eval()(x).detach()) < 1e-12
    assert all(torch.equal(results[0] == 0, other == 0) for other in results)
    cells = pt.partition(nn.Sequential(nn.Conv3d(1, 4, 1), nn.Dropout(0.4)).double(), x, train=True).module()
    assert 0.3 < float((cells(x) == 0).double().mean()) < 0.5


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_folded_batch_norms_are_named(exporter: Any, tmp_path: Path) -> None:
    path = NETWORKS["unet2d-stride-batch"].export(tmp_path / "m.onnx", exporter=exporter)
    with pytest.warns(UserWarning, match=r"look folded into \d+ convolutions .*train=True"):
        pt.partition(path, mesh="height=2").module()


def test_train_is_for_torch_modules(tmp_path: Path) -> None:
    path = NETWORKS["unet1d-maxpool-none"].export(tmp_path / "m.onnx")
    with pytest.raises(pt.PartitionError, match="train=True exports a torch module"):
        pt.partition(path, train=True)


# --- weights that are made of others ---------------------------------------------------------------------


def grouped(opset: int) -> onnx.ModelProto:
    """Scales of groups, repeated for channels by canonicalize, one of them read by two layers; a transposed weight."""
    norm = helper.make_node("GroupNormalization", ["a", "scale", "shift"], ["b"], "norm", num_groups=2)
    nodes = [helper.make_node("Conv", ["x", "w"], ["a"], "conv", pads=[1] * 4), norm,
             helper.make_node("GroupNormalization", ["b", "scale", "other"], ["c"], "norm2", num_groups=2),
             helper.make_node("Transpose", ["v"], ["vt"], "turn", perm=[1, 0, 2, 3]),
             helper.make_node("Conv", ["c", "vt"], ["y"], "conv2", pads=[1] * 4)]
    vectors = {name: np.arange(1, 3, dtype=np.float64) + i for i, name in enumerate(("scale", "shift", "other"))}
    weights = {"w": kernel(4, 1, axes=2).astype(np.float64), "v": kernel(4, 3, axes=2).astype(np.float64)}
    double = onnx.TensorProto.DOUBLE
    return model(nodes, [value("x", (1, 1, 9, 8), double)], [value("y", (1, 3, 9, 8), double)],
                 {**vectors, **weights}, opset=opset)


def torch_grouped(x: torch.Tensor, w: dict[str, torch.Tensor]) -> torch.Tensor:
    f, eps = nn.functional, float(np.float32(1e-5))
    each = {name: w[name].repeat_interleave(2) for name in ("scale", "shift", "other")}
    a = f.group_norm(f.conv2d(x, w["w"], padding=1), 2, each["scale"], each["shift"], eps)
    return f.conv2d(f.group_norm(a, 2, each["scale"], each["other"], eps), w["v"].transpose(0, 1), padding=1)


@pytest.mark.parametrize("mesh", [None, "height=3"])
def test_weights_that_are_made_of_others_train(mesh: str | None) -> None:
    module = pt.partition(grouped(18), mesh=mesh).module()
    parameters = dict(module.named_parameters())
    assert set(parameters) == {"w", "v", "scale", "shift", "other"}
    twins = {name: p.detach().clone().requires_grad_() for name, p in parameters.items()}
    x = torch.randn(1, 1, 9, 8, dtype=torch.float64)
    found, expected = module(x), torch_grouped(x, twins)
    assert off(found.detach(), expected.detach()) < 1e-10
    (found * expected.detach()).sum().backward()
    (expected * expected.detach()).sum().backward()
    largest = max(float(t.grad.abs().max()) for t in twins.values() if t.grad is not None)
    for name, twin in twins.items():  # what precedes a norm may move it without effect
        grad = parameters[name].grad
        assert grad is not None and twin.grad is not None and off(grad, twin.grad, largest / 100) < 1e-10, name


def test_operators_without_a_gradient_are_refused_by_name() -> None:
    nodes = [helper.make_node("Conv", ["x", "w"], ["a"], "conv"),
             helper.make_node("QuantizeLinear", ["a", "s", "z"], ["q"], "narrow"),
             helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], "widen")]
    source = model(nodes, [value("x", (1, 3, 7, 6))], [value("y", (1, 3, 5, 4))],
                   {"w": kernel(3, 3, axes=2), "s": np.float32(0.1), "z": np.uint8(3)})
    with pytest.raises(pt.PartitionError, match=r"narrow \(QuantizeLinear\): it has no gradient"):
        pt.partition(source, mesh="height=2").module()


# --- back into the file ----------------------------------------------------------------------------------


def test_trained_weights_go_into_the_original_model(tmp_path: Path) -> None:
    """The file has the names, nodes and types that it had, and gives what the module gives."""
    path = NETWORKS["unet2d-stride-batch"].export(tmp_path / "m.onnx", keep_batch_norm=True)
    module = pt.partition(path, mesh="height=2").module()
    optimiser = torch.optim.SGD(module.parameters(), lr=0.05)
    x = torch.randn(NETWORKS["unet2d-stride-batch"].shape)
    for _ in range(2):
        optimiser.zero_grad()
        module(x).square().mean().backward()
        optimiser.step()
    module.to_onnx(tmp_path / "trained.onnx")
    before, after = onnx.load(path), onnx.load(tmp_path / "trained.onnx")
    onnx.checker.check_model(after, full_check=True)
    assert [n.SerializeToString() for n in before.graph.node] == [n.SerializeToString() for n in after.graph.node]
    assert {i.name for i in before.graph.initializer} == {i.name for i in after.graph.initializer}
    (found,) = run_ort(after, {"volume": x.numpy()}).values()
    assert off(torch.from_numpy(found), module.eval()(x).detach()) < 1e-5
    (old,) = run_ort(before, {"volume": x.numpy()}).values()
    assert off(torch.from_numpy(old), module(x).detach()) > 1e-2


def test_exports_that_can_learn_go_back_too(tmp_path: Path) -> None:
    x = torch.randn(SHAPE)
    network = learner(0.3).float()
    module = pt.partition(network, x, mesh="depth=2", train=True).module()
    module(x)
    module.to_onnx(tmp_path / "m.onnx")
    source = onnx.load(tmp_path / "m.onnx")
    onnx.checker.check_model(source)
    network.load_state_dict({**network.state_dict(), **{k: v for k, v in module.state_dict().items()}})
    (found,) = run_ort(source, {source.graph.input[0].name: x.numpy()}).values()
    assert off(torch.from_numpy(found), network.eval()(x).detach()) < 1e-5


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    module = pt.partition(grouped(18)).module()
    with pytest.raises(pt.PartitionError, match="nowhere"):
        module.to_onnx(tmp_path / "nowhere" / "m.onnx")
