"""What becomes of the outputs within the graph: probabilities, a class map, a mask; logits then never leave a rank.

    before                                  after  --output-op softmax --output-op argmax
    logits = Conv(...)                      logits/before = Conv(...)
                                            p = Softmax(logits/before)  axis 1
                                            logits = Cast(ArgMax(p))    (1, 1, ...) uint8
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import onnx_ir as ir

from partitioner.compose.graph import Writer, channel_axis, copied, set_output
from partitioner.compose.words import split_name
from partitioner.errors import PartitionError, refuse_all

KNOWN = ("softmax", "sigmoid", "argmax", "threshold")


@dataclass(frozen=True)
class OutputOp:
    """One operation on an output; `number` is what a threshold compares with."""

    word: str
    number: float = 0.0

    @property
    def makes_labels(self) -> bool:
        """Whether its results are no scores any more."""
        return self.word in ("argmax", "threshold")


def with_output_ops(model: ir.Model, ops: Sequence[str]) -> ir.Model:
    """A model whose outputs have gone through operations, in order; they keep their names.

    Args:
        ops: `[NAME=]softmax`, `sigmoid`, `argmax` or `threshold=0.5`; the name where there are several outputs.

    Raises:
        PartitionError: for an unknown operation or output, or an operation that makes no sense there.
    """
    found = copied(model)
    names = [str(v.name) for v in found.graph.outputs]
    chains: dict[str, list[OutputOp]] = {}
    problems: list[str] = []
    for text in ops:
        try:
            name, word = split_name(text, names, KNOWN, "--output-op", "output")
            chains.setdefault(name, []).append(_parse(text, word))
        except PartitionError as error:
            problems.append(str(error))
    refuse_all(problems)
    axes = {name: _axis(found, found.graph.outputs[names.index(name)]) for name in chains}
    refuse_all([p for name, chain in chains.items()
                for p in _problems(found.graph.outputs[names.index(name)], axes[name], chain)])
    for name, chain in chains.items():
        for op in chain:
            _apply(found, names.index(name), axes[name], op)
    return found


def _parse(text: str, word: str) -> OutputOp:
    kind, equals, given = word.partition("=")
    if kind != "threshold":
        if equals:
            raise PartitionError(f"--output-op {text}: {kind} takes no number; write {kind}")
        return OutputOp(kind)
    try:
        number = float(given)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise PartitionError(f"--output-op {text}: a threshold is a number, as threshold=0.5")
    return OutputOp(kind, number)


def _axis(model: ir.Model, value: ir.Value) -> int:
    return 1 if value.shape is None else channel_axis(model, len(value.shape))


def _channels(value: ir.Value, axis: int) -> int | None:
    """Channels of an output where the file tells."""
    if value.shape is None or len(value.shape) <= axis:
        return None
    found = value.shape[axis]
    return found if isinstance(found, int) else None


def _problems(value: ir.Value, axis: int, chain: Sequence[OutputOp]) -> list[str]:
    """Why operations make no sense on an output."""
    where = f"--output-op {chain[0].word} on output '{value.name}'"
    if value.shape is not None and len(value.shape) < 2:
        return [f"{where}: it has no channels ({len(value.shape)} axes); leave it out"]
    found: list[str] = []
    for before, after in pairwise(chain):
        if before.makes_labels:
            found.append(f"--output-op {after.word} on output '{value.name}': {before.word} has made labels of it; "
                         f"give {before.word} last")
    for op in chain:
        if op.word in ("softmax", "argmax") and _channels(value, axis) == 1:
            constant = "1" if op.word == "softmax" else "0"
            found.append(f"--output-op {op.word} on output '{value.name}': it has one channel, so that the result is "
                         f"{constant} everywhere; use sigmoid or threshold=0.5")
        if op.word in ("softmax", "sigmoid") and value.dtype is not None and not value.dtype.is_floating_point():
            found.append(f"--output-op {op.word} on output '{value.name}': it is {value.dtype.name}, no score; "
                         "leave it out")
    return found


def _apply(model: ir.Model, index: int, axis: int, op: OutputOp) -> None:
    value = model.graph.outputs[index]
    writer = Writer(model, str(value.name))
    dtype, shape = value.dtype, None if value.shape is None else value.shape.copy()
    if op.word == "argmax":
        classes = _channels(value, axis)
        dtype = ir.DataType.UINT8 if classes is not None and classes <= 256 else ir.DataType.INT32
        shape = shape if shape is None else ir.Shape([1 if a == axis else n for a, n in enumerate(shape)])
        made = writer.cast(writer.op("ArgMax", value, axis=axis, keepdims=1), dtype)
    elif op.word == "threshold":
        made = _above(writer, value, op.number)
        dtype = ir.DataType.UINT8
    else:
        made = _SCORES[op.word](writer, value, axis)
    set_output(model, index, made, dtype, shape)


def _above(writer: Writer, value: ir.Value, number: float) -> ir.Value:
    """1 where a score is larger than a number, 0 elsewhere."""
    kind = value.dtype or ir.DataType.FLOAT
    if not kind.is_floating_point():
        kind = ir.DataType.FLOAT
        value = writer.cast(value, kind)
    limit = writer.constant(np.array(number).astype(kind.numpy()))
    return writer.cast(writer.op("Greater", value, limit), ir.DataType.UINT8)


def _softmax(writer: Writer, value: ir.Value, axis: int) -> ir.Value:
    if writer.opset >= 13:
        return writer.op("Softmax", value, axis=axis)
    powers = writer.op("Exp", writer.op("Sub", value, writer.reduce("ReduceMax", value, [axis])))
    return writer.op("Div", powers, writer.reduce("ReduceSum", powers, [axis]))  # older ones flatten first


_SCORES: dict[str, Callable[[Writer, ir.Value, int], ir.Value]] = {
    "softmax": _softmax, "sigmoid": lambda writer, value, axis: writer.op("Sigmoid", value)}
