"""The declared needs of every operator against its true dependences, found by changing its inputs.

One slab of cells of an input axis is changed, and the slabs of every output axis that change are noted:

    depends[output axis][i, j]   slab j of the output depends on slab i of the input

A slab that is not declared is a wrong result to come.  An axis declared whole of which halves of the output need
only a part is a missing sharded rule, and reported likewise.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import pytest

from partitioner import dialect
from partitioner.geometry import Interval, Pieces
from partitioner.loader import load_model
from partitioner.maps import Whole
from partitioner.ops.base import Need, Operator
from partitioner.ops.nodes import operator_of
from passes.canonicalize import Canonicalize
from passes.pipeline import Pipeline
from tests.examples import Case, case_model, examples
from tests.oracle import reference64

Array = np.ndarray
Function = Callable[[Mapping[str, Array]], list[Array]]

CASES = [case for case in examples() if case.domain != dialect.DOMAIN]
by_name = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)

ROUNDING = 1e-5
"""Changes below this part of an output's largest value are none: onnxruntime's LRN keeps a running sum."""

SMALLEST = 3
"""Axes of fewer cells are not looked at: with a halo, half of them is all."""

CHANNELS = "a mesh splits no channels, so `group` is no use to it"
WEIGHTS = "every rank holds all weights"

WHOLE_ON_PURPOSE: dict[tuple[str, int, int | None], str] = {
    ("Conv", 0, 1): CHANNELS,
    ("Conv", 1, None): WEIGHTS,
    ("Conv", 2, None): WEIGHTS,
    ("ConvTranspose", 0, 1): CHANNELS,
    ("ConvTranspose", 1, None): WEIGHTS,
    ("ConvInteger", 0, 1): CHANNELS,
    ("ConvInteger", 1, None): WEIGHTS,
    ("QLinearConv", 0, 1): CHANNELS,
    ("QLinearConv", 3, None): WEIGHTS,
    ("DepthToSpace", 0, 1): CHANNELS,
    ("SpaceToDepth", 0, 1): CHANNELS,
    ("GroupNormalization", 0, 1): CHANNELS,
    ("GroupNormalization", 1, 0): WEIGHTS,
    ("GroupNormalization", 2, 0): WEIGHTS,
    ("AffineGrid", 0, 1): "of theta, a few numbers per case, a column of results needs a row",
    ("ReverseSequence", 0, None): "how far a sequence is reversed is data, and differs from case to case",
}
"""(operator, input, axis or None for all axes) declared whole though its dependence is local, and why."""

INDEXED: dict[str, str] = {
    "Gather": "the indices are data: any cell may be asked for",
    "GatherElements": "the axis along which indices run is held whole, so that any index finds its cell",
    "GatherND": "the axes along which indices run are held whole, so that any index finds its cell",
    "GridSample": "the places are data: any cell may be sampled",
    "ScatterElements": "the axis along which indices run is held whole, so that any index finds its cell",
    "Scatter": "as ScatterElements, which is its later name",
    "ScatterND": "the axes along which indices run are held whole, unless constant indices form a grid",
}
"""Operators that are declared whole along the axes that their indices address, and why; other axes are not excused."""


# --- true dependences ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """How the axes of one output depend on one axis of one input."""

    input: int
    axis: int
    output: int
    depends: tuple[Array, ...]

    def __str__(self) -> str:
        return f"input {self.input} axis {self.axis} -> output {self.output}"


def function_of(model: onnx.ModelProto) -> Function:
    """The model as a function: by onnxruntime, or by the float64 reference where that has no kernel."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception:
        return lambda inputs: list(reference64(model, inputs).values())
    return lambda inputs: session.run(None, dict(inputs))


def dependences(case: Case, model: onnx.ModelProto, inputs: Mapping[str, Array]) -> list[Found]:
    """Every input axis changed slab by slab, from several starts."""
    random = np.random.default_rng(zlib.crc32(case.name.encode()))
    function = function_of(model)
    starts = list(starts_of(inputs, random))
    before = [function(start) for start in starts]
    found: list[Found] = []
    for name, array in inputs.items():
        for axis, extent in enumerate(array.shape):
            depends = [[np.zeros((extent, n), bool) for n in out.shape] for out in before[0]]
            for slab in range(extent):
                for start, whole in zip(starts, before, strict=True):
                    for changed in changes(start[name], array, axis, slab, random):
                        note(depends, slab, whole, function({**start, name: changed}))
            found += [Found(int(name[1:]), axis, i, tuple(d)) for i, d in enumerate(depends)]
    return found


