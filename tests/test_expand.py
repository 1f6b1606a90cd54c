"""The expanded form: onnxruntime on every device's own nodes against onnxruntime on the whole.

The exchanges are real Slice and Concat here, so this oracle sees a missing halo; a test proves that it does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, note, settings

from partitioner import dialect
from partitioner.ops.kernels.windows import local_padding
from passes.expand import expand
from runtime.program import AllReduce, Compute, Exchange, Load, Store, localise
from tests.examples import Case, case_model, examples
from tests.models import INPUT_NAME, NETWORKS, OUTPUT_NAME
from tests.oracle import close, compile_plan, error, run_ort
from tests.strategies import Network, Style, networks
from tests.test_conformance import layouts
from tests.test_graphs import quick, thorough

Array = np.ndarray
CASES = [case for case in examples() if case.domain == ""]
COPIES = {"MaxPool", "GlobalMaxPool", "Concat", "Slice", "Pad", "Reshape", "Flatten", "Squeeze", "Unsqueeze",
          "Transpose", "Relu", "Abs", "Neg", "Identity", "Max", "Min", "ReduceMax", "ReduceMin", "Cast", "Clip",
          "Greater"}
"""Operators that only choose among the numbers given: every bit must be the same."""

by_name = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def expanded(plan: ir.Model) -> onnx.ModelProto:
    """The expanded form of a plan as the file has it; the checker must accept it, extents included."""
    proto = ir.to_proto(expand(plan))
    onnx.checker.check_model(proto, full_check=True)
    return proto


def check_case(case: Case, model: onnx.ModelProto, inputs: Mapping[str, Array], mesh: str | None,
               cuts: Mapping[str, Sequence[int]]) -> None:
    expected = run_ort(model, inputs)["y"]
    found = run_ort(expanded(compile_plan(model, mesh, cuts)), inputs)["y"]
    assert found.dtype == expected.dtype
    limit = 0.0 if case.example.op_type in COPIES else 2e-6
    same = np.array_equal(found, expected, equal_nan=found.dtype.kind == "f")
    assert same or close(found, expected, limit), f"{mesh} {cuts}: error {error(found, expected)}"


# --- every operator's examples -----------------------------------------------------------------------


@by_name
def test_examples(case: Case) -> None:
    model, inputs = case_model(case)
    chosen = list(layouts(case, next(iter(inputs.values())).shape))
    for mesh, cuts in (*chosen[1:-1][:: max(1, len(chosen) // 2)], chosen[-1]):
        check_case(case, model, inputs, mesh, cuts)


@pytest.mark.slow
@pytest.mark.parametrize("weights_given", [False, True])
@by_name
def test_examples_in_every_layout(case: Case, weights_given: bool) -> None:
    model, inputs = case_model(case, weights_given)
    for mesh, cuts in layouts(case, next(iter(inputs.values())).shape):
        check_case(case, model, inputs, mesh, cuts)


def check_opset(case: Case, opset: int) -> None:
    """An example under another opset, when that opset takes it."""
    model, inputs = case_model(case)
    model.opset_import[0].version = opset
    try:
        onnx.checker.check_model(model, full_check=True)
        run_ort(model, inputs)
    except Exception:  # the example is not of this opset, or onnxruntime lacks it
        return
    mesh, cuts = list(layouts(case, next(iter(inputs.values())).shape))[-1]
    check_case(case, model, inputs, mesh, cuts)


@pytest.mark.parametrize("opset", [9, 11, 21])
@pytest.mark.parametrize("op_type", ["Conv", "ConvTranspose", "MaxPool", "AveragePool", "Pad", "Slice", "Softmax",
                                     "ReduceSum", "InstanceNormalization", "GlobalAveragePool", "Resize", "Gemm"])
def test_opsets(op_type: str, opset: int) -> None:
    for case in CASES:
        if case.example.op_type == op_type:
            check_opset(case, opset)


@pytest.mark.slow
@pytest.mark.parametrize("opset", range(9, 24))
@by_name
def test_every_opset(case: Case, opset: int) -> None:
    check_opset(case, opset)


# --- whole networks ----------------------------------------------------------------------------------

MESHES = [
    ("unet3d-maxpool-batch-trilinear", "batch=2,depth=2,width=2"),
    ("unet3d-stride-instance", "depth=3"),
    ("unet2d-maxpool-instance-bilinear", "height=3,width=2"),
    ("unet1d-stride-instance", "batch=2,width=3"),
    ("resnet3d", "height=2,width=2"),
    ("resnet2d-instance", "height=4"),
]


@pytest.mark.parametrize(("name", "mesh"), MESHES, ids=[name for name, _ in MESHES])
def test_exported_networks(name: str, mesh: str, tmp_path: Path) -> None:
    network = NETWORKS[name]
    model = onnx.load(network.export(tmp_path / "model.onnx"))
    inputs = {INPUT_NAME: np.random.default_rng(3).standard_normal(network.shape).astype(np.float32)}
    plan = compile_plan(model, mesh)
    proto = expanded(plan)
    expected, found = run_ort(model, inputs)[OUTPUT_NAME], run_ort(proto, inputs)[OUTPUT_NAME]
    assert close(found, expected, 1e-5), error(found, expected)
    check_programs(plan, proto)


def check_network(network: Network) -> None:
    note(str(network))
    plan = compile_plan(network.model, network.mesh, network.cuts)
    proto = expanded(plan)
    runtime, found = run_ort(network.model, network.inputs), run_ort(proto, network.inputs)
    for name, expected in network.expected.items():
        limit = max(3 * error(runtime[name], expected), 1e-5)
        assert close(found[name], expected, limit), f"{name}: error {error(found[name], expected)}, limit {limit}"
    inferred = not any(n.domain or n.op_type == "GroupNormalization" or len(n.output) > 1
                       for n in network.model.graph.node)
    if inferred:  # onnx finds extents of these operators alone
        check_programs(plan, proto)


def check_integers(network: Network) -> None:
    note(str(network))
    found = run_ort(expanded(compile_plan(network.model, network.mesh, network.cuts)), network.inputs)
    for name, expected in network.expected.items():
        assert np.array_equal(found[name], expected), name


@settings(quick, max_examples=80)
@given(networks(Style(runtime=True, steps=5)))
def test_graphs(network: Network) -> None:
    check_network(network)


@settings(quick, max_examples=60)
@given(networks(Style(integers=True, runtime=True, steps=5)))
def test_graphs_of_integers(network: Network) -> None:
    check_integers(network)


@pytest.mark.slow
@pytest.mark.timeout(0)
@thorough
@given(networks(Style(runtime=True)))
def test_many_graphs(network: Network) -> None:
    check_network(network)


@pytest.mark.slow
@pytest.mark.timeout(0)
@thorough
@given(networks(Style(integers=True, runtime=True)))
def test_many_graphs_of_integers(network: Network) -> None:
    check_integers(network)


# --- the programs of the runtime against the devices' nodes ----------------------------------------------


def check_programs(plan: ir.Model, proto: onnx.ModelProto) -> None:
    """Every rank's program has the extents, pads and peers of that device's nodes."""
    devices = Devices(proto)
    for rank in dialect.get_mesh(plan):
        for step in localise(plan, rank, overlaps=False).steps:  # a step for every node, none joined to another
            if isinstance(step.action, Compute):
                check_compute(devices, plan, step.action, rank)
            elif isinstance(step.action, Exchange):
                check_exchange(devices, plan, step.action, rank)
            elif isinstance(step.action, AllReduce):
                check_all_reduce(devices, step.action, rank)
            else:
                assert isinstance(step.action, Load | Store)


class Devices:
    """An expanded model: its nodes by device, and extents as onnx infers them from the inputs alone."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        bare = onnx.ModelProto()
        bare.CopyFrom(proto)
        del bare.graph.value_info[:]
        inferred = onnx.shape_inference.infer_shapes(bare, strict_mode=True, data_prop=True).graph
        self.weights = {t.name for t in proto.graph.initializer}
        self.shapes = {v.name: extents(v) for v in (*inferred.input, *inferred.value_info, *inferred.output)}
        self.nodes = {n.name: n for n in proto.graph.node}

    def shard(self, name: str, rank: int) -> str:
        """A device's tensor; a device that holds all of an input reads the input itself."""
        return f"{name}@{rank}" if f"{name}@{rank}" in self.shapes else name

    def group(self, name: str) -> list[onnx.NodeProto]:
        """All nodes that stand for one node of the plan on one device."""
        return [n for key, n in self.nodes.items() if key == name or key.startswith(name + "/")]

    def reads(self, name: str) -> list[tuple[int, ...]]:
        """Extents of what comes into a group from outside it."""
        group = self.group(name)
        made = {o for n in group for o in n.output} | self.weights | {""}
        return [self.shapes[i] for i in dict.fromkeys(i for n in group for i in n.input if i not in made)]

    def results(self, name: str) -> list[tuple[int, ...]]:
        """Extents of what leaves a group."""
        group = self.group(name)
        read = {i for n in group for i in n.input}
        return [self.shapes[o] for n in group for o in n.output if o not in read]


