"""What the examples of normalisations and reductions cannot show: ties, infinities, cancellation, narrow types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper

import partitioner as pt
from partitioner import dialect
from partitioner.geometry import Box, Interval, format_pieces
from partitioner.loader import fault_of
from partitioner.maps import Prefix, Suffix
from partitioner.ops.base import Call, need_pieces
from partitioner.ops.nodes import operator_of
from passes.expand import expand
from tests.examples import one_graph
from tests.oracle import as_double, close, compile_plan, error, reference64, run_lockstep, run_ort

Array = np.ndarray
MESHES: list[tuple[str, dict[str, tuple[int, ...]]]] = [
    ("height=2", {}), ("height=3,width=2", {}), ("height=2", {"height": (0, 0, 9)}),
    ("height=3", {"height": (0, 4, 4, 9)}), ("batch=2,width=3", {"width": (0, 7, 7, 7)})]
by_mesh = pytest.mark.parametrize(("mesh", "cuts"), MESHES, ids=[f"{m} {list(c.values())}" for m, c in MESHES])


def random(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def model(op_type: str, x: Array, constants: Sequence[Array | None] = (), opset: int = 18, outputs: int = 1,
          kinds: Sequence[int] = (), **attributes: Any) -> onnx.ModelProto:
    """A model of one node; the outputs have the input's type unless `kinds` says otherwise."""
    names = ["" if c is None else f"c{i}" for i, c in enumerate(constants)]
    results = [f"y{i}" for i in range(outputs)]
    node = helper.make_node(op_type, ["x", *names], results, "node", **attributes)
    own = helper.np_dtype_to_tensor_dtype(x.dtype)
    weights = {n: c for n, c in zip(names, constants, strict=True) if c is not None}
    described = dict.fromkeys(results, (own, ()))
    described |= {r: (kind, ()) for r, kind in zip(results, kinds, strict=False)}
    found = one_graph([node], {"x": x}, weights, described, opset)
    for output in found.graph.output:
        output.type.tensor_type.ClearField("shape")
    return found


def half_error(found: Array, exact: Array) -> float:
    """The error without the floor that a float16's own precision sets."""
    assert found.dtype == np.float16
    return error(found.astype(np.float32), exact)


def sharded(source: onnx.ModelProto, x: Array, mesh: str | None = None,
            cuts: Mapping[str, Sequence[int]] | None = None) -> Array:
    """The first output of a lock-step run."""
    return run_lockstep(compile_plan(source, mesh, cuts or {}), {"x": x}).outputs["y0"]


def same_everywhere(source: onnx.ModelProto, x: Array) -> Array:
    """The result, which must be the same to the last bit however it is sharded."""
    whole = sharded(source, x)
    for mesh, cuts in MESHES:
        assert np.array_equal(sharded(source, x, mesh, cuts), whole, equal_nan=whole.dtype.kind == "f"), (mesh, cuts)
    return whole


# --- normalisation -----------------------------------------------------------------------------------


@by_mesh
def test_group_norm_of_opset_18_scales_groups(mesh: str, cuts: dict[str, tuple[int, ...]]) -> None:
    """onnx's checker calls that definition deprecated, so that no example can show it."""
    x, weights = random(2, 6, 9, 7), [random(3, seed=1), random(3, seed=2)]
    source = model("GroupNormalization", x, weights, opset=18, num_groups=3)
    exact = reference64(source, {"x": x})["y0"]
    assert close(sharded(source, x, mesh, cuts), exact, 3 * error(run_ort(source, {"x": x})["y0"], exact))
    assert close(sharded(as_double(source), x.astype(np.float64), mesh, cuts),
                 reference64(as_double(source), {"x": x})["y0"], 1e-12)


@pytest.mark.parametrize("mesh", [None, "height=2"])
def test_group_norm_of_opset_18_makes_a_valid_plan(mesh: str | None) -> None:
    source = model("GroupNormalization", random(2, 6, 9, 7), [random(3, seed=1), random(3, seed=2)], opset=18,
                   num_groups=3)
    assert fault_of(pt.partition(source, mesh=mesh).model) is None