def starts_of(inputs: Mapping[str, Array], random: np.random.Generator) -> Iterator[dict[str, Array]]:
    """The example's data, other data, and cells all alike: among those a largest or smallest one is seen."""
    yield dict(inputs)
    yield {name: redraw(a, a.shape, random) for name, a in inputs.items()}
    yield {name: np.full_like(a, range_of(a)[0]) for name, a in inputs.items()}
    yield {name: np.full_like(a, range_of(a)[1]) for name, a in inputs.items()}


def range_of(array: Array) -> tuple[Any, Any]:
    """The lowest and highest value; numbers that are all alike get room on either side."""
    low, high = array.min(), array.max()
    return (low - 1, high + 1) if low == high and array.dtype.kind == "f" else (low, high)


def redraw(like: Array, shape: tuple[int, ...], random: np.random.Generator) -> Array:
    """Other values of the same range."""
    if like.dtype == bool:
        return random.integers(0, 2, shape).astype(bool)
    low, high = range_of(like)
    drawn = random.uniform(low, high, shape) if like.dtype.kind == "f" else random.integers(low, int(high) + 1, shape)
    return drawn.astype(like.dtype)


def changes(start: Array, like: Array, axis: int, slab: int, random: np.random.Generator) -> Iterator[Array]:
    """The array with one slab drawn anew, and with one of the lowest and of the highest value."""
    at = (slice(None),) * axis + (slab,)
    for value in (redraw(like, start[at].shape, random), *range_of(like)):
        changed = start.copy()
        changed[at] = value
        yield changed


def note(depends: list[list[Array]], slab: int, before: list[Array], after: list[Array]) -> None:
    """Mark the slabs of all output axes that differ."""
    for rows, old, new in zip(depends, before, after, strict=True):
        differs = differing(old, new)
        for axis, row in enumerate(rows):
            row[slab] |= differs.any(tuple(a for a in range(old.ndim) if a != axis))


def differing(old: Array, new: Array) -> Array:
    """Cells that differ by more than rounding; not-a-number equals itself."""
    if old.dtype.kind != "f":
        return old != new
    finite = np.isfinite(old) & np.isfinite(new)
    scale = np.abs(old, where=finite, out=np.zeros_like(old)).max(initial=0)
    far = np.abs(old - new, where=finite, out=np.zeros_like(old)) > ROUNDING * scale
    return far | (~finite & ~((old == new) | ((old != old) & (new != new))))


# --- declared needs -----------------------------------------------------------------------------------


@functools.cache
def examined(name: str) -> tuple[Operator, tuple[Found, ...]]:
    """The operator of an example and its true dependences."""
    case = next(case for case in CASES if case.name == name)
    model, inputs = case_model(case, weights_given=True)
    read = Pipeline((Canonicalize({}),)).run(load_model(model))
    (node,) = read.graph
    assert all(node.inputs[int(n[1:])].name == n for n in inputs)
    return operator_of(node), tuple(dependences(case, model, inputs))


def declared(operator: Operator, found: Found) -> Need | None:
    """What the operator says of this input axis; None when it needs nothing of this input."""
    needs = operator.needs(found.output)[found.input]
    return None if needs is None else needs[found.axis]


def cells(parts: Pieces) -> set[int]:
    """The cells of intervals."""
    return {i for part in parts for i in range(part.start, part.stop)}


def undeclared(need: Need | None, found: Found) -> list[str]:
    """Output slabs and halves that depend on input slabs which are not declared."""
    if need is None:
        return [f"{found} is declared unneeded"] if any(d.any() for d in found.depends) else []
    if need.axis is None:
        return []
    depends = found.depends[need.axis]
    n = depends.shape[1]
    parts = [*(Interval(j, j + 1) for j in range(n)), *halves(n)]
    missing = [(part, set(np.flatnonzero(depends[:, part.start : part.stop].any(1))) - cells(need.map.needed(part)))
               for part in parts]
    return [f"{found} axis {need.axis}: {part} depends on {sorted(map(int, lost))} too"
            for part, lost in missing if lost]


