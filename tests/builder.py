"""A graph in the making: every node is evaluated by the reference as soon as it is drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import helper

from tests.reference import evaluate

Array = np.ndarray
Draw = Callable[[st.SearchStrategy[Any]], Any]

MOST_CELLS = 6000


@dataclass(frozen=True)
class Style:
    """What kind of graphs to draw.

    Args:
        integers: small whole numbers through convolutions, max pools and copies only: results are exact.
        runtime: only what onnxruntime computes by the same definition.
        convolutional: only what a fully convolutional network has.
        steps: most nodes.
    """

    integers: bool = False
    runtime: bool = False
    convolutional: bool = False
    steps: int = 7


@dataclass(frozen=True)
class Value:
    """A tensor of the graph and its cells in float64."""

    name: str
    cells: Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.cells.shape

    @property
    def spatial(self) -> tuple[int, ...]:
        return self.cells.shape[2:]


@dataclass
class Builder:
    """A graph in the making."""

    draw: Draw
    style: Style
    opset: int
    random: np.random.Generator
    inputs: dict[str, Array] = field(default_factory=dict)
    constants: dict[str, Array] = field(default_factory=dict)
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)

    def integer(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def choose(self, *options: Any) -> Any:
        return self.draw(st.sampled_from(options))

    def flag(self) -> bool:
        return self.draw(st.booleans())

    def data(self, *shape: int) -> Array:
        """Random numbers that float32 holds exactly."""
        if self.style.integers:
            return self.random.integers(-2, 3, shape).astype(np.float32)
        return self.random.uniform(-1, 1, shape).astype(np.float32)

    def feed(self, *shape: int) -> Value:
        """A new input of the model."""
        name = f"x{len(self.inputs)}"
        self.inputs[name] = self.data(*shape)
        self.values.append(Value(name, self.inputs[name].astype(np.float64)))
        return self.values[-1]

    def add(self, op: str, inputs: Sequence[Value | Array | None], attributes: Mapping[str, Any] | None = None) -> bool:
        """Take up a node if it is worth having; arrays become constants."""
        new: dict[str, Array] = {}
        names: list[str] = []
        for given in inputs:
            if isinstance(given, Value):
                names.append(given.name)
            elif given is None:
                names.append("")
            else:
                names.append(f"c{len(self.constants) + len(new)}")
                new[names[-1]] = given
        kept = {k: v for k, v in (attributes or {}).items() if v is not None}
        result = f"v{len(self.nodes)}"
        node = helper.make_node(op, names, [result], f"{op.lower()}{len(self.nodes)}", **kept)
        cells = evaluate(node, self.opset, [
            g.cells if isinstance(g, Value)
            else None if g is None else g.astype(np.float64) if g.dtype.kind == "f" else g
            for g in inputs])[0]
        if not self._is_worthy(cells):
            return False
        self.constants |= new
        self.nodes.append(node)
        self.values.append(Value(result, cells))
        return True

    def _is_worthy(self, cells: Array) -> bool:
        if not 0 < cells.size <= MOST_CELLS or not np.isfinite(cells).all():
            return False
        highest = np.abs(cells).max()
        return highest < 2**20 if self.style.integers else highest < 1e3

    @property
    def last(self) -> Value:
        """The value that the next node reads: the newest, now and then an older one."""
        if self.integer(0, 4) == 0:
            return self.choose(*self.values)
        return self.values[-1]
