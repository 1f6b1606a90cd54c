"""Shards put together from pieces of other shards with Slice and Concat: what an exchange really does.

    rank 1 needs [60, 121), owns [61, 121)      x@0  --Slice [60, 61)--+
                                                                       +--Concat-->  h@1
                                                x@1  ------------------+

Any number of axes, sources and pieces per axis: the target is cut into a grid along every bound of what
the sources give, every cell of the grid is one Slice, and rows of cells are joined axis by axis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from partitioner.dialect import DOMAIN
from partitioner.exchange import RankExchange
from partitioner.geometry import Box, Interval, Pieces, local_slices
from partitioner.mesh import Mesh
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
        found += [Interval(a, b) for a, b in zip(edges, edges[1:], strict=False)]
    return found


def _cut(emitter: Emitter, source: Source, cell: Box) -> str:
    """A cell of the grid out of the tensor that holds it."""
    spans: dict[int, tuple[int, int]] = {}
    for axis, (held, wanted) in enumerate(zip(source.held.axes, cell.axes, strict=True)):
        (place,) = local_slices(held, wanted)
        if (place.start, place.stop) != (0, source.held.shape[axis]):
            spans[axis] = (place.start, place.stop)
    return emitter.crop(source.name, spans)


def exchange_body(part: RankExchange, rank: int, owned: Callable[[int], Box], target: Box,
                  opset: int) -> tuple[tuple[int, ...], ir.Function]:
    """What one rank does in an exchange: the ranks whose shards it reads, its own first, and the function.

    Args:
        owned: the cells that a rank owns.
        target: the cells that this rank needs.
    """
    taken = {rank: part.keep} if part.keep else {}
    taken |= {t.source: t.box for t in part.receives}
    scope = Scope(opset)
    inputs = [ir.Value(name=f"x{i}") for i in range(len(taken))]
    sources = [Source(scope.add(value), owned(peer), box)
               for value, (peer, box) in zip(inputs, taken.items(), strict=True)]
    emitter = Emitter(scope, "")
    result = assemble(emitter, target, sources)
    return tuple(taken), _function(scope, inputs, [result])


def _function(scope: Scope, inputs: Sequence[ir.Value], results: Sequence[str]) -> ir.Function:
    """A function of the nodes of a scope; its name is given later."""
    emitter = Emitter(scope, "result/")
    copied = [emitter.op("Identity", [n]) if scope.values[n] in inputs else n for n in results]
    outputs = [scope.values[name] for name in copied]
    nodes: list[ir.Node] = []
    for value in scope.initializers:  # functions have no initialisers
        assert value.const_value is not None
        node = ir.Node("", "Constant", [], [ir.AttrTensor("value", value.const_value)],
                       outputs=[ir.Value(name=value.name)])
        value.replace_all_uses_with(node.outputs[0])
        nodes.append(node)
    graph = ir.Graph(list(inputs), outputs, nodes=[*nodes, *scope.nodes], opset_imports={"": scope.opset})
    return ir.Function(DOMAIN, "body", graph=graph, attributes=[])


Present = Callable[[int], bool]


def merge_body(kind: str, width: int, dtype: ir.DataType, members: Sequence[int], present: Present, mesh: Mesh,
               names: Sequence[str], opset: int) -> tuple[tuple[int, ...], ir.Function]:
    """What a rank does in an all-reduce: the ranks whose partials it reads, in order, and the function.

    Partials merge in rank order along one mesh axis after the other, the same way on every rank, so that
    all have the same bits.  Ranks without cells take no part.

    Args:
        width: tensors per partial result (3 for moments).
        dtype: element type of the results.
        members: the ranks that differ along the mesh axes `names` only.
    """
    ranks = tuple(rank for rank in members if present(rank))
    scope = Scope(opset)
    emitter = Emitter(scope, "")
    inputs = {rank: [ir.Value(name=f"x{i}.{k}") for k in range(width)] for i, rank in enumerate(ranks)}
    partials = {rank: [scope.add(v) for v in values] for rank, values in inputs.items()}
    for name in names:
        groups: dict[int, list[list[str]]] = {}
        for rank, partial in sorted(partials.items()):
            groups.setdefault(mesh.rank({**mesh.coordinates(rank), name: 0}), []).append(partial)
        partials = {rank: _merge(emitter, kind, group, dtype) for rank, group in groups.items()}
    (merged,) = partials.values()
    return ranks, _function(scope, [v for rank in ranks for v in inputs[rank]], merged)


def _merge(emitter: Emitter, kind: str, parts: Sequence[Sequence[str]], dtype: ir.DataType) -> list[str]:
    result = list(parts[0])
    for part in parts[1:]:
        if kind == "moments":
            result = _merge_moments(emitter, result, part, dtype)
        else:
            op_type = {"sum": "Add", "max": "Max", "min": "Min"}[kind]
            result = [emitter.op(op_type, pair) for pair in zip(result, part, strict=True)]
    return result


def _merge_moments(emitter: Emitter, left: Sequence[str], right: Sequence[str], dtype: ir.DataType) -> list[str]:
    """Count, mean and M2 of two parts together, without cancellation (see ops.moments)."""
    op = emitter.op
    (count, mean, m2), (other, other_mean, other_m2) = left, right
    total = op("Add", [count, other])
    cells, others, totals = (op("Cast", [n], {"to": int(dtype)}) for n in (count, other, total))
    share = op("Div", [others, totals])
    delta = op("Sub", [other_mean, mean])
    between = op("Mul", [op("Mul", [delta, delta]), op("Mul", [cells, share])])
    return [total, op("Add", [mean, op("Mul", [delta, share])]), op("Add", [op("Add", [m2, other_m2]), between])]


@dataclass
class Library:
    """Function bodies under names of their own; equal bodies are one function."""

    functions: dict[bytes, ir.Function]
    counts: dict[str, int]

    @classmethod
    def empty(cls) -> Library:
        """A library without functions."""
        return cls({}, {})

    def name_of(self, op_type: str, body: ir.Function) -> str:
        """The name under which a body is known, e.g. `HaloExchange_3`."""
        body.name = op_type
        key = ir.serde.serialize_function(body).SerializeToString(deterministic=True)
        if key not in self.functions:
            self.counts[op_type] = self.counts.get(op_type, 0) + 1
            body.name = f"{op_type}_{self.counts[op_type]}"
            self.functions[key] = body
        return self.functions[key].name
