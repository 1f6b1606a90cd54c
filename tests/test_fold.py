"""Blocks added up to images (Col2Im): fold and unfold as torch exports them, rows of the image on several ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper
from onnx_ir import to_proto
from torch import nn
from torch.nn import functional

from partitioner import dialect
from passes.expand import expand
from tests.examples import one_graph
from tests.oracle import as_double, close, compile_plan, reference64, run_lockstep, run_ort
from tests.test_architectures import whole_results
from tests.test_spellings_exported import Lambda, export

Array = np.ndarray


def again(x: torch.Tensor) -> torch.Tensor:
    """Overlapping blocks taken out and added up, divided by how often each cell was taken."""
    blocks = functional.unfold(x, (3, 2), padding=(1, 0), stride=(2, 1))
    return functional.fold(blocks.tanh(), x.shape[2:], (3, 2), padding=(1, 0), stride=(2, 1))


def apart(x: torch.Tensor) -> torch.Tensor:
    """Patches beside one another, as transformers of images put theirs together."""
    n, c, h, w = x.shape
    patches = x.reshape(n, c, h // 2, 2, w // 3, 3).permute(0, 1, 3, 5, 2, 4).reshape(n, c * 6, -1)
    return functional.fold(patches.sigmoid(), (h, w), (2, 3), stride=(2, 3))


@pytest.mark.parametrize(("layer", "shape"), [(again, (2, 3, 11, 6)), (apart, (2, 3, 10, 6))])
def test_exported_by_torch(layer: Callable[[torch.Tensor], torch.Tensor], shape: tuple[int, ...]) -> None:
    model = export(nn.Sequential(Lambda(layer), nn.Conv2d(3, 2, 3, padding=1)).eval(), shape, "dynamo", 18, False)
    assert any(node.op_type == "Col2Im" for node in model.graph.node)
    inputs = {"x": np.random.default_rng(2).standard_normal(shape).astype(np.float32)}
    expected = run_ort(model, inputs)["y"]
    for mesh, cuts in (("height=2", {"height": (0, 3, shape[2])}), ("height=3", {"height": (0, 5, 5, shape[2])}),
                       ("batch=2,height=2", {})):
        plan = compile_plan(model, mesh, cuts)
        assert not whole_results(plan), mesh
        assert close(run_lockstep(plan, inputs).outputs["y"], expected, 4e-6), mesh
        assert close(run_ort(to_proto(expand(plan)), inputs)["y"], expected, 4e-6), mesh


@pytest.mark.parametrize("attributes", [
    {}, {"strides": [2, 3]}, {"pads": [1, 2, 0, 1]}, {"dilations": [2, 3]}, {"strides": [4, 1], "pads": [0, 1, 3, 1]}])
def test_blocks_cut_anywhere(attributes: Mapping[str, list[int]]) -> None:
    """Cuts inside a row of blocks; cells that no block reaches."""
    image, block = (9, 7), (3, 2)
    stride, pads, dilation = (attributes.get(key, default) for key, default in (
        ("strides", [1, 1]), ("pads", [0] * 4), ("dilations", [1, 1])))
    counts = [(image[i] + pads[i] + pads[i + 2] - dilation[i] * (block[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)]
    x = np.random.default_rng(3).standard_normal((2, 12, counts[0] * counts[1])).astype(np.float32)
    node = helper.make_node("Col2Im", ["x", "image", "block"], ["y"], "fold", **attributes)
    model = one_graph([node], {"x": x}, {"image": np.array(image), "block": np.array(block)},
                      {"y": (TensorProto.FLOAT, (2, 2, *image))}, 18)
    double, wide = as_double(model), {"x": x.astype(np.float64)}
    exact, length = reference64(double, wide)["y"], x.shape[2]
    for cuts in ((0, 1, length), (0, length // 2, length // 2, length), (0, 2, 5, length)):
        mesh = f"width={len(cuts) - 1}"
        plan = compile_plan(model, mesh, {"width": cuts})
        assert not any(node.op_type == dialect.RESHARD for node in plan.graph)
        assert close(run_lockstep(plan, {"x": x}).outputs["y"], run_ort(model, {"x": x})["y"], 2e-6)
        assert close(run_ort(to_proto(expand(plan)), {"x": x})["y"], run_ort(model, {"x": x})["y"], 2e-6)
        assert close(run_lockstep(compile_plan(double, mesh, {"width": cuts}), wide).outputs["y"], exact, 1e-12)
