"""Pools whose one window is all of an axis: reductions, so that shards send their results and not their cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from partitioner.maps import Window
from partitioner.ops.nodes import operator_of
from partitioner.ops.standard.pool import AveragePool, MaxPool

_AXES_AS_INPUT = 18
"""The opset from which ReduceMax and ReduceMean take their axes as an input."""
_INTEGERS = 12
"""The opset from which ReduceMax takes 8-bit integers."""

Reading = tuple[str, Mapping[str, Any], Sequence[ir.Value]]
"""Operator, attributes and constants of a reduction."""


def read_pool(node: ir.Node, opset: int) -> Reading | None:
    """The reduction that a MaxPool or AveragePool is, where its window is whole axes and nothing of the others."""
    operator = operator_of(node)
    if not isinstance(operator, MaxPool | AveragePool) or len(node.outputs) != 1:
        return None
    counts_more = isinstance(operator, AveragePool) and operator.include_pad
    taken = [axis for axis, window in enumerate(operator.windows, 2) if _is_all(window, counts_more)]
    axes = [axis for axis in taken if operator.windows[axis - 2].n_in > 1]
    if not axes or any(not w.is_identity for axis, w in enumerate(operator.windows, 2) if axis not in taken):
        return None
    kind = "Max" if isinstance(operator, MaxPool) else "Mean"
    if operator.outputs[0].dtype.is_floating_point() and len(taken) == len(operator.windows):
        return ("GlobalMaxPool" if kind == "Max" else "GlobalAveragePool"), {}, ()
    if opset >= _AXES_AS_INPUT:
        constant = ir.Value(name=f"{node.name}/axes", const_value=ir.tensor(np.asarray(axes, np.int64)))
        constant.shape, constant.type = ir.Shape([len(axes)]), ir.TensorType(ir.DataType.INT64)
        return f"Reduce{kind}", {"keepdims": 1}, (constant,)
    if opset < _INTEGERS and not operator.outputs[0].dtype.is_floating_point():
        return None
    return f"Reduce{kind}", {"axes": axes, "keepdims": 1}, ()


def _is_all(window: Window, counts_more: bool) -> bool:
    """Whether the axis has one window, of all its cells; with no padding around them where that counts."""
    reach = window.reach - window.lo
    return (window.n_out == 1 and window.dilation == 1 and window.lo >= 0 and reach >= window.n_in
            and not (counts_more and window.reach > window.n_in))
