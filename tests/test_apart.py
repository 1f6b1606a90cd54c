"""Axes that the mesh splits, merged behind others: kept apart where that can be followed, and then nothing is gathered.

Every case is compared with onnxruntime, in float64 with the reference, and in the expanded form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn
from torch.nn import functional

import partitioner as pt
from partitioner import dialect
from partitioner.loader import load_model
from partitioner.mesh import Mesh
from passes.canonicalize import Canonicalize
from passes.expand import expand
from passes.keep_apart import KeepApart
from passes.pipeline import Pipeline
from tests.oracle import compile_plan, run_lockstep, run_ort
from tests.spellings import (
    Spelling,
    canonical,
    changed,
    check_form,
    check_results,
    check_shards,
    integers,
    operators,
    random,
)
from tests.test_architectures import whole_results
from tests.test_spellings_exported import Exporter, export, trained

Array = np.ndarray
Layout = tuple[str, Mapping[str, tuple[int, ...]]]


def signed(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def found_on(spelling: Spelling, mesh: str) -> list[str]:
    """The operators after canonicalize for a mesh."""
    model = Pipeline((Canonicalize({}), KeepApart(Mesh.parse(mesh)))).run(load_model(spelling.model()))
    check_form(model, spelling.outputs)
    return operators(model)


def check(spelling: Spelling, layouts: Sequence[Layout]) -> None:
    """What the first mesh leaves, and the results on all; a mesh that splits nothing leaves the file's own nodes."""
    model, inputs = spelling.model(), spelling.inputs
    assert found_on(spelling, layouts[0][0]) == spelling.operators
    assert operators(canonical(model)) == found_on(spelling, "batch=1") == changed(spelling).operators
    check_shards(model, inputs, run_ort(model, inputs), spelling.local, layouts)


# --- sums of products over flattened axes ---------------------------------------------------------------

SPACE: list[Layout] = [("width=2", {"width": (0, 3, 7)}), ("height=3,width=2", {"height": (0, 4, 4, 9)}),
                       ("batch=2,height=2", {"height": (0, 1, 9)}), ("height=2", {"height": (0, 0, 9)})]
LINE: list[Layout] = [("width=3", {"width": (0, 2, 2, 8)}), ("width=2", {})]
CUBE: list[Layout] = [("depth=2,height=2,width=2", {"width": (0, 1, 4)}), ("height=3", {"height": (0, 3, 3, 5)})]
HEAD = Spelling(["a = Flatten(x)", "y = Gemm<transB=1>(a, w, b)"],
                {"w": signed(4, 6 * 9 * 7), "b": signed(4, seed=1)}, ["Einsum", "Add"])
DENSE = replace(HEAD, lines=["a = Reshape(x, flat)", "y = MatMul(a, w)"], becomes=["Einsum"],
                constants={"w": signed(6 * 9 * 7, 4), "flat": integers(2, -1)})
