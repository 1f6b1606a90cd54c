"""canonicalize: static shapes, constants folded, functions inlined; every unsupported node listed at once.

    before                                           after
    x (1, 1, D, H, W)                                x (1, 1, 121, 160, 143)
    y = Dropout(Identity(x))                         y = x
    z = Resize(y, Concat(Shape(y)...))               z = Resize(y, constant)
    p = MaxPool(z)  ceil_mode=1                      p = MaxPool(z)  pads=[0, 0, 0, 0, 0, 1]

Extents come from the operators' maps; the file's own annotations are replaced.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import onnx_ir as ir
import onnx_ir.passes.common as library

from partitioner import dialect
from partitioner.errors import ShapeError, refuse_all
from partitioner.geometry import Interval, span
from partitioner.ops.base import NothingLeft, Unsupported, WrongExtents
from partitioner.ops.dtypes import disagreeing
from partitioner.ops.nodes import forget, operator_of
from partitioner.ops.opaque import Opaque
from partitioner.ops.weights import weight_nodes
from passes.base import Check, Pass
from passes.checks import KNOWN, STATIC
from passes.contrib import rewrite_contrib
from passes.fold import Folder
from passes.rewrite import Namer, name_nodes, name_results
from passes.spellings import recognise
from passes.unfold import hopeless, leave_out, unfold

Shapes = Mapping[str, Sequence[int]]

_SHORTHANDS = ("auto_pad", "ceil_mode", "output_shape")
_HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Bring a model into the form that the other passes read.

    Args:
        shapes: extents per input name; inputs with static extents need none.
        strict: refuse what has no sharded rule instead of running it replicated.
        fold_norms: let a convolution's weights take up the batch norm, factors and summands after it; not for
            training, which needs them apart.
    """

    name: ClassVar[str] = "canonicalize"
    ensures: ClassVar[tuple[Check, ...]] = (STATIC, KNOWN)

    shapes: Shapes = field(default_factory=dict[str, Sequence[int]])
    strict: bool = False
    fold_norms: bool = True

    def apply(self, model: ir.Model) -> None:
        weights = frozenset[str]() if self.fold_norms else frozenset(map(str, model.graph.initializers))
        prepare(model)
        bind_inputs(model, self.shapes)
        problems = infer_and_fold(model, self.strict, weight_nodes(model.graph, weights))
        if any(p.about_extents for p in problems):
            raise ShapeError("\n".join(p.text for p in problems))
        refuse_all([p.text for p in problems])
        recognise(model, self.fold_norms)
        _drop_copies(model, ("Identity", "Dropout") if self.fold_norms else ("Identity",))
        _spell_out(model)
        library.RemoveUnusedNodesPass()(model)
        name_nodes(model.graph)
        name_results(model.graph)
        dialect.declare(model)


def prepare(model: ir.Model) -> None:
    """Inline functions, lift constants, drop dead nodes and stale annotations."""
    if model.functions:
        library.InlinePass()(model)
        model.functions.clear()
    if "ai.onnx" in model.graph.opset_imports:
        model.graph.opset_imports.setdefault("", model.graph.opset_imports.pop("ai.onnx"))
    for node in model.graph:
        if node.domain == "ai.onnx":
            node.domain = ""
    library.ClearMetadataAndDocStringPass()(model)  # exporters leave stack traces and paths of their host
    library.RemoveInitializersFromInputsPass()(model)
    library.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    rewrite_contrib(model)
    library.RemoveUnusedNodesPass()(model)
    name_nodes(model.graph)
    for node in model.graph:
        for value in node.outputs:
            value.shape = None


def bind_inputs(model: ir.Model, shapes: Shapes) -> None:
    """Give the inputs their extents.

    Raises:
        PartitionError: for an unknown input, a wrong rank, a contradiction, or an axis that stays open.
    """
    names = [str(v.name) for v in model.graph.inputs]
    problems = [f"input '{name}' is unknown; the model has {', '.join(names)}" for name in shapes if name not in names]
    symbols: dict[str, int] = {}
    for value in model.graph.inputs:
        if isinstance(value.type, ir.SequenceType | ir.OptionalType):
            problems.append(f"input '{value.name}' is a sequence or an optional value; "
                            "export the model with tensors only")
            continue
        if value.shape is None or value.dtype is None:
            problems.append(f"input '{value.name}' has no declared rank or type; export the model again")
            continue
        given = shapes.get(str(value.name))
        problem = _bind(value, given, symbols)
        if problem:
            problems.append(problem)
    refuse_all(problems)