FAR: dict[str, tuple[Sequence[Array], int, dict[str, Any]]] = {
    "GroupNormalization": ([np.ones(4, np.float32), np.zeros(4, np.float32)], 21, {"num_groups": 2}),
    "LayerNormalization": ([np.ones((9, 7), np.float32)], 17, {"axis": 2}),
    "MeanVarianceNormalization": ([], 13, {"axes": [0, 2, 3]}),
    "InstanceNormalization": ([np.ones(4, np.float32), np.zeros(4, np.float32)], 17, {}),
}


@by_mesh
@pytest.mark.parametrize("op_type", FAR)
def test_variances_far_from_zero_do_not_cancel(op_type: str, mesh: str, cuts: dict[str, tuple[int, ...]]) -> None:
    """E[x^2] - E[x]^2 would be off by a fifth at mean 1000."""
    constants, opset, attributes = FAR[op_type]
    x = random(2, 4, 9, 7) + np.float32(1000)
    source = model(op_type, x, constants, opset, **attributes)
    assert error(sharded(source, x, mesh, cuts), reference64(source, {"x": x})["y0"]) < 5e-4


@by_mesh
@pytest.mark.parametrize("op_type", FAR)
def test_float16_keeps_statistics_in_float32(op_type: str, mesh: str, cuts: dict[str, tuple[int, ...]]) -> None:
    """Counts and sums beyond 65504, the largest float16, do no harm."""
    constants, opset, attributes = FAR[op_type]
    x = (100 + 3 * random(2, 4, 9, 7)).astype(np.float16)
    source = model(op_type, x, [c.astype(np.float16) for c in constants], opset, **attributes)
    assert half_error(sharded(source, x, mesh, cuts), reference64(source, {"x": x})["y0"]) < 1e-3


def test_float16_counts_may_exceed_its_range() -> None:
    x = random(1, 1, 300, 301).astype(np.float16)
    ones = [np.ones(1, np.float16), np.zeros(1, np.float16)]
    source = model("InstanceNormalization", x, ones, 17)
    assert half_error(sharded(source, x, "height=2"), reference64(source, {"x": x})["y0"]) < 1e-3


def test_statistics_of_layer_norm_have_the_stash_type() -> None:
    x = random(2, 3, 9, 7).astype(np.float16)
    source = model("LayerNormalization", x, [np.ones(7, np.float16)], 17, 3,
                   (TensorProto.FLOAT16, TensorProto.FLOAT, TensorProto.FLOAT))
    for mesh in (None, "width=2", "height=2"):
        found = run_lockstep(compile_plan(source, mesh), {"x": x}).outputs
        assert [found[f"y{i}"].dtype for i in range(3)] == [np.float16, np.float32, np.float32]
        for name, exact in reference64(source, {"x": x}).items():
            assert half_error(found[name], exact) < 1e-3 if name == "y0" else error(found[name], exact) < 2e-6


def test_constant_inputs_are_normalised_to_zeros() -> None:
    x = np.full((2, 2, 9, 7), 7, np.float32)
    found = same_everywhere(model("MeanVarianceNormalization", x, opset=13, axes=[0, 2, 3]), x)
    assert not found.any()


def test_zeros_stay_zeros_under_lp_normalisation() -> None:
    x = random(2, 3, 9, 7)
    x[0, 1] = 0
    for p in (1, 2):
        source = model("LpNormalization", x, opset=22, axis=2, p=p)
        for mesh, cuts in MESHES:
            found = sharded(source, x, mesh, cuts)
            assert not found[0, 1].any() and close(found, run_ort(source, {"x": x})["y0"], 1e-6)


@pytest.mark.parametrize("size", [2, 4, 6])
def test_even_windows_of_channels_reach_further_up(size: int) -> None:
    """The definition's floor and ceil; onnxruntime refuses even sizes."""
    x = random(2, 5, 9, 7)
    source = model("LRN", x, opset=13, size=size, alpha=0.5)
    assert close(same_everywhere(source, x), reference64(source, {"x": x})["y0"], 1e-6)


