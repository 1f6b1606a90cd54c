"""The kernels that we differentiate ourselves, against torch's in float64 and at awkward geometries."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from partitioner.ops.kernels import gradients
from partitioner.ops.kernels.convolve import Geometry, convolve
from partitioner.ops.kernels.moments import affine, moments

Tensors = list[torch.Tensor]


def compare(mine: Callable[..., torch.Tensor], theirs: Callable[..., torch.Tensor], inputs: Tensors,
            limit: float) -> None:
    """Values and gradients of a weighted sum; `theirs` in float64."""
    leaves = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in inputs]
    twins = [t.double().requires_grad_() for t in inputs]
    found, expected = mine(*leaves), theirs(*twins)
    cotangent = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    (found * cotangent.to(found.dtype)).sum().backward()
    (expected * cotangent).sum().backward()
    pairs = [(found.detach(), expected.detach()), *((a.grad, b.grad) for a, b in zip(leaves, twins, strict=True))]
    for a, b in pairs:
        assert a is not None and b is not None and a.shape == b.shape
        assert float((a.double() - b).abs().max()) <= limit * max(float(b.abs().max()), 1e-3)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), dims=st.sampled_from((2, 3)), last=st.booleans(), bias=st.booleans())
def test_small_convolutions(data: st.DataObject, dims: int, last: bool, bias: bool) -> None:
    draw = data.draw
    channels, out = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    kernel, stride, dilation = ([draw(st.integers(1, 3)) for _ in range(dims)] for _ in range(3))
    padding = [draw(st.integers(0, 2)) for _ in range(dims)]
    extents = [draw(st.integers(max(1, d * (k - 1) + 1 - 2 * p), 9))
               for k, d, p in zip(kernel, dilation, padding, strict=True)]
    form = (torch.channels_last if dims == 2 else torch.channels_last_3d) if last else torch.contiguous_format
    x = torch.randn(1, channels, *extents).contiguous(memory_format=form)
    w = torch.randn(out, channels, *kernel)
    geometry = Geometry(stride, padding, dilation, 1)
    function = torch.nn.functional.conv2d if dims == 2 else torch.nn.functional.conv3d

    def theirs(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
        return function(x, w, b, stride, padding, dilation)

    def mine(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
        return convolve(x, w, b, geometry)

    compare(mine, theirs, [x, w, *([torch.randn(out)] if bias else [])], 2e-5)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), dims=st.integers(1, 3), last=st.booleans(), bias=st.booleans(), transposed=st.booleans(),
       dtype=st.sampled_from((torch.float32, torch.float64)))
def test_large_convolutions(data: st.DataObject, dims: int, last: bool, bias: bool, transposed: bool,
                            dtype: torch.dtype) -> None:
    """As if every tensor were large: the weight's gradient comes in blocks of few cells, of every sample apart."""
    draw = data.draw
    groups, batch = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    channels, out = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    kernel, stride, dilation = ([draw(st.integers(1, 3)) for _ in range(dims)] for _ in range(3))
    padding = [draw(st.integers(0, min(2, d * (k - 1) // 2))) for k, d in zip(kernel, dilation, strict=True)]
    extents = [draw(st.integers(max(1, d * (k - 1) + 1 - 2 * p), 11))
               for k, d, p in zip(kernel, dilation, padding, strict=True)]
    form = {2: torch.channels_last, 3: torch.channels_last_3d}.get(dims, torch.contiguous_format)
    x = torch.randn(batch, channels, *extents, dtype=dtype)
    x = x.contiguous(memory_format=form) if last else x
    inner = (channels, out // groups) if transposed else (out, channels // groups)
    w = torch.randn(*inner, *kernel, dtype=dtype)
    function = getattr(torch.nn.functional, f"conv{'_transpose' if transposed else ''}{dims}d")

    def theirs(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
        return function(x, w, b, stride=stride, padding=padding, dilation=dilation, groups=groups)

    def mine(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
        return convolve(x, w, b, Geometry(stride, padding, dilation, groups), transposed)

    inputs = [x, w, *([torch.randn(out, dtype=dtype)] if bias else [])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradients, "LARGE", 1)
        patch.setattr(gradients, "BLOCK", draw(st.sampled_from((1, 200, 2000))))
        compare(mine, theirs, inputs, 2e-5 if dtype == torch.float32 else 1e-12)


def test_which_convolutions_are_large() -> None:
    narrow = gradients.Windows([2] * 3, [0] * 3, [1] * 3, 1, False)
    wide = gradients.Windows([2] * 3, [0] * 3, [1] * 3, 1, True)
    for extent, large in ((176, True), (160, False)):
        for many, few in ((64, 8), (8, 64)):  # channels where cells are many, and few
            fine = torch.empty(1, many, extent, 224, 224, device="meta")
            coarse = torch.empty(1, few, extent // 2, 112, 112, device="meta")
            weight = torch.empty(few, many, 2, 2, 2)
            assert gradients.is_large(fine, weight, narrow) == gradients.is_large(coarse, weight, wide) == large
            assert not gradients.is_large(fine.bfloat16(), weight, narrow)


def test_large_convolutions_follow_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "LARGE", 1)
    x, w, b = torch.randn(1, 4, 6, 6, 6), torch.randn(3, 4, 3, 3, 3, requires_grad=True), torch.randn(3)
    found: Tensors = []
    for convolution in (lambda: convolve(x, w, b, Geometry([1] * 3, [1] * 3, [1] * 3, 1)),
                        lambda: torch.nn.functional.conv3d(x, w, b, padding=1)):
        with torch.autocast("cpu", torch.bfloat16):
            result = convolution()
        assert result.dtype == torch.bfloat16
        result.float().square().sum().backward()
        assert w.grad is not None and w.grad.dtype == torch.float32
        found.append(w.grad)
        w.grad = None
    assert (found[0] - found[1]).abs().max() <= 0.02 * found[1].abs().max()


def test_which_convolutions_torch_would_leave_onednn_for() -> None:
    """Twins on both sides of the threshold, and those that it never leaves."""
    weight = torch.empty(4, 8, 3, 3, 3)
    assert gradients.leaves_onednn(torch.empty(1, 8, 40, 64, 2), weight, 1)
    assert not gradients.leaves_onednn(torch.empty(1, 8, 41, 64, 2), weight, 1)
    assert not gradients.leaves_onednn(torch.empty(2, 8, 4, 4, 4), weight, 1)
    assert not gradients.leaves_onednn(torch.empty(1, 8, 4, 4, 4), torch.empty(4, 4, 3, 3, 3), 2)
    assert not gradients.leaves_onednn(torch.empty(1, 8, 9, 9, 9), torch.empty(4, 8, 5, 5, 5), 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 3, 7, 5, 9), (2, 3, 7, 5), (2, 4, 11), (2, 3, 1, 1, 1)])
@pytest.mark.parametrize("last", [False, True])
def test_moments_and_affine(shape: tuple[int, ...], dtype: torch.dtype, last: bool) -> None:
    torch.manual_seed(0)
    forms = {4: torch.channels_last, 5: torch.channels_last_3d}
    x = torch.randn(shape, dtype=dtype) + 3
    x = x.contiguous(memory_format=forms[x.dim()]) if last and x.dim() in forms else x
    axes = [0, *range(2, len(shape))]
    column = [1, shape[1], *[1] * (len(shape) - 2)]

    def theirs(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        mean = x.mean(axes, keepdim=True)
        m2 = (x - mean).square().sum(axes, keepdim=True)
        return (x * a + b) * mean + m2 * x

    def mine(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        count, mean, m2 = moments(x, axes)
        assert int(count) == x.numel() // x.shape[1]
        return affine(x, a, b) * mean + m2 * x

    limit = 1e-5 if dtype == torch.float32 else 1e-12
    compare(mine, theirs, [x, torch.randn(column, dtype=dtype), torch.randn(column, dtype=dtype)], limit)


def test_sums_over_many_cells_do_not_lose_digits() -> None:
    """As many cells as a volume has, far from zero."""
    x = (torch.randn(1, 4, 48, 96, 96) + 10).contiguous(memory_format=torch.channels_last_3d).requires_grad_()
    variance, mean = torch.var_mean(x.detach().double(), (0, 2, 3, 4), correction=0)
    count, found, m2 = moments(x, (0, 2, 3, 4))
    assert float((found.detach().flatten() - mean).abs().max()) < 3e-6
    assert float((m2.detach().flatten() / count - variance).abs().max()) < 3e-6
    factor = torch.ones(1, 4, 1, 1, 1, requires_grad=True)
    affine(x, factor, torch.zeros(1, 4, 1, 1, 1)).sum().backward()
    total = x.detach().double().sum((0, 2, 3, 4))
    assert factor.grad is not None and float((factor.grad.flatten() / total - 1).abs().max()) < 1e-6


def test_a_large_mean_does_not_drown_the_variance() -> None:
    x = (torch.randn(1, 4, 16, 16, 16) + 1000).contiguous(memory_format=torch.channels_last_3d)
    exact = torch.var_mean(x.double(), (0, 2, 3, 4), correction=0)[0]
    _, _, m2 = moments(x.requires_grad_(), (0, 2, 3, 4))
    assert float((m2.detach().flatten() / 4096 - exact).abs().max()) < 1e-3
