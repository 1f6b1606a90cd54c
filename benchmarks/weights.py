"""The weights of the U-Net with batch norms folded into its convolutions, for peers that are written by hand.

For inference y = g * (w x + b - mean) / sqrt(variance + eps) + beta is a convolution with scaled weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.errors import SideRefusal
from benchmarks.models import UNet, UNetConfig
from benchmarks.suite import Case

SLOPE = 0.01
"""Of the LeakyReLU after every 3x3x3 convolution."""


@dataclass(frozen=True)
class Convolution:
    """Weight as in torch, (out, in, 3, 3, 3), or (in, out, 2, 2, 2) where it is transposed; bias (out,)."""

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class Weights:
    """From the finest level down, then up again; two convolutions per level each way."""

    window: tuple[float, float] | None
    encoder: tuple[tuple[Convolution, Convolution], ...]
    ups: tuple[Convolution, ...]
    decoder: tuple[tuple[Convolution, Convolution], ...]
    head: Convolution


def folded(case: Case) -> Weights:
    """The case's network as weights.

    Raises:
        SideRefusal: for a network, or extents, that the peers by hand are not written for.
    """
    config = case.network
    plain = isinstance(config, UNetConfig) and (config.dims, config.down, config.up) == (3, "maxpool", "transpose")
    if not plain or config.norm == "instance":
        raise SideRefusal("written for the 3D U-Net with batch norm, max pool and transposed convolution alone")
    assert isinstance(config, UNetConfig)
    if any(extent % (1 << (config.levels - 1)) for extent in case.shape[2:]):
        raise SideRefusal(f"written for extents that {config.levels - 1} max pools halve without a rest")
    network = config.build().requires_grad_(False)
    return _folded(network)


def refuse_uneven(case: Case, parts: int) -> None:
    """Peers by hand split the first spatial axis in equal parts whose cuts lie between windows of every max pool.

    Raises:
        SideRefusal: where that cannot be.
    """
    assert isinstance(case.network, UNetConfig)
    multiple = parts << (case.network.levels - 1)
    if case.shape[2] % multiple:
        raise SideRefusal(f"written for a first axis whose extent is a multiple of {multiple}")


def _folded(network: UNet) -> Weights:
    ups: list[Any] = [up.transposed for up in network.up]
    return Weights(
        network.window,
        tuple(_pair(block) for block in network.encoder),
        tuple(Convolution(up.weight, up.bias) for up in ups),
        tuple(_pair(block) for block in network.decoder),
        Convolution(network.head.weight, _bias(network.head)),
    )


def _pair(block: Any) -> tuple[Convolution, Convolution]:
    first, first_norm, _, second, second_norm, _ = block
    return _with_norm(first, first_norm), _with_norm(second, second_norm)


def _with_norm(convolution: Any, norm: nn.Module) -> Convolution:
    bias = _bias(convolution)
    if not isinstance(norm, nn.BatchNorm3d):
        return Convolution(convolution.weight, bias)
    assert norm.running_mean is not None and norm.running_var is not None
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return Convolution(convolution.weight * scale.view(-1, 1, 1, 1, 1), (bias - norm.running_mean) * scale + norm.bias)


def _bias(convolution: Any) -> Tensor:
    return convolution.bias if convolution.bias is not None else torch.zeros(convolution.weight.shape[0])
