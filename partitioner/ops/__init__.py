"""One class per operator: its interval map, its kernel and its examples.

To add an operator, write one class with `@register` in one of these files, or in a file of its own here: every
module of this folder is imported.
"""

import importlib
import pkgutil

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
from partitioner.ops.plugins import load_declared, load_operators
from partitioner.ops.registry import lookup, register, registered

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
load_declared()

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
    "load_operators",
    "lookup",
    "register",
    "registered",
]
