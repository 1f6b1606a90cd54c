"""What an operator is: its extents, its interval maps, its kernel and its examples, in one class.

An instance describes one node of one graph: frozen, with every parameter read from the file (its own
opset's way) and every extent static.  The rest of the toolkit asks it three things:

    needs(output)   which input cells the cells of an output depend on (the only source of halos)
    run(call)       the local kernel, on torch tensors that hold exactly those cells
    emit(emitter)   the same local computation as plain ONNX nodes (the expanded form, an oracle)

A new operator is one subclass with its `op_types`; the conformance suites iterate the registry.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

import numpy as np
import onnx_ir as ir

from partitioner.geometry import Box, Pieces, span
from partitioner.maps import AxisMap, Whole, WholeAligned, identity

if TYPE_CHECKING:
    import torch

    from partitioner.ops.emitter import Emitter

Array = np.ndarray[Any, np.dtype[Any]]


class Unsupported(Exception):
    """This node cannot be kept exact; the message gives the reason and the remedy, without the node's name."""


class WrongExtents(Unsupported):
    """The node cannot take these extents, though it might take others."""


class NothingLeft(WrongExtents):
    """The node's result has no cells at these extents."""


@dataclass(frozen=True)
class TensorType:
    """Static extents and element type of a value."""

    shape: tuple[int, ...]
    dtype: ir.DataType

    @property
    def rank(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def itemsize(self) -> float:
        """Bytes per element."""
        return self.dtype.itemsize


@dataclass(frozen=True)
class NodeView:
    """A node as its operator class reads it.

    Args:
        version: the opset version of the node's domain.
        inputs: types per input; None for an empty optional one.
        constants: the value of every input that is known beforehand, else None.
        attributes: plain Python values.
        used_outputs: whether each output has a consumer or leaves the graph.
    """

    op_type: str
    version: int
    inputs: tuple[TensorType | None, ...]
    constants: tuple[ir.TensorProtocol | None, ...]
    attributes: Mapping[str, Any]
    used_outputs: tuple[bool, ...]

    def input(self, index: int) -> TensorType:
        """Type of a required input."""
        found = self.inputs[index] if index < len(self.inputs) else None
        if found is None:
            raise Unsupported(f"input {index} is missing; the file breaks the operator's definition")
        return found

    def has(self, index: int) -> bool:
        """Whether an optional input is given."""
        return index < len(self.inputs) and self.inputs[index] is not None

    def constant(self, index: int, what: str) -> Array | None:
        """The value of an input that must be known beforehand; None when it is not given.

        Raises:
            Unsupported: when it is computed from data.
        """
        if not self.has(index):
            return None
        found = self.constants[index]
        if found is None:
            raise Unsupported(f"its {what} depend on the data; export the model with constant {what}")
        return found.numpy()

    def int(self, name: str, default: int) -> int:
        """An integer attribute."""
        return int(self.attributes.get(name, default))

    def ints(self, name: str) -> tuple[int, ...] | None:
        """A list of integers; None when it is not given."""
        found = self.attributes.get(name)
        return None if found is None else tuple(int(i) for i in found)

    def float(self, name: str, default: float) -> float:
        """A number."""
        return float(self.attributes.get(name, default))

    def text(self, name: str, default: str) -> str:
        """A string attribute."""
        return str(self.attributes.get(name, default))


def listed_integers(view: NodeView, name: str, index: int) -> tuple[int, ...] | None:
    """Integers that older opsets keep in an attribute and newer ones in a constant input."""
    given = view.ints(name)
    if given is not None:
        return given
    array = view.constant(index, name)
    return None if array is None else tuple(int(v) for v in array.reshape(-1))


@dataclass(frozen=True)
class Need:
    """How one input axis depends on the output: through `map`, from output axis `axis` (None: from all)."""

    axis: int | None
    map: AxisMap

    @property
    def is_whole(self) -> bool:
        """Whether the input axis is always needed entirely."""
        return self.axis is None or isinstance(self.map, Whole)


Needs = tuple[tuple[Need, ...] | None, ...]
"""Per input one `Need` per axis; None for an input that `read` has consumed or that is not given."""


def whole(shape: Sequence[int]) -> tuple[Need, ...]:
    """Every axis of an input is needed entirely (weights, small vectors)."""
    return tuple(Need(None, Whole(n, 1)) for n in shape)


def statistics(axis: int, extent: int) -> Need:
    """An axis over which the operator takes statistics, and which it keeps."""
    return Need(axis, WholeAligned(extent, extent))


def aligned(shape: Sequence[int], out_shape: Sequence[int]) -> tuple[Need, ...]:
    """An input broadcast against the output as numpy does: trailing axes correspond."""
    shift = len(out_shape) - len(shape)
    return tuple(
        Need(None, Whole(1, n_out)) if n == 1 and n_out != 1 else Need(a + shift, identity(n))
        for a, (n, n_out) in enumerate(zip(shape, out_shape[shift:], strict=True))
    )


@dataclass(frozen=True)
class Call:
    """One local computation: tensors that hold exactly the needed boxes, and the boxes to produce.

    Args:
        tensors: per input; None for inputs that are not given or consumed by `read`.
        boxes: the global cells that each tensor holds.
        outs: the global cells to produce, per output.
        into: memory for output 0 (only for operators with `writes_into`), or None.
    """

    tensors: tuple[torch.Tensor | None, ...]
    boxes: tuple[Box | None, ...]
    outs: tuple[Box, ...]
    into: torch.Tensor | None = None

    def tensor(self, index: int) -> torch.Tensor:
        """A tensor that is there by definition."""
        found = self.tensors[index]
        assert found is not None
        return found

    def optional(self, index: int) -> torch.Tensor | None:
        """A tensor, or None."""
        return self.tensors[index] if index < len(self.tensors) else None

    def box(self, index: int) -> Box:
        """The cells of a tensor that is there by definition."""
        found = self.boxes[index]
        assert found is not None
        return found


Bound = Callable[[Call], "tuple[torch.Tensor, ...]"]
"""Computes the outputs of calls that have the same boxes."""


@dataclass(frozen=True)
class Example:
    """A small node for the conformance suites: shapes of the data inputs, constants, attributes.

    Args:
        inputs: per input a shape (random data) or an array (a constant), or None (not given).
        opset: the opset that the node is written in.
        outputs: how many outputs the node has.
        checked: how many of them leave the graph; the others are not used.
        between: the range of random floating-point data.
        dtype: the element type of random data; float32 stands for any floating-point type.
    """

    op_type: str
    inputs: tuple[tuple[int, ...] | Array | np.generic | None, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict[str, Any])
    opset: int = 18
    outputs: int = 1
    checked: int = 1
    between: tuple[float, float] = (-2.0, 2.0)
    dtype: ir.DataType = ir.DataType.FLOAT


@dataclass(frozen=True)
class Reduction:
    """What makes an operator a reduction: it is `partial + AllReduce + finish` over some axes of its inputs.

    Args:
        axes: axes of input 0 alone.
        contracted: axes that several inputs have in common; per input its axis, or None.
    """

    axes: tuple[int, ...] = ()
    contracted: tuple[tuple[int | None, ...], ...] = ()

    @property
    def dimensions(self) -> tuple[tuple[int | None, ...], ...]:
        """Every dimension reduced over: per input its axis, or None."""
        return (*((axis,) for axis in self.axes), *self.contracted)


@dataclass(frozen=True)
class Backward:
    """What the gradient of one call needs, from the call until it has been computed.

    Args:
        inputs, outputs: tensors that are kept as they are.
        beside: bytes of other tensors that are kept.
        workspace: bytes taken while it is computed, beside the gradients themselves.
        hands_on: whether the inputs' gradients are that of output 0, or parts of it, in its memory.
        shares: whether output 0 lies in the memory of input 0 when nobody gives it memory.
    """

    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    beside: float = 0.0
    workspace: float = 0.0
    hands_on: bool = False
    shares: bool = False


class Decomposer(Protocol):
    """Writes the nodes into which a reduction is split."""

    @property
    def opset(self) -> int:
        """Opset version of the default domain."""
        ...

    def op(self, op_type: str, inputs: Sequence[ir.Value | None], attributes: Mapping[str, Any] | None = None,
           outputs: int = 1, domain: str = "") -> tuple[ir.Value, ...]:
        """A new node; returns its outputs."""
        ...

    def reduce(self, op_type: str, x: ir.Value, axes: Sequence[int], keepdims: bool) -> ir.Value:
        """A local reduction over `axes`."""
        ...

    def all_reduce(self, kind: str, partial: Sequence[ir.Value]) -> tuple[ir.Value, ...]:
        """Partial results merged over the ranks that share the reduced axes: sum, prod, max, min or moments."""
        ...

    def constant(self, array: Array) -> ir.Value:
        """A constant."""
        ...


class NotADecomposition(TypeError):
    """`decompose` was called on an operator that is no reduction."""


@dataclass(frozen=True)
class Operator(ABC):
    """One node's operator with all parameters.

    Args:
        inputs: types per input; None for an empty optional one.
        outputs: types per output.
    """

    op_types: ClassVar[tuple[str, ...]] = ()
    domain: ClassVar[str] = ""
    examples: ClassVar[tuple[Example, ...]] = ()

    inputs: tuple[TensorType | None, ...]
    outputs: tuple[TensorType, ...]

    @classmethod
    @abstractmethod
    def read(cls, view: NodeView) -> Self:
        """The operator of a node.

        Raises:
            Unsupported: when the node cannot be kept exact.
        """

    @abstractmethod
    def needs(self, output: int = 0) -> Needs:
        """Per input and axis, which cells the cells of an output depend on."""

    @abstractmethod
    def run(self, call: Call) -> tuple[torch.Tensor, ...]:
        """Compute `call.outs` from `call.tensors`; differentiable unless `call.into` is given."""

    def bind(self, call: Call) -> Bound:
        """The kernel for calls like this one: the same boxes, other data; what follows from the boxes is found once.

        It computes what `run` does, and falls back to that for calls that differ in more.
        """
        return self.run

    def emit(self, emitter: Emitter, names: Sequence[str | None], boxes: Sequence[Box | None],
             outs: Sequence[Box]) -> tuple[str, ...]:
        """The same local computation as ONNX nodes; by default the node itself, for pointwise operators.

        Args:
            names: per input; None when it is not given, was consumed by `read`, or has no cell here.
            boxes: the global cells that each input holds, as in `Call`; some of `outs` have cells.

        Returns:
            names per output; "" where it has no cell.
        """
        return emitter.same(names, len(outs))

    @property
    def writes_into(self) -> bool:
        """Whether the kernel can write output 0 into memory given to it, without a copy."""
        return False

    @property
    def gradient_work(self) -> float:
        """Operations of the gradients for each of the result's own: a product's two take as many each."""
        return 1.0

    @property
    def has_gradient(self) -> bool:
        """Whether the kernel, called without `into`, is differentiable by torch (where the operator itself is)."""
        return True

    @property
    def is_view(self) -> bool:
        """Whether output 0 is a view of input 0's memory; the kernel must then return one."""
        return False

    @property
    def explicit(self) -> Mapping[str, tuple[int, ...]] | None:
        """The padding to which auto_pad, ceil_mode and output_shape amount, as plain attributes.

        None where plain attributes cannot say it, or for operators that have none of these.
        """
        return None

    @property
    def reduction(self) -> Reduction | None:
        """The axes over which this operator can be split into partial results, if it is a reduction."""
        return None

    def decompose(self, write: Decomposer, inputs: Sequence[ir.Value | None]) -> ir.Value | tuple[ir.Value, ...]:
        """The same outputs as local partials, `AllReduce` and a local finish; only for reductions."""
        raise NotADecomposition(type(self).__name__)

    def workspace(self, ins: Sequence[float], outs: Sequence[float]) -> float:
        """Bytes that the kernel allocates beside its outputs, given elements per input and output."""
        return 0

    def backward(self, ins: Sequence[float], outs: Sequence[float]) -> Backward:
        """What the gradient of a call needs, given elements per input and output; by default nothing of the call."""
        return Backward(shares=self.is_view, hands_on=self.is_view)

    def flops(self, out: float) -> float:
        """Floating-point operations for `out` elements of output 0."""
        return out


def need_pieces(need: Need, out: Box) -> Pieces:
    """The input cells along one axis for an output box; none when the box is empty."""
    if not out:
        return ()
    if need.axis is None:
        return span(0, need.map.n_in)
    return need.map.needed_by(out.axes[need.axis])
