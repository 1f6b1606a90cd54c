"""The float64 reference is tied to onnxruntime, so that neither can be wrong alone."""

from __future__ import annotations

import pytest

from tests.examples import Case, case_model, examples
from tests.oracle import close, reference64, run_ort

CASES = [case for case in examples() if case.domain == ""]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_reference_equals_onnxruntime(case: Case) -> None:
    model, inputs = case_model(case)
    expected = run_ort(model, inputs)["y"]
    found = reference64(model, inputs)["y"]
    assert found.shape == expected.shape
    assert close(found.astype(expected.dtype), expected, 3e-6)
