"""Operators that work cell by cell, on one tensor or on several that broadcast."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import onnx_ir as ir

from partitioner.geometry import Box
from partitioner.ops.base import (
    Backward,
    Call,
    Example,
    Needs,
    NodeView,
    Operator,
    TensorType,
    Unsupported,
    WrongExtents,
    aligned,
)
from partitioner.ops.dtypes import is_known, torch_dtype
from partitioner.ops.kernels.gelu import gelu
from partitioner.ops.kernels.unsigned import compute, shifted
from partitioner.ops.registry import register
from partitioner.ops.standard.pointwise_backward import pointwise_backward

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as functional

    from partitioner.ops.emitter import Emitter
else:
    from partitioner.lazy import functional, torch

Attributes = Mapping[str, Any]
Kernel = Callable[[Attributes, list["torch.Tensor"]], "torch.Tensor"]


def _number(attributes: Attributes, name: str, default: float) -> float:
    return float(attributes.get(name, default))


def _divide(attributes: Attributes, xs: list[torch.Tensor]) -> torch.Tensor:
    rounding = None if xs[0].dtype.is_floating_point else "trunc"
    return torch.div(xs[0], xs[1], rounding_mode=rounding)


def _modulo(attributes: Attributes, xs: list[torch.Tensor]) -> torch.Tensor:
    return torch.fmod(xs[0], xs[1]) if attributes.get("fmod", 0) else torch.remainder(xs[0], xs[1])


def _power(attributes: Attributes, xs: list[torch.Tensor]) -> torch.Tensor:
    """Powers of integers in float64, as onnxruntime has them, rounded towards zero."""
    base = xs[0] if xs[0].dtype.is_floating_point else xs[0].to(torch.float64)
    return torch.pow(base, xs[1]).to(xs[0].dtype)


def _shift(attributes: Attributes, xs: list[torch.Tensor]) -> torch.Tensor:
    return shifted(xs[0], xs[1], attributes.get("direction") == "LEFT")


def _is_infinite(attributes: Attributes, xs: list[torch.Tensor]) -> torch.Tensor:
    up = torch.isposinf(xs[0]) & bool(attributes.get("detect_positive", 1))
    return up | (torch.isneginf(xs[0]) & bool(attributes.get("detect_negative", 1)))


def _prelu(attributes: Attributes, xs: list[torch.Tensor]) -> torch.Tensor:
    return torch.where(xs[0] < 0, xs[0] * xs[1], xs[0])


def _fold(step: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Kernel:
    def run(attributes: Attributes, xs: list[torch.Tensor]) -> torch.Tensor:
        result = xs[0]
        for x in xs[1:]:
            result = step(result, x)
        return result

    return run


def _mean(attributes: Attributes, xs: list[torch.Tensor]) -> torch.Tensor:
    return _fold(torch.add)(attributes, xs) / len(xs)


def _shrink(a: Attributes, xs: list[torch.Tensor]) -> torch.Tensor:
    lambd, bias = _number(a, "lambd", 0.5), _number(a, "bias", 0.0)
    zero = torch.zeros((), dtype=xs[0].dtype, device=xs[0].device)
    return torch.where(xs[0] < -lambd, xs[0] + bias, torch.where(xs[0] > lambd, xs[0] - bias, zero))


def _gelu(a: Attributes, xs: list[torch.Tensor]) -> torch.Tensor:
    return gelu(xs[0], str(a.get("approximate", "none")))


def _hard_sigmoid(a: Attributes, xs: list[torch.Tensor]) -> torch.Tensor:
    return (xs[0] * _number(a, "alpha", 0.2) + _number(a, "beta", 0.5)).clamp(0, 1)


def _selu(a: Attributes, xs: list[torch.Tensor]) -> torch.Tensor:
    alpha, gamma = _number(a, "alpha", 1.67326319217681884765625), _number(a, "gamma", 1.05070102214813232421875)
    return gamma * functional.elu(xs[0], alpha)


def _thresholded(a: Attributes, xs: list[torch.Tensor]) -> torch.Tensor:
    return torch.where(xs[0] > _number(a, "alpha", 1.0), xs[0], torch.zeros_like(xs[0]))


UNARY: dict[str, Kernel] = {
    "Relu": lambda a, xs: torch.relu(xs[0]),
    "LeakyRelu": lambda a, xs: functional.leaky_relu(xs[0], _number(a, "alpha", 0.01)),
    "Elu": lambda a, xs: functional.elu(xs[0], _number(a, "alpha", 1.0)),
    "Celu": lambda a, xs: functional.celu(xs[0], _number(a, "alpha", 1.0)),
    "Selu": _selu,
    "ThresholdedRelu": _thresholded,
    "Sigmoid": lambda a, xs: torch.sigmoid(xs[0]),
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": lambda a, xs: functional.hardswish(xs[0]),
    "Tanh": lambda a, xs: torch.tanh(xs[0]),
    "Softplus": lambda a, xs: torch.logaddexp(xs[0], torch.zeros((), dtype=xs[0].dtype, device=xs[0].device)),
    "Softsign": lambda a, xs: functional.softsign(xs[0]),
    "Gelu": _gelu,
    "Mish": lambda a, xs: functional.mish(xs[0]),
    "Swish": lambda a, xs: xs[0] * torch.sigmoid(xs[0] * _number(a, "alpha", 1.0)),
    "Shrink": _shrink,
    "Exp": lambda a, xs: torch.exp(xs[0]),
    "Log": lambda a, xs: torch.log(xs[0]),
    "Sqrt": lambda a, xs: torch.sqrt(xs[0]),
    "Reciprocal": lambda a, xs: torch.reciprocal(xs[0]),
    "Abs": lambda a, xs: torch.abs(xs[0]),
    "Neg": lambda a, xs: torch.neg(xs[0]),
    "Sign": lambda a, xs: torch.where(torch.isnan(xs[0]), xs[0], torch.sign(xs[0])),  # torch has 0 for NaN
    "Floor": lambda a, xs: torch.floor(xs[0]),
    "Ceil": lambda a, xs: torch.ceil(xs[0]),
    "Round": lambda a, xs: torch.round(xs[0]),
    "Erf": lambda a, xs: torch.erf(xs[0]),
    "Sin": lambda a, xs: torch.sin(xs[0]),
    "Cos": lambda a, xs: torch.cos(xs[0]),
    "Tan": lambda a, xs: torch.tan(xs[0]),
    "Atan": lambda a, xs: torch.atan(xs[0]),
    "Asin": lambda a, xs: torch.asin(xs[0]),
    "Acos": lambda a, xs: torch.acos(xs[0]),
    "Sinh": lambda a, xs: torch.sinh(xs[0]),
    "Cosh": lambda a, xs: torch.cosh(xs[0]),
    "Asinh": lambda a, xs: torch.asinh(xs[0]),
    "Acosh": lambda a, xs: torch.acosh(xs[0]),
    "Atanh": lambda a, xs: torch.atanh(xs[0]),
    "Not": lambda a, xs: torch.logical_not(xs[0]),
    "IsNaN": lambda a, xs: torch.isnan(xs[0]),
    "IsInf": _is_infinite,
    "BitwiseNot": lambda a, xs: torch.bitwise_not(xs[0]),
    "Identity": lambda a, xs: xs[0],
    "Dropout": lambda a, xs: xs[0],
}

BROADCAST: dict[str, Kernel] = {
    "Add": lambda a, xs: torch.add(xs[0], xs[1]),
    "Sub": lambda a, xs: torch.sub(xs[0], xs[1]),
    "Mul": lambda a, xs: torch.mul(xs[0], xs[1]),
    "Div": _divide,
    "Pow": _power,
    "Mod": _modulo,
    "PRelu": _prelu,
    "Min": _fold(lambda x, y: torch.minimum(x, y)),
    "Max": _fold(lambda x, y: torch.maximum(x, y)),
    "Sum": _fold(lambda x, y: torch.add(x, y)),
    "Mean": _mean,
    "Where": lambda a, xs: torch.where(xs[0], xs[1], xs[2]),
    "Equal": lambda a, xs: torch.eq(xs[0], xs[1]),
    "Greater": lambda a, xs: torch.gt(xs[0], xs[1]),
    "GreaterOrEqual": lambda a, xs: torch.ge(xs[0], xs[1]),
    "Less": lambda a, xs: torch.lt(xs[0], xs[1]),
    "LessOrEqual": lambda a, xs: torch.le(xs[0], xs[1]),
    "And": lambda a, xs: torch.logical_and(xs[0], xs[1]),
    "Or": lambda a, xs: torch.logical_or(xs[0], xs[1]),
    "Xor": lambda a, xs: torch.logical_xor(xs[0], xs[1]),
    "BitShift": _shift,
    "BitwiseAnd": lambda a, xs: torch.bitwise_and(xs[0], xs[1]),
    "BitwiseOr": lambda a, xs: torch.bitwise_or(xs[0], xs[1]),
    "BitwiseXor": lambda a, xs: torch.bitwise_xor(xs[0], xs[1]),
}

INTO: dict[str, Callable[[Attributes, list[torch.Tensor], torch.Tensor], torch.Tensor]] = {
    "Relu": lambda a, xs, out: torch.clamp(xs[0], min=0, out=out),
    "LeakyRelu": lambda a, xs, out: torch.ops.aten.leaky_relu.out(xs[0], _number(a, "alpha", 0.01), out=out),
    "Sigmoid": lambda a, xs, out: torch.sigmoid(xs[0], out=out),
    "Tanh": lambda a, xs, out: torch.tanh(xs[0], out=out),
    "Add": lambda a, xs, out: torch.add(xs[0], xs[1], out=out),
    "Sub": lambda a, xs, out: torch.sub(xs[0], xs[1], out=out),
    "Mul": lambda a, xs, out: torch.mul(xs[0], xs[1], out=out),
    "Div": lambda a, xs, out: torch.div(xs[0], xs[1], out=out),
}
"""The functions that torch computes into given memory, with the same bits."""

_COMPARISONS = frozenset(
    {"Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "And", "Or", "Xor", "Not", "IsNaN", "IsInf"}
)


@register
@dataclass(frozen=True)
class Pointwise(Operator):
    """Every output cell depends on the same cell of every input, broadcast as numpy does.

    The kernels are the tables `UNARY` and `BROADCAST`; a new function is one line there.
    Source: the ONNX operators of the same names, in every opset from 7.
    """

    op_types: ClassVar[tuple[str, ...]] = (*UNARY, *BROADCAST, "Clip")
    examples: ClassVar[tuple[Example, ...]] = (
        Example("Relu", ((1, 2, 5, 7),)),
        Example("LeakyRelu", ((1, 2, 5, 7),), {"alpha": 0.2}),
        Example("Sigmoid", ((2, 1, 11),)),
        Example("Elu", ((2, 1, 11),), {"alpha": 0.7}),
        Example("Selu", ((2, 1, 11),)),
        Example("Softplus", ((2, 1, 11),)),
        Example("HardSigmoid", ((2, 1, 11),), {"alpha": 0.3}),
        Example("HardSwish", ((2, 1, 11),)),
        Example("Tanh", ((1, 1, 3, 5, 4),)),
        Example("Erf", ((1, 1, 3, 5, 4),)),
        Example("Log", ((1, 1, 3, 5, 4),), between=(0.1, 2.0)),
        Example("Sqrt", ((1, 1, 3, 5, 4),), between=(0.1, 2.0)),
        Example("Clip", ((1, 2, 9), np.float32(-0.3), np.float32(0.4)), opset=13),
        Example("Clip", ((1, 2, 9),), {"min": -0.3, "max": 0.4}, opset=10),
        Example("Gelu", ((1, 2, 9),), {"approximate": "tanh"}, opset=20),
        Example("Mish", ((1, 2, 9),), opset=18),
        Example("Identity", ((1, 2, 9),)),
        Example("Dropout", ((1, 2, 9),), opset=10),
        Example("Add", ((1, 2, 5, 7), (1, 2, 5, 7))),
        Example("Sub", ((2, 3, 5, 7), (5, 1))),
        Example("Mul", ((2, 3, 5, 7), (1, 3, 1, 1))),
        Example("Div", ((3, 1, 7), (2, 3, 5, 7)), between=(0.1, 2.0)),
        Example("Pow", ((2, 3, 5), np.float32(2.0)), between=(0.1, 2.0)),
        Example("Min", ((2, 3, 5), (3, 5), (2, 1, 1))),
        Example("Max", ((2, 3, 5), (3, 5), (2, 1, 1))),
        Example("Sum", ((2, 3, 5), (3, 5))),
        Example("Mean", ((2, 3, 5), (3, 5))),
        Example("PRelu", ((2, 3, 5, 6), np.full((3, 1, 1), 0.3, np.float32)), opset=16),
        Example("Greater", ((2, 3, 5), (3, 5))),
        Example("PRelu", ((2, 3, 5, 6), (6,)), opset=9),
        Example("Clip", ((1, 2, 9), None, np.float32(0.4)), opset=13),
        Example("Dropout", ((1, 2, 9),), opset=13, outputs=2),
        Example("Gelu", ((1, 2, 9),), opset=20),
        Example("Mod", ((2, 3, 5), (3, 1)), {"fmod": 1}, between=(0.5, 9.0)),
        Example("Mod", ((2, 3, 5), (3, 5)), dtype=ir.DataType.INT32),
        Example("Div", ((2, 3, 5), (3, 5)), dtype=ir.DataType.INT32),
        Example("Where", (np.array([[True], [False], [True]]), (2, 3, 5), (3, 5))),
        Example("Acosh", ((1, 2, 5, 3),), between=(1.1, 3.0)),
        Example("Not", ((1, 2, 5, 3),), dtype=ir.DataType.BOOL),
        *(Example(name, ((2, 3, 5), (3, 1)), dtype=ir.DataType.BOOL) for name in ("And", "Or", "Xor")),
        *(Example(name, ((2, 3, 5), (2, 1, 5)), dtype=ir.DataType.INT32)
          for name in ("Equal", "GreaterOrEqual", "Less", "LessOrEqual")),
        *(Example(name, ((1, 2, 5, 3),)) for name in (
            "Celu", "ThresholdedRelu", "Softsign", "Exp", "Abs", "Neg", "Sign", "Floor", "Ceil", "Round", "Sin", "Cos",
            "Atan", "Sinh", "Cosh", "Asinh", "IsNaN")),
        *(Example(name, ((1, 2, 5, 3),), between=(0.1, 0.9))
          for name in ("Reciprocal", "Tan", "Asin", "Acos", "Atanh")),
        Example("Shrink", ((1, 2, 9),), {"lambd": 0.7, "bias": 0.2}),
        Example("Swish", ((1, 2, 9),), {"alpha": 1.5}, opset=24),
        *(Example(name, ((2, 3, 5), (3, 1)), dtype=ir.DataType.INT32)
          for name in ("BitwiseAnd", "BitwiseOr", "BitwiseXor")),
        Example("BitwiseNot", ((2, 3, 5),), dtype=ir.DataType.UINT8),
        Example("BitShift", ((2, 3, 5), (3, 1)), {"direction": "LEFT"}, dtype=ir.DataType.UINT8),
        Example("BitShift", ((2, 3, 5), (2, 3, 5)), {"direction": "RIGHT"}, opset=11, dtype=ir.DataType.UINT8),
        Example("BitShift", ((2, 3, 5), (3, 1)), {"direction": "RIGHT"}, dtype=ir.DataType.UINT64),
        *(Example(name, ((2, 3, 5), (3, 1)), dtype=ir.DataType.UINT64)
          for name in ("Add", "Sub", "Mul", "Div", "Mod", "Min", "Max", "Greater", "LessOrEqual", "Equal")),
        *(Example(name, ((2, 3, 5), (3, 1)), dtype=ir.DataType.UINT32) for name in ("Add", "Mod", "Max", "Less")),
        Example("IsInf", ((2, 3, 5),)),
        Example("IsInf", ((1, 2, 7),), {"detect_negative": 0}, opset=20),
        Example("Pow", ((2, 3, 5), np.array(3, np.int32)), dtype=ir.DataType.INT32),
        Example("Pow", ((2, 3, 5), np.float32(2.0)), opset=13, dtype=ir.DataType.INT64),
        Example("Pow", ((2, 3, 5), np.array([2], np.int64)), opset=15),
        Example("Mod", ((2, 3, 5), np.array([[-3], [2], [-4]], np.int32)), dtype=ir.DataType.INT32),
        Example("Mod", ((2, 3, 5), np.array([[-3], [2], [-4]], np.int64)), {"fmod": 1}, dtype=ir.DataType.INT64),
        Example("Clip", ((1, 2, 9), np.array(3, np.int32), np.array(6, np.int32)), dtype=ir.DataType.INT32),
        Example("Clip", ((1, 2, 9), np.float32(0.4), np.float32(-0.3)), opset=12),
        Example("Clip", ((1, 2, 9), np.float32(-0.2)), opset=11),
        Example("HardSwish", ((1, 2, 7),), opset=14, between=(-6.0, 6.0)),
        Example("PRelu", ((2, 3, 5, 6), (3, 1, 1)), opset=7),
        Example("Neg", ((1, 2, 7),), dtype=ir.DataType.INT32),
        Example("Abs", ((1, 2, 7),), opset=7, dtype=ir.DataType.INT64),
        Example("Max", ((2, 3, 5), (3, 1)), opset=13, dtype=ir.DataType.INT64),
        Example("Where", (np.array([True, False, True, False, True]), (2, 3, 5), (3, 1)), opset=9,
                dtype=ir.DataType.INT32),
    )

    op_type: str
    attributes: tuple[tuple[str, Any], ...]

    @classmethod
    def read(cls, view: NodeView) -> Self:
        _refuse_training(view)
        given = [t for t in view.inputs if t is not None]
        if not given:
            raise Unsupported("it has no input; correct the file")
        has_scalars = view.op_type in ("Clip", "Dropout")
        shape = given[0].shape if has_scalars else _broadcast(given)
        dtype = ir.DataType.BOOL if view.op_type in _COMPARISONS else given[-1 if view.op_type == "Where" else 0].dtype
        return cls(view.inputs, (TensorType(shape, dtype),), view.op_type, tuple(view.attributes.items()))

    def needs(self, output: int = 0) -> Needs:
        out = self.outputs[0].shape
        if self.op_type == "Dropout":
            return (aligned(out, out), *(None for _ in self.inputs[1:]))
        return tuple(None if t is None else aligned(t.shape, out) for t in self.inputs)

    @property
    def writes_into(self) -> bool:
        return self.op_type in INTO and self.outputs[0].dtype.is_floating_point()

    def backward(self, ins: Sequence[float], outs: Sequence[float]) -> Backward:
        return pointwise_backward(self.op_type, self.inputs, self.outputs[0], ins, outs[0])

    def run(self, call: Call) -> tuple[torch.Tensor, ...]:
        attributes = dict(self.attributes)
        if call.into is not None:
            inputs = [x for x in call.tensors if x is not None]
            return (INTO[self.op_type](attributes, inputs, call.into),)
        given = [x for x in call.tensors if x is not None]
        kernel = _clip(call) if self.op_type == "Clip" else UNARY.get(self.op_type) or BROADCAST[self.op_type]
        return (compute(self.op_type, partial(kernel, attributes), given, torch_dtype(self.outputs[0].dtype)),)


def _clip(call: Call) -> Kernel:
    """The kernel of a Clip, whose limits may be attributes or inputs that are not all given."""
    has_low, has_high = call.optional(1) is not None, call.optional(2) is not None

    def run(attributes: Attributes, xs: list[torch.Tensor]) -> torch.Tensor:
        low = xs[1] if has_low else attributes.get("min")
        high = xs[-1] if has_high else attributes.get("max")
        return xs[0] if low is None and high is None else torch.clamp(xs[0], min=low, max=high)

    return run


def _refuse_training(view: NodeView) -> None:
    if view.op_type != "Dropout":
        return
    training = view.constant(2, "training_mode")
    if training is not None and bool(training):
        raise Unsupported("it drops values at random (training_mode); export the model in eval mode")
    if any(view.used_outputs[1:]):
        raise Unsupported("its mask output is used; export the model in eval mode")


def _broadcast(types: list[TensorType]) -> tuple[int, ...]:
    try:
        return np.broadcast_shapes(*(t.shape for t in types))
    except ValueError:
        shapes = " and ".join(str(list(t.shape)) for t in types)
        raise WrongExtents(f"shapes {shapes} do not broadcast; the network cannot take this volume's extents") from None


@register
@dataclass(frozen=True)
class Cast(Operator):
    """Another element type, cell by cell.

    Source: ONNX Cast (6 to 23), CastLike.
    """

    op_types: ClassVar[tuple[str, ...]] = ("Cast", "CastLike")
    examples: ClassVar[tuple[Example, ...]] = (
        Example("Cast", ((1, 2, 9),), {"to": int(ir.DataType.DOUBLE)}),
        Example("Cast", ((1, 2, 9),), {"to": int(ir.DataType.INT32)}),
        Example("Cast", ((1, 2, 9),), {"to": int(ir.DataType.FLOAT)}, dtype=ir.DataType.INT32),
        Example("CastLike", ((1, 2, 9), np.zeros(1, np.int32))),
        *(Example("Cast", ((1, 2, 9),), {"to": int(to)}, opset=13) for to in (
            ir.DataType.BOOL, ir.DataType.INT8, ir.DataType.INT16, ir.DataType.INT64)),
        Example("Cast", ((1, 2, 9),), {"to": int(ir.DataType.UINT8)}, opset=9, between=(0.0, 9.0)),
        Example("Cast", ((1, 2, 9),), {"to": int(ir.DataType.FLOAT)}, opset=19, dtype=ir.DataType.BOOL),
        Example("Cast", ((1, 2, 9),), {"to": int(ir.DataType.INT32)}, opset=21, dtype=ir.DataType.UINT8),
    )

    @classmethod
    def read(cls, view: NodeView) -> Self:
        dtype = view.input(1).dtype if view.op_type == "CastLike" else ir.DataType(view.int("to", 1))
        if not is_known(dtype):
            raise Unsupported(f"it casts to {dtype.name}, which the runtime cannot hold")
        return cls(view.inputs, (TensorType(view.input(0).shape, dtype),))

    def needs(self, output: int = 0) -> Needs:
        shape = self.outputs[0].shape
        return (aligned(shape, shape), *(None for _ in self.inputs[1:]))

    def backward(self, ins: Sequence[float], outs: Sequence[float]) -> Backward:
        source = self.inputs[0]
        same = source is not None and source.dtype == self.outputs[0].dtype
        return Backward(shares=same, hands_on=same)

    def run(self, call: Call) -> tuple[torch.Tensor, ...]:
        return (call.tensor(0).to(torch_dtype(self.outputs[0].dtype)),)

    def emit(self, emitter: Emitter, names: Sequence[str | None], boxes: Sequence[Box | None],
             outs: Sequence[Box]) -> tuple[str, ...]:
        return (emitter.op("Cast", [names[0]], {"to": int(self.outputs[0].dtype)}),)
