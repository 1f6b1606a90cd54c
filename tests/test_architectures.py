"""Published architectures from both torch exporters, partitioned: equal to onnxruntime, nothing gathered.

    make test-architectures      installs the packages that hold them and runs everything here
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from partitioner import dialect
from partitioner.cost import plan_cost
from partitioner.report import is_fallback, is_gather
from partitioner.verify import TOLERANCES
from tests.architectures import ARCHITECTURES, AXES, INPUT_NAME, Architecture, Exporter, export, installed
from tests.oracle import Cuts, compile_plan, error, run_lockstep, run_ort

FAST = ("torch/edsr", "torch/espcn3d", "torch/squeeze-excite2d", "torch/tcn", "torch/restormer")
"""Tried on every change: nothing to install, a second each."""

NOT_EXPORTED: dict[tuple[str, Exporter, bool], str] = {
    ("monai/dints", "dynamo", False): "torch.export: a branch on a tensor",
    ("monai/quicknat", "torchscript", False): "torch._check of a tensor in the tracer",
    ("nnunet/residual-encoder-unet", "dynamo", True): "torch.export: extents halved twice cannot be compared",
    ("smp/pspnet", "torchscript", False): "adaptive pools whose extents are no factors",
    ("smp/upernet", "torchscript", False): "adaptive pools of unknown extents",
}
"""What torch.onnx (2.13) cannot export: (architecture, exporter, open axes), and why."""

Layouts = tuple[tuple[str, dict[str, tuple[float, ...]]], ...]
"""Meshes, and cuts as shares of the axis where they are not even."""

LAYOUTS: dict[int, Layouts] = {
    0: (("batch=2", {}),),
    1: (("width=3", {}), ("width=4", {"width": (0.1, 0.55, 0.8)})),
    2: (("height=3", {}), ("height=2,width=3", {}), ("width=2", {"width": (0.3,)})),
    3: (("depth=2", {}), ("depth=3,width=2", {}), ("depth=2,height=2,width=2", {"height": (0.35,)})),
}


def layouts(architecture: Architecture, shape: tuple[int, ...]) -> Iterator[tuple[str, Cuts]]:
    extents = dict(zip(AXES[3 - architecture.dims:], shape[2:], strict=True))
    for mesh, cuts in LAYOUTS[architecture.dims]:
        yield mesh, {name: (0, *(int(n * extents[name]) for n in shares), extents[name])
                     for name, shares in cuts.items()}


def exported(name: str, exporter: Exporter, dynamic: bool, path: Path) -> onnx.ModelProto:
    if not installed(name.partition("/")[0]):
        pytest.skip("its package is not installed (make test-architectures)")
    reason = NOT_EXPORTED.get((name, exporter, dynamic))
    if reason is not None:
        pytest.skip(f"torch.onnx cannot export it: {reason}")
    export(ARCHITECTURES[name], path, exporter, dynamic)
    return onnx.load(path)


def takes(model: onnx.ModelProto, shape: tuple[int, ...]) -> bool:
    """Whether the file's input has these extents or leaves them open."""
    given = model.graph.input[0].type.tensor_type.shape.dim
    return all(d.dim_value in (0, n) for d, n in zip(given, shape, strict=True))


def whole_results(plan: ir.Model) -> list[str]:
    """Nodes that bring a split tensor (larger than a vector) together, or that run on whole tensors."""
    nodes = [step.node for step in plan_cost(plan).steps]
    return [str(n.name) for n in nodes if is_fallback(n) or (is_gather(n) and not _is_vector(n.outputs[0]))]


def _is_vector(value: ir.Value) -> bool:
    return all(n == 1 for n in dialect.shape_of(value)[2:])


def check(name: str, model: onnx.ModelProto, shape: tuple[int, ...]) -> None:
    """Every layout: errors by `partition verify`'s rule, all layouts reported at once."""
    architecture = ARCHITECTURES[name]
    inputs = {INPUT_NAME: np.random.default_rng(3).standard_normal(shape, dtype=np.float32)}
    expected = run_ort(model, inputs)
    problems: list[str] = []
    for mesh, cuts in layouts(architecture, shape):
        plan = compile_plan(model, mesh, cuts, shapes={INPUT_NAME: shape})
        found = run_lockstep(plan, inputs).outputs
        problems += [f"{mesh} {cuts}: {output} is off by {off:.2g}" for output in expected
                     if not (off := error(found[output], expected[output])) <= TOLERANCES["float32"]]
        if architecture.local and (gathered := whole_results(plan)):
            problems.append(f"{mesh} {cuts}: gathered {gathered}")
    assert not problems, "\n".join(problems)


@pytest.mark.slow
@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_static_export(name: str, exporter: Exporter, tmp_path: Path) -> None:
    check(name, exported(name, exporter, False, tmp_path / "m.onnx"), ARCHITECTURES[name].shape)


@pytest.mark.slow
@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
@pytest.mark.parametrize("name", [name for name, a in ARCHITECTURES.items() if a.other])
def test_dynamic_export_takes_other_extents(name: str, exporter: Exporter, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    assert architecture.other is not None
    model = exported(name, exporter, True, tmp_path / "m.onnx")
    check(name, model, architecture.shape)
    if takes(model, architecture.other):
        check(name, model, architecture.other)


@pytest.mark.parametrize("name", FAST)
def test_without_packages(name: str, tmp_path: Path) -> None:
    check(name, exported(name, "torchscript", False, tmp_path / "m.onnx"), ARCHITECTURES[name].shape)


@functools.cache
def _packages() -> frozenset[str]:
    return frozenset(name.partition("/")[0] for name in ARCHITECTURES)


def test_the_collection_is_broad() -> None:
    assert len(ARCHITECTURES) >= 25
    assert _packages() == {"monai", "nnunet", "smp", "timm", "torch"}
    assert {a.dims for a in ARCHITECTURES.values()} >= {1, 2, 3}
    assert {name for name, _, _ in NOT_EXPORTED} <= set(ARCHITECTURES)
