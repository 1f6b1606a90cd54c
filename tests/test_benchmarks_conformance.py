"""`python -m benchmarks conformance`: what it calls a pass, a refusal and a failure."""

from __future__ import annotations

import json
import os
import signal
from types import SimpleNamespace

import numpy as np
import onnx
import pytest

from benchmarks import conformance_cases, conformance_pool
from benchmarks.__main__ import main
from benchmarks.conformance_cases import (
    ONNXRUNTIME_SAYS,
    check,
    load_cases,
    meshes,
    operator_under_test,
    split_extents,
    with_constants,
)
from benchmarks.conformance_pool import check_all
from benchmarks.conformance_reasons import REASONS, reason_of
from partitioner import maps
from partitioner.geometry import Interval, Pieces, span


def altered(name: str, monkeypatch, **changes) -> None:
    """Let a case have other contents."""
    cases = dict(load_cases())
    cases[name] = SimpleNamespace(**{**vars(cases[name]), **changes})
    monkeypatch.setattr(conformance_cases, "load_cases", lambda: cases)


# --- outcomes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "outcome", "constants"), [
    ("test_relu", "sharded", 0),
    ("test_celu_expanded", "sharded", 0),
    ("test_globalaveragepool", "sharded", 0),
    ("test_conv_with_strides_padding", "sharded", 0),
    ("test_reduce_mean_keepdims_example", "sharded", 1),
    ("test_resize_downsample_scales_linear_align_corners", "sharded", 1),
    ("test_asin_example", "sharded", 0),
    ("test_det_nd", "replicated", 0),
    ("test_gemm_all_attributes", "gathered", 0),
    ("test_bernoulli", "refused", 0),
    ("test_nonzero_example", "refused", 0),
])
def test_outcomes(name: str, outcome: str, constants: int) -> None:
    result = check(name)
    assert (result.outcome, result.constants > 0) == (outcome, constants > 0), result.detail


def test_cells_that_no_mesh_can_split() -> None:
    assert list(meshes("", {})) == [(None, {})]


def test_a_wrong_result_of_cancelling_terms_fails(monkeypatch) -> None:
    """The tolerance of an operator on the list is its own, not any."""
    (inputs, outputs), *_ = load_cases()["test_relu"].data_sets
    monkeypatch.setattr(conformance_cases, "CANCELLING", {"Relu": "no"})
    altered("test_relu", monkeypatch, data_sets=[(inputs, [outputs[0] + np.float32(1e-7)])])
    assert check("test_relu").outcome == "sharded"
    altered("test_relu", monkeypatch, data_sets=[(inputs, [outputs[0] + np.float32(1e-4)])])
    assert check("test_relu").outcome == "failed"


@pytest.mark.parametrize("change", [
    lambda y: y + np.float32(0.01), lambda y: y[..., :-1], lambda y: y.astype(np.float64),
    lambda y: np.where(np.arange(y.size).reshape(y.shape) == y.size - 1, np.nan, y).astype(y.dtype)])
def test_a_wrong_result_fails(change, monkeypatch) -> None:
    (inputs, outputs), *_ = load_cases()["test_relu"].data_sets
    altered("test_relu", monkeypatch, data_sets=[(inputs, [change(outputs[0])])])
    result = check("test_relu")
    assert result.outcome == "failed"
    assert "'y'" in result.detail and "single" in result.detail


def test_the_tolerance_is_that_of_the_case(monkeypatch) -> None:
    (inputs, outputs), *_ = load_cases()["test_relu"].data_sets
    off = [(inputs, [outputs[0] * np.float32(1.01)])]
    altered("test_relu", monkeypatch, data_sets=off, rtol=0.1)
    assert check("test_relu").outcome == "sharded"
    altered("test_relu", monkeypatch, data_sets=off, rtol=0.001)
    assert check("test_relu").outcome == "failed"


