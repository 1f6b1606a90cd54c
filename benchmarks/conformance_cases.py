"""One node test of the onnx package, partitioned every way and held against the outputs that it states.

    check("test_conv_with_strides_padding")  ->  Result(outcome="sharded", meshes=9, ...)

A case ends in exactly one of: `sharded` (some mesh runs it with nothing gathered), `gathered` (every mesh gathers or
computes something alike on all ranks, by a rule), `replicated` (likewise, with a node that has no rule), `unsplit` (no
axis has two cells), `refused` (before any work, for a reason on the list of `conformance_reasons`), `failed` (wrong,
crashed, or refused for another reason).
"""

from __future__ import annotations

import functools
import re
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx
from onnx import numpy_helper

import partitioner as pt
from benchmarks.conformance_reasons import ABOUT_CONSTANTS, DATA, NEEDS_CONSTANTS, reason_of

Outcome = Literal["sharded", "gathered", "replicated", "unsplit", "refused", "failed"]
Cuts = dict[str, tuple[int, ...]]

SPATIAL = ("depth", "height", "width")

NO_SUCH_AXIS = re.compile(r"no input has such an axis|has only 1 cells")
"""What is said of an axis that no mesh can split; weights beside the data have none."""

HALF_RTOL = {"bfloat16": 2**-6, "float16": 2**-9}
"""Two units in the last place, as onnx's own runner allows for bfloat16; the 1e-3 of the cases is one of float16."""

_ZEROS = "the stated zeros are sums of large terms, rounded in float64; onnxruntime misses them too"
CANCELLING = {"DFT": _ZEROS, "STFT": _ZEROS}
"""Operators with results that cancel: cells may be off by 4 eps of the largest expected value, and why."""

ONNXRUNTIME_SAYS = {
    "test_resize_downsample_scales_linear_align_corners":
        "the test aligns corners as if the result had 0.6 * 4 = 2.4 cells; onnxruntime and torch take its extent, 2",
    "test_resize_downsample_scales_cubic_align_corners":
        "the test aligns corners as if the result had 0.8 * 4 = 3.2 cells; onnxruntime and torch take its extent, 3",
    "test_maxunpool_export_with_output_shape":
        "the test counts an index in the extents without output_shape; onnxruntime and torch count in output_shape",
}
"""Cases that are held against onnxruntime, which differs from the outputs stated, and why."""


@dataclass(frozen=True)
class Result:
    """How a case ended.

    Args:
        operator: the operator under test.
        constants: how many inputs had to be made constants.
        meshes: how many meshes were run, the single rank included.
        whole: how many of them gathered or replicated something.
        reason: the name of the reason, when it was refused.
        detail: what went wrong, when it was refused or failed.
    """

    name: str
    operator: str
    outcome: Outcome
    constants: int = 0
    meshes: int = 0
    whole: int = 0
    reason: str = ""
    detail: str = ""


@dataclass(frozen=True)
class DataSet:
    """Inputs by name, and the outputs expected."""

    inputs: Mapping[str, Any]
    outputs: Mapping[str, Any]


class Wrong(Exception):
    """A run's outputs are not those expected."""


@functools.cache
def load_cases() -> Mapping[str, Any]:
    """Every node test of the installed onnx package, by name."""
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        return {case.name: case for case in load_model_tests(kind="node")}


def operator_under_test(name: str) -> str:
    """The operator of a case; a function body's case has that of the case with the function itself."""
    cases = load_cases()
    node = cases.get(name.partition("_expanded")[0], cases[name]).model.graph.node[0]
    return f"{node.domain}.{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type


def check(name: str) -> Result:
    """Run one case on every mesh."""
    operator = operator_under_test(name)
    try:
        return _check(name, operator)
    except Exception as error:
        return Result(name, operator, "failed", detail=f"the case itself: {_describe(error)}")


def _check(name: str, operator: str) -> Result:
    case = load_cases()[name]
    refusal = ""
    for constants in constant_choices(case):
        model, data = with_constants(case, constants)
        try:
            _compile(model, data[0], None, {})
        except pt.PartitionError as error:
            refusal = refusal if refusal and ABOUT_CONSTANTS.search(str(error)) else str(error)
            if not NEEDS_CONSTANTS.search(str(error)):
                break
        except Exception as error:
            return Result(name, operator, "failed", len(constants), detail=f"compiling: {_describe(error)}")
        else:
            found = _run_everywhere(case, operator, len(constants), model, _expected(case, model, data))
            return _with_weights(case, found) if found.outcome in ("gathered", "replicated") else found
    reason = reason_of(refusal)
    if reason is None:
        return Result(name, operator, "failed", detail=f"refused: {refusal}")
    return Result(name, operator, "refused", reason=reason, detail=refusal)


