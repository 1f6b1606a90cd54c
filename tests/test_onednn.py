"""oneDNN called by its own interface: exact for every geometry, and written where it is told."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn import functional

from partitioner.ops.kernels import onednn, onednn_library
from partitioner.ops.kernels.onednn import Task, kernel_for

pytestmark = pytest.mark.skipif(not onednn.is_available(), reason="the package onednn-cpu-gomp is not installed")


def convolve(data: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, task: Task,
             into: torch.Tensor | None = None) -> torch.Tensor | None:
    """The result of the kernel for a task, if there is one."""
    kernel = kernel_for(weight, task)
    return None if kernel is None else kernel.run(data, bias, into)


@st.composite
def tasks(draw: st.DrawFn) -> Task:
    rank = draw(st.sampled_from([2, 3]))
    groups = draw(st.sampled_from([1, 1, 2, 3, 8]))
    inner, outer = (draw(st.sampled_from([1, 2, 3, 5, 8, 16, 17, 32])) for _ in range(2))
    transposed = draw(st.booleans())

    def axes(values: list[int]) -> tuple[int, ...]:
        return tuple(draw(st.sampled_from(values)) for _ in range(rank))

    weight = (inner * groups, outer) if transposed else (outer * groups, inner)
    padding = tuple(zip(axes([0, 1, 1, 2, 3]), axes([0, 1, 1, 2, 4]), strict=True))
    task = Task((draw(st.sampled_from([1, 1, 2])), inner * groups, *axes([1, 2, 3, 5, 8, 13])),
                (*weight, *axes([1, 2, 3, 3, 5])), draw(st.booleans()), axes([1, 1, 2, 3]), axes([1, 1, 2]), padding,
                groups, None if transposed else draw(st.sampled_from([None, 0.2])), transposed)
    assume(min(task.result) > 0)
    return task


def stored_last(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous(memory_format=torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d)


def reference(task: Task, data: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """By torch, padded and cropped by hand."""
    rank = data.dim() - 2
    if task.transposed:
        kernel = functional.conv_transpose2d if rank == 2 else functional.conv_transpose3d
        full = kernel(data, weight, bias, task.stride, groups=task.groups, dilation=task.dilation)
        for axis, (lo, hi) in enumerate(task.padding):
            full = full.narrow(axis + 2, lo, full.shape[axis + 2] - lo - hi)
        return full
    kernel = functional.conv2d if rank == 2 else functional.conv3d
    padded = functional.pad(data, [n for pair in reversed(task.padding) for n in pair])
    full = kernel(padded, weight, bias, task.stride, groups=task.groups, dilation=task.dilation)
    return full if task.slope is None else functional.leaky_relu(full, task.slope)


@settings(max_examples=300, deadline=None)
@given(tasks(), st.booleans(), st.integers(0, 2))
def test_every_geometry_is_that_of_torch_in_float64(task: Task, fixed: bool, room: int) -> None:
    """Results into memory of their own, into given memory, and into some channels of a wider tensor are the same."""
    with torch.inference_mode(fixed), torch.no_grad():
        data, weight = stored_last(torch.randn(task.data)), torch.randn(task.weight)
        bias = torch.randn(task.channels) if task.has_bias else None
        wide = stored_last(torch.full((task.result[0], task.channels + room, *task.result[2:]), float("nan")))
        into = wide[:, : task.channels]
        found = convolve(data, weight, bias, task)
        if found is None:
            return
        assert convolve(data, weight, bias, task, into) is into
        assert torch.equal(into, found) and wide[:, task.channels :].isnan().all()
        wide_bias = None if bias is None else bias.double()
        expected = reference(task, data.double(), weight.double(), wide_bias)
        scale = reference(task, data.double().abs(), weight.double().abs(), None if bias is None else wide_bias.abs())
    assert found.shape == expected.shape
    assert float(((found - expected).abs() / scale.clamp_min(1e-3)).max()) < 1e-6


def layer(slope: float | None = None) -> tuple[torch.Tensor, torch.Tensor, Task]:
    data, weight = stored_last(torch.randn(1, 16, 6, 7, 8)), torch.randn(16, 16, 3, 3, 3)
    return data, weight, Task((1, 16, 6, 7, 8), (16, 16, 3, 3, 3), False, (1,) * 3, (1,) * 3, ((1, 1),) * 3, 1, slope)


@torch.no_grad()
@pytest.mark.parametrize("slope", [None, 0.1])
def test_a_nan_reaches_all_that_depend_on_it(slope: float | None) -> None:
    data, weight, task = layer(slope)
    data[0, 3, 3, 3, 3] = float("nan")
    found = convolve(data, weight, None, task)
    assert found is not None and int(found.isnan().sum()) == 16 * 27


@torch.no_grad()
def test_weights_that_change_are_seen() -> None:
    data, weight, task = layer()
    first = convolve(data, weight, None, task)
    weight.data.mul_(2.0)
    second = convolve(data, weight, None, task)
    assert first is not None and second is not None and torch.equal(second, 2.0 * first)


@torch.inference_mode()
def test_weights_that_cannot_change_are_packed_once_and_go_with_their_tensor() -> None:
    data, weight, task = layer()
    convolve(data, weight, None, task)
    convolve(data[:, :, 1:].contiguous(memory_format=torch.channels_last_3d), weight, None,
             Task((1, 16, 5, 7, 8), *(getattr(task, n) for n in ("weight", "has_bias", "stride", "dilation")),
                  ((0, 1), (1, 1), (1, 1)), 1))
    kernels = onednn._kernels()[weight]
    assert len({k.packed.cells.data_ptr() for k in kernels.values() if k is not None}) == 1 < len(kernels)
    count = len(onednn._kernels())
    del weight, kernels
    assert len(onednn._kernels()) == count - 1


def test_it_can_be_switched_off() -> None:
    code = "from partitioner.ops.kernels import onednn; print(onednn.is_installed(), onednn.is_available())"
    for switch, said in (("off", "False False"), ("/nowhere/libdnnl.so.3", "False False"), (__file__, "True False")):
        run = subprocess.run([sys.executable, "-c", code], env={**os.environ, onednn_library.SWITCH: switch},
                             capture_output=True, text=True, check=True)
        assert run.stdout.strip() == said


@torch.inference_mode()
def test_the_number_of_threads_does_not_change_the_bits() -> None:
    data, weight, task = layer()
    count, found = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            result = convolve(data, weight, None, task)
        finally:
            torch.set_num_threads(count)
        assert result is not None
        found.append(np.asarray(result).tobytes())
    assert len(set(found)) == 1