def test_every_data_set_counts(monkeypatch) -> None:
    (inputs, outputs), *_ = load_cases()["test_relu"].data_sets
    altered("test_relu", monkeypatch, data_sets=[(inputs, outputs), (inputs, [outputs[0] + 1])])
    assert check("test_relu").outcome == "failed"


def test_a_crash_fails(monkeypatch) -> None:
    def crash(*_args, **_named) -> None:
        raise ZeroDivisionError("by nought")

    monkeypatch.setattr(conformance_cases.pt, "partition", crash)
    result = check("test_relu")
    assert result.outcome == "failed" and "ZeroDivisionError: by nought" in result.detail


def test_a_refusal_for_another_reason_fails(monkeypatch) -> None:
    def refuse(*_args, **_named) -> None:
        raise conformance_cases.pt.PartitionError("I do not feel like it")

    monkeypatch.setattr(conformance_cases.pt, "partition", refuse)
    result = check("test_relu")
    assert result.outcome == "failed" and result.detail == "refused: I do not feel like it"


def test_data_that_a_shard_refuses() -> None:
    result = check("test_maxunpool_export_with_output_shape")
    assert (result.outcome, result.reason) == ("refused", "data outside definition") and "mesh width=2" in result.detail


def test_a_refusal_of_one_mesh_only_fails(monkeypatch) -> None:
    partition = conformance_cases.pt.partition

    def refuse(model: onnx.ModelProto, mesh, cuts, shapes):
        if mesh == "height=3":
            raise conformance_cases.pt.PartitionError("node (Relu): this operator has no rule; export without it")
        return partition(model, mesh=mesh, cuts=cuts, shapes=shapes)

    monkeypatch.setattr(conformance_cases.pt, "partition", refuse)
    result = check("test_averagepool_2d_default")
    assert result.outcome == "failed" and "mesh height=3" in result.detail


@pytest.mark.parametrize(("name", "kind"), [("test_averagepool_2d_pads", maps.Window), ("test_relu", maps.Identity)])
def test_a_rule_that_is_wrong_fails(name: str, kind: type[maps.AxisMap], monkeypatch) -> None:
    """One cell too few at the end of every shard but the last."""
    needed = kind._needed

    def narrow(self: maps.AxisMap, out: Interval) -> Pieces:
        found = needed(self, out)
        return found if not found or out.stop == self.n_out else span(found[0].start, found[-1].stop - 1)

    assert check(name).outcome == "sharded"
    monkeypatch.setattr(kind, "_needed", narrow)
    result = check(name)
    assert result.outcome == "failed" and "=2" in result.detail


@pytest.mark.parametrize("name", ONNXRUNTIME_SAYS)
def test_where_onnxruntime_differs_it_is_the_measure(name: str, monkeypatch) -> None:
    assert check(name).outcome in ("sharded", "refused")
    monkeypatch.setattr(conformance_cases, "ONNXRUNTIME_SAYS", {})
    assert check(name).outcome == "failed"


def test_an_exception_that_is_not_needed_fails(monkeypatch) -> None:
    monkeypatch.setattr(conformance_cases, "ONNXRUNTIME_SAYS", {"test_relu": "no"})
    result = check("test_relu")
    assert result.outcome == "failed" and "remove the case" in result.detail


# --- meshes and reasons -------------------------------------------------------------------------------


def test_meshes_split_every_axis_unevenly() -> None:
    found = list(meshes("seed", {"batch": 9, "height": 7, "width": 5}))
    assert found[0] == (None, {})
    assert {mesh for mesh, _ in found} == {None, "batch=2", "batch=3", "height=2", "height=3", "width=2", "width=3",
                                           "height=2,width=2"}
    for name, n in (("batch", 9), ("height", 7), ("width", 5)):
        cuts = [c[name] for mesh, c in found if mesh and mesh.startswith(f"{name}=") and "," not in mesh]
        assert (0, 0, n) in cuts
        assert all(c[0] == 0 and c[-1] == n and list(c) == sorted(c) for c in cuts)
        assert any(len(c) == 3 and 0 < c[1] < n and 2 * c[1] != n for c in cuts)
        assert any(len(c) == 4 and len(set(c)) == 4 for c in cuts)


