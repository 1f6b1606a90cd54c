"""Writes one shard's local computation as plain ONNX nodes, in the opset of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

Array = np.ndarray[Any, np.dtype[Any]]

Spans = Mapping[int, tuple[int, int]]
"""Per axis the first cell and the one after the last."""


class Scope:
    """One graph in the making: its nodes in order, its values by name, constants shared by content.

    Args:
        opset: opset version of the default domain.
    """

    def __init__(self, opset: int) -> None:
        self.opset = opset
        self.nodes: list[ir.Node] = []
        self.values: dict[str, ir.Value] = {}
        self.initializers: list[ir.Value] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._taken: set[str] = set()

    def add(self, value: ir.Value) -> str:
        """Take in a value of the graph's own (an input, a weight) under its name; returns the name."""
        name = str(value.name)
        self.values[name] = value
        self._taken.add(name)
        return name

    def weight(self, value: ir.Value) -> str:
        """A constant of the model, shared with it; returns its name."""
        name = str(value.name)
        if name not in self.values:
            self.initializers.append(
                ir.Value(name=name, shape=value.shape, type=value.type, const_value=value.const_value))
            self.add(self.initializers[-1])
        return name

    def constant(self, array: Array) -> str:
        """A constant; equal ones are one; returns its name."""
        array = np.ascontiguousarray(array).reshape(np.shape(array))
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = self.fresh(f"constant/{len(self._constants)}")
            tensor = ir.tensor(array, name=name)
            self.initializers.append(ir.Value(name=name, shape=ir.Shape(array.shape),
                                              type=ir.TensorType(tensor.dtype), const_value=tensor))
            self._constants[key] = self.add(self.initializers[-1])
        return self._constants[key]

    def fresh(self, wish: str) -> str:
        """A name that no value ever had: the wish itself, or with a number after it."""
        name, count = wish, 1
        while name in self._taken:
            name, count = f"{wish}_{count}", count + 1
        return name

    def rename(self, old: str, new: str) -> None:
        """Give a value another name."""
        value = self.values.pop(old)
        value.name = new
        self.add(value)


class Emitter:
    """Adds nodes to a scope; values are addressed by name.

    Args:
        scope: the graph that the nodes go to.
        prefix: begins the names of new nodes and values; different for every emitter of a scope.
        node: the node of the plan whose local form is written, if it is one.
    """

    def __init__(self, scope: Scope, prefix: str, node: ir.Node | None = None) -> None:
        self.scope = scope
        self.prefix = prefix
        self.node = node
        self.nodes: list[ir.Node] = []

    @property
    def opset(self) -> int:
        """Opset version of the default domain."""
        return self.scope.opset

    def same(self, names: Sequence[str | None], outputs: int,
             attributes: Mapping[str, Any] | None = None, drop: Sequence[str] = ()) -> tuple[str, ...]:
        """The node itself on local tensors, some attributes replaced or dropped.

        Inputs that `read` consumed (None in `names`) keep the value they have in the model.
        """
        assert self.node is not None
        kept = {a.name: a for a in self.node.attributes.values() if a.name not in drop}
        inputs = [self._input(name, i) for i, name in enumerate(names)]
        told = {**kept, **_attributes(attributes)}
        return self._add(self.node.domain, self.node.op_type, inputs, told, outputs)

    def op(self, op_type: str, names: Sequence[str | None], attributes: Mapping[str, Any] | None = None,
           outputs: int = 1, domain: str = "") -> str:
        """A new node; returns its first output's name."""
        return self.call(op_type, names, attributes, outputs, domain)[0]

    def call(self, op_type: str, names: Sequence[str | None], attributes: Mapping[str, Any] | None = None,
             outputs: int = 1, domain: str = "") -> tuple[str, ...]:
        """A new node; returns the names of its outputs."""
        inputs = [None if name is None else self.scope.values[name] for name in names]
        return self._add(domain, op_type, inputs, _attributes(attributes), outputs)

    def constant(self, array: Array) -> str:
        """A constant; returns its name."""
        return self.scope.constant(np.asarray(array))

    def integers(self, values: Sequence[int]) -> str:
        """A 1D int64 constant; returns its name."""
        return self.constant(np.asarray(list(values), np.int64))

    def crop(self, name: str, spans: Spans) -> str:
        """Cells [start, stop) of a local tensor along some axes; the tensor itself when none is given."""
        if not spans:
            return name
        axes, starts, stops = list(spans), [a for a, _ in spans.values()], [b for _, b in spans.values()]
        if self.opset < 10:
            return self.op("Slice", [name], {"axes": axes, "starts": starts, "ends": stops})
        return self.op("Slice", [name, *(self.integers(v) for v in (starts, stops, axes))])

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
        return self.full(shape, 0.0, dtype)

    def full(self, shape: Sequence[int], value: float, dtype: ir.DataType) -> str:
        """A tensor of one value."""
        if self.opset < 8:
            return self.op("Identity", [self.constant(np.full(tuple(shape), value, dtype.numpy()))])
        return self.op("Expand", [self.constant(np.asarray(value, dtype.numpy())), self.integers(shape)])

    def concat(self, names: Sequence[str], axis: int) -> str:
        """Tensors side by side."""
        return names[0] if len(names) == 1 else self.op("Concat", list(names), {"axis": axis})

    def reduce(self, op_type: str, name: str, axes: Sequence[int], keepdims: bool = True) -> str:
        """A reduction, its axes an attribute or an input as the opset has it."""
        since = 13 if op_type == "ReduceSum" else 18
        if self.opset < since:
            return self.op(op_type, [name], {"axes": list(axes), "keepdims": int(keepdims)})
        return self.op(op_type, [name, self.integers(axes)], {"keepdims": int(keepdims)})

    def name_main(self, name: str) -> None:
        """Give the node that does the work (of the plan's own type, else the last one) a name of its own."""
        wanted = self.node.op_type if self.node is not None else ""
        main = next((n for n in reversed(self.nodes) if n.op_type.startswith(wanted)), self.nodes[-1])
        main.name = name

    def _input(self, name: str | None, index: int) -> ir.Value | None:
        if name is not None:
            return self.scope.values[name]
        assert self.node is not None
        original = self.node.inputs[index]
        if original is None:
            return None
        assert original.const_value is not None, f"{self.node.name}: input {index} holds no cell here"
        return self.scope.values[self.scope.weight(original)]

    def _add(self, domain: str, op_type: str, inputs: Sequence[ir.Value | None],
             attributes: Mapping[str, ir.Attr], outputs: int) -> tuple[str, ...]:
        name = self.scope.fresh(f"{self.prefix}{op_type}{len(self.nodes)}")
        values = [ir.Value(name=self.scope.fresh(name if i == 0 else f"{name}.{i}")) for i in range(outputs)]
        node = ir.Node(domain, op_type, inputs, list(attributes.values()), outputs=values, name=name)
        self.nodes.append(node)
        self.scope.nodes.append(node)
        return tuple(self.scope.add(value) for value in values)


def _attributes(given: Mapping[str, Any] | None) -> dict[str, ir.Attr]:
    return {a.name: a for a in ir.convenience.convert_attributes(given or {})}