def halves(n: int) -> list[Interval]:
    """Two shards."""
    return [Interval(0, n // 2), Interval(n // 2, n)]


def unsplit(need: Need | None, found: Found) -> list[int]:
    """Output axes of which either half needs a part of what all of it needs of an axis that is declared whole."""
    if need is None or not (need.axis is None or isinstance(need.map, Whole)):
        return []
    local: list[int] = []
    for axis, depends in enumerate(found.depends):
        used = depends[depends.any(1)]
        if len(used) >= SMALLEST and used.shape[1] > 1 and not any(
                used[:, h.start : h.stop].any(1).all() for h in halves(used.shape[1])):
            local.append(axis)
    return local


def on_purpose(case: Case, found: Found) -> set[tuple[str, int, int | None]]:
    """The entries of the list that hold for a finding."""
    op_type = case.example.op_type
    return {(op_type, found.input, axis) for axis in (found.axis, None)} & set(WHOLE_ON_PURPOSE)


def is_indexed(case: Case, found: Found) -> bool:
    """Whether indices, not known to the rule, address this axis of the data or say where its cells go."""
    example = case.example
    op_type, data = example.op_type, example.inputs[0]
    if op_type not in INDEXED or data is None or found.input == 1:
        return False
    rank = len(data if isinstance(data, tuple) else np.shape(data))
    if op_type in ("Gather", "GatherElements", "ScatterElements", "Scatter"):
        is_open = op_type != "Gather" or isinstance(example.inputs[1], tuple)
        return is_open and found.axis == example.attributes.get("axis", 0) % rank
    if op_type == "GridSample":
        return found.axis >= 2
    index = example.inputs[1]
    shape = index if isinstance(index, tuple) else np.shape(index)
    if found.input == 2:
        return found.axis < len(shape) - 1
    first = int(example.attributes.get("batch_dims", 0))
    return first <= found.axis < first + shape[-1]


@by_name
def test_what_changes_is_declared(case: Case) -> None:
    operator, every = examined(case.name)
    problems = [line for found in every for line in undeclared(declared(operator, found), found)]
    assert not problems, "\n".join(problems)


@by_name
def test_what_is_local_is_not_declared_whole(case: Case) -> None:
    operator, every = examined(case.name)
    problems = [f"{found}: each half of axis {', '.join(map(str, axes))} needs a part only, the whole is declared"
                for found in every if not on_purpose(case, found) and not is_indexed(case, found)
                if (axes := unsplit(declared(operator, found), found))]
    assert not problems, "\n".join(problems)


def test_every_exception_is_met() -> None:
    met: set[tuple[str, int, int | None]] = set()
    indexed: set[str] = set()
    for case in (c for c in CASES if c.example.op_type in {*INDEXED, *(op for op, _, _ in WHOLE_ON_PURPOSE)}):
        operator, every = examined(case.name)
        whole = [found for found in every if unsplit(declared(operator, found), found)]
        met |= {entry for found in whole for entry in on_purpose(case, found)}
        indexed |= {case.example.op_type for found in whole if is_indexed(case, found)}
    assert set(WHOLE_ON_PURPOSE) - met == set()
    assert set(INDEXED) - indexed == set()


# --- the check itself ---------------------------------------------------------------------------------


def found_for(op_type: str) -> tuple[Operator, list[Found]]:
    """The operator and its dependences along the last axis of the data, of its first example."""
    case = next(case for case in CASES if case.example.op_type == op_type)
    operator, every = examined(case.name)
    data = operator.inputs[0]
    assert data is not None
    return operator, [f for f in every if f.input == 0 and f.axis == data.rank - 1]


def test_a_halo_that_is_too_small_is_seen() -> None:
    operator, (found,) = found_for("Conv")
    need = declared(operator, found)
    assert need is not None and undeclared(need, found) == []
    for narrower in (replace(need.map, kernel=2), replace(need.map, lo=0), replace(need.map, kernel=2, lo=0)):
        assert undeclared(Need(need.axis, narrower), found)


def test_a_wrong_axis_and_an_unneeded_input_are_seen() -> None:
    operator, (found,) = found_for("Relu")
    need = declared(operator, found)
    assert need is not None and undeclared(need, found) == []
    assert undeclared(Need(0, need.map), found)
    assert undeclared(None, found)


@pytest.mark.parametrize("op_type", ["Relu", "Conv", "Pad", "Resize"])
def test_an_axis_that_is_whole_without_need_is_seen(op_type: str) -> None:
    operator, (found,) = found_for(op_type)
    need = declared(operator, found)
    assert need is not None and unsplit(need, found) == []
    for wide in (Need(None, Whole(need.map.n_in, 1)), Need(need.axis, Whole(need.map.n_in, need.map.n_out))):
        assert unsplit(wide, found) == [found.axis]
        assert undeclared(wide, found) == []


def test_true_statistics_are_whole() -> None:
    operator, (found,) = found_for("InstanceNormalization")
    assert all(depends.all() for depends in found.depends)
    assert unsplit(declared(operator, found), found) == []
