"""One class per operator: its interval map, its kernel and its examples.

To add an operator, write one class with `@register` in one of these files.
"""

from partitioner.ops import conv, dense, norm, pointwise, pool, reduce, reshape, resize, shape
from partitioner.ops.base import (
    Call,
    Decomposer,
    Example,
    Need,
    Needs,
    NodeView,
    Operator,
    TensorType,
    Unsupported,
)
from partitioner.ops.registry import lookup, register, registered

__all__ = [
    "Call",
    "Decomposer",
    "Example",
    "Need",
    "Needs",
    "NodeView",
    "Operator",
    "TensorType",
    "Unsupported",
    "conv",
    "dense",
    "lookup",
    "norm",
    "pointwise",
    "pool",
    "reduce",
    "register",
    "registered",
    "reshape",
    "resize",
    "shape",
]
