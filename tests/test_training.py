"""Training on shards: gradients, batch statistics and masks equal to those of the whole network in torch."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import helper
from torch import nn

import partitioner as pt
from partitioner.geometry import Box, Interval
from partitioner.ops.own.training import draw_kept, uniform
from runtime.training.parameters import place_for
from tests.command import kernel, model, value
from tests.models import NETWORKS
from tests.training import as_exported, off

LIMIT = 1e-10


def meshes(dims: int) -> list[tuple[str, Any]]:
    """Even, uneven with an empty shard, and all axes at once."""
    axes = ("depth", "height", "width")[3 - dims :]
    return [(f"{axes[0]}=3", None), (f"{axes[-1]}=3", "uneven"), (",".join(f"{a}=2" for a in axes), None)]


def cuts_for(mesh: str, extent: int, kind: str | None) -> dict[str, tuple[int, ...]] | None:
    return {mesh.partition("=")[0]: (0, extent // 3, extent // 3, extent)} if kind else None


@functools.cache
def whole(name: str, training: bool) -> tuple[nn.Module, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The torch module after one backward pass in float64, its input, its output and the cotangent."""
    network = NETWORKS[name]
    module = as_exported(network.build().double().train(training))
    x = torch.randn(network.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = module(x)
    cotangent = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (y * cotangent).sum().backward()
    return module, x, y.detach(), cotangent


def exported(name: str, folder: Path) -> Path:
    return NETWORKS[name].export(folder / "m.onnx", dtype="float64", keep_batch_norm=True)


@pytest.mark.parametrize(("name", "training"), [
    *((name, True) for name in NETWORKS),
    *(pytest.param(name, False, marks=[] if name == "resnet2d-instance" else pytest.mark.slow) for name in NETWORKS)])
def test_gradients_equal_those_of_the_whole(name: str, training: bool, tmp_path: Path) -> None:
    reference, x, y, cotangent = whole(name, training)
    path, network = exported(name, tmp_path), NETWORKS[name]
    for mesh, kind in meshes(network.config.dims):
        cuts = cuts_for(mesh, network.shape[-1], kind)
        module = pt.partition(path, mesh=mesh, cuts=cuts).module().train(training)
        mine = x.detach().clone().requires_grad_()
        found = module(mine)
        (found * cotangent).sum().backward()
        assert off(found.detach(), y) < LIMIT, mesh
        assert x.grad is not None and mine.grad is not None and off(mine.grad, x.grad) < LIMIT, mesh
        parameters = dict(module.named_parameters())
        assert set(parameters) == set(dict(reference.named_parameters()))
        largest = max(float(p.grad.abs().max()) for p in reference.parameters() if p.grad is not None)
        for key, parameter in reference.named_parameters():
            grad = parameters[key].grad
            assert grad is not None and parameter.grad is not None
            # before a norm, a bias has none: what is left of its terms is held against the network's gradients
            assert off(grad, parameter.grad, largest / 100) < LIMIT, (mesh, key)
        buffers = dict(module.named_buffers())
        for key, buffer in reference.named_buffers():
            if buffer.is_floating_point():
                assert off(buffers[key], buffer) < LIMIT, (mesh, key)


def test_state_goes_back_to_torch(tmp_path: Path) -> None:
    """Names are the model's: a trained state loads into the torch module it came from."""
    name = "unet2d-stride-batch"
    module = pt.partition(exported(name, tmp_path), mesh="height=2").module()
    optimiser = torch.optim.SGD(module.parameters(), lr=0.1)
    x = torch.randn(NETWORKS[name].shape, dtype=torch.float64)
    for _ in range(2):
        optimiser.zero_grad()
        module(x).square().mean().backward()
        optimiser.step()
    torch_module = NETWORKS[name].build().double()
    missing = torch_module.load_state_dict(module.state_dict(), strict=False)
    assert missing.unexpected_keys == [] and all("num_batches" in key for key in missing.missing_keys)
    assert off(module.eval()(x).detach(), torch_module.eval()(x).detach()) < 1e-6


def test_steps_follow_those_of_the_whole(tmp_path: Path) -> None:
    """Twenty steps, gradients clipped by their norm."""
    name = "unet3d-maxpool-batch-trilinear"
    network = NETWORKS[name]
    modules = [as_exported(network.build().double().train()),
               pt.partition(exported(name, tmp_path), mesh="depth=3").module()]
    losses: list[list[float]] = []
    for module in modules:
        optimiser = torch.optim.SGD(module.parameters(), lr=1e-2, momentum=0.9)
        generator = torch.Generator().manual_seed(3)
        losses.append([])
        for _ in range(20):
            x = torch.randn(network.shape, dtype=torch.float64, generator=generator)
            optimiser.zero_grad()
            loss = (module(x) - 1).square().mean()
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 0.5)
            optimiser.step()
            losses[-1].append(float(loss.detach()))
    assert np.allclose(*losses, rtol=1e-8, atol=0)
    trained, mine = (dict(module.named_parameters()) for module in modules)
    assert all(off(mine[key].detach(), parameter.detach()) < 1e-8 for key, parameter in trained.items())
    assert losses[0][-1] < losses[0][0]


