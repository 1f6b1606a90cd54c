"""The unpartitioned model in onnxruntime: what a plan's results are compared with."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as library

from partitioner.errors import PartitionError
from partitioner.loader import save_model

if TYPE_CHECKING:
    from numpy.typing import NDArray


def run_onnxruntime(model: ir.Model, arrays: Mapping[str, Any]) -> dict[str, NDArray[Any]] | None:
    """Whole outputs of a plain model on the CPU; None where onnxruntime lacks kernels for the element type.

    Raises:
        PartitionError: when onnxruntime refuses the model.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    with tempfile.TemporaryDirectory(prefix="partitioner-") as folder:
        path = Path(folder) / "model.onnx"
        save_model(model, path)
        try:
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            if "NOT_IMPLEMENTED" in str(error) or "Could not find an implementation" in str(error):
                return None
            line = str(error).strip().splitlines()[0]
            raise PartitionError(f"onnxruntime cannot load the unpartitioned model: {line[:200]}") from None
        names = [output.name for output in session.get_outputs()]
        taken = {value.name for value in session.get_inputs()}
        results: Any = session.run(None, {name: array for name, array in arrays.items() if name in taken})
    return dict(zip(names, results, strict=True))


def with_exact_statistics(model: ir.Model) -> ir.Model | None:
    """The same model, its float32 instance norms written out in float64; None when it has none.

    onnxruntime adds up the statistics of InstanceNormalization in float32: over large volumes with a uniform
    background its result is off by up to 1e-3 of the range.
    """
    found = model.clone()
    if found.functions:
        library.InlinePass()(found)
        found.functions.clear()
    nodes = [n for n in found.graph if n.op_type == "InstanceNormalization" and n.domain in ("", "ai.onnx")]
    for node in nodes:
        _write_out(found, node)
    return found if nodes else None


def _write_out(model: ir.Model, node: ir.Node) -> None:
    """(x - mean) / sqrt(variance + epsilon) * scale + bias, all but the last two steps in float64."""
    x, scale, bias = node.inputs
    assert x is not None and scale is not None and bias is not None
    writer = _Writer(model, str(node.outputs[0].name))
    rank = _rank(node)
    axes = list(range(2, rank))
    wide = writer.op("Cast", x, to=int(ir.DataType.DOUBLE))
    centred = writer.op("Sub", wide, writer.mean(wide, axes))
    variance = writer.mean(writer.op("Mul", centred, centred), axes)
    epsilon = writer.constant(np.asarray(node.attributes.get_float("epsilon", 1e-5), np.float64))
    deviation = writer.op("Sqrt", writer.op("Add", variance, epsilon))
    normal = writer.op("CastLike" if writer.opset >= 15 else "Cast", writer.op("Div", centred, deviation),
                       *([x] if writer.opset >= 15 else []), **({} if writer.opset >= 15 else {"to": 1}))
    columns = writer.constant(np.array([-1] + [1] * (rank - 2), np.int64))
    scaled = writer.op("Mul", normal, writer.op("Reshape", scale, columns))
    result = writer.op("Add", scaled, writer.op("Reshape", bias, columns))
    for made in writer.nodes:
        model.graph.insert_before(node, made)
    old = node.outputs[0]
    result.shape, result.type = old.shape, old.type
    old.replace_all_uses_with(result, replace_graph_outputs=True)
    model.graph.remove(node, safe=True)
    result.name = old.name


def _rank(node: ir.Node) -> int:
    """Axes of a norm's input: the file's annotation, or what its neighbours tell."""
    for value in (node.inputs[0], node.outputs[0]):
        if value is not None and value.shape is not None:
            return len(value.shape)
    producer = node.inputs[0].producer() if node.inputs[0] is not None else None
    weight = producer.inputs[1] if producer is not None and producer.op_type.startswith("Conv") else None
    if weight is not None and weight.shape is not None:
        return len(weight.shape)
    raise PartitionError(f"{node.name} (InstanceNormalization): the file does not tell the rank of its input; "
                         "run onnx.shape_inference on it")


class _Writer:
    """Makes nodes with names of their own, in the opset of a model."""

    def __init__(self, model: ir.Model, prefix: str) -> None:
        self.opset = model.graph.opset_imports.get("", model.graph.opset_imports.get("ai.onnx", 1))
        self.prefix = prefix
        self.nodes: list[ir.Node] = []

    def op(self, op_type: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        name = f"{self.prefix}/exact{len(self.nodes)}"
        node = ir.Node("", op_type, inputs, ir.convenience.convert_attributes(attributes),
                       outputs=[ir.Value(name=name)], name=name)
        self.nodes.append(node)
        return node.outputs[0]

    def constant(self, array: NDArray[Any]) -> ir.Value:
        return self.op("Constant", value=ir.tensor(array))

    def mean(self, x: ir.Value, axes: list[int]) -> ir.Value:
        if self.opset < 18:
            return self.op("ReduceMean", x, axes=axes, keepdims=1)
        return self.op("ReduceMean", x, self.constant(np.array(axes, np.int64)), keepdims=1)
