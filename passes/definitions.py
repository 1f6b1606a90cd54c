"""The functions by which ONNX defines operators, written out for one node's types and attributes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from partitioner.ops.nodes import tensor_type
from partitioner.ops.opaque import captured

if TYPE_CHECKING:
    import onnx

DOMAINS = ("", "ai.onnx.preview")
"""Domains whose operators onnx defines by functions."""

INPUT = "partitioner_input_"
"""Begins the names of a body's inputs; the number of the node's input follows."""

_ALONE = "partitioner.definition"
"""The domain of a function that onnx wrote for one node."""


def definition(model: ir.Model, node: ir.Node) -> ir.Graph | None:
    """The body that stands for a node; None when onnx defines its operator by no function.

    The operators of the body are those of the model's opset.
    """
    import onnx
    from onnx import inliner

    opsets = model.graph.opset_imports
    if node.domain not in DOMAINS or captured(node):
        return None
    try:
        schema: Any = onnx.defs.get_schema(node.op_type, opsets.get(node.domain, 1), node.domain)
    except onnx.defs.SchemaError:
        return None
    if not schema.has_function and not schema.has_context_dependent_function:
        return None
    proto = _alone(node, opsets, schema)
    try:
        found = inliner.inline_selected_functions(proto, [(node.domain, node.op_type)], inline_schema_functions=True)
    except Exception:  # onnx cannot type an input that is not given
        found = _written_for(proto, schema, opsets[""])
    if found is None or any(n.op_type == node.op_type and n.domain == node.domain for n in found.graph.node):
        return None
    if any(o.version != opsets[""] for o in found.opset_import if not o.domain):
        return None
    return ir.serde.deserialize_model(found).graph


def _alone(node: ir.Node, opsets: Mapping[str, int], schema: Any) -> onnx.ModelProto:
    """A model of one node, with the types of what it reads and every attribute that has a default."""
    import onnx
    from onnx import helper

    proto = ir.serde.serialize_node(node)
    inputs: list[onnx.ValueInfoProto] = []
    for index, value in enumerate(node.inputs):
        if value is not None:
            found = tensor_type(value)
            proto.input[index] = f"{INPUT}{index}"
            inputs.append(helper.make_tensor_value_info(proto.input[index], int(found.dtype), found.shape))
    given = {a.name for a in proto.attribute}
    for name, attribute in schema.attributes.items():
        if name not in given and attribute.default_value.type != onnx.AttributeProto.UNDEFINED:
            proto.attribute.append(attribute.default_value)
    graph = helper.make_graph([proto], "one", inputs,
                              [helper.make_empty_tensor_value_info(str(v.name)) for v in node.outputs if v.name])
    imports = [helper.make_opsetid(name, version) for name, version in opsets.items() if name in ("", node.domain)]
    return helper.make_model(graph, opset_imports=imports)


def _written_for(proto: onnx.ModelProto, schema: Any, opset: int) -> onnx.ModelProto | None:
    """A model of one node with the function that its operator writes for it, inlined."""
    import onnx
    from onnx import inliner

    (node,) = proto.graph.node
    version = max((v for v in schema.context_dependent_function_opset_versions if v <= opset), default=None)
    if version is None:
        return None
    types = {v.name: v.type.SerializeToString() for v in proto.graph.input}
    try:
        written = schema.get_context_dependent_function_with_opset_version(
            version, node.SerializeToString(), [types.get(name, b"") for name in node.input])
    except Exception:  # the function does not exist for these types
        return None
    function = onnx.FunctionProto.FromString(written)
    if any(_since(n.op_type, version) != _since(n.op_type, opset) for n in function.node):
        return None
    function.domain = node.domain = _ALONE
    del function.opset_import[:]
    function.opset_import.extend(proto.opset_import)
    proto.opset_import.append(onnx.helper.make_opsetid(_ALONE, 1))
    proto.functions.append(function)
    return inliner.inline_local_functions(proto)


def _since(op_type: str, opset: int) -> int:
    """The version of an operator in an opset."""
    import onnx

    return onnx.defs.get_schema(op_type, opset, "").since_version