@pytest.mark.parametrize("biased", [False, True])
def test_running_variances_are_torchs_or_onnxs(biased: bool) -> None:
    shape = (2, 3, 5, 4)
    nodes = [helper.make_node("BatchNormalization", ["x", "s", "b", "mean", "variance"], ["y"], "norm", momentum=0.75)]
    ones = np.ones(3, np.float32)
    source = model(nodes, [value("x", shape)], [value("y", shape)],
                   {"s": ones, "b": 0 * ones, "mean": 2 * ones, "variance": 4 * ones})
    module = pt.partition(source, mesh="height=2").module(biased_variance=biased)
    x = torch.randn(shape)
    module(x)
    state = module.state_dict()
    torch.testing.assert_close(state["mean"], 0.75 * 2 + 0.25 * x.mean((0, 2, 3)))
    torch.testing.assert_close(state["variance"], 0.75 * 4 + 0.25 * x.var((0, 2, 3), correction=int(not biased)))


# --- dropout -------------------------------------------------------------------------------------------

SHAPE = (2, 3, 7, 5, 9)


def dropping(ratio: float = 0.4) -> Any:
    nodes = [helper.make_node("Conv", ["x", "w"], ["a"], "conv", pads=[1] * 6),
             helper.make_node("Dropout", ["a", "ratio"], ["b"], "drop"),
             helper.make_node("Conv", ["b", "w"], ["c"], "conv2", pads=[1] * 6),
             helper.make_node("Dropout", ["c", "ratio"], ["y"], "drop2")]
    return model(nodes, [value("x", SHAPE)], [value("y", SHAPE)], {"w": kernel(3, 3), "ratio": np.float32(ratio)})


def test_dropout_drops_the_same_cells_on_every_mesh() -> None:
    x = torch.randn(SHAPE)
    results = []
    for mesh in (None, "depth=3", "batch=2,height=2", "depth=2,height=2,width=2"):
        module = pt.partition(dropping(), mesh=mesh).module()
        module.seed = 7
        first, second = module(x), module(x)
        assert module.seed == 9 and not torch.equal(first == 0, second == 0)  # a new mask for every step
        results.append(first.detach())
        assert torch.equal(module.eval()(x), module(x)) and not (module(x) == 0).any()
    for other in results[1:]:
        assert torch.equal(results[0] == 0, other == 0)
        assert off(other, results[0]) < 1e-5
    share = float((results[0] == 0).float().mean())
    assert abs(share - 0.4) < 0.05


def test_masks_are_even_and_independent() -> None:
    box = Box(((Interval(0, 100),), (Interval(0, 1000),)))
    one = uniform(box, (100, 1000), 1, 0, torch.device("cpu"))
    assert float(one.min()) >= 0 and float(one.max()) < 1
    assert abs(float(one.mean()) - 0.5) < 0.005 and abs(float(one.var()) - 1 / 12) < 0.002
    for seed, layer in ((2, 0), (1, 1)):
        other = uniform(box, (100, 1000), seed, layer, torch.device("cpu"))
        assert abs(float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1])) < 0.02
    assert abs(float(torch.corrcoef(torch.stack([one[:, 1:].flatten(), one[:, :-1].flatten()]))[0, 1])) < 0.02
    box = Box(((Interval(3, 9),), (Interval(10, 20), Interval(50, 60))))
    part = uniform(box, (100, 1000), 1, 0, torch.device("cpu"))
    assert torch.equal(part, torch.cat([one[3:9, 10:20], one[3:9, 50:60]], 1))


