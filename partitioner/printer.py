"""The text form of a plan: one line per node, to be read by people and compared by tests.

    plan 1, opset 18, mesh depth=2 (2 ranks), channels_last
    weights: 2 tensors, 1000 bytes
    input %x : float32 [1, 1, depth(0|5|9), 7]
    %h = HaloExchange(%x) : float32 [1, 1, depth(0|5|9), 7] -> [1, 1, depth(0:6 4:9), 7]  halo depth -1+1
    %y = Conv(%h, @w, @b) {pads=[1, 1, 1, 1]} : float32 [1, 8, depth(0|5|9), 7]
    output %y

`%` is a value that lives in shards, `@` a weight that everyone has.  A layout gives an axis' extent, or the
mesh axis that splits it with the cuts (`depth(0|5|9)`) or each shard's own cells where shards overlap or lie
in pieces (`depth(0:6 4:9)`).  `halo depth -1+1` are the most cells that any rank gets before and after its
own; the messages of an `overlapped` exchange travel while its first reader computes its interior.  Small integer
constants stand in the line themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir

from partitioner import dialect
from partitioner.geometry import Pieces, extent, subtract
from partitioner.layout import AxisLayout, Layout

_SMALL = 8
"""Constants of up to this many elements are written out."""


def print_plan(model: ir.Model) -> str:
    """A plan as text, ending in a newline; the same plan always gives the same text.

    Raises:
        PartitionError: when the model is no plan.
    """
    return "\n".join(_lines(model)) + "\n"


def _lines(model: ir.Model) -> Iterator[str]:
    graph, mesh = model.graph, dialect.get_mesh(model)
    version = graph.opset_imports.get(dialect.DOMAIN, dialect.VERSION)
    ranks = "1 rank" if mesh.size == 1 else f"{mesh.size} ranks"
    yield f"plan {version}, opset {graph.opset_imports['']}, mesh {mesh} ({ranks}), {dialect.get_storage(model)}"
    if dialect.get_passes(model):
        yield "passes: " + " ".join(dialect.get_passes(model))
    schedule = dialect.get_schedule(model)
    if schedule is not None:
        strips = f", strips along {', '.join(schedule.strips)}" if schedule.strips else ""
        yield f"schedule: along {schedule.axis}, slabs of {', '.join(map(str, schedule.thickness))} cells{strips}"
    weights = [v.const_value for v in graph.initializers.values() if v.const_value is not None and v.uses()]
    count = "1 tensor" if len(weights) == 1 else f"{len(weights)} tensors"
    yield f"weights: {count}, {sum(w.nbytes for w in weights)} bytes"
    for value in graph.inputs:
        yield f"input %{value.name} : {_type(value)}"
    for node in graph:
        yield _node(node)
    for value in graph.outputs:
        yield f"output %{value.name} : {_type(value)}"


def _node(node: ir.Node) -> str:
    results = ", ".join(f"%{value.name}" for value in node.outputs)
    operands = [*map(_operand, node.inputs)]
    while operands and operands[-1] == "-":
        operands.pop()
    domain = f"{node.domain}." if node.domain not in ("", dialect.DOMAIN) else ""
    head = f"{results} = {domain}{node.op_type}({', '.join(operands)})"
    if dialect.is_exchange(node):
        return f"{head} : {_exchange(node)}"
    if dialect.is_all_reduce(node):
        kind, axes = dialect.all_reduce_kind(node)
        return f"{head} : {_types(node)}  {kind} over {', '.join(axes)}"
    given = {} if dialect.is_region(node) else dialect.attributes_of(node)
    attributes = [f"{name}={_attribute(value)}" for name, value in sorted(given.items())]
    told = f" {{{', '.join(attributes)}}}" if attributes else ""
    partial = dialect.get_partial(node)
    return f"{head}{told} : {_types(node)}" + (f"  partial over {', '.join(partial)}" if partial else "")


def _operand(value: ir.Value | None) -> str:
    """A value by its name; a small constant by its content."""
    if value is None:
        return "-"
    tensor = value.const_value
    if tensor is None:
        return f"%{value.name}"
    short = tensor.size <= (_SMALL if tensor.dtype.is_integer() else 1) and len(tensor.shape) < 2
    return _attribute(tensor.numpy()) if short else f"@{value.name}"


def _attribute(value: Any) -> str:
    if isinstance(value, np.ndarray):
        if value.size > _SMALL:
            return f"<{value.dtype} {'x'.join(map(str, value.shape))}>"
        return _attribute(value.tolist())
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_attribute, value)) + "]"
    if isinstance(value, float):
        return f"{value:.7g}"
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return str(value)


def _type(value: ir.Value) -> str:
    dtype = "?" if value.dtype is None else _dtype(value.dtype)
    return dtype if value.shape is None else f"{dtype} {dialect.get_layout(value)}"


def _dtype(dtype: ir.DataType) -> str:
    return {"FLOAT": "float32", "DOUBLE": "float64"}.get(dtype.name, dtype.name.lower())


def _types(node: ir.Node) -> str:
    return ", ".join(_type(value) for value in node.outputs if value.shape is not None)


def _exchange(node: ir.Node) -> str:
    """Source and target layouts, and what the exchange does to every axis."""
    source, target = node.inputs[0], node.outputs[0]
    assert source is not None
    before, after = dialect.get_layout(source), dialect.get_layout(target)
    changes = [_change(before, after, axis) for axis in range(len(after.shape))]
    told = "; ".join(filter(None, changes)) or "nothing moves"
    leader = dialect.joined_exchange(node)
    with_others = f", in the messages of {leader}" if leader is not None else ""
    return f"{_type(source)} -> {after}  {told}{with_others}" + (", overlapped" if dialect.is_overlapped(node) else "")


def _change(before: Layout, after: Layout, axis: int) -> str:
    """`halo depth -1+1` (most cells before and after what a rank owns), `gather depth`, `scatter depth`."""
    old, new = before.axes[axis], after.axes[axis]
    if old == new:
        return ""
    if new is None:
        return f"gather {old.mesh_axis}" if old is not None else ""
    if old is None or old.mesh_axis != new.mesh_axis:
        return (f"gather {old.mesh_axis}, " if old is not None else "") + f"scatter {new.mesh_axis}"
    return _widths(old, new)


def _widths(old: AxisLayout, new: AxisLayout) -> str:
    low = high = elsewhere = lost = 0
    for owned, needed in zip(old.parts, new.parts, strict=True):
        lost = max(lost, extent(subtract(owned, needed)))
        first, last, other = _halo(owned, needed)
        low, high, elsewhere = max(low, first), max(high, last), max(elsewhere, other)
    parts = [f"halo {new.mesh_axis} -{low}+{high}"]
    if elsewhere:
        parts.append(f"{elsewhere} cells from elsewhere")
    if lost:
        parts.append(f"up to {lost} own cells not needed")
    return ", ".join(parts)


def _halo(owned: Pieces, needed: Pieces) -> tuple[int, int, int]:
    """Cells directly before and directly after what is owned, and others."""
    foreign = subtract(needed, owned)
    if not owned:
        return 0, 0, extent(foreign)
    low = sum(len(p) for p in foreign if p.stop == owned[0].start)
    high = sum(len(p) for p in foreign if p.start == owned[-1].stop)
    return low, high, extent(foreign) - low - high