def extents_of(name: str) -> dict[str, int]:
    case = load_cases()[name]
    model, data = with_constants(case, frozenset())
    return split_extents(model, data[0])


def test_axes_are_those_that_a_mesh_splits() -> None:
    assert extents_of("test_averagepool_3d_default") == {"depth": 32, "height": 32, "width": 32}
    assert extents_of("test_relu") == {"batch": 3, "width": 5}
    assert extents_of("test_instancenorm_epsilon") == {"batch": 2, "height": 4, "width": 5}  # 3 channels are no batch
    assert extents_of("test_add_bcast") == {"batch": 5, "width": 5}


def test_reasons() -> None:
    assert reason_of("n (Foo): this operator has no rule; export the model without it") == "no rule"
    assert reason_of("n (NonZero): this operator has no rule; export the model without it") == "result's extents"
    assert reason_of("n (ReverseSequence): this operator has no rule; export") == "no rule"
    assert reason_of("n (A): this operator has no rule\nn (Slice): its starts depend on the data") == "no rule"
    assert reason_of("n (A): this operator has no rule\nsomething else") is None
    assert reason_of("") is None
    assert len({r.name for r in REASONS}) == len(REASONS)
    assert all(r.explanation and len(r.explanation) < 120 for r in REASONS)


def test_a_function_body_counts_for_its_operator() -> None:
    assert operator_under_test("test_celu_expanded") == operator_under_test("test_celu") == "Celu"


# --- processes and the command ------------------------------------------------------------------------



def sleep(pipe) -> None:
    pipe.recv()
    signal.pause()


def perish(pipe) -> None:
    pipe.recv()
    os.kill(os.getpid(), signal.SIGKILL)


def test_cases_are_checked_side_by_side() -> None:
    found = list(check_all(["test_relu", "test_abs", "test_bernoulli"], 2, 100))
    assert sorted((r.name, r.outcome) for r in found) == [
        ("test_abs", "sharded"), ("test_bernoulli", "refused"), ("test_relu", "sharded")]


def test_a_process_that_dies_fails_its_case_only(monkeypatch) -> None:
    monkeypatch.setattr(conformance_pool, "serve", perish)
    found = list(check_all(["test_relu", "test_abs"], 1, 100))
    assert [(r.name, r.outcome) for r in found] == [("test_relu", "failed"), ("test_abs", "failed")]
    assert all("died (-9)" in r.detail for r in found)


def test_a_case_that_hangs_fails(monkeypatch) -> None:
    monkeypatch.setattr(conformance_pool, "serve", sleep)
    (found,) = check_all(["test_relu"], 1, 0.5)
    assert found.outcome == "failed" and "not done after" in found.detail


def test_the_command(tmp_path, capsys) -> None:
    target = tmp_path / "new" / "results.json"
    assert main(["conformance", "--filter", "test_leakyrelu", "--jobs", "1", "--json", str(target)]) == 0
    found = json.loads(target.read_text())
    assert {r["operator"] for r in found} == {"LeakyRelu"}
    assert [r["outcome"] for r in found] == ["sharded"] * len(found) and found
    shown = capsys.readouterr().out
    assert "LeakyRelu" in shown and f"{len(found)} cases" in shown


def test_the_command_fails_when_a_case_does(monkeypatch, capsys) -> None:
    monkeypatch.setattr(conformance_pool, "serve", perish)
    assert main(["conformance", "--filter", "test_relu", "--jobs", "1"]) == 1
    assert "FAILED test_relu (Relu): its process died (-9)" in capsys.readouterr().out.replace("\n", " ")


def test_a_filter_that_finds_nothing(capsys) -> None:
    assert main(["conformance", "--filter", "no-such-case"]) == 2
    assert "no node test has that in its name" in capsys.readouterr().err


@pytest.mark.slow
def test_every_case(capsys) -> None:
    assert main(["conformance"]) == 0, capsys.readouterr().out
