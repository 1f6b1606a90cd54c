"""The properties that passes require and ensure, each recomputed from the model alone."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from partitioner import dialect
from partitioner.exchange import plan_exchange
from partitioner.geometry import covers, span
from partitioner.interior import find_overlaps
from partitioner.layout import Layout
from partitioner.ops.base import Unsupported
from partitioner.ops.nodes import data_needs, operator_of, reduction_splits, tensor_type
from partitioner.rolling import order_stages
from passes.base import Check


def compute_nodes(model: ir.Model) -> Iterator[ir.Node]:
    """Every node that is no communication."""
    return (node for node in model.graph if not dialect.is_communication(node))


def _static(model: ir.Model) -> Iterator[str]:
    for value in (*model.graph.inputs, *(v for n in model.graph for v in n.outputs if v.uses() or v.is_graph_output())):
        try:
            tensor_type(value)
        except Unsupported as error:
            yield f"{value.name}: {error}"


def _known(model: ir.Model) -> Iterator[str]:
    for node in compute_nodes(model):
        try:
            operator = operator_of(node)
        except Unsupported as error:
            yield f"{node.name} ({node.op_type}): {error}"
            continue
        for expected, value in zip(operator.outputs, node.outputs, strict=False):
            if value.shape is not None and expected.shape != dialect.shape_of(value):
                yield f"{node.name}: extents {expected.shape} by its map, {dialect.shape_of(value)} in the file"


def _laid_out(model: ir.Model) -> Iterator[str]:
    for value in (*model.graph.inputs, *(v for n in model.graph for v in n.outputs)):
        if (value.uses() or value.is_graph_output()) and not dialect.has_layout(value):
            yield f"{value.name} has no layout"


def _cover(model: ir.Model) -> Iterator[str]:
    """Every cell has a rank; cells of outputs and of what is exchanged have one only."""
    mesh = dialect.get_mesh(model)
    for node in (None, *model.graph):
        values = model.graph.inputs if node is None else node.outputs
        if node is not None and dialect.is_exchange(node) and node.op_type == dialect.HALO_EXCHANGE:
            continue
        for value in values:
            layout = dialect.get_layout(value)
            if not (layout.is_partition if value.is_graph_output() else layout.is_cover):
                yield f"shards of {value.name} overlap or leave cells out: {layout}"
            for split in filter(None, layout.axes):
                ranks = mesh.count(split.mesh_axis)
                if len(split.parts) != ranks:
                    yield f"{value.name} has {len(split.parts)} shards along {split.mesh_axis}={ranks}"


def same_mesh_axes(have: Layout, want: Layout) -> bool:
    """Whether every split axis of `have` is wanted along the same mesh axis."""
    return all(
        a is None or (b is not None and a.mesh_axis == b.mesh_axis)
        for a, b in zip(have.axes, want.axes, strict=True)
    )


def holds(have: Layout, want: Layout) -> bool:
    """Whether every rank already holds what it needs."""
    for a, b, n in zip(have.axes, want.axes, have.shape, strict=True):
        if a is None:
            continue
        if b is None:
            if not all(covers(part, span(0, n)) for part in a.parts):
                return False
        elif a.mesh_axis != b.mesh_axis or not a.covers(b):
            return False
    return True


def _agree(model: ir.Model) -> Iterator[str]:
    for node in compute_nodes(model):
        for _, value, want in data_needs(node, split=True):
            if not same_mesh_axes(dialect.get_layout(value), want):
                yield f"{node.name} needs {value.name} as {want}, it is {dialect.get_layout(value)}"


def sharded_reduction(node: ir.Node) -> tuple[str, ...]:
    """Mesh axes that split the axes over which a node reduces; none when each rank has them whole."""
    splits = reduction_splits(node).values()
    return tuple(dict.fromkeys(shards.mesh_axis for axes in splits for shards in axes.values()))


def _reduces_sharded(node: ir.Node) -> bool:
    return bool(sharded_reduction(node)) and not dialect.get_partial(node)


def _split(model: ir.Model) -> Iterator[str]:
    for node in compute_nodes(model):
        if _reduces_sharded(node):
            yield f"{node.name} reduces over sharded axes in one node"
        partial = dialect.get_partial(node)
        if any(split.cuts is None for axes in reduction_splits(node).values() for split in axes.values()):
            yield f"{node.name} reduces over shards that overlap"
        if partial and not all(
            dialect.is_all_reduce(user) for value in node.outputs for user, _ in value.uses()
        ):
            yield f"{node.name} is partial, but not only all-reduces use it"


def _met(model: ir.Model) -> Iterator[str]:
    for node in compute_nodes(model):
        for _, value, want in data_needs(node):
            if not holds(dialect.get_layout(value), want):
                yield f"{node.name} needs {value.name} as {want}, it is {dialect.get_layout(value)}"


def _exchanges(model: ir.Model) -> Iterator[str]:
    mesh = dialect.get_mesh(model)
    for node in filter(dialect.is_exchange, model.graph):
        source, target = node.inputs[0], node.outputs[0]
        assert source is not None
        try:
            plan_exchange(mesh, dialect.get_layout(source), dialect.get_layout(target))
        except ValueError as error:
            yield f"{node.name}: {error}"


def _no_chain(model: ir.Model) -> Iterator[str]:
    for node in filter(dialect.is_exchange, model.graph):
        producer = node.inputs[0].producer() if node.inputs[0] is not None else None
        if producer is not None and dialect.is_exchange(producer):
            yield f"{node.name} exchanges what {producer.name} has just exchanged"


def _scheduled(model: ir.Model) -> Iterator[str]:
    schedule = dialect.get_schedule(model)
    if schedule is None:
        return
    if dialect.get_mesh(model).count(schedule.axis) != 1:
        yield f"the schedule goes along {schedule.axis}, which the mesh splits"
        return
    unknown = [name for name in schedule.strips if name not in dialect.get_mesh(model).names]
    if unknown:
        yield f"the schedule has strips along {', '.join(unknown)}, which the mesh lacks"
        return
    nodes = list(model.graph)
    stages = order_stages(nodes, schedule.axis, schedule.strips)
    chains = sum(stage.is_chain for stage in stages)
    if len(schedule.thickness) != chains or min(schedule.thickness, default=1) < 1:
        yield f"the schedule {schedule} is not one of {chains} chains"
    if [node for stage in stages for node in stage.nodes] != nodes:
        yield "the nodes of a chain do not stand side by side"


def _overlaps(model: ir.Model) -> Iterator[str]:
    if dialect.get_schedule(model) is not None:
        return
    found = {exchange for overlap in find_overlaps(model).values() for exchange in overlap.exchanges}
    for node in model.graph:
        if dialect.is_overlapped(node) and node not in found:
            yield f"{node.name} is marked to overlap with its first reader, which cannot compute an interior"


def _joined(model: ir.Model) -> Iterator[str]:
    before: list[ir.Node] = []
    for node in model.graph:
        if not dialect.is_exchange(node):
            before = []
            continue
        leader = dialect.joined_exchange(node)
        if leader is None:
            before = [node]
            continue
        if not before or before[0].name != leader or dialect.is_overlapped(node):
            yield f"{node.name} is to travel with {leader}, which does not stand before it"
        before.append(node)


STATIC = Check("static shapes", _static)
KNOWN = Check("known operators", _known)
LAID_OUT = Check("every value laid out", _laid_out)
COVER = Check("shards cover", _cover)
AGREE = Check("inputs agree", _agree)
SPLIT = Check("reductions split", _split)
MET = Check("needs met", _met)
EXCHANGES = Check("exchanges start from disjoint shards", _exchanges)
NO_CHAIN = Check("no exchange feeds an exchange", _no_chain)
SCHEDULED = Check("schedule fits", _scheduled)
OVERLAPS = Check("overlaps fit", _overlaps)
JOINED = Check("joined exchanges stand together", _joined)

ALL = (STATIC, KNOWN, LAID_OUT, COVER, AGREE, SPLIT, MET, EXCHANGES, NO_CHAIN, SCHEDULED, OVERLAPS, JOINED)
