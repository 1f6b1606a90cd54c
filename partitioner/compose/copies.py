"""The network several times in one graph: over flipped inputs, and networks of several files; outputs are averaged.

    before                         after  --tta flips=depth
    y = Net(x)                     y0 = Net(x)
                                   y1 = Reverse(Net(Reverse(x)))
                                   y = Mul(Add(y0, y1), 1/2)

One copy is added to the sum before the next one begins, so that few results are alive at a time.  Copies of one
network read the same weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as library

from partitioner.compose.graph import (
    Writer,
    check_opset,
    copied,
    input_names,
    set_output,
    spatial_axes,
    volume_name,
)
from partitioner.errors import PartitionError, refuse_all
from partitioner.mesh import SPATIAL_NAMES

_HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


# --- test-time augmentation --------------------------------------------------------------------------


def with_flips(model: ir.Model, tta: str) -> ir.Model:
    """A model that is the mean of a network over all flips of its volume.

    Args:
        tta: `flips` for all spatial axes, or `flips=depth,height` for some.

    Raises:
        PartitionError: for an unknown word or axis, or outputs that cannot be averaged or flipped back.
    """
    origin = copied(model)
    found = origin.clone()
    names = _flipped_names(found, tta)
    check_opset(found, 10, "--tta flips")
    refuse_all(_not_averaged(found, "--tta"))
    inputs = {n: {a: p for a, p in spatial_axes(found, n).items() if a in names} for n in input_names(found)}
    volume = volume_name(found)
    assert volume is not None
    outputs = _output_axes(found, inputs, volume)
    sums = _Sums(found)
    for flips in (c for count in range(len(names) + 1) for c in combinations(names, count)):
        writer = Writer(found, "/".join(("flip", *flips)))
        feeds = {value: _reversed(writer, value, inputs.get(str(value.name), {}), flips)
                 for value in found.graph.inputs} if flips else {}
        results = sums.copy(origin.clone(), "/".join(("flip", *flips)), feeds) if flips else sums.first
        sums.add([_reversed(writer, value, outputs[index], flips) for index, value in enumerate(results)])
    sums.finish()
    return found


def _flipped_names(model: ir.Model, tta: str) -> tuple[str, ...]:
    word, equals, given = str(tta).partition("=")
    volume = volume_name(model)
    known = [] if volume is None else list(spatial_axes(model, volume))
    if word != "flips":
        raise PartitionError(f"--tta {tta}: '{word}' is unknown; use flips, or flips=depth,height")
    if not known:
        raise PartitionError(f"--tta {tta}: the model has no input with spatial axes; leave it out")
    names = given.split(",") if equals else known
    wrong = next((n for n in names if n not in known), None)
    if wrong is not None or len(set(names)) < len(names):
        said = f"the volume has no axis '{wrong}'" if wrong is not None else "an axis is named twice"
        raise PartitionError(f"--tta {tta}: {said}; use {', '.join(known)}")
    return tuple(n for n in SPATIAL_NAMES if n in names)


def _output_axes(model: ir.Model, inputs: Mapping[str, Mapping[str, int]], volume: str) -> list[Mapping[str, int]]:
    """Per output which of its axes are flipped back.

    Raises:
        PartitionError: when an output is neither a volume nor a vector.
    """
    rank = next(len(v.shape) for v in model.graph.inputs if v.name == volume and v.shape is not None)
    found: list[Mapping[str, int]] = []
    problems: list[str] = []
    for value in model.graph.outputs:
        extents = None if value.shape is None else len(value.shape)
        found.append(inputs[volume] if extents == rank else {})
        if extents is None or 2 < extents != rank:
            known = "no declared rank" if extents is None else f"{extents} axes"
            problems.append(f"--tta: output '{value.name}' has {known}, the volume '{volume}' has {rank}: nobody can "
                            "tell how it is flipped back; leave --tta out")
    refuse_all(problems)
    return found


def _reversed(writer: Writer, value: ir.Value, axes: Mapping[str, int], flips: Sequence[str]) -> ir.Value:
    places = [axes[name] for name in flips if name in axes]
    return writer.reverse(value, places) if places else value


# --- several models ----------------------------------------------------------------------------------


def averaged(models: Sequence[ir.Model]) -> ir.Model:
    """A model that is the mean of several with the same inputs and outputs.

    Raises:
        PartitionError: when their inputs, outputs or opsets differ, or their outputs are no floats.
    """
    found, *others = [_inlined(m) for m in models]
    refuse_all(_not_averaged(found, "--ensemble"))
    refuse_all([p for index, other in enumerate(others, 1) for p in _differences(found, other, index)])
    sums = _Sums(found)
    sums.add(sums.first)
    for index, other in enumerate(others, 1):
        sums.add(sums.copy(other, f"model{index}", {}, shared=False))
    sums.finish()
    return found


def _inlined(model: ir.Model) -> ir.Model:
    """A copy without functions, whose names could clash."""
    found = copied(model)
    if found.functions:
        library.InlinePass()(found)
        found.functions.clear()
    return found


def _differences(one: ir.Model, other: ir.Model, index: int) -> list[str]:
    where = f"--ensemble: model {index + 1}"
    if one.graph.opset_imports != other.graph.opset_imports:
        shown = [", ".join(f"{d or 'ai.onnx'} {n}" for d, n in sorted(m.graph.opset_imports.items()))
                 for m in (one, other)]
        return [f"{where} is in opset {shown[1]}, the first in {shown[0]}; export both with the same"]
    found: list[str] = []
    for what, mine, theirs in (("inputs", one.graph.inputs, other.graph.inputs),
                               ("outputs", one.graph.outputs, other.graph.outputs)):
        names = [[str(v.name) for v in values] for values in (mine, theirs)]
        if sorted(names[0]) != sorted(names[1]):
            found.append(f"{where} has the {what} {', '.join(names[1])}, the first {', '.join(names[0])}; export both "
                         "with the same names")
            continue
        by_name = {v.name: v for v in theirs}
        found += [f"{where}: {what[:-1]} '{v.name}' is {_described(by_name[v.name])}, in the first {_described(v)}; "
                  "average networks of the same kind" for v in mine if not _same_kind(v, by_name[v.name])]
    return found


def _described(value: ir.Value) -> str:
    dtype = "of no type" if value.dtype is None else value.dtype.name.lower()
    return f"{dtype} {'of no rank' if value.shape is None else list(value.shape)}"


def _same_kind(one: ir.Value, other: ir.Value) -> bool:
    if one.dtype != other.dtype:
        return False
    if one.shape is None or other.shape is None:
        return True
    return len(one.shape) == len(other.shape) and all(
        a == b for a, b in zip(one.shape, other.shape, strict=True) if isinstance(a, int) and isinstance(b, int))


# --- both --------------------------------------------------------------------------------------------


def _not_averaged(model: ir.Model, option: str) -> list[str]:
    return [f"{option}: output '{v.name}' is {v.dtype.name.lower()}, of which there is no mean; leave the last "
            "operator out of the export and give --output-op" for v in model.graph.outputs
            if v.dtype is not None and not v.dtype.is_floating_point()]


class _Sums:
    """The outputs of a graph on their way to means over several copies of the network.

    Args:
        model: whose graph takes the copies; its own outputs are the first.
    """

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._network = list(model.graph)
        self._count = 0
        self._sums: list[ir.Value] = []
        self.first = list(model.graph.outputs)

    def copy(self, other: ir.Model, prefix: str, feeds: Mapping[ir.Value, ir.Value],
             shared: bool = True) -> list[ir.Value]:
        """Put another network's nodes at the end, and give its outputs in the order of ours; it is used up.

        Args:
            feeds: what it reads in place of an input of ours.
            shared: it is the same network: weights, and what is made of them alone, are ours.
        """
        graph, theirs = self._model.graph, other.graph
        if shared:
            self._share(theirs)
        ours = {str(v.name): v for v in graph.inputs}
        for value in theirs.inputs:
            mine = ours[str(value.name)]
            value.replace_all_uses_with(feeds.get(mine, mine))
        results = {str(v.name): v for v in theirs.outputs}
        theirs.outputs.clear()
        _move(theirs, graph, prefix)
        return [results[str(v.name)] for v in graph.outputs]

    def add(self, results: Sequence[ir.Value]) -> None:
        """Add the outputs of one copy; 16-bit floats are summed up in 32 bits."""
        writer = Writer(self._model, f"sum{self._count}")
        wide = [writer.cast(value, ir.DataType.FLOAT) if out.dtype in _HALVES else value
                for value, out in zip(results, self._model.graph.outputs, strict=True)]
        self._sums = wide if not self._count else [
            writer.op("Add", before, value) for before, value in zip(self._sums, wide, strict=True)]
        self._count += 1

    def finish(self) -> None:
        """Let the means be the outputs."""
        for index, value in enumerate(list(self._model.graph.outputs)):
            writer = Writer(self._model, "mean")
            kind = ir.DataType.FLOAT if value.dtype in _HALVES or value.dtype is None else value.dtype
            count = writer.constant(np.array(self._count).astype(kind.numpy()))
            made = writer.op("Div", self._sums[index], count)
            made = writer.cast(made, value.dtype) if value.dtype is not None and value.dtype in _HALVES else made
            set_output(self._model, index, made, value.dtype, None if value.shape is None else value.shape.copy())

    def _share(self, theirs: ir.Graph) -> None:
        """Let a copy of our network read our weights, and ours of the values that no input decides."""
        for name, value in theirs.initializers.items():
            value.replace_all_uses_with(self._model.graph.initializers[name])
        theirs.initializers.clear()
        moving: set[ir.Value] = set(theirs.inputs)
        fixed: list[ir.Node] = []
        for mine, node in zip(self._network, list(theirs), strict=True):
            if _has_graphs(node) or moving.intersection(node.inputs) or any(v.is_graph_output() for v in node.outputs):
                moving.update(node.outputs)
                continue
            for ours, value in zip(mine.outputs, node.outputs, strict=True):
                value.replace_all_uses_with(ours)
            fixed.append(node)
        theirs.remove(fixed, safe=True)


def _has_graphs(node: ir.Node) -> bool:
    return any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values())


def _move(source: ir.Graph, target: ir.Graph, prefix: str) -> None:
    """Let the nodes and weights of a graph go over to the end of another one, under names of their own."""
    for value in list(source.initializers.values()):
        made = _renamed(value, f"{prefix}/{value.name}")
        target.register_initializer(made)
        value.replace_all_uses_with(made)
    source.initializers.clear()
    nodes = list(source)
    source.remove(nodes)
    for node in nodes:
        node.name = f"{prefix}/{node.name}" if node.name else None
        for value in node.outputs:
            value.name = f"{prefix}/{value.name}" if value.name else value.name
    target.extend(nodes)


def _renamed(value: ir.Value, name: str) -> ir.Value:
    """A weight under another name, its numbers where they were; a tensor's own name belongs to whoever made it."""
    tensor = value.const_value
    assert tensor is not None
    if isinstance(tensor, ir.ExternalTensor):
        again = ir.ExternalTensor(tensor.location, tensor.offset, tensor.length, tensor.dtype, shape=tensor.shape,
                                  name=name, base_dir=tensor.base_dir)
    else:
        again = ir.LazyTensor(lambda: tensor, tensor.dtype, ir.Shape(tensor.shape.numpy()), name=name)
    return ir.Value(name=name, shape=again.shape, type=ir.TensorType(tensor.dtype), const_value=again)
