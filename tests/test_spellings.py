"""Normalisations that exporters write out in several nodes: read as one, or left alone when anything differs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from tests.spellings import Spelling, canonical, changed, check, integers, numbers, operators, random

# --- group normalisation -----------------------------------------------------------------------------

GROUPS = Spelling(
    ["a = Reshape(x, groups)", "b = InstanceNormalization<epsilon=0.01>(a, ones, zeros)", "s = Shape(x)",
     "c = Reshape(b, s)", "d = Mul(c, scale)", "y = Add(d, bias)"],
    {"groups": integers(0, 2, -1), "ones": np.ones(2, np.float32), "zeros": np.zeros(2, np.float32),
     "scale": random(6, 1, 1, seed=1), "bias": random(6, 1, 1, seed=2)},
    ["GroupNormalization"])
_BARE = ["a = Reshape(x, groups)", "b = InstanceNormalization(a, ones, zeros)", "y = Reshape(b, back)"]
_BACK = integers(2, 6, 9, 7)


def groups_of(count: int, **fields: object) -> Spelling:
    return changed(GROUPS, None, constants={
        **GROUPS.constants, "groups": integers(0, count, -1), "ones": np.ones(count, np.float32),
        "zeros": np.zeros(count, np.float32)}, **fields)


GROUP_SPELLINGS = {
    "torch": GROUPS,
    **{f"opset {n}": replace(GROUPS, opset=n) for n in (7, 8, 9, 11, 13, 21)},
    "numbers before the tensor": changed(changed(GROUPS, 4, "d = Mul(scale, c)"), 5, "y = Add(bias, d)",
                                         becomes=["GroupNormalization"]),
    "constant extents": changed(GROUPS, None, lines=[v for v in GROUPS.lines if "Shape(x)" not in v],
                                constants={**GROUPS.constants, "s": _BACK, "groups": integers(2, 2, -1)},
                                becomes=["GroupNormalization"]),
    "groups not flattened": changed(GROUPS, None, becomes=["GroupNormalization"],
                                    constants={**GROUPS.constants, "groups": integers(0, 2, 3, 9, -1)}),
    "neither Mul nor Add": changed(GROUPS, None, lines=_BARE, constants={**GROUPS.constants, "back": _BACK},
                                   becomes=["GroupNormalization"]),
    "Mul alone": changed(GROUPS, 4, "y = Mul(c, scale)", lines=[*GROUPS.lines[:4], "y = Mul(c, scale)"],
                         becomes=["GroupNormalization"]),
    "Add alone": changed(GROUPS, None, lines=[*GROUPS.lines[:4], "y = Add(c, bias)"], becomes=["GroupNormalization"]),
    "numbers for every channel alike": changed(GROUPS, None, becomes=["GroupNormalization"], constants={
        **GROUPS.constants, "scale": numbers(1.5), "bias": random(1, 6, 1, 1)}),
    "own scale and bias": changed(GROUPS, None, becomes=["GroupNormalization", "Mul", "Add"], constants={
        **GROUPS.constants, "ones": random(2), "zeros": random(2, seed=3)}),
    "one group": groups_of(1, becomes=["GroupNormalization"]),
    "a group per channel": groups_of(6, becomes=["InstanceNormalization"]),
    "volumes": changed(GROUPS, None, shape=(2, 6, 3, 9, 4), becomes=["GroupNormalization"], constants={
        **GROUPS.constants, "scale": random(1, 6, 1, 1, 1), "bias": random(6, 1, 1, 1)}),
    "lines": changed(GROUPS, None, shape=(2, 6, 8), becomes=["GroupNormalization"], constants={
        **GROUPS.constants, "scale": random(6, 1), "bias": random(6, 1)}),
    "the plane is an output of another layer": changed(
        GROUPS, None, lines=["w0 = Relu(x)", *(v.replace("(x", "(w0") for v in GROUPS.lines)],
        becomes=["Relu", "GroupNormalization"]),
}
_LEFT = ["Reshape", "InstanceNormalization", "Reshape", "Mul", "Add"]
GROUP_TWINS = {
    "groups of cases and channels": changed(GROUPS, None, becomes=_LEFT, local=False, constants={
        **GROUPS.constants, "groups": integers(1, 4, -1), "ones": np.ones(4, np.float32),
        "zeros": np.zeros(4, np.float32)}),
    "groups that are no whole channels": changed(GROUPS, None, becomes=_LEFT, local=False, constants={
        **GROUPS.constants, "groups": integers(2, 9, -1), "ones": np.ones(9, np.float32),
        "zeros": np.zeros(9, np.float32)}),
    "other extents afterwards": changed(
        GROUPS, None, lines=_BARE, becomes=["Reshape", "InstanceNormalization", "Reshape"], local=False,
        constants={**GROUPS.constants, "back": integers(2, 6, 7, 9)}),
    "groups leave the graph": changed(GROUPS, None, becomes=_LEFT, outputs=["y", "b"], local=False),
    "flat groups read twice": changed(GROUPS, None, local=False, outputs=["y", "z"], becomes=[*_LEFT, "Relu"],
                                      lines=[*GROUPS.lines, "z = Relu(a)"]),
    "a scale from data": changed(GROUPS, None, local=False, becomes=_LEFT, others={"ones": random(2)},
                                 constants={k: v for k, v in GROUPS.constants.items() if k != "ones"}),
}
AFTER_GROUPS = {
    "a factor per column": ("scale", random(7), ["GroupNormalization", "Mul", "Add"]),
    "a summand per cell": ("bias", random(1, 6, 9, 1), ["GroupNormalization", "Add"]),
    "a factor per case": ("scale", random(2, 1, 1, 1), ["GroupNormalization", "Mul", "Add"]),
    "a factor that widens": ("scale", random(1, 1, 6, 1, 1), ["GroupNormalization", "Mul", "Add"]),
}


@pytest.mark.parametrize("spelling", GROUP_SPELLINGS.values(), ids=GROUP_SPELLINGS)
def test_group_normalisation(spelling: Spelling) -> None:
    check(spelling)


@pytest.mark.parametrize("spelling", GROUP_TWINS.values(), ids=GROUP_TWINS)
def test_not_group_normalisation(spelling: Spelling) -> None:
    check(spelling)


@pytest.mark.parametrize("case", AFTER_GROUPS)
def test_numbers_after_groups_that_are_not_per_channel(case: str) -> None:
    name, array, becomes = AFTER_GROUPS[case]
    spelling = changed(GROUPS, None, constants={**GROUPS.constants, name: array}, becomes=becomes)
    if array.ndim == 5:  # no mesh axis for five axes that are none of space
        assert operators(canonical(spelling.model())) == becomes
    else:
        check(spelling)


def test_a_result_read_before_its_scale_keeps_the_factor() -> None:
    check(changed(GROUPS, None, lines=[*GROUPS.lines, "z = Relu(c)"], outputs=["y", "z"],
                  becomes=["GroupNormalization", "Mul", "Add", "Relu"]))


def test_a_factor_after_the_summand_stays() -> None:
    check(changed(GROUPS, None, lines=[*GROUPS.lines[:4], "d = Add(c, bias)", "y = Mul(d, scale)"],
                  becomes=["GroupNormalization", "Mul"]))


def test_layers_may_share_their_constants() -> None:
    again = ["e = Reshape(d0, groups)", "f = InstanceNormalization(e, ones, zeros)", "g = Reshape(f, s)",
             "h = Mul(g, scale)", "y = Add(h, bias)"]
    check(changed(GROUPS, None, lines=[*GROUPS.lines[:5], "d0 = Add(d, bias)", *again],
                  becomes=["GroupNormalization"] * 2))


# --- mean and variance -------------------------------------------------------------------------------

_MOMENTS = ["m = ReduceMean<axes=[2,3]>(x)", "d = Sub(x, m)", "q = Pow(d, two)", "v = ReduceMean<axes=[2,3]>(q)",
            "e = Add(v, epsilon)", "r = Sqrt(e)", "n = Div(d, r)", "s = Mul(n, scale)", "y = Add(s, bias)"]
INSTANCES = Spelling(_MOMENTS, {"two": numbers(2), "epsilon": numbers(1e-3), "one": numbers(1), "half": numbers(-0.5),
                                "scale": random(6, 1, 1, seed=1), "bias": random(6, 1, 1, seed=2)},
                     ["InstanceNormalization"], opset=13)
_LAST = [line.replace("[2,3]", "[-1]") for line in _MOMENTS]
LAYERS = replace(INSTANCES, lines=_LAST, becomes=["LayerNormalization"], opset=17,
                 constants={**INSTANCES.constants, "scale": random(7, seed=1), "bias": random(7, seed=2)})


def mean_spelling(base: Spelling, *changes: tuple[int, str], drop: Sequence[int] = (),
                  becomes: Sequence[str] | None = None, **fields: object) -> Spelling:
    lines = list(base.lines)
    for index, text in changes:
        lines[index] = text
    flat = [part for i, line in enumerate(lines) if i not in drop for part in line.split(";")]
    return replace(base, **{"lines": flat, "becomes": becomes if becomes is not None else base.becomes, **fields})


_TENSORFLOW = ["m = ReduceMean<axes=[2,3]>(x)", "d = Sub(x, m)", "q = Mul(d, d)", "v = ReduceMean<axes=[2,3]>(q)",
               "e = Add(v, epsilon)", "r = Sqrt(e)", "i = Reciprocal(r)", "f = Mul(i, scale)", "g = Mul(x, f)",
               "h = Mul(m, f)", "j = Sub(bias, h)", "y = Add(g, j)"]
MEAN_SPELLINGS = {
    "torch": INSTANCES,
    **{f"opset {n}": replace(INSTANCES, opset=n) for n in (7, 9, 11, 17)},
    "axes as an input": replace(INSTANCES, opset=18, constants={**INSTANCES.constants, "axes": integers(2, 3)},
                                lines=[v.replace("<axes=[2,3]>(x)", "(x, axes)").replace("<axes=[2,3]>(q)", "(q, axes)")
                                       for v in _MOMENTS]),
    "negative axes": mean_spelling(INSTANCES, (0, "m = ReduceMean<axes=[-1,-2]>(x)")),
    "product with itself": mean_spelling(INSTANCES, (2, "q = Mul(d, d)")),
    "difference twice": mean_spelling(INSTANCES, (2, "k = Sub(x, m);q = Mul(k, k)")),
    "reciprocal": mean_spelling(INSTANCES, (6, "i = Reciprocal(r);n = Mul(d, i)")),
    "one over": mean_spelling(INSTANCES, (6, "i = Div(one, r);n = Mul(i, d)")),
    "power": mean_spelling(INSTANCES, (5, "r = Pow(e, half)"), (6, "n = Mul(d, r)")),
    "epsilon first": mean_spelling(INSTANCES, (4, "e = Add(epsilon, v)")),
    "no scale": mean_spelling(INSTANCES, (6, "y = Div(d, r)"), drop=[7, 8]),
    "bias alone": mean_spelling(INSTANCES, (8, "y = Add(n, bias)"), drop=[7]),
    "TensorFlow": replace(INSTANCES, lines=_TENSORFLOW),
    "lines with numbers per channel": replace(
        INSTANCES, lines=_LAST, shape=(2, 6, 8), constants={**INSTANCES.constants, "scale": random(6, 1),
                                                            "bias": random(6, 1)}),
    "last axis": LAYERS,
    "last axis, TensorFlow": replace(LAYERS, lines=[v.replace("[2,3]", "[3]") for v in _TENSORFLOW]),
    "last axes": replace(LAYERS, lines=[v.replace("[2,3]", "[1,2,3]") for v in _MOMENTS], constants={
        **LAYERS.constants, "scale": random(6, 9, 7, seed=1), "bias": random(6, 9, 7, seed=2)}),
    "last axis, numbers for others": replace(LAYERS, becomes=["LayerNormalization", "Mul", "Add"], constants={
        **LAYERS.constants, "scale": random(6, 1, 1)}),
    "last axis of three": replace(LAYERS, shape=(2, 6, 8), constants={
        **LAYERS.constants, "scale": random(8, seed=1), "bias": random(8, seed=2)}),
}
MEAN_TWINS = {
    "last axis before opset 17": replace(LAYERS, becomes=None, opset=16),
    "last axis of three before opset 17": replace(LAYERS, becomes=None, opset=16, shape=(2, 6, 8), constants={
        **LAYERS.constants, "scale": random(8, seed=1), "bias": random(8, seed=2)}),
    "means over other axes": changed(INSTANCES, 3, "v = ReduceMean<axes=[2]>(q)"),
    "over channels": changed(INSTANCES, None, lines=[v.replace("[2,3]", "[1]") for v in _MOMENTS]),
    "over channels and rows": changed(INSTANCES, None, lines=[v.replace("[2,3]", "[1,2]") for v in _MOMENTS]),
    "over everything": changed(INSTANCES, None, lines=[v.replace("[2,3]", "[0,1,2,3]") for v in _MOMENTS]),
    "no epsilon": changed(INSTANCES, None, lines=[*_MOMENTS[:4], "r = Sqrt(v)", *_MOMENTS[6:]]),
    "epsilon not one number": changed(INSTANCES, None, constants={**INSTANCES.constants, "epsilon": random(6, 1, 1)}),
    "epsilon below zero": changed(INSTANCES, None, constants={**INSTANCES.constants, "epsilon": numbers(-1e-6)}),
    "epsilon outside the root": changed(INSTANCES, None, lines=[
        *_MOMENTS[:4], "r = Sqrt(v)", "e = Add(r, epsilon)", "n = Div(d, e)", *_MOMENTS[7:]]),
    "another power": changed(INSTANCES, None, constants={**INSTANCES.constants, "two": numbers(4)}),
    "another mean": changed(INSTANCES, 3, "v = ReduceMax<axes=[2,3]>(q)"),
    "a sum": changed(INSTANCES, 3, "v = ReduceSum<axes=[2,3]>(q)", opset=11),
    "the mean leaves the graph": changed(INSTANCES, None, outputs=["y", "m"]),
    "the variance is read again": changed(INSTANCES, None, lines=[*_MOMENTS, "z = Neg(v)"], outputs=["y", "z"]),
    "the wrong way round": changed(INSTANCES, 6, "n = Mul(d, r)"),
    "the mean of another tensor": changed(INSTANCES, 0, "m = ReduceMean<axes=[2,3]>(w)",
                                          others={"w": random(2, 6, 9, 7, seed=9)}),
    "TensorFlow, another factor for the mean": changed(
        INSTANCES, None, lines=[*_TENSORFLOW[:9], "h = Mul(m, i)", *_TENSORFLOW[10:]]),
    "TensorFlow, scale from data": changed(
        INSTANCES, None, lines=_TENSORFLOW, others={"scale": random(2, 6, 1, 1)},
        constants={k: v for k, v in INSTANCES.constants.items() if k != "scale"}),
}


@pytest.mark.parametrize("spelling", MEAN_SPELLINGS.values(), ids=MEAN_SPELLINGS)
def test_means_and_variances(spelling: Spelling) -> None:
    check(spelling)


@pytest.mark.parametrize("spelling", MEAN_TWINS.values(), ids=MEAN_TWINS)
def test_not_a_normalisation(spelling: Spelling) -> None:
    check(spelling)
