"""Convolutions differentiated by oneDNN's own interface: exact for every geometry, the padding of a shard too."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings

from partitioner.ops.kernels import onednn_gradients
from partitioner.ops.kernels.onednn import Task
from partitioner.ops.kernels.onednn_library import is_available
from tests.test_onednn import reference, stored_last, tasks

pytestmark = pytest.mark.skipif(not is_available(), reason="the package onednn-cpu-gomp is not installed")


def leaf(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape).requires_grad_()


@settings(max_examples=300, deadline=None)
@given(tasks())
def test_every_geometry_is_that_of_torch_in_float64(drawn: Task) -> None:
    task = replace(drawn, slope=None)
    given_ = [leaf(task.data), leaf(task.weight), *([leaf((task.channels,))] if task.has_bias else [])]
    if not onednn_gradients.suits(given_[0], given_[1], task):
        return
    wide = [t.detach().double().requires_grad_() for t in given_]
    bias, wide_bias = (t[2] if task.has_bias else None for t in (given_, wide))
    found = onednn_gradients.convolution(stored_last(given_[0]), given_[1], bias, task)
    expected = reference(task, wide[0], wide[1], wide_bias)
    assert found.shape == expected.shape
    cotangent = torch.randn(expected.shape)
    found.backward(cotangent)
    expected.backward(cotangent.double())
    for mine, theirs in ((found, expected), *((t.grad, w.grad) for t, w in zip(given_, wide, strict=True))):
        assert mine is not None and theirs is not None
        assert float((mine - theirs).detach().abs().max() / theirs.abs().max().clamp_min(1e-3)) < 1e-5


LAYER = Task((1, 16, 6, 7, 8), (16, 16, 3, 3, 3), True, (1,) * 3, (1,) * 3, ((1, 0), (1, 1), (1, 1)), 1)


@pytest.mark.parametrize("wanted", ["data", "weight", "bias"])
def test_only_what_is_asked_for(wanted: str) -> None:
    tensors = {"data": leaf(LAYER.data), "weight": leaf(LAYER.weight), "bias": leaf((16,))}
    for name, tensor in tensors.items():
        tensor.requires_grad_(name in ("weight" if wanted == "bias" else wanted, wanted))
    assert onednn_gradients.suits(tensors["data"], tensors["weight"], LAYER)
    onednn_gradients.convolution(tensors["data"], tensors["weight"], tensors["bias"], LAYER).sum().backward()
    for name, tensor in tensors.items():
        assert (tensor.grad is not None) == tensor.requires_grad, name


@pytest.mark.parametrize("extent", [64, 128])
def test_many_cells_of_one_sign_add_up(extent: int) -> None:
    """Added one by one, a sum of many loses what is small beside it."""
    data, weight, bias = torch.ones(1, 1, extent, extent, extent), leaf((16, 1, 1, 1, 1)), leaf((16,))
    task = Task(tuple(data.shape), (16, 1, 1, 1, 1), True, (1,) * 3, (1,) * 3, ((0, 0),) * 3, 1)
    assert onednn_gradients.suits(data, weight, task)
    (0.1 * onednn_gradients.convolution(data, weight, bias, task)).sum().backward()
    expected = float(torch.tensor(0.1).double()) * extent**3
    assert bias.grad is not None and float((bias.grad - expected).abs().max()) < 1e-5 * expected
    assert weight.grad is not None and float((weight.grad - expected).abs().max()) < 1e-4 * expected


@pytest.mark.parametrize("order", [(1, 0, 2, 3, 4), (0, 1, 4, 3, 2)])
def test_a_weight_that_lies_otherwise(order: tuple[int, ...]) -> None:
    """Also one of a larger tensor."""
    data, whole = leaf(LAYER.data), torch.randn(16, 32, 3, 3, 3).permute(order)
    weight = (whole[:16] if whole.shape[0] == 32 else whole[:, :16]).detach().requires_grad_()
    bias = torch.zeros(16)
    assert onednn_gradients.suits(data, weight, LAYER)
    onednn_gradients.convolution(data, weight, bias, LAYER).square().sum().backward()
    wide = weight.detach().double().requires_grad_()
    reference(LAYER, data.detach().double(), wide, bias.double()).square().sum().backward()
    assert weight.grad is not None and wide.grad is not None
    assert float((weight.grad - wide.grad).abs().max() / wide.grad.abs().max()) < 1e-5


@torch.no_grad()
def test_what_is_left_to_others() -> None:
    data, weight = leaf(LAYER.data), leaf(LAYER.weight)
    assert not onednn_gradients.suits(data, weight, LAYER)  # nothing is differentiated now
    with torch.enable_grad():
        assert not onednn_gradients.suits(data.double(), weight.double(), LAYER)
        assert not onednn_gradients.suits(data.detach(), weight.detach(), LAYER)
        with torch.autocast("cpu"):
            assert not onednn_gradients.suits(data, weight, LAYER)
