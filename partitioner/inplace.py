"""Values that lie in the memory of others: of the one they are computed from, or of the one they become a part of.

    y = Conv(x); z = Relu(y)        z lies where y lay, if nobody reads y after that
    u = Conv(x); c = Concat(s, u)   u is put into the memory of c at once; s, which is there before, is copied

It holds for all ranks or none, so that all have the same buffers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from partitioner import dialect
from partitioner.ops.fused import follows, starts
from partitioner.ops.nodes import operator_of
from partitioner.ops.standard.shape import Concat


@dataclass(frozen=True)
class Place:
    """Cells of another value along one axis, from `start` on."""

    value: str
    axis: int
    start: int


def find_in_place(model: ir.Model, nodes: Sequence[ir.Node], position: Mapping[ir.Node, int]) -> dict[str, str]:
    """Value -> the value that takes its memory.

    Args:
        nodes: of the model, in order.
        position: of every node.
    """
    rolls = dialect.get_schedule(model) is not None
    found: dict[str, str] = {}
    for node in nodes:
        if dialect.is_communication(node) or not follows(operator_of(node)):
            continue
        taken = next((v for v in node.inputs if v is not None and _ends_in(v, node, position, rolls)), None)
        if taken is not None:
            found[str(taken.name)] = str(node.outputs[0].name)
    return found


def _ends_in(value: ir.Value, node: ir.Node, position: Mapping[ir.Node, int], rolls: bool) -> bool:
    """Whether a node's result has the cells of one of its inputs, and is the last that is made from it."""
    maker, result = value.producer(), node.outputs[0]
    if maker is None or value.is_graph_output() or value.shape != result.shape or value.dtype != result.dtype:
        return False
    if dialect.get_layout(value) != dialect.get_layout(result) or dialect.rests_in_file(value) != dialect.rests_in_file(
            result):
        return False
    if dialect.is_communication(maker) or not _makes_memory(maker):
        return False
    users = [use.node for use in value.uses()]
    others = [user for user in users if user is not node]
    if len(users) - len(others) > 1:  # both operands
        return False
    if not rolls:
        return all(_is_done_with(user) and position[user] < position[node] for user in others)
    return not others and all(v is value or v is None or v.const_value is not None for v in node.inputs)


def _makes_memory(maker: ir.Node) -> bool:
    """Whether a result is never its input's memory: a cast that changes nothing hands on its input, even a weight."""
    operator = operator_of(maker)
    return len(maker.outputs) == 1 and not operator.is_view and (starts(operator) or operator.writes_into)


def _is_done_with(user: ir.Node) -> bool:
    """Whether a node keeps nothing of its input's memory: no view of it, no halo beside it."""
    if dialect.is_communication(user):
        return dialect.is_all_reduce(user)
    return not operator_of(user).is_view


def find_placed(model: ir.Model, nodes: Sequence[ir.Node], position: Mapping[ir.Node, int]) -> dict[str, Place]:
    """Value -> where it lies in a concatenation: of each one the part that is computed last.

    Parts that are there long before would keep room for the others while they wait; they are copied.
    """
    if dialect.get_schedule(model) is not None:
        return {}
    found: dict[str, Place] = {}
    for node in nodes:
        operator = None if dialect.is_communication(node) else operator_of(node)
        if not isinstance(operator, Concat) or len(set(node.inputs)) < len(node.inputs):
            continue
        parts = [(value, start) for value, start in zip(node.inputs, operator.starts, strict=True) if value is not None]
        made = [(_origin(value), start) for value, start in parts]
        last = max((m for m in made if m[0] is not None), key=lambda m: _born(m[0], position), default=None)
        if last is None or last[0] is None or any(_born(v, position) > _born(last[0], position) for v, _ in made if v):
            continue
        if _can_be_placed(last[0], node, operator):
            found[str(last[0].name)] = Place(str(node.outputs[0].name), operator.axis, last[1])
    return found


def _born(value: ir.Value | None, position: Mapping[ir.Node, int]) -> int:
    maker = None if value is None else value.producer()
    return -1 if maker is None else position[maker]


def _origin(value: ir.Value) -> ir.Value | None:
    """The value whose memory this is, where it is all of it and nobody else looks at it."""
    while len(value.uses()) == 1 and not value.is_graph_output():
        maker = value.producer()
        if maker is None or dialect.is_communication(maker):
            return None
        if not operator_of(maker).is_view:
            return value if len(maker.outputs) == 1 else None
        source = maker.inputs[0]
        if source is None or source.shape != value.shape or dialect.get_layout(source) != dialect.get_layout(value):
            return None
        value = source
    return None


def _can_be_placed(value: ir.Value, node: ir.Node, operator: Concat) -> bool:
    """Whether a kernel can write a value into its part of a concatenation, which no rank splits."""
    maker = value.producer()
    if maker is None or not (operator_of(maker).writes_into or starts(operator_of(maker))):
        return False  # it would be computed beside its place and copied there
    own, whole = dialect.get_layout(value).axes, dialect.get_layout(node.outputs[0]).axes
    return own == whole and own[operator.axis] is None and value.dtype == node.outputs[0].dtype


def joined_to(node: ir.Node, buffer_of: Mapping[str, str]) -> ir.Node | None:
    """The maker of the value whose memory a node's result takes; None where it takes none."""
    if dialect.is_communication(node) or not follows(operator_of(node)):
        return None
    home = buffer_of[str(node.outputs[0].name)]
    for value in node.inputs:
        maker = None if value is None else value.producer()
        if value is not None and maker is not None and buffer_of.get(str(value.name)) == home:
            return None if dialect.is_communication(maker) else maker
    return None
