"""Element types: ONNX's names and torch's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from partitioner.ops.base import Unsupported

if TYPE_CHECKING:
    import torch
else:
    from partitioner.lazy import torch

_TORCH_NAMES = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.DOUBLE: "float64",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.BFLOAT16: "bfloat16",
    ir.DataType.INT64: "int64",
    ir.DataType.INT32: "int32",
    ir.DataType.INT16: "int16",
    ir.DataType.INT8: "int8",
    ir.DataType.UINT8: "uint8",
    ir.DataType.UINT16: "uint16",
    ir.DataType.UINT32: "uint32",
    ir.DataType.UINT64: "uint64",
    ir.DataType.BOOL: "bool",
}


def is_known(dtype: ir.DataType) -> bool:
    """Whether the runtime can hold this element type."""
    return dtype in _TORCH_NAMES


def torch_dtype(dtype: ir.DataType) -> torch.dtype:
    """The torch type of an ONNX element type.

    Raises:
        Unsupported: when torch has none.
    """
    name = _TORCH_NAMES.get(dtype)
    if name is None:
        raise Unsupported(f"element type {dtype.name} is not supported; use float32, float64 or an integer type")
    return getattr(torch, name)
