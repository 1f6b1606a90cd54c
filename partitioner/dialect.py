"""Our ONNX dialect: communication nodes, layouts and the mesh as they stand in a plan file.

Only this module knows attribute and metadata names.  The domain's opset version is the version of
the plan format.  Every node type of ours is also a model-local function (`partitioner.bodies`), so that
onnx.checker accepts a plan and onnxruntime runs it.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from partitioner.bodies import (
    ALL_REDUCE,
    ALL_REDUCE_MOMENTS,
    CONCAT_CONV,
    DOMAIN,
    FUNCTIONS,
    GROUP_NORMALIZATION,
    HALO_EXCHANGE,
    MOMENTS,
    NORMALIZE,
    RESHARD,
    TRAINING_BATCH_NORMALIZATION,
    TRAINING_DROPOUT,
    batch_normalization_attributes,
    group_normalization_attributes,
)
from partitioner.errors import PartitionError
from partitioner.layout import Layout, parse_layout
from partitioner.mesh import Mesh

VERSION = 1

__all__ = [
    "ALL_REDUCE",
    "ALL_REDUCE_MOMENTS",
    "CONCAT_CONV",
    "DOMAIN",
    "GROUP_NORMALIZATION",
    "HALO_EXCHANGE",
    "MOMENTS",
    "NORMALIZE",
    "RESHARD",
    "TRAINING_BATCH_NORMALIZATION",
    "TRAINING_DROPOUT",
    "batch_normalization_attributes",
    "group_normalization_attributes",
]
"""The names of node types and attributes that belong to their functions."""

VARIANCE = "variance/batch"
"""Ends the names of batch variances among the outputs of a training plan."""

SEED = "partitioner.seed"
"""Input of a training plan with dropout: the number from which the masks are drawn."""

REGION = "Region"
"""Begins the names of functions that hold a node with subgraphs; a number follows."""

EXCHANGES = frozenset({HALO_EXCHANGE, RESHARD})
REDUCTIONS = frozenset({ALL_REDUCE, ALL_REDUCE_MOMENTS})

_LAYOUT = "partitioner.layout"
_MESH = "partitioner.mesh"
_PARTIAL = "partitioner.partial"
_OVERLAPPED = "partitioner.overlapped"
_JOINED = "partitioner.joined"
_STORAGE = "partitioner.storage"
_SCHEDULE = "partitioner.schedule"
_REST = "partitioner.rest"
_PASSES = "partitioner.passes"
_DIGEST = "partitioner.digest"
_STATISTIC = "partitioner.statistic"
_SOURCE = "partitioner.source"
_WHOLE_CHANNELS = "partitioner.dropout"
EXTENTS_MEMO = "partitioner.extents"


def is_exchange(node: ir.Node) -> bool:
    """Whether the node is a HaloExchange or Reshard."""
    return node.domain == DOMAIN and node.op_type in EXCHANGES


def is_all_reduce(node: ir.Node) -> bool:
    """Whether the node merges partial results over ranks."""
    return node.domain == DOMAIN and node.op_type in REDUCTIONS


def is_communication(node: ir.Node) -> bool:
    """Whether the node sends messages."""
    return is_exchange(node) or is_all_reduce(node)


def get_mesh(model: ir.Model) -> Mesh:
    """The mesh of a plan.

    Raises:
        PartitionError: when the model is no plan.
    """
    text = model.metadata_props.get(_MESH)
    if text is None:
        raise PartitionError("this model is no plan: it names no mesh; make one with `partition compile`")
    return Mesh.parse(text)


def set_mesh(model: ir.Model, mesh: Mesh) -> None:
    """Write the mesh into the model."""
    model.metadata_props[_MESH] = str(mesh)


def is_plan(model: ir.Model) -> bool:
    """Whether the model has been laid out."""
    return _MESH in model.metadata_props


def get_passes(model: ir.Model) -> tuple[str, ...]:
    """Names of the passes that made this plan, in order."""
    return tuple(filter(None, model.metadata_props.get(_PASSES, "").split(" ")))


def add_pass(model: ir.Model, name: str) -> None:
    """Note that a pass has run."""
    model.metadata_props[_PASSES] = " ".join((*get_passes(model), name))


def get_whole_channels(model: ir.Model) -> frozenset[str]:
    """Names of the Dropout nodes that drop whole channels."""
    return frozenset(json.loads(model.metadata_props.get(_WHOLE_CHANNELS, "[]")))


def set_whole_channels(model: ir.Model, names: Sequence[str]) -> None:
    """Note the Dropout nodes that drop whole channels, which ONNX cannot say."""
    if names:
        model.metadata_props[_WHOLE_CHANNELS] = json.dumps(sorted(names))


def get_digest(model: ir.Model) -> str | None:
    """The digest that a saved plan carries; see `partitioner.seal`."""
    return model.metadata_props.get(_DIGEST)


def set_digest(model: ir.Model, digest: str) -> None:
    """Write the digest into the model."""
    model.metadata_props[_DIGEST] = digest


def get_storage(model: ir.Model) -> str:
    """The storage order of activations: `channels_last` or `channels_first`."""
    return model.metadata_props.get(_STORAGE, "channels_first")


def set_storage(model: ir.Model, order: str) -> None:
    """Write the storage order into the model."""
    model.metadata_props[_STORAGE] = order


def shape_of(value: ir.Value) -> tuple[int, ...]:
    """Static extents of a value that canonicalize has seen."""
    assert value.shape is not None, value.name
    dims = value.shape.dims
    known: tuple[int, ...] | None = value.meta.data.get(EXTENTS_MEMO)
    if known is None or known != dims:
        known = value.meta[EXTENTS_MEMO] = tuple(int(n) for n in value.shape.numpy())
    return known


def get_layout(value: ir.Value) -> Layout:
    """The layout of a value; what has none (a weight) is replicated."""
    cached = value.meta.data.get(_LAYOUT)
    if cached is not None:
        return cached
    text = value.metadata_props.get(_LAYOUT)
    layout = Layout.replicated(shape_of(value)) if text is None else parse_layout(text)
    if layout.shape != shape_of(value):  # trailing shards of an overlapping layout may leave the end out
        layout = Layout(shape_of(value), layout.axes)
    value.meta[_LAYOUT] = layout
    return layout


def set_layout(value: ir.Value, layout: Layout) -> None:
    """Write a value's layout into the model."""
    value.meta[_LAYOUT] = layout
    value.metadata_props[_LAYOUT] = str(layout)


