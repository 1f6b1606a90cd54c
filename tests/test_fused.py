"""Kernels in blocks with what follows them, results in the memory of others, memory handed on: all exact."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper

import partitioner.cost
import partitioner.ops.fused as fused
import runtime.arena
import runtime.executor
import runtime.forecast
import runtime.memory
from partitioner import dialect
from partitioner.compiler import DepthFirst, compile_plan
from partitioner.cost import plan_cost
from partitioner.geometry import Box
from partitioner.lifetime import find_lifetimes
from partitioner.mesh import Mesh
from partitioner.ops.base import Call, NodeView, Operator, TensorType
from partitioner.ops.fused import PREVIOUS, Fused
from partitioner.ops.standard.conv import Conv, ConvTranspose
from partitioner.ops.standard.pointwise import Pointwise
from partitioner.ops.standard.pool import MaxPool
from runtime.arena import Arena
from runtime.forecast import forecast
from runtime.program import Compute, localise
from runtime.session import LockstepRunner
from tests.examples import one_graph


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small results are large ones: computed in blocks, in memory that is handed on."""
    monkeypatch.setattr(fused, "BLOCK", 1 << 10)
    monkeypatch.setattr(partitioner.cost, "BLOCK", 1 << 10)
    monkeypatch.setattr(runtime.forecast, "BLOCK", 1 << 10)
    for module in (runtime.arena, runtime.executor, runtime.memory):
        monkeypatch.setattr(module, "LARGE", 1 << 10)


# --- kernels ------------------------------------------------------------------------------------------


def _operator(cls: type[Operator], op_type: str, shapes: list[tuple[int, ...]], dtype: ir.DataType,
              **attributes: Any) -> Operator:
    types = tuple(TensorType(s, dtype) for s in shapes)
    return cls.read(NodeView(op_type, 22, types, (None,) * len(types), attributes, (True,)))


@dataclass(frozen=True)
class Kernel:
    """A kernel that starts a chain."""

    cls: type[Operator]
    shapes: list[tuple[int, ...]]
    attributes: dict[str, Any]


