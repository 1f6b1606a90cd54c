"""Hypothesis strategies that draw whole networks, meshes and cuts.

A graph grows node by node; every node is evaluated by the reference as soon as it is drawn, so its result's
extents and values are known to the draws that follow, and nodes that leave nothing, grow too large or lose
their digits are not taken up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import helper

from partitioner.axes import named_axes
from partitioner.loader import load_model
from tests.builder import Array, Builder, Draw, Style, knows
from tests.drawn import CONVOLUTIONAL, SPATIAL, drawers
from tests.drawn_nodes import head
from tests.examples import one_graph

LARGEST = {3: 23, 4: 13, 5: 8}
"""Longest spatial axis of an input, by number of axes."""


@dataclass(frozen=True)
class Network:
    """A drawn model in float32, its data, what it yields in float64, how to shard it and whether to expand it."""

    model: onnx.ModelProto
    inputs: dict[str, Array]
    expected: dict[str, Array]
    mesh: str
    cuts: dict[str, tuple[int, ...]]
    storage: str
    expanded: bool

    def __repr__(self) -> str:
        lines = [f"mesh {self.mesh}, cuts {self.cuts}, {self.storage}, opset {self.model.opset_import[0].version}"]
        lines += [f"{name} {array.shape}" for name, array in self.inputs.items()]
        lines += [f"{t.name} = {list(t.dims)}" for t in self.model.graph.initializer]
        for node in self.model.graph.node:
            attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            lines.append(f"{', '.join(node.output)} = {node.op_type}({', '.join(node.input)}) {attributes}")
        return "\n".join(lines)


RANKS = {"GRU": 3, "RNN": 3, "LSTM": 3, **dict.fromkeys(("DepthToSpace", "SpaceToDepth", "RoiAlign", "LRN"), 4)}
"""Axes that an operator asks for."""

OPSETS = (9, 11, 13, 18, 18, 21, 22, 24, 26)


@st.composite
def networks(draw: Draw, style: Style) -> Network:
    """A network with its data, a mesh over its input's axes and cuts anywhere on them."""
    opsets = OPSETS[:7] if style.convolutional else OPSETS
    opset = draw(st.sampled_from([o for o in opsets if not style.focus or knows(o, style.focus)] or [OPSETS[3]]))
    b = Builder(draw, style, opset, np.random.default_rng(draw(st.integers(0, 2**16))))
    rank = RANKS.get(style.focus) or draw(st.sampled_from((3, 4, 4, 5)))
    spatial = [draw(st.integers(1, LARGEST[rank])) for _ in range(rank - 2)]
    front = [draw(st.integers(1, 3)), draw(st.integers(1, 4))]
    few = not style.convolutional and not style.focus and draw(st.integers(0, 15)) == 0
    x = b.feed(*spatial) if few else b.feed(*front, *spatial)  # few: a vector, a matrix, no channels
    if draw(st.integers(0, 3)) == 0:
        b.feed(*(n if draw(st.booleans()) else 1 for n in x.shape))
        b.add("Add", [x, b.values[-1]])
    grow(b, draw(st.integers(1, style.steps)))
    if not style.convolutional and draw(st.integers(0, 5)) == 0:
        head(b)
    if not b.nodes:
        b.add("Relu", [x])
    return finish(b, draw)


def grow(b: Builder, wanted: int) -> None:
    """Nodes, every other one spatial; the operator in focus as soon as it fits."""
    style, found = b.style, drawers(b.style.integers)
    every = [found[i] for i in b.random.permutation(len(found))]  # Hypothesis likes what stands first
    sought = drawers(style.integers, style.focus) if style.focus else []
    if sought and b.flag() and b.choose(*sought)(b):
        sought = []
    for _ in range(2 * wanted):
        if len(b.nodes) >= wanted:
            break
        if style.convolutional:
            b.choose(*CONVOLUTIONAL)(b)
        elif b.integer(0, 2) == 0:
            b.choose(*SPATIAL)(b)
        else:
            b.choose(*every)(b)
        if sought and b.choose(*sought)(b):
            sought = []
    for _ in range(4):
        if sought and b.choose(*sought)(b):
            sought = []


def finish(b: Builder, draw: Draw) -> Network:
    """Outputs, mesh and cuts for a graph."""
    read = {name for node in b.nodes for name in node.input}
    results = [v for v in b.values if v.name not in b.inputs]
    trailing = {node.output[-1] for node in b.nodes if len(node.output) == 2}
    loose = [v for v in results if v.name not in read and not (v.name in trailing and draw(st.integers(0, 2)) == 0)]
    loose = loose or [v for v in results if v.name not in read]
    if draw(st.integers(0, 4)) == 0:
        loose.append(draw(st.sampled_from(results)))
    outputs = {v.name: v for v in loose}
    inputs = {name: array for name, array in b.inputs.items() if name in read}
    kinds = {name: (helper.np_dtype_to_tensor_dtype(v.dtype), v.shape) for name, v in outputs.items()}
    domain = next((node.domain for node in b.nodes if node.domain), "")
    model = one_graph(b.nodes, inputs, b.constants, kinds, b.opset, domain)
    mesh, cuts = draw(meshes(extents_of(model)))
    return Network(model, inputs, {name: v.cells for name, v in outputs.items()}, mesh, cuts,
                   draw(st.sampled_from(("channels_last", "channels_first"))), draw(st.integers(0, 2)) == 0)


def extents_of(model: onnx.ModelProto) -> dict[str, int]:
    """Extents of the axes that a mesh can split: the longest of all inputs."""
    extents: dict[str, int] = {}
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.input}
    for value, axes in named_axes(load_model(model)).items():
        for name, axis in axes.items():
            extents[name] = max(extents.get(name, 1), shapes[value][axis])
    return extents


@st.composite
def meshes(draw: Draw, extents: dict[str, int], most: int = 8) -> tuple[str, dict[str, tuple[int, ...]]]:
    """A mesh over named axes, and cuts that may lie anywhere, several at one place too."""
    counts: dict[str, int] = {}
    cuts: dict[str, tuple[int, ...]] = {}
    for name in draw(st.permutations(sorted(extents))):
        n, room = extents[name], most // math.prod(counts.values())
        highest = max(1, min(n, room, 4))
        count = draw(st.integers(1 if counts or draw(st.integers(0, 5)) == 0 else min(2, highest), highest))
        if count == 1:
            continue
        counts[name] = count
        if draw(st.booleans()):
            cuts[name] = (0, *sorted(draw(st.integers(0, n)) for _ in range(count - 1)), n)
    return ",".join(f"{name}={count}" for name, count in counts.items()), cuts
