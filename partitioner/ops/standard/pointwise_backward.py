"""What autograd keeps of functions that work cell by cell; those that are not listed keep nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence

from partitioner.ops.base import Backward, TensorType

_RESULT = frozenset({"Relu", "Sigmoid", "Tanh", "Exp", "Sqrt", "Reciprocal", "Tan"})
"""Functions whose derivative follows from their result."""

_ARGUMENT = frozenset({
    "LeakyRelu", "Elu", "Celu", "Selu", "HardSwish", "Softplus", "Softsign", "Gelu", "Mish", "Swish", "Log", "Abs",
    "Erf", "Sin", "Cos", "Atan", "Asin", "Acos", "Sinh", "Cosh", "Asinh", "Acosh", "Atanh", "Clip", "PRelu"})
"""Functions whose derivative follows from their first input."""

_BESIDE = {"HardSigmoid": 4.0, "Softsign": 4.0, "Swish": 4.0, "ThresholdedRelu": 1.0, "Shrink": 2.0, "Sign": 1.0,
           "PRelu": 1.0}
"""Bytes per cell of tensors between: of a word in float32, masks of one."""

_FACTORS = frozenset({"Mul", "Div", "Pow"})
"""Functions of two inputs, of which each is kept for the other's gradient."""

_CHOICES = frozenset({"Min", "Max", "Mod"})
"""Functions that keep all inputs and, of three or more, what was found between."""

_SAME = frozenset({"Identity", "Dropout"})


def pointwise_backward(op_type: str, inputs: Sequence[TensorType | None], output: TensorType, ins: Sequence[float],
                       out: float) -> Backward:
    """What the gradient of a function needs; see `Operator.backward`.

    Args:
        ins, out: elements of the inputs and of the output.
    """
    word = output.itemsize
    if op_type in _SAME:
        return Backward(shares=True, hands_on=True)
    if op_type in ("Add", "Sum", "Sub"):
        return Backward(hands_on=True)
    if op_type in _RESULT:
        return Backward(outputs=(0,))
    if op_type in _FACTORS:
        return _of_factors(op_type, inputs)
    if op_type in _CHOICES:
        between = word * out * max(0, len(inputs) - 2)
        return Backward(tuple(range(len(inputs))), beside=between, workspace=2 * word * out)
    if op_type == "Where":
        return Backward((0,), workspace=word * out)
    beside = _BESIDE.get(op_type, 0.0) * out
    beside = beside if word == 4 or op_type not in ("HardSigmoid", "Softsign", "Swish") else beside * word / 4
    return Backward((0,) if op_type in _ARGUMENT else (), beside=beside)


def _of_factors(op_type: str, inputs: Sequence[TensorType | None]) -> Backward:
    """A single number trains not: nothing is kept for its gradient, and it costs nothing to keep."""
    sizes = [1 if t is None else math.prod(t.shape) for t in inputs]
    if op_type == "Pow":
        return Backward((0, 1), (0,))
    kept = {1 - i for i, n in enumerate(sizes) if n > 1}
    if op_type == "Div":
        kept = kept | {1} if sizes[1] > 1 else kept - {0}
    return Backward(tuple(sorted(kept)))
