"""Every registered operator's examples, sharded every way, held against onnxruntime and the float64 reference."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from partitioner import dialect
from partitioner.geometry import Box
from partitioner.mesh import spatial_names
from partitioner.ops import registered
from partitioner.ops.base import Operator
from partitioner.ops.nodes import input_box, operator_of
from passes.base import Pass
from passes.canonicalize import Canonicalize
from passes.keep_apart import KeepApart
from passes.split_reductions import SplitReductions
from tests.examples import WEIGHTED, Case, case_model, examples
from tests.oracle import Cuts, as_double, close, compile_plan, error, ort_bits, reference64, run_lockstep, run_ort

CASES = [case for case in examples() if case.domain != dialect.DOMAIN]
WEIGHTED_CASES = [case for case in CASES if case.example.op_type in WEIGHTED]
ELSEWHERE = {"ConcatConv", "GroupNormalization", "TrainingBatchNormalization", "TrainingDropout"}
"""Operators of our own that other files see to: test_parts.py, test_spellings.py and test_training.py."""

by_name = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
some_or_all = pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["some", "all"])


def named_axes(shape: tuple[int, ...]) -> dict[str, int]:
    """Extents of the axes that a mesh can split."""
    if not 3 <= len(shape) <= 5:
        return {"batch": shape[0]} if shape else {}
    return {"batch": shape[0], **dict(zip(spatial_names(len(shape) - 2), shape[2:], strict=True))}


def layouts(case: Case, shape: tuple[int, ...]) -> Iterator[tuple[str | None, Cuts]]:
    """Meshes of 1, 2 and 3 shards of every axis, uneven and empty ones, and of two axes at once."""
    random = np.random.default_rng(zlib.crc32(case.name.encode()))
    extents = {name: n for name, n in named_axes(shape).items() if n > 1}
    yield None, {}
    for name, n in extents.items():
        for count in range(2, min(n, 3) + 1):
            yield f"{name}={count}", {}
            yield f"{name}={count}", {name: cut(random, n, count)}
        yield f"{name}=2", {name: (0, 0, n)}
    for (one, n), (two, m) in itertools.combinations(extents.items(), 2):
        yield f"{one}=2,{two}=2", {one: cut(random, n, 2), two: cut(random, m, 2)}


def some_layouts(case: Case, shape: tuple[int, ...], every: bool) -> list[tuple[str | None, Cuts]]:
    """All layouts, or a third of them that differs from example to example: operators have several."""
    found = list(layouts(case, shape))
    return found if every else found[zlib.crc32(case.name.encode()) % min(3, len(found)) :: 3]


def cut(random: np.random.Generator, n: int, shards: int) -> tuple[int, ...]:
    """Ascending positions, equal ones included."""
    return (0, *sorted(int(i) for i in random.integers(0, n + 1, shards - 1)), n)


def doubled(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: a.astype(np.float64) if a.dtype == np.float32 else a for name, a in inputs.items()}


@by_name
def test_shards_equal_the_whole_in_float64(case: Case) -> None:
    check_float64(case, weights_given=False)


@pytest.mark.parametrize("case", WEIGHTED_CASES, ids=lambda case: case.name)
def test_weights_may_be_inputs(case: Case) -> None:
    check_float64(case, weights_given=True)


def check_float64(case: Case, weights_given: bool) -> None:
    model, inputs = case_model(case, weights_given)
    model, inputs = as_double(model), doubled(inputs)
    expected = reference64(model, inputs)
    for mesh, cuts in layouts(case, next(iter(inputs.values())).shape):
        found = run_lockstep(compile_plan(model, mesh, cuts), inputs).outputs
        for name in expected:
            mine, exact = found[name], expected[name]
            assert close(mine, exact, 1e-12), f"{mesh} {cuts}: error {error(mine, exact)}"


@some_or_all
@by_name
def test_float32_is_as_good_as_onnxruntime(case: Case, every: bool) -> None:
    model, inputs = case_model(case)
    exact, runtime = reference64(model, doubled(inputs)), run_ort(model, inputs)
    limits = {name: 3 * error(np.where(np.isfinite(a), runtime[name], 0), np.where(np.isfinite(a), a, 0))
              for name, a in exact.items()}
    for mesh, cuts in some_layouts(case, next(iter(inputs.values())).shape, every):
        found = run_lockstep(compile_plan(model, mesh, cuts), inputs).outputs
        for name, limit in limits.items():
            mine = found[name]
            assert mine.dtype == runtime[name].dtype
            assert close(mine, exact[name], limit), \
                f"{mesh} {cuts}: error {error(mine, exact[name])}, onnxruntime's {limit / 3}"


@some_or_all
@by_name
def test_communication_passes_keep_the_bits(case: Case, every: bool) -> None:
    """Oracle 2: only canonicalize, keep-apart and split-reductions may change arithmetic, and only within rounding."""
    model, inputs = case_model(case)
    exact = reference64(model, doubled(inputs))
    for mesh, cuts in some_layouts(case, next(iter(inputs.values())).shape, every):
        bits: list[tuple[str, dict[str, bytes]]] = []

        def observe(index: int, item: Pass, plan: ir.Model, bits: list = bits) -> None:
            found = ort_bits(plan, inputs)
            arithmetic = isinstance(item, Canonicalize | KeepApart | SplitReductions)
            assert arithmetic or found == bits[-1][1], f"{item.name} changed the result"
            bits.append((item.name, found))

        plan = compile_plan(model, mesh, cuts, observe=[observe])
        last = run_ort(ir.to_proto(plan), inputs)
        for name in exact:
            assert close(last[name], exact[name], 1e-5), f"{mesh} {cuts}: error {error(last[name], exact[name])}"


@by_name
def test_extents_come_from_the_maps(case: Case) -> None:
    """What an operator says of its outputs is what onnxruntime yields."""
    model, inputs = case_model(case)
    plan = compile_plan(model, None)
    for value, expected in zip(plan.graph.outputs, run_ort(model, inputs).values(), strict=True):
        assert dialect.shape_of(value) == expected.shape
        assert value.dtype.numpy() == expected.dtype


def test_every_operator_has_an_example() -> None:
    named = {case.example.op_type for case in CASES}
    assert sorted(name for domain, name, _ in registered() if domain != dialect.DOMAIN and name not in named) == []


def test_every_operator_of_our_own_appears_in_a_plan() -> None:
    """Their inputs are results of reductions, so they have no example that stands alone."""
    seen: set[str] = set()
    for case in CASES:
        model, inputs = case_model(case)
        extents = named_axes(next(iter(inputs.values())).shape)
        mesh = ",".join(f"{name}=2" for name, n in extents.items() if n > 1)
        seen |= {node.op_type for node in compile_plan(model, mesh).graph if node.domain == dialect.DOMAIN}
    known = {name for domain, name, _ in registered() if domain == dialect.DOMAIN}
    assert sorted(known - seen - ELSEWHERE) == [] and known >= ELSEWHERE


@by_name
def test_operators_declare_views_and_memory_truly(case: Case) -> None:
    """A view shares its input's memory, any other result does not; what writes into memory writes all of it."""
    import torch

    from partitioner.ops.base import Call

    model, inputs = case_model(case)
    operator, tensors, boxes = read_case(model, inputs)
    outs = tuple(Box.whole(t.shape) for t in operator.outputs)
    result = operator.run(Call(tensors, boxes, outs))[0]
    assert tuple(result.shape) == operator.outputs[0].shape
    if operator.is_view:
        assert result.untyped_storage().data_ptr() == tensors[0].untyped_storage().data_ptr()
    if operator.writes_into:
        into = torch.full(result.shape, float("nan"), dtype=result.dtype)
        given = operator.run(Call(tensors, boxes, outs, into))[0]
        assert given.data_ptr() == into.data_ptr()
        assert torch.equal(into, result)


def read_case(model: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> tuple[Operator, tuple, tuple]:
    """The operator of a one-node model with the tensors that it needs, and their boxes."""
    import torch

    plan = compile_plan(model, None)
    (node,) = plan.graph
    arrays = {str(v.name): v.const_value.numpy() for v in plan.graph.initializers.values()} | inputs
    outs = tuple(Box.whole(t.shape) for t in operator_of(node).outputs)
    tensors: list[torch.Tensor | None] = []
    boxes: list[Box | None] = []
    for index, value in enumerate(node.inputs):
        box = None if value is None else input_box(node, index, outs, {})
        boxes.append(box)
        if box is None or value is None:
            tensors.append(None)
            continue
        cells = tuple(slice(i.start, i.stop) for i in box.intervals())
        tensors.append(torch.from_numpy(np.array(arrays[str(value.name)]))[cells])
    return operator_of(node), tuple(tensors), tuple(boxes)