# --- what it takes -------------------------------------------------------------------------------------


def test_wrong_inputs_are_refused(tmp_path: Path) -> None:
    module = pt.partition(exported("unet1d-maxpool-none", tmp_path), mesh="width=2").module()
    shape = NETWORKS["unet1d-maxpool-none"].shape
    with pytest.raises(pt.PartitionError, match="takes volume; check volume, y"):
        module(y=torch.zeros(shape))
    with pytest.raises(pt.PartitionError, match="has extents 1x1x3, the plan takes"):
        module(torch.zeros(1, 1, 3))


def test_a_plan_from_a_file_is_for_inference(tmp_path: Path) -> None:
    path = exported("unet1d-maxpool-none", tmp_path)
    pt.partition(path, mesh="width=2").save(tmp_path / "p.onnx")
    with pytest.raises(pt.PartitionError, match="weights folded for inference"):
        pt.load(tmp_path / "p.onnx").module()


@pytest.mark.parametrize(("names", "places"), [
    (["a.b.weight", "a.b.bias"], ["a.b.weight", "a.b.bias"]),
    (["a", "a.b"], ["a", "a_b"]),
    (["a..b", ".", "/net/conv/w.1"], ["a__b", "_", "/net/conv/w.1"]),
    (["train.forward", "training", "state_dict"], ["train.forward", "training", "state_dict"]),
])
def test_places_of_weights(names: list[str], places: list[str]) -> None:
    module = nn.Module()
    for name in names:
        place_for(module, name).put(torch.zeros(1), False, True)
    assert sorted(module.state_dict()) == sorted(places)


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(2, 7, 9, 8, 6), (3, 1, 40, 30), (5, 300), (4000,)])
def test_what_a_dropout_keeps_is_a_matter_of_the_cell(shape: tuple[int, ...], ratio: float) -> None:
    """Any part of the volume keeps what the whole does, channels that are no multiple of four included."""
    device = torch.device("cpu")
    whole_box = Box(tuple((Interval(0, n),) for n in shape))
    kept, share = draw_kept(whole_box, shape, ratio, 3, 1, device)
    assert tuple(kept.shape) == shape and share == 1 - ratio
    assert abs(float(kept.double().mean()) - share) < (0.06 if 0 < ratio < 1 else 1e-9)
    part = Box(tuple((Interval(n // 3, n - n // 4),) for n in shape))
    mine, _ = draw_kept(part, shape, ratio, 3, 1, device)
    assert torch.equal(mine, kept[tuple(slice(n // 3, n - n // 4) for n in shape)])
    if len(shape) > 2:
        pieces = Box(((Interval(0, 1),), (Interval(0, 1),), (Interval(0, 2), Interval(5, 6)),
                      *((Interval(0, n),) for n in shape[3:])))
        mine, _ = draw_kept(pieces, shape, ratio, 3, 1, device)
        assert torch.equal(mine, kept[:1, :1, [0, 1, 5]])
    other, _ = draw_kept(whole_box, shape, ratio, 4, 1, device)
    assert 0 < ratio < 1 or torch.equal(kept, other)
    assert not 0 < ratio < 1 or not torch.equal(kept, other)


def test_weights_may_have_the_names_of_the_modules_own_attributes() -> None:
    nodes = [helper.make_node("Conv", ["x", "join.0.weight", "seed"], ["a"], "conv", pads=[1] * 6),
             helper.make_node("Conv", ["a", "forward", "mesh"], ["y"], "conv2", pads=[1] * 6)]
    weights = {"join.0.weight": kernel(3, 3), "seed": np.ones(3, np.float32), "forward": kernel(3, 3),
               "mesh": np.zeros(3, np.float32)}
    source = model(nodes, [value("x", SHAPE)], [value("y", SHAPE)], weights)
    module = pt.partition(source, mesh="depth=2").module()
    assert set(module.state_dict()) == set(dict(module.named_parameters())) == set(weights)
    module(torch.randn(SHAPE)).sum().backward()
    assert all(p.grad is not None for p in module.parameters())
