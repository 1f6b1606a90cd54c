"""The convolution kernels on every storage, against torch in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch.nn import functional

from partitioner.ops.kernels.convolve import Geometry, convolve


@dataclass(frozen=True)
class Trial:
    """A convolution: extents and geometry per spatial axis, storage of the data and of the weight."""

    batch: int
    channels: int
    filters: int
    groups: int
    extents: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    last: bool
    bias: bool
    transposed: bool = False
    margin: int = 0

    @property
    def is_possible(self) -> bool:
        axes = zip(self.extents, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        if self.transposed:
            return all((n - 1) * s + (k - 1) * d + 1 - 2 * p >= 1 for n, k, s, p, d in axes)
        return all((k - 1) * d + 1 <= n + 2 * p for n, k, _, p, d in axes)


def stored(random: np.random.Generator, shape: tuple[int, ...], last: bool, margin: int = 0) -> torch.Tensor:
    """Random numbers, channels last or first; with a margin, a view into something larger."""
    order = [0, *range(2, len(shape)), 1] if last else list(range(len(shape)))
    wide = (*shape[:-1], shape[-1] + margin)
    array = torch.from_numpy(random.standard_normal([wide[a] for a in order], dtype=np.float32))
    return array.permute([order.index(a) for a in range(len(order))]).narrow(-1, margin, shape[-1])


def check(trial: Trial, random: np.random.Generator) -> None:
    inner = (trial.channels, trial.filters // trial.groups) if trial.transposed else (
        trial.filters, trial.channels // trial.groups)
    data = stored(random, (trial.batch, trial.channels, *trial.extents), trial.last, trial.margin)
    weight = stored(random, (*inner, *trial.kernel), trial.last)
    bias = stored(random, (trial.filters,), False) if trial.bias else None
    geometry = Geometry(trial.stride, trial.padding, trial.dilation, trial.groups)
    with torch.inference_mode():
        found = convolve(data, weight, bias, geometry, trial.transposed)
    name = f"conv{'_transpose' if trial.transposed else ''}{len(trial.extents)}d"
    expected = getattr(functional, name)(
        data.double(), weight.double(), None if bias is None else bias.double(), stride=trial.stride,
        padding=trial.padding, dilation=trial.dilation, groups=trial.groups)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 1e-4 * (1 + expected.abs().max()), trial


def test_any_geometry_on_any_storage() -> None:
    random = np.random.default_rng(11)
    count = 0
    while count < 1500:
        dims, groups = int(random.integers(1, 4)), int(random.choice([1, 1, 1, 2]))
        axes = [tuple(int(v) for v in random.integers(low, high, dims))
                for low, high in ((1, 10), (1, 6), (1, 4), (0, 4))]
        trial = Trial(
            int(random.integers(1, 3)), groups * int(random.choice([1, 1, 2, 3, 16])),
            groups * int(random.choice([1, 2, 8])), groups, axes[0], axes[1], axes[2], axes[3],
            tuple(int(d) for d in random.choice([1, 1, 1, 2], dims)), bool(random.integers(0, 2)),
            bool(random.integers(0, 2)), bool(random.integers(0, 2)), int(random.choice([0, 0, 3])))
        if trial.is_possible:
            check(trial, random)
            count += 1


# torch 2.13's oneDNN: wrong numbers, then a crash
WRONG = Trial(3, 1, 1, 1, (4, 3), (2, 4), (1, 2), (1, 1), (1, 1), last=True, bias=False)
CRASH = Trial(1, 16, 3, 1, (9, 1), (3, 1), (2, 2), (2, 1), (1, 2), last=True, bias=True)


@pytest.mark.parametrize("trial", [
    WRONG, replace(WRONG, batch=1, filters=8), replace(WRONG, extents=(5, 4, 3), kernel=(1, 2, 4), stride=(2, 1, 2),
                                                       padding=(0, 1, 1), dilation=(1, 1, 1)),
    CRASH, replace(CRASH, batch=2), replace(CRASH, extents=(5, 7, 1), kernel=(4, 4, 1), stride=(2, 2, 2),
                                            padding=(1, 2, 1), dilation=(1, 1, 2)),
])
def test_channels_last_tensors_that_onednn_reads_beyond(trial: Trial) -> None:
    check(trial, np.random.default_rng(5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_right_where_one_output_is_left(dtype: torch.dtype) -> None:
    """With AMX, oneDNN returns wrong numbers here."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(1, 7, 9, 3, 6, generator=draw).movedim(-1, 1).to(dtype)
    weight = torch.randn(12, 3, 3, 3, 6, generator=draw).movedim(-1, 1).to(dtype)
    geometry = Geometry((2, 2, 2), (1, 1, 0), (1, 1, 1), 1)
    with torch.inference_mode():
        found = convolve(x, weight, None, geometry)
    expected = torch.nn.functional.conv3d(x.double(), weight.double(), stride=2, padding=(1, 1, 0))
    with torch.autocast("cpu", dtype):
        trained = convolve(x.float(), weight.float().requires_grad_(), None, geometry)
    assert torch.equal(trained.detach(), found)
    assert found.dtype == dtype and (found.double() - expected).abs().max() < 0.01 * expected.abs().max()
