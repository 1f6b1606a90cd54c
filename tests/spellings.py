"""Graphs in which a layer may be written out in several nodes, and what must hold of them.

Every spelling is compared with onnxruntime on the model as it was: canonicalised, expanded, and in lock-step on
uneven and empty shards, where nothing may be gathered; in float64 with the reference, to 1e-12.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx
import onnx_ir as ir
from onnx import parser

from partitioner.loader import load_model
from partitioner.ops.nodes import operator_of, tensor_type
from passes.canonicalize import Canonicalize
from passes.expand import expand
from passes.pipeline import Pipeline
from tests.examples import one_graph
from tests.oracle import as_double, close, compile_plan, error, reference64, run_lockstep, run_ort
from tests.test_architectures import whole_results

Array = np.ndarray
MESHES: list[tuple[str, dict[str, tuple[int, ...]]]] = [
    ("height=2", {"height": (0, 3, 9)}), ("height=3,width=2", {"height": (0, 4, 4, 9)}), ("batch=2,width=2", {})]
LINE_MESHES: list[tuple[str, dict[str, tuple[int, ...]]]] = [("width=3", {"width": (0, 2, 2, 8)})]


def random(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).uniform(0.5, 1.5, shape).astype(np.float32)


def numbers(*values: float) -> Array:
    return np.asarray(values if len(values) != 1 else values[0], np.float32)


def integers(*values: int) -> Array:
    return np.asarray(values, np.int64)


@dataclass(frozen=True)
class Spelling:
    """A graph from x to y in onnx's text form.

    Args:
        lines: its nodes.
        constants: its constants.
        becomes: the operators after canonicalize; None: those of `lines`, in order.
        opset: and of these the newest that the lines are valid in.
        shape: extents of x.
        local: whether nothing need be gathered.
    """

    lines: Sequence[str]
    constants: Mapping[str, Array]
    becomes: Sequence[str] | None = None
    opset: int = 17
    shape: tuple[int, ...] = (2, 6, 9, 7)
    local: bool = True
    outputs: Sequence[str] = ("y",)
    fold_norms: bool = True
    others: Mapping[str, Array] = field(default_factory=dict)

    def model(self) -> onnx.ModelProto:
        nodes = [parser.parse_node(line) for line in self.lines]
        found = one_graph(nodes, self.inputs, self.constants, dict.fromkeys(self.outputs, (1, ())), self.opset)
        for output in found.graph.output:
            output.type.tensor_type.ClearField("shape")
        return found

    @property
    def inputs(self) -> dict[str, Array]:
        drawn = np.random.default_rng(5).standard_normal(self.shape).astype(np.float32)
        return {"x": drawn * np.float32(2) + np.float32(0.5), **self.others}

    @property
    def operators(self) -> list[str]:
        """What canonicalize must leave."""
        return list(self.becomes) if self.becomes is not None else [parser.parse_node(v).op_type for v in self.lines]


def canonical(model: onnx.ModelProto, fold_norms: bool = True) -> ir.Model:
    return Pipeline((Canonicalize({}, fold_norms=fold_norms),)).run(load_model(model))


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def check(spelling: Spelling) -> None:
    """The operators found, and the results in every form."""
    model, inputs = spelling.model(), spelling.inputs
    expected = run_ort(model, inputs)
    read = canonical(model, spelling.fold_norms)
    assert operators(read) == spelling.operators
    check_form(read, spelling.outputs)
    check_results(run_ort(ir.to_proto(read), inputs), expected)
    if spelling.fold_norms:
        check_shards(model, inputs, expected, spelling.local)


def check_form(model: ir.Model, outputs: Sequence[str]) -> None:
    """Names are unique, the outputs keep theirs, onnx's checker accepts it."""
    nodes = list(model.graph)
    values = [v.name for v in (*model.graph.inputs, *model.graph.initializers.values())]
    values += [v.name for node in nodes for v in node.outputs if v.name]
    assert len(set(values)) == len(values) and len({node.name for node in nodes}) == len(nodes)
    assert [v.name for v in model.graph.outputs] == list(outputs)
    results = [v for node in nodes for v in node.outputs if v.name]
    assert all(v.shape is not None and v.shape.is_static() and v.dtype for v in results)
    assert all(operator_of(v.producer()).outputs[v.index()] == tensor_type(v) for v in results)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


def check_results(found: Mapping[str, Array], expected: Mapping[str, Array], limit: float = 4e-6) -> None:
    for name, array in expected.items():
        assert close(found[name], array, limit), (name, error(found[name], array))


def check_shards(model: onnx.ModelProto, inputs: Mapping[str, Array], expected: Mapping[str, Array],
                 local: bool = True, meshes: Sequence[tuple[str, Mapping[str, tuple[int, ...]]]] | None = None) -> None:
    """Lock-step runs against onnxruntime, in float64 against the reference; the expanded form once."""
    double = as_double(model)
    wide = {k: v.astype(np.float64) if v.dtype == np.float32 else v for k, v in inputs.items()}
    exact = reference64(double, wide)
    x = inputs["x"]
    if meshes is None:
        meshes = MESHES if x.ndim > 3 else LINE_MESHES
    for mesh, cuts in meshes:
        plan = compile_plan(model, mesh, cuts)
        check_results(run_lockstep(plan, inputs).outputs, expected)
        check_results(run_lockstep(compile_plan(double, mesh, cuts), wide).outputs, exact, 1e-12)
        assert not local or not whole_results(plan), mesh
    for mesh, cuts in {str(m): m for m in (meshes[0], meshes[-1])}.values():
        plan = compile_plan(model, mesh, cuts)
        onnx.checker.check_model(ir.to_proto(plan), full_check=True)
        check_results(run_ort(ir.to_proto(plan), inputs), expected)
        check_results(run_ort(ir.to_proto(expand(plan)), inputs), expected)


def changed(spelling: Spelling, line: int | None = None, text: str = "", **fields: object) -> Spelling:
    """A twin: one line replaced, or other fields; expected to stay as it is."""
    lines = list(spelling.lines)
    if line is not None:
        lines[line] = text
    return replace(spelling, **{"lines": lines, "becomes": None, **fields})
