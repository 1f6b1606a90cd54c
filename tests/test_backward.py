"""What every operator says that autograd keeps of it, against what torch keeps: all examples of the registry."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from partitioner import dialect
from partitioner.geometry import Box, local_slices, union
from partitioner.loader import load_model
from partitioner.ops.base import Call, Operator, TensorType, need_pieces
from partitioner.ops.nodes import operator_of
from partitioner.ops.own.training import TrainingBatchNormalization, TrainingDropout
from partitioner.ops.standard.norm import LocalMoments, Normalize
from partitioner.ops.weights import is_trainable
from passes.canonicalize import Canonicalize
from passes.pipeline import Pipeline
from runtime.memory import view
from runtime.program import Window
from tests.examples import Case, case_model, examples

CASES = [case for case in examples() if case.domain != dialect.DOMAIN]

SMALL = 0.4
"""Of the largest tensor of an example: statistics and factors per channel are smaller, and count for little in a
volume.  Vectors along one axis (indices, factors) never count."""

TINY = 28
"""Examples of fewer cells are vectors themselves."""


def kept(operator: Operator, tensors: Sequence[torch.Tensor | None]) -> tuple[dict[int, int], Sequence[torch.Tensor]]:
    """Bytes of the storages that autograd keeps of a call on these cells, by their address; and the results."""
    found: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        is_vector = tensor.numel() <= longest and sum(n > 1 for n in tensor.shape) <= 1
        if not is_vector or storage.data_ptr() in given:
            found[storage.data_ptr()] = storage
        return tensor

    given = {place(t) for t in tensors if t is not None}
    longest = max(max(shape, default=1) for shape in (
        *(t.shape for t in tensors if t is not None), *(o.shape for o in operator.outputs)))
    outs = tuple(Box.whole(t.shape) for t in operator.outputs)
    boxes = tuple(None if t is None else needed(operator, i, outs) for i, t in enumerate(tensors))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        results = operator.run(Call(tuple(tensors), boxes, outs))
    return {place: storage.nbytes() for place, storage in found.items() if storage.nbytes()}, results


def needed(operator: Operator, index: int, outs: Sequence[Box]) -> Box:
    """The cells of an input that the outputs need, of all of them together."""
    found = [Box(tuple(need_pieces(need, out) for need in needs)) for i, out in enumerate(outs)
             if (needs := operator.needs(i)[index]) is not None]
    return functools.reduce(lambda a, b: Box(tuple(union(p, q) for p, q in zip(a.axes, b.axes, strict=True))), found)


def cells_of(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    whole = Box.whole(tuple(tensor.shape))
    return view(tensor, Window("", box, tuple(local_slices(h, w) or (slice(0, 0),) for h, w in zip(
        whole.axes, box.axes, strict=True))))


def place(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def check(operator: Operator, tensors: Sequence[torch.Tensor | None], weights: Sequence[bool]) -> None:
    """Hold a declaration against one call."""
    outs = tuple(Box.whole(t.shape) for t in operator.outputs)
    tensors = [None if t is None else cells_of(t, needed(operator, i, outs)) for i, t in enumerate(tensors)]
    found, results = kept(operator, tensors)
    ins = [0.0 if t is None else float(t.numel()) for t in tensors]
    told = operator.backward(ins, [float(t.numel()) for t in results])
    differentiable = any(t.requires_grad for t in results)
    data = [t for t, is_weight in zip(tensors, weights, strict=True) if t is not None and not is_weight]
    if max(t.numel() for t in (*data, *results)) < TINY:
        return
    least = max(64.0, SMALL * max(size(t) for t in (*data, *results)))
    named = {place(t): size(t) for t in (*(tensors[i] for i in told.inputs if not weights[i]),
                                         *(results[i] for i in told.outputs)) if t is not None}
    constants = {place(t) for t, is_weight in zip(tensors, weights, strict=True) if t is not None and is_weight}
    real = {where: n for where, n in found.items() if where not in constants and n >= least}
    expected = sum(n for n in (*named.values(), told.beside) if n >= least) if differentiable else 0.0
    assert abs(sum(real.values()) - expected) < least, (found, told)
    if told.shares:
        assert place(results[0]) == place(next(t for t in tensors if t is not None))
    others = [n for where, n in real.items() if where not in named]
    for where, nbytes in named.items():  # itself, or a padded or ordered copy of it
        if differentiable and nbytes >= least:
            assert where in found or any(n >= nbytes for n in others), (nbytes, others)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_operators_keep_what_they_say(case: Case) -> None:
    model, inputs = case_model(case)
    graph = Pipeline((Canonicalize({}),)).run(load_model(model)).graph
    for node in graph:
        operator = operator_of(node)
        if not operator.has_gradient or any(v is not None and v.producer() is not None for v in node.inputs):
            continue
        tensors = [_tensor(operator, i, v, inputs) for i, v in enumerate(node.inputs)]
        if any(t is not None and t.requires_grad for t in tensors):
            check(operator, tensors, [v is not None and v.const_value is not None for v in node.inputs])


def _tensor(operator: Operator, index: int, value: ir.Value | None, inputs: dict[str, Any]) -> torch.Tensor | None:
    if value is None or operator.needs(0)[index] is None:
        return None
    if value.const_value is None:
        tensor = torch.from_numpy(np.array(inputs[str(value.name)]))
        return tensor.requires_grad_() if tensor.is_floating_point() else tensor
    return torch.from_numpy(np.array(value.const_value.numpy())).requires_grad_(is_trainable(value))


SHAPE = (2, 8, 7, 6, 5)
FLOAT = ir.DataType.FLOAT


@pytest.mark.parametrize("operator", [
    LocalMoments((TensorType(SHAPE, FLOAT),), (TensorType((), ir.DataType.INT64),
                                               *[TensorType((1, 8, 1, 1, 1), FLOAT)] * 2), (0, 2, 3, 4)),
    Normalize((TensorType(SHAPE, FLOAT), TensorType((), ir.DataType.INT64), *[TensorType((1, 8, 1, 1, 1), FLOAT)] * 2,
               *[TensorType((8,), FLOAT)] * 2), (TensorType(SHAPE, FLOAT),), 1e-5),
    TrainingBatchNormalization((TensorType(SHAPE, FLOAT), *[TensorType((8,), FLOAT)] * 2),
                               (TensorType(SHAPE, FLOAT), *[TensorType((8,), FLOAT)] * 2), 1e-5),
    *(TrainingDropout((TensorType(SHAPE, FLOAT), TensorType((), ir.DataType.INT64)), (TensorType(SHAPE, FLOAT),),
                      ratio, 0, channels) for ratio, channels in ((0.5, False), (0.0, False), (0.3, True))),
], ids=lambda operator: type(operator).__name__)
def test_operators_of_our_own_keep_what_they_say(operator: Operator) -> None:
    tensors = [None if t is None else _drawn(t) for t in operator.inputs]
    check(operator, tensors, [t is not None and len(t.shape) < 2 for t in operator.inputs])


def _drawn(kind: TensorType) -> torch.Tensor:
    if kind.dtype != FLOAT:
        return torch.tensor(math.prod(SHAPE) // SHAPE[1])
    return torch.rand(kind.shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
