"""Which axis of an input is the batch, the depth, the height, the width.

ONNX lays images out as (batch, channel, spatial ...).  Exporters of channels-last frameworks transpose the volume
first; then the spatial axes are those that the first operator with windows or channels sees as such:

    x (1, 64, 96, 80, 2) -> Transpose (0, 4, 1, 2, 3) -> Conv      depth is axis 1, height 2, width 3
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from partitioner.mesh import spatial_names

_SPATIAL = frozenset({
    "Conv", "ConvTranspose", "MaxPool", "AveragePool", "LpPool", "GlobalAveragePool", "GlobalMaxPool", "QLinearConv",
    "ConvInteger", "BatchNormalization", "InstanceNormalization", "GroupNormalization", "LRN", "DepthToSpace",
    "SpaceToDepth", "Resize", "Upsample", "FusedConv"})
"""Operators that take (batch, channel, spatial ...)."""

_WEIGHTED = frozenset({
    "Conv", "ConvTranspose", "Gemm", "BatchNormalization", "InstanceNormalization", "GroupNormalization",
    "LayerNormalization", "RMSNormalization", "PRelu", "QLinearConv", "ConvInteger", "FusedConv", "DeformConv"})
"""Operators whose inputs after the first are weights, which are not split of their own accord."""

_SAME_AXES = frozenset({
    "Identity", "Cast", "Dropout", "Pad", "Add", "Sub", "Mul", "Div", "Relu", "LeakyRelu", "Clip", "Sigmoid", "Tanh",
    "Slice", "Concat", "QuantizeLinear", "DequantizeLinear", "Sqrt", "Pow", "Max", "Min", "Neg", "Abs", "Exp", "Log"})
"""Operators after which the axes stand as before."""


def named_axes(model: ir.Model) -> dict[str, dict[str, int]]:
    """Per input: name of a mesh axis -> the input's axis that it splits."""
    return {str(v.name): _axes_of(v) for v in model.graph.inputs if v.name not in model.graph.initializers}


def axis_extents(axes: Mapping[str, Mapping[str, int]], shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Extents of the axes that a mesh can split, of the input with most axes."""
    name = max(shapes, key=lambda n: len(shapes[n]), default=None)
    if name is None:
        return {}
    return {found: int(shapes[name][axis]) for found, axis in axes.get(name, {}).items() if axis < len(shapes[name])}


def _axes_of(value: ir.Value) -> dict[str, int]:
    rank = 0 if value.shape is None else len(value.shape)
    uses = list(value.uses())
    if rank == 0 or (uses and all(use.node.op_type in _WEIGHTED and use.idx > 0 for use in uses)):
        return {}
    if not 3 <= rank <= 5:
        return {"batch": 0}
    order = _order_at_first_operator(value, rank)
    if order[0] != 0 or order[1] not in (1, rank - 1):  # what mixes these with space is the network's own affair
        order = tuple(range(rank))
    return {"batch": order[0], **dict(zip(spatial_names(rank - 2), order[2:], strict=True))}


def _order_at_first_operator(value: ir.Value, rank: int) -> tuple[int, ...]:
    """Which of the input's axes the first spatial operator that reads it sees as its 0th, 1st, ..."""
    waiting: list[tuple[ir.Value, tuple[int, ...]]] = [(value, tuple(range(rank)))]
    seen = {value}
    while waiting:
        current, order = waiting.pop(0)
        for node in (use.node for use in current.uses()):
            if node.op_type in _SPATIAL and node.inputs[0] is current:
                return order
            if node.op_type == "Transpose":
                perm = node.attributes.get_ints("perm", tuple(reversed(range(rank))))
                after = tuple(order[a] for a in perm) if len(perm) == rank else order
            elif node.op_type in _SAME_AXES:
                after = order
            else:
                continue
            result = node.outputs[0]
            if result not in seen:
                seen.add(result)
                waiting.append((result, after))
    return tuple(range(rank))