def test_lrn_over_some_of_the_channels() -> None:
    """Channels are an axis like any other: a shard needs those under its windows."""
    x = torch.from_numpy(random(2, 7, 5, 3))
    for size in (1, 2, 3, 5, 9):
        operator = operator_of(compile_plan(model("LRN", x.numpy(), opset=13, size=size, alpha=0.5), None).graph[0])
        whole = operator.run(Call((x,), (Box.whole(x.shape),), (Box.whole(x.shape),)))[0]
        for start, stop in ((0, 2), (2, 3), (3, 7), (0, 7)):
            out = Box.whole((2, 7, 5, 3)).axes
            want = Box((out[0], (Interval(start, stop),), *out[2:]))
            (needs,) = operator.needs()
            assert needs is not None
            held = Box(tuple(need_pieces(need, want) for need in needs))
            (cells,) = held.axes[1]
            found = operator.run(Call((x[:, cells.start : cells.stop],), (held,), (want,)))[0]
            assert torch.equal(found, whole[:, start:stop]), (size, start, stop)


# --- reductions --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "expected"), [(-np.inf, -np.inf), (np.inf, np.inf), (3e38, 3e38), (-3e38, -3e38)])
def test_log_sum_exp_of_extremes(value: float, expected: float) -> None:
    x = np.full((2, 1, 9, 7), value, np.float32)
    source = model("ReduceLogSumExp", x, [np.array([2, 3], np.int64)], keepdims=0)
    assert np.array_equal(run_ort(source, {"x": x})["y0"], np.full((2, 1), expected, np.float32))
    assert np.array_equal(same_everywhere(source, x), np.full((2, 1), expected, np.float32))


@pytest.mark.parametrize("kind", ["ReduceMax", "ReduceMin", "ReduceProd", "ReduceSum", "ReduceLogSumExp", "ReduceL2"])
def test_nan_is_not_lost(kind: str) -> None:
    x = random(2, 2, 9, 7)
    x[1, 0, 8, 6] = np.nan
    source = model(kind, x, [np.array([2, 3], np.int64)], keepdims=0)
    for mesh, cuts in MESHES:
        assert np.isnan(sharded(source, x, mesh, cuts)).tolist() == [[False, False], [True, False]]


def test_float16_sums_may_exceed_its_range_on_the_way() -> None:
    x = np.full((1, 1, 9, 70), 200, np.float16)
    for kind, expected in (("ReduceMean", 200), ("ReduceL2", 200 * 630**0.5)):
        source = model(kind, x, [np.array([2, 3], np.int64)])
        assert half_error(sharded(source, x, "height=3"), np.full((1, 1, 1, 1), expected)) < 1e-3


def test_exact_integers_of_64_bits() -> None:
    """Products and extremes that float64 cannot hold."""
    x = np.random.default_rng(0).integers(2**60, 2**61, (2, 2, 9, 7)) | 1
    for kind in ("ReduceProd", "ReduceMax", "ReduceMin", "ReduceSum"):
        source = model(kind, x, [np.array([2, 3], np.int64)])
        function = {"Prod": np.prod, "Max": np.max, "Min": np.min, "Sum": np.sum}[kind.removeprefix("Reduce")]
        assert np.array_equal(same_everywhere(source, x), function(x, axis=(2, 3), keepdims=True))


def test_products_are_merged_by_products() -> None:
    x = random(2, 2, 9, 7)
    plan = compile_plan(model("ReduceProd", x, [np.array([2], np.int64)]), "height=3")
    assert [dialect.all_reduce_kind(n) for n in plan.graph if dialect.is_all_reduce(n)] == [("prod", ("height",))]


# --- the place of extremes ---------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [8, 10, 11, 13])
@pytest.mark.parametrize("op_type", ["ArgMax", "ArgMin"])
def test_ties_are_broken_as_in_onnxruntime(op_type: str, opset: int) -> None:
    x = np.random.default_rng(1).integers(0, 3, (2, 3, 9, 7)).astype(np.float32)
    for axis in (0, 1, 2, 3):
        last = [{}] if opset < 12 else [{}, {"select_last_index": 1}]
        for attributes in last:
            source = model(op_type, x, opset=opset, kinds=(TensorProto.INT64,), axis=axis, **attributes)
            assert np.array_equal(same_everywhere(source, x), run_ort(source, {"x": x})["y0"])
            for mesh, cuts in MESHES:
                found = run_ort(ir.to_proto(expand(compile_plan(source, mesh, cuts))), {"x": x})["y0"]
                assert np.array_equal(found, run_ort(source, {"x": x})["y0"]), (mesh, cuts)


