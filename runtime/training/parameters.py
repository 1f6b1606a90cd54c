"""Which weights of a model train, and where they stand in a module.

Trained are floating-point weights that a layer uses as such:

    weights and biases     of Conv, ConvTranspose, Gemm, MatMul, Einsum, DeformConv
    scales and biases      of BatchNormalization, InstanceNormalization, GroupNormalization, LayerNormalization, ...
    slopes                 of PRelu
    operands               of Add, Sub, Mul and Div with more than one element (a layer's scale or bias, written out)

Everything else is a buffer: running statistics, scales of Resize, padding values, indices, single numbers.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
from torch import nn

_LAYERS = frozenset({
    "Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum", "DeformConv", "PRelu", "InstanceNormalization",
    "GroupNormalization", "LayerNormalization", "RMSNormalization", "Normalize", "FusedConv", "FusedMatMul"})
"""Layers all of whose floating-point weights train."""

_SCALE_AND_BIAS: Mapping[str, tuple[int, ...]] = {"BatchNormalization": (1, 2), "TrainingBatchNormalization": (1, 2)}
"""Layers of which only some inputs train; the others are running statistics."""

_OPERANDS = frozenset({"Add", "Sub", "Mul", "Div"})


def is_trainable(value: ir.Value) -> bool:
    """Whether an initialiser is a parameter, by the way it is used."""
    tensor = value.const_value
    if tensor is None or not tensor.dtype.is_floating_point():
        return False
    return any(_trains(use.node.op_type, use.idx, int(tensor.size)) for use in value.uses())


def _trains(op_type: str, index: int, size: int) -> bool:
    if op_type in _SCALE_AND_BIAS:
        return index in _SCALE_AND_BIAS[op_type]
    return op_type in _LAYERS or (op_type in _OPERANDS and size > 1)


def place_for(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The submodule and attribute for a weight: dots make submodules, which are made when they are missing.

    A name that cannot be a path (an empty part, or one that another weight has taken) is one attribute with
    its dots replaced.
    """
    *path, last = name.split(".")
    if not all((*path, last)) or not _is_free(module, path, last):
        return module, name.replace(".", "_")
    owner = module
    for part in path:
        inner = getattr(owner, part, None)
        if not isinstance(inner, nn.Module):
            inner = nn.Module()
            owner.add_module(part, inner)
        owner = inner
    return owner, last


def _is_free(module: nn.Module, path: list[str], last: str) -> bool:
    owner = module
    for part in path:
        inner = getattr(owner, part, None)
        if not isinstance(inner, nn.Module):
            return inner is None
        owner = inner
    return not hasattr(owner, last)