def has_layout(value: ir.Value) -> bool:
    """Whether a layout was assigned to the value."""
    return _LAYOUT in value.metadata_props


def get_partial(node: ir.Node) -> tuple[str, ...]:
    """Mesh axes over which this node's result is only this shard's part of a reduction."""
    text = node.metadata_props.get(_PARTIAL)
    return tuple(filter(None, text.split(","))) if text else ()


def set_partial(node: ir.Node, mesh_axes: Sequence[str]) -> None:
    """Mark a node's result as partial over mesh axes."""
    node.metadata_props[_PARTIAL] = ",".join(mesh_axes)


def is_overlapped(node: ir.Node) -> bool:
    """Whether the messages of a halo exchange travel while its first reader computes; see `partitioner.interior`."""
    return node.metadata_props.get(_OVERLAPPED) == "1"


def joined_exchange(node: ir.Node) -> str | None:
    """The name of the exchange before, in whose messages the cells of this one travel; None for its own."""
    return node.metadata_props.get(_JOINED)


def set_joined(node: ir.Node, leader: str) -> None:
    """Let the cells of an exchange travel in the messages of another one that stands before it."""
    node.metadata_props[_JOINED] = leader


def set_overlapped(node: ir.Node, overlapped: bool) -> None:
    """Let the first reader of a halo exchange compute its interior while the messages travel, or wait for them."""
    if overlapped:
        node.metadata_props[_OVERLAPPED] = "1"
    else:
        node.metadata_props.pop(_OVERLAPPED, None)


@dataclass(frozen=True)
class Schedule:
    """How a plan is executed depth-first.

    Args:
        axis: the mesh axis along which slabs follow one another.
        thickness: per chain the cells of a slab, along the longest axis in the chain.
        strips: mesh axes whose shards are strips of one rank: one goes through a stage after the other.
    """

    axis: str
    thickness: tuple[int, ...]
    strips: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " ".join((f"{self.axis}/{','.join(map(str, self.thickness))}", *self.strips))


