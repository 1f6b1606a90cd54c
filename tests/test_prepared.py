"""A model that is prepared once and laid out many times yields the plans that are made from the start."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given

from partitioner.compiler import DepthFirst, Prepared, Purpose, Steering, compile_plan, prepare
from partitioner.cost import plan_cost
from partitioner.errors import PartitionError
from partitioner.loader import load_model
from partitioner.mesh import Mesh
from partitioner.printer import print_plan
from partitioner.profile import Profile
from partitioner.seal import digest
from partitioner.timing import plan_time
from tests.builder import Style
from tests.strategies import Network, networks
from tests.test_graphs import quick
from tests.test_layouts_of_plans import chain

MESHES = ("", "height=2", "batch=2", "height=2,width=3")


def head() -> onnx.ModelProto:
    """A convolution and a dense layer: its weights are cut where the mesh splits what is flattened."""
    random = np.random.default_rng(0)
    weight, dense = (random.standard_normal(shape).astype(np.float32) for shape in ((3, 2, 3, 3), (5, 3 * 8 * 9)))
    return chain({"x": random.standard_normal((2, 2, 8, 9)).astype(np.float32)},
                 ("Conv", ["x", weight], {"pads": [1, 1, 1, 1]}), ("Flatten", ["v0"], {}),
                 ("Gemm", ["v1", dense], {"transB": 1}), opset=18)


def check(ready: Prepared, model: onnx.ModelProto, mesh: str, **order: object) -> None:
    wanted = compile_plan(load_model(model), Mesh.parse(mesh), {}, {}, purpose=ready.purpose, **order)
    found = ready.lay_out(Mesh.parse(mesh), **order)
    assert print_plan(found) == print_plan(wanted)
    assert digest(found) == digest(wanted)


@pytest.mark.parametrize("purpose", ["inference", "evaluation", "training"])
def test_every_mesh_gets_the_plan_that_it_would_get_alone(purpose: Purpose) -> None:
    model = head()
    ready = prepare(load_model(model), {}, purpose=purpose)
    before = ir.to_proto(ready.model).SerializeToString(deterministic=True)
    for mesh in (*MESHES, *reversed(MESHES)):
        check(ready, model, mesh)
    check(ready, model, "", order=DepthFirst("height"))
    check(ready, model, "", order=DepthFirst("height", (("width", 2),), frozenset()))
    check(ready, model, "height=2", steering=Steering(deepened=frozenset({"v0"})))
    assert ir.to_proto(ready.model).SerializeToString(deterministic=True) == before
    found = {node.op_type for mesh in ("", "height=2") for node in ready.lay_out(Mesh.parse(mesh)).graph}
    assert {"Gemm", "Einsum"} <= found, "the meshes must ask for different graphs, or nothing is tested"


@quick
@given(networks(Style()))
def test_drawn_networks(network: Network) -> None:
    ready = prepare(load_model(network.model), {})
    for mesh in (network.mesh, "", network.mesh):
        cuts = network.cuts if mesh else {}
        wanted = compile_plan(load_model(network.model), Mesh.parse(mesh), {}, cuts)
        found = ready.lay_out(Mesh.parse(mesh), cuts)
        assert print_plan(found) == print_plan(wanted)
        assert digest(found) == digest(wanted)


def test_what_a_mesh_refuses_is_refused_when_it_is_laid_out() -> None:
    ready = prepare(load_model(head()), {})
    with pytest.raises(PartitionError, match="use at most height=8"):
        ready.lay_out(Mesh.parse("height=9"))
    ready.lay_out(Mesh.parse("height=8"))


def test_the_time_of_slabs_along_the_batch_knows_merged_moments() -> None:
    """The first of three merged values has no axes; the rolled axis is that of the others."""
    random = np.random.default_rng(0)
    ones = np.ones(2, np.float32)
    model = chain({"x": random.standard_normal((3, 2, 8, 9)).astype(np.float32)},
                  ("InstanceNormalization", ["x", ones, ones], {}), ("Relu", ["v0"], {}))
    plan = compile_plan(load_model(model), Mesh.parse("height=2"), {}, {}, order=DepthFirst("batch"))
    assert plan_time(plan, plan_cost(plan), Profile.find("a100")).steps
