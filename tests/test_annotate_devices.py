"""ONNX's own annotation of a plan: what other tools may read, and that nothing else changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from partitioner.loader import load_file, save_model
from passes.annotate_devices import AnnotateDevices
from tests.oracle import compile_plan, run_ort
from tests.test_expand_form import norm, random
from tests.test_printer import classifier


def annotated(mesh: str, cuts: dict[str, tuple[int, ...]] | None = None) -> onnx.ModelProto:
    plan = compile_plan(classifier(), mesh, cuts)
    AnnotateDevices().apply(plan)
    proto = ir.to_proto(plan)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def spec(proto: onnx.ModelProto, value: str) -> onnx.ShardingSpecProto:
    """The annotation of a value by the node that makes it."""
    (node,) = [n for n in proto.graph.node if value in n.output]
    (device,) = node.device_configurations
    assert device.configuration_id == proto.configuration[0].name
    return next(s for s in device.sharding_spec if s.tensor_name == value)


def dims(found: onnx.ShardingSpecProto) -> list[tuple[int, int, int]]:
    """(axis, extent, shards) per split axis."""
    return [(d.axis, d.simple_sharding[0].dim_value, d.simple_sharding[0].num_shards) for d in found.sharded_dim]


def test_shards_in_row_major_order() -> None:
    proto = annotated("depth=2,width=3", {"depth": (0, 2, 9)})
    assert list(proto.configuration[0].device) == [f"rank{r}" for r in range(6)]
    found = spec(proto, "a")
    assert list(found.device) == [0, 1, 2, 3, 4, 5]
    assert dims(found) == [(2, 9, 2), (4, 7, 3)]


def test_replicas_are_groups() -> None:
    found = spec(annotated("depth=2,width=3"), "y")
    assert list(found.device) == [-1] and dims(found) == []
    assert [(e.key, list(e.value)) for e in found.index_to_device_group_map] == [(-1, [0, 1, 2, 3, 4, 5])]


def test_a_replica_along_one_axis_of_the_mesh() -> None:
    """A value of one cell along depth is held by every rank of a column."""
    from onnx import TensorProto, helper

    from tests.examples import one_graph

    nodes = [helper.make_node("ReduceMax", ["x"], ["m"], "highest", axes=[2]),
             helper.make_node("Sub", ["x", "m"], ["y"], "less")]
    x = random(1, 1, 4, 6)
    model = one_graph(nodes, {"x": x}, {}, {"y": (TensorProto.FLOAT, x.shape)}, 13)
    plan = compile_plan(model, "height=2,width=2")
    AnnotateDevices().apply(plan)
    found = spec(ir.to_proto(plan), "m")
    assert dims(found) == [(3, 6, 2)] and list(found.device) == [-1, -2]
    assert [list(e.value) for e in found.index_to_device_group_map] == [[0, 2], [1, 3]]


def test_partial_results_are_left_out() -> None:
    proto = annotated("depth=2")
    (node,) = [n for n in proto.graph.node if n.op_type == "Moments"]
    assert not node.device_configurations[0].sharding_spec


@pytest.mark.parametrize("mesh", ["depth=2", "depth=3,height=2,width=2"])
def test_results_keep_their_bits(mesh: str, tmp_path: Path) -> None:
    x = random(2, 3, 7, 9, 5)
    plan = compile_plan(norm(x)[0], mesh)
    before = run_ort(ir.to_proto(plan), {"x": x})["y"]
    AnnotateDevices().apply(plan)
    save_model(plan, tmp_path / "plan.onnx")
    assert np.array_equal(run_ort(onnx.load(tmp_path / "plan.onnx"), {"x": x})["y"], before)
    loaded = ir.to_proto(load_file(tmp_path / "plan.onnx"))
    assert len(loaded.configuration) == 1 and all(n.device_configurations for n in loaded.graph.node)


def test_again_is_the_same() -> None:
    plan = compile_plan(classifier(), "depth=2")
    AnnotateDevices().apply(plan)
    once = ir.to_proto(plan).SerializeToString(deterministic=True)
    AnnotateDevices().apply(plan)
    assert ir.to_proto(plan).SerializeToString(deterministic=True) == once


@pytest.mark.parametrize("mesh", ["", "depth=9,height=4,width=2"])
def test_one_rank_and_large_meshes_are_not_annotated(mesh: str) -> None:
    proto = annotated(mesh)
    assert not proto.configuration and not any(n.device_configurations for n in proto.graph.node)
    assert proto.ir_version < 11
