"""A graph in the making: every node is evaluated by the reference as soon as it is drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxruntime
from hypothesis import strategies as st
from onnx import TensorProto, helper

from tests.examples import one_graph
from tests.reference import evaluate

Array = np.ndarray
Draw = Callable[[st.SearchStrategy[Any]], Any]

MOST_CELLS = 6000
MICROSOFT = "com.microsoft"
SMOOTH = {"Conv", "ConvTranspose", "Add", "Sub", "Mul", "Concat", "Transpose", "Reshape", "Slice", "AveragePool",
          "Relu", "Sigmoid", "Tanh", "Identity", "Neg", "Abs", "Gemm", "MatMul", "Einsum"}
"""Operators that never blow up a small change of what goes in, unless their sums cancel."""


LATEST = {"RoiAlign": 21}
"""Operators without a rule that onnxruntime has up to some opset."""


@dataclass(frozen=True)
class Style:
    """What kind of graphs to draw.

    Args:
        integers: small whole numbers through convolutions, max pools and copies only: results are exact.
        runtime: only what onnxruntime computes by the same definition.
        convolutional: only what a fully convolutional network has.
        steps: most nodes.
        focus: an operator that the graph must have if it can, with its domain before a colon if it has one.
    """

    integers: bool = False
    runtime: bool = False
    convolutional: bool = False
    steps: int = 7
    focus: str = ""


@dataclass(frozen=True)
class Value:
    """A tensor of the graph, its cells with float64 for any float, and its element type in the float32 model."""

    name: str
    cells: Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.cells.shape

    @property
    def spatial(self) -> tuple[int, ...]:
        return self.cells.shape[2:]

    @property
    def is_float(self) -> bool:
        return self.cells.dtype.kind == "f"

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.float32) if self.is_float else self.cells.dtype


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

    def whole_data(self, dtype: Any, *shape: int, low: int = -8, high: int = 9) -> Array:
        """Random whole numbers from low up to high, which is not reached."""
        kind = np.dtype(dtype)
        if kind == np.bool_:
            return self.random.integers(0, 2, shape).astype(bool)
        return np.asarray(self.random.integers(max(low, 0) if kind.kind == "u" else low, high, shape)).astype(kind)

    def feed(self, *shape: int) -> Value:
        """A new input of the model."""
        return self.feed_array(self.data(*shape))

    def feed_array(self, array: Array) -> Value:
        """A new input of the model that holds these cells."""
        name = f"x{len(self.inputs)}"
        self.inputs[name] = array
        self.values.append(Value(name, array.astype(np.float64) if array.dtype.kind == "f" else array))
        return self.values[-1]

    def knows(self, name: str) -> bool:
        """Whether this graph's opset has an operator."""
        return knows(self.opset, name)

    def op(self, *names: str) -> str:
        """One of several operators that this graph's opset has; "" when it has none."""
        known = [name for name in names if self.knows(name)]
        if self.style.focus in known:
            return self.style.focus
        return self.choose(*known) if known else ""

    def add(self, name: str, inputs: Sequence[Value | Array | np.generic | None],
            attributes: Mapping[str, Any] | None = None, outputs: int = 1) -> bool:
        """Take up a node if it is worth having; arrays become constants. Its first output is the newest value."""
        new: dict[str, Array] = {}
        names: list[str] = []
        for given in inputs:
            if isinstance(given, Value):
                names.append(given.name)
            elif given is None:
                names.append("")
            else:
                names.append(f"c{len(self.constants) + len(new)}")
                new[names[-1]] = np.asarray(given)
        kept = {k: v for k, v in (attributes or {}).items() if v is not None}
        domain, op = split_name(name)
        results = [f"v{len(self.nodes)}", *(f"v{len(self.nodes)}_{i}" for i in range(1, outputs))]
        node = helper.make_node(op, names, results, f"{op.lower()}{len(self.nodes)}", domain=domain, **kept)
        arrays = [g.cells if isinstance(g, Value) else None if g is None else wide(np.asarray(g)) for g in inputs]
        found = evaluate(node, self.opset, arrays)[:outputs]
        if not all(self._is_worthy(cells) for cells in found):
            return False
        if not (self.style.integers or op in SMOOTH or self._is_stable(node, inputs, arrays, found)):
            return False
        if self.style.runtime and not self.style.integers and self._cancels(node, arrays, found):
            return False
        if self.style.runtime and not self._agrees(node, arrays, found):
            return False
        self.constants |= new
        self.nodes.append(node)
        self.values += [Value(name, cells)
                        for name, cells in reversed(list(zip(results, found, strict=True)))]
        return True

    def _is_worthy(self, cells: Array) -> bool:
        if not 0 < cells.size <= MOST_CELLS:
            return False
        if cells.dtype.kind != "f":
            return cells.dtype.kind in "iub"
        if not np.isfinite(cells).all():
            return False
        highest = np.abs(cells).max()
        return highest < 2**20 if self.style.integers else 1e-6 < highest < 1e3 or highest == 0

    def _is_stable(self, node: onnx.NodeProto, inputs: Sequence[Any], arrays: Sequence[Any],
                   found: Sequence[Array]) -> bool:
        """Whether a small change of what was computed before stays small: no step, tie or pole is near."""
        for sign in (1, -1):
            random = np.random.default_rng(len(self.nodes))
            moved = [x + sign * 1e-5 * np.abs(x).max(initial=1e-3) * random.uniform(-1, 1, x.shape)
                     if isinstance(g, Value) and x.dtype.kind == "f" else x
                     for g, x in zip(inputs, arrays, strict=True)]
            for old, new in zip(found, evaluate(node, self.opset, moved), strict=False):
                if old.dtype.kind != "f":
                    if not np.array_equal(old, new):
                        return False
                elif not np.abs(old - new).max() <= 2e-3 * np.abs(old).max():
                    return False
        return True

    def _cancels(self, node: onnx.NodeProto, arrays: Sequence[Any], found: Sequence[Array]) -> bool:
        """Whether a few sums of products are small beside their terms: what is left of them is rounding."""
        if node.op_type not in ("MatMul", "Gemm", "Einsum", "Conv", "FusedMatMul") or found[0].size > 64:
            return False
        terms = evaluate(node, self.opset, [None if x is None else np.abs(x) for x in arrays])[0]
        return bool(np.abs(found[0]).max() < 0.1 * np.abs(terms).max())

    def _agrees(self, node: onnx.NodeProto, arrays: Sequence[Any], found: Sequence[Array]) -> bool:
        """Whether onnxruntime has this node; then it must compute what the reference does."""
        narrow = [None if x is None else x.astype(np.float32) if x.dtype.kind == "f" else x for x in arrays]
        fed = {name: x for name, x in zip(node.input, narrow, strict=True) if name}
        results = run_node(node, fed, found, self.opset)
        if results is None:
            return False
        for mine, theirs in zip(found, results, strict=True):
            limit = 1e-2 * np.abs(mine).max() if mine.dtype.kind == "f" and not self.style.integers else 0
            same = mine.shape == theirs.shape and np.abs(mine * 1.0 - theirs * 1.0).max() <= limit
            shapes = {name: (a.shape, str(a.dtype)) for name, a in fed.items()}
            assert same, f"the reference is wrong: {helper.printable_node(node)} of {shapes}, opset {self.opset}"
        return True

    @property
    def last(self) -> Value:
        """The floats that the next node reads: the newest, now and then older ones."""
        floats = [v for v in self.values if v.is_float and v.shape]
        if self.integer(0, 4) == 0:
            return self.choose(*floats)
        return floats[-1]

    @property
    def any(self) -> Value:
        """Values of any type."""
        return self.choose(*self.values[-3:])

    def whole(self, dtype: Any, low: int = -8, high: int = 9) -> Value:
        """Whole numbers or flags that are there already, are given to the model or are made from floats."""
        kind = np.dtype(dtype)
        there = [v for v in self.values if v.cells.dtype == kind and v.shape and in_range(v.cells, low, high)]
        if there and self.integer(0, 2):
            return self.choose(*there)
        x = self.last
        if self.flag():
            scaled = x if self.style.integers else None
            if scaled is None and self.add("Mul", [x, np.float32(6)]):
                scaled = self.values[-1]
            if scaled is not None and in_range(np.trunc(scaled.cells), low, high) and not (
                    kind.kind == "u" and scaled.cells.min() < 0) and self.add(
                    "Cast", [scaled], {"to": helper.np_dtype_to_tensor_dtype(kind)}):
                return self.values[-1]
        return self.feed_array(self.whole_data(kind, *x.shape, low=low, high=high))

    def within(self, x: Value, low: float, high: float) -> Value | None:
        """The floats brought between two bounds; None when that fails."""
        if x.cells.min() >= low and x.cells.max() <= high:
            return x
        width = np.float32((high - low) * 0.99)
        done = (self.add("Sigmoid", [x]) and self.add("Mul", [self.values[-1], width])
                and self.add("Add", [self.values[-1], np.float32(low + (high - low) * 0.005)]))
        return self.values[-1] if done else None

    def axis(self, x: Value) -> int:
        return self.integer(0, len(x.shape) - 1)

    def signed(self, axis: int, x: Value) -> int:
        """An axis counted from the front or from the back."""
        return axis - len(x.shape) if self.opset >= 11 and self.flag() else axis