HEADS = {
    "torch": (HEAD, SPACE),
    **{f"opset {n}": (replace(HEAD, opset=n), SPACE[:1]) for n in (12, 13, 21)},
    "no bias": (replace(HEAD, lines=["a = Flatten(x)", "y = Gemm<transB=1>(a, w)"], becomes=["Einsum"],
                        constants={"w": signed(4, 6 * 9 * 7)}), SPACE),
    "columns last": (replace(HEAD, lines=["a = Flatten(x)", "y = Gemm(a, w, b)"],
                             constants={**HEAD.constants, "w": signed(6 * 9 * 7, 4)}), SPACE),
    "one bias": (replace(HEAD, constants={**HEAD.constants, "b": signed(1, 1)}), SPACE[:1]),
    "product": (DENSE, SPACE),
    "cells between": (replace(DENSE, lines=["a = Reshape(x, flat)", "c = Relu(a)", "d = Mul(c, scale)",
                                            "y = MatMul(d, w)"], becomes=["Relu", "Mul", "Einsum"],
                              constants={**DENSE.constants, "scale": signed(378)}), SPACE),
    "rows are kept": (replace(DENSE, constants={"w": signed(9 * 7, 4), "flat": integers(0, 0, -1)}), SPACE),
    "two layers": (replace(HEAD, lines=["a = Flatten(x)", "c = Gemm<transB=1>(a, w, b)", "d = Relu(c)",
                                        "y = Gemm(d, v)"], becomes=["Einsum", "Add", "Relu", "Gemm"],
                           constants={**HEAD.constants, "v": signed(4, 3)}), SPACE[:2]),
    "flat twice": (replace(HEAD, lines=["a = Reshape(x, planes)", "c = Sigmoid(a)", "d = Flatten(c)",
                                        "y = Gemm<transB=1>(d, w, b)"], becomes=["Sigmoid", "Einsum", "Add"],
                           constants={**HEAD.constants, "planes": integers(0, 0, -1)}), SPACE),
    "lines": (replace(HEAD, shape=(2, 6, 8), constants={**HEAD.constants, "w": signed(4, 48)}), LINE),
    "volumes": (replace(HEAD, shape=(2, 3, 4, 5, 4), constants={**HEAD.constants, "w": signed(4, 240)}), CUBE),
    "one channel": (replace(HEAD, shape=(1, 1, 9, 7), constants={**HEAD.constants, "w": signed(4, 63)},
                            becomes=["Reshape", "Einsum", "Add"]), SPACE[:2]),
    "read twice": (replace(HEAD, lines=[*HEAD.lines, "z = Gemm<transB=1>(a, w)"], outputs=["y", "z"],
                           becomes=["Einsum", "Add", "Einsum"]), SPACE[:2]),
}
NO_HEADS = {
    "before Einsum": changed(HEAD, opset=11, local=False),
    "flat cells leave the graph": changed(HEAD, outputs=["y", "a"], local=False),
    "flat cells are compared": changed(DENSE, lines=[*DENSE.lines, "z = Softmax(a)"], outputs=["y", "z"], local=False),
    "weights from data": changed(DENSE, others={"w": signed(378, 4)}, constants={"flat": integers(2, -1)}, local=False),
    "a factor in front": changed(HEAD, 1, "y = Gemm<transB=1,alpha=0.5>(a, w, b)", local=False),
    "a bias per row": changed(HEAD, constants={**HEAD.constants, "b": signed(2, 1)}, local=False),
    "the other way round": changed(DENSE, lines=["a = Reshape(x, flat)", "y = Gemm<transA=1>(a, w)"], local=False,
                                   constants={"w": signed(2, 4), "flat": integers(2, -1)}),
    "axes that are mixed": changed(DENSE, lines=["a = Reshape(x, mixed)", "y = MatMul(a, w)"], local=False,
                                   constants={"w": signed(14, 4), "mixed": integers(2, 27, 14)}),
}


@pytest.mark.parametrize("case", HEADS.values(), ids=HEADS)
def test_sums_over_flattened_space(case: tuple[Spelling, Sequence[Layout]]) -> None:
    check(*case)


@pytest.mark.parametrize("spelling", NO_HEADS.values(), ids=NO_HEADS)
def test_flattened_space_that_is_needed_flat(spelling: Spelling) -> None:
    check(spelling, SPACE[1:2])


def test_space_that_begins_with_the_split_axis_stays_flat() -> None:
    spelling = changed(HEAD, shape=(1, 1, 9, 7), constants={**HEAD.constants, "w": signed(4, 63)})
    check(spelling, [("height=2", {"height": (0, 2, 9)})])


# --- convolutions of all space ---------------------------------------------------------------------------

