"""Operators that work cell by cell: of floats, whole numbers, bits and flags, and the changes between these."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from tests.builder import MICROSOFT, Array, Builder, Value, draws

BOUNDS = {"Log": (0.1, 2.0), "Sqrt": (0.1, 2.0), "Reciprocal": (0.2, 2.0), "Asin": (-0.9, 0.9), "Acos": (-0.9, 0.9),
          "Atanh": (-0.9, 0.9), "Acosh": (1.1, 3.0), "Tan": (-1.0, 1.0), "Exp": (-3.0, 3.0), "Sinh": (-3.0, 3.0),
          "Cosh": (-3.0, 3.0)}
"""Where a function is defined and tame."""

PARAMETERS = {"LeakyRelu": ("alpha",), "Elu": ("alpha",), "Celu": ("alpha",), "Selu": ("alpha", "gamma"),
              "ThresholdedRelu": ("alpha",), "HardSigmoid": ("alpha", "beta"), "Swish": ("alpha",),
              "Shrink": ("lambd", "bias")}


@draws("Relu", "Neg", "Abs", "Identity", "Sign", "Clip", exact=True)
def unary(b: Builder) -> bool:
    op = b.op("Relu", "Neg", "Abs", "Identity", "Sign", "Clip")
    if op in ("Neg", "Abs", "Sign") and b.opset >= 13 and b.integer(0, 3) == 0:
        return b.add(op, [b.whole(b.choose(np.int32, np.int64))])
    return clip(b, b.last) if op == "Clip" else b.add(op, [b.last])


def clip(b: Builder, x: Value) -> bool:
    low, high = (-1.0, 2.0) if b.style.integers else b.choose((-0.5, 0.75), (0.4, 0.2), (-0.25, 9.0))
    if b.opset < 11:
        return b.add("Clip", [x], {"min": low, "max": high})
    if b.opset >= 12 and b.integer(0, 3) == 0:
        return b.add("Clip", [b.whole(np.int32), np.array(-1, np.int32), np.array(3, np.int32)])
    bounds = b.choose((low, high), (low,), (None, high))
    return b.add("Clip", [x, *(None if v is None else np.array(v, np.float32) for v in bounds)])


@draws("LeakyRelu", "Elu", "Celu", "Selu", "ThresholdedRelu", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh",
       "Softplus", "Softsign", "Gelu", "Mish", "Swish", "Shrink", "Exp", "Log", "Sqrt", "Reciprocal", "Floor", "Ceil",
       "Round", "Erf", "Sin", "Cos", "Tan", "Asin", "Acos", "Atan", "Sinh", "Cosh", "Asinh", "Acosh", "Atanh",
       "Dropout")
def function(b: Builder) -> bool:
    from tests.builder import DRAWERS

    names = next(d.names for d in DRAWERS if d.draw is function)
    op = b.op(*names)
    x: Value | None = b.last
    if op in ("Floor", "Ceil", "Round") and b.add("Mul", [b.last, np.float32(7)]):
        x = b.values[-1]
    if op in BOUNDS:
        x = b.within(b.last, *BOUNDS[op])
    if x is None:
        return False
    attributes = {name: b.choose(0.3, 0.7, 1.5) if name != "bias" else 0.2
                  for name in PARAMETERS.get(op, ()) if b.flag()}
    if op == "Gelu":
        attributes = {"approximate": b.choose("none", "tanh")}
    return b.add(op, [x], attributes)


def broadcasts(one: tuple[int, ...], two: tuple[int, ...]) -> bool:
    return len(one) <= len(two) and all(a in (1, n) for a, n in zip(one[::-1], two[::-1], strict=False))


def partner(b: Builder, x: Value) -> Value | Array:
    """A value, an input or a constant that broadcasts to the shape of x."""
    partners = [v for v in b.values if v.is_float and broadcasts(v.shape, x.shape)]
    if b.flag() and partners:
        return b.choose(*partners)
    shape = part_shape(b, x)
    return b.feed(*shape) if shape and b.integer(0, 3) == 0 else b.data(*shape)


def part_shape(b: Builder, x: Value) -> list[int]:
    return [n if b.flag() else 1 for n in x.shape][b.integer(0, len(x.shape)) :]


@draws("Add", "Sub", "Max", "Min", "Sum", exact=True)
def binary(b: Builder) -> bool:
    x = b.last
    op = b.op("Add", "Sub", "Max", "Min", "Sum")
    other = partner(b, x)
    if op in ("Max", "Min", "Sum") and b.flag():
        return b.add(op, [x, other, partner(b, x)])
    return b.add(op, [x, other] if b.flag() else [other, x])


@draws("Mul", "Mean", "Div", "Pow", "PRelu", "Mod")
def product(b: Builder) -> bool:
    op, x = b.op("Mul", "Mean", "Div", "Pow", "PRelu", "Mod"), b.last
    other = partner(b, x)
    if op == "PRelu":
        return b.add(op, [x, b.data(*part_shape(b, x))])
    if op == "Div" or (op == "Mod" and b.opset >= 10):
        other = np.abs(b.data(*part_shape(b, x))) + np.float32(0.5)
        return b.add(op, [x, other], {"fmod": 1} if op == "Mod" else None)
    if op == "Pow":
        base = b.within(x, 0.1, 2.0)
        return base is not None and b.add(op, [base, np.float32(b.choose(0.5, 2.0, 3.0, -1.0))])
    return b.add(op, [x, other] if b.flag() else [other, x])


@draws("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", exact=True)
def comparison(b: Builder) -> bool:
    op = b.op("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")
    if op == "Equal" or b.flag():
        x = b.whole(np.int64)
        return b.add(op, [x, b.whole_data(np.int64, *part_shape(b, x))])
    x = b.last
    return b.add(op, [x, partner(b, x)])


@draws("And", "Or", "Xor", "Not", exact=True)
def logic(b: Builder) -> bool:
    op, x = b.op("And", "Or", "Xor", "Not"), b.whole(bool)
    if op == "Not":
        return b.add(op, [x])
    pair = [x, b.whole_data(bool, *part_shape(b, x))]
    return b.add(op, pair if b.flag() else pair[::-1])


@draws("BitwiseAnd", "BitwiseOr", "BitwiseXor", "BitwiseNot", "BitShift", "Mod", "Div", exact=True)
def bits(b: Builder) -> bool:
    op = b.op("BitwiseAnd", "BitwiseOr", "BitwiseXor", "BitwiseNot", "BitShift", "Mod", "Div")
    kind = b.choose(np.uint8, np.uint32) if op == "BitShift" else b.choose(np.int32, np.int64, np.uint8)
    x = b.whole(kind)
    if op == "BitwiseNot":
        return b.add(op, [x])
    other = b.whole_data(kind, *part_shape(b, x), low=1)
    if op == "BitShift":
        return b.add(op, [x, other], {"direction": b.choose("LEFT", "RIGHT")})
    return b.add(op, [x, other], {"fmod": b.integer(0, 1)} if op == "Mod" else None)


@draws("Where", exact=True)
def where(b: Builder) -> bool:
    x = b.last
    flags = [v for v in b.values if v.cells.dtype == bool and broadcasts(v.shape, x.shape)]
    if flags and b.integer(0, 2):
        chosen: Value | Array = b.choose(*flags)
    else:
        array = b.whole_data(bool, *part_shape(b, x))
        chosen = b.feed_array(array) if array.shape and b.flag() else array
    pair = [x, partner(b, x)]
    return b.add("Where", [chosen, *(pair if b.flag() else pair[::-1])])


@draws("IsNaN", "IsInf", exact=True)
def oddities(b: Builder) -> bool:
    op = b.op("IsNaN", "IsInf")
    attributes = {"detect_negative": b.integer(0, 1)} if op == "IsInf" else None
    return bool(op) and b.add(op, [b.last], attributes)


@draws("Cast", "CastLike", exact=True)
def cast(b: Builder) -> bool:
    """Other types to floats, and floats to other types."""
    op = b.op("Cast", "CastLike")
    others = [v for v in b.values if not v.is_float and v.shape]
    if others and b.integer(0, 3):
        x = b.choose(*others)
        return b.add("Cast", [x], {"to": TensorProto.FLOAT}) if op == "Cast" else b.add(op, [x, np.float32(0)])
    x = b.last
    if not b.style.integers and b.add("Mul", [x, np.float32(5)]):
        x = b.values[-1]
    if np.abs(x.cells).max() > 100:
        return False
    if op == "CastLike":
        return b.add(op, [x, np.array([1], b.choose(np.int32, np.int64))])
    kinds = [TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL]
    kinds += [TensorProto.UINT8] if x.cells.min() >= 0 else [TensorProto.INT8]
    return b.add(op, [x], {"to": b.choose(*kinds)})


@draws(*(f"{MICROSOFT}:{name}" for name in ("Gelu", "BiasGelu", "FastGelu", "QuickGelu")))
def contrib(b: Builder) -> bool:
    x = b.last
    op = b.op(*(f"{MICROSOFT}:{name}" for name in ("Gelu", "BiasGelu", "FastGelu", "QuickGelu")))
    if op.endswith("QuickGelu"):
        return b.add(op, [x], {"alpha": b.choose(1.702, 1.1)})
    bias = op.endswith("BiasGelu") or (op.endswith("FastGelu") and b.flag())
    return b.add(op, [x, b.data(x.shape[-1])] if bias else [x])
