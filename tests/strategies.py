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
from onnx import TensorProto, helper

from partitioner.mesh import spatial_names
from tests.builder import Array, Builder, Draw, Style
from tests.drawn_nodes import ALL, CONVOLUTIONAL, EXACT, head
from tests.examples import one_graph

LARGEST = {3: 23, 4: 13, 5: 8}
"""Longest spatial axis of an input, by number of axes."""


@dataclass(frozen=True)
class Network:
    """A drawn model in float32, its data, what it yields in float64, and how to shard it."""

    model: onnx.ModelProto
    inputs: dict[str, Array]
    expected: dict[str, Array]
    mesh: str
    cuts: dict[str, tuple[int, ...]]
    storage: str

    def __repr__(self) -> str:
        lines = [f"mesh {self.mesh}, cuts {self.cuts}, {self.storage}, opset {self.model.opset_import[0].version}"]
        lines += [f"{name} {array.shape}" for name, array in self.inputs.items()]
        lines += [f"{t.name} = {list(t.dims)}" for t in self.model.graph.initializer]
        for node in self.model.graph.node:
            attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            lines.append(f"{node.output[0]} = {node.op_type}({', '.join(node.input)}) {attributes}")
        return "\n".join(lines)


@st.composite
def networks(draw: Draw, style: Style) -> Network:
    """A network with its data, a mesh over its input's axes and cuts anywhere on them."""
    opset = draw(st.sampled_from((9, 11, 13, 18, 22)))
    b = Builder(draw, style, opset, np.random.default_rng(draw(st.integers(0, 2**16))))
    rank = draw(st.sampled_from((3, 4, 4, 5)))
    spatial = [draw(st.integers(1, LARGEST[rank])) for _ in range(rank - 2)]
    x = b.feed(draw(st.integers(1, 3)), draw(st.integers(1, 4)), *spatial)
    if draw(st.integers(0, 3)) == 0:
        b.feed(*(n if draw(st.booleans()) else 1 for n in x.shape))
        b.add("Add", [x, b.values[-1]])
    wanted = draw(st.integers(1, style.steps))
    kinds = EXACT if style.integers else CONVOLUTIONAL if style.convolutional else ALL
    for _ in range(2 * wanted):
        if len(b.nodes) < wanted:
            draw(st.sampled_from(kinds))(b)
    if not style.convolutional and draw(st.integers(0, 5)) == 0:
        head(b)
    if not b.nodes:
        b.add("Relu", [x])
    return finish(b, draw)


def finish(b: Builder, draw: Draw) -> Network:
    """Outputs, mesh and cuts for a graph."""
    read = {name for node in b.nodes for name in node.input}
    results = [v for v in b.values if v.name not in b.inputs]
    outputs = {v.name: v.cells for v in results if v.name not in read or v is results[-1]}
    if draw(st.integers(0, 4)) == 0:
        extra = draw(st.sampled_from(results))
        outputs[extra.name] = extra.cells
    inputs = {name: array for name, array in b.inputs.items() if name in read}
    model = one_graph(b.nodes, inputs, b.constants, {n: (TensorProto.FLOAT, a.shape) for n, a in outputs.items()},
                      b.opset)
    mesh, cuts = draw(meshes(next(iter(inputs.values())).shape))
    return Network(model, inputs, outputs, mesh, cuts, draw(st.sampled_from(("channels_last", "channels_first"))))


@st.composite
def meshes(draw: Draw, shape: tuple[int, ...], most: int = 8) -> tuple[str, dict[str, tuple[int, ...]]]:
    """A mesh over a volume's batch and spatial axes, and cuts that may lie anywhere, several at one place too."""
    extents = {"batch": shape[0], **dict(zip(spatial_names(len(shape) - 2), shape[2:], strict=True))}
    counts: dict[str, int] = {}
    cuts: dict[str, tuple[int, ...]] = {}
    for name in draw(st.permutations(list(extents))):
        n, room = extents[name], most // math.prod(counts.values())
        count = draw(st.integers(1, max(1, min(n, room, 4))))
        if count == 1:
            continue
        counts[name] = count
        if draw(st.booleans()):
            cuts[name] = (0, *sorted(draw(st.integers(0, n)) for _ in range(count - 1)), n)
    return ",".join(f"{name}={count}" for name, count in counts.items()), cuts