@pytest.mark.parametrize("opset", [8, 11, 13])
def test_hardmax_takes_the_first_of_equal_cells(opset: int) -> None:
    x = np.random.default_rng(1).integers(0, 3, (2, 3, 9, 7)).astype(np.float32)
    for axis in (0, 1, 2, 3):
        source = model("Hardmax", x, opset=opset, axis=axis)
        assert np.array_equal(same_everywhere(source, x), run_ort(source, {"x": x})["y0"])


@pytest.mark.parametrize("op_type", ["ArgMax", "ArgMin"])
def test_nan_is_the_extreme_however_it_is_sharded(op_type: str) -> None:
    x = random(2, 3, 9, 7)
    x[0, :, 4], x[0, :, 7], x[1, 1, 0] = np.nan, np.nan, np.nan
    source = model(op_type, x, opset=13, kinds=(TensorProto.INT64,), axis=2, keepdims=0)
    expected = (np.argmax if op_type == "ArgMax" else np.argmin)(x, 2)
    assert np.array_equal(same_everywhere(source, x), expected) and (expected[0] == 4).all()


@pytest.mark.parametrize("largest", [0, 1])
def test_top_k_takes_the_first_of_equal_cells(largest: int) -> None:
    x = np.random.default_rng(1).integers(0, 3, (2, 3, 9, 7)).astype(np.float32)
    for axis in (0, 1, 2, 3):
        k = np.array([min(4, x.shape[axis])], np.int64)
        source = model("TopK", x, [k], 13, 2, (TensorProto.FLOAT, TensorProto.INT64), axis=axis, largest=largest)
        expected = run_ort(source, {"x": x})
        for mesh, cuts in MESHES:
            found = run_lockstep(compile_plan(source, mesh, cuts), {"x": x}).outputs
            assert all(np.array_equal(found[name], expected[name]) for name in expected), (axis, mesh, cuts)


# --- running sums ------------------------------------------------------------------------------------


@pytest.mark.parametrize("reverse", [0, 1])
@pytest.mark.parametrize("exclusive", [0, 1])
@pytest.mark.parametrize("axis", [0, 2, 3])
def test_running_sums_have_the_same_bits_everywhere(axis: int, exclusive: int, reverse: int) -> None:
    x = random(2, 3, 9, 7)
    source = model("CumSum", x, [np.array(axis, np.int64)], 14, exclusive=exclusive, reverse=reverse)
    assert close(same_everywhere(source, x), run_ort(source, {"x": x})["y0"], 1e-6)


def test_prefixes_and_suffixes() -> None:
    prefix, suffix = Prefix(9, 9), Suffix(9, 9)
    assert [format_pieces(prefix.needed(Interval(*i))) for i in ((0, 3), (3, 9), (5, 5))] == ["0:3", "0:9", "-"]
    assert [format_pieces(suffix.needed(Interval(*i))) for i in ((0, 3), (3, 9), (5, 5))] == ["0:9", "3:9", "-"]
    assert [m.follow(4) for m in (prefix, suffix)] == [4, 4]


# --- kernels -----------------------------------------------------------------------------------------

SMOOTH: list[tuple[str, Sequence[Array], int, dict[str, Any]]] = [
    ("GroupNormalization", [random(4), random(4, seed=1)], 21, {"num_groups": 2}),
    ("LayerNormalization", [random(3, 4), random(4)], 17, {"axis": 2}),
    ("RMSNormalization", [random(4)], 23, {}),
    ("MeanVarianceNormalization", [], 13, {"axes": [0, 2]}),
    ("LpNormalization", [], 22, {"axis": 2}), ("LRN", [], 13, {"size": 3, "alpha": 0.5}),
    ("LpPool", [], 18, {"kernel_shape": [2, 3], "strides": [2, 1], "p": 3}), ("GlobalLpPool", [], 18, {}),
    *((f"Reduce{kind}", [np.array([2, 3], np.int64)], 18, {})
      for kind in ("L1", "L2", "SumSquare", "Prod", "LogSumExp", "Mean", "Max")),
    ("CumSum", [np.array(2, np.int64)], 14, {"exclusive": 1, "reverse": 1}),
    ("CumProd", [np.array(2, np.int64)], 26, {}),
    ("TopK", [np.array([2], np.int64)], 11, {"axis": 2}),
]