KERNELS = {
    "3x3x3": Kernel(Conv, [(1, 3, 11, 7, 9), (5, 3, 3, 3, 3), (5,)], {"pads": [1] * 6}),
    "one-sided": Kernel(Conv, [(2, 3, 11, 7, 9), (4, 3, 2, 3, 1)], {"pads": [1, 0, 2, 0, 3, 0]}),
    "strided": Kernel(Conv, [(1, 4, 23, 17), (6, 2, 3, 5), (6,)],
                      {"pads": [1, 2, 1, 2], "strides": [2, 3], "group": 2}),
    "dilated": Kernel(Conv, [(1, 2, 19, 8, 7), (3, 2, 3, 3, 2)], {"pads": [4, 0, 0, 1, 0, 1], "dilations": [3, 2, 1]}),
    "depthwise": Kernel(Conv, [(1, 6, 13, 9), (6, 1, 3, 3), (6,)], {"pads": [1] * 4, "group": 6}),
    "in the padding": Kernel(Conv, [(1, 1, 3, 4), (2, 1, 1, 1), (2,)], {"pads": [4, 0, 5, 0], "strides": [3, 1]}),
    "transposed": Kernel(ConvTranspose, [(2, 4, 5, 6, 7), (4, 3, 2, 2, 2), (3,)], {"strides": [2, 2, 2]}),
    "transposed k3": Kernel(ConvTranspose, [(1, 4, 9, 6), (4, 3, 3, 3), (3,)],
                            {"strides": [2, 2], "pads": [1, 1, 0, 0], "output_padding": [1, 0]}),
    "transposed gaps": Kernel(ConvTranspose, [(1, 2, 5, 4), (2, 3, 1, 1), (3,)], {"strides": [3, 2]}),
    "pool": Kernel(MaxPool, [(2, 3, 12, 9, 7)], {"kernel_shape": [2, 2, 2], "strides": [2, 2, 2]}),
    "overlapping pool": Kernel(MaxPool, [(1, 3, 17, 9)],
                               {"kernel_shape": [3, 3], "strides": [2, 1], "pads": [1, 1, 1, 1]}),
    "ceiling pool": Kernel(MaxPool, [(1, 3, 18, 9)], {"kernel_shape": [3, 2], "strides": [2, 2], "ceil_mode": 1}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", KERNELS)
def test_blocks_are_the_whole(name: str, dtype: torch.dtype, small_blocks: None) -> None:
    """A kernel, a factor per channel and a LeakyRelu, in blocks and one after the other; into a part of a buffer."""
    kernel = KERNELS[name]
    kind = {torch.float32: ir.DataType.FLOAT, torch.float64: ir.DataType.DOUBLE, torch.bfloat16: ir.DataType.BFLOAT16}[
        dtype]
    head = _operator(kernel.cls, kernel.cls.op_types[0], kernel.shapes, kind, **kernel.attributes)
    shape = head.outputs[0].shape
    factor = (shape[1], *(1,) * (len(shape) - 2))
    scale = _operator(Pointwise, "Mul", [shape, factor], kind)
    leaky = _operator(Pointwise, "LeakyRelu", [shape], kind, alpha=0.1)
    generator = torch.Generator().manual_seed(0)
    shapes = [*kernel.shapes, factor]
    order = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    tensors = [torch.randn(s, generator=generator).to(dtype) for s in shapes]
    tensors = [t.contiguous(memory_format=order) if t.dim() == len(shape) else t for t in tensors]
    boxes, out, count = [Box.whole(s) for s in shapes], Box.whole(shape), len(kernel.shapes)
    chain = Fused.of(head, count, 1 << 20).then(scale, [PREVIOUS, count], count).then(leaky, [PREVIOUS], count + 1)
    assert chain.in_blocks and chain.writes_into
    room = torch.full((shape[0], shape[1] + 3, *shape[2:]), float("nan"), dtype=dtype).contiguous(memory_format=order)
    with torch.inference_mode():
        (plain,) = head.run(Call(tuple(tensors[:count]), tuple(boxes[:count]), (out,)))
        expected = torch.nn.functional.leaky_relu(plain * tensors[-1], 0.1)
        chain.run(Call(tuple(tensors), tuple(boxes), (out,), room[:, 1 : 1 + shape[1]]))
        (small,) = chain.run(Call(tuple(tensors), tuple(boxes), (out,)))
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 1e-2}[dtype]
    for found in (room[:, 1 : 1 + shape[1]], small):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
    assert room[:, 0].isnan().all() and room[:, 1 + shape[1] :].isnan().all()


def test_a_pool_without_padding_has_the_bits_of_torch() -> None:
    """NaN wins, padding does not matter."""
    shape = (1, 5, 12, 9, 8)
    data = torch.randn(shape)
    data.view(-1)[::7] = float("nan")
    pool = _operator(MaxPool, "MaxPool", [shape], ir.DataType.FLOAT, kernel_shape=[2, 3, 1], strides=[2, 1, 3])
    with torch.inference_mode():
        (found,) = pool.run(Call((data,), (Box.whole(shape),), (Box.whole(pool.outputs[0].shape),)))
    expected = torch.nn.functional.max_pool3d(data, [2, 3, 1], [2, 1, 3])
    assert torch.equal(found.nan_to_num(7), expected.nan_to_num(7)) and torch.equal(found.isnan(), expected.isnan())


# --- plans --------------------------------------------------------------------------------------------


def _model(nodes: list[onnx.NodeProto], weights: dict[str, tuple[int, ...]], outputs: dict[str, tuple[int, ...]],
           shape: tuple[int, ...] = (1, 4, 23, 10, 9)) -> onnx.ModelProto:
    generator = np.random.default_rng(0)
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in outputs.items()],
        [onnx.numpy_helper.from_array(generator.standard_normal(s, dtype=np.float32), n) for n, s in weights.items()])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def _blocks(reads_parts: bool = True) -> onnx.ModelProto:
    """A residual block with a skip that is concatenated, a pool and an upsampling convolution.

    What reads the concatenation is a convolution, which needs none, or works cell by cell.
    """
    node = helper.make_node
    three: dict[str, Any] = {"kernel_shape": [3, 3, 3], "pads": [1] * 6}
    nodes = [
        node("Conv", ["x", "w1", "b1"], ["c1"], **three), node("Relu", ["c1"], ["r1"]),
        node("Conv", ["r1", "w2"], ["c2"], **three), node("Add", ["r1", "c2"], ["s2"]),
        node("LeakyRelu", ["s2"], ["r2"], alpha=0.2),
        node("Conv", ["r2", "w3"], ["c3"], kernel_shape=[3, 3, 3], pads=[1] * 6, strides=[2, 2, 2]),
        node("Sigmoid", ["c3"], ["r3"]),
        node("ConvTranspose", ["r3", "w4"], ["u4"], kernel_shape=[2, 2, 2], strides=[2, 2, 2],
             output_shape=[23, 10, 9]),
        node("Tanh", ["u4"], ["t4"]),
        node("Concat", ["t4", "r2"], ["k5"], axis=1),
        node("Conv", ["k5", "w5"], ["y"], **three) if reads_parts else node("Abs", ["k5"], ["y"]),
    ]
    weights = {"w1": (6, 4, 3, 3, 3), "b1": (6,), "w2": (6, 6, 3, 3, 3), "w3": (8, 6, 3, 3, 3), "w4": (8, 5, 2, 2, 2),
               **({"w5": (3, 11, 3, 3, 3)} if reads_parts else {})}
    return _model(nodes, weights, {"y": (1, 3 if reads_parts else 11, 23, 10, 9)})


