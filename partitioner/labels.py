"""Outputs that are decisions: how far the scores were apart where two results chose different labels.

A label flips where two scores are closer to one another than rounding.  So labels are not compared by their numbers:
where they differ, the reference's own scores tell how close the decision was.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

_PASSED = frozenset({"Cast", "Identity", "Squeeze", "Unsqueeze", "Reshape", "Transpose"})
"""Operators between a decision and an output that keep the labels, but for their shape; a Transpose their order too."""


@dataclass(frozen=True)
class Decision:
    """How the labels of an output were chosen.

    Args:
        scores: name of the value that they were chosen by.
        axis: along which the largest was taken; None where each was compared with a limit.
        limit: that limit.
        order: how the axes were transposed afterwards.
    """

    scores: str
    axis: int | None = None
    limit: float = 0.0
    order: tuple[int, ...] | None = None


def add_scores(model: ir.Model) -> dict[str, Decision]:
    """Let the scores of every decision leave a graph beside its labels; returns the decisions by output."""
    found: dict[str, Decision] = {}
    for value in list(model.graph.outputs):
        made = _decision(value)
        if made is None:
            continue
        found[str(value.name)], scores = made
        if not scores.is_graph_output():
            model.graph.outputs.append(scores)
    return found


def _decision(output: ir.Value) -> tuple[Decision, ir.Value] | None:
    """The decision that ends in an output, and its scores."""
    if output.dtype is None or output.dtype.is_floating_point():
        return None
    order: tuple[int, ...] | None = None
    node = output.producer()
    while node is not None and node.domain == "" and node.op_type in _PASSED:
        if node.op_type == "Transpose":
            perm = node.attributes.get_ints("perm", ())
            if not perm or order is not None:
                return None
            order = tuple(perm)
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    if node is None or node.domain != "" or not node.inputs or node.inputs[0] is None:
        return None
    scores = node.inputs[0]
    if node.op_type == "ArgMax":
        return Decision(str(scores.name), node.attributes.get_int("axis", 0), order=order), scores
    limit = _number(node.inputs[1]) if node.op_type == "Greater" else None
    return None if limit is None else (Decision(str(scores.name), None, limit, order), scores)


def _number(value: ir.Value | None) -> float | None:
    node = None if value is None else value.producer()
    tensor = None if value is None else value.const_value
    if tensor is None and node is not None and node.op_type == "Constant" and "value" in node.attributes:
        tensor = node.attributes["value"].as_tensor()
    return None if tensor is None or tensor.size != 1 else float(tensor.numpy().reshape(-1)[0])


@dataclass(frozen=True)
class Flips:
    """Where labels differ.

    Args:
        count: of them.
        distance: largest distance between the scores there: of the one chosen to the largest, or to the limit.
        scale: largest magnitude of the scores.
    """

    count: int
    distance: float
    scale: float


def compare_labels(decision: Decision, labels: NDArray[Any], expected: NDArray[Any], scores: NDArray[Any]) -> Flips:
    """Compare labels with those of a reference, by the reference's scores; NaN scores decide nothing."""
    wide = scores.astype(np.float64)
    size = float(np.abs(wide[np.isfinite(wide)]).max(initial=0.0))
    differ = labels != expected
    if not differ.any():
        return Flips(0, 0.0, size)
    if decision.order is not None:
        back = np.argsort(decision.order)
        labels, differ = labels.transpose(back), differ.transpose(back)
        decision = replace(decision, order=None)
    with np.errstate(invalid="ignore"):
        distances = _distances(decision, labels, wide)
    apart = distances[differ.reshape(distances.shape)]
    return Flips(int(differ.sum()), float(np.nan_to_num(apart, nan=0.0, posinf=np.inf).max(initial=0.0)), size)


def _distances(decision: Decision, labels: NDArray[Any], scores: NDArray[Any]) -> NDArray[Any]:
    if decision.axis is None:
        return np.abs(scores - decision.limit)
    shape = list(scores.shape)
    shape[decision.axis] = 1
    chosen = labels.astype(np.int64).reshape(shape)
    inside = (chosen >= 0) & (chosen < scores.shape[decision.axis])
    score = np.take_along_axis(scores, np.where(inside, chosen, 0), decision.axis)
    largest = scores.max(decision.axis, keepdims=True)
    return np.where(inside, np.where(score == largest, 0.0, largest - score), np.inf)
