"""The operators' own examples as one-node ONNX models with data."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from partitioner.ops import registered
from partitioner.ops.base import Array, Example
from tests.reference import evaluate

WEIGHTED = {"ConvInteger", "QLinearConv",
            "Conv", "ConvTranspose", "BatchNormalization", "InstanceNormalization", "Gemm"}
"""Operators whose inputs after the first are weights: initialisers in every exported file."""


@dataclass(frozen=True)
class Case:
    """An example of one operator, numbered."""

    name: str
    domain: str
    example: Example


def examples() -> Iterator[Case]:
    """Every example of every registered class, once."""
    for cls in sorted({cls for _, _, cls in registered()}, key=lambda cls: (cls.domain, cls.__name__)):
        for index, example in enumerate(cls.examples):
            yield Case(f"{example.op_type}-{index}", cls.domain, example)


def case_data(case: Case) -> list[Array | None]:
    """An array per input, drawn from the case's name."""
    random = np.random.default_rng(zlib.crc32(case.name.encode()))
    return [_array(given, case.example, random) for given in case.example.inputs]


def _array(given: tuple[int, ...] | Array | None, example: Example, random: np.random.Generator) -> Array | None:
    if not isinstance(given, tuple):
        return None if given is None else np.asarray(given)
    kind = example.dtype.numpy()
    if kind == np.bool_:
        return random.integers(0, 2, given).astype(bool)
    if kind.kind in "iu":
        return random.integers(1, 9, given).astype(kind)
    return random.uniform(*example.between, given).astype(kind)


def case_model(case: Case, weights_given: bool = False) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """A model of one node, and its inputs.

    Args:
        weights_given: let weights be inputs of the model too, instead of initialisers.
    """
    example, arrays = case.example, case_data(case)
    names = ["" if array is None else f"x{i}" for i, array in enumerate(arrays)]
    fed = {name: array for i, (name, array) in enumerate(zip(names, arrays, strict=True))
           if array is not None and isinstance(example.inputs[i], tuple)
           and (i == 0 or weights_given or example.op_type not in WEIGHTED)}
    constants = {name: array for name, array in zip(names, arrays, strict=True) if name and name not in fed}
    outputs = ["y", *(f"y{i}" for i in range(1, example.outputs))]
    node = helper.make_node(example.op_type, names, outputs, "node", domain=case.domain, **example.attributes)
    results = evaluate(node, example.opset, arrays)[: example.checked]
    described = {name: (_output_type(node, result, arrays), result.shape)
                 for name, result in zip(outputs, results, strict=False)}
    return one_graph([node], fed, constants, described, example.opset, case.domain), fed


def one_graph(nodes: list[onnx.NodeProto], inputs: Mapping[str, Array], constants: Mapping[str, Array],
              outputs: Mapping[str, tuple[int, tuple[int, ...]]], opset: int, domain: str = "") -> onnx.ModelProto:
    """A model from nodes and arrays."""
    graph = helper.make_graph(
        nodes, "graph",
        [helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
         for n, a in inputs.items()],
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in outputs.items()],
        [numpy_helper.from_array(np.ascontiguousarray(a).reshape(a.shape), n) for n, a in constants.items()])
    imports = [helper.make_opsetid("", opset), *([helper.make_opsetid(domain, 1)] if domain else [])]
    return helper.make_model(graph, opset_imports=imports, ir_version=8 if opset < 24 else 12)


def _output_type(node: onnx.NodeProto, result: Array, arrays: list[Array | None]) -> int:
    if node.op_type == "Cast":
        return next(a.i for a in node.attribute)
    if result.dtype.kind == "f" and node.op_type != "CastLike":
        return TensorProto.FLOAT
    return helper.np_dtype_to_tensor_dtype(result.dtype)
