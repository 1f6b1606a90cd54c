"""Quantised models on meshes: the integers are those of onnxruntime on the whole.

Random numbers over the whole range of their types; a U-Net that onnxruntime.quantization has quantised.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

import partitioner as pt
from partitioner.errors import PartitionError
from partitioner.loader import fault_of
from passes.contrib import CONTRIB, rewrite_contrib
from tests.examples import Case, case_model, examples
from tests.oracle import compile_plan, reference64, run_lockstep, run_ort
from tests.test_conformance import layouts

Array = np.ndarray
FLOAT = np.float32


def rewritten(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with standard nodes in place of those for which there is a rule."""
    graph = ir.from_proto(model)
    rewrite_contrib(graph)
    return ir.to_proto(graph)


def one_node(op_type: str, inputs: Sequence[Array | None], domain: str = "", opset: int = 18, outputs: int = 1,
             given: int = 1, **attributes: Any) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """A model of one node; the first `given` inputs are the model's, the others constants."""
    names = ["" if a is None else f"x{i}" for i, a in enumerate(inputs)]
    results = [f"y{i}" for i in range(outputs)]
    fed = {n: a for n, a in zip(names[:given], inputs, strict=False) if a is not None}
    graph = helper.make_graph(
        [helper.make_node(op_type, names, results, "node", domain=domain, **attributes)], "graph",
        [helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape) for n, a in fed.items()],
        [helper.make_empty_tensor_value_info(n) for n in results],
        [numpy_helper.from_array(a, n) for n, a in zip(names[given:], inputs[given:], strict=True) if a is not None])
    imports = [helper.make_opsetid("", opset), *([helper.make_opsetid(domain, 1)] if domain else [])]
    return helper.make_model(graph, opset_imports=imports, ir_version=8 if opset < 21 else 10), fed


def differences(model: onnx.ModelProto, inputs: Mapping[str, Array], mesh: str | None) -> dict[str, tuple[int, float]]:
    """Per output the largest difference from onnxruntime and the share of cells that differ."""
    expected = run_ort(model, inputs)
    found = run_lockstep(compile_plan(rewritten(model), mesh), inputs).outputs
    result: dict[str, tuple[int, float]] = {}
    for name, whole in expected.items():
        assert found[name].dtype == whole.dtype and found[name].shape == whole.shape
        gap = np.abs(found[name].astype(np.float64) - whole.astype(np.float64))
        result[name] = int(np.ceil(gap.max(initial=0))), float((gap > 0).mean())
    return result


def whole_range(shape: Sequence[int], dtype: Any, seed: int) -> Array:
    info = np.iinfo(dtype)
    return np.random.default_rng(seed).integers(info.min, info.max + 1, tuple(shape)).astype(dtype)


def scale(value: float) -> Array:
    return np.array(value, FLOAT)


MESHES = [None, "batch=2", "height=3", "height=2,width=2"]
TYPES = [np.uint8, np.int8]
on_meshes = pytest.mark.parametrize("mesh", MESHES)
of_types = pytest.mark.parametrize("dtype", TYPES)


# --- exactly onnxruntime's integers ------------------------------------------------------------------


@on_meshes
@of_types
@pytest.mark.parametrize("channels", [3, 700])
def test_convolutions(dtype: Any, mesh: str | None, channels: int) -> None:
    """700 channels have sums beyond float32's integers."""
    x, w = whole_range((2, channels, 9, 7), dtype, 1), whole_range((4, channels, 3, 3), np.int8, 2)
    bias, zero = whole_range((4,), np.int32, 3) // 2**16, np.array(11, dtype)
    scales = np.array([3e-3, 1e-2, 2e-2, 5e-3], FLOAT) / channels
    model, inputs = one_node("QLinearConv", [x, scale(0.07), zero, w, scales, np.zeros(4, np.int8), scale(0.3), zero,
                                             bias], pads=[1] * 4, strides=[2, 1])
    assert differences(model, inputs, mesh) == {"y0": (0, 0.0)}


@on_meshes
def test_convolutions_to_int32(mesh: str | None) -> None:
    x, w = whole_range((2, 300, 9, 7), np.uint8, 1), whole_range((4, 150, 3, 2), np.uint8, 2)
    model, inputs = one_node("ConvInteger", [x, w, np.array(200, np.uint8), np.array(100, np.uint8)],
                             pads=[1, 1, 2, 0], group=2, dilations=[2, 1])
    assert differences(model, inputs, mesh) == {"y0": (0, 0.0)}