def _with_weights(case: Any, gathered: Result) -> Result:
    """The case once more with all inputs but the first as constants: weights, which a mesh would split like data."""
    model, data = with_constants(case, frozenset(range(1, len(case.data_sets[0][0]))))
    try:
        _compile(model, data[0], None, {})
    except pt.PartitionError:
        return gathered
    found = _run_everywhere(case, gathered.operator, len(case.model.graph.input) - 1, model, data)
    return found if found.outcome in ("sharded", "failed") else gathered


def _run_everywhere(case: Any, operator: str, constants: int, model: onnx.ModelProto,
                    data: Sequence[DataSet]) -> Result:
    count, whole, no_rule = 0, 0, False
    for mesh, cuts in meshes(case.name, split_extents(model, data[0])):
        count += 1
        where = f"mesh {mesh or 'single'} {cuts or ''}".strip()
        try:
            plan = _compile(model, data[0], mesh, cuts)
            whole += not is_sharded(plan)
            no_rule |= bool(plan.to_dict()["without_rule"])
            for item in data:
                _compare(plan.run(item.inputs), item.outputs, case.rtol, _floor(case, operator, item))
        except Exception as error:
            detail = f"{where}: {_describe(error)}"
            if isinstance(error, pt.ExecutionError) and reason_of(str(error)) == DATA:
                return Result(case.name, operator, "refused", constants, count, reason=DATA, detail=detail)
            return Result(case.name, operator, "failed", constants, count, detail=detail)
    splits = count - 1
    gathered: Outcome = "replicated" if no_rule else "gathered"
    outcome: Outcome = "unsplit" if not splits else gathered if whole >= splits else "sharded"
    return Result(case.name, operator, outcome, constants, count, whole)


def _expected(case: Any, model: onnx.ModelProto, data: list[DataSet]) -> list[DataSet]:
    """The data sets with onnxruntime's outputs, for the cases where it differs."""
    if case.name not in ONNXRUNTIME_SAYS:
        return data
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [v.name for v in model.graph.output]
    given = [DataSet(d.inputs, dict(zip(names, session.run(names, d.inputs), strict=True))) for d in data]
    try:
        for mine, stated in zip(given, data, strict=True):
            _compare(mine.outputs, stated.outputs, case.rtol, case.atol)
    except Wrong:
        return given
    raise Wrong("onnxruntime yields the outputs stated; remove the case from ONNXRUNTIME_SAYS")


def _compile(model: onnx.ModelProto, item: DataSet, mesh: str | None, cuts: Cuts) -> Any:
    shapes = {name: a.shape for name, a in item.inputs.items() if isinstance(a, np.ndarray)}
    return pt.partition(model, mesh=mesh, cuts=cuts, shapes=shapes)


