"""One class per operator: its interval map, its kernel and its examples.

    base, registry, nodes    what an operator is, the table of them, the operator of a node
    standard, contrib, own   the operators of ONNX, of com.microsoft, of our dialect
    opaque, plugins          what has no rule here; operators from outside
    kernels                  arithmetic that several operators share
    emitter                  the local computation as plain ONNX nodes

To add an operator, write one class with `@register` in a file of `standard`: every module there is imported.
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

for _module in pkgutil.walk_packages(__path__, f"{__name__}."):
    importlib.import_module(_module.name)
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
