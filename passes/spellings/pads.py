"""Zeros put around a tensor before a window that pads by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import pattern

from partitioner.maps import Identity, Shift
from partitioner.ops.nodes import operator_of
from partitioner.ops.standard.shape import Pad


def pad_rules() -> Iterator[tuple[str, pattern.RewriteRule]]:
    """Zeros before a convolution, or before a mean that counts its padding, are its pads.

    Not before MaxPool, whose own padding is lower than every number.
    """
    for op_type in ("Conv", "AveragePool"):
        yield op_type, pattern.RewriteRule(_padded(op_type), _join_pads)


def _padded(op_type: str) -> Callable[..., Any]:
    def written(op: Any, x: Any) -> Any:
        inner = op.Pad(x, _allow_other_inputs=True, _allow_other_attributes=True, _outputs=["inner"])
        return getattr(op, op_type)(inner, _allow_other_inputs=True, _allow_other_attributes=True,
                                    _outputs=["result"])

    return written


def _join_pads(op: Any, x: ir.Value, inner: ir.Value, result: ir.Value) -> ir.Value | None:
    node, zeros = result.producer(), _zeros(inner)
    if node is None or zeros is None or len(node.outputs) != 1 or node.attributes.get_int("ceil_mode", 0):
        return None
    own = list(node.attributes.get_ints("pads", None) or [0] * len(zeros))
    automatic = node.attributes.get_string("auto_pad", "NOTSET")
    if automatic not in ("NOTSET", "VALID") or (automatic == "VALID" and any(own)):
        return None
    total = [a + b for a, b in zip(zeros, own, strict=True)]
    attributes: dict[str, Any] = {k: v for k, v in node.attributes.items() if k not in ("auto_pad", "pads")}
    if node.op_type == "AveragePool":
        if any(own) and not node.attributes.get_int("count_include_pad", 0):
            return None
        kernel = list(node.attributes["kernel_shape"].as_ints())
        if any(t >= k for t, k in zip(total, kernel * 2, strict=True)):  # onnxruntime refuses such pads
            return None
        attributes["count_include_pad"] = 1
    return op.op(node.op_type, x, *node.inputs[1:], **attributes, pads=total)


def _zeros(inner: ir.Value) -> list[int] | None:
    """Cells of constant zero before every spatial axis, then after; None for any other padding."""
    node = inner.producer()
    operator = None if node is None else operator_of(node)
    if node is None or not isinstance(operator, Pad) or node.attributes.get_string("mode", "constant") != "constant":
        return None
    before: list[int] = []
    after: list[int] = []
    for axis_map in operator.axes:
        if not isinstance(axis_map, Shift | Identity):
            return None
        low = -axis_map.offset if isinstance(axis_map, Shift) else 0
        before.append(low)
        after.append(axis_map.n_out - axis_map.n_in - low)
    if operator.fill != 0 or min(before + after) < 0 or any(before[:2] + after[:2]):
        return None
    return [*before[2:], *after[2:]]
