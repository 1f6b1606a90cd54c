"""One test per mistake that was found elsewhere: wrong answers without an error.

The numbers are those of the list of such mistakes that this project started from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from partitioner import dialect
from partitioner.cost import plan_cost
from partitioner.errors import PartitionError
from partitioner.exchange import plan_exchange
from partitioner.layout import parse_layout
from partitioner.mesh import Mesh
from passes.checks import MET
from runtime.program import localise
from runtime.transports import Job, Parcel
from runtime.transports.lockstep import Lockstep
from tests.oracle import as_double, close, compile_plan, error, reference64, run_lockstep, run_ort

RANDOM = np.random.default_rng(7)


def random(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


def model(nodes: Sequence[onnx.NodeProto], shape: Sequence[int], weights: Mapping[str, np.ndarray] | None = None,
          opset: int = 18) -> onnx.ModelProto:
    """A graph from `x` to `y`."""
    graph = helper.make_graph(
        list(nodes), "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()])
    found = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    found.ir_version = 8
    return found


def node(op_type: str, inputs: str, output: str = "y", **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op_type, inputs.split(), [output], f"{op_type.lower()}_{output}", **attributes)


def check(found: onnx.ModelProto, shape: Sequence[int], mesh: str, cuts: Mapping[str, Sequence[int]] | None = None,
          data: np.ndarray | None = None) -> Any:
    """float64 against the reference below 1e-12, float32 against onnxruntime; returns the plan."""
    x = random(*shape) if data is None else data
    wide = {"x": x.astype(np.float64)}
    expected = reference64(found, wide)["y"]
    double = run_lockstep(compile_plan(as_double(found), mesh, cuts), wide).outputs["y"]
    assert close(double, expected, 1e-12), error(double, expected)
    plan = compile_plan(found, mesh, cuts)
    single = run_lockstep(plan, {"x": x}).outputs["y"]
    assert close(single, expected, max(1e-5, 3 * error(run_ort(found, {"x": x})["y"], expected)))
    return plan


def test_01_every_operator_sees_its_neighbours() -> None:
    nodes = [node("MaxPool", "x", "a", kernel_shape=[3, 3], pads=[1] * 4),
             node("InstanceNormalization", "a s b", "c"),
             node("Resize", "c  k", "y", mode="linear")]
    weights = {"s": random(2), "b": random(2), "k": np.array([1, 1, 2.0, 1.5], np.float32)}
    nodes[2].input[:] = ["c", "", "k"]
    check(model(nodes, (1, 2, 11, 7), weights), (1, 2, 11, 7), "height=3,width=2")


@pytest.mark.parametrize("op_type", ["InstanceNormalization", "GlobalAveragePool", "ReduceMean", "Softmax"])
def test_02_statistics_cover_all_shards(op_type: str) -> None:
    inputs = "x s b" if op_type == "InstanceNormalization" else "x"
    extra = {"axis": 2} if op_type == "Softmax" else {}
    shape = (2, 3, 11, 5)
    check(model([node(op_type, inputs, **extra)], shape, {"s": random(3), "b": random(3)}), shape, "height=3",
          {"height": (0, 1, 7, 11)})


def test_03_nothing_is_gathered_for_a_convolution() -> None:
    plan = check(model([node("Conv", "x w", pads=[1] * 6)], (1, 2, 9, 7, 8), {"w": random(3, 2, 3, 3, 3)}),
                 (1, 2, 9, 7, 8), "depth=3")
    assert [n.op_type for n in plan.graph] == [dialect.HALO_EXCHANGE, "Conv"]


def test_03_memory_per_rank_is_its_share_and_its_halos() -> None:
    shape = (1, 4, 32, 7, 8)
    found = model([node("Conv", "x w", pads=[1] * 6)], shape, {"w": random(4, 4, 3, 3, 3)})
    cell = 4 * 7 * 8 * 4
    for ranks in (1, 2, 4, 8):
        peak = plan_cost(compile_plan(found, f"depth={ranks}")).peak
        halos = {1: 0, 2: 1}.get(ranks, 2)
        assert peak.max() <= cell * (2 * 32 // ranks + 3 * halos), "input, output, halo and its messages"


def test_04_stride_phase_goes_on_over_the_cut() -> None:
    found = model([node("Conv", "x w", strides=[2], pads=[1, 1])], (1, 1, 18), {"w": random(1, 1, 3)})
    plan = check(found, (1, 1, 18), "width=2")
    assert dialect.shape_of(plan.graph.outputs[0]) == (1, 1, 9)


def test_05_extents_are_not_floored_per_shard() -> None:
    plan = check(model([node("MaxPool", "x", kernel_shape=[2], strides=[2])], (1, 1, 18)), (1, 1, 18), "width=2")
    assert dialect.shape_of(plan.graph.outputs[0]) == (1, 1, 9)


@pytest.mark.parametrize("built", [
    node("ConvTranspose", "x w", strides=[3], output_padding=[2], pads=[1, 0]),
    node("MaxPool", "x", kernel_shape=[3], strides=[2], pads=[0, 1], ceil_mode=1),
    node("MaxPool", "x", kernel_shape=[3], dilations=[2], pads=[2, 1]),
    node("AveragePool", "x", kernel_shape=[3], strides=[2], pads=[1, 1], ceil_mode=1, count_include_pad=1),
    node("AveragePool", "x", kernel_shape=[3], strides=[2], pads=[1, 1], count_include_pad=0),
    node("Resize", "x  s", mode="linear", coordinate_transformation_mode="align_corners"),
    node("Resize", "x  s", mode="linear", coordinate_transformation_mode="half_pixel"),
    node("Resize", "x  s", mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="ceil"),
], ids=lambda n: n.op_type)
def test_06_every_parameter_is_read(built: onnx.NodeProto) -> None:
    weights = {"w": random(2, 3, 3), "s": np.array([1, 1, 2.3], np.float32)}
    if built.op_type == "Resize":
        built.input[:] = ["x", "", "s"]
    check(model([built], (1, 2, 10), weights), (1, 2, 10), "width=3", {"width": (0, 2, 3, 10)})


def test_07_the_adjoint_of_a_halo_adds_where_it_came_from() -> None:
    """Two ranks of 4 + 5 cells with halos of 1 and 2: gradients of copies return to their one owner."""
    exchange = plan_exchange(Mesh.parse("width=2"), parse_layout("[width(0|4|9)]"), parse_layout("[width(0:6 3:9)]"))
    back = [exchange.for_rank(rank).adjoint() for rank in (0, 1)]
    gradients = [np.array([1, 1, 1, 1, 10, 10]), np.array([100, 1, 1, 1, 1, 1])]  # of cells 0:6 and 3:9
    owned = [gradients[0][:4].copy(), gradients[1][1:].copy()]
    for transfer in back[0].receives:
        cells = transfer.box.axes[0][0]
        owned[0][cells.start : cells.stop] += gradients[1][cells.start - 3 : cells.stop - 3]
    for transfer in back[1].receives:
        cells = transfer.box.axes[0][0]
        owned[1][cells.start - 4 : cells.stop - 4] += gradients[0][cells.start : cells.stop]
    assert owned[0].tolist() == [1, 1, 1, 101]
    assert owned[1].tolist() == [11, 11, 1, 1, 1]


def test_08_halos_of_several_layers_stay_zero_outside_the_image() -> None:
    nodes = [node("Conv", "x w b", "a", pads=[2, 2]), node("Conv", "a v b", "c", pads=[2, 2]),
             node("Conv", "c v b", "y", pads=[2, 2])]
    weights = {"w": random(2, 1, 5), "v": random(2, 2, 5), "b": random(2)}
    check(model(nodes, (1, 1, 9), weights), (1, 1, 9), "width=4", {"width": (0, 1, 2, 3, 9)})


def test_09_padding_never_wins_a_maximum_nor_counts_in_a_mean() -> None:
    data = -1 - np.abs(random(1, 1, 9))
    check(model([node("MaxPool", "x", kernel_shape=[3], pads=[1, 1])], (1, 1, 9)), (1, 1, 9), "width=3", data=data)
    check(model([node("AveragePool", "x", kernel_shape=[4], pads=[3, 3])], (1, 1, 9)), (1, 1, 9), "width=3", data=data)


def test_10_variance_at_a_large_mean() -> None:
    data = random(1, 2, 33, 31) + 1000
    found = model([node("InstanceNormalization", "x s b")], data.shape, {"s": np.ones(2, "f"), "b": np.zeros(2, "f")})
    expected = reference64(found, {"x": data.astype(np.float64)})["y"]
    result = run_lockstep(compile_plan(found, "height=3,width=2"), {"x": data}).outputs["y"]
    assert error(result, expected) < 5e-5


def test_11_corners_arrive() -> None:
    found = model([node("Conv", "x w", pads=[1] * 6)], (1, 1, 5, 6, 7), {"w": random(1, 1, 3, 3, 3)})
    check(found, (1, 1, 5, 6, 7), "depth=2,height=2,width=2")


def test_12_mistakes_are_found_before_any_rank_starts() -> None:
    found = model([node("Conv", "x w", pads=[1, 1])], (1, 1, 4), {"w": random(1, 1, 3)})
    with pytest.raises(PartitionError, match="only 4 cells"):
        compile_plan(found, "width=5")


def test_13_what_is_not_supported_is_refused_by_name_all_at_once() -> None:
    nodes = [node("NonZero", "x", "a"), node("Cast", "a", "c", to=TensorProto.FLOAT), node("Bernoulli", "c", "y")]
    with pytest.raises(PartitionError) as caught:
        compile_plan(model(nodes, (1, 1, 4)), "width=2")
    assert "nonzero_a (NonZero)" in str(caught.value) and "bernoulli_y (Bernoulli)" in str(caught.value)


class Forgetful(Lockstep):
    """A transport that loses one message."""

    def __init__(self, size: int, lost: int) -> None:
        super().__init__(size)
        self.lost = lost

    def exchange(self, jobs: Sequence[Job]) -> None:
        kept = []
        for job in jobs:
            receives = []
            for parcel in job.receives:
                self.lost -= 1
                arrives = tuple(torch.empty_like(v).fill_(float("nan")) for v in parcel.views)
                receives.append(parcel if self.lost != -1 else Parcel(parcel.peer, arrives))
            kept.append(Job(job.rank, job.sends, tuple(receives)))
        super().exchange(kept)


def test_14_tests_can_fail_a_lost_message_is_seen() -> None:
    """Of eight ranks' messages, each one that is lost leaves NaN in the result: the poison works."""
    shape = (1, 1, 4, 6, 5)
    plan = compile_plan(model([node("Conv", "x w", pads=[1] * 6)], shape, {"w": random(1, 1, 3, 3, 3)}),
                        "depth=2,height=2,width=2")
    x = {"x": random(*shape)}
    count = int(run_lockstep(plan, x).messages.sum())
    assert count == 8 * 7
    for lost in range(0, count, 5):
        result = run_lockstep(plan, x, transport=Forgetful(8, lost)).outputs["y"]
        assert np.isnan(result).any(), f"message {lost} was not missed"


