"""Voxels that are no numbers are kept, counted and reported."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from runtime.census import not_finite
from tests.command import SHAPE, convolution, model, run_here, value, volume


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    onnx.save(convolution(), tmp_path / "m.onnx")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int16])
def test_counts(dtype: torch.dtype) -> None:
    cells = torch.zeros(5, 7, 3).to(dtype).transpose(0, 1)
    assert not_finite(cells) == 0 and not_finite(cells[:0]) == 0
    if not dtype.is_floating_point:
        return
    cells.fill_(torch.finfo(dtype).max)  # finite, although their sum is not
    assert not_finite(cells) == 0
    cells[0, 1, 2], cells[6, 4, 0], cells[3, 3, 1] = float("nan"), float("inf"), -float("inf")
    assert not_finite(cells) == 3


@pytest.mark.parametrize("backend", ["lockstep", pytest.param("gloo", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["x.npy", "x.npz"])
def test_a_run_says_how_many(folder: Path, backend: str, name: str) -> None:
    x = volume()
    x[0, 0, 3, 5, 2], x[0, 1, 6, 10, 4], x[0, 1, 0, 0, 0] = np.nan, np.inf, np.nan
    (np.save if name == "x.npy" else np.savez_compressed)(name, x)
    found = run_here("run", "m.onnx", "--mesh", "depth=2,height=3", "--input", name, "--output", "y.npy", "--backend",
                     backend, "--json")
    assert found.code == 0
    assert found.err == f"partition: note: {name}: 3 voxels are NaN or infinite; they spread as the network has it\n"
    assert json.loads(found.out)["not_finite"] == {"x": 3}
    spread = ~np.isfinite(np.load("y.npy"))
    assert spread.any() and not spread.all() and spread[0, 0, 2:5, 4:7, 1:4].all()


def test_what_several_ranks_hold_counts_once(folder: Path) -> None:
    """A vector that is not split."""
    node = onnx.helper.make_node("Mul", ["x", "v"], ["y"])
    onnx.save(model([node], [value("x", SHAPE), value("v", (5,))], [value("y", SHAPE)]), "m.onnx")
    np.save("x.npy", volume())
    np.save("v.npy", np.array([1, np.nan, 1, 1, 1], np.float32))
    found = run_here("run", "m.onnx", "--mesh", "depth=3", "--input", "x=x.npy", "--input", "v=v.npy", "--output",
                     "y.npy")
    assert (found.code, found.err) == (
        0, "partition: note: v.npy: 1 voxel is NaN or infinite; it spreads as the network has it\n")
    assert np.isnan(np.load("y.npy")).sum() == np.prod(SHAPE) // 5