@of_types
@pytest.mark.parametrize("mesh", [None, "batch=2", "height=3"])
def test_products(dtype: Any, mesh: str | None) -> None:
    a, b, zero = whole_range((2, 3, 8, 90), dtype, 1), whole_range((90, 5), dtype, 2), np.array(9, dtype)
    model, inputs = one_node("MatMulInteger", [a, b, zero, zero])
    assert differences(model, inputs, mesh) == {"y0": (0, 0.0)}
    model, inputs = one_node("QLinearMatMul", [a, scale(0.07), zero, b, scale(0.1), zero, scale(5.0), zero])
    assert differences(model, inputs, mesh) == {"y0": (0, 0.0)}


@on_meshes
@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int16])
@pytest.mark.parametrize("axis", [None, 1, 2])
def test_quantize_and_back(dtype: Any, axis: int | None, mesh: str | None) -> None:
    """Numbers far outside the range, and halves, which go to the even neighbour."""
    x = np.random.default_rng(4).normal(0, 40, (2, 3, 9, 7)).astype(FLOAT)
    x[0] = np.round(x[0]) + FLOAT(0.5)
    x[1, 0, 0] = [np.inf, -np.inf, 1e30, -1e30, 0, 0.5, 1.5]
    n = 1 if axis is None else x.shape[axis]
    zero = np.arange(3, 3 + n).astype(dtype)
    scales = np.array([1.0, 0.25, 0.3, 2.0, 0.07, 1e-3, 5, 0.5, 0.1], FLOAT)[:n]
    given = [x, scales[0], zero[0]] if axis is None else [x, scales, zero]
    told = {} if axis is None else {"axis": axis}
    model, inputs = one_node("QuantizeLinear", [np.asarray(a) for a in given], opset=21, **told)
    assert differences(model, inputs, mesh) == {"y0": (0, 0.0)}
    back = [np.asarray(a) for a in (whole_range(x.shape, dtype, 5), *given[1:])]
    model, inputs = one_node("DequantizeLinear", back, opset=21, **told)
    assert differences(model, inputs, mesh) == {"y0": (0, 0.0)}


@on_meshes
@pytest.mark.parametrize("kind", ["mixed", "positive", "negative", "zero", "tiny"])
def test_dynamic_quantization(kind: str, mesh: str | None) -> None:
    x = np.random.default_rng(6).normal(0, 3, (2, 3, 9, 7)).astype(FLOAT)
    size = np.abs(x) + 1
    x = {"mixed": x, "positive": size, "negative": -size, "zero": x * 0, "tiny": x * FLOAT(1e-30)}[kind]
    model, inputs = one_node("DynamicQuantizeLinear", [x], opset=13, outputs=3)
    assert set(differences(model, inputs, mesh).values()) == {(0, 0.0)}


@on_meshes
@of_types
@pytest.mark.parametrize("op_type", ["QLinearAdd", "QLinearMul"])
@pytest.mark.parametrize("scales", [(0.05, 0.05, 0.1), (0.03, 0.07, 0.09), (0.0123, 0.456, 0.5), (0.1, 0.1, 0.1)])
def test_sums_and_products_of_cells(op_type: str, dtype: Any, scales: tuple[float, ...], mesh: str | None) -> None:
    a, b = whole_range((2, 3, 9, 37), dtype, 7), whole_range((2, 3, 9, 37), dtype, 8)
    zeros = [np.array(v, dtype) for v in (3, 5, 7)]
    model, inputs = one_node(op_type, [a, scale(scales[0]), zeros[0], b, scale(scales[1]), zeros[1], scale(scales[2]),
                                       zeros[2]], CONTRIB)
    assert differences(model, inputs, mesh) == {"y0": (0, 0.0)}


