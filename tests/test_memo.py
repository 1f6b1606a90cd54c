"""What a rolled program remembers from slab to slab is what it would find again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace

import onnx_ir as ir
import pytest
from hypothesis import assume, given

from partitioner import dialect
from partitioner.compiler import DepthFirst, compile_plan
from partitioner.errors import PartitionError
from partitioner.geometry import local_slices
from partitioner.loader import load_model
from partitioner.mesh import Mesh
from partitioner.ops.nodes import input_box
from runtime.forecast import Memory, forecast
from runtime.memo import Memo
from runtime.program import Action, Program, localise
from tests.builder import Style
from tests.strategies import Network, networks
from tests.test_graphs import quick


class Forgetful(Memo):
    """Finds everything anew."""

    def slices(self, held, wanted, joined):
        return local_slices(held, wanted, joined) or (slice(0, 0),)

    def window(self, value, box, joined, make):
        return make(value, box, joined)

    def input_box(self, node, index, outs, taken):
        return input_box(node, index, outs, self.here, taken)


def parts(action: Action) -> dict[str, object]:
    """Everything of an action but the kernel itself, whose weights cannot be compared."""
    found = {field.name: getattr(action, field.name) for field in fields(action)}
    return {**found, "operator": type(found["operator"])} if "operator" in found else found


def told(program: Program) -> list[object]:
    return [(type(s.action), parts(s.action), s.allocates, s.releases) for s in program.steps]


def programs(plan: ir.Model) -> Iterator[Program]:
    schedule = dialect.get_schedule(plan)
    assert schedule is not None
    for thickness in (1, 3):
        dialect.set_schedule(plan, replace(schedule, thickness=(thickness,) * len(schedule.thickness)))
        yield from (localise(plan, rank) for rank in dialect.get_mesh(plan))


def memory(program: Program) -> Memory:
    return forecast([program])


@quick
@given(networks(Style(convolutional=True)))
def test_programs_are_those_without_memory(network: Network) -> None:
    mesh = Mesh.parse(network.mesh)
    axis = next((name for name in ("height", "width", "batch") if mesh.count(name) == 1), None)
    assume(axis is not None)
    try:
        plan = compile_plan(load_model(network.model), mesh, {}, network.cuts, order=DepthFirst(axis))
    except PartitionError:
        assume(False)
    found = list(programs(plan))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("runtime.rolled.Memo", Forgetful)
        wanted = list(programs(plan))
    assert len(found) == len(wanted) > 0
    for mine, plain in zip(found, wanted, strict=True):
        assert told(mine) == told(plain)
        assert mine.buffers == plain.buffers
        assert memory(mine) == memory(plain)
