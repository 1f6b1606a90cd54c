"""Depth-first execution: slab after slab equals all at once, and nothing is computed twice."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from partitioner.loader import load_model
from partitioner.rolling import Chain
from runtime.executor import Executor, make_shards
from runtime.feeds import ArrayDrain, ArrayFeed
from runtime.forecast import forecast
from runtime.program import Compute, localise
from runtime.transports.lockstep import Lockstep
from tests.architectures import ARCHITECTURES, AXES, INPUT_NAME, export
from tests.builder import Style, wide
from tests.drawn import DRAWN, IN_FLOAT32
from tests.examples import one_graph
from tests.oracle import as_double, close, compile_plan, error, reference64, run_lockstep
from tests.strategies import Network, extents_of, networks
from tests.test_graphs import quick, thorough


def check_rolled(network: Network, data: st.DataObject) -> None:
    """Along any axis that the mesh does not split, in slabs of any thickness, full of NaN where nobody wrote."""
    note(str(network))
    split = {item.partition("=")[0] for item in network.mesh.split(",")}
    free = sorted(set(extents_of(network.model)) - split)
    if not free:
        return
    name = data.draw(st.sampled_from(free))
    thickness = data.draw(st.integers(1, 4))
    plan = compile_plan(as_double(network.model), network.mesh, network.cuts, storage=network.storage,
                        rolled=name, thickness=thickness)
    inputs = {name: wide(array) for name, array in network.inputs.items()}
    found = run_lockstep(load_model(ir.to_proto(plan)), inputs).outputs
    for name, expected in network.expected.items():
        assert close(found[name], expected, 1e-12), f"{name}: error {error(found[name], expected)}"


@pytest.mark.parametrize("name", sorted(DRAWN - IN_FLOAT32))
def test_every_operator_slab_by_slab(name: str) -> None:
    @settings(quick, max_examples=2)
    @given(networks(Style(steps=4, focus=name)), st.data())
    def check_all(network: Network, data: st.DataObject) -> None:
        check_rolled(network, data)

    check_all()


@settings(quick, max_examples=150)
@given(networks(Style(steps=6)), st.data())
def test_networks_slab_by_slab(network: Network, data: st.DataObject) -> None:
    check_rolled(network, data)


@settings(quick, max_examples=100)
@given(networks(Style(steps=8, convolutional=True)), st.data())
def test_convolutional_networks_slab_by_slab(network: Network, data: st.DataObject) -> None:
    check_rolled(network, data)


@pytest.mark.parametrize("name", [name for name, a in ARCHITECTURES.items() if name.startswith("torch/") and a.dims])
def test_architectures_slab_by_slab(name: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    export(architecture, tmp_path / "m.onnx", "torchscript", False)
    model = onnx.load(tmp_path / "m.onnx")
    inputs = {INPUT_NAME: np.random.default_rng(5).standard_normal(architecture.shape, dtype=np.float32)}
    whole = run_lockstep(compile_plan(model, None), inputs).outputs
    for thickness in (3, 8):
        plan = compile_plan(model, None, rolled=AXES[3 - architecture.dims], thickness=thickness)
        found = run_lockstep(plan, inputs).outputs
        for output, expected in whole.items():
            assert close(found[output], expected, 5e-6), f"{output}: error {error(found[output], expected)}"


@pytest.mark.slow
@settings(thorough)
@given(networks(Style(steps=7)), st.data())
def test_many_networks_slab_by_slab(network: Network, data: st.DataObject) -> None:
    check_rolled(network, data)


@pytest.mark.parametrize(("shape", "axis", "gives"), [
    ((1, 1, 96, 48, 48), "depth", True), ((2, 1, 96, 48, 48), "depth", True), ((1, 1, 48, 96, 96), "height", True),
    ((1, 1, 48, 48, 96), "width", False),
])
def test_pages_that_are_forecast_as_given_back_are_given_back(shape: tuple[int, ...], axis: str, gives: bool) -> None:
    """Batches and inner axes have their cells in many runs: what is too short for pages is forecast as held."""
    weights = {"w": np.ones((8, 1, 3, 3, 3), np.float32), "v": np.ones((8, 8, 3, 3, 3), np.float32),
               "s": np.ones(8, np.float32)}
    nodes = [helper.make_node("Conv", ["x", "w"], ["a"], pads=[1] * 6),
             helper.make_node("InstanceNormalization", ["a", "s", "s"], ["b"]),
             helper.make_node("Conv", ["b", "v"], ["c"], pads=[1] * 6),
             helper.make_node("InstanceNormalization", ["c", "s", "s"], ["y"])]
    x = {"x": np.random.default_rng(0).standard_normal(shape, dtype=np.float32)}
    model = one_graph(nodes, x, weights, {"y": (TensorProto.FLOAT, (shape[0], 8, *shape[2:]))}, 18)
    plan = compile_plan(model, None, rolled=axis, thickness=8)
    program = localise(plan, 0)
    (shard,) = make_shards([program], [torch.device("cpu")])
    told, seen = forecast([program]), []

    def watch(*_: object) -> None:
        maps = [shard.buffers[name] for name, spec in program.buffers.items()
                if spec.place == "resting" and name in shard.buffers]
        seen.append(sum(map(resident, maps)))

    result = torch.empty(shape[0], 8, *shape[2:])
    Executor([shard], Lockstep(1)).run(ArrayFeed(x), ArrayDrain({"y": result}), watch)
    whole = sum(spec.nbytes for spec in program.buffers.values() if spec.place == "resting")
    assert max(seen) <= told.resting * 1.05
    assert (told.resting < 0.75 * whole) == gives
    assert close(result.numpy(), run_lockstep(compile_plan(model, None), x).outputs["y"], 1e-5)


def resident(tensor: torch.Tensor) -> int:
    """Bytes of a mapped tensor whose pages are in memory."""
    count = -(-tensor.numel() * tensor.element_size() // mmap.PAGESIZE)
    found = (ctypes.c_ubyte * count)()
    start = ctypes.c_void_p(tensor.untyped_storage().data_ptr())
    assert ctypes.CDLL(None, use_errno=True).mincore(start, ctypes.c_size_t(count * mmap.PAGESIZE), found) == 0
    return sum(page & 1 for page in found) * mmap.PAGESIZE


def test_small_planes_go_several_at_a_time() -> None:
    """In slabs of two, a level of eight times fewer planes takes one turn for four of the finest."""
    nodes = [helper.make_node("Conv", ["x", "w"], ["a"], "fine", pads=[1] * 6),
             helper.make_node("MaxPool", ["a"], ["b"], "pool", kernel_shape=[4] * 3, strides=[4] * 3),
             helper.make_node("Conv", ["b", "v"], ["c"], "middle", pads=[1] * 6),
             helper.make_node("MaxPool", ["c"], ["d"], "last", kernel_shape=[2] * 3, strides=[2] * 3),
             helper.make_node("Resize", ["d", "", "s"], ["u"], "up", mode="nearest"),
             helper.make_node("Add", ["a", "u"], ["y"])]
    weights = {"w": np.ones((2, 2, 3, 3, 3), np.float32) / 50, "v": np.ones((2, 2, 3, 3, 3), np.float32) / 50,
               "s": np.array([1, 1, 8, 8, 8], np.float32)}
    x = {"x": np.random.default_rng(0).standard_normal((1, 2, 64, 16, 16), dtype=np.float32)}
    model = one_graph(nodes, x, weights, {"y": (TensorProto.FLOAT, (1, 2, 64, 16, 16))}, 18)
    plan = compile_plan(model, None, rolled="depth", thickness=2)
    turns: dict[str, list[int]] = {}
    for step in localise(plan, 0).steps:
        if isinstance(step.action, Compute) and step.action.writes:
            turns.setdefault(step.action.name, []).append(len(step.action.outs[0].intervals()[2]))
    assert max(turns["fine"]) == 2 and len(turns["fine"]) <= 33
    assert max(turns["middle"]) == 2 and len(turns["middle"]) <= 9 and len(turns["last"]) == 8
    assert close(run_lockstep(plan, x).outputs["y"], run_lockstep(compile_plan(model, None), x).outputs["y"], 1e-6)


def test_a_transposed_convolution_makes_whole_groups_of_cells() -> None:
    """Its reader needs a cell beyond each slab; it makes the whole group of three that comes from one cell."""
    nodes = [helper.make_node("ConvTranspose", ["x", "w"], ["u"], strides=[3, 1, 1]),
             helper.make_node("Conv", ["u", "v"], ["y"], pads=[1] * 6)]
    weights = {"w": np.ones((2, 2, 3, 1, 1), np.float32), "v": np.ones((2, 2, 3, 3, 3), np.float32)}
    volume = np.zeros((1, 2, 8, 4, 4), np.float32)
    model = one_graph(nodes, {"x": volume}, weights, {"y": (TensorProto.FLOAT, None)}, 18)
    plan = compile_plan(model, None, rolled="depth", thickness=4)
    chain = Chain(list(plan.graph), "depth")
    made = next(v for v in chain.extent if v.name == "u")
    ends = [slab.upto[made] for slab in chain.slabs(4)]
    assert ends[-1] == 24 and len(ends) > 3 and all(end % 3 == 0 for end in ends)
    x = {"x": np.random.default_rng(0).standard_normal((1, 2, 8, 4, 4))}
    double = compile_plan(as_double(model), None, rolled="depth", thickness=4)
    assert close(run_lockstep(double, x).outputs["y"], reference64(model, x)["y"], 1e-12)
