"""Exported networks of each kind on 1D, 2D and 3D meshes: equal to the torch module, nothing gathered."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from partitioner import dialect
from passes.base import Pass
from passes.canonicalize import Canonicalize
from passes.keep_apart import KeepApart
from passes.split_reductions import SplitReductions
from tests.models import INPUT_NAME, NETWORKS, OUTPUT_NAME, Network
from tests.oracle import Cuts, compile_plan, error, ort_bits, reference64, run_lockstep, run_ort

Layouts = tuple[tuple[str, Mapping[str, tuple[float, ...]]], ...]
"""Meshes, and cuts as shares of the axis where they are not even; equal ones leave a shard empty."""

LAYOUTS: dict[int, Layouts] = {
    1: (("width=3", {}), ("batch=2,width=2", {}), ("width=4", {"width": (0.1, 0.1, 0.8)})),
    2: (("height=2", {}), ("height=2,width=3", {}), ("width=5", {}), ("height=3", {"height": (0.4, 0.45)})),
    3: (("depth=2", {}), ("depth=3,width=2", {}), ("depth=2,height=2,width=2", {}),
        ("depth=3,height=2", {"depth": (0.7, 0.7), "height": (0.3,)})),
}


def layouts(network: Network, shape: Sequence[int]) -> list[tuple[str, Cuts]]:
    extents = dict(zip(("depth", "height", "width")[3 - network.config.dims :], shape[2:], strict=True))
    return [(mesh, {name: (0, *(int(n * extents[name]) for n in shares), extents[name])
                    for name, shares in cuts.items()})
            for mesh, cuts in LAYOUTS[network.config.dims] if shape[0] > 1 or "batch" not in mesh]


def volume(shape: Sequence[int]) -> np.ndarray:
    return np.random.default_rng(3).standard_normal(tuple(shape), dtype=np.float32)


@functools.cache
def expected(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """What the torch module itself yields in float64."""
    with torch.no_grad():
        return NETWORKS[name].build().double()(torch.from_numpy(volume(shape)).double()).numpy()


def check(name: str, model: onnx.ModelProto, shape: tuple[int, ...], layout: tuple[str, Cuts]) -> None:
    x = {INPUT_NAME: volume(shape)}
    mesh, cuts = layout
    plan = compile_plan(model, mesh, cuts, shapes={INPUT_NAME: shape})
    found = run_lockstep(plan, x).outputs[OUTPUT_NAME]
    limit = 3 * error(run_ort(model, x)[OUTPUT_NAME], expected(name, shape))
    assert error(found, expected(name, shape)) <= limit, f"{mesh} {cuts}: limit {limit}"
    gathered = [n for n in plan.graph if n.op_type == dialect.RESHARD]
    assert not gathered, f"gathered: {[n.name for n in gathered]}"


@pytest.mark.parametrize("name", NETWORKS)
def test_static_export(name: str, tmp_path: Path) -> None:
    network = NETWORKS[name]
    model = onnx.load(network.export(tmp_path / "m.onnx", keep_batch_norm=True))
    for layout in layouts(network, network.shape):
        check(name, model, network.shape, layout)


@pytest.mark.parametrize("name", NETWORKS)
def test_dynamic_export_takes_other_extents(name: str, tmp_path: Path) -> None:
    network = NETWORKS[name]
    model = onnx.load(network.export(tmp_path / "m.onnx", dynamic=True))
    for shape in (network.shape, network.other_shape):
        for layout in layouts(network, shape)[-2:]:
            check(name, model, shape, layout)


@pytest.mark.parametrize("name", ["unet3d-stride-instance", "unet2d-maxpool-instance-bilinear", "resnet3d"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_new_exporter(name: str, dynamic: bool, tmp_path: Path) -> None:
    network = NETWORKS[name]
    model = onnx.load(network.export(tmp_path / "m.onnx", dynamic=dynamic, exporter="dynamo"))
    shape = network.other_shape if dynamic else network.shape
    check(name, model, shape, layouts(network, shape)[-1])


@pytest.mark.parametrize("name", NETWORKS)
def test_float64(name: str, tmp_path: Path) -> None:
    """Below 1e-12 of the reference on the file; both near the torch module, whose epsilons are no float32 numbers."""
    network = NETWORKS[name]
    model = onnx.load(network.export(tmp_path / "m.onnx", dtype="float64", keep_batch_norm=True))
    x = {INPUT_NAME: volume(network.shape).astype(np.float64)}
    reference = reference64(model, x)[OUTPUT_NAME]
    assert error(reference, expected(name, network.shape)) < 1e-7
    for mesh, cuts in layouts(network, network.shape):
        found = run_lockstep(compile_plan(model, mesh, cuts), x).outputs[OUTPUT_NAME]
        assert error(found, reference) < 1e-12, f"{mesh} {cuts}"


@pytest.mark.parametrize("name", NETWORKS)
def test_communication_keeps_the_bits(name: str, tmp_path: Path) -> None:
    """onnxruntime on the model after every pass: only those before layouts and split-reductions may change a bit."""
    network = NETWORKS[name]
    model = onnx.load(network.export(tmp_path / "m.onnx", keep_batch_norm=True))
    x = {INPUT_NAME: volume(network.shape)}
    bits: list[dict[str, bytes]] = []

    def observe(index: int, item: Pass, plan: ir.Model) -> None:
        found = ort_bits(plan, x)
        arithmetic = isinstance(item, Canonicalize | KeepApart | SplitReductions)
        assert arithmetic or found == bits[-1], f"{item.name} changed the result"
        bits.append(found)

    mesh, cuts = layouts(network, network.shape)[-1]
    compile_plan(model, mesh, cuts, observe=[observe])
    assert len(bits) == 10
