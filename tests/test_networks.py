"""Exported networks of each kind on 1D, 2D and 3D meshes: equal to onnxruntime, nothing gathered."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest

from partitioner import dialect
from tests.models import INPUT_NAME, NETWORKS, OUTPUT_NAME, Network
from tests.oracle import as_double, compile_plan, error, reference64, run_lockstep, run_ort

MESHES = {
    1: ("width=3", "batch=2,width=2"),
    2: ("height=2", "height=2,width=3", "width=5"),
    3: ("depth=2", "depth=3,width=2", "depth=2,height=2,width=2"),
}


def meshes(network: Network, shape: Sequence[int]) -> list[str]:
    return [m for m in MESHES[network.config.dims] if shape[0] > 1 or "batch" not in m]


def check(model: onnx.ModelProto, shape: Sequence[int], mesh: str) -> None:
    x = {INPUT_NAME: np.random.default_rng(3).standard_normal(shape, dtype=np.float32)}
    plan = compile_plan(model, mesh, shapes={INPUT_NAME: shape})
    found = run_lockstep(plan, x).outputs[OUTPUT_NAME]
    expected = run_ort(model, x)[OUTPUT_NAME]
    assert error(found, expected) < 1e-4
    gathered = [n for n in plan.graph if n.op_type == dialect.RESHARD]
    assert not gathered, f"gathered: {[n.name for n in gathered]}"


@pytest.mark.parametrize("name", NETWORKS)
def test_static_export(name: str, tmp_path: Path) -> None:
    network = NETWORKS[name]
    model = onnx.load(network.export(tmp_path / "m.onnx", keep_batch_norm=True))
    for mesh in meshes(network, network.shape):
        check(model, network.shape, mesh)


@pytest.mark.parametrize("name", NETWORKS)
def test_dynamic_export_takes_other_extents(name: str, tmp_path: Path) -> None:
    network = NETWORKS[name]
    model = onnx.load(network.export(tmp_path / "m.onnx", dynamic=True))
    for shape in (network.shape, network.other_shape):
        check(model, shape, meshes(network, shape)[-1])


@pytest.mark.parametrize("name", ["unet3d-stride-instance", "unet2d-maxpool-instance-bilinear", "resnet3d"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_new_exporter(name: str, dynamic: bool, tmp_path: Path) -> None:
    network = NETWORKS[name]
    model = onnx.load(network.export(tmp_path / "m.onnx", dynamic=dynamic, exporter="dynamo"))
    check(model, network.other_shape if dynamic else network.shape, MESHES[network.config.dims][-1])


@pytest.mark.parametrize("name", ["unet3d-stride-instance", "unet3d-maxpool-batch-trilinear", "resnet2d-instance"])
def test_float64_against_the_reference(name: str, tmp_path: Path) -> None:
    network = NETWORKS[name]
    model = onnx.load(network.export(tmp_path / "m.onnx", exporter="dynamo"))  # it writes no shape arithmetic
    x = {INPUT_NAME: np.random.default_rng(3).standard_normal(network.shape)}
    expected = reference64(model, x)[OUTPUT_NAME]
    for mesh in meshes(network, network.shape):
        found = run_lockstep(compile_plan(as_double(model), mesh), x).outputs[OUTPUT_NAME]
        assert error(found, expected) < 1e-12
