"""Automatic mixed precision, loss scaling, accumulation: PyTorch's own tools on a partitioned module."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import partitioner as pt
from tests.test_training_copies import EMPTY, network, samples
from tests.training import gradients, in_processes, off

HALF = {torch.bfloat16: 2e-2, torch.float16: 3e-3}


def step(module: nn.Module, x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    with torch.autocast("cpu", dtype):
        found = module(x)
    found.float().square().mean().backward()
    return found.detach(), gradients(module)


@pytest.mark.parametrize("dtype", list(HALF))
@pytest.mark.parametrize("checkpoint", [False, True])
def test_autocast_is_that_of_the_whole(dtype: torch.dtype, checkpoint: bool) -> None:
    """Convolutions run in 16 bits and statistics do not; the error is that which torch makes itself."""
    x = samples(1)[0].float()
    exact = network()
    exact(x.double()).square().mean().backward()
    whole_module = network().float()
    _, theirs = step(whole_module, x, dtype)
    plan = pt.partition(network().float(), x, mesh="depth=2,height=2", train=True)
    y, mine = step(plan.module(checkpoint=checkpoint), x, dtype)
    assert y.dtype == dtype
    largest = max(float(g.abs().max()) for g in gradients(exact).values())
    for name, grad in gradients(exact).items():
        torchs = off(theirs[name].double(), grad, largest / 10)
        assert off(mine[name].double(), grad, largest / 10) < max(3 * torchs, HALF[dtype]), name


def on_ranks(rank: int, dtype: torch.dtype, cuts: dict[str, Any] | None) -> None:
    x = samples(1)[0].float()
    plan = pt.partition(network().float(), x, mesh="depth=2", cuts=cuts, train=True)
    module = plan.module()
    with torch.autocast("cpu", dtype):
        y = module(x)
        loss = pt.losses.mse(module, y, torch.zeros_like(y))
    loss.backward()
    twin = network().float()
    _, theirs = step(twin, x, dtype)
    largest = max(float(g.abs().max()) for g in theirs.values())
    for name, grad in gradients(module).items():
        assert off(grad, theirs[name], largest / 10) < 2 * HALF[dtype], name


@pytest.mark.parametrize("cuts", [pytest.param(None, id="even", marks=pytest.mark.slow),
                                  pytest.param(EMPTY, id="a rank without cells")])
def test_autocast_over_processes(cuts: dict[str, Any] | None) -> None:
    in_processes(2, on_ranks, torch.bfloat16, cuts)


def scaled_steps(rank: int) -> None:
    """A volume that is not a number on one rank's part alone: no rank takes the step."""
    x = samples(1)[0].float()
    module = pt.partition(network().float(), x, mesh="depth=2", train=True).module()
    optimiser = torch.optim.SGD(module.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = [p.detach().clone() for p in module.parameters()]
    for poisoned in (True, False):
        (part,) = module.cut("x", x) if "x" in module.input_names else module.cut(module.input_names[0], x)
        part = part.clone()
        if poisoned and rank == 1:
            part[0, 0, -1, -1, -1] = math.inf
        optimiser.zero_grad()
        with torch.autocast("cpu", torch.float16):
            y = module(part)
            loss = pt.losses.mse(module, y, torch.zeros_like(y))
        scaler.scale(loss).backward()
        scaler.unscale_(optimiser)
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        scaler.step(optimiser)
        scaler.update()
        moved = any(not torch.equal(p, q) for p, q in zip(module.parameters(), before, strict=True))
        assert module.gather(moved) == [not poisoned] * 2
        for buffer in module.buffers():  # the poisoned batch went into the running statistics, as it does in torch
            if buffer.is_floating_point():
                buffer.nan_to_num_(0, 1, 1)
        assert len(set(module.gather(scaler.get_scale()))) == 1
    everywhere = module.gather([p.detach() for p in module.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(*everywhere, strict=True))


def test_steps_with_gradients_that_are_no_numbers_are_skipped_by_all_ranks() -> None:
    in_processes(2, scaled_steps)


def test_gradients_accumulate_over_passes() -> None:
    module = pt.partition(network(), samples(1)[0], mesh="depth=2", train=True).module()
    twin = network()
    for x in samples(3):
        module(x).square().mean().backward()
        twin(x).square().mean().backward()
    largest = max(float(g.abs().max()) for g in gradients(twin).values())
    assert all(off(gradients(module)[n], g, largest / 100) < 1e-10 for n, g in gradients(twin).items())