def _reference(model: onnx.ModelProto, data: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return [np.asarray(a) for a in session.run(None, {"x": data})]


def _plan(model: onnx.ModelProto, mesh: str, order: DepthFirst | None = None) -> ir.Model:
    shape = tuple(d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim)
    return compile_plan(ir.from_proto(model), Mesh.parse(mesh), {"x": shape}, {}, order=order)


def _holds(model: onnx.ModelProto, plan: ir.Model) -> None:
    """Poisoned buffers, the arithmetic of onnxruntime."""
    shape = tuple(d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim)
    data = np.random.default_rng(1).standard_normal(shape, dtype=np.float32)
    runner = LockstepRunner(plan, poison=True)
    found = runner.run_arrays({"x": data})
    for value, expected in zip(plan.graph.outputs, _reference(model, data), strict=True):
        error = np.abs(found[str(value.name)].numpy() - expected).max()
        assert error <= 2e-6 * np.abs(expected).max()


@pytest.mark.parametrize("mesh", ["depth=1", "depth=3", "height=2", "depth=2,width=2", "depth=23"])
def test_a_network_in_blocks(mesh: str, small_blocks: None) -> None:
    """Interiors, borders, empty shards."""
    for reads_parts in (True, False):
        _holds(_blocks(reads_parts), _plan(_blocks(reads_parts), mesh))


@pytest.mark.parametrize("mesh", ["depth=1", "depth=3", "height=2"])
def test_a_network_in_small_pieces(mesh: str) -> None:
    """Nothing is large here: results are buffers, and what follows works on them."""
    _holds(_blocks(), _plan(_blocks(), mesh))


@pytest.mark.parametrize("thickness", [1, 3, 8])
def test_slabs_in_blocks(thickness: int, small_blocks: None) -> None:
    """Depth-first, with and without a mesh."""
    for mesh, reads_parts in itertools.product(("height=1", "height=2"), (True, False)):
        plan = _plan(_blocks(reads_parts), mesh, DepthFirst("depth"))
        schedule = dialect.get_schedule(plan)
        assert schedule is not None
        dialect.set_schedule(plan, replace(schedule, thickness=(thickness,) * len(schedule.thickness)))
        _holds(_blocks(reads_parts), plan)


def test_what_is_too_large_for_one_call_is_computed_in_blocks(small_blocks: None,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels that write where they are told too."""
    asked: list[tuple[int, ...]] = []
    run = fused.onednn.Kernel.run

    def noted(self: Any, data: torch.Tensor, *rest: Any) -> torch.Tensor:
        asked.append(tuple(data.shape))
        return run(self, data, *rest)

    monkeypatch.setattr(fused.onednn.Kernel, "run", noted)
    plan = _plan(_blocks(), "depth=1")
    _holds(_blocks(), plan)
    at_once = len(asked)
    monkeypatch.setattr(fused, "MOST_AT_ONCE", 1 << 12)
    _holds(_blocks(), plan)
    assert len(asked) - at_once > at_once or not fused.onednn.is_available()


def test_a_part_of_a_concatenation_is_computed_where_it_will_lie() -> None:
    """t4 is put into k5; r2 is there long before."""
    lifetimes = find_lifetimes(_plan(_blocks(reads_parts=False), "depth=1"))
    names = {n: lifetimes.buffer_of[n] for n in ("r2", "u4", "t4", "k5")}
    assert names["u4"] == names["t4"] == names["k5"] != names["r2"] and lifetimes.shifts["u4"] == ((1, 0),)


def test_what_is_fused_and_what_lies_where() -> None:
    """r1 has another reader after s2; r2 is a skip; what is made of r2 and t4 reads them where they lie."""
    plan = _plan(_blocks(), "depth=1")
    lifetimes = find_lifetimes(plan)
    names = {n: lifetimes.buffer_of[n] for n in ("c1", "r1", "c2", "s2", "r2", "c3", "r3", "u4", "t4")}
    assert names["c1"] == names["r1"] and names["c3"] == names["r3"] == "r3"
    assert names["u4"] == names["t4"] != names["r2"] == names["s2"]
    parts = [[type(p.operator).__name__ for p in step.action.operator.parts] for step in localise(plan, 0).steps
             if isinstance(step.action, Compute) and isinstance(step.action.operator, Fused)]
    assert ["Conv", "Pointwise"] in parts and ["ConvTranspose", "Pointwise"] in parts


def test_training_keeps_every_value_apart() -> None:
    plan = _plan(_blocks(), "depth=1")
    lifetimes = find_lifetimes(plan, in_place=False)
    assert not lifetimes.shifts and len(set(lifetimes.buffer_of.values())) == len(lifetimes.buffer_of)


@pytest.mark.parametrize("reader", ["skip", "view", "output", "both", "other shape"])
def test_memory_that_others_read_is_not_taken(reader: str, small_blocks: None) -> None:
    """Twins in which the result must not lie in its input's memory."""
    node = helper.make_node
    nodes = [node("Conv", ["x", "w"], ["c"], kernel_shape=[1, 1, 1])]
    outputs = {"y": (1, 4, 23, 10, 9)}
    if reader == "skip":
        nodes += [node("Relu", ["c"], ["r"]), node("Add", ["r", "c"], ["y"])]
    elif reader == "view":
        nodes += [node("Slice", ["c", "from", "to", "axes"], ["v"]), node("Relu", ["c"], ["r"]),
                  node("Pad", ["v", "pads"], ["p"]), node("Add", ["r", "p"], ["y"])]
    elif reader == "output":
        nodes += [node("Relu", ["c"], ["y"])]
        outputs["c"] = outputs["y"]
    elif reader == "both":
        nodes += [node("Mul", ["c", "c"], ["m"]), node("Relu", ["m"], ["y"])]
    else:
        nodes += [node("ReduceMean", ["c", "all"], ["m"]), node("Add", ["m", "c"], ["y"])]
    model = _model(nodes, {"w": (4, 4, 1, 1, 1)}, outputs)
    integers = {"from": [3], "to": [22], "axes": [2], "pads": [0, 0, 3, 0, 0, 0, 0, 1, 0, 0], "all": [1, 2, 3, 4]}
    used = {name for n in model.graph.node for name in n.input}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(v, np.int64), k)
                                   for k, v in integers.items() if k in used)
    _holds(model, _plan(model, "depth=1"))
    _holds(model, _plan(model, "depth=2"))