CONV = Spelling(["y = Conv(x, w, b)"], {"w": signed(4, 6, 9, 7), "b": signed(4, seed=1)}, ["Einsum", "Add", "Reshape"])
CONVS = {
    "plane": (CONV, SPACE),
    "no bias": (replace(CONV, lines=["y = Conv(x, w)"], constants={"w": signed(4, 6, 9, 7)},
                        becomes=["Einsum", "Reshape"]), SPACE),
    "strides": (changed(CONV, 0, "y = Conv<strides=[3,2]>(x, w, b)", becomes=CONV.becomes), SPACE[:1]),
    "a kernel per channel": (replace(CONV, lines=["y = Conv<group=6>(x, w, b)"], constants={
        "w": signed(6, 1, 9, 7), "b": signed(6)}), SPACE),
    "lines": (replace(CONV, shape=(2, 6, 8), constants={"w": signed(4, 6, 8), "b": signed(4)}), LINE),
    "volumes": (replace(CONV, shape=(1, 3, 4, 5, 4), constants={"w": signed(2, 3, 4, 5, 4), "b": signed(2)}), CUBE),
}
NO_CONVS = {
    "before Einsum": changed(CONV, opset=11),
    "one row less": changed(CONV, constants={**CONV.constants, "w": signed(4, 6, 8, 7)}),
    "groups": changed(CONV, 0, "y = Conv<group=2>(x, w, b)", constants={**CONV.constants, "w": signed(4, 3, 9, 7)}),
    "padding": changed(CONV, 0, "y = Conv<pads=[0,0,1,0]>(x, w, b)",
                       constants={**CONV.constants, "w": signed(4, 6, 10, 7)}),
    "weights from data": changed(CONV, others={"w": signed(4, 6, 9, 7)}, constants={"b": signed(4)}),
}


@pytest.mark.parametrize("case", CONVS.values(), ids=CONVS)
def test_convolutions_of_all_space_send_sums(case: tuple[Spelling, Sequence[Layout]]) -> None:
    check(*case)
    mesh, cuts = case[1][0]
    plan = compile_plan(case[0].model(), mesh, cuts)
    assert "HaloExchange" not in operators(plan) and "AllReduce" in operators(plan)


@pytest.mark.parametrize("spelling", NO_CONVS.values(), ids=NO_CONVS)
def test_convolutions_that_stay(spelling: Spelling) -> None:
    check(replace(spelling, local=False), SPACE[1:2])


# --- rows of several cases -------------------------------------------------------------------------------

CASES: list[Layout] = [("batch=2", {"batch": (0, 1, 3)}), ("batch=3", {"batch": (0, 2, 2, 3)}),
                       ("batch=2,width=2", {"width": (0, 5, 8)})]
ROWS = Spelling(["t = Transpose<perm=[2,0,1]>(x)", "a = Reshape(t, flat)", "c = Gemm<transB=1>(a, w, b)",
                 "d = Reshape(c, back)", "y = Transpose<perm=[1,2,0]>(d)"],
                {"w": signed(5, 6), "b": signed(5, seed=1), "flat": integers(24, 6), "back": integers(8, 3, 5)},
                ["Transpose", "MatMul", "Add", "Transpose"], shape=(3, 6, 8))
_INNER = {"Gelu": ["c1 = Gelu(c)"], "LayerNormalization": ["c1 = LayerNormalization(c, scale)"],
          "Softmax": ["c1 = Softmax(c)"], "LogSoftmax": ["c1 = LogSoftmax<axis=1>(c)"],
          "ReduceL2": ["n = ReduceL2(c, last)", "c1 = Div(c, n)"], "Slice": ["c1 = Slice(c, start, end, last)"],
          "Split": ["c1, c2 = Split<axis=1,num_outputs=2>(c)"], "Concat": ["c1 = Concat<axis=1>(c, b1)"],
          "Gather": ["c1 = Gather<axis=1>(c, chosen)"], "Cast": ["e = Cast<to=11>(c)", "c1 = CastLike(e, c)"],
          "Expand": ["n = ReduceMax(c, last)", "c1 = Expand(n, wide)"],
          "Unsqueeze": ["e = Unsqueeze(c, last)", "c1 = Squeeze(e, last)"],
          "ReduceMean": ["n = ReduceMean(c, first)", "c1 = Sub(c, n)"],
          "ReduceMax": ["n = ReduceMax<keepdims=0>(c, first)", "c1 = Sub(c, n)"],
          "positions": ["c1 = Add(c, place)"]}
