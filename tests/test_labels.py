"""Labels are compared by the scores that chose them: rounding may flip a tie, nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

import partitioner as pt
from partitioner.labels import Decision, compare_labels
from partitioner.verify import verify
from tests.command import SHAPE, Array, convolution, kernel, model, run_here, value, volume, works

OUT = (1, 3, 7, 11, 5)


@pytest.mark.parametrize("ops", [["argmax"], ["softmax", "argmax"], ["threshold=0.25"], ["sigmoid", "threshold=0.5"]])
@pytest.mark.parametrize("steps", [[], ["axes=zyx", "zscore"]])
def test_labels_of_a_partition_are_verified(ops: list[str], steps: list[str]) -> None:
    plan = pt.partition(convolution(), mesh="depth=2,height=2", output_ops=ops, preprocess=steps)
    (found,) = verify(plan).outputs
    assert found.passed and found.differing == 0 and found.tolerance == (2e-4 if "argmax" in ops else 1e-4)


def test_a_plan_from_a_file(tmp_path: Path) -> None:
    pt.partition(convolution(), mesh="depth=2", output_ops="argmax").save(tmp_path / "p.onnx")
    (found,) = verify(pt.load(tmp_path / "p.onnx")).outputs
    assert found.passed and found.differing == 0


def test_networks_that_end_in_labels_themselves() -> None:
    conv = helper.make_node("Conv", ["x", "w"], ["c"], pads=[1] * 6)
    choose = helper.make_node("ArgMax", ["c"], ["y"], axis=1, keepdims=0)
    source = model([conv, choose], [value("x", SHAPE)], [value("y", (1, 7, 11, 5), onnx.TensorProto.INT64)],
                   {"w": kernel()})
    (found,) = verify(pt.partition(source, mesh="width=3")).outputs
    assert found.passed and found.differing == 0


def spoil(monkeypatch: pytest.MonkeyPatch, name: str, change: Any) -> None:
    run = pt.Session.run

    def spoilt(self: pt.Session, *arguments: Any) -> dict[str, Array]:
        found = run(self, *arguments)
        change(found[name])
        return found

    monkeypatch.setattr(pt.Session, "run", spoilt)


@pytest.mark.parametrize("ops", ["argmax", "threshold=0.25"])
def test_a_wrong_label_is_seen(ops: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(labels: Array) -> None:
        labels[0, 0, 3, 2, 1] = (labels[0, 0, 3, 2, 1] + 1) % (3 if ops == "argmax" else 2)

    spoil(monkeypatch, "y", change)
    (found,) = verify(pt.partition(convolution(), mesh="depth=2", output_ops=[ops])).outputs
    assert not found.passed and found.differing == 1 and found.relative > found.tolerance


def test_ties_may_fall_either_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two channels of the same weights: the reference itself cannot tell them apart."""
    source = convolution()
    weights = kernel()
    weights[1] = weights[0]
    source.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weights, "w"))

    def change(labels: Array) -> None:
        labels[labels == 0] = 1

    spoil(monkeypatch, "y", change)
    (found,) = verify(pt.partition(source, mesh="depth=2", output_ops=["argmax"])).outputs
    assert found.passed and found.differing and found.absolute < 1e-6


def test_labels_that_do_not_exist_are_wrong() -> None:
    scores = volume(OUT)
    expected = scores.argmax(1)[:, None]
    wrong = expected.copy()
    wrong[0, 0, 0, 0, 0] = 3
    assert compare_labels(Decision("c", 1), wrong, expected, scores).distance == np.inf
    scores[0, 1, 0, 0, 0] = np.nan  # nothing to choose by
    assert compare_labels(Decision("c", 1), (expected + 1) % 3, expected, np.full_like(scores, np.nan)).distance == 0


def test_the_command_tells_of_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    onnx.save(convolution(), "m.onnx")
    first, last = works("verify", "m.onnx", "--mesh", "depth=2", "--output-op", "argmax").splitlines()
    assert first == "y: no label differs (tolerance 0.0002) ok"
    assert last.startswith("reference: onnxruntime")
    spoil(monkeypatch, "y", lambda labels: labels.fill(2))
    found = run_here("verify", "m.onnx", "--output-op", "argmax")
    assert found.code == 1 and " labels differ, where scores are " in found.out and found.out.count("TOO LARGE") == 1
    found = run_here("verify", "m.onnx", "--output-op", "argmax", "--json")
    (output,) = json.loads(found.out)["outputs"]
    assert found.code == 1 and not output["passed"] and output["differing"] > 100
