"""What the rules for layers that are written out ask of values."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir as ir

from partitioner import dialect
from partitioner.ops.base import Array

TOLERANCE = 1e-6
"""Relative error up to which a constant is taken for the number that it stands for: float32 has 6e-8."""


def number(value: ir.Value | None) -> float | None:
    """The number that a constant of one cell holds."""
    if value is None or value.const_value is None or value.const_value.size != 1:
        return None
    array = value.const_value.numpy()
    return float(array.reshape(-1)[0]) if array.dtype.kind in "fiu" else None


def near(found: float | None, wanted: float) -> bool:
    """Whether a number is the wanted one, but for its rounding."""
    return found is not None and math.isclose(found, wanted, rel_tol=TOLERANCE)


def constant(value: ir.Value | None) -> Array | None:
    """The value of a constant."""
    return None if value is None or value.const_value is None else value.const_value.numpy()


def own_constant(value: ir.Value | None) -> Array | None:
    """The value of a constant that one node alone reads."""
    return None if value is None or len(value.uses()) != 1 else constant(value)


def made_of(op: Any, array: Array, value: ir.Value, name: str) -> ir.Value:
    """A new constant that repeats the numbers of another one, each as often as the next."""
    made: ir.Value = op.initializer(ir.tensor(array), name=name)
    dialect.set_source(made, dialect.get_source(value))
    return made


def spread(value: ir.Value, shape: tuple[int, ...], first: int, stop: int) -> Array | None:
    """A constant as an array over axes [first, stop) of a tensor, where it is the same along all others.

    None when it is no constant, varies along another axis, or would widen the tensor.
    """
    if value.const_value is None or first >= stop:
        return None
    extents = tuple(int(n) for n in value.const_value.shape.numpy())
    aligned = (1,) * (len(shape) - len(extents)) + extents
    if len(aligned) != len(shape):
        return None
    fits = all(n == 1 or (n == shape[a] and first <= a < stop) for a, n in enumerate(aligned))
    if not fits:
        return None
    array = value.const_value.numpy().reshape(aligned[first:stop])
    return np.ascontiguousarray(np.broadcast_to(array, shape[first:stop]))

