"""Convolutions, pads and activations that exporters write out; layers that need no rule but must stay local."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

from partitioner import dialect
from tests.oracle import as_double, compile_plan, error, reference64, run_ort
from tests.spellings import (
    Spelling,
    canonical,
    changed,
    check,
    integers,
    numbers,
    operators,
    random,
)

Array = np.ndarray


def signed(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# --- factors and summands after a convolution ---------------------------------------------------------

_STATISTICS = {"scale": signed(4, seed=1), "bias": signed(4, seed=2), "mean": signed(4, seed=3),
               "variance": random(4, seed=4)}
BATCH = Spelling(
    ["c = Conv<pads=[1,1,1,1]>(x, w, b)", "y = BatchNormalization<epsilon=0.01>(c, scale, bias, mean, variance)"],
    {"w": signed(4, 6, 3, 3), "b": signed(4, seed=5), **_STATISTICS}, ["Conv"])
_TRANSPOSED = {"w": signed(6, 2, 2, 2), "b": signed(4, seed=5), **_STATISTICS}
_NO_BIAS = {k: v for k, v in BATCH.constants.items() if k != "b"}
FOLDED = {
    "batch norm": BATCH,
    **{f"opset {n}": replace(BATCH, opset=n) for n in (7, 9, 14, 15)},
    "without bias": replace(BATCH, lines=["c = Conv(x, w)", BATCH.lines[1]], constants=_NO_BIAS),
    "default epsilon": replace(BATCH, lines=[BATCH.lines[0], BATCH.lines[1].replace("<epsilon=0.01>", "")]),
    "groups": replace(BATCH, lines=["c = Conv<group=2>(x, w, b)", BATCH.lines[1]],
                      constants={**BATCH.constants, "w": signed(4, 3, 3, 3)}),
    "transposed": replace(BATCH, lines=["c = ConvTranspose<strides=[2,2],group=2>(x, w, b)", BATCH.lines[1]],
                          constants=_TRANSPOSED, becomes=["ConvTranspose"]),
    "lines": replace(BATCH, lines=["c = Conv(x, w, b)", BATCH.lines[1]], shape=(2, 6, 8),
                     constants={**BATCH.constants, "w": signed(4, 6, 3)}),
    "volumes": replace(BATCH, lines=["c = Conv<pads=[1,1,1,1,1,1]>(x, w, b)", BATCH.lines[1]], shape=(2, 6, 3, 9, 4),
                       constants={**BATCH.constants, "w": signed(4, 6, 3, 3, 3)}),
    "factor and summand": replace(
        BATCH, lines=[BATCH.lines[0], "d = Mul(scale, c)", "y = Add(d, bias)"],
        constants={**BATCH.constants, "scale": signed(4, 1, 1, seed=1), "bias": signed(1, 4, 1, 1, seed=2)}),
    "one factor": replace(BATCH, lines=[BATCH.lines[0], "y = Mul(c, scale)"],
                          constants={**BATCH.constants, "scale": numbers(-0.25)}),
    "summand as bias": replace(BATCH, lines=["c = Conv(x, w)", "y = Add(c, bias)"],
                               constants={**_NO_BIAS, "bias": signed(4, 1, 1, seed=2)}),
    "batch norm, factor, Relu": replace(
        BATCH, lines=[BATCH.lines[0], BATCH.lines[1].replace("y =", "d ="), "e = Mul(d, factor)", "y = Relu(e)"],
        constants={**BATCH.constants, "factor": signed(4, 1, 1)}, becomes=["Conv", "Relu"]),
    "automatic padding": replace(BATCH, lines=['c = Conv<auto_pad="SAME_UPPER">(x, w, b)', BATCH.lines[1]]),
}
UNFOLDED = {
    "the convolution leaves the graph": changed(BATCH, None, outputs=["y", "c"]),
    "the convolution is read again": changed(BATCH, None, lines=[*BATCH.lines, "z = Relu(c)"], outputs=["y", "z"]),
    "weights of two convolutions": changed(BATCH, None, lines=[*BATCH.lines, "z = Conv(x, w)"], outputs=["y", "z"]),
    "a bias of two convolutions": changed(
        BATCH, None, lines=[*BATCH.lines, "z = Conv(x, v, b)"], outputs=["y", "z"],
        constants={**BATCH.constants, "v": signed(4, 6, 1, 1)}),
    "weights from data": changed(BATCH, None, others={"w": signed(4, 6, 3, 3)},
                                 constants={k: v for k, v in BATCH.constants.items() if k != "w"}),
    "statistics from data": changed(BATCH, None, others={"mean": signed(4)},
                                    constants={k: v for k, v in BATCH.constants.items() if k != "mean"}),
    "a factor per row": changed(BATCH, None, lines=[BATCH.lines[0], "y = Mul(c, scale)"],
                                constants={**BATCH.constants, "scale": signed(9, 1)}),
    "a factor per case": changed(BATCH, None, lines=[BATCH.lines[0], "y = Mul(c, scale)"],
                                 constants={**BATCH.constants, "scale": signed(2, 1, 1, 1)}),
    "a factor from data": changed(BATCH, None, lines=[BATCH.lines[0], "y = Mul(c, k)"], others={"k": signed(4, 1, 1)}),
    "the square of itself": changed(BATCH, None, lines=[BATCH.lines[0], "y = Mul(c, c)"]),
    "Relu between": changed(BATCH, None, lines=[BATCH.lines[0], "r = Relu(c)", BATCH.lines[1].replace("(c", "(r")]),
    "before the convolution": changed(
        BATCH, None, lines=["n = BatchNormalization(x, scale, bias, mean, variance)", "y = Conv(n, w, b)"],
        constants={**BATCH.constants, "scale": random(6), "bias": random(6), "mean": random(6), "variance": random(6)}),
    "switched off": changed(BATCH, None, fold_norms=False),
    "factor and summand, switched off": changed(
        FOLDED["factor and summand"], None, fold_norms=False, becomes=["Conv", "Mul", "Add"]),
}


@pytest.mark.parametrize("spelling", FOLDED.values(), ids=FOLDED)
def test_folded_into_the_weights(spelling: Spelling) -> None:
    check(spelling)


def test_weights_keep_their_names() -> None:
    model = canonical(BATCH.model())
    assert sorted(model.graph.initializers) == ["b", "w"]


@pytest.mark.parametrize("statistics", [{"variance": numbers(1, -1, 1, 1)}, {"scale": numbers(1, 1e38, 1, 1),
                                                                             "variance": numbers(1, 0, 1, 1)}])
def test_statistics_that_leave_no_numbers_are_not_folded(statistics: dict[str, Array]) -> None:
    model = canonical(replace(BATCH, constants={**BATCH.constants, **statistics}).model())
    assert operators(model) == ["Conv", "BatchNormalization"]


@pytest.mark.parametrize("spelling", UNFOLDED.values(), ids=UNFOLDED)
def test_not_folded_into_the_weights(spelling: Spelling) -> None:
    check(spelling)


def test_folding_keeps_the_accuracy() -> None:
    """Statistics far from 0 and 1: not less exact than batch norm node by node."""
    spread = {"variance": numbers(1e-4, 1e4, 3.0, 1e-8), "mean": numbers(1e2, -1e3, 1e-3, 5.0)}
    spelling = replace(BATCH, constants={**BATCH.constants, **spread})
    model, inputs = spelling.model(), spelling.inputs
    exact = reference64(as_double(model), {"x": inputs["x"].astype(np.float64)})["y"]
    node_by_node = run_ort(model, inputs)["y"]
    folded = run_ort(ir.to_proto(canonical(model)), inputs)["y"]
    for channel in range(4):
        allowed = 2 * error(node_by_node[:, channel], exact[:, channel])
        assert error(folded[:, channel], exact[:, channel]) <= allowed


# --- activations --------------------------------------------------------------------------------------

_ROOT, _TANH = float(np.sqrt(2)), float(np.sqrt(2 / np.pi))
_NUMBERS = {"half": numbers(0.5), "one": numbers(1), "root": numbers(_ROOT), "part": numbers(1 / _ROOT),
            "two": numbers(2), "three": numbers(3), "cubic": numbers(0.044715), "factor": numbers(_TANH),
            "zero": numbers(0), "six": numbers(6), "sixth": numbers(1 / 6)}
GELU = Spelling(["a = Div(x, root)", "b = Erf(a)", "c = Add(b, one)", "d = Mul(x, c)", "y = Mul(d, half)"],
                _NUMBERS, ["Gelu"], opset=20)
TANH = replace(GELU, lines=["a = Pow(x, three)", "b = Mul(a, cubic)", "c = Add(x, b)", "d = Mul(c, factor)",
                            "e = Tanh(d)", "f = Add(e, one)", "g = Mul(x, f)", "y = Mul(half, g)"])
MISH = replace(GELU, lines=["a = Softplus(x)", "b = Tanh(a)", "y = Mul(x, b)"], becomes=["Mish"], opset=18)
HARD = replace(GELU, lines=["a = Add(x, three)", "b = Clip(a, zero, six)", "c = Mul(x, b)", "y = Div(c, six)"],
               becomes=["HardSwish"], opset=14)
SIGMOID = replace(HARD, lines=["a = HardSigmoid<alpha=0.16666667,beta=0.5>(x)", "y = Mul(a, x)"])
ACTIVATIONS = {
    "torch": GELU,
    "times the part": changed(GELU, 0, "a = Mul(part, x)", becomes=["Gelu"]),
    "half of x first": replace(GELU, lines=[*GELU.lines[:3], "d = Mul(half, x)", "y = Mul(d, c)"]),
    "half of the sum first": replace(GELU, lines=[
        *GELU.lines[:2], "c = Add(one, b)", "d = Mul(c, half)", "y = Mul(x, d)"]),
    "half as a quotient": replace(GELU, lines=[*GELU.lines[:4], "y = Div(d, two)"]),
    "half of axes": replace(GELU, constants={**_NUMBERS, "half": np.full((1, 1, 1, 1), 0.5, np.float32)}),
    "of a sum": replace(GELU, lines=["w0 = Add(x, one)", *(v.replace("(x", "(w0") for v in GELU.lines)],
                        becomes=["Add", "Gelu"]),
    "gated": replace(GELU, lines=[*GELU.lines[:4], "e = Mul(d, half)", "y = Mul(e, k)"], becomes=["Gelu", "Mul"],
                     others={"k": signed(2, 6, 9, 7)}),
    "tanh": TANH,
    "tanh, cube as products": replace(TANH, lines=["p = Mul(x, x)", "a = Mul(p, x)", *TANH.lines[1:]]),
    "tanh, cubic first": replace(TANH, lines=["p = Mul(x, cubic)", "q = Mul(x, p)", "b = Mul(x, q)", *TANH.lines[2:]]),
    "tanh, x before the sum": replace(TANH, lines=[
        "p = Mul(x, x)", "q = Mul(p, cubic)", "r = Add(q, one)", "s = Mul(x, factor)", "d = Mul(s, r)",
        *TANH.lines[4:]]),
    "mish": MISH, "mish turned round": changed(MISH, 2, "y = Mul(b, x)", becomes=["Mish"]),
    "hard swish": HARD,
    "hard swish, quotient first": replace(HARD, lines=[*HARD.lines[:2], "c = Div(b, six)", "y = Mul(x, c)"]),
    "hard swish, sixth": replace(HARD, lines=[
        "a = Add(three, x)", HARD.lines[1], "c = Mul(sixth, b)", "y = Mul(c, x)"]),
    "hard sigmoid": SIGMOID,
    "hard sigmoid, default beta": changed(SIGMOID, 0, "a = HardSigmoid<alpha=0.16666667>(x)", becomes=["HardSwish"]),
}
NO_ACTIVATIONS = {
    **{f"before opset {s.opset}": replace(s, becomes=None, opset=s.opset - 1) for s in (GELU, MISH, HARD)},
    "tanh before opset 20": replace(TANH, becomes=None, opset=19),
    "swish": replace(GELU, lines=["a = Sigmoid(x)", "y = Mul(x, a)"], becomes=None),
    "1.41": changed(GELU, None, constants={**_NUMBERS, "root": numbers(1.41)}),
    "1.4142": changed(GELU, None, constants={**_NUMBERS, "root": numbers(1.4142)}),
    "0.04471": changed(TANH, None, constants={**_NUMBERS, "cubic": numbers(0.04471)}),
    "0.16667": changed(SIGMOID, 0, "a = HardSigmoid<alpha=0.16667,beta=0.5>(x)"),
    "default alpha": changed(SIGMOID, 0, "a = HardSigmoid(x)"),
    "beta": changed(SIGMOID, 0, "a = HardSigmoid<alpha=0.16666667,beta=0.25>(x)"),
    "a third": changed(GELU, None, constants={**_NUMBERS, "half": numbers(1 / 3)}),
    "one plus": changed(GELU, None, constants={**_NUMBERS, "one": numbers(2)}),
    "multiplied by the root": changed(GELU, 0, "a = Mul(x, root)"),
    "of another tensor": changed(GELU, 3, "d = Mul(k, c)", others={"k": signed(2, 6, 9, 7)}),
    "inside of another": changed(GELU, 0, "a = Div(k, root)", others={"k": signed(2, 6, 9, 7)}),
    "Erf leaves the graph": changed(GELU, None, outputs=["y", "b"]),
    "the sum is read again": changed(GELU, None, lines=[*GELU.lines, "z = Relu(c)"], outputs=["y", "z"]),
    "a factor of cells": changed(GELU, None, constants={**_NUMBERS, "half": np.full(7, 0.5, np.float32)}),
    "the square": changed(TANH, 0, "a = Pow(x, two)"),
    "mish of another": changed(MISH, 2, "y = Mul(k, b)", others={"k": signed(2, 6, 9, 7)}),
    "softplus leaves the graph": changed(MISH, None, outputs=["y", "a"]),
    "clip to 5": changed(HARD, None, constants={**_NUMBERS, "six": numbers(5)}),
    "clip without its lower end": changed(HARD, 1, "b = Clip(a,, six)"),
    "no sixth": changed(HARD, 3, "y = Div(c, three)"),
    "divided the wrong way": changed(HARD, None, lines=[
        "a = Add(x, three)", "b = Clip(a, one, six)", "c = Mul(b, b)", "y = Div(six, c)"]),
}


@pytest.mark.parametrize("spelling", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_activations(spelling: Spelling) -> None:
    check(spelling)


@pytest.mark.parametrize("spelling", NO_ACTIVATIONS.values(), ids=NO_ACTIVATIONS)
def test_no_activation(spelling: Spelling) -> None:
    check(spelling)


# --- zeros before a window ----------------------------------------------------------------------------

PADDED = Spelling(["p = Pad(x, pads)", "y = Conv(p, w)"],
                  {"pads": integers(0, 0, 0, 1, 0, 0, 1, 2), "w": signed(4, 6, 3, 3), "nothing": numbers(0),
                   "number": numbers(0.5), "axes": integers(-1, 2), "few": integers(2, 0, 1, 1)}, ["Conv"], opset=13)
MEAN = replace(PADDED, lines=["p = Pad(x, pads)", "y = AveragePool<kernel_shape=[3,3],strides=[2,2]>(p)"],
               becomes=["AveragePool"])
PADS = {
    "TensorFlow": PADDED,
    "a value of 0": changed(PADDED, 0, "p = Pad(x, pads, nothing)", becomes=["Conv"]),
    "as attributes": replace(changed(PADDED, 0, "p = Pad<pads=[0,0,0,1,0,0,1,2]>(x)", becomes=["Conv"]), opset=7),
    "axes": replace(changed(PADDED, 0, "p = Pad(x, few,, axes)", becomes=["Conv"]), opset=18),
    "pads of its own": changed(PADDED, 1, "y = Conv<pads=[1,0,2,1],strides=[2,2]>(p, w)", becomes=["Conv"]),
    "automatic, none": changed(PADDED, 1, 'y = Conv<auto_pad="VALID">(p, w)', becomes=["Conv"]),
    "more than the window": changed(PADDED, None, becomes=["Conv"], constants={
        **PADDED.constants, "pads": integers(0, 0, 4, 5, 0, 0, 0, 6)}),
    "mean": MEAN,
    "mean that counts": changed(MEAN, 1, "y = AveragePool<kernel_shape=[3,3],pads=[1,0,0,0],count_include_pad=1>(p)",
                                becomes=["AveragePool"]),
}
NO_PADS = {
    "another number": changed(PADDED, 0, "p = Pad(x, pads, number)"),
    "a number from data": changed(PADDED, 0, 'p = Pad<mode="edge">(x, pads)'),
    "reflected": changed(PADDED, 0, 'p = Pad<mode="reflect">(x, pads)'),
    "cropped": changed(PADDED, None, constants={**PADDED.constants, "pads": integers(0, 0, -1, 1, 0, 0, 1, 2)}),
    "channels": changed(PADDED, None, constants={
        **PADDED.constants, "pads": integers(0, 1, 0, 1, 0, 1, 1, 2), "w": signed(4, 8, 3, 3)}),
    "cases": changed(PADDED, None, constants={**PADDED.constants, "pads": integers(1, 0, 0, 1, 0, 0, 1, 2)}),
    "read again": changed(PADDED, None, lines=[*PADDED.lines, "z = Relu(p)"], outputs=["y", "z"]),
    "leaves the graph": changed(PADDED, None, outputs=["y", "p"]),
    "automatic": changed(PADDED, 1, 'y = Conv<auto_pad="SAME_UPPER">(p, w)'),
    "transposed": changed(PADDED, 1, "y = ConvTranspose(p, w)", constants={
        **PADDED.constants, "w": signed(6, 4, 3, 3)}),
    "largest": changed(MEAN, 1, "y = MaxPool<kernel_shape=[3,3]>(p)"),
    "mean that does not count": changed(MEAN, 1, "y = AveragePool<kernel_shape=[3,3],pads=[1,0,0,0]>(p)"),
    "mean, rounded up": changed(MEAN, 1, "y = AveragePool<kernel_shape=[3,3],strides=[2,2],ceil_mode=1>(p)"),
    "mean of padding alone": changed(MEAN, None, constants={
        **PADDED.constants, "pads": integers(0, 0, 3, 0, 0, 0, 0, 0)}),
    "p-norm": changed(MEAN, 1, "y = LpPool<kernel_shape=[3,3]>(p)"),
}


@pytest.mark.parametrize("spelling", PADS.values(), ids=PADS)
def test_pads(spelling: Spelling) -> None:
    check(spelling)


@pytest.mark.parametrize("spelling", NO_PADS.values(), ids=NO_PADS)
def test_pads_that_stay(spelling: Spelling) -> None:
    operator = [v for v in spelling.operators if v]
    assert "Pad" in operator
    check(spelling)


# --- pools of whole axes ------------------------------------------------------------------------------

WIDEST = Spelling(["y = MaxPool<kernel_shape=[9,7]>(x)"], {}, ["GlobalMaxPool"])
WHOLE_MEAN = replace(WIDEST, lines=["y = AveragePool<kernel_shape=[9,7],strides=[9,7]>(x)"],
                     becomes=["GlobalAveragePool"])
POOLS = {
    "maximum": WIDEST,
    "mean": WHOLE_MEAN,
    "opset 7": replace(WHOLE_MEAN, opset=7),
    "opset 22": replace(WIDEST, opset=22),
    "padding never wins": changed(WIDEST, 0, "y = MaxPool<kernel_shape=[11,9],pads=[1,2,1,0]>(x)",
                                  becomes=["GlobalMaxPool"]),
    "padding that does not count": changed(WHOLE_MEAN, 0, "y = AveragePool<kernel_shape=[11,7],pads=[1,0,1,0]>(x)",
                                           becomes=["GlobalAveragePool"]),
    "surplus": changed(
        WHOLE_MEAN, 0, "y = AveragePool<kernel_shape=[12,7],strides=[5,1],pads=[0,0,1,0],ceil_mode=1>(x)",
        becomes=["GlobalAveragePool"]),
    "rows": changed(WIDEST, 0, "y = MaxPool<kernel_shape=[9,1]>(x)", becomes=["ReduceMax"]),
    "rows, axes as input": replace(changed(WIDEST, 0, "y = MaxPool<kernel_shape=[9,1]>(x)", becomes=["ReduceMax"]),
                                   opset=18),
    "columns": changed(WHOLE_MEAN, 0, "y = AveragePool<kernel_shape=[1,7]>(x)", becomes=["ReduceMean"]),
    "columns, axes as input": replace(
        changed(WHOLE_MEAN, 0, "y = AveragePool<kernel_shape=[1,7]>(x)", becomes=["ReduceMean"]), opset=19),
    "lines": replace(WIDEST, lines=["y = MaxPool<kernel_shape=[8]>(x)"], shape=(2, 6, 8)),
    "volumes": replace(WHOLE_MEAN, lines=["y = AveragePool<kernel_shape=[3,9,4]>(x)"], shape=(2, 6, 3, 9, 4)),
    "automatic": changed(WIDEST, 0, 'y = MaxPool<kernel_shape=[18,14],strides=[9,7],auto_pad="SAME_UPPER">(x)',
                         becomes=["GlobalMaxPool"]),
}
NO_POOLS = {
    "part of an axis": changed(WIDEST, 0, "y = MaxPool<kernel_shape=[8,7],strides=[9,7]>(x)"),
    "several windows": changed(WIDEST, 0, "y = MaxPool<kernel_shape=[9,5]>(x)"),
    "gaps": changed(WIDEST, 0, "y = MaxPool<kernel_shape=[5,4],dilations=[2,2]>(x)"),
    "padding that counts": changed(
        WHOLE_MEAN, 0, "y = AveragePool<kernel_shape=[11,7],pads=[1,0,1,0],count_include_pad=1>(x)"),
    "every other row": changed(WIDEST, 0, "y = MaxPool<kernel_shape=[9,1],strides=[1,2]>(x)"),
    "nothing": changed(WIDEST, 0, "y = MaxPool<kernel_shape=[1,1]>(x)"),
}


@pytest.mark.parametrize("spelling", POOLS.values(), ids=POOLS.keys())
def test_pools_of_whole_axes(spelling: Spelling) -> None:
    check(spelling)
    plan = compile_plan(spelling.model(), "width=2")
    assert not any(node.op_type == dialect.HALO_EXCHANGE for node in plan.graph)


@pytest.mark.parametrize("spelling", NO_POOLS.values(), ids=NO_POOLS.keys())
def test_pools_of_parts(spelling: Spelling) -> None:
    check(replace(spelling, local=False))


def test_where_the_largest_cells_are_needs_the_pool() -> None:
    places = Spelling(["y, z = MaxPool<kernel_shape=[9,7]>(x)"], {}, ["MaxPool"], outputs=["y", "z"])
    assert operators(canonical(places.model())) == ["MaxPool"]


def test_a_max_pool_that_trains_stays() -> None:
    assert operators(canonical(WIDEST.model(), fold_norms=False)) == ["MaxPool"]
