"""Interior before boundary: the cells of a node's result that need nothing which is on its way.

    h = HaloExchange(x)   depth(0|6|12) -> depth(0:7 5:12)    overlapped
    y = Conv(h)           depth(0|6|12)

    post h, y[0:5 | 7:12], finish h, y[5:6 | 6:7]             rank 0 | rank 1

An exchange that is marked is posted, its first reader computes its interior, and when the messages are there the
boundary: before and after the interior along one split axis after the other, so that the parts are disjoint.
Everything is found per axis, as layouts are; a part may have no cells on some ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import onnx_ir as ir

from partitioner import dialect
from partitioner.geometry import Interval, Pieces, covers, span, subtract
from partitioner.layout import AxisLayout, Layout
from partitioner.maps import AxisMap
from partitioner.ops.nodes import needs_of, operator_of


@dataclass(frozen=True)
class Overlap:
    """A node that computes while messages travel.

    Args:
        exchanges: those that it waits for, in order.
        parts: what every rank computes of each output, one after the other: the interior, then the boundary.
    """

    node: ir.Node
    exchanges: tuple[ir.Node, ...]
    parts: tuple[Layout, ...]


def find_overlaps(model: ir.Model) -> dict[ir.Node, Overlap]:
    """By node those that marked exchanges overlap with; {} for a plan that is executed depth-first."""
    if dialect.get_schedule(model) is not None:
        return {}
    return {o.node: o for o in _candidates(model, dialect.is_overlapped)}


def can_overlap(model: ir.Model) -> list[Overlap]:
    """All overlaps that a plan of whole-shard steps allows, whatever is marked."""
    return list(_candidates(model, lambda node: node.op_type == dialect.HALO_EXCHANGE))


def _candidates(model: ir.Model, wanted: Callable[[ir.Node], bool]) -> Iterator[Overlap]:
    waiting: list[ir.Node] = []
    for node in model.graph:
        if dialect.is_exchange(node):
            waiting += [node] if wanted(node) else []
            continue
        read = [exchange for exchange in waiting if exchange.outputs[0] in node.inputs]
        found = _overlap(node, read) if read else None
        if found is not None:
            yield found
        waiting = []


def _overlap(node: ir.Node, exchanges: Sequence[ir.Node]) -> Overlap | None:
    """How a node overlaps with exchanges; None where it has no interior, or cannot be computed in parts."""
    if dialect.is_communication(node) or dialect.get_partial(node) or operator_of(node).is_view:
        return None
    layout = dialect.get_layout(node.outputs[0])
    if any(dialect.get_layout(value) != layout for value in node.outputs[1:]):
        return None
    inner: dict[int, tuple[Pieces, ...]] = {}
    for need_axis, axis_map, owned in _dependences(node, exchanges):
        split = None if need_axis is None else layout.axes[need_axis]
        if split is None or need_axis is None or split.mesh_axis != owned.mesh_axis:
            return None
        cells = inner.get(need_axis, split.parts)
        inner[need_axis] = _interiors(cells, axis_map, owned)
    parts = _parts(layout, tuple(sorted(inner.items())))
    return Overlap(node, tuple(exchanges), parts) if _has_cells(parts[0]) else None


def _dependences(node: ir.Node, exchanges: Sequence[ir.Node]) -> Iterator[tuple[int | None, AxisMap, AxisLayout]]:
    """For every split axis of what is exchanged the output axis by which it is needed, how, and what is owned."""
    sources = {exchange.outputs[0]: exchange.inputs[0] for exchange in exchanges}
    for index, value in enumerate(node.inputs):
        source = None if value is None else sources.get(value)
        if source is None:
            continue
        for output in range(len(operator_of(node).outputs)):
            needs = needs_of(node, output)[index]
            for need, owned in zip(needs or (), dialect.get_layout(source).axes, strict=needs is not None):
                if owned is not None:
                    yield need.axis, need.map, owned


_KEPT = 1 << 10
"""Answers that are remembered: layers repeat."""


@lru_cache(_KEPT)
def _interiors(parts: tuple[Pieces, ...], axis_map: AxisMap, owned: AxisLayout) -> tuple[Pieces, ...]:
    """Of every coordinate's part the interior."""
    return tuple(_interior(part, axis_map, own) for part, own in zip(parts, owned.parts, strict=True))


def _interior(part: Pieces, axis_map: AxisMap, owned: Pieces) -> Pieces:
    """The longest run of cells for which all that is needed is owned."""
    runs = [run for piece in part for run in _runs(piece, lambda i: covers(owned, axis_map.needed(i)))]
    longest = max(runs, key=len, default=Interval(0, 0))
    return span(longest.start, longest.stop)


def _runs(piece: Interval, is_met: Callable[[Interval], bool]) -> Iterator[Interval]:
    start, stop = piece.start, piece.stop
    while start < stop and not is_met(Interval(start, start + 1)):
        start += 1
    while start < stop and not is_met(Interval(stop - 1, stop)):
        stop -= 1
    if start == stop or is_met(Interval(start, stop)):
        yield Interval(start, stop)
        return
    for cell in range(start, stop):
        if not is_met(Interval(start, cell + 1)):
            yield Interval(start, cell)
            start = cell if is_met(Interval(cell, cell + 1)) else cell + 1
    yield Interval(start, stop)


@lru_cache(_KEPT)
def _parts(layout: Layout, inner: tuple[tuple[int, tuple[Pieces, ...]], ...]) -> tuple[Layout, ...]:
    """The interior, then what is before and after it along one axis after the other, if any rank has cells there."""
    rest, boundary = layout, list[Layout]()
    for axis, cells in inner:
        split = layout.axes[axis]
        assert split is not None
        sides = [_sides(part, inside) for part, inside in zip(split.parts, cells, strict=True)]
        boundary += [rest.with_axis(axis, AxisLayout(split.mesh_axis, side)) for side in zip(*sides, strict=True)]
        rest = rest.with_axis(axis, AxisLayout(split.mesh_axis, cells))
    return (rest, *filter(_has_cells, boundary))


def _sides(part: Pieces, inside: Pieces) -> tuple[Pieces, Pieces]:
    """What lies before and after an interior of one piece; all of it before where there is none."""
    if not inside:
        return part, ()
    outside = subtract(part, inside)
    return (tuple(i for i in outside if i.stop <= inside[0].start),
            tuple(i for i in outside if i.start >= inside[0].stop))


def _has_cells(layout: Layout) -> bool:
    """Whether any rank has cells of it."""
    return 0 not in layout.shape and all(split is None or any(split.parts) for split in layout.axes)