@pytest.mark.parametrize("mesh", ["depth=1", "height=2"])
def test_forecasts_agree(mesh: str, small_blocks: None) -> None:
    """What is found from boxes and what is found from the program."""
    plan = _plan(_blocks(), mesh)
    cost = plan_cost(plan)
    for rank in dialect.get_mesh(plan):
        here = forecast([localise(plan, rank)])
        assert here.peak == pytest.approx(int(cost.peak.flat[rank]), rel=0.05)
        assert max(here.turns) == here.peak and min(here.spare) == 0


# --- memory -------------------------------------------------------------------------------------------


def test_memory_is_handed_on_and_given_back() -> None:
    """To tensors of the same size, when no view of the last one is left, and never more than there is room for."""
    arena, shape = Arena(), (1, 16, 32, 64, 64)
    arena.keep(1 << 30)
    first = arena.allocate(shape, torch.float32, "channels_last")
    address, window = first.data_ptr(), first[:, :, 3:5]
    assert first.is_contiguous(memory_format=torch.channels_last_3d) and address % (2 << 20) == 0
    del first
    assert arena.kept == 0
    del window
    assert arena.kept == 4 * 16 * 32 * 64 * 64
    second = arena.allocate((1, 32, 16, 64, 64), torch.float32, "channels_last")
    assert second.data_ptr() == address and arena.kept == 0
    del second
    arena.keep(1 << 20)
    assert arena.kept == 0
    third = arena.allocate(shape, torch.float64, "channels_first")
    arena.keep(1 << 30)
    del third
    assert arena.kept == 8 * 16 * 32 * 64 * 64
    arena.keep(0)
    assert arena.kept == 0


