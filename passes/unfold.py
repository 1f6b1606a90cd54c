"""unfold: nodes that stand for others give way to them.

    before                                           after
    y = If(true)  then: Squeeze(x)  else: Identity(x)     y = Squeeze(x)
    y = Attention(q, k, v)                           y = MatMul(Softmax(Mul(MatMul(q, kT), s)), v)
    y = Loop(n, c, x)  body reads w                  y = Region0(n, c, x, w)      runs replicated

An operator that has no rule but is a function of others (its ONNX definition says so) is replaced by that
function's body.  What keeps its subgraphs becomes a function of the plan whose inputs are all that it reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from partitioner import dialect
from partitioner.ops.base import Unsupported
from partitioner.ops.nodes import tensor_type
from partitioner.ops.opaque import DOMAINS, RANDOM, captured, subgraph_nodes, subgraphs
from partitioner.ops.registry import lookup
from passes import definitions
from passes.definitions import definition
from passes.fold import Folder
from passes.rewrite import Namer


def hopeless(node: ir.Node) -> list[Unsupported]:
    """Why a node is refused whatever the extents of its inputs are."""
    if lookup(node.domain, node.op_type) is not None or node.op_type in ("Shape", "Size", "Constant"):
        return []
    if node.domain not in (*DOMAINS, *definitions.DOMAINS, dialect.DOMAIN):
        return [Unsupported(f"domain '{node.domain}' is unknown; register the operator (docs/operators.md) or export "
                            "the model without it")]
    if node.op_type in RANDOM:
        return [Unsupported("it draws random numbers; export the model without it")]
    return []


def unfold(model: ir.Model, node: ir.Node, folder: Folder) -> list[ir.Node] | None:
    """Put the nodes for which this one stands in its place; None when it stands for itself."""
    if _casts_a_constant(node, folder):
        return [_plain_cast(model, node)]
    if lookup(node.domain, node.op_type) is not None:
        return None
    body = definition(model, node)
    if body is None:
        return _unfold_subgraphs(model, node, folder) if any(True for _ in subgraphs(node)) else None
    for inner in body.inputs:
        outer = node.inputs[int(str(inner.name).removeprefix(definitions.INPUT))]
        assert outer is not None
        inner.replace_all_uses_with(outer, replace_graph_outputs=True)
    return splice(model.graph, node, body)


def _casts_a_constant(node: ir.Node, folder: Folder) -> bool:
    """Whether this is a CastLike of a constant: of its second input the type counts, not the data."""
    if node.op_type != "CastLike" or node.domain:
        return False
    source, like = node.inputs
    return source is not None and folder.is_constant(source) and like is not None and like.dtype is not None


def _plain_cast(model: ir.Model, node: ir.Node) -> ir.Node:
    """The Cast that a CastLike amounts to."""
    source, like = node.inputs
    assert like is not None and like.dtype is not None
    cast = ir.Node("", "Cast", [source], [ir.AttrInt64("to", int(like.dtype))], name=node.name)
    model.graph.insert_before(node, cast)
    _take_over(model.graph, node, cast.outputs)
    return cast


def leave_out(node: ir.Node) -> bool:
    """Take a result without cells out of the concatenations that read it (a roll by zero); whether that is all."""
    (value,) = node.outputs
    readers = [use.node for use in value.uses()]
    if value.is_graph_output() or any(reader.op_type != "Concat" or reader.domain for reader in readers):
        return False
    if any(all(v is value for v in reader.inputs) for reader in readers):
        return False
    for reader in dict.fromkeys(readers):
        kept = [v for v in reader.inputs if v is not value]
        for index, other in enumerate(kept):
            reader.replace_input_with(index, other)
        reader.resize_inputs(len(kept))
    return True


def _unfold_subgraphs(model: ir.Model, node: ir.Node, folder: Folder) -> list[ir.Node]:
    condition = node.inputs[0] if node.op_type == "If" else None
    if condition is not None and condition.const_value is not None:
        name = "then_branch" if bool(condition.const_value.numpy().all()) else "else_branch"
        made = splice(model.graph, node, node.attributes[name].as_graph())
        _let_go(node)
        return made
    outside = captured(node)
    folder.settle(outside)
    number = sum(dialect.is_region(n) for n in model.graph)
    extents = _loop_extents(node, outside, model.graph.opset_imports) if node.op_type == "Loop" else []
    region = dialect.new_region(node, outside, number, model.graph.opset_imports, extents)
    model.graph.insert_before(node, region)
    _take_over(model.graph, node, region.outputs)
    _let_go(node)
    return [region]


def _let_go(node: ir.Node) -> None:
    """The subgraphs of a node that has gone read nothing any more."""
    for inner in subgraph_nodes(node):
        for index in range(len(inner.inputs)):
            inner.replace_input_with(index, None)


def _loop_extents(node: ir.Node, outside: Sequence[ir.Value],
                  opsets: Mapping[str, int]) -> list[tuple[int, ...] | None]:
    """Extents of what a Loop carries: those that it starts with, when an iteration keeps them."""
    import onnx
    from onnx import helper

    body = ir.serde.serialize_graph(node.attributes["body"].as_graph())
    carried = [tensor_type(v) for v in node.inputs[2:] if v is not None]
    typed = [helper.make_tensor_value_info(v.name, int(t.dtype), t.shape)
             for v, t in zip(body.input[2:], carried, strict=True)]
    typed += [helper.make_tensor_value_info(str(v.name), int(t.dtype), t.shape)
              for v in outside for t in [tensor_type(v)]]
    graph = helper.make_graph(body.node, "body", [*body.input[:2], *typed],
                              [helper.make_empty_tensor_value_info(v.name) for v in body.output], body.initializer)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid(d, v) for d, v in opsets.items()])
    found = onnx.shape_inference.infer_shapes(model, data_prop=True)
    results: list[tuple[int, ...] | None] = [None] * len(node.outputs)
    for index, (start, value) in enumerate(zip(carried, found.graph.output[1:], strict=False)):
        kind = value.type.tensor_type
        kept = kind.HasField("shape") and tuple(d.dim_value for d in kind.shape.dim) == start.shape
        results[index] = start.shape if kept else None
    return results


def splice(graph: ir.Graph, node: ir.Node, body: ir.Graph) -> list[ir.Node]:
    """Put the nodes of another graph in the place of a node; returns them."""
    namer = Namer(graph)
    for value in list(body.initializers.values()):
        constant = ir.Value(name=namer(f"{node.name}/{value.name}"), shape=value.shape, type=value.type,
                            const_value=value.const_value)
        value.replace_all_uses_with(constant, replace_graph_outputs=True)
        graph.register_initializer(constant)
    nodes, results = list(body), list(body.outputs)
    body.outputs.clear()
    body.remove(nodes)
    for inner in nodes:
        inner.name = namer(f"{node.name}/{inner.name or inner.op_type}")
        for value in inner.outputs:
            value.name = namer(f"{node.name}/{value.name}") if value.name else value.name
            value.shape = None
    graph.insert_before(node, nodes)
    made = {value for inner in nodes for value in inner.outputs}
    for index, result in enumerate(results):  # what comes from outside gets a node of its own
        if result not in made:
            copy = ir.Node("", "Identity", [result], name=namer(f"{node.name}/copy{index}"))
            graph.insert_before(node, copy)
            nodes.append(copy)
            results[index] = copy.outputs[0]
    _take_over(graph, node, results)
    return nodes


def _take_over(graph: ir.Graph, node: ir.Node, results: Sequence[ir.Value]) -> None:
    """Let results be what a node produced (its omitted outputs left out), under the old names."""
    produced = [value for value in node.outputs if value.name]
    names = [value.name for value in produced]
    for old, new in zip(produced, results, strict=False):
        if new.type is None:
            new.type = old.type
        old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    for name, new in zip(names, results, strict=False):
        new.name = name or new.name