def extents(value: onnx.ValueInfoProto) -> tuple[int, ...]:
    return tuple(d.dim_value for d in value.type.tensor_type.shape.dim)


def check_compute(devices: Devices, plan: ir.Model, action: Compute, rank: int) -> None:
    name = f"{action.name}@{rank}"
    outs = [w.box.shape for w in action.writes]
    partial = next(bool(dialect.get_partial(n)) for n in plan.graph if n.name == action.name)
    if any(0 in shape for shape in outs) or (partial and not reads_cells(action)):
        assert not devices.group(name), f"{name} computes nothing and has nodes"
        return
    assert devices.results(name) == outs, name
    weights = {str(v.name): dialect.shape_of(v) for v in plan.graph.initializers.values()}
    reads = {w.box.shape for w in action.reads
             if w is not None and w.box and w.box.shape != weights.get(w.buffer)}
    assert set(devices.reads(name)) == reads, name
    main = devices.nodes[name]
    windows = getattr(action.operator, "windows", None)
    if main.op_type in ("Conv", "MaxPool", "AveragePool") and len(devices.group(name)) == 1:
        assert windows is not None and action.reads[0] is not None
        held, outs_ = (w.box.intervals()[2:] for w in (action.reads[0], action.writes[0]))
        pairs = [local_padding(*three) for three in zip(windows, held, outs_, strict=True)]
        pads = next((list(a.ints) for a in main.attribute if a.name == "pads"), [0] * (2 * len(pairs)))
        assert pads == [lo for lo, _ in pairs] + [hi for _, hi in pairs], name


def reads_cells(action: Compute) -> bool:
    return any(window is not None and bool(window.box) for window in action.reads[:1])


def check_exchange(devices: Devices, plan: ir.Model, action: Exchange, rank: int) -> None:
    name = f"{action.name}@{rank}"
    source, target = next((n.inputs[0], n.outputs[0]) for n in plan.graph if n.name == action.name)
    box = dialect.get_layout(target).box(dialect.get_mesh(plan).coordinates(rank))
    if not box:
        assert name not in devices.nodes and not action.receives
        return
    peers = [m.peer for m in action.receives]
    own = [rank] if action.source.box & box else []
    assert list(devices.nodes[name].input) == [devices.shard(str(source.name), r) for r in (*own, *peers)], name
    assert devices.results(name) == [box.shape], name


def check_all_reduce(devices: Devices, action: AllReduce, rank: int) -> None:
    name = f"{action.name}@{rank}"
    if any(0 in w.box.shape for w in action.targets):
        assert not devices.group(name), name
        return
    assert devices.results(name) == [w.box.shape for w in action.targets], name
    # one step per mesh axis, less those where the whole group holds nothing yet
    assert 1 <= len(devices.group(name)) <= len(action.groups), name
