"""Writes one shard's local computation as plain ONNX nodes, in the opset of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from partitioner.ops.base import Array


class Emitter:
    """Collects nodes of the expanded graph; values are addressed by name.

    Args:
        node: the node whose local form is written.
        opset: opset version of the default domain.
        prefix: makes the names of new values unique.
    """

    def __init__(self, node: ir.Node, opset: int, prefix: str) -> None:
        self.node = node
        self.opset = opset
        self.prefix = prefix
        self.nodes: list[ir.Node] = []
        self.values: dict[str, ir.Value] = {}
        self.constants: dict[str, Array] = {}

    def same(self, names: Sequence[str | None], outputs: int,
             attributes: Mapping[str, Any] | None = None, drop: Sequence[str] = ()) -> tuple[str, ...]:
        """The node itself on local tensors, some attributes replaced or dropped.

        Inputs that `read` consumed (None in `names`) keep the value they have in the model.
        """
        kept = {a.name: a for a in self.node.attributes.values() if a.name not in drop}
        replaced = {a.name: a for a in ir.convenience.convert_attributes(attributes or {})}
        inputs = [self._input(name, i) for i, name in enumerate(names)]
        return self._add(self.node.domain, self.node.op_type, inputs, {**kept, **replaced}, outputs)

    def op(self, op_type: str, names: Sequence[str | None], attributes: Mapping[str, Any] | None = None,
           outputs: int = 1, domain: str = "") -> str:
        """A new node; returns its first output's name."""
        inputs = [None if name is None else self.value(name) for name in names]
        attrs = {a.name: a for a in ir.convenience.convert_attributes(attributes or {})}
        return self._add(domain, op_type, inputs, attrs, outputs)[0]

    def constant(self, array: Array, hint: str = "const") -> str:
        """A constant; returns its name."""
        name = f"{self.prefix}/{hint}{len(self.constants)}"
        self.constants[name] = np.asarray(array)
        return name

    def integers(self, values: Sequence[int]) -> str:
        """A 1D int64 constant; returns its name."""
        return self.constant(np.asarray(list(values), np.int64))

    def slice(self, name: str, axis: int, start: int, stop: int) -> str:
        """Cells [start, stop) of a local tensor along an axis."""
        if self.opset < 10:
            return self.op("Slice", [name], {"axes": [axis], "starts": [start], "ends": [stop]})
        return self.op("Slice", [name, *(self.integers([v]) for v in (start, stop, axis))])

    def pad(self, name: str, lo: Sequence[int], hi: Sequence[int], fill: Array | None = None) -> str:
        """Constant cells before and after every axis; zeros unless `fill` is given."""
        if self.opset < 11:
            value = 0.0 if fill is None else float(fill)
            return self.op("Pad", [name], {"pads": [*lo, *hi], "mode": "constant", "value": value})
        extra = [] if fill is None else [self.constant(np.asarray(fill))]
        return self.op("Pad", [name, self.integers([*lo, *hi]), *extra], {"mode": "constant"})

    def reshape(self, name: str, shape: Sequence[int]) -> str:
        """The same elements in another shape."""
        return self.op("Reshape", [name, self.integers(shape)])

    def zeros(self, shape: Sequence[int], dtype: ir.DataType) -> str:
        """A tensor of zeros."""
        return self.op("Expand", [self.constant(np.zeros((), dtype.numpy())), self.integers(shape)])

    def concat(self, names: Sequence[str], axis: int) -> str:
        """Tensors side by side."""
        return names[0] if len(names) == 1 else self.op("Concat", list(names), {"axis": axis})

    def reduce(self, op_type: str, name: str, axes: Sequence[int], keepdims: bool = True) -> str:
        """A reduction, its axes an attribute or an input as the opset has it."""
        since = 13 if op_type == "ReduceSum" else 18
        if self.opset < since:
            return self.op(op_type, [name], {"axes": list(axes), "keepdims": int(keepdims)})
        return self.op(op_type, [name, self.integers(axes)], {"keepdims": int(keepdims)})

    def value(self, name: str) -> ir.Value:
        """The value of this name, made when it is new."""
        return self.values.setdefault(name, ir.Value(name=name))

    def _input(self, name: str | None, index: int) -> ir.Value | None:
        if name is not None:
            return self.value(name)
        original = self.node.inputs[index]
        if original is None:
            return None
        const = original.const_value
        assert const is not None and original.name is not None
        self.constants[original.name] = const.numpy()
        return self.value(original.name)

    def _add(self, domain: str, op_type: str, inputs: Sequence[ir.Value | None],
             attributes: Mapping[str, ir.Attr], outputs: int) -> tuple[str, ...]:
        names = [f"{self.prefix}/{op_type}{len(self.nodes)}_{i}" for i in range(outputs)]
        node = ir.Node(domain, op_type, inputs, list(attributes.values()),
                       outputs=[self.value(name) for name in names], name=f"{self.prefix}/{op_type}{len(self.nodes)}")
        self.nodes.append(node)
        return tuple(names)