@on_meshes
@of_types
@pytest.mark.parametrize("last", [0, 1])
def test_global_means(dtype: Any, last: int, mesh: str | None) -> None:
    x, zero = whole_range((2, 5, 9, 7), dtype, 9), np.array(5, dtype)
    for opset in (10, 18):  # the older one has no Round
        model, inputs = one_node("QLinearGlobalAveragePool", [x, scale(0.1), zero, scale(0.003), zero], CONTRIB,
                                 opset=opset, channels_last=last)
        assert differences(model, inputs, mesh) == {"y0": (0, 0.0)}
        assert fault_of(pt.partition(model, mesh=mesh).model) is None


@on_meshes
@of_types
@pytest.mark.parametrize(("op_type", "told"), [
    ("QLinearLeakyRelu", {"alpha": 0.2}),
    ("QLinearSigmoid", {}),
    ("QLinearAveragePool", {"kernel_shape": [2, 3], "pads": [1, 1, 0, 1], "strides": [2, 1]}),
    ("QLinearAveragePool", {"kernel_shape": [3, 3], "pads": [1] * 4, "count_include_pad": 1, "channels_last": 1}),
])
def test_tables_and_means(op_type: str, told: dict[str, Any], dtype: Any, mesh: str | None) -> None:
    x, zero = whole_range((2, 3, 9, 7), dtype, 10), np.array(5, dtype)
    model, inputs = one_node(op_type, [x, scale(0.037), zero, scale(0.021), zero], CONTRIB, **told)
    assert differences(model, inputs, mesh) == {"y0": (0, 0.0)}


@on_meshes
@of_types
def test_concatenation(dtype: Any, mesh: str | None) -> None:
    x, y, zero = whole_range((2, 3, 9, 7), dtype, 11), whole_range((2, 2, 9, 7), dtype, 12), np.array(5, dtype)
    model, inputs = one_node("QLinearConcat", [scale(0.05), zero, x, scale(0.07), zero, y, scale(0.05), zero], CONTRIB,
                             given=6, axis=1)
    inputs = {"x2": x, "x5": y}
    del model.graph.input[:2]
    model.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in (("x0", scale(0.05)), ("x1", zero)))
    for _ in range(2):  # its scale and zero point are constants too
        model.graph.input.pop(1)
    model.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in (("x3", scale(0.07)), ("x4", zero)))
    assert differences(model, inputs, mesh) == {"y0": (0, 0.0)}
    assert {n.op_type for n in rewritten(model).graph.node} == {"Concat", "DequantizeLinear", "QuantizeLinear"}


@on_meshes
@of_types
def test_softmax_within_a_quantum(dtype: Any, mesh: str | None) -> None:
    """onnxruntime looks up powers that it has rounded before."""
    x, zero = whole_range((2, 5, 9, 7), dtype, 13), np.array(np.iinfo(dtype).min, dtype)
    model, inputs = one_node("QLinearSoftmax", [x, scale(0.04), zero, scale(1 / 256), zero], CONTRIB, 13, axis=1)
    model.graph.node[0].attribute.append(helper.make_attribute("opset", 13))
    gap, _ = differences(model, inputs, mesh)["y0"]
    assert gap <= 1


@on_meshes
@of_types
def test_channels_last(dtype: Any, mesh: str | None) -> None:
    """Channels are axis 1 of what the mesh calls height: cuts go wherever the layout says."""
    x, zero = whole_range((2, 9, 7, 5), dtype, 14), np.array(5, dtype)
    model, inputs = one_node("NhwcMaxPool", [x], CONTRIB, kernel_shape=[3, 2], pads=[1, 0, 1, 1], strides=[2, 2])
    assert differences(model, inputs, mesh) == {"y0": (0, 0.0)}
    w = whole_range((4, 5, 3, 3), np.int8, 15)
    model, inputs = one_node("QLinearConv", [x, scale(0.1), zero, w, scale(0.01), np.array(0, np.int8), scale(0.2),
                                             zero], CONTRIB, channels_last=1, pads=[1] * 4)
    assert differences(model, inputs, mesh) == {"y0": (0, 0.0)}


# --- fused operators ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fused:
    """A FusedConv with this activation, and a summand or not."""

    activation: str
    params: tuple[float, ...] = ()
    summand: bool = False
    opset: int = 18
    told: Mapping[str, Any] = field(default_factory=dict[str, Any])


FUSED = [Fused("Relu"), Fused("Relu", summand=True), Fused("LeakyRelu", (0.3,)), Fused("Sigmoid"), Fused("Tanh"),
         Fused("HardSigmoid", (0.3, 0.4)), Fused("Clip", (-0.5, 0.7)), Fused("Clip", (-0.5, 0.7), opset=10)]


