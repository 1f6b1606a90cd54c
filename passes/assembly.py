"""Shards put together from pieces of other shards with Slice and Concat: what an exchange really does.

    rank 1 needs [60, 121), owns [61, 121)      x@0  --Slice [60, 61)--+
                                                                       +--Concat-->  h@1
                                                x@1  ------------------+

Any number of axes, sources and pieces per axis: the target is cut into a grid along every bound of what
the sources give, every cell of the grid is one Slice, and rows of cells are joined axis by axis.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from partitioner.dialect import DOMAIN
from partitioner.geometry import Box, Interval, Pieces, extent, local_slices
from partitioner.ops.emitter import Emitter, Scope


@dataclass(frozen=True)
class Source:
    """A tensor that holds the cells `held` of a value and gives the cells `taken`."""

    name: str
    held: Box
    taken: Box


def assemble(emitter: Emitter, target: Box, sources: Sequence[Source]) -> str:
    """The cells of `target`, each from the first source that gives it; returns the name of the result.

    Raises:
        ValueError: when no source gives a cell.
    """
    grid = [_segments(axis, [s.taken.axes[a] for s in sources]) for a, axis in enumerate(target.axes)]

    def build(chosen: tuple[Interval, ...]) -> str:
        axis = len(chosen)
        if axis < len(grid):
            return emitter.concat([build((*chosen, segment)) for segment in grid[axis]], axis)
        cell = Box(tuple((segment,) for segment in chosen))
        source = next((s for s in sources if s.taken.contains(cell)), None)
        if source is None:
            raise ValueError(f"no shard gives the cells {cell}")
        return _cut(emitter, source, cell)

    return build(())


def _segments(axis: Pieces, bounds: Sequence[Pieces]) -> list[Interval]:
    """The pieces of an axis, cut wherever a source begins or ends."""
    cuts = {edge for parts in bounds for part in parts for edge in (part.start, part.stop)}
    found: list[Interval] = []
    for piece in axis:
        edges = [piece.start, *sorted(c for c in cuts if piece.start < c < piece.stop), piece.stop]
        found += [Interval(a, b) for a, b in itertools.pairwise(edges)]
    return found


def _cut(emitter: Emitter, source: Source, cell: Box) -> str:
    """A cell of the grid out of the tensor that holds it."""
    spans: dict[int, tuple[int, int]] = {}
    for axis, (held, wanted) in enumerate(zip(source.held.axes, cell.axes, strict=True)):
        (place,) = local_slices(held, wanted)
        if (place.start, place.stop) != (0, source.held.shape[axis]):
            spans[axis] = (place.start, place.stop)
    return emitter.crop(source.name, spans)


def recipe(target: Box, sources: Sequence[Source]) -> Hashable:
    """What `assemble` does, in local positions: equal recipes have equal bodies."""
    places = (tuple(_place(*axes) for axes in zip(s.held, target, s.taken, strict=True)) for s in sources)
    return len(target.axes), tuple(places)


def _place(held: Pieces, target: Pieces, taken: Pieces) -> Hashable:
    """Where a source's cells lie along one axis, before and after; None where all of it is taken for all."""
    before, after = (tuple((p.start, p.stop) for p in local_slices(h, taken)) for h in (held, target))
    uncut = before == ((0, extent(held)),) and after == ((0, extent(target)),)
    return None if uncut else (extent(held), before, after)


def exchange_body(target: Box, sources: Sequence[Source], opset: int) -> ir.Function:
    """A function of the sources' shards that yields the cells of `target`."""
    scope = Scope(opset)
    inputs = [ir.Value(name=f"x{i}") for i in range(len(sources))]
    own = [Source(scope.add(v), s.held, s.taken) for v, s in zip(inputs, sources, strict=True)]
    return _function(scope, inputs, [assemble(Emitter(scope, ""), target, own)])


