"""read-parts: convolutions read the parts of a concatenation where they lie; nothing is concatenated for them.

    before                                   after
    c = Concat(skip, up)   channels          y = ConcatConv(skip, w[:, :16], bias, up, w[:, 16:])
    y = Conv(c, w, bias)

The sum over channels is taken part by part: the same up to rounding.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from partitioner import dialect
from partitioner.ops.nodes import operator_of
from partitioner.ops.standard.conv import Conv
from partitioner.ops.standard.shape import Concat
from passes.base import Check, Pass
from passes.checks import KNOWN, STATIC
from passes.rewrite import Namer


@dataclass(frozen=True)
class ReadParts(Pass):
    """Let convolutions read both parts of a concatenation that nobody else reads.

    Args:
        kept: names of nodes that stay as they are.
        fewest: channels of a part: convolutions of fewer are slow.
    """

    name: ClassVar[str] = "read-parts"
    requires: ClassVar[tuple[Check, ...]] = (STATIC, KNOWN)
    ensures: ClassVar[tuple[Check, ...]] = (STATIC, KNOWN)

    kept: Collection[str] = ()
    fewest: int = 4

    def apply(self, model: ir.Model) -> None:
        namer, graph = Namer(model.graph), model.graph
        for node in list(graph):
            if node.name in self.kept or not _joins_two(node, self.fewest):
                continue
            readers = [use.node for use in node.outputs[0].uses()]
            if any(reader.name in self.kept or not _can_read(reader, node) for reader in readers):
                continue
            for reader in readers:
                _replace(graph, reader, node, namer)
            graph.remove(node, safe=True)
        dialect.declare(model)


def _joins_two(node: ir.Node, fewest: int) -> bool:
    """Whether a node is a concatenation of two different values along the channels, for readers alone."""
    if dialect.is_communication(node) or node.outputs[0].is_graph_output() or not node.outputs[0].uses():
        return False
    operator = operator_of(node)
    if not isinstance(operator, Concat) or operator.axis != 1 or [len(node.inputs), len(set(node.inputs))] != [2, 2]:
        return False
    result = operator.outputs[0]
    return result.dtype in (ir.DataType.FLOAT, ir.DataType.DOUBLE) and result.rank > 2 and all(
        v is not None and v.const_value is None and dialect.shape_of(v)[1] >= fewest for v in node.inputs)


def _can_read(reader: ir.Node, node: ir.Node) -> bool:
    """Whether a node is a convolution of the concatenation, its weights constant and not in groups."""
    if dialect.is_communication(reader) or reader.domain != "" or reader.op_type != "Conv":
        return False
    operator = operator_of(reader)
    constants = reader.inputs[1:]
    return (isinstance(operator, Conv) and operator.group == 1 and node.outputs[0] not in constants
            and all(v is None or v.const_value is not None for v in constants))


def _replace(graph: ir.Graph, reader: ir.Node, node: ir.Node, namer: Namer) -> None:
    operator, (first, second) = operator_of(reader), node.inputs
    assert isinstance(operator, Conv) and first is not None and second is not None
    weight, channels = reader.inputs[1], dialect.shape_of(first)[1]
    bias = reader.inputs[2] if len(reader.inputs) > 2 else None
    assert weight is not None
    parts = [_slice(graph, weight, channels_of, namer)
             for channels_of in (slice(0, channels), slice(channels, operator.channels_read))]
    bias = bias or _zeros(graph, dialect.shape_of(weight)[0], operator.outputs[0].dtype, namer(f"{reader.name}/bias"))
    attributes = {"strides": [w.stride for w in operator.windows], "dilations": [w.dilation for w in operator.windows],
                  **{name: list(values) for name, values in operator.explicit.items()}}
    name = str(reader.name)
    made = dialect.new_node(dialect.DOMAIN, dialect.CONCAT_CONV, [first, parts[0], bias, second, parts[1]], attributes,
                            1, name)
    old, new = reader.outputs[0], made.outputs[0]
    new.name, new.shape, new.type = old.name, old.shape, old.type
    made.metadata_props.update(reader.metadata_props)
    new.metadata_props.update(old.metadata_props)
    graph.insert_before(reader, made)
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(reader, safe=True)
    if not weight.uses():
        del graph.initializers[str(weight.name)]


def _slice(graph: ir.Graph, weight: ir.Value, channels: slice, namer: Namer) -> ir.Value:
    """A weight's part for some channels of the data, cut out when it is asked for."""
    whole = weight.const_value
    assert whole is not None
    shape = [*dialect.shape_of(weight)]
    shape[1] = channels.stop - channels.start
    name = namer(f"{weight.name}/{channels.start}:{channels.stop}")
    part = ir.LazyTensor(lambda: ir.tensor(np.ascontiguousarray(whole.numpy()[:, channels]), name=name),
                         dtype=whole.dtype, shape=ir.Shape(shape), name=name)
    return _constant(graph, part, shape)


def _zeros(graph: ir.Graph, count: int, dtype: ir.DataType, name: str) -> ir.Value:
    return _constant(graph, ir.tensor(np.zeros(count, dtype.numpy()), name=name), [count])


def _constant(graph: ir.Graph, tensor: ir.TensorProtocol, shape: Sequence[int]) -> ir.Value:
    value = ir.Value(name=tensor.name, shape=ir.Shape(shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.initializers[str(tensor.name)] = value
    return value
