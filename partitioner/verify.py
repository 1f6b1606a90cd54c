"""Comparing a plan's results with the unpartitioned model in onnxruntime."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import psutil

from partitioner import dialect
from partitioner.api import Backend, Plan, Progress
from partitioner.errors import PartitionError
from partitioner.guards import is_tensor
from partitioner.labels import Decision, add_scores, compare_labels
from partitioner.ops.opaque import DOMAINS
from partitioner.planning import Request
from partitioner.reference import run_onnxruntime, with_exact_statistics
from partitioner.report import size_text

if TYPE_CHECKING:
    from numpy.typing import NDArray

TOLERANCES = {"float64": 1e-10, "float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""Largest error relative to the output's largest value; onnxruntime's own float32 error is mostly below 1e-5."""

REFERENCE_OVERHEAD = 2.5
"""Memory of onnxruntime's whole run, measured as a multiple of the largest set of live activations."""


@dataclass(frozen=True)
class OutputError:
    """How far one output is from the reference.

    Args:
        absolute: largest difference; for labels, how far the reference's scores are apart where labels differ.
        relative: the same over the reference's largest magnitude.
        differing: how many labels differ, for outputs that are chosen by scores.
    """

    name: str
    absolute: float
    relative: float
    tolerance: float
    differing: int | None = None

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance; NaN is not."""
        return self.relative <= self.tolerance


@dataclass(frozen=True)
class Verification:
    """Errors per output, and what they were measured against."""

    outputs: tuple[OutputError, ...]
    reference: str

    @property
    def passed(self) -> bool:
        """Whether every output is within its tolerance."""
        return all(o.passed for o in self.outputs)


def random_inputs(plan: Plan, seed: int = 0) -> dict[str, NDArray[Any]]:
    """Normal random values for float inputs, small integers for the others."""
    generator = np.random.default_rng(seed)
    found: dict[str, NDArray[Any]] = {}
    for value in plan.model.graph.inputs:
        shape, dtype = dialect.shape_of(value), value.dtype
        assert dtype is not None
        if dtype.is_floating_point():
            found[str(value.name)] = generator.standard_normal(shape, dtype=np.float32).astype(dtype.numpy())
        else:
            found[str(value.name)] = generator.integers(0, 2, shape).astype(dtype.numpy())
    return found


def check_memory(plan: Plan) -> None:
    """Make sure that the reference fits this host.

    Raises:
        PartitionError: when onnxruntime would need more memory than is free.
    """
    need = REFERENCE_OVERHEAD * plan.cost.peak_together + 2 * plan.cost.weight_bytes
    free = psutil.virtual_memory().available
    if need > free:
        raise PartitionError(
            f"the unpartitioned reference would need about {size_text(need)}, {size_text(free)} are free here; "
            "verify with a smaller --shape")


def verify(plan: Plan, inputs: Mapping[str, Any] | None = None, backend: Backend = "lockstep", device: str = "cpu",
           tolerance: float | None = None, progress: Progress | None = None) -> Verification:
    """Run a plan and the unpartitioned model on the same inputs and compare.

    Args:
        inputs: arrays per input; random ones by default.
        tolerance: largest relative error; by the output's type when not given.

    Raises:
        PartitionError: for wrong inputs, or when the reference does not fit the memory.
        ExecutionError: when a rank dies.
    """
    check_memory(plan)
    arrays = random_inputs(plan) if inputs is None else {name: _in_numpy(a) for name, a in inputs.items()}
    with plan.session(backend=backend, device=device) as session:
        results = session.run(arrays, progress)
    found: Verification | None = None
    reference = plan.unpartitioned()
    decisions = add_scores(reference)
    for expected, name in _references(plan, reference, arrays):
        errors = tuple(_compare(v, results[str(v.name)], expected, tolerance, decisions.get(str(v.name)))
                       for v in plan.model.graph.outputs)
        found = Verification(errors, name)
        if found.passed:
            break
    assert found is not None
    return found


def _in_numpy(array: Any) -> Any:
    """Arrays as onnxruntime takes them; what is no array stays, to be refused with the rest."""
    if is_tensor(array):
        from runtime.feeds import to_numpy

        return to_numpy(array)
    return np.asarray(array, array.dtype.newbyteorder("=")) if isinstance(array, np.ndarray) else array


def _compare(value: ir.Value, result: NDArray[Any], expected: Mapping[str, NDArray[Any]], tolerance: float | None,
             decision: Decision | None) -> OutputError:
    name = str(value.name)
    if decision is not None:
        return _compare_labels(name, decision, result, expected, tolerance)
    assert value.dtype is not None
    dtype = value.dtype.name.lower().replace("double", "float64")
    dtype = "float32" if dtype == "float" else dtype
    limit = TOLERANCES.get(dtype, 0.0) if tolerance is None else tolerance
    absolute, relative = _difference(result, expected[name])
    return OutputError(name, absolute, relative, limit)


def _compare_labels(name: str, decision: Decision, result: NDArray[Any], expected: Mapping[str, NDArray[Any]],
                    tolerance: float | None) -> OutputError:
    """Labels may differ where the scores are as close as rounding: two scores for a choice, one for a limit."""
    scores = expected[decision.scores]
    limit = TOLERANCES.get(scores.dtype.name, 0.0) if tolerance is None else tolerance
    found = compare_labels(decision, result, expected[name], scores)
    relative = found.distance / found.scale if found.scale > 0 else found.distance
    return OutputError(name, found.distance, relative, limit * (1 if decision.axis is None else 2), found.count)


def _difference(result: NDArray[Any], expected: NDArray[Any]) -> tuple[float, float]:
    """Largest difference, and the same over the expected values' largest magnitude; infinite where only one is NaN."""
    a, b = np.asarray(result, np.float64), np.asarray(expected, np.float64)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore"):
        difference = np.where(same, 0.0, np.abs(a - b))
    absolute = float(difference.max(initial=0.0))
    scale = float(np.abs(b[np.isfinite(b)]).max(initial=0.0))
    relative = absolute / scale if scale > 0 else absolute
    return absolute, math.inf if math.isnan(absolute) else relative


def _references(plan: Plan, model: ir.Model,
                arrays: Mapping[str, Any]) -> Iterator[tuple[dict[str, NDArray[Any]], str]]:
    """Results of the unpartitioned model and where they come from; a more exact one follows where there is one."""
    import onnxruntime

    own = sorted({n.domain for n in model.graph} - {"", "ai.onnx", *DOMAINS} - {key[0] for key in model.functions})
    if own:
        single = Plan.compile(model, Request(shapes=plan.input_shapes))
        yield single.run(arrays), f"the model on one shard (onnxruntime has no operators of {', '.join(own)})"
        return
    name = f"onnxruntime {onnxruntime.__version__}, unpartitioned"
    results = run_onnxruntime(model, arrays)
    if results is None:
        single = Plan.compile(model, Request(shapes=plan.input_shapes))
        yield single.run(arrays), "the unpartitioned graph on torch (onnxruntime has no kernels for this element type)"
        return
    yield results, name
    exact = with_exact_statistics(model)
    better = None if exact is None else run_onnxruntime(exact, arrays)
    if better is not None:
        off = max((_difference(results[n], better[n])[1] for n in results if results[n].dtype.kind == "f"), default=0.0)
        yield better, f"{name}, instance norms in float64 (its float32 ones are off by {off:.2g} here)"