def merge_body(kind: str, width: int, dtype: ir.DataType, count: int, opset: int) -> ir.Function:
    """A function of `count` partial results that merges them in the order given.

    Args:
        kind: sum, prod, max, min or moments.
        width: tensors per partial result (3 for moments).
        dtype: element type of the result.
    """
    scope = Scope(opset)
    emitter = Emitter(scope, "")
    inputs = [[ir.Value(name=f"x{i}.{k}") for k in range(width)] for i in range(count)]
    result, *others = [[scope.add(value) for value in partial] for partial in inputs]
    for other in others:
        if kind == "moments":
            result = _merge_moments(emitter, result, other, dtype)
        else:
            result = [_merge_two(emitter, kind, pair, dtype) for pair in zip(result, other, strict=True)]
    return _function(scope, [value for partial in inputs for value in partial], result)


def _merge_two(emitter: Emitter, kind: str, pair: Sequence[str], dtype: ir.DataType) -> str:
    """A sum, product, maximum or minimum of two, by way of a type that this opset's Max and Min know."""
    if kind in ("sum", "prod"):
        return emitter.op("Add" if kind == "sum" else "Mul", pair)
    if dtype == ir.DataType.BOOL:
        return emitter.op("Or" if kind == "max" else "And", pair)
    op_type = "Max" if kind == "max" else "Min"
    if dtype.is_floating_point() or (emitter.opset >= 12 and dtype.bitwidth >= 32):
        return emitter.op(op_type, pair)
    known = ir.DataType.INT32 if emitter.opset >= 12 else ir.DataType.DOUBLE
    wide = [emitter.op("Cast", [name], {"to": int(known)}) for name in pair]
    return emitter.op("Cast", [emitter.op(op_type, wide)], {"to": int(dtype)})


def _merge_moments(emitter: Emitter, left: Sequence[str], right: Sequence[str],
                   dtype: ir.DataType) -> list[str]:
    """Count, mean and M2 of two parts together, without cancellation (see ops.moments)."""
    op = emitter.op
    (count, mean, m2), (other, other_mean, other_m2) = left, right
    total = op("Add", [count, other])
    cells, others, totals = (op("Cast", [n], {"to": int(dtype)}) for n in (count, other, total))
    share = op("Div", [others, totals])
    delta = op("Sub", [other_mean, mean])
    between = op("Mul", [op("Mul", [delta, delta]), op("Mul", [cells, share])])
    within = op("Add", [m2, other_m2])
    return [total, op("Add", [mean, op("Mul", [delta, share])]), op("Add", [within, between])]


def _function(scope: Scope, inputs: Sequence[ir.Value], results: Sequence[str]) -> ir.Function:
    """A function of the nodes of a scope; its name is given later."""
    emitter = Emitter(scope, "result/")
    copied = [emitter.op("Identity", [n]) if scope.values[n] in inputs else n for n in results]
    outputs = [scope.values[name] for name in copied]
    nodes: list[ir.Node] = []
    for value in scope.initializers:  # functions have none of their own
        assert value.const_value is not None
        node = ir.Node("", "Constant", [], [ir.AttrTensor("value", value.const_value)],
                       outputs=[ir.Value(name=value.name)])
        value.replace_all_uses_with(node.outputs[0])
        nodes.append(node)
    graph = ir.Graph(list(inputs), outputs, nodes=[*nodes, *scope.nodes], opset_imports={"": scope.opset})
    return ir.Function(DOMAIN, "body", graph=graph, attributes=[])


class Library:
    """Function bodies under names of their own; equal bodies are one function."""

    def __init__(self) -> None:
        self.functions: dict[tuple[str, Hashable], ir.Function] = {}

    def name_of(self, op_type: str, key: Hashable, build: Callable[[], ir.Function]) -> str:
        """The name of a body, e.g. `HaloExchange_3`; it is built when its key is new.

        A function's overload would let all be called `HaloExchange`, but onnxruntime before 1.24 mixes
        overloads up without an error.
        """
        if (op_type, key) not in self.functions:
            count = sum(1 for known, _ in self.functions if known == op_type)
            self.functions[op_type, key] = build()
            self.functions[op_type, key].name = f"{op_type}_{count + 1}"
        return self.functions[op_type, key].name