_EXTENTS = {"Slice": 2, "Split": 3, "Concat": 10, "Gather": 3}


def inner(name: str) -> Spelling:
    """A layer between the product and the reshape back."""
    lines = [*ROWS.lines[:3], *_INNER[name], "d = Reshape(c1, back)", ROWS.lines[4]]
    constants = {**ROWS.constants, "scale": random(5), "last": integers(-1), "first": integers(0),
                 "start": integers(-3), "end": integers(4), "b1": signed(24, 5, seed=4), "chosen": integers(4, 0, 0),
                 "wide": integers(24, 5), "place": signed(24, 1, seed=5), "back": integers(8, 3, _EXTENTS.get(name, 5))}
    return changed(ROWS, lines=lines, constants=constants, opset=20)


NO_ROWS = {
    "the rows leave the graph": changed(ROWS, outputs=["y", "c"]),
    "the rows are compared": changed(ROWS, lines=[*ROWS.lines[:3], "e = Softmax<axis=0>(c)", "d = Reshape(e, back)",
                                                  ROWS.lines[4]]),
    "the rows are summed up": changed(ROWS, lines=[*ROWS.lines[:3], "e = CumSum(c, first)", "d = Reshape(e, back)",
                                                  ROWS.lines[4]], constants={**ROWS.constants, "first": integers(0)}),
    "other rows afterwards": changed(ROWS, constants={**ROWS.constants, "back": integers(6, 4, 5)}),
    "rows beside a tensor of data": changed(ROWS, lines=[*ROWS.lines[:3], "e = Add(c, k)", "d = Reshape(e, back)",
                                                         ROWS.lines[4]], others={"k": signed(24, 5)}),
}


@pytest.mark.parametrize("opset", [7, 11, 13, 17])
def test_rows_of_several_cases(opset: int) -> None:
    check(replace(ROWS, opset=opset), CASES)


@pytest.mark.parametrize("name", _INNER)
def test_layers_over_the_last_axis(name: str) -> None:
    spelling = inner(name)
    model, inputs = spelling.model(), spelling.inputs
    kinds = {"Split": "Split", "positions": "Add"}
    assert kinds.get(name, name if name != "Unsqueeze" else "Reshape") in found_on(spelling, "batch=3")
    check_shards(model, inputs, run_ort(model, inputs), True, CASES)


@pytest.mark.parametrize("spelling", NO_ROWS.values(), ids=NO_ROWS)
def test_rows_that_are_needed_as_one(spelling: Spelling) -> None:
    check(replace(spelling, local=False), CASES[:1])


# --- attention, as torch exports it ----------------------------------------------------------------------