def get_schedule(model: ir.Model) -> Schedule | None:
    """How the plan is executed depth-first; None for whole-shard steps."""
    text = model.metadata_props.get(_SCHEDULE)
    if text is None:
        return None
    slabs, *strips = text.split(" ")
    axis, _, thickness = slabs.partition("/")
    return Schedule(axis, tuple(int(n) for n in thickness.split(",") if n), tuple(strips))


def set_schedule(model: ir.Model, schedule: Schedule) -> None:
    """Write the schedule into the model."""
    model.metadata_props[_SCHEDULE] = str(schedule)


def rests_in_file(value: ir.Value) -> bool:
    """Whether the buffer of this value rests in a mapped file from chain to chain."""
    return value.metadata_props.get(_REST) == "file"


def set_filed(value: ir.Value, filed: bool) -> None:
    """Let the buffer of a value rest in a mapped file, or in memory."""
    if filed:
        value.metadata_props[_REST] = "file"
    else:
        value.metadata_props.pop(_REST, None)


@dataclass(frozen=True)
class Statistic:
    """A batch statistic that leaves a training plan.

    Args:
        running: the weight that it updates.
        momentum: the share of the old value that stays, as ONNX has it.
        cells: how many cells went into it.
    """

    running: str
    momentum: float
    cells: int


def set_source(value: ir.Value, name: str) -> None:
    """Note the initialiser that a constant was made of: each of its numbers repeated, in other extents."""
    value.metadata_props[_SOURCE] = name


def get_source(value: ir.Value) -> str:
    """The initialiser that a constant was made of; its own name where it was not made of another."""
    return value.metadata_props.get(_SOURCE, str(value.name))


def set_statistic(value: ir.Value, running: str, momentum: float, cells: int) -> None:
    """Mark an output of the graph as a batch statistic."""
    value.metadata_props[_STATISTIC] = f"{momentum!r} {cells} {running}"


def get_statistic(value: ir.Value) -> Statistic | None:
    """What an output of the graph updates, if it is a batch statistic."""
    text = value.metadata_props.get(_STATISTIC)
    if text is None:
        return None
    momentum, cells, running = text.split(" ", 2)
    return Statistic(running, float(momentum), int(cells))


def new_exchange(op_type: str, value: ir.Value, target: Layout, name: str) -> ir.Node:
    """A HaloExchange or Reshard of a value; layouts stand in its attributes to be read in a viewer."""
    attributes = {"source": str(get_layout(value)), "target": str(target)}
    node = new_node(DOMAIN, op_type, [value], attributes, 1, name)
    node.outputs[0].shape = ir.Shape(shape_of(value))
    node.outputs[0].type = value.type
    set_layout(node.outputs[0], target)
    return node


def new_all_reduce(kind: str, values: Sequence[ir.Value], mesh_axes: Sequence[str], name: str) -> ir.Node:
    """A merge of partial results (`sum`, `prod`, `max`, `min`, `moments`) over mesh axes."""
    op_type = ALL_REDUCE_MOMENTS if kind == "moments" else ALL_REDUCE
    attributes = {"op": kind, "mesh_axes": ir.AttrStrings("mesh_axes", list(mesh_axes))}
    node = new_node(DOMAIN, op_type, list(values), attributes, len(values), name)
    for source, output in zip(values, node.outputs, strict=True):
        output.shape, output.type = ir.Shape(shape_of(source)), source.type
        set_layout(output, get_layout(source))
    return node


def all_reduce_kind(node: ir.Node) -> tuple[str, tuple[str, ...]]:
    """Kind and mesh axes of an AllReduce node."""
    values = attributes_of(node)
    return str(values["op"]), tuple(values["mesh_axes"])


def attributes_of(node: ir.Node) -> dict[str, Any]:
    """Attributes as plain Python values; tensors become numpy arrays."""
    return {a.name: _plain(a) for a in node.attributes.values() if isinstance(a, ir.Attr)}