def test_14_tests_can_fail_a_missing_exchange_is_seen() -> None:
    """A halo exchange that a pass forgot is found by the passes' check, and by the run."""
    shape = (1, 1, 9, 7)
    plan = compile_plan(model([node("Conv", "x w", pads=[1] * 4)], shape, {"w": random(1, 1, 3, 3)}), "height=2")
    convolution = next(n for n in plan.graph if n.op_type == "Conv")
    exchange = convolution.inputs[0].producer()
    assert exchange is not None and exchange.op_type == dialect.HALO_EXCHANGE
    assert not list(MET.problems(plan))
    convolution.replace_input_with(0, exchange.inputs[0])
    plan.graph.remove(exchange, safe=True)
    assert list(MET.problems(plan)), "the check of the passes"
    with pytest.raises(ValueError, match="are not among"):
        run_lockstep(plan, {"x": random(*shape)})


def test_an_empty_shard_is_no_special_case() -> None:
    nodes = [node("Conv", "x w", "a", strides=[4], pads=[1, 1]), node("InstanceNormalization", "a s b", "c"),
             node("ConvTranspose", "c w", "y", strides=[4])]
    weights = {"w": random(1, 1, 3), "s": random(1), "b": random(1)}
    check(model(nodes, (1, 1, 13), weights), (1, 1, 13), "width=5", {"width": (0, 1, 2, 2, 3, 13)})