def test_memory_stays_from_run_to_run(small_blocks: None) -> None:
    """What one run leaves the next one takes, no more than a run needs; it counts as memory of the run."""
    model = _blocks()
    plan = _plan(model, "depth=2")
    x = model.graph.input[0].type.tensor_type.shape.dim
    data = np.random.default_rng(2).standard_normal([d.dim_value for d in x], dtype=np.float32)
    runner = LockstepRunner(plan)
    first = runner.run_arrays({"x": data})
    (arena,) = {id(shard.arena): shard.arena for shard in runner._executor.shards}.values()  # pyright: ignore
    assert 0 < arena.kept <= plan_cost(plan).peak_together
    kept = arena.kept
    again = runner.run_arrays({"x": data})
    assert torch.equal(first["y"], again["y"]) and arena.kept == kept
    assert runner.report is not None and runner.report.peak_bytes >= kept


def test_small_programs_take_no_memory_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where what leaves the program is a large part of what it holds."""
    rng, cells = np.random.default_rng(3), (1, 8, 32, 40, 40)
    weights = [rng.standard_normal((8, 8, 3, 3, 3)).astype(np.float32) for _ in range(4)]
    names = ["x", "a", "b", "c", "y"]
    nodes = [helper.make_node("Conv", [have, f"w{i}"], [make], pads=[1] * 6)
             for i, (have, make) in enumerate(itertools.pairwise(names))]
    data = rng.standard_normal(cells).astype(np.float32)
    constants = {f"w{i}": w for i, w in enumerate(weights)}
    model = one_graph(nodes, {"x": data}, constants, {"y": (TensorProto.FLOAT, cells)}, 18)
    taken: list[int] = []

    class Pages(runtime.arena._Pages):  # pyright: ignore[reportPrivateUsage]
        def __init__(self, nbytes: int) -> None:
            taken.append(nbytes)
            super().__init__(nbytes)

    monkeypatch.setattr(runtime.arena, "_Pages", Pages)
    runner = LockstepRunner(_plan(model, "depth=1"))
    first = runner.run_arrays({"x": data})["y"].clone()
    runner.run_arrays({"x": data})
    before = len(taken)
    assert before and torch.equal(runner.run_arrays({"x": data})["y"], first)
    assert len(taken) == before
