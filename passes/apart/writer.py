"""New nodes and constants in front of the node that they replace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from partitioner import dialect
from partitioner.dialect import shape_of
from partitioner.ops.base import Array
from partitioner.ops.nodes import operator_of
from passes.rewrite import Namer


@dataclass(frozen=True)
class Writer:
    """Puts nodes before `node`, with their extents.

    Args:
        keep_weights: whether weights stay as they are but for their extents, because they train.
    """

    graph: ir.Graph
    node: ir.Node
    namer: Namer
    keep_weights: bool

    @property
    def opset(self) -> int:
        """Opset version of the default domain."""
        return self.graph.opset_imports[""]

    def op(self, op_type: str, inputs: Sequence[ir.Value | None],
           attributes: Mapping[str, Any] | None = None) -> ir.Value:
        """A new node of one output."""
        node = dialect.new_node("", op_type, inputs, attributes or {}, 1, self.namer(f"{self.node.name}/{op_type}"))
        return self._put(node)[0]

    def same(self, inputs: Sequence[ir.Value | None], attributes: Mapping[str, Any] | None = None) -> list[ir.Value]:
        """The node itself with other inputs, and some other attributes."""
        changed = ir.convenience.convert_attributes(attributes or {})
        names = {attribute.name for attribute in changed}
        kept = [a for a in self.node.attributes.values() if a.name not in names]
        name = self.namer(f"{self.node.name}/apart")
        outputs = [ir.Value(name=None if not v.name else self.namer(f"{v.name}/apart")) for v in self.node.outputs]
        return self._put(ir.Node(self.node.domain, self.node.op_type, inputs, [*kept, *changed], outputs=outputs,
                                 version=self.node.version, name=name))

    def reshape(self, value: ir.Value, shape: Sequence[int], anew: bool = False) -> ir.Value:
        """A value in other extents: the same one where it has them, unless `anew`; of a constant a constant."""
        if shape_of(value) == tuple(shape) and not anew:
            return value
        if value.const_value is None:
            return self.op("Reshape", [value, self.integers(shape)])
        made = self.constant(value.const_value.numpy().reshape(shape), f"{value.name}/apart")
        dialect.set_source(made, dialect.get_source(value))
        return made

    def transposed(self, weight: ir.Value) -> ir.Value:
        """A constant matrix the other way round."""
        assert weight.const_value is not None
        if self.keep_weights:
            return self.op("Transpose", [weight], {"perm": [1, 0]})
        return self.constant(np.ascontiguousarray(weight.const_value.numpy().T), f"{weight.name}/transposed")

    def integers(self, numbers: Sequence[int]) -> ir.Value:
        """A constant vector of extents or axes."""
        return self.constant(np.asarray(numbers, np.int64), f"{self.node.name}/integers")

    def constant(self, array: Array, wish: str) -> ir.Value:
        """A new constant."""
        tensor = ir.tensor(array, name=self.namer(wish))
        value = ir.Value(name=tensor.name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype),
                         const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def _put(self, node: ir.Node) -> list[ir.Value]:
        self.graph.insert_before(self.node, node)
        for value, found in zip(node.outputs, operator_of(node).outputs, strict=False):
            value.shape, value.type = ir.Shape(found.shape), ir.TensorType(found.dtype)
        return list(node.outputs)
