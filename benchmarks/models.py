"""The networks that the demo, the benchmarks and the tests partition: a U-Net and a residual classifier.

Both take an input `volume` of shape (batch, channels, *spatial) and yield `logits`; both exist in 1D, 2D
and 3D, and their weights follow from the seed alone.
"""

from __future__ import annotations

import logging
import os
import uuid
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

INPUT_NAME = "volume"
OUTPUT_NAME = "logits"

Norm: TypeAlias = Literal["instance", "batch", "none"]
Down: TypeAlias = Literal["stride", "maxpool"]
Up: TypeAlias = Literal["transpose", "trilinear"]
Exporter: TypeAlias = Literal["dynamo", "torchscript"]
DType: TypeAlias = Literal["float32", "float64", "bfloat16"]

_CONVOLUTION = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_MAX_POOL = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_GLOBAL_POOL = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
_INSTANCE_NORM = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_LINEAR_MODE = ("linear", "bilinear", "trilinear")
_AXIS_NAMES = ("depth", "height", "width")


@dataclass(frozen=True)
class UNetConfig:
    """A U-Net: `levels` resolutions, `base` filters at the finest, doubled at each coarser one.

    `down` is a strided first convolution or a max pool of 2; `up` a transposed convolution of 2, cropped or
    zero-padded to its skip's extent, or a linear resize to that extent.  `window` (centre, width) squeezes
    the input as a CT window does: tanh((volume - centre) / width).
    """

    dims: int = 3
    in_channels: int = 1
    classes: int = 4
    levels: int = 4
    base: int = 16
    norm: Norm = "instance"
    down: Down = "stride"
    up: Up = "transpose"
    window: tuple[float, float] | None = None
    seed: int = 0

    def build(self) -> UNet:
        """The network in inference mode, its weights drawn from the seed."""
        with _seeded(self.seed):
            model = UNet(self)
            _randomise_norms(model)
        return model.eval()


@dataclass(frozen=True)
class ResNetConfig:
    """A residual classifier: one strided residual block per entry of `filters`, then a dense head."""

    dims: int = 3
    in_channels: int = 1
    classes: int = 10
    filters: tuple[int, ...] = (16, 32, 64)
    norm: Norm = "batch"
    seed: int = 0

    def build(self) -> ResNet:
        """The network in inference mode, its weights drawn from the seed."""
        with _seeded(self.seed):
            model = ResNet(self)
            _randomise_norms(model)
        return model.eval()


class UNet(nn.Module):
    """(batch, in_channels, *spatial) -> (batch, classes, *spatial), for odd and prime extents too."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        c = config
        self.window = c.window
        filters = [c.base << level for level in range(c.levels)]
        stride = 2 if c.down == "stride" else 1
        self.encoder = nn.ModuleList(
            _double_convolution(c.dims, before, after, c.norm, stride if level else 1)
            for level, (before, after) in enumerate(zip([c.in_channels, *filters], filters, strict=False))
        )
        self.pool = _MAX_POOL[c.dims - 1](2) if c.down == "maxpool" else nn.Identity()
        self.up = nn.ModuleList(_up(c, 2 * fine, fine) for fine in reversed(filters[:-1]))
        self.decoder = nn.ModuleList(
            _double_convolution(c.dims, 2 * fine, fine, c.norm, 1) for fine in reversed(filters[:-1])
        )
        self.head = _CONVOLUTION[c.dims - 1](c.base, c.classes, 1)

    def forward(self, volume: Tensor) -> Tensor:
        """Logits of the volume's extents."""
        skips: list[Tensor] = []
        x = volume if self.window is None else torch.tanh((volume - self.window[0]) / self.window[1])
        for level, block in enumerate(self.encoder):
            x = block(self.pool(x) if level else x)
            skips.append(x)
        skips.pop()
        for up, block in zip(self.up, self.decoder, strict=True):
            skip = skips.pop()
            x = block(torch.cat([skip, up(x, skip)], dim=1))
        return self.head(x)


class ResNet(nn.Module):
    """(batch, in_channels, *spatial) -> (batch, classes)."""

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        c = config
        self.stem = _convolution_norm(c.dims, c.in_channels, c.filters[0], c.norm, stride=2)
        self.blocks = nn.Sequential(
            *(
                _Residual(c.dims, before, after, c.norm)
                for before, after in zip([c.filters[0], *c.filters], c.filters, strict=False)
            )
        )
        self.pool = _GLOBAL_POOL[c.dims - 1](1)
        self.head = nn.Linear(c.filters[-1], c.classes)

    def forward(self, volume: Tensor) -> Tensor:
        """Logits, one row per volume."""
        x = functional.relu(self.stem(volume))
        return self.head(torch.flatten(self.pool(self.blocks(x)), 1))


