"""What the tests of training share: the network as files know it, and processes that talk over gloo."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn


def as_exported(module: nn.Module) -> nn.Module:
    """The module with its epsilons, momenta and slopes as ONNX files hold them: float32 numbers."""
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._NormBase | nn.GroupNorm):
            part.eps = float(np.float32(part.eps))
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.momentum is not None:
            part.momentum = 1 - float(np.float32(1 - part.momentum))
        if isinstance(part, nn.LeakyReLU):
            part.negative_slope = float(np.float32(part.negative_slope))
    return module


def gradients(module: nn.Module) -> dict[str, torch.Tensor]:
    """The gradient of every parameter that has one, whole."""
    return {name: whole(p.grad).clone() for name, p in module.named_parameters() if p.grad is not None}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that may be cut over processes; these must all ask."""
    found = getattr(tensor, "full_tensor", None)
    return tensor.detach() if found is None else found().detach()


def off(found: torch.Tensor, expected: torch.Tensor, floor: float = 1e-3) -> float:
    """Largest difference over the largest value; values that vanish are held against `floor`."""
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(floor))


def in_processes(size: int, work: Callable[..., None], *args: Any) -> None:
    """Run `work(rank, *args)` in processes of one gloo group; the first failure is raised.

    They are forked from a process that has read torch and our packages, and nothing else, once for all tests.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.set_forkserver_preload(["tests.preloaded"])
    torch.multiprocessing.start_processes(_enter, (size, port, work, args), size, start_method="forkserver")


def _enter(rank: int, size: int, port: int, work: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(size),
                      LOCAL_RANK=str(rank), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        work(rank, *args)
    finally:
        dist.destroy_process_group()