def knows(opset: int, name: str) -> bool:
    """Whether an opset has an operator; other domains are taken to have theirs."""
    domain, op = split_name(name)
    if domain:
        return True
    if opset > LATEST.get(op, opset):
        return False
    try:
        return not onnx.defs.get_schema(op, opset, "").deprecated
    except onnx.defs.SchemaError:
        return False


def in_range(cells: Array, low: int, high: int) -> bool:
    return cells.dtype == bool or bool(low <= cells.min() and cells.max() < high)


def split_name(name: str) -> tuple[str, str]:
    """Domain and operator of "domain:Operator" or "Operator"."""
    domain, _, op = name.rpartition(":")
    return domain, op


def wide(array: Array) -> Array:
    return array.astype(np.float64) if array.dtype.kind == "f" else array


def run_node(node: onnx.NodeProto, fed: Mapping[str, Array], found: Sequence[Array], opset: int) -> list[Array] | None:
    """One node in onnxruntime; None when it has no kernel for it."""
    kinds = {name: (TensorProto.FLOAT if a.dtype.kind == "f" else helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
             for name, a in zip(node.output, found, strict=True)}
    model = one_graph([node], {}, fed, kinds, opset, node.domain)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return list(session.run(list(node.output), {}))
    except Exception as error:  # what it refuses is not drawn
        if "ShapeInferenceError" in str(error) or "INVALID_GRAPH" in str(error):
            REFUSED.append((str(node.op_type), str(error)))
        return None


REFUSED: list[tuple[str, str]] = []
"""What onnxruntime would not load, for whoever wonders why an operator is seldom drawn."""


@dataclass(frozen=True)
class Drawer:
    """A function that draws the parameters of some operators, and whether small whole numbers stay exact in them."""

    names: tuple[str, ...]
    draw: Callable[[Builder], bool]
    exact: bool


DRAWERS: list[Drawer] = []


def draws(*names: str, exact: bool = False) -> Callable[[Callable[[Builder], bool]], Callable[[Builder], bool]]:
    """Decorator: the operators that a function draws."""
    def take(function: Callable[[Builder], bool]) -> Callable[[Builder], bool]:
        DRAWERS.append(Drawer(names, function, exact))
        return function

    return take
