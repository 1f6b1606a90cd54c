"""When a pipeline looks whether its passes keep their promises."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from partitioner.loader import load_model
from passes.base import Check, Pass
from passes.pipeline import Pipeline, PipelineError
from tests.examples import one_graph

looks: list[str] = []


def _named(model: ir.Model) -> Iterator[str]:
    looks.append(str(model.graph.name))
    if model.graph.name == "broken":
        yield "the graph is broken"


NAMED = Check("named", _named)


@dataclass(frozen=True)
class Rename(Pass):
    """Gives the graph a name."""

    name: ClassVar[str] = "rename"
    ensures: ClassVar[tuple[Check, ...]] = (NAMED,)

    to: str

    def apply(self, model: ir.Model) -> None:
        """Rename it."""
        model.graph.name = self.to


def _model() -> ir.Model:
    return load_model(one_graph([helper.make_node("Relu", ["x"], ["y"])], {"x": np.zeros(3, np.float32)}, {},
                                {"y": (TensorProto.FLOAT, (3,))}, 18))


@pytest.fixture(autouse=True)
def _forget_looks() -> None:
    looks.clear()


def test_after_every_pass() -> None:
    Pipeline((Rename("a"), Rename("b"))).run(_model())
    assert looks == ["a", "b"]
    with pytest.raises(PipelineError, match="after pass rename: named: the graph is broken"):
        Pipeline((Rename("broken"), Rename("b"))).run(_model())


def test_after_the_last_pass_alone() -> None:
    Pipeline((Rename("a"), Rename("b"))).run(_model(), verify="last")
    assert looks == ["b"]
    with pytest.raises(PipelineError, match="the graph is broken"):
        Pipeline((Rename("a"), Rename("broken"))).run(_model(), verify="last")


def test_what_a_pass_breaks_is_not_looked_for() -> None:
    class Break(Rename):
        ensures: ClassVar[tuple[Check, ...]] = ()
        breaks: ClassVar[tuple[Check, ...]] = (NAMED,)

    Pipeline((Rename("a"), Break("broken"))).run(_model())
    assert looks == ["a"]
