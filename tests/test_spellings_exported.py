"""Layers as torch.onnx (both exporters), TensorFlow and Keras write them: equal to onnxruntime, nothing gathered."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import parser
from torch import nn
from torch.nn import functional

from partitioner.loader import load_model
from passes.canonicalize import Canonicalize
from passes.pipeline import Pipeline
from tests.examples import one_graph
from tests.oracle import compile_plan, run_lockstep, run_ort
from tests.spellings import check_form, check_results, integers, operators, random
from tests.test_architectures import whole_results

Exporter = Literal["torchscript", "dynamo"]
Meshes = Mapping[str, Mapping[str, tuple[int, ...]]]
PLANE: Meshes = {"height=3": {"height": (0, 3, 3, 8)}, "height=2,width=2": {"width": (0, 5, 12)}}
VOLUME: Meshes = {"depth=2": {"depth": (0, 1, 4)}, "height=3": {"height": (0, 2, 5, 6)},
                  "depth=2,width=2": {"width": (0, 1, 5)}}


class Lambda(nn.Module):
    """A module of one function."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


class SqueezeExcite(nn.Module):
    """Channels weighted by their means."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weigh = nn.Sequential(nn.Linear(channels, 2), nn.ReLU(), nn.Linear(2, channels), nn.Sigmoid())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = self.weigh(x.mean((2, 3)) if x.dim() == 4 else functional.adaptive_avg_pool3d(x, 1).flatten(1))
        return x * weights.reshape(*weights.shape, *[1] * (x.dim() - 2))


def channel_shuffle(x: torch.Tensor) -> torch.Tensor:
    n, c, *space = x.shape
    return x.view(n, 2, c // 2, *space).transpose(1, 2).reshape(n, c, *space)


def pixel_shuffle(x: torch.Tensor) -> torch.Tensor:
    n, c, h, w = x.shape
    return x.view(n, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, c // 4, 2 * h, 2 * w)


def pixel_unshuffle(x: torch.Tensor) -> torch.Tensor:
    n, c, h, w = x.shape
    return x.view(n, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(n, 4 * c, h // 2, w // 2)


def voxel_shuffle(x: torch.Tensor) -> torch.Tensor:
    n, c, d, h, w = x.shape
    return x.view(n, c // 8, 2, 2, 2, d, h, w).permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(n, c // 8, 2 * d, 2 * h, 2 * w)


def trained(*layers: nn.Module) -> nn.Module:
    """Layers in inference, with weights and statistics that do not cancel."""
    net = nn.Sequential(*layers).eval()
    torch.manual_seed(7)
    with torch.no_grad():
        for name, value in (*net.named_parameters(), *net.named_buffers()):
            if value.dtype == torch.float32:
                value.uniform_(0.5 if "var" in name else -0.5, 1.5 if "var" in name else 0.5)
    return net


@dataclass(frozen=True)
class Net:
    """Layers, the extents of their input, and operators that must be (or must not be) in the canonical model."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...] = (1, 8, 8, 12)
    has: frozenset[str] = frozenset()
    lacks: frozenset[str] = frozenset()


