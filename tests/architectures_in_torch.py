"""Published networks written out in torch, small: those that no package in the `networks` group holds."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Residual(nn.Module):
    """x + scale * body(x)."""

    def __init__(self, body: nn.Module, scale: float = 1.0) -> None:
        super().__init__()
        self.body, self.scale = body, scale

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.body(x)


class EDSR(nn.Module):
    """Enhanced deep residual super-resolution (Lim et al. 2017): residual blocks, pixel shuffle, no norms."""

    def __init__(self, width: int = 8, blocks: int = 3, factor: int = 2) -> None:
        super().__init__()
        body = [Residual(nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
                                       nn.Conv2d(width, width, 3, padding=1)), 0.1) for _ in range(blocks)]
        self.head = nn.Conv2d(3, width, 3, padding=1)
        self.body = Residual(nn.Sequential(*body, nn.Conv2d(width, width, 3, padding=1)))
        self.tail = nn.Sequential(nn.Conv2d(width, width * factor**2, 3, padding=1), nn.PixelShuffle(factor),
                                  nn.Conv2d(width, 3, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.body(self.head(x)))


def espcn(factor: int = 3) -> nn.Module:
    """Efficient sub-pixel convolution (Shi et al. 2016)."""
    return nn.Sequential(nn.Conv2d(1, 16, 5, padding=2), nn.Tanh(), nn.Conv2d(16, 8, 3, padding=1), nn.Tanh(),
                         nn.Conv2d(8, factor**2, 3, padding=1), nn.PixelShuffle(factor), nn.Sigmoid())


def fsrcnn() -> nn.Module:
    """Fast super-resolution (Dong et al. 2016): a transposed convolution of kernel 9 and stride 3 at the end."""
    return nn.Sequential(nn.Conv2d(1, 12, 5, padding=2), nn.PReLU(12), nn.Conv2d(12, 6, 1), nn.PReLU(6),
                         nn.Conv2d(6, 6, 3, padding=1), nn.PReLU(6), nn.Conv2d(6, 12, 1), nn.PReLU(12),
                         nn.ConvTranspose2d(12, 1, 9, stride=3, padding=4, output_padding=2))


class Voxels(nn.Module):
    """Pixel shuffle in three dimensions: view, permute, view."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        r = self.factor
        b, c, d, h, w = x.shape
        x = x.reshape(b, c // r**3, r, r, r, d, h, w).permute(0, 1, 5, 2, 6, 3, 7, 4)
        return x.reshape(b, c // r**3, d * r, h * r, w * r)


def espcn3d(factor: int = 2) -> nn.Module:
    """Sub-pixel convolution for volumes, as in mDCSRN and its kin."""
    return nn.Sequential(nn.Conv3d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv3d(8, factor**3, 3, padding=1),
                         Voxels(factor))


class RDB(nn.Module):
    """Residual dense block of ESRGAN."""

    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(width + i * growth, growth if i < 4 else width, 3, padding=1)
                                    for i in range(5))

    def forward(self, x: Tensor) -> Tensor:
        parts = [x]
        for layer in self.layers[:-1]:
            parts.append(F.leaky_relu(layer(torch.cat(parts, 1)), 0.2))
        return x + 0.2 * self.layers[-1](torch.cat(parts, 1))


class RRDBNet(nn.Module):
    """ESRGAN's generator (Wang et al. 2018): residual in residual, nearest-neighbour upsampling."""

    def __init__(self, width: int = 6, growth: int = 4) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.trunk = Residual(nn.Sequential(RDB(width, growth), RDB(width, growth)), 0.2)
        self.up, self.last = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.trunk(self.first(x))
        return self.last(F.leaky_relu(self.up(F.interpolate(x, scale_factor=2, mode="nearest")), 0.2))


def dncnn() -> nn.Module:
    """Denoising by residual learning (Zhang et al. 2017)."""
    layers: list[nn.Module] = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU()]
    for _ in range(3):
        layers += [nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    return Residual(nn.Sequential(*layers, nn.Conv2d(8, 1, 3, padding=1)), -1.0)


class SqueezeExcite(nn.Module):
    """Channels weighted by a small network of their means (Hu et al. 2018)."""

    def __init__(self, width: int, dims: int) -> None:
        super().__init__()
        self.dims = dims
        self.gate = nn.Sequential(nn.Linear(width, max(width // 4, 1)), nn.ReLU(),
                                  nn.Linear(max(width // 4, 1), width), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        means = x.mean(dim=tuple(range(2, x.ndim)))
        return x * self.gate(means).reshape(x.shape[0], -1, *(1,) * self.dims)


class SENetClassifier(nn.Module):
    """Strided convolutions with squeeze-and-excite, adaptive pooling, flatten, linear."""

    def __init__(self, dims: int, classes: int = 5) -> None:
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
        pool = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[dims - 1]
        self.body = nn.Sequential(
            conv(1, 8, 7, stride=2, padding=3), norm(8), nn.SiLU(), SqueezeExcite(8, dims),
            conv(8, 12, 3, stride=2, padding=1), norm(12), nn.Hardswish(), SqueezeExcite(12, dims))
        self.head = nn.Sequential(pool(1), nn.Flatten(), nn.Dropout(0.3), nn.Linear(12, classes), nn.Softmax(-1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def conv_mixer(width: int = 8, depth: int = 3, patch: int = 3) -> nn.Module:
    """ConvMixer (Trockman & Kolter 2022): patches, wide depthwise convolutions, pooled head."""
    blocks = [nn.Sequential(
        Residual(nn.Sequential(nn.Conv2d(width, width, 9, groups=width, padding="same"), nn.GELU(),
                               nn.BatchNorm2d(width))),
        nn.Conv2d(width, width, 1), nn.GELU(), nn.BatchNorm2d(width)) for _ in range(depth)]
    return nn.Sequential(nn.Conv2d(3, width, patch, stride=patch), nn.GELU(), nn.BatchNorm2d(width), *blocks,
                         nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), nn.Linear(width, 5))


class R2Plus1D(nn.Module):
    """Video: each 3D convolution split into space (1, 3, 3) and time (3, 1, 1) (Tran et al. 2018)."""

    def __init__(self, widths: tuple[int, ...] = (4, 8, 8), classes: int = 5) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv3d(3, widths[0], (1, 7, 7), (1, 2, 2), (0, 3, 3), bias=False),
                                   nn.BatchNorm3d(widths[0]), nn.ReLU(),
                                   nn.Conv3d(widths[0], widths[0], (3, 1, 1), padding=(1, 0, 0))]
        for a, b in itertools.pairwise(widths):
            layers += [nn.Conv3d(a, b, (1, 3, 3), (1, 2, 2), (0, 1, 1), bias=False), nn.BatchNorm3d(b), nn.ReLU(),
                       nn.Conv3d(b, b, (3, 1, 1), (2, 1, 1), (1, 0, 0), bias=False), nn.BatchNorm3d(b), nn.ReLU()]
        self.body, self.head = nn.Sequential(*layers), nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.adaptive_avg_pool3d(self.body(x), 1).flatten(1))


class TCN(nn.Module):
    """Temporal convolutional network (Bai et al. 2018): dilated causal convolutions, chomped at the end."""

    def __init__(self, width: int = 6, levels: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Conv1d(1 if i == 0 else width, width, 3, padding=2 * 2**i, dilation=2**i) for i in range(levels))
        self.last = nn.Conv1d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            y = F.relu(layer(x)[..., : -2 * 2**i])
            x = y if i == 0 else x + y
        return self.last(x)


class WaveNet(nn.Module):
    """WaveNet's gated residual stack with skips (van den Oord et al. 2016), pads before each convolution."""

    def __init__(self, width: int = 6, levels: int = 4) -> None:
        super().__init__()
        self.first = nn.Conv1d(1, width, 1)
        self.gates = nn.ModuleList(nn.Conv1d(width, 2 * width, 2, dilation=2**i) for i in range(levels))
        self.skips = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in range(levels))
        self.last = nn.Sequential(nn.ReLU(), nn.Conv1d(width, 8, 1), nn.LogSoftmax(1))

    def forward(self, x: Tensor) -> Tensor:
        x, total = self.first(x), torch.zeros(())
        for i, (gate, skip) in enumerate(zip(self.gates, self.skips, strict=True)):
            a, b = gate(F.pad(x, (2**i, 0))).chunk(2, 1)
            y = skip(torch.tanh(a) * torch.sigmoid(b))
            x, total = x + y, total + y
        return self.last(total)


class ConvTasNet(nn.Module):
    """Speech separation (Luo & Mesgarani 2019): learnt filterbank, global layer norm, masks."""

    def __init__(self, filters: int = 8, width: int = 6, speakers: int = 2) -> None:
        super().__init__()
        self.encoder = nn.Conv1d(1, filters, 16, stride=8, bias=False)
        self.start = nn.Sequential(nn.GroupNorm(1, filters), nn.Conv1d(filters, width, 1))
        self.blocks = nn.ModuleList(Residual(nn.Sequential(
            nn.Conv1d(width, 12, 1), nn.PReLU(), nn.GroupNorm(1, 12),
            nn.Conv1d(12, 12, 3, padding=2**i, dilation=2**i, groups=12), nn.PReLU(), nn.GroupNorm(1, 12),
            nn.Conv1d(12, width, 1))) for i in range(3))
        self.masks = nn.Sequential(nn.PReLU(), nn.Conv1d(width, speakers * filters, 1), nn.Sigmoid())
        self.decoder = nn.ConvTranspose1d(filters, 1, 16, stride=8, bias=False)
        self.speakers = speakers

    def forward(self, x: Tensor) -> Tensor:
        codes = self.encoder(x)
        y = self.start(codes)
        for block in self.blocks:
            y = block(y)
        masks = self.masks(y).chunk(self.speakers, 1)
        return torch.cat([self.decoder(codes * mask) for mask in masks], 1)


class LayerNorm2d(nn.Module):
    """Mean and variance over channels at each position."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean) / (variance + 1e-6).sqrt()
        return self.weight.reshape(1, -1, 1, 1) * x + self.bias.reshape(1, -1, 1, 1)


class NAFBlock(nn.Module):
    """Gates by halves of the channels, attention over channels by their means."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = LayerNorm2d(width), LayerNorm2d(width)
        self.spread = nn.Sequential(nn.Conv2d(width, 2 * width, 1), nn.Conv2d(2 * width, 2 * width, 3, padding=1,
                                                                             groups=2 * width))
        self.attend, self.join = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, width, 1)), nn.Conv2d(
            width, width, 1)
        self.wide, self.narrow = nn.Conv2d(width, 2 * width, 1), nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.spread(self.norm1(x)).chunk(2, 1)
        y = a * b
        x = x + self.join(y * self.attend(y))
        a, b = self.wide(self.norm2(x)).chunk(2, 1)
        return x + self.narrow(a * b)


class NAFNet(nn.Module):
    """Image restoration without activations (Chen et al. 2022)."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 3, 3, padding=1)
        self.encode, self.down = NAFBlock(width), nn.Conv2d(width, 2 * width, 2, 2)
        self.middle = NAFBlock(2 * width)
        self.up = nn.Sequential(nn.Conv2d(2 * width, 4 * width, 1, bias=False), nn.PixelShuffle(2))
        self.decode = NAFBlock(width)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.encode(self.first(x))
        y = self.up(self.middle(self.down(skip)))
        return x + self.last(self.decode(y + skip))


class ChannelAttention(nn.Module):
    """Restormer's transposed attention: channels attend to channels, positions are summed over."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv = nn.Sequential(nn.Conv2d(width, 3 * width, 1), nn.Conv2d(3 * width, 3 * width, 3, padding=1,
                                                                          groups=3 * width))
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        q, k, v = (t.reshape(b, self.heads, c // self.heads, h * w) for t in self.qkv(x).chunk(3, 1))
        weights = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * self.scale).softmax(-1)
        return self.out((weights @ v).reshape(b, c, h, w))


def restormer(width: int = 8) -> nn.Module:
    """Restoration transformer (Zamir et al. 2022) of two blocks."""
    return nn.Sequential(nn.Conv2d(3, width, 3, padding=1), Residual(ChannelAttention(width, 2)),
                         Residual(nn.Sequential(nn.Conv2d(width, 2 * width, 1), nn.GELU(),
                                                nn.Conv2d(2 * width, width, 1))), nn.Conv2d(width, 3, 3, padding=1))


class NonLocal(nn.Module):
    """Every position attends to every other (Wang et al. 2018)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Conv3d(width, width // 2, 1) for _ in range(3))
        self.out = nn.Conv3d(width // 2, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).flatten(2) for layer in (self.query, self.key, self.value))
        y = (q.transpose(1, 2) @ k).softmax(-1) @ v.transpose(1, 2)
        return x + self.out(y.transpose(1, 2).reshape(x.shape[0], -1, *x.shape[2:]))


def non_local() -> nn.Module:
    """A convolution, a non-local block and a convolution on volumes."""
    return nn.Sequential(nn.Conv3d(1, 8, 3, stride=2, padding=1), NonLocal(8), nn.Conv3d(8, 2, 3, padding=1))


class CBAM(nn.Module):
    """Convolutional block attention (Woo et al. 2018): channels by pooled means and maxima, then positions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.shared = nn.Sequential(nn.Conv2d(width, width // 2, 1), nn.ReLU(), nn.Conv2d(width // 2, width, 1))
        self.place = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.sigmoid(self.shared(F.adaptive_avg_pool2d(x, 1)) + self.shared(F.adaptive_max_pool2d(x, 1)))
        return x * torch.sigmoid(self.place(torch.cat([x.mean(1, True), x.max(1, True)[0]], 1)))


def cbam() -> nn.Module:
    """Two convolutions with CBAM between."""
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), CBAM(8), nn.Conv2d(8, 4, 3, padding=1))


class ShuffleUnit(nn.Module):
    """ShuffleNet's unit: half the channels pass, then channels of both halves interleave (Ma et al. 2018)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.branch = nn.Sequential(nn.Conv2d(half, half, 1), nn.BatchNorm2d(half), nn.ReLU(),
                                    nn.Conv2d(half, half, 3, padding=1, groups=half), nn.BatchNorm2d(half),
                                    nn.Conv2d(half, half, 1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        y = torch.cat([a, self.branch(b)], 1)
        n, c, h, w = y.shape
        return y.reshape(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def shuffle_net() -> nn.Module:
    """Strided stem and two shuffle units, fully convolutional."""
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.MaxPool2d(3, 2, 1), ShuffleUnit(8),
                         ShuffleUnit(8), nn.Conv2d(8, 4, 1), nn.Upsample(scale_factor=4, mode="bilinear"))


class SPP(nn.Module):
    """YOLO's spatial pyramid: max pools of growing windows, stride 1, concatenated; a box head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 6, 2, 2), nn.SiLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.SiLU())
        self.join = nn.Sequential(nn.Conv2d(32, 8, 1), nn.SiLU(), nn.Upsample(scale_factor=2), nn.Conv2d(8, 6, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        pools = [F.max_pool2d(x, k, 1, k // 2) for k in (5, 9, 13)]
        y = self.join(torch.cat([x, *pools], 1))
        boxes, scores = y.split((4, 2), 1)
        return torch.cat([boxes.sigmoid() * 2 - 0.5, scores.softmax(1)], 1)