def describe_shape(shape: ir.Shape) -> str:
    """Extents as text, open axes by their names."""
    return "x".join(str(d) if isinstance(d, int) else str(d.value or "?") for d in shape)


def _bind(value: ir.Value, given: Sequence[int] | None, symbols: dict[str, int]) -> str | None:
    assert value.shape is not None
    declared = describe_shape(value.shape)
    if given is not None and len(given) != len(value.shape):
        return (f"input '{value.name}' has {len(value.shape)} axes ({declared}), the shape given has {len(given)} "
                f"({'x'.join(map(str, given))}); give one extent per axis")
    extents: list[int] = []
    for axis, dim in enumerate(value.shape):
        wanted = None if given is None else int(given[axis])
        if isinstance(dim, int):
            if wanted not in (None, dim):
                return (f"input '{value.name}' is exported with the fixed extents {declared}, not "
                        f"{'x'.join(map(str, given or ()))}; export it with dynamic axes")
            extents.append(dim)
            continue
        known = symbols.get(str(dim.value)) if wanted is None and dim.value else wanted
        if known is None:
            return (f"input '{value.name}' has open axes ({declared}); give all extents: "
                    f"--shape {value.name}={'x'.join('N' for _ in value.shape)}")
        if known < 1:
            return f"input '{value.name}': extent {known} of axis {axis} must be at least 1"
        if dim.value and symbols.setdefault(str(dim.value), known) != known:
            return (f"input '{value.name}': axis {axis} ('{dim.value}') is {known} here and "
                    f"{symbols[str(dim.value)]} elsewhere; the same name must have the same extent")
        extents.append(known)
    value.shape = ir.Shape(extents)
    return None


@dataclass(frozen=True)
class Problem:
    """Why a model is refused, by node name; `about_extents` when other extents might do."""

    text: str
    about_extents: bool = False


def infer_and_fold(model: ir.Model, strict: bool = False, kept: Container[ir.Node] = ()) -> list[Problem]:
    """Compute every extent and fold every constant but those that `kept` nodes make, in place; returns the problems.

    Nodes that stand for others (an If whose condition is known, an operator that is a function of others)
    are replaced by those, which are visited next.
    """
    folder = Folder(model, kept)
    problems: list[Problem] = []
    unknown: set[ir.Value] = set()
    waiting = list(model.graph)[::-1]
    while waiting:
        node = waiting.pop()
        if any(v in unknown for v in node.inputs if v is not None):
            unknown.update(node.outputs)
            problems += [_problem(node, reason) for reason in hopeless(node)]
            continue
        try:
            waiting += _visit(model, node, folder, strict)[::-1]
        except Unsupported as error:
            problems.append(_problem(node, error))
            unknown.update(node.outputs)
    if not problems:
        problems += _settle_rest(model, folder)
    if not problems:
        _keep_used_constants(model)
    return problems


def _problem(node: ir.Node, reason: Unsupported) -> Problem:
    return Problem(f"{node.name} ({dialect.operator_name(node)}): {reason}", isinstance(reason, WrongExtents))


def _visit(model: ir.Model, node: ir.Node, folder: Folder, strict: bool) -> list[ir.Node]:
    """Learn a node's extents; returns the nodes that have taken its place, if any."""
    if folder.try_fold(node):
        return []
    folder.settle(node.inputs)
    for value in node.inputs:
        if value is not None and value.const_value is not None and value.shape is None:
            value.shape = ir.Shape(value.const_value.shape.numpy())
    others = unfold(model, node, folder)
    if others is not None:
        return others
    _round_constants(model.graph, node)
    try:
        operator = operator_of(node)
    except NothingLeft:
        if leave_out(node):
            return []
        raise
    if strict and isinstance(operator, Opaque):
        raise Unsupported("it has no sharded rule and would run replicated; leave --strict out to have it gathered")
    for value, found in zip(node.outputs, operator.outputs, strict=False):
        value.shape = ir.Shape(found.shape)
        value.type = ir.TensorType(found.dtype)
    return []


def _round_constants(graph: ir.Graph, node: ir.Node) -> None:
    """Weights of 32 bits beside data of 16, which torch's exporter leaves where it folds a batch norm, in 16."""
    if node.domain != "":
        return
    types = [None if v is None else v.dtype for v in node.inputs]
    known = [v is not None and v.const_value is not None for v in node.inputs]
    version = node.version or graph.opset_imports[""]
    for index, wanted in disagreeing(node.op_type, version, types, known).items():
        value = node.inputs[index]
        if wanted not in _HALVES or value is None or value.const_value is None or value.dtype != ir.DataType.FLOAT:
            continue
        tensor = ir.tensor(value.const_value.numpy().astype(wanted.numpy()))
        made = ir.Value(name=Namer(graph)(f"{value.name}/{wanted.name.lower()}"), shape=value.shape,
                        type=ir.TensorType(wanted), const_value=tensor)
        dialect.set_source(made, dialect.get_source(value))
        graph.register_initializer(made)
        node.replace_input_with(index, made)


