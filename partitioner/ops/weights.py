"""Which weights of a network train: floating-point ones that a layer uses as such.

    weights and biases     of Conv, ConvTranspose, Gemm, MatMul, Einsum, DeformConv
    scales and biases      of BatchNormalization, InstanceNormalization, GroupNormalization, LayerNormalization, ...
    slopes                 of PRelu
    operands               of Add, Sub, Mul and Div with more than one element (a layer's scale or bias, written out)

Weights that reach such a place through nodes of their own (a transposition, a weight normalisation) train too.
Everything else stays: running statistics, scales of Resize, padding values, indices, single numbers.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from partitioner import dialect
from partitioner.ops.nodes import operator_of

_LAYERS = frozenset({
    "Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum", "DeformConv", "PRelu", "InstanceNormalization",
    "GroupNormalization", "LayerNormalization", "RMSNormalization", "Normalize", "FusedConv", "FusedMatMul"})
"""Layers all of whose floating-point weights train."""

_SCALE_AND_BIAS: Mapping[str, tuple[int, ...]] = {"BatchNormalization": (1, 2), "TrainingBatchNormalization": (1, 2)}
"""Layers of which only some inputs train; the others are running statistics."""

_OPERANDS = frozenset({"Add", "Sub", "Mul", "Div"})

_NO_GRADIENT = frozenset({"Shape", "Size", "ConstantOfShape", "NonZero", "ArgMax", "ArgMin"})
"""Nodes through which no weight is followed."""

RESHAPING = frozenset({"Reshape", "Unsqueeze", "Squeeze", "Flatten", "Identity", "Cast", "CastLike"})
"""Nodes that keep the numbers of their first input in order: what they make of a weight is that weight."""


def is_weight(value: ir.Value) -> bool:
    """Whether a constant can train at all: floating point, more than one number or an array of one."""
    tensor = value.const_value
    return tensor is not None and tensor.dtype.is_floating_point() and len(tensor.shape) > 0


def is_trainable(value: ir.Value) -> bool:
    """Whether an initialiser is a parameter, by the way it is used."""
    tensor = value.const_value
    return tensor is not None and is_weight(value) and _reaches_layer(value, int(tensor.size), frozenset())


def weight_nodes(graph: ir.Graph, names: frozenset[str]) -> frozenset[ir.Node]:
    """The nodes that compute weights of layers from weights alone; folded, these could not train.

    Those that only reshape may be folded: the constant names the weight that it is.

    Args:
        names: initialisers that are weights of the file.
    """
    known = {*graph.initializers.values(), *(v for n in graph if n.op_type in ("Shape", "Size") for v in n.outputs)}
    carried = {v for v in known if v.name in names and is_weight(v) and v.const_value is not None
               and v.const_value.size > 1}
    nodes: list[ir.Node] = []
    for node in graph:
        sources = node.inputs[:1] if node.op_type == "CastLike" else node.inputs
        if not all(v is None or v in known for v in sources) or not node.inputs:
            continue
        known.update(node.outputs)
        if node.op_type not in _NO_GRADIENT and any(v in carried for v in node.inputs if v is not None):
            carried.update(node.outputs)
            nodes.append(node)
    kept: set[ir.Node] = set()
    for node in reversed(nodes):
        if any(use.node in kept or (use.node not in nodes and trains(use.node.op_type, use.idx, 2))
               for v in node.outputs for use in v.uses()):
            kept.add(node)
    return frozenset(node for node in kept if node.op_type not in RESHAPING)


def without_gradient(model: ir.Model) -> list[str]:
    """Problems of a training plan: operators between a weight and an output that have no gradient."""
    problems: list[str] = []
    carried = {v for v in model.graph.initializers.values() if is_trainable(v)}
    for node in model.graph:
        if not any(v in carried for v in node.inputs if v is not None):
            continue
        carried.update(v for v in node.outputs if v.dtype is not None and v.dtype.is_floating_point())
        if not dialect.is_communication(node) and not operator_of(node).has_gradient:
            problems.append(f"{node.name} ({dialect.operator_name(node)}): it has no gradient, but weights before it "
                            "would need one; freeze them (export what comes before as a model of its own), or take it "
                            "out of the network")
    return problems


def trains(op_type: str, index: int, size: int) -> bool:
    """Whether input `index` of such a node, a constant of `size` numbers, trains."""
    if op_type in _SCALE_AND_BIAS:
        return index in _SCALE_AND_BIAS[op_type]
    return op_type in _LAYERS or (op_type in _OPERANDS and size > 1)


def _reaches_layer(value: ir.Value, size: int, seen: frozenset[ir.Value]) -> bool:
    for use in value.uses():
        node = use.node
        if _is_of_weights(node):
            if node.op_type not in _NO_GRADIENT and any(
                    v not in seen and _reaches_layer(v, size, seen | {value}) for v in node.outputs):
                return True
        elif trains(node.op_type, use.idx, size):
            return True
    return False


def _is_of_weights(node: ir.Node) -> bool:
    """Whether a node reads constants only, or what such nodes make of them."""
    makers = [v.producer() for v in node.inputs if v is not None and v.const_value is None]
    return all(maker is not None and _is_of_weights(maker) for maker in makers)