class Attention(nn.Module):
    """nn.MultiheadAttention over all positions."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.inner, self.norm = nn.MultiheadAttention(8, 2, batch_first=batch_first), nn.LayerNorm(8)
        self.batch_first = batch_first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        t = self.norm(x.flatten(2).transpose(1, 2))
        t = t if self.batch_first else t.transpose(0, 1)
        y = t + self.inner(t, t, t, need_weights=False)[0]
        return (y if self.batch_first else y.transpose(0, 1)).transpose(1, 2).reshape(x.shape)


class Windows(nn.Module):
    """Attention inside of windows, with a bias per position and a mask per window, as Swin has them."""

    def __init__(self, masked: bool, window: int = 4) -> None:
        super().__init__()
        self.qkv, self.project, self.norm = nn.Linear(8, 24), nn.Linear(8, 8), nn.LayerNorm(8)
        self.bias = nn.Parameter(torch.randn(2, window**2, window**2))
        self.masked, self.window = masked, window

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, c, h, w = x.shape
        size = self.window
        t = x.permute(0, 2, 3, 1).reshape(n, h // size, size, w // size, size, c)
        t = self.norm(t.permute(0, 1, 3, 2, 4, 5).reshape(-1, size * size, c))
        q, k, v = self.qkv(t).reshape(-1, size * size, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) / 2 + self.bias
        if self.masked:
            count = (h // size) * (w // size)
            mask = torch.arange(count * size**2, dtype=x.dtype).reshape(1, count, 1, 1, size**2)
            scores = (scores.reshape(n, count, 2, size**2, size**2) + mask.cos()).reshape(scores.shape)
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(-1, size * size, c)
        y = t + functional.gelu(self.project(y))
        y = y.reshape(n, h // size, w // size, size, size, c).permute(0, 1, 3, 2, 4, 5)
        return y.reshape(n, h, w, c).permute(0, 3, 1, 2)


class WindowsOfTorch(nn.Module):
    """nn.MultiheadAttention inside of windows."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.inner, self.batch_first = nn.MultiheadAttention(8, 2, batch_first=batch_first), batch_first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, c, h, w = x.shape
        t = x.permute(0, 2, 3, 1).reshape(n, h // 4, 4, w // 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, c)
        t = t if self.batch_first else t.transpose(0, 1)
        y = self.inner(t, t, t, need_weights=False)[0]
        y = y if self.batch_first else y.transpose(0, 1)
        y = y.reshape(n, h // 4, w // 4, 4, 4, c).permute(0, 1, 3, 2, 4, 5)
        return y.reshape(n, h, w, c).permute(0, 3, 1, 2)


def _thirds(x: torch.Tensor, axis: int) -> list[torch.Tensor]:
    return [x.narrow(axis, start, 8) for start in (0, 8, 16)]


class Channels(nn.Module):
    """Attention of channels to one another, over all of space, as Restormer has it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.project = nn.Conv2d(8, 24, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, c, h, w = x.shape
        q, k, v = (t.reshape(n, 2, c // 2, h * w) for t in _thirds(self.qkv(x), 1))
        q, k = functional.normalize(q, dim=-1), functional.normalize(k, dim=-1)
        y = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return x + self.project(y.reshape(n, c, h, w))


class LinearAttention(nn.Module):
    """Attention whose scores are not normalised: sums over all positions, and what each position makes of them."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = _thirds(self.qkv(x.flatten(2).transpose(1, 2)), 2)
        q, k = functional.elu(q) + 1, functional.elu(k) + 1
        y = q @ (k.transpose(1, 2) @ v) / (q @ k.sum(1, keepdim=True).transpose(1, 2))
        return y.transpose(1, 2).reshape(x.shape)


def classifier() -> nn.Module:
    return nn.Sequential(nn.Conv2d(8, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 96, 5), nn.ReLU(),
                         nn.Dropout(), nn.Linear(5, 3))


BATCHES: list[Layout] = [("batch=2", {}), ("batch=2", {"batch": (0, 2, 3)}), ("batch=3", {"batch": (0, 1, 1, 3)})]
PLANES: list[Layout] = [("height=2,width=2", {"height": (0, 3, 8), "width": (0, 5, 12)}), ("width=3", {}),
                        ("batch=2,height=2", {"height": (0, 5, 8)}), ("batch=3", {})]
NETS: dict[str, tuple[Callable[[], nn.Module], list[Layout]]] = {
    "attention": (lambda: Attention(False), BATCHES), "attention, batch first": (lambda: Attention(True), BATCHES),
    "windows": (lambda: Windows(False), PLANES), "masked windows": (lambda: Windows(True), PLANES),
    "windows of torch": (lambda: WindowsOfTorch(False), PLANES),
    "windows of torch, batch first": (lambda: WindowsOfTorch(True), PLANES),
    "classifier": (classifier, PLANES), "attention of channels": (Channels, PLANES),
    "linear attention": (LinearAttention, PLANES),
    "several": (lambda: nn.Sequential(Windows(True), nn.Conv2d(8, 8, 3, padding=1), WindowsOfTorch(True),
                                      nn.Flatten(), nn.Linear(8 * 96, 3)), PLANES),
}


@pytest.mark.parametrize(("exporter", "opset"), [("torchscript", 14), ("dynamo", 18)])
@pytest.mark.parametrize("name", NETS)
def test_exported_by_torch(name: str, exporter: Exporter, opset: int) -> None:
    make, layouts = NETS[name]
    shape = (3, 8, 8, 12)
    model = export(trained(make()), shape, exporter, opset, False)
    inputs = {"x": signed(*shape)}
    expected = run_ort(model, inputs)
    for mesh, cuts in layouts:
        plan = compile_plan(model, mesh, cuts)
        check_results(run_lockstep(plan, inputs).outputs, expected)
        assert not whole_results(plan), mesh


@pytest.mark.parametrize(("exporter", "opset"), [("torchscript", 14), ("dynamo", 18)])
@pytest.mark.parametrize("batch_first", [False, True])
def test_queries_stay_in_shards_where_keys_are_gathered(exporter: Exporter, opset: int, batch_first: bool) -> None:
    shape = (3, 8, 8, 12)
    model = export(trained(Attention(batch_first)), shape, exporter, opset, False)
    inputs = {"x": signed(*shape)}
    expected = run_ort(model, inputs)
    for mesh, cuts in PLANES:
        plan = compile_plan(model, mesh, cuts)
        check_results(run_lockstep(plan, inputs).outputs, expected)
        check_results(run_ort(ir.to_proto(expand(plan)), inputs), expected)
        gathered = [node.inputs[0] for node in plan.graph if node.op_type == dialect.RESHARD]
        assert all(v is not None and not v.is_graph_input() and len(dialect.shape_of(v)) > 3 for v in gathered), mesh
        (scores,) = (node.outputs[0] for node in plan.graph if node.op_type == "Softmax")
        assert set(dialect.get_layout(scores).mesh_axes) == set(Mesh.parse(mesh).names), mesh


# --- training ---------------------------------------------------------------------------------------------


def gradients(net: nn.Module, x: torch.Tensor, mesh: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    module = pt.partition(net, x, mesh=mesh, train=True).module()
    found = module(x)
    (found * found).sum().backward()
    return found.detach(), {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("make", [
    lambda: nn.Sequential(nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(4 * 60, 5)),
    lambda: nn.Sequential(nn.Conv2d(8, 8, (8, 12))), lambda: Windows(True), lambda: WindowsOfTorch(False), Channels,
    LinearAttention, lambda: Attention(False)])
def test_weights_train_as_those_of_the_whole_network(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(3)
    net, x = make(), torch.from_numpy(signed(2, 8, 8, 12))
    whole = gradients(net, x, "batch=1")
    assert set(whole[1]) == {name for name, _ in net.named_parameters()}
    for mesh in ("height=2,width=2", "batch=2,height=2"):
        found = gradients(net, x, mesh)
        torch.testing.assert_close(found[0], whole[0], rtol=1e-4, atol=1e-5)
        for name, grad in whole[1].items():
            torch.testing.assert_close(found[1][name], grad, rtol=1e-3, atol=1e-4 * float(grad.abs().max()))


def test_dropouts_of_training_keep_their_axes() -> None:
    spelling = replace(HEAD, lines=["a = Flatten(x)", "d = Dropout(a)", "y = Gemm<transB=1>(d, w, b)"], opset=13)
    for fold_norms, wanted in ((True, ["Einsum", "Add"]), (False, ["Flatten", "Dropout", "Gemm"])):
        passes = (Canonicalize({}, fold_norms=fold_norms), KeepApart(Mesh.parse("height=2"), not fold_norms))
        assert operators(Pipeline(passes).run(load_model(spelling.model()))) == wanted
