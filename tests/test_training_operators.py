"""Every registered operator's examples under autograd: gradients of the inputs on every mesh.

Without a mesh they are held against differences of the float64 reference; on a mesh against those without one.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import numpy as np
import onnx
import pytest
import torch

import partitioner as pt
from partitioner import dialect
from partitioner.loader import load_model
from partitioner.ops.nodes import operator_of
from passes.canonicalize import Canonicalize
from passes.pipeline import Pipeline
from runtime.training.module import PartitionedModule
from tests.examples import Case, case_model, examples
from tests.oracle import as_double, reference64
from tests.test_conformance import doubled, some_layouts, some_or_all

Array = np.ndarray

CASES = [case for case in examples() if case.domain != dialect.DOMAIN]
by_name = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)

STEP = 1e-6
ROUNDING = 1e-5
"""Of the differences: their step over the size of the values."""

STEPPED = {"Ceil", "Floor", "Round", "Sign", "Hardmax", "BitShift", "Mod", "IsInf", "QuantizeLinear", "CastLike"}
"""Operators whose gradient is zero, or none, although their results jump."""


def drawn(case: Case) -> tuple[onnx.ModelProto, dict[str, Array]]:
    model, inputs = case_model(case)
    return as_double(model), doubled(inputs)


def differentiable(model: onnx.ModelProto) -> bool:
    """Whether gradients can be asked for: a floating-point input, and kernels of our own."""
    graph = Pipeline((Canonicalize({}),)).run(load_model(model)).graph
    floats = [v for v in graph.inputs if v.dtype is not None and v.dtype.is_floating_point() and v.uses()]
    return bool(floats) and all(operator_of(node).has_gradient for node in graph)


def gradients(module: PartitionedModule, inputs: Mapping[str, Array]) -> tuple[dict[str, Array], dict[str, Array]]:
    """Outputs, and gradients of a weighted sum of the floating-point ones."""
    given = {name: torch.from_numpy(np.array(a)) for name, a in inputs.items() if name in module.input_names}
    leaves = {n: t.requires_grad_() for n, t in given.items() if t.is_floating_point()}
    found = module(**given)
    outputs = found if isinstance(found, dict) else {module.output_names[0]: found}
    total = sum((y * torch.from_numpy(weights_of(n, y.shape))).sum() for n, y in outputs.items()
                if y.is_floating_point() and y.requires_grad)
    if not isinstance(total, torch.Tensor):
        return {}, {}
    total.backward()
    return ({n: y.detach().numpy() for n, y in outputs.items()},
            {n: (torch.zeros_like(t) if t.grad is None else t.grad).numpy() for n, t in leaves.items()})


def weights_of(name: str, shape: tuple[int, ...]) -> Array:
    return np.random.default_rng(zlib.crc32(name.encode())).uniform(0.5, 1.5, tuple(shape))


def slope(model: onnx.ModelProto, inputs: Mapping[str, Array], direction: Mapping[str, Array],
          step: float = STEP) -> float:
    """Central difference of the weighted sum along a direction."""
    sums: list[float] = []
    for sign in (1, -1):
        moved = {n: a + sign * step * direction[n] if n in direction else a for n, a in inputs.items()}
        found = reference64(model, moved)
        sums.append(sum(float((y * weights_of(n, y.shape)).sum()) for n, y in found.items() if y.dtype.kind == "f"))
    return (sums[0] - sums[1]) / (2 * step)


@by_name
def test_gradients_are_those_of_the_reference(case: Case) -> None:
    model, inputs = drawn(case)
    if case.example.op_type in STEPPED or not differentiable(model):
        return
    module = pt.partition(model).module().eval()
    _, found = gradients(module, inputs)
    random = np.random.default_rng(zlib.crc32(case.name.encode()))
    direction = {n: random.uniform(-1, 1, a.shape) for n, a in inputs.items() if n in found}
    if not direction:
        return
    expected = slope(model, inputs, direction)
    if abs(slope(model, inputs, direction, STEP / 100) - expected) > 0.1 * abs(expected) + 0.1:
        assert case.example.between == (0.0, 0.0)  # a norm of zeros has no derivative
        return
    mine = sum(float((found[n] * direction[n]).sum()) for n in found)
    scale = sum(float(np.abs(found[n] * direction[n]).sum()) for n in found)
    assert np.isfinite(mine)
    assert abs(mine - expected) <= ROUNDING * max(scale, abs(expected), 1e-3), (mine, expected)


@some_or_all
@by_name
def test_gradients_are_the_same_on_every_mesh(case: Case, every: bool) -> None:
    model, inputs = drawn(case)
    if not differentiable(model):
        return
    _, expected = gradients(pt.partition(model).module().eval(), inputs)
    for mesh, cuts in some_layouts(case, next(iter(inputs.values())).shape, every):
        _, found = gradients(pt.partition(model, mesh=mesh, cuts=cuts).module().eval(), inputs)
        assert set(found) == set(expected)
        for name, grad in expected.items():
            given = np.isfinite(grad)
            assert given.all() or case.example.between == (0.0, 0.0)
            off = np.abs((found[name] - grad)[given]).max(initial=0) / max(np.abs(grad[given]).max(initial=0), 1e-3)
            assert off < 1e-10, (mesh, cuts, name, off)