@pytest.mark.parametrize(("op_type", "constants", "opset", "attributes"), SMOOTH, ids=[row[0] for row in SMOOTH])
def test_kernels_are_differentiable(op_type: str, constants: Sequence[Array], opset: int,
                                    attributes: dict[str, Any]) -> None:
    x = np.random.default_rng(3).permutation(np.arange(48.0).reshape(-1)).reshape(2, 2, 3, 4) / 12 - 1.9
    x = np.concatenate([x, x[:, ::-1] + 0.05], 1)
    doubles = [c.astype(np.float64) if c.dtype.kind == "f" else c for c in constants]
    outputs = 2 if op_type == "TopK" else 1
    source = model(op_type, x, doubles, opset, outputs, (TensorProto.DOUBLE, TensorProto.INT64)[:outputs], **attributes)
    operator = operator_of(compile_plan(source, None).graph[0])
    outs = tuple(Box.whole(t.shape) for t in operator.outputs)
    weights = [torch.from_numpy(d) for d in doubles]
    boxes = (Box.whole(x.shape), *(Box.whole(w.shape) for w in weights))

    def kernel(data: torch.Tensor) -> torch.Tensor:
        return operator.run(Call((data, *weights), boxes, outs))[0]

    assert torch.autograd.gradcheck(kernel, torch.from_numpy(x).requires_grad_())


@pytest.mark.parametrize(("op_type", "constants", "opset", "attributes"), SMOOTH, ids=[row[0] for row in SMOOTH])
def test_bits_do_not_depend_on_threads(op_type: str, constants: Sequence[Array], opset: int,
                                       attributes: dict[str, Any]) -> None:
    extents = (1, 4, 3, 4) if op_type == "LayerNormalization" else (1, 4, 130, 4 if op_type[0] == "R" else 131)
    x = random(*extents) if op_type != "LayerNormalization" else random(900, 4, 3, 4)
    outputs = 2 if op_type == "TopK" else 1
    kinds = (TensorProto.FLOAT, TensorProto.INT64)[:outputs]
    source = model(op_type, x, constants, opset, outputs, kinds, **attributes)
    plan, threads = compile_plan(source, None), torch.get_num_threads()
    found = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        found.append(run_lockstep(plan, {"x": x}).outputs["y0"].tobytes())
    torch.set_num_threads(threads)
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("op_type", [row[0] for row in SMOOTH if row[0] not in ("CumProd", "CumSum")])
def test_bfloat16(op_type: str) -> None:
    """As good as float32 but for the rounding of inputs and outputs; statistics are kept in float32."""
    _, constants, opset, attributes = next(row for row in SMOOTH if row[0] == op_type)
    x = random(2, 4, 3, 4)
    outputs = 2 if op_type == "TopK" else 1
    kinds = (TensorProto.FLOAT, TensorProto.INT64)[:outputs]
    source = model(op_type, x, constants, opset, outputs, kinds, **attributes)
    operator = operator_of(compile_plan(source, None).graph[0])
    wide = [torch.from_numpy(np.array(a)) for a in (x, *constants)]
    narrow = [t.bfloat16() if t.is_floating_point() else t for t in wide]
    boxes, outs = tuple(Box.whole(tuple(t.shape)) for t in wide), tuple(Box.whole(t.shape) for t in operator.outputs)
    exact = operator.run(Call(tuple(t.float() if t.is_floating_point() else t for t in narrow), boxes, outs))[0]
    half = type(operator).read(narrow_view(source, x.shape))
    found = half.run(Call(tuple(narrow), boxes, outs))[0]
    assert found.dtype == torch.bfloat16
    assert error(found.float().numpy(), exact.numpy()) < 2**-7


def narrow_view(source: onnx.ModelProto, shape: tuple[int, ...]) -> Any:
    """The view of the one node of a model, its floating-point types as bfloat16."""
    from dataclasses import replace

    from partitioner.ops.base import TensorType
    from partitioner.ops.nodes import view_node

    view = view_node(compile_plan(source, None).graph[0])
    types = tuple(None if t is None else TensorType(t.shape, ir.DataType.BFLOAT16 if t.dtype == ir.DataType.FLOAT
                                                    else t.dtype) for t in view.inputs)
    assert types[0] is not None and types[0].shape == shape
    return replace(view, inputs=types)
