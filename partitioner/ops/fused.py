"""A kernel and what follows it cell by cell, block by block of the result, each block finished while it is in cache.

    y = Conv(x, w, b); z = Relu(y)        for planes [a, b) of z:   y' = conv(x[a-1:b+1]);  z[a:b] = relu(y')

No intermediate result is ever whole, and the result goes into memory that is there already: torch's kernels bring new
memory into being, whose pages cost as much as the arithmetic of small layers.  Kernels that write where they are told
(`kernels.onednn`) need no memory beside, and take a LeakyRelu along.  Which cells of the inputs a block needs follows
from the operators' maps, so that blocks are what slabs are: exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from partitioner.geometry import Box, local_slices, span
from partitioner.ops.base import Bound, Call, Needs, NodeView, Operator, Unsupported, need_pieces
from partitioner.ops.kernels import onednn
from partitioner.ops.standard.conv import Conv, ConvTranspose
from partitioner.ops.standard.norm import BatchNormalization, Normalize
from partitioner.ops.standard.pointwise import Pointwise
from partitioner.ops.standard.pool import MaxPool

if TYPE_CHECKING:
    import torch
else:
    from partitioner.lazy import torch

BLOCK = 4 << 20
"""Bytes of a block's result: fewer make the calls dear, more do not stay in cache (measured from 1 to 16 MiB)."""

MOST_AT_ONCE = 1 << 30
"""Bytes of a tensor up to which a kernel that writes where it is told takes it at once: oneDNN is slow beyond 2^31."""

MOST_KNOWN = 256
"""Blocks of a result up to which what was found out about them is kept from call to call."""

TAKEN = ("LeakyRelu",)
"""What a convolution's kernel does in passing; not Relu: oneDNN's makes zeros of NaN."""

PREVIOUS = -1
"""Stands for the result of the part before."""


@dataclass(frozen=True)
class Part:
    """One operator of several.

    Args:
        needs: those of the operator, for its one output.
        sources: where its inputs come from: inputs of the whole by their numbers, or `PREVIOUS`.
    """

    operator: Operator
    needs: Needs
    sources: tuple[int, ...]


def starts(operator: Operator) -> bool:
    """Whether a kernel brings its result into new memory, and can be run in blocks: convolutions, max pools."""
    if not isinstance(operator, Conv | ConvTranspose | MaxPool) or len(operator.outputs) != 1:
        return False
    return operator.outputs[0].rank > 3 and operator.outputs[0].dtype.is_floating_point()


def follows(operator: Operator) -> bool:
    """Whether a kernel works cell by cell, and can put its result where its input lies."""
    return isinstance(operator, Pointwise | BatchNormalization | Normalize) and operator.writes_into


def block_workspace(operator: Operator, ins: Sequence[Any], outs: Sequence[Any]) -> Any:
    """Bytes that a kernel takes beside its buffers: a block of a large result, and what it needs for that.

    Args:
        ins, outs: elements per input and output; numbers, or arrays of them.
    """
    (kind,) = operator.outputs
    if operator.writes_into:
        return operator.workspace(ins, outs)
    nbytes, plain = outs[0] * kind.itemsize, operator.workspace(ins, outs)
    block = max(float(BLOCK), math.prod(kind.shape[3:]) * kind.shape[1] * kind.itemsize)
    return np.where(nbytes > BLOCK, block + plain * np.minimum(1.0, block / np.maximum(1.0, nbytes)), plain)