@on_meshes
@pytest.mark.parametrize("case", FUSED, ids=str)
def test_fused_convolutions(case: Fused, mesh: str | None) -> None:
    random = np.random.default_rng(16)
    x, w, b, z = (random.standard_normal(s).astype(FLOAT) for s in ((2, 3, 9, 7), (4, 3, 3, 3), (4,), (2, 4, 9, 7)))
    told = {"activation_params": list(case.params)} if case.params else {}
    model, inputs = one_node("FusedConv", [x, w, b, z] if case.summand else [x, w, b], CONTRIB, case.opset,
                             activation=case.activation, pads=[1] * 4, **told)
    found = run_lockstep(compile_plan(rewritten(model), mesh), inputs).outputs["y0"]
    assert np.abs(found - run_ort(model, inputs)["y0"]).max() < 1e-5


@pytest.mark.parametrize("mesh", [None, "batch=2"])
def test_fused_gemm(mesh: str | None) -> None:
    random = np.random.default_rng(17)
    x, w, b = (random.standard_normal(s).astype(FLOAT) for s in ((4, 6), (5, 6), (5,)))
    model, inputs = one_node("FusedGemm", [x, w, b], CONTRIB, transB=1, alpha=0.5, activation="LeakyRelu",
                             activation_alpha=0.2)
    found = run_lockstep(compile_plan(rewritten(model), mesh), inputs).outputs["y0"]
    assert np.abs(found - run_ort(model, inputs)["y0"]).max() < 1e-5


def test_what_no_rule_suits_is_named() -> None:
    x = np.zeros((1, 2, 5, 5), FLOAT)
    model, _ = one_node("FusedConv", [x, np.zeros((2, 2, 1, 1), FLOAT)], CONTRIB, activation="Softplus")
    before = [n.op_type for n in rewritten(model).graph.node]
    assert before == ["FusedConv"]
    with pytest.raises(PartitionError, match=r"node \(com.microsoft.FusedConv\): "):
        compile_plan(rewritten(model), None)


@pytest.mark.parametrize(("dtype", "name"), [(onnx.TensorProto.FLOAT8E4M3FN, "FLOAT8E4M3FN"),
                                             (onnx.TensorProto.INT4, "INT4")])
def test_other_element_types_are_refused(dtype: int, name: str) -> None:
    model, _ = one_node("QuantizeLinear", [np.zeros((1, 2, 5, 5), FLOAT), scale(0.1)], opset=21, output_dtype=dtype)
    with pytest.raises(PartitionError, match=f"quantises to {name}, for which there is no rule"):
        compile_plan(model, None)


# --- operators' examples under onnxruntime's own domain ----------------------------------------------

CONTRIB_CASES = [case for case in examples() if case.domain == CONTRIB]


@pytest.mark.parametrize("case", CONTRIB_CASES, ids=lambda case: case.name)
def test_reference_equals_onnxruntime(case: Case) -> None:
    model, inputs = case_model(case)
    expected = run_ort(model, inputs)["y"]
    found = reference64(model, inputs)["y"]
    limit = 0 if expected.dtype.kind in "iu" else 1e-6
    assert np.abs(found.astype(np.float64) - expected.astype(np.float64)).max() <= limit


@pytest.mark.parametrize("case", CONTRIB_CASES, ids=lambda case: case.name)
def test_expanded_examples(case: Case) -> None:
    from tests.test_expand import expanded

    model, inputs = case_model(case)
    expected = run_ort(model, inputs)["y"]
    for mesh, cuts in list(layouts(case, next(iter(inputs.values())).shape))[1::3]:
        found = run_ort(expanded(compile_plan(model, mesh, cuts)), inputs)["y"]
        limit = 0 if expected.dtype.kind in "iu" else 1e-6
        assert np.abs(found.astype(np.float64) - expected.astype(np.float64)).max() <= limit


# --- a network ---------------------------------------------------------------------------------------

SHAPE = (2, 3, 24, 20)