def export(
    model: nn.Module,
    example_shape: Sequence[int],
    path: str | os.PathLike[str],
    dynamic: bool = False,
    dtype: DType = "float32",
    exporter: Exporter = "dynamo",
    keep_batch_norm: bool = False,
) -> Path:
    """Write the model as one ONNX file, weights included, and leave no half-written file behind.

    Both exporters keep InstanceNormalization.  By default both fold batch norms into the convolutions before
    them; to keep BatchNormalization, torch.export must leave out its other graph optimisations as well (and
    writes Constant and shape nodes), the tracer need not.

    Args:
        model: in inference mode; left as it was.
        example_shape: (batch, channels, *spatial); the file's shape unless `dynamic`.
        path: the file to write; its folder is made.
        dynamic: leave batch and spatial axes symbolic (batch, depth, height, width).
        dtype: type of the weights and of the input.
        exporter: torch.export with onnxscript ("dynamo"), or the legacy tracer ("torchscript").
        keep_batch_norm: leave batch norms as nodes of their own.

    Raises:
        OSError: when the path cannot be written.
        torch.onnx.OnnxExporterError: for a 1D max pool with dynamic axes by "dynamo" (torch.export keeps its
            extent fixed); the tracer can.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    kind = getattr(torch, dtype)
    # torch.export takes an axis of extent 1 for a constant, so a symbolic batch is traced with two.
    batch = max(2, example_shape[0]) if dynamic else example_shape[0]
    example = torch.zeros(batch, *example_shape[1:], dtype=kind)
    write = _export_dynamo if exporter == "dynamo" else _export_torchscript
    try:
        with _as_type(model, kind), _quiet():
            write(model, example, beside, dynamic, keep_batch_norm)
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)
    return target


def _symbolic_axes(rank: int) -> dict[int, str]:
    return {0: "batch", **dict(zip(range(2, rank), _AXIS_NAMES[5 - rank :], strict=True))}


def _export_dynamo(model: nn.Module, example: Tensor, path: Path, dynamic: bool, keep_batch_norm: bool) -> None:
    torch.onnx.export(
        model,
        (example,),
        path,
        input_names=[INPUT_NAME],
        output_names=[OUTPUT_NAME],
        dynamo=True,
        external_data=False,
        dynamic_shapes=(_symbolic_axes(example.ndim),) if dynamic else None,
        optimize=not keep_batch_norm,
        verbose=False,
    )


def _export_torchscript(model: nn.Module, example: Tensor, path: Path, dynamic: bool, keep_batch_norm: bool) -> None:
    mode = torch.onnx.TrainingMode
    torch.onnx.export(
        model,
        (example,),
        path,
        input_names=[INPUT_NAME],
        output_names=[OUTPUT_NAME],
        dynamo=False,
        dynamic_axes={INPUT_NAME: _symbolic_axes(example.ndim)} if dynamic else None,
        # EVAL folds batch norms into the convolutions; the model itself is in inference mode either way.
        training=mode.PRESERVE if keep_batch_norm else mode.EVAL,
    )


@contextmanager
def _quiet() -> Generator[None]:
    """Without the exporters' remarks on packages that are not installed and on their own age."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def _as_type(model: nn.Module, dtype: torch.dtype) -> Generator[None]:
    before = next(model.parameters()).dtype
    model.to(dtype)
    try:
        yield
    finally:
        model.to(before)


@contextmanager
def _seeded(seed: int) -> Generator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _randomise_norms(model: nn.Module) -> None:
    """Give the norms weights and statistics of their own, or no test could see one that is lost."""
    for module in model.modules():
        if isinstance(module, (*_INSTANCE_NORM, *_BATCH_NORM)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
        if isinstance(module, _BATCH_NORM):
            mean, variance = module.running_mean, module.running_var
            assert mean is not None and variance is not None
            nn.init.normal_(mean, std=0.2)
            nn.init.uniform_(variance, 0.5, 1.5)


def _norm(dims: int, channels: int, norm: Norm) -> nn.Module:
    if norm == "none":
        return nn.Identity()
    if norm == "batch":
        return _BATCH_NORM[dims - 1](channels)
    return _INSTANCE_NORM[dims - 1](channels, affine=True)


def _convolution_norm(dims: int, before: int, after: int, norm: Norm, stride: int = 1) -> nn.Sequential:
    convolution = _CONVOLUTION[dims - 1](before, after, 3, stride=stride, padding=1)
    return nn.Sequential(convolution, _norm(dims, after, norm))


def _double_convolution(dims: int, before: int, after: int, norm: Norm, stride: int) -> nn.Sequential:
    return nn.Sequential(
        *_convolution_norm(dims, before, after, norm, stride),
        nn.LeakyReLU(0.01),
        *_convolution_norm(dims, after, after, norm),
        nn.LeakyReLU(0.01),
    )


def _up(config: UNetConfig, before: int, after: int) -> nn.Module:
    if config.up == "transpose":
        return _TransposedUp(config.dims, before, after, crop=config.down == "stride")
    return _LinearUp(config.dims, before, after)


class _TransposedUp(nn.Module):
    """Twice the extents, then the skip's: strides round extents up (crop), pools round down (zero pad)."""

    def __init__(self, dims: int, before: int, after: int, crop: bool) -> None:
        super().__init__()
        self.transposed = _TRANSPOSED[dims - 1](before, after, 2, stride=2)
        self.crop = crop

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = self.transposed(x)
        if not self.crop:
            missing = [n - m for n, m in zip(skip.shape[2:], x.shape[2:], strict=True)]
            return functional.pad(x, [amount for m in reversed(missing) for amount in (0, m)])
        for axis in range(2, x.ndim):
            x = x.narrow(axis, 0, skip.shape[axis])
        return x


class _LinearUp(nn.Module):
    """A linear resize to the skip's extents, then a 1x1x1 convolution to its channels."""

    def __init__(self, dims: int, before: int, after: int) -> None:
        super().__init__()
        self.mode = _LINEAR_MODE[dims - 1]
        self.project = _CONVOLUTION[dims - 1](before, after, 1)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = functional.interpolate(x, size=skip.shape[2:], mode=self.mode, align_corners=False)
        return self.project(x)


class _Residual(nn.Module):
    """relu(x' + f(x)): two convolutions, the first strided by 2; x' is a strided 1x1x1 projection."""

    def __init__(self, dims: int, before: int, after: int, norm: Norm) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_convolution_norm(dims, before, after, norm, stride=2),
            nn.ReLU(),
            *_convolution_norm(dims, after, after, norm),
        )
        self.shortcut = nn.Sequential(_CONVOLUTION[dims - 1](before, after, 1, stride=2), _norm(dims, after, norm))

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.shortcut(x) + self.body(x))
