"""Comparing a plan's results with the unpartitioned model in onnxruntime."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import psutil

from partitioner import dialect
from partitioner.api import Backend, Plan, Progress
from partitioner.errors import PartitionError
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
        absolute: largest difference.
        relative: the same over the reference's largest magnitude.
    """

    name: str
    absolute: float
    relative: float
    tolerance: float

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
    arrays = random_inputs(plan) if inputs is None else dict(inputs)
    with plan.session(backend=backend, device=device) as session:
        results = session.run(arrays, progress)
    expected, name = _reference(plan, arrays)
    errors = tuple(_compare(v, results[str(v.name)], expected[str(v.name)], tolerance)
                   for v in plan.model.graph.outputs)
    return Verification(errors, name)


def _compare(value: ir.Value, result: NDArray[Any], expected: NDArray[Any], tolerance: float | None) -> OutputError:
    assert value.dtype is not None
    dtype = value.dtype.name.lower().replace("double", "float64")
    dtype = "float32" if dtype == "float" else dtype
    limit = TOLERANCES.get(dtype, 0.0) if tolerance is None else tolerance
    a, b = np.asarray(result, np.float64), np.asarray(expected, np.float64)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore"):
        difference = np.where(same, 0.0, np.abs(a - b))
    absolute = float(difference.max(initial=0.0))
    scale = float(np.abs(b[np.isfinite(b)]).max(initial=0.0))
    relative = absolute / scale if scale > 0 else absolute
    return OutputError(str(value.name), absolute, math.inf if math.isnan(absolute) else relative, limit)


def _reference(plan: Plan, arrays: Mapping[str, Any]) -> tuple[dict[str, NDArray[Any]], str]:
    """onnxruntime's results; where it has no kernel for the type, one rank's on torch."""
    import onnxruntime

    session = _session(plan.unpartitioned())
    if session is not None:
        names = [o.name for o in session.get_outputs()]
        taken = {i.name for i in session.get_inputs()}
        return dict(zip(names, session.run(None, {n: a for n, a in arrays.items() if n in taken}), strict=True)), (
            f"onnxruntime {onnxruntime.__version__}, unpartitioned")
    single = Plan.compile(plan.unpartitioned(), None, plan.input_shapes, {})
    return single.run(arrays), "the unpartitioned graph on torch (onnxruntime has no kernels for this element type)"


def _session(model: ir.Model) -> Any:
    """An onnxruntime session of a model, its large weights kept in a file; None where kernels are missing."""
    import tempfile
    from pathlib import Path

    import onnxruntime

    from partitioner.loader import save_model

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    with tempfile.TemporaryDirectory(prefix="partitioner-") as folder:
        path = Path(folder) / "model.onnx"
        save_model(model, path)
        try:
            return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            if "NOT_IMPLEMENTED" in str(error) or "Could not find an implementation" in str(error):
                return None
            line = str(error).strip().splitlines()[0]
            raise PartitionError(f"onnxruntime cannot load the unpartitioned model: {line[:200]}") from None
