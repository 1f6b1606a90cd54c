"""prepare-training: layers that behave differently while a network learns.

    before                                        after
    y = BatchNormalization(x, s, b, m, v)         y, m', v' = TrainingBatchNormalization(x, s, b)
    z = Dropout(y, 0.3)                           z = TrainingDropout(y, seed)  ratio=0.3

The batch statistics m' and v' leave the graph, named after the running statistics that they update; the seed
is an input of the graph.  What the file holds of running statistics stays with the module.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from partitioner import dialect
from partitioner.ops.nodes import operator_of
from passes.base import Check, Pass
from passes.checks import KNOWN, STATIC
from passes.rewrite import Namer


@dataclass(frozen=True)
class PrepareTraining(Pass):
    """Replace batch norms and dropouts by what they do in training."""

    name: ClassVar[str] = "prepare-training"
    requires: ClassVar[tuple[Check, ...]] = (STATIC, KNOWN)
    ensures: ClassVar[tuple[Check, ...]] = (STATIC, KNOWN)

    def apply(self, model: ir.Model) -> None:
        namer = Namer(model.graph)
        seed: ir.Value | None = None
        for node in list(model.graph):
            if node.domain == "" and node.op_type == "BatchNormalization":
                _batch_norm(model, node, namer)
            elif node.domain == "" and node.op_type == "Dropout" and _ratio(node) > 0:
                seed = seed or _seed(model)
                _dropout(model, node, seed, namer)
        dialect.declare(model)


def _batch_norm(model: ir.Model, node: ir.Node, namer: Namer) -> None:
    x, scale, bias, mean, variance = node.inputs
    assert x is not None and x.dtype is not None and mean is not None and variance is not None
    epsilon, momentum = node.attributes.get_float("epsilon", 1e-5), node.attributes.get_float("momentum", 0.9)
    rank = len(dialect.shape_of(x))
    attributes = dialect.batch_normalization_attributes(epsilon, x.dtype, rank)
    made = dialect.new_node(dialect.DOMAIN, dialect.TRAINING_BATCH_NORMALIZATION, [x, scale, bias], attributes, 3,
                            namer(f"{node.name}/training"))
    _replace(model.graph, node, made)
    names = (f"{node.name}/mean/batch", f"{node.name}/{dialect.VARIANCE}")
    for running, found, wish in zip((mean, variance), made.outputs[1:], names, strict=True):
        found.name = wish
        cells = int(np.prod(dialect.shape_of(x))) // dialect.shape_of(x)[1]
        dialect.set_statistic(found, str(running.name), momentum, cells)
        model.graph.outputs.append(found)


def _ratio(node: ir.Node) -> float:
    given = node.attributes.get_float("ratio", 0.5)
    if len(node.inputs) < 2 or node.inputs[1] is None:
        return given
    value = node.inputs[1].const_value
    return given if value is None else float(value.numpy())


def _seed(model: ir.Model) -> ir.Value:
    value = ir.Value(name=dialect.SEED, shape=ir.Shape(()), type=ir.TensorType(ir.DataType.INT64))
    model.graph.inputs.append(value)
    return value


def _dropout(model: ir.Model, node: ir.Node, seed: ir.Value, namer: Namer) -> None:
    layer = sum(n.op_type == dialect.TRAINING_DROPOUT for n in model.graph)
    channels = int(node.name in dialect.get_whole_channels(model))
    made = dialect.new_node(dialect.DOMAIN, dialect.TRAINING_DROPOUT, [node.inputs[0], seed],
                            {"ratio": _ratio(node), "layer": layer, "channels": channels}, 1,
                            namer(f"{node.name}/training"))
    _replace(model.graph, node, made)


def _replace(graph: ir.Graph, node: ir.Node, made: ir.Node) -> None:
    """Let a new node take the place of an old one, under the old result's name."""
    graph.insert_before(node, made)
    for value, found in zip(made.outputs, operator_of(made).outputs, strict=True):
        value.shape, value.type = ir.Shape(found.shape), ir.TensorType(found.dtype)
    name = node.outputs[0].name
    node.outputs[0].replace_all_uses_with(made.outputs[0], replace_graph_outputs=True)
    graph.remove(node, safe=True)
    made.outputs[0].name = name