RESHAPES = frozenset({"Reshape", "Mul", "Add"})
NETS = {
    "group norm": Net(lambda: trained(nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU()), lacks=RESHAPES,
                      has=frozenset({"GroupNormalization"})),
    "group norm, one group": Net(lambda: trained(nn.GroupNorm(1, 8, eps=1e-3)), lacks=RESHAPES,
                                 has=frozenset({"GroupNormalization"})),
    "group norm, a group per channel": Net(lambda: trained(nn.Conv3d(8, 8, 3, padding=1, groups=8), nn.GroupNorm(8, 8)),
                                           (1, 8, 4, 6, 5), lacks=RESHAPES, has=frozenset({"InstanceNormalization"})),
    "group norm of volumes": Net(lambda: trained(nn.GroupNorm(2, 8), nn.Conv3d(8, 4, 3)), (1, 8, 4, 6, 5),
                                 lacks=RESHAPES, has=frozenset({"GroupNormalization"})),
    "group norm without numbers": Net(lambda: trained(nn.GroupNorm(4, 8, affine=False)), lacks=RESHAPES,
                                      has=frozenset({"GroupNormalization"})),
    "batch norm": Net(lambda: trained(nn.Conv2d(8, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
                                      nn.ConvTranspose2d(4, 6, 2, 2, groups=2), nn.BatchNorm2d(6)),
                      lacks=frozenset({"BatchNormalization"})),
    "zero pad": Net(lambda: trained(nn.ZeroPad2d((1, 2, 0, 1)), nn.Conv2d(8, 4, 3)), lacks=frozenset({"Pad"})),
    "gelu": Net(lambda: trained(nn.GELU(), nn.GELU("tanh"))),
    "mish, hard swish": Net(lambda: trained(nn.Mish(), nn.Hardswish(), nn.SiLU()),
                            lacks=frozenset({"Softplus", "Clip"})),
    "squeeze and excite": Net(lambda: trained(SqueezeExcite(8), nn.Conv2d(8, 4, 3))),
    "squeeze and excite of volumes": Net(lambda: trained(SqueezeExcite(8)), (1, 8, 4, 6, 5)),
    "channel shuffle": Net(lambda: trained(nn.Conv2d(8, 8, 3, padding=1, groups=2), Lambda(channel_shuffle))),
    "channel shuffle of volumes": Net(lambda: trained(Lambda(channel_shuffle)), (1, 8, 4, 6, 5)),
    "pixel shuffle": Net(lambda: trained(Lambda(pixel_shuffle), nn.Conv2d(2, 4, 3))),
    "pixel unshuffle": Net(lambda: trained(Lambda(pixel_unshuffle), nn.Conv2d(32, 4, 3, padding=1))),
    "voxel shuffle": Net(lambda: trained(nn.Conv3d(8, 8, 3, padding=1), Lambda(voxel_shuffle)), (1, 8, 4, 6, 5)),
    "upsample": Net(lambda: trained(nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(8, 2, 3))),
    "upsample to extents": Net(lambda: trained(Lambda(
        lambda x: functional.interpolate(x, size=(2 * x.shape[2], 2 * x.shape[3]), mode="nearest")))),
    "upsample of volumes": Net(lambda: trained(Lambda(
        lambda x: functional.interpolate(x, scale_factor=2.0, mode="trilinear"))), (1, 8, 4, 6, 5)),
    "roll": Net(lambda: trained(nn.Conv2d(8, 4, 3, padding=1), Lambda(
        lambda x: torch.cat((x[:, :, 3:], x[:, :, :3]), 2)))),
    "shifted windows": Net(lambda: trained(Lambda(lambda x: torch.roll(x, (2, 3), (2, 3))))),
}


def export(net: nn.Module, shape: tuple[int, ...], exporter: Exporter, opset: int, is_open: bool) -> onnx.ModelProto:
    x, axes = torch.zeros(shape), {axis: f"n{axis}" for axis in range(2, len(shape))} if is_open else {}
    file = io.BytesIO()
    if exporter == "dynamo":
        names = {axis: torch.export.Dim.DYNAMIC for axis in axes}
        torch.onnx.export(net, (x,), file, dynamo=True, opset_version=opset, input_names=["x"], output_names=["y"],
                          dynamic_shapes=(names,) if is_open else None, verbose=False)
    else:
        torch.onnx.export(net, (x,), file, dynamo=False, opset_version=opset, input_names=["x"], output_names=["y"],
                          dynamic_axes={"x": axes} if is_open else None)
    return onnx.load_from_string(file.getvalue())


@pytest.mark.parametrize(("exporter", "opset", "is_open"), [
    ("torchscript", 11, False), ("torchscript", 17, True), ("dynamo", 18, False)])
@pytest.mark.parametrize("name", NETS)
def test_exported_by_torch(name: str, exporter: Exporter, opset: int, is_open: bool) -> None:
    net = NETS[name]
    model = export(net.make(), net.shape, exporter, opset, is_open)
    check_plan(model, net.shape, PLANE if len(net.shape) == 4 else VOLUME)
    found = set(operators(Pipeline((Canonicalize({"x": net.shape}),)).run(load_model(model))))
    since = {"Softplus": 18, "Clip": 14}  # Mish, HardSwish
    assert found >= net.has and not {op for op in net.lacks & found if opset >= since.get(op, 0)}


def check_plan(model: onnx.ModelProto, shape: tuple[int, ...], meshes: Meshes) -> None:
    inputs = {"x": np.random.default_rng(3).standard_normal(shape, dtype=np.float32)}
    expected = run_ort(model, inputs)
    read = Pipeline((Canonicalize({"x": shape}),)).run(load_model(model))
    check_form(read, ["y"])
    check_results(run_ort(ir.to_proto(read), inputs), expected)
    for mesh, cuts in meshes.items():
        plan = compile_plan(model, mesh, cuts, shapes={"x": shape})
        check_results(run_lockstep(plan, inputs).outputs, expected)
        assert not whole_results(plan), (mesh, operators(plan))


KERAS = [
    "a = Transpose<perm=[0,3,1,2]>(x)", "b = Pad(a, pads)", "c = Conv<strides=[2,2]>(b, w)",
    "d = Mul(c, scale)", "e = Add(d, bias)", "f = Transpose<perm=[0,2,3,1]>(e)",
    "m = ReduceMean<axes=[1,2]>(f)", "g = Sub(f, m)", "h = Mul(g, g)", "v = ReduceMean<axes=[1,2]>(h)",
    "i = Add(v, epsilon)", "j = Sqrt(i)", "k = Reciprocal(j)", "l = Mul(k, gamma)", "n = Mul(f, l)",
    "o = Mul(m, l)", "p = Sub(beta, o)", "q = Add(n, p)", "r = Reshape(q, groups)",
    "s = Transpose<perm=[0,1,2,4,3]>(r)", "t = Reshape(s, back)",
    "u = GlobalAveragePool(e)", "z = Transpose<perm=[0,2,3,1]>(u)", "y = Mul(t, z)"]
"""A convolution with SAME padding and folded batch norm, instance norm, channel shuffle and gate, channels last."""


@pytest.mark.parametrize("opset", [7, 13])
def test_channels_last(opset: int) -> None:
    constants = {"pads": integers(0, 0, 0, 0, 0, 0, 1, 1), "w": random(4, 3, 3, 3), "scale": random(1, 4, 1, 1),
                 "bias": random(4, 1, 1, seed=1), "epsilon": np.float32(1e-3), "gamma": random(4, seed=2),
                 "beta": random(4, seed=3), "groups": integers(0, 0, 0, 2, 2), "back": integers(0, 0, 0, 4)}
    lines = list(KERAS)
    if opset < 11:
        lines[1] = "b = Pad<pads=[0,0,0,0,0,0,1,1]>(a)"
    inputs = {"x": np.zeros((1, 10, 14, 3), np.float32)}
    model = one_graph([parser.parse_node(line) for line in lines], inputs, constants, {"y": (1, ())}, opset)
    model.graph.output[0].type.tensor_type.ClearField("shape")
    found = operators(Pipeline((Canonicalize({}),)).run(load_model(model)))
    assert found[:2] == ["Transpose", "Conv"] and found[2] == "Transpose"
    check_plan(model, (1, 10, 14, 3), {"height=2": {}, "height=3,width=2": {"width": (0, 3, 14)}})
