"""What all of `compose` does to a graph: new nodes in the model's opset, inputs and outputs under their names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as library
from numpy.typing import NDArray

from partitioner.axes import named_axes
from partitioner.errors import PartitionError
from passes.rewrite import Namer

AXES_AS_INPUT = {"ReduceSum": 13, "ReduceMax": 18, "ReduceMean": 18}
"""The opset from which a reduction takes its axes as an input."""


class Writer:
    """Makes nodes in the opset of a model, at the end of its graph or before its first node.

    Args:
        prefix: begins the names of what is made.
        in_front: before the first node instead of at the end.
    """

    def __init__(self, model: ir.Model, prefix: str, in_front: bool = False) -> None:
        self.opset = model.graph.opset_imports[""]
        self._graph = model.graph
        self._before = model.graph[0] if in_front and len(model.graph) else None
        self._prefix = prefix
        self._namer = Namer(model.graph)

    def op(self, op_type: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        """The result of a new node."""
        name = self.name(f"{self._prefix}/{op_type}")
        node = ir.Node("", op_type, inputs, ir.convenience.convert_attributes(attributes),
                       outputs=[ir.Value(name=name)], name=name)
        if self._before is None:
            self._graph.append(node)
        else:
            self._graph.insert_before(self._before, node)
        return node.outputs[0]

    def name(self, wish: str) -> str:
        """A name that nothing has yet."""
        return self._namer(wish)

    def constant(self, array: NDArray[Any]) -> ir.Value:
        """A constant as a node."""
        return self.op("Constant", value=ir.tensor(array))

    def numbers(self, *values: int) -> ir.Value:
        """A constant vector of whole numbers."""
        return self.constant(np.array(values, np.int64))

    def cast(self, x: ir.Value, dtype: ir.DataType) -> ir.Value:
        """The values in another element type."""
        return self.op("Cast", x, to=int(dtype))

    def reduce(self, op_type: str, x: ir.Value, axes: Sequence[int]) -> ir.Value:
        """A reduction that keeps its axes."""
        if self.opset < AXES_AS_INPUT[op_type]:
            return self.op(op_type, x, axes=list(axes), keepdims=1)
        return self.op(op_type, x, self.numbers(*axes), keepdims=1)

    def clip(self, x: ir.Value, low: NDArray[Any], high: NDArray[Any]) -> ir.Value:
        """Values brought into [low, high]."""
        if self.opset < 11:
            return self.op("Clip", x, min=float(low), max=float(high))
        return self.op("Clip", x, self.constant(low), self.constant(high))

    def reverse(self, x: ir.Value, axes: Sequence[int]) -> ir.Value:
        """The cells along some axes in reverse order; needs opset 10."""
        count, first = len(axes), np.iinfo(np.int64).min
        return self.op("Slice", x, self.numbers(*[-1] * count), self.numbers(*[int(first)] * count),
                       self.numbers(*axes), self.numbers(*[-1] * count))


def copied(model: ir.Model) -> ir.Model:
    """A clone to work on: outputs with a type and a shape, and each a value of its own that a node makes."""
    found = model.clone()
    imports = found.graph.opset_imports
    if "ai.onnx" in imports:
        imports.setdefault("", imports.pop("ai.onnx"))
    if any(v.shape is None or v.dtype is None or not _has_channels(v) for v in found.graph.outputs):
        _annotate_outputs(found)
    library.RemoveInitializersFromInputsPass()(found)
    _detach_outputs(found)
    return found


def _has_channels(value: ir.Value) -> bool:
    return value.shape is not None and (len(value.shape) < 2 or isinstance(value.shape[1], int))


def _annotate_outputs(model: ir.Model) -> None:
    """What shape inference finds out about outputs of which the file does not say enough."""
    try:
        inferred = library.ShapeInferencePass()(model.clone()).model
    except Exception:  # it refuses much that runs
        return
    for value, found in zip(model.graph.outputs, inferred.graph.outputs, strict=True):
        if value.dtype is None:
            value.type = found.type
        if found.shape is not None and (value.shape is None or not _has_channels(value)):
            value.shape = found.shape.copy()


def _detach_outputs(model: ir.Model) -> None:
    """An Identity where an output is an input, a constant, or a second name of another output."""
    seen: set[ir.Value] = set()
    writer: Writer | None = None
    for index, value in enumerate(list(model.graph.outputs)):
        if value.producer() is None or value in seen:
            writer = writer or Writer(model, "output")
            made = writer.op("Identity", value)
            made.shape, made.type = value.shape, value.type
            model.graph.outputs[index] = made
        seen.add(model.graph.outputs[index])


def set_output(model: ir.Model, index: int, made: ir.Value, dtype: ir.DataType | None, shape: ir.Shape | None) -> None:
    """Let a value take the place and the name of an output."""
    old = model.graph.outputs[index]
    name = str(old.name)
    model.graph.outputs[index] = made
    old.name = Namer(model.graph)(f"{name}/before")
    made.name = name
    made.shape = shape
    if dtype is not None:
        made.type = ir.TensorType(dtype)


def new_input(name: str, dtype: ir.DataType | None, shape: ir.Shape | None) -> ir.Value:
    """An input that is not in a graph yet."""
    return ir.Value(name=name, shape=shape, type=None if dtype is None else ir.TensorType(dtype))


def take_input(model: ir.Model, value: ir.Value, instead: Sequence[ir.Value]) -> None:
    """Take an input out of the graph, others in its place; who reads it is for `feed` to settle."""
    index = list(model.graph.inputs).index(value)
    value.name = Namer(model.graph)(f"{value.name}/after")
    model.graph.inputs.pop(index)
    for offset, made in enumerate(instead):
        model.graph.inputs.insert(index + offset, made)


def find_input(model: ir.Model, name: str) -> ir.Value:
    """An input by its name."""
    return next(v for v in model.graph.inputs if v.name == name)


def input_names(model: ir.Model) -> list[str]:
    """The inputs that are no weights."""
    return [str(v.name) for v in model.graph.inputs if v.name not in model.graph.initializers]


def spatial_axes(model: ir.Model, name: str) -> dict[str, int]:
    """The named axes of an input without the batch: which of its axes is the depth, the height, the width."""
    return {axis: place for axis, place in named_axes(model).get(name, {}).items() if axis != "batch"}


def volume_name(model: ir.Model) -> str | None:
    """The input with most spatial axes; None where none has any."""
    names = input_names(model)
    found = max(names, key=lambda name: len(spatial_axes(model, name)), default=None)
    return None if found is None or not spatial_axes(model, found) else found


def channel_axis(model: ir.Model, rank: int) -> int:
    """Where the channels of a value of some rank stand: as in the model's volume if that has this rank."""
    name = volume_name(model)
    if name is None:
        return 1
    taken = named_axes(model)[name]
    if len(taken) != rank - 1:
        return 1
    return next(axis for axis in range(rank) if axis not in taken.values())


def check_opset(model: ir.Model, needed: int, what: str) -> None:
    """Make sure that a model's opset has what is needed.

    Raises:
        PartitionError: when it is older.
    """
    opset = model.graph.opset_imports[""]
    if opset < needed:
        raise PartitionError(f"{what}: the model is in opset {opset}, which is needed from {needed} on; "
                             "export it with a newer opset")
