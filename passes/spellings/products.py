"""Activations that are written out as products; factors may stand in any order.

    Gelu       0.5 * x * (1 + Erf(x / sqrt(2)))
    Gelu tanh  0.5 * x * (1 + Tanh(sqrt(2 / pi) * (x + 0.044715 * x^3)))
    Mish       x * Tanh(Softplus(x))
    HardSwish  x * HardSigmoid(x, 1/6, 1/2)  or  x * Clip(x + 3, 0, 6) / 6
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from passes.spellings.values import near, number

GELU, MISH, HARD_SWISH = 20, 18, 14
"""The opsets that introduced them."""

_CUBIC = 0.044715
_TANH_FACTOR = math.sqrt(2 / math.pi)


@dataclass(frozen=True)
class Activation:
    """An operator of one input, and the nodes that spell it."""

    op_type: str
    x: ir.Value
    nodes: Sequence[ir.Node]
    attributes: Sequence[ir.Attr] = ()


@dataclass
class _Product:
    """A number times values, each as often as it is a factor, and the nodes that multiply them."""

    number: float = 1.0
    values: list[ir.Value] = field(default_factory=list[ir.Value])
    nodes: list[ir.Node] = field(default_factory=list[ir.Node])


def read_product(root: ir.Node, opset: int) -> Activation | None:
    """The activation that ends in a Mul or Div."""
    if opset < HARD_SWISH or root.outputs[0].dtype != ir.DataType.FLOAT:
        return None
    product = _Product()
    _expand_node(root, product)
    if len(product.values) != 2:
        return None
    for x, other in (product.values, product.values[::-1]):
        for wanted, since, read in _ACTIVATIONS:
            if opset < since or not near(product.number, wanted):
                continue
            found = read(x, other)
            if found is None:
                continue
            found = Activation(found.op_type, x, [*product.nodes, *found.nodes], found.attributes)
            return found if _is_own(root, found.nodes) else None
    return None


def _is_own(root: ir.Node, nodes: Sequence[ir.Node]) -> bool:
    """Whether nothing but these nodes reads what they compute on the way."""
    inner = [v for node in nodes if node is not root for v in node.outputs]
    return all(not v.is_graph_output() and all(use.node in nodes for use in v.uses()) for v in inner)


# --- products and sums -------------------------------------------------------------------------------


def _product(value: ir.Value) -> _Product:
    found = _Product()
    _expand(value, found)
    return found


def _expand(value: ir.Value, product: _Product) -> None:
    """Multiply by a value, taken apart where it is itself a product that nothing else reads."""
    known, node = number(value), value.producer()
    if known is not None:
        product.number *= known
    elif node is None or len(value.uses()) != 1 or value.is_graph_output() or not _expand_node(node, product):
        product.values.append(value)


def _expand_node(node: ir.Node, product: _Product) -> bool:
    """Multiply by the result of a node, if that is a product, a quotient by a number, or a power."""
    if node.domain != "" or len(node.inputs) != 2:
        return False
    left, right = node.inputs
    divisor = number(right)
    if left is None or right is None:
        return False
    if node.op_type == "Mul":
        _expand(left, product)
        _expand(right, product)
    elif node.op_type == "Div" and divisor:
        _expand(left, product)
        product.number /= divisor
    elif node.op_type == "Pow" and divisor in (2.0, 3.0):
        product.values += [left] * int(divisor)
    else:
        return False
    product.nodes.append(node)
    return True


def _node(value: ir.Value, op_type: str) -> ir.Node | None:
    node = value.producer()
    return node if node is not None and (node.domain, node.op_type) == ("", op_type) else None


def _terms(value: ir.Value) -> Iterator[tuple[ir.Value, ir.Value, ir.Node]]:
    """Both orders of a sum, and its node."""
    node = _node(value, "Add")
    if node is not None and node.inputs[0] is not None and node.inputs[1] is not None:
        yield node.inputs[0], node.inputs[1], node
        yield node.inputs[1], node.inputs[0], node


# --- the factor beside x -----------------------------------------------------------------------------


def _gelu(x: ir.Value, other: ir.Value) -> Activation | None:
    """1 + Erf(x / sqrt(2)), or 1 + Tanh(...)."""
    for one, bend, total in _terms(other):
        erf, tanh = _node(bend, "Erf"), _node(bend, "Tanh")
        node = erf or tanh
        if not near(number(one), 1) or node is None or node.inputs[0] is None:
            continue
        product = _product(node.inputs[0])
        nodes = [total, node, *product.nodes]
        if erf is not None and near(product.number, math.sqrt(0.5)) and product.values == [x]:
            return Activation("Gelu", x, nodes)
        cubic = None if tanh is None or not near(product.number, _TANH_FACTOR) else _cubic(x, product.values)
        if cubic is not None:
            return Activation("Gelu", x, [*nodes, *cubic], [ir.AttrString("approximate", "tanh")])
    return None


def _cubic(x: ir.Value, values: Sequence[ir.Value]) -> Sequence[ir.Node] | None:
    """The nodes of x + 0.044715 x^3, or of x * (1 + 0.044715 x^2)."""
    rest = [v for v in values if v is not x]
    if len(rest) != 1 or len(values) > 2:
        return None
    for first, bend, total in _terms(rest[0]):
        begins = first is x if len(values) == 1 else near(number(first), 1)
        product = _product(bend)
        if begins and near(product.number, _CUBIC) and product.values == [x] * (4 - len(values)):
            return [total, *product.nodes]
    return None


def _mish(x: ir.Value, other: ir.Value) -> Activation | None:
    tanh = _node(other, "Tanh")
    softplus = None if tanh is None or tanh.inputs[0] is None else _node(tanh.inputs[0], "Softplus")
    if tanh is None or softplus is None or softplus.inputs[0] is not x:
        return None
    return Activation("Mish", x, [tanh, softplus])


def _hard_sigmoid(x: ir.Value, other: ir.Value) -> Activation | None:
    node = _node(other, "HardSigmoid")
    if node is None or node.inputs[0] is not x:
        return None
    given = node.attributes.get_float("alpha", 0.2), node.attributes.get_float("beta", 0.5)
    return Activation("HardSwish", x, [node]) if near(given[0], 1 / 6) and near(given[1], 0.5) else None


def _clipped(x: ir.Value, other: ir.Value) -> Activation | None:
    """Clip(x + 3, 0, 6)."""
    node = _node(other, "Clip")
    if node is None or len(node.inputs) != 3 or node.inputs[0] is None:
        return None
    low, high = number(node.inputs[1]), number(node.inputs[2])
    for term, three, total in _terms(node.inputs[0]):
        if term is x and near(number(three), 3) and low == 0 and high == 6:
            return Activation("HardSwish", x, [node, total])
    return None


_ACTIVATIONS: Sequence[tuple[float, int, Callable[[ir.Value, ir.Value], Activation | None]]] = (
    (0.5, GELU, _gelu),
    (1.0, MISH, _mish),
    (1.0, HARD_SWISH, _hard_sigmoid),
    (1 / 6, HARD_SWISH, _clipped),
)
"""(number in front, opset, what reads the factor beside x)."""