def _settle_rest(model: ir.Model, folder: Folder) -> list[Problem]:
    """Values that constants decide and that leave the graph."""
    if not model.graph.inputs:
        return [Problem("the model has no inputs, constants decide its outputs: there is nothing to partition")]
    try:
        folder.settle([v for v in model.graph.outputs])
    except Unsupported as error:
        return [Problem(str(error))]
    return []


def _keep_used_constants(model: ir.Model) -> None:
    """Replace folded values by initialisers and remove the nodes that made them."""
    graph, namer = model.graph, Namer(model.graph)
    for value in dict.fromkeys(v for v in graph.outputs if v.const_value is not None):
        _give_out(graph, value, namer)
    for node in reversed(list(graph)):
        if not all(v.const_value is not None or not v.uses() for v in node.outputs):
            continue
        if any(v.is_graph_output() for v in node.outputs):
            continue
        for value in node.outputs:
            if value.const_value is None or not value.uses():
                continue
            constant = ir.Value(name=value.name, shape=value.shape, type=value.type, const_value=value.const_value,
                                metadata_props=value.metadata_props)
            value.replace_all_uses_with(constant)
            value.name = f"{value.name}/folded"
            graph.register_initializer(constant)
        graph.remove(node, safe=True)
    used = {v for n in graph for v in n.inputs if v is not None}
    for name in [n for n, v in graph.initializers.items() if v not in used and not v.is_graph_output()]:
        del graph.initializers[name]


def _give_out(graph: ir.Graph, value: ir.Value, namer: Namer) -> None:
    """Let a node yield a constant that leaves the graph, under its name."""
    assert value.const_value is not None
    name = str(value.name)
    tensor = ir.tensor(value.const_value.numpy(), value.dtype, name=namer(f"{name}/constant"))
    constant = ir.Value(name=tensor.name, shape=value.shape, type=value.type, const_value=tensor,
                        metadata_props=value.metadata_props)
    node = ir.Node("", "Identity", [constant], outputs=[ir.Value(name=name, shape=value.shape, type=value.type)])
    graph.append(node)
    for index in [i for i, v in enumerate(graph.outputs) if v is value]:
        graph.outputs[index] = node.outputs[0]
    value.replace_all_uses_with(constant)
    if value.producer() is None:
        dialect.set_source(constant, dialect.get_source(value))
        del graph.initializers[name]
    else:
        value.name = namer(f"{name}/folded")
    graph.register_initializer(constant)


def _spell_out(model: ir.Model) -> None:
    """Plain padding in place of auto_pad, ceil_mode and output_shape: shape inference misjudges some of these."""
    for node in model.graph:
        shorthand = [name for name in _SHORTHANDS if node.attributes.get(name) is not None]
        explicit = operator_of(node).explicit if shorthand else None
        if explicit is None:
            continue
        for name in shorthand:
            del node.attributes[name]
        for name, values in explicit.items():
            node.attributes[name] = ir.AttrInt64s(name, values)
        forget(node)


def _changes_nothing(node: ir.Node) -> bool:
    """Whether a pad or a crop, as exporters write them for any extents, has nothing to do at these."""
    source, result = node.inputs[0] if node.inputs else None, node.outputs[0]
    if node.op_type not in ("Pad", "Slice") or source is None or len(node.outputs) != 1:
        return False
    if source.shape != result.shape or source.dtype != result.dtype:
        return False
    needs = operator_of(node).needs(0)[0]
    return needs is not None and all(
        need.axis == axis and all(need.map.needed(Interval(i, i + 1)) == span(i, i + 1) for i in {0, n - 1} if n)
        for axis, (need, n) in enumerate(zip(needs, dialect.shape_of(source), strict=True)))


def _drop_copies(model: ir.Model, op_types: Sequence[str]) -> None:
    """Identity, Dropout at inference, pads and crops by nothing: readers read the original."""
    for node in list(model.graph):
        if node.domain != "" or not (node.op_type in op_types or _changes_nothing(node)):
            continue
        source, result = node.inputs[0], node.outputs[0]
        if source is None or result.is_graph_output() or source.const_value is not None:
            continue
        result.replace_all_uses_with(source)
        model.graph.remove(node, safe=True)


