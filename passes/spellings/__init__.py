"""spellings: layers that exporters write out in several nodes, read as the one layer that they are.

    before                                                  after
    Reshape(x, [0, G, -1]), InstanceNormalization, Reshape  y = partitioner.GroupNormalization(x, scale, bias)
        Mul(scale), Add(bias)                                   InstanceNormalization where G = C
    ReduceMean, Sub, Pow, ReduceMean, Add, Sqrt, Div        y = InstanceNormalization(x, scale, bias)
    Conv(x, w), BatchNormalization                          y = Conv(x, w', b')        unless fold_norms is off
    Pad(x), Conv                                            y = Conv(x)  pads
    Mul(Mul(x, 0.5), Add(Erf(Div(x, 1.4142135)), 1))        y = Gelu(x)
    MaxPool(x), its window all of x                         y = GlobalMaxPool(x)       unless fold_norms is off

What is matched is gone afterwards, so nothing is that has another reader or leaves the graph.  Matching is
onnxscript's; its ready rules for batch norms and pads are not used, because they compute in float32, write over
constants by name and read opset 11 and later only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import onnx_ir as ir
from onnxscript.rewriter import pattern

from partitioner import dialect
from partitioner.ops.nodes import operator_of
from passes.rewrite import Namer
from passes.spellings.affine import affine_rules, folding_rules
from passes.spellings.norms import grouped_rules, read_group_norm, variance_rules
from passes.spellings.pads import pad_rules
from passes.spellings.pools import read_pool
from passes.spellings.products import read_product


@dataclass(frozen=True)
class Change:
    """One node in place of several, with constants of its own."""

    removed: Sequence[ir.Node]
    made: ir.Node
    constants: Sequence[ir.Value] = ()


Rule = Callable[[ir.Model, ir.Node], Change | None]


def recognise(model: ir.Model, fold_norms: bool = True) -> None:
    """Replace every layer that is written out, in place.

    Args:
        fold_norms: whether a convolution's weights take up the batch norm, factors and summands after it.
    """
    namer, rules = Namer(model.graph), _rules(fold_norms)
    for node in list(model.graph):
        if node.graph is None or node.domain != "":  # removed with a layer that ended before
            continue
        for rule in rules.get(node.op_type, ()):
            change = rule(model, node)
            if change is not None:
                _put(model.graph, node, change, namer)
                break


def _put(graph: ir.Graph, node: ir.Node, change: Change, namer: Namer) -> None:
    """Let a layer take the place of the nodes that end in `node`; the result keeps its name."""
    made, old = change.made, node.outputs[0]
    made.name = namer(f"{node.name}/{made.op_type}")
    graph.insert_before(node, made)
    (new,), (found,) = made.outputs, operator_of(made).outputs
    new.shape, new.type = ir.Shape(found.shape), ir.TensorType(found.dtype)
    assert dialect.shape_of(new) == dialect.shape_of(old) and new.dtype == old.dtype, made.name
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    name = old.name
    graph.remove(change.removed, safe=True)
    new.name = name
    for constant in change.constants:
        constant.name = _free_name(graph, str(constant.name), namer)
        graph.register_initializer(constant)


def _free_name(graph: ir.Graph, wish: str, namer: Namer) -> str:
    """The wish itself where it names a constant that nothing reads any more, which goes."""
    old = graph.initializers.get(wish)
    if old is None or old.uses() or old.is_graph_output():
        return namer(wish)
    del graph.initializers[wish]
    return wish


@cache
def _rules(fold_norms: bool) -> Mapping[str, Sequence[Rule]]:
    """The rules by the operator of the last node that they match."""
    found: dict[str, list[Rule]] = {"Mul": [_product], "Div": [_product], "GroupNormalization": [_numbers_per_channel],
                                    "AveragePool": [_pool]}
    if fold_norms:  # of equal cells a max pool trains the first, a reduction all
        found["MaxPool"] = [_pool]
    for root, rule in _patterns(fold_norms):
        for variant in rule.commute():
            found.setdefault(root, []).append(_matching(variant))
    return found


def _patterns(fold_norms: bool) -> Iterator[tuple[str, pattern.RewriteRule]]:
    yield from grouped_rules()
    yield from variance_rules()
    yield from affine_rules()
    yield from pad_rules()
    if fold_norms:
        yield from folding_rules()


def _matching(rule: pattern.RewriteRule) -> Rule:
    def apply(model: ir.Model, node: ir.Node) -> Change | None:
        found = rule.try_rewrite(model, model.graph, node)
        if found is None:
            return None
        (made,) = found.new_nodes
        return Change(found.match.nodes, made, found.new_initializers)

    return apply


def _numbers_per_channel(model: ir.Model, node: ir.Node) -> Change | None:
    """GroupNormalization with numbers per group (opset 18 to 20, deprecated since: the checker refuses it)."""
    found = read_group_norm(node, model.graph.opset_imports[""])
    if found is None:
        return None
    attributes, constants = found
    made = dialect.new_node(dialect.DOMAIN, dialect.GROUP_NORMALIZATION, [node.inputs[0], *constants], attributes, 1,
                            str(node.name))
    return Change([node], made, constants)


def _pool(model: ir.Model, node: ir.Node) -> Change | None:
    found = read_pool(node, model.graph.opset_imports[""])
    if found is None:
        return None
    op_type, attributes, constants = found
    made = ir.Node("", op_type, [node.inputs[0], *constants], ir.convenience.convert_attributes(attributes))
    return Change([node], made, constants)


def _product(model: ir.Model, node: ir.Node) -> Change | None:
    found = read_product(node, model.graph.opset_imports[""])
    return None if found is None else Change(found.nodes, ir.Node("", found.op_type, [found.x], found.attributes))
