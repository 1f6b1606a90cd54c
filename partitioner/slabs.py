"""What depth-first execution keeps from slab to slab, value by value: which results are copied, which cells move."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from partitioner import dialect
from partitioner.ops.nodes import needs_of
from partitioner.rolling import order_stages, rolled_axis


@dataclass(frozen=True)
class Rest:
    """What a value leaves behind in its buffer when a slab ends.

    Args:
        is_kept: whether any cell is still needed, so that results have a place in a buffer that stays.
        waits: whether most cells are still needed, as of a skip that waits for the far side of a network, or of what
            another chain reads.
        moved: cells along the rolled axis that move to the buffer's front before the next slab.
    """

    is_kept: bool
    waits: bool
    moved: int


def find_rests(model: ir.Model) -> dict[ir.Value, Rest]:
    """For every value with the rolled axis what it keeps; {} for a plan of whole-shard steps."""
    schedule = dialect.get_schedule(model)
    if schedule is None:
        return {}
    values = (*model.graph.inputs, *(v for node in model.graph for v in node.outputs))
    stages = order_stages(list(model.graph), schedule.axis, schedule.strips)
    stage_of = {node: index for index, stage in enumerate(stages) for node in stage.nodes}
    return {v: _rest(v, schedule.axis, stage_of) for v in values if rolled_axis(v, schedule.axis) is not None}


def _rest(value: ir.Value, name: str, stage_of: Mapping[ir.Node, int]) -> Rest:
    axis, producer = rolled_axis(value, name), value.producer()
    assert axis is not None
    readers = dict.fromkeys(use.node for use in value.uses())
    moved = max((_overlap(node, value, axis, name) for node in readers), default=0)
    waits = len(readers) > 1 or any(producer is not None and stage_of[node] != stage_of[producer] for node in readers)
    return Rest(moved > 0 or waits, waits, 0 if waits else moved)


def _overlap(node: ir.Node, value: ir.Value, axis: int, name: str) -> int:
    """Cells of a value that are needed on both sides of a position in the middle of a reader's output."""
    if dialect.is_communication(node):
        results = [result for given, result in zip(node.inputs, node.outputs, strict=True) if given is value]
        return max((_overlap(use.node, result, axis, name) for result in results for use in result.uses()), default=0)
    if name in dialect.get_partial(node):
        return 0
    found = 0
    for index, given in enumerate(node.inputs):
        for output, result in enumerate(node.outputs):
            place = rolled_axis(result, name)
            if given is not value or place is None:
                continue
            needs = needs_of(node, output)[index]
            if needs is None or needs[axis].axis != place:
                continue
            found = max(found, needs[axis].map.overlap)
    return found