@dataclass(frozen=True)
class Fused(Operator):
    """Operators of which each reads the one before, and computes the same cells.

    Args:
        in_blocks: whether the result is so large that it is computed block by block.
    """

    parts: tuple[Part, ...] = ()
    in_blocks: bool = False

    @classmethod
    def read(cls, view: NodeView) -> Self:
        raise Unsupported("it stands in no file")

    @classmethod
    def of(cls, operator: Operator, count: int, cells: int) -> Self:
        """One operator alone, with `count` inputs and `cells` cells of the result to compute."""
        parts = (Part(operator, operator.needs(0), tuple(range(count))),)
        return cls(operator.inputs, operator.outputs, parts, cells * operator.outputs[0].itemsize > BLOCK)

    def then(self, operator: Operator, sources: Sequence[int], inputs: int) -> Fused:
        """With an operator more that reads the result; its other inputs come after the first `inputs` ones."""
        if self._takes(operator):
            (part,) = self.parts
            assert isinstance(part.operator, Conv) and isinstance(operator, Pointwise)
            slope = dict(operator.attributes).get("alpha", 0.01)
            return replace(self, parts=(replace(part, operator=replace(part.operator, slope=float(slope))),))
        given = tuple(t for t, s in zip(operator.inputs, sources, strict=False) if s != PREVIOUS)
        own = (*self.inputs, *(None,) * (inputs - len(self.inputs)))
        return replace(self, inputs=(*own, *given), outputs=operator.outputs,
                       parts=(*self.parts, Part(operator, operator.needs(0), tuple(sources))))

    def _takes(self, operator: Operator) -> bool:
        """Whether the one part there is does this in passing."""
        if len(self.parts) != 1 or not isinstance(operator, Pointwise) or operator.op_type not in TAKEN:
            return False
        first = self.parts[0].operator
        return isinstance(first, Conv) and first.writes_into and first.slope is None

    def needs(self, output: int = 0) -> Needs:
        return self.parts[0].operator.needs(output)

    @property
    def writes_into(self) -> bool:
        return self.in_blocks or any(part.operator.writes_into for part in self.parts[-1:])

    @property
    def is_direct(self) -> bool:
        """Whether the first kernel writes where the result will lie."""
        return any(part.operator.writes_into for part in self.parts[:1])

    def workspace(self, ins: Sequence[float], outs: Sequence[float]) -> float:
        if not self.parts:
            return 0
        return float(block_workspace(self.parts[0].operator, ins, outs))

    @property
    def is_beside(self) -> bool:
        """Whether a result that goes to its place in a larger buffer is computed beside it first."""
        return not self.in_blocks and len(self.parts) > 1 and not self.is_direct

    def flops(self, out: float) -> float:
        return sum(part.operator.flops(out) for part in self.parts)

    def run(self, call: Call) -> tuple[torch.Tensor, ...]:
        return self.bind(call)(call)

    def bind(self, call: Call) -> Bound:
        at_once, out, boxes = _Chain(self, call.boxes, call.outs), call.outs[0], call.boxes
        if not self.in_blocks:
            return lambda call: (at_once.run(call, call.into),)
        known: list[tuple[Box, _Chain]] = []

        def run(call: Call) -> tuple[torch.Tensor, ...]:
            into = call.into
            if into is None or self._is_one_call(call):
                return (at_once.run(call, into),)
            chains = known or [(block, _Chain(self, boxes, (block,))) for block in self._blocks(out)]
            if len(chains) <= MOST_KNOWN:
                known[:] = chains
            for block, chain in chains:
                chain.run(call, _cells(into, out, block))
            return (into,)

        return run

    def _is_one_call(self, call: Call) -> bool:
        """Whether the one kernel reads its inputs and writes its result as they lie; it would copy others whole."""
        data, into = call.tensor(0), call.into
        if into is None or len(self.parts) > 1 or not self.is_direct or not onednn.suits(data):
            return False
        large = [t for t in (into, *call.tensors) if t is not None and t.dim() == data.dim()]
        return all(onednn.is_dense(t) and t.nbytes <= MOST_AT_ONCE for t in large)

    def _blocks(self, out: Box) -> Iterator[Box]:
        """Planes along the first spatial axis, one case after the other: they are dense in memory."""
        if any(len(parts) != 1 for parts in out.axes):
            yield out
            return
        cases, planes = out.axes[0][0], out.axes[2][0]
        nbytes = math.ceil(out.size // max(1, len(cases) * len(planes)) * self.outputs[0].itemsize)
        count = max(1, BLOCK // max(1, nbytes))
        if count >= len(planes) * len(cases):
            yield out
            return
        grain, ahead = self._grain(planes.start, count)
        rounds = -(-(len(planes) + ahead) // (count - count % grain))
        length = -(-(len(planes) + ahead) // (rounds * grain)) * grain  # even blocks, of whole grains
        for case in range(cases.start, cases.stop):
            for first in range(planes.start - ahead, planes.stop, length):
                here = span(max(first, planes.start), min(first + length, planes.stop))
                yield Box((span(case, case + 1), out.axes[1], here, *out.axes[3:]))

    def _grain(self, start: int, count: int) -> tuple[int, int]:
        """Planes that a transposed convolution makes of one, if so many fit into a block, and those before `start`."""
        operator = self.parts[0].operator
        window = operator.windows[0] if isinstance(operator, ConvTranspose) else None
        if window is None or window.stride > count:
            return 1, 0
        return window.stride, (start + window.lo) % window.stride


@dataclass(frozen=True)
class _Input:
    """An input of a part: its number in the whole, or `PREVIOUS`, the cells, and what it must be cut from."""

    source: int
    box: Box | None
    held: Box | None = None


class _Chain:
    """All parts for one block of the result, or the whole; kernels are bound at the first call."""

    def __init__(self, whole: Fused, boxes: Sequence[Box | None], outs: tuple[Box, ...]) -> None:
        self._outs = outs
        self._inputs = [tuple(_inputs(part, boxes, outs[0])) for part in whole.parts]
        self._boxes = [tuple(given.box for given in inputs) for inputs in self._inputs]
        self._operators = [part.operator for part in whole.parts]
        self._writes = [operator.writes_into for operator in self._operators]
        self._kernels: list[Bound | None] = [None] * len(whole.parts)
        self._is_direct = whole.is_direct

    def run(self, call: Call, into: torch.Tensor | None) -> torch.Tensor:
        """The last part writes into memory that is given."""
        result: torch.Tensor | None = None
        last = len(self._operators) - 1
        for index, operator in enumerate(self._operators):
            room = into if into is not None and (self._is_direct or index == last) else result
            tensors = tuple([_given(given, call, result) for given in self._inputs[index]])
            own = Call(tensors, self._boxes[index], self._outs, room if self._writes[index] else None)
            kernel = self._kernels[index]
            if kernel is None:
                kernel = self._kernels[index] = operator.bind(own)
            (result,) = kernel(own)
        assert result is not None
        return result if into is None or self._writes[last] else into.copy_(result)


def _inputs(part: Part, boxes: Sequence[Box | None], out: Box) -> Iterator[_Input]:
    for source, needs in zip(part.sources, part.needs, strict=False):
        held = out if source == PREVIOUS else boxes[source]
        if source == PREVIOUS or held is None or needs is None:
            yield _Input(source, held)
            continue
        wanted = Box(tuple(need_pieces(need, out) for need in needs))
        yield _Input(source, wanted, held if wanted != held else None)


def _given(given: _Input, call: Call, before: torch.Tensor | None) -> torch.Tensor | None:
    tensor = before if given.source == PREVIOUS else call.tensors[given.source]
    if tensor is None or given.held is None or given.box is None:
        return tensor
    return _cells(tensor, given.held, given.box)


def _cells(tensor: torch.Tensor, held: Box, wanted: Box) -> torch.Tensor:
    """Some of the cells that a tensor holds: a view, unless they lie in several pieces there."""
    for axis, (have, want) in enumerate(zip(held.axes, wanted.axes, strict=True)):
        if have == want:
            continue
        slices = local_slices(have, want) or (slice(0, 0),)
        parts = [tensor.narrow(axis, s.start, s.stop - s.start) for s in slices]
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts, axis)
    return tensor
