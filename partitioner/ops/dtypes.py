"""Element types: ONNX's names and torch's."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import onnx_ir as ir

from partitioner.ops.base import NodeView, Unsupported

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


def disagreeing(op_type: str, version: int, types: Sequence[ir.DataType | None],
                known: Sequence[bool]) -> dict[int, ir.DataType]:
    """Inputs of a standard operator that are not of the type that its definition asks for, and that type.

    Args:
        types: element types of the inputs; None for those that are not given.
        known: whether each is a constant; the data decide, where they can.
    """
    names, repeats = _type_variables(op_type, version)
    if not names:
        return {}
    wanted: dict[str, ir.DataType] = {}
    found: dict[int, ir.DataType] = {}
    for index in sorted(range(len(types)), key=lambda i: (known[i], i)):
        name, given = names[min(index, len(names) - 1)], types[index]
        if given is None or not name or (index >= len(names) and not repeats):
            continue
        if wanted.setdefault(name, given) != given:
            found[index] = wanted[name]
    return found


def refuse_mixed(view: NodeView) -> None:
    """Refuse inputs of several types where the operator's definition asks for one.

    Raises:
        Unsupported: for such a node, which onnxruntime refuses, too.
    """
    types = [None if t is None else t.dtype for t in view.inputs]
    known = [constant is not None for constant in view.constants]
    for index, wanted in disagreeing(view.op_type, view.version, types, known).items():
        given = types[index]
        assert given is not None
        raise Unsupported(f"input {index} is {given.name} beside inputs of {wanted.name}; export the model in one "
                          "type, or put a Cast before it")


@cache
def _type_variables(op_type: str, version: int) -> tuple[tuple[str, ...], bool]:
    """Per input the type variable of the operator's definition ("" for a fixed type); whether the last one repeats."""
    from onnx import defs

    try:
        schema = defs.get_schema(op_type, version, "")
    except defs.SchemaError:
        return (), False
    variables = {constraint.type_param_str for constraint in schema.type_constraints}
    names = tuple(given.type_str if given.type_str in variables else "" for given in schema.inputs)
    variadic = bool(names) and schema.inputs[-1].option == defs.OpSchema.FormalParameterOption.Variadic
    return names, variadic and schema.inputs[-1].is_homogeneous
