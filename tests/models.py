"""Tiny networks for the tests: every kind that the exporters write, with odd and prime extents.

`NETWORKS` maps a name to a `Network`: a configuration, an example shape, and another shape for dynamic axes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from benchmarks.models import INPUT_NAME, OUTPUT_NAME, DType, Exporter, ResNetConfig, UNetConfig, export

__all__ = ["INPUT_NAME", "NETWORKS", "OUTPUT_NAME", "Network", "ResNetConfig", "UNetConfig", "export"]


@dataclass(frozen=True)
class Network:
    """A network and the shapes (batch, channels, *spatial) that it is tried with."""

    config: UNetConfig | ResNetConfig
    shape: tuple[int, ...]
    other_shape: tuple[int, ...]

    def build(self) -> nn.Module:
        """The torch module in inference mode."""
        return self.config.build()

    def export(
        self,
        path: Path,
        dynamic: bool = False,
        dtype: DType = "float32",
        exporter: Exporter = "torchscript",
        keep_batch_norm: bool = False,
    ) -> Path:
        """Write the ONNX file; the legacy tracer by default, for it takes a tenth of a second."""
        return export(self.build(), self.shape, path, dynamic, dtype, exporter, keep_batch_norm)


NETWORKS = {
    "unet3d-stride-instance": Network(
        UNetConfig(dims=3, levels=3, base=3), (1, 1, 13, 17, 11), (2, 1, 19, 14, 23)
    ),
    "unet3d-maxpool-instance": Network(
        UNetConfig(dims=3, levels=3, base=3, down="maxpool", in_channels=2),
        (1, 2, 13, 19, 15),
        (1, 2, 22, 11, 17),
    ),
    "unet3d-maxpool-batch-trilinear": Network(
        UNetConfig(dims=3, levels=3, base=3, norm="batch", down="maxpool", up="trilinear"),
        (2, 1, 13, 17, 11),
        (1, 1, 15, 12, 19),
    ),
    "unet3d-stride-none-trilinear": Network(
        UNetConfig(dims=3, levels=3, base=3, norm="none", up="trilinear", window=(0.1, 0.7)),
        (1, 1, 11, 23, 9),
        (2, 1, 13, 9, 17),
    ),
    "unet2d-stride-batch": Network(
        UNetConfig(dims=2, levels=4, base=3, norm="batch"), (1, 1, 37, 29), (3, 1, 26, 41)
    ),
    "unet2d-maxpool-instance-bilinear": Network(
        UNetConfig(dims=2, levels=3, base=4, down="maxpool", up="trilinear"), (1, 1, 31, 23), (2, 1, 22, 37)
    ),
    "unet1d-stride-instance": Network(UNetConfig(dims=1, levels=4, base=3), (2, 1, 61), (1, 1, 83)),
    "unet1d-maxpool-none": Network(
        UNetConfig(dims=1, levels=3, base=4, norm="none", down="maxpool"), (1, 1, 47), (2, 1, 58)
    ),
    "resnet3d": Network(
        ResNetConfig(dims=3, filters=(4, 8), classes=5), (2, 1, 19, 23, 17), (1, 1, 25, 18, 29)
    ),
    "resnet2d-instance": Network(
        ResNetConfig(dims=2, filters=(4, 8), classes=5, norm="instance"), (1, 1, 41, 31), (2, 1, 34, 53)
    ),
    "resnet1d": Network(ResNetConfig(dims=1, filters=(4, 8, 12), classes=3), (2, 1, 97), (1, 1, 128)),
}