def _plain(attribute: ir.Attr) -> Any:
    return attribute.value.numpy() if attribute.type == ir.AttributeType.TENSOR else attribute.value


def new_node(domain: str, op_type: str, inputs: Sequence[ir.Value | None], attributes: Mapping[str, Any],
             outputs: int, name: str) -> ir.Node:
    """A node whose outputs are named after it."""
    names = [name if i == 0 else f"{name}.{i}" for i in range(outputs)]
    return ir.Node(domain, op_type, inputs, [_attribute(key, value) for key, value in attributes.items()],
                   outputs=[ir.Value(name=n) for n in names], name=name)


def _attribute(name: str, value: Any) -> ir.Attr:
    """A plain value as an attribute; the library asks long what arrays and lists are."""
    if isinstance(value, np.ndarray | np.generic):
        return ir.AttrTensor(name, ir.tensor(value))
    if isinstance(value, list | tuple) and value and all(isinstance(n, int) for n in value):
        return ir.AttrInt64s(name, value)
    return ir.convenience.convert_attribute(name, value)


def is_region(node: ir.Node) -> bool:
    """Whether the node stands for one with subgraphs (If, Loop, Scan)."""
    return node.domain == DOMAIN and node.op_type.startswith(REGION)


def new_region(node: ir.Node, captured: Sequence[ir.Value], number: int, opsets: Mapping[str, int],
               extents: Sequence[tuple[int, ...] | None]) -> ir.Node:
    """A node that takes what the subgraphs of `node` read from outside as inputs of its own.

    Its function stands in its attribute `body` too, so that the node alone tells what it computes.

    Args:
        extents: of each output, where they are known though shape inference does not find them.
    """
    proto = ir.serde.serialize_node(node)
    given = [v for v in node.inputs if v is not None]
    inputs = list(dict.fromkeys([*given, *captured]))
    op_type = f"{REGION}{number}"
    imports = [onnx.helper.make_opsetid(domain, version) for domain, version in opsets.items() if domain != DOMAIN]
    function = onnx.helper.make_function(DOMAIN, op_type, [str(v.name) for v in inputs],
                                         [str(v.name) for v in node.outputs], [proto], imports, ["body", "extents"])
    body = base64.b64encode(function.SerializeToString()).decode()
    outputs = [ir.Value(name=v.name, shape=v.shape, type=v.type) for v in node.outputs]
    told = ["?" if found is None else "x".join(map(str, found)) for found in extents]
    attributes = [ir.AttrString("body", body), ir.AttrStrings("extents", told)]
    return ir.Node(DOMAIN, op_type, inputs, attributes, outputs=outputs, name=node.name)


def region_proto(node: ir.Node) -> onnx.FunctionProto:
    """The function for which a region node stands."""
    return onnx.FunctionProto.FromString(base64.b64decode(str(attributes_of(node)["body"])))


def operator_name(node: ir.Node) -> str:
    """An operator as the file has it: `Conv`, `com.acme.Own`, and for a region the node that it stands for."""
    if is_region(node):
        return region_proto(node).node[0].op_type
    return f"{node.domain}.{node.op_type}" if node.domain else node.op_type


def region_extents(node: ir.Node) -> list[tuple[int, ...] | None]:
    """Of each output of a region, its extents where its maker knew them."""
    told = attributes_of(node)["extents"]
    return [None if text == "?" else tuple(int(n) for n in text.split("x") if n) for text in told]


def declare(model: ir.Model) -> None:
    """Add the functions of the node types that a model uses, and the domain's version."""
    regions = {n.op_type: n for n in model.graph if is_region(n)}
    used = {n.op_type for n in model.graph if n.domain == DOMAIN} - set(regions)
    opset = model.graph.opset_imports[""]
    for key in [key for key in model.functions if key[0] == DOMAIN]:
        del model.functions[key]
    for op_type in sorted(used):
        function = FUNCTIONS[op_type](op_type, opset)
        model.functions[function.identifier()] = function
    for node in regions.values():
        function = ir.serde.deserialize_function(region_proto(node))
        model.functions[function.identifier()] = function
    if used or regions or is_plan(model):
        model.graph.opset_imports[DOMAIN] = VERSION
        model.ir_version = max(model.ir_version, 10)