def test_15_ranks_are_those_of_the_mesh() -> None:
    mesh = Mesh.parse("batch=2,width=3")
    assert [mesh.coordinates(r)["width"] for r in mesh] == [0, 1, 2, 0, 1, 2]
    found = model([node("InstanceNormalization", "x s b")], (2, 2, 7), {"s": random(2), "b": random(2)})
    check(found, (2, 2, 7), "batch=2,width=3")


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER"])
def test_16_same_padding_minds_the_dilation(auto_pad: str) -> None:
    found = model([node("Conv", "x w", auto_pad=auto_pad, dilations=[3])], (1, 1, 11), {"w": random(1, 1, 3)})
    pads = [3, 3]
    explicit = model([node("Conv", "x w", pads=pads, dilations=[3])], (1, 1, 11), {"w": found.graph.initializer[0] and
                     numpy_helper.to_array(found.graph.initializer[0])})
    x = {"x": random(1, 1, 11)}
    result = run_lockstep(compile_plan(found, "width=3"), x).outputs["y"]
    assert error(result, run_ort(explicit, x)["y"]) < 1e-6


def test_17_messages_along_the_first_spatial_axis_are_dense() -> None:
    """A transport that takes only dense memory can send channels-last slabs as they lie."""
    shape = (1, 8, 9, 6, 5)
    plan = compile_plan(model([node("Conv", "x w", pads=[1] * 6)], shape, {"w": random(2, 8, 3, 3, 3)}), "depth=3")
    seen: list[bool] = []

    class Watching(Lockstep):
        def exchange(self, jobs: Sequence[Job]) -> None:
            seen.extend(v.is_contiguous() for job in jobs for p in (*job.sends, *job.receives) for v in p.views)
            super().exchange(jobs)

    run_lockstep(plan, {"x": random(*shape)}, transport=Watching(3))
    assert len(seen) == 8 and all(seen)


def test_18_axes_that_are_not_split_move_nothing_and_hold_nothing_more() -> None:
    shape = (1, 3, 8, 6, 5)
    found = model([node("Conv", "x w", pads=[1] * 6)], shape, {"w": random(2, 3, 3, 3, 3)})
    plan = compile_plan(found, "depth=2")
    run = run_lockstep(plan, {"x": random(*shape)})
    assert run.sent.tolist() == [3 * 6 * 5 * 4] * 2, "one plane per face"
    assert run.messages.tolist() == [1, 1]
    buffers = localise(plan, 0).buffers.values()
    assert sorted(b.box.shape for b in buffers) == [(1, 2, 4, 6, 5), (1, 3, 5, 6, 5)], "no padding is stored"


def test_20_statistics_are_those_of_the_file_on_every_rank() -> None:
    shape = (1, 2, 7, 5)
    weights = {"s": random(2), "b": random(2), "m": random(2), "v": np.abs(random(2))}
    check(model([node("BatchNormalization", "x s b m v")], shape, weights), shape, "height=2,width=2")