class RandomCalibration(CalibrationDataReader):
    """A few random images."""

    def __init__(self, count: int = 4) -> None:
        random = np.random.default_rng(20)
        self.images = [{"image": random.standard_normal(SHAPE).astype(FLOAT)} for _ in range(count)]

    def get_next(self) -> dict[str, Array] | None:  # type: ignore[override]
        return self.images.pop() if self.images else None


def unet() -> onnx.ModelProto:
    """Two levels: convolutions, max pool, nearest upsampling, a skip, a residual sum, a sigmoid, mean classes."""
    random = np.random.default_rng(21)
    weights: dict[str, Array] = {}
    nodes: list[onnx.NodeProto] = []

    def op(op_type: str, inputs: Sequence[str], result: str, **told: Any) -> str:
        nodes.append(helper.make_node(op_type, list(inputs), [result], result, **told))
        return result

    def conv(x: str, name: str, n_in: int, n_out: int, k: int = 3) -> str:
        weights[f"{name}.w"] = (random.standard_normal((n_out, n_in, k, k)) / np.sqrt(n_in * k * k)).astype(FLOAT)
        weights[f"{name}.b"] = random.standard_normal(n_out).astype(FLOAT) * FLOAT(0.1)
        return op("Conv", [x, f"{name}.w", f"{name}.b"], name, pads=[k // 2] * 4)

    top = op("Relu", [conv(op("Relu", [conv("image", "c1", 3, 8)], "r1"), "c2", 8, 8)], "r2")
    low = op("MaxPool", [top], "pool", kernel_shape=[2, 2], strides=[2, 2])
    low = op("Relu", [conv(low, "c3", 8, 12)], "r3")
    low = op("Relu", [op("Add", [conv(low, "c4", 12, 12), low], "sum")], "r4")
    weights["scales"] = np.array([1, 1, 2, 2], FLOAT)
    up = op("Resize", [low, "", "scales"], "up", mode="nearest", coordinate_transformation_mode="asymmetric",
            nearest_mode="floor")
    joined = op("Concat", [top, up], "joined", axis=1)
    last = op("Relu", [conv(joined, "c5", 20, 8)], "r5")
    op("Sigmoid", [conv(last, "c6", 8, 2, 1)], "classes")
    op("GlobalAveragePool", [last], "mean")
    described = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, s)
                 for n, s in (("classes", (2, 2, 24, 20)), ("mean", (2, 8, 1, 1)))]
    graph = helper.make_graph(nodes, "unet",
                              [helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, SHAPE)], described,
                              [numpy_helper.from_array(a, n) for n, a in weights.items()])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture(scope="module", params=[(f, t, c) for f in ("QDQ", "QOperator") for t in ("QInt8", "QUInt8")
                                        for c in (False, True)], ids=str)
def quantised(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    kind, dtype, per_channel = request.param
    folder: Path = tmp_path_factory.mktemp("quantised")
    onnx.save(unet(), folder / "unet.onnx")
    quantize_static(folder / "unet.onnx", folder / "quantised.onnx", RandomCalibration(),
                    quant_format=QuantFormat[kind], activation_type=QuantType[dtype], weight_type=QuantType.QInt8,
                    per_channel=per_channel)
    model = onnx.load(folder / "quantised.onnx")
    assert any(n.op_type == ("QLinearConv" if kind == "QOperator" else "DequantizeLinear") for n in model.graph.node)
    return model


@pytest.mark.parametrize("mesh", [None, "height=2", "width=3", "batch=2,height=2", "height=2,width=2"])
def test_quantised_unet(quantised: onnx.ModelProto, mesh: str | None) -> None:
    """Equal to onnxruntime but where a float32 sum of it lies on the border of two quanta."""
    image = np.random.default_rng(22).standard_normal(SHAPE).astype(FLOAT)
    expected = run_ort(quantised, {"image": image})
    whole = run_lockstep(compile_plan(rewritten(quantised), None), {"image": image}).outputs
    found = run_lockstep(compile_plan(rewritten(quantised), mesh), {"image": image}).outputs
    for name, exact in expected.items():
        quantum = min(np.diff(np.unique(exact)))
        assert np.array_equal(found[name], whole[name]), f"{name}: not the whole run's result"
        gap = np.abs(found[name] - exact) / quantum
        assert gap.max() < 1.5 and (gap > 0.5).mean() < 0.01, f"{name}: {gap.max()} quanta, {(gap > 0.5).mean()}"