def _describe(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text[:400] if isinstance(error, Wrong) else f"{type(error).__name__}: {text[:400]}"


# --- inputs ------------------------------------------------------------------------------------------


def constant_choices(case: Any) -> Iterator[frozenset[int]]:
    """Which inputs to make constants, tried in turn: none; the parameters after the first input; all parameters.

    Parameters are inputs of integers or of at most one axis.
    """
    tried: set[frozenset[int]] = set()
    arrays = [_plain(value) for value in case.data_sets[0][0]]
    parameters = [i for i, a in enumerate(arrays)
                  if isinstance(a, np.ndarray) and (a.ndim < 2 or "float" not in a.dtype.name)]
    small = [i for i in parameters if arrays[i].ndim < 2]
    for chosen in ((), [i for i in small if i], [i for i in parameters if i], parameters):
        if frozenset(chosen) not in tried:
            tried.add(frozenset(chosen))
            yield frozenset(chosen)


def with_constants(case: Any, constants: frozenset[int]) -> tuple[onnx.ModelProto, list[DataSet]]:
    """The model with some inputs as initialisers, and its data sets.

    Only the first data set is kept when there are constants: they are part of the model.
    """
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    given = list(model.graph.input)
    sets = case.data_sets[:1] if constants else case.data_sets
    fed = [i for i in range(len(given)) if i not in constants]
    data = [DataSet({given[i].name: _plain(inputs[i]) for i in fed},
                  {v.name: _plain(a) for v, a in zip(model.graph.output, outputs, strict=True)})
            for inputs, outputs in sets]
    del model.graph.input[:]
    model.graph.input.extend(given[i] for i in fed)
    model.graph.initializer.extend(_tensor(sets[0][0][i], given[i].name) for i in sorted(constants))
    return model, data


def _tensor(value: Any, name: str) -> onnx.TensorProto:
    tensor = onnx.TensorProto()
    tensor.CopyFrom(value if isinstance(value, onnx.TensorProto) else numpy_helper.from_array(np.asarray(value)))
    tensor.name = name
    return tensor


def _plain(value: Any) -> Any:
    """An array; lists (sequences) and None (no optional) stay."""
    if isinstance(value, onnx.TensorProto):
        return numpy_helper.to_array(value)
    return value if value is None or isinstance(value, list) else np.asarray(value)


# --- meshes ------------------------------------------------------------------------------------------


def meshes(seed: str, extents: Mapping[str, int]) -> Iterator[tuple[str | None, Cuts]]:
    """One rank; 2 and 3 uneven shards of every axis, one of them empty; and two axes at once."""
    random = np.random.default_rng(zlib.crc32(seed.encode()))
    yield None, {}
    for name, n in extents.items():
        yield f"{name}=2", {name: (0, uneven(random, n), n)}
        yield f"{name}=2", {name: (0, 0, n)}
        if n > 2:
            first, second = sorted(int(i) for i in random.choice(np.arange(1, n), 2, replace=False))
            yield f"{name}=3", {name: (0, first, second, n)}
    if len(extents) > 1:
        (one, n), (two, m) = list(extents.items())[-2:]
        yield f"{one}=2,{two}=2", {one: (0, uneven(random, n), n), two: (0, uneven(random, m), m)}


def uneven(random: np.random.Generator, n: int) -> int:
    """A cut that leaves cells on both sides, not the middle where that can be avoided."""
    places = [i for i in range(1, n) if 2 * i != n]
    return int(random.choice(places)) if places else n // 2


def split_extents(model: onnx.ModelProto, item: DataSet) -> dict[str, int]:
    """The axes that a mesh splits in two, and the largest extent of each over the inputs that it splits."""
    found: dict[str, int] = {}
    ranks = [np.ndim(a) for a in item.inputs.values() if isinstance(a, np.ndarray) and np.ndim(a)]
    spatial = max((rank - 2 for rank in ranks if 3 <= rank <= 5), default=0)
    for name in ("batch", *SPATIAL[3 - spatial :]) if ranks else ():
        try:
            inputs = _compile(model, item, f"{name}=2", {}).to_dict()["inputs"]
        except pt.PartitionError as error:
            if not NO_SUCH_AXIS.search(str(error)):
                raise
            continue
        found[name] = max(v["shape"][split["axis"]] for v in inputs for split in v["splits"])
    return found


def is_sharded(plan: Any) -> bool:
    """Whether nothing is gathered, and nothing is computed by all ranks alike but what follows an all-reduce."""
    found = plan.to_dict()
    if found["gathered"]:
        return False
    reduced: set[str] = set()
    for node in plan.model.graph:
        if node.op_type.startswith("AllReduce") or any(v is not None and v.name in reduced for v in node.inputs):
            reduced |= {v.name for v in node.outputs}
    producers = {node.name: node.outputs[0].name for node in plan.model.graph}
    return all(producers[name] in reduced for name in found["replicated"])


# --- comparison --------------------------------------------------------------------------------------


def _floor(case: Any, operator: str, item: DataSet) -> float:
    """The absolute tolerance of a case."""
    if operator not in CANCELLING:
        return case.atol
    return max(case.atol, *(4 * float(np.finfo(a.dtype).eps * np.abs(a).max(initial=0)) for a in item.outputs.values()))


def _compare(found: Mapping[str, Any], expected: Mapping[str, Any], rtol: float, atol: float) -> None:
    for name, reference in expected.items():
        if name not in found:
            raise Wrong(f"output '{name}' is missing")
        _compare_one(name, np.asarray(found[name]), reference, rtol, atol)


def _compare_one(name: str, mine: np.ndarray, reference: Any, rtol: float, atol: float) -> None:
    """The rule of onnx's own runner; bfloat16 leaves a run as float32."""
    if not isinstance(reference, np.ndarray):
        raise Wrong(f"output '{name}' should be a {type(reference).__name__}")
    if mine.shape != reference.shape:
        raise Wrong(f"output '{name}' has shape {mine.shape}, expected {reference.shape}")
    rtol = max(rtol, HALF_RTOL.get(reference.dtype.name, 0.0))
    if reference.dtype.name == "bfloat16":
        reference = reference.astype(np.float32)
    if mine.dtype != reference.dtype:
        raise Wrong(f"output '{name}' is {mine.dtype}, expected {reference.dtype}")
    if np.allclose(mine, reference, rtol=rtol, atol=atol, equal_nan=True):
        return
    with np.errstate(all="ignore"):
        off = ~np.isclose(mine, reference, rtol=rtol, atol=atol, equal_nan=True)
        at = tuple(int(i) for i in np.argwhere(off)[0])
    raise Wrong(f"output '{name}' is wrong in {int(off.sum())} of {off.size} cells: {mine[at]} at {at}, "
                f"expected {reference[at]}")
