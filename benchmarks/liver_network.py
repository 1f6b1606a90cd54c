"""The 3D U-Net of Hou et al. 2019 for liver and lesions, as their Mesh-TensorFlow code has it.

    level    two of (convolution 3x3x3, batch norm, LeakyReLU 0.1, dropout); max pool 2 between levels
    upwards  transposed convolution 2x2x2 stride 2, dropout, concatenated with the level of the same resolution
    head     convolution 1x1x1 to background, liver, lesion

The very first convolution has no dropout.  Source: "High-Resolution Medical Image Analysis with Spatial
Partitioning", arXiv 1909.03108; mesh_tensorflow/experimental/unet.py.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

CLASSES = ("background", "liver", "lesion")
CLASS_WEIGHTS = (1.0, 2.0, 4.0)
"""Of the cross entropy; the paper's code has 1, 8 and 16."""

_SLOPE = 0.1
_NORM_EPSILON = 1e-6


@dataclass(frozen=True)
class LiverConfig:
    """`filters` at the finest of `depth` resolutions, doubled at each coarser one; the paper's are 32 and 4.

    Args:
        dropout: the share of activations that training drops; the paper's is 0.5.
        seed: of the weights.
    """

    filters: int = 32
    depth: int = 4
    dropout: float = 0.5
    seed: int = 0

    def build(self) -> LiverUNet:
        """The network with weights drawn from the seed."""
        with _seeded(self.seed):
            return LiverUNet(self)

    @property
    def granularity(self) -> int:
        """Extents of which this is no divisor are padded on the way up."""
        return 1 << (self.depth - 1)


class LiverUNet(nn.Module):
    """(batch, 1, depth, height, width) -> logits (batch, 3, depth, height, width), for odd extents too."""

    def __init__(self, config: LiverConfig) -> None:
        super().__init__()
        filters = [config.filters << level for level in range(config.depth)]
        self.down = nn.ModuleList(
            _level(before, after, config.dropout, first=level == 0)
            for level, (before, after) in enumerate(zip([1, *filters], filters, strict=False))
        )
        self.pool = nn.MaxPool3d(2)
        self.up = nn.ModuleList(nn.ConvTranspose3d(2 * fine, fine, 2, stride=2) for fine in reversed(filters[:-1]))
        self.drop = nn.ModuleList(_dropout(config.dropout) for _ in filters[:-1])
        self.merge = nn.ModuleList(_level(2 * fine, fine, config.dropout) for fine in reversed(filters[:-1]))
        self.head = nn.Conv3d(config.filters, len(CLASSES), 1)

    def forward(self, volume: Tensor) -> Tensor:
        """Logits of the volume's extents."""
        skips: list[Tensor] = []
        x = volume
        for number, level in enumerate(self.down):
            x = level(self.pool(x) if number else x)
            skips.append(x)
        skips.pop()
        for up, drop, level in zip(self.up, self.drop, self.merge, strict=True):
            skip = skips.pop()
            x = level(torch.cat([_extended(drop(up(x)), skip), skip], dim=1))
        return self.head(x)


def _extended(x: Tensor, skip: Tensor) -> Tensor:
    """Padded with zeros at the ends to the skip's extents: a max pool leaves out the last cell of an odd extent."""
    missing = [n - m for n, m in zip(skip.shape[2:], x.shape[2:], strict=True)]
    return functional.pad(x, [amount for m in reversed(missing) for amount in (0, m)])


def _level(before: int, after: int, dropout: float, first: bool = False) -> nn.Sequential:
    return nn.Sequential(
        *_convolution(before, after, 0 if first else dropout),
        *_convolution(after, after, dropout),
    )


def _convolution(before: int, after: int, dropout: float) -> list[nn.Module]:
    return [
        nn.Conv3d(before, after, 3, padding=1),
        nn.BatchNorm3d(after, eps=_NORM_EPSILON),
        nn.LeakyReLU(_SLOPE),
        *([_dropout(dropout)] if dropout else []),
    ]


def _dropout(share: float) -> nn.Module:
    return nn.Dropout(share) if share else nn.Identity()


@contextmanager
def _seeded(seed: int) -> Generator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
