"""Operators that work cell by cell, in float64, from their ONNX definitions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

Array = np.ndarray


class Node(Protocol):
    """What a formula may ask of a node."""

    @property
    def attributes(self) -> Mapping[str, Any]: ...

    def get(self, name: str, default: Any = None) -> Any: ...


Rule = Callable[[Any, list[Any]], Array]


def _scaled_exponential(x: Array, alpha: float) -> Array:
    return np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0)))


def _clip(node: Node, xs: list[Any]) -> Array:
    low = node.get("min") if len(xs) < 2 else xs[1]
    high = node.get("max") if len(xs) < 3 else xs[2]
    x = xs[0] if low is None else np.maximum(xs[0], low)
    return x if high is None else np.minimum(x, high)


def _gelu(node: Node, xs: list[Any]) -> Array:
    x = xs[0]
    if node.get("approximate", "none") == "tanh":
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + _erf(x / math.sqrt(2)))


def _divide(node: Node, xs: list[Any]) -> Array:
    return xs[0] / xs[1] if xs[0].dtype.kind == "f" else np.trunc(xs[0] / xs[1]).astype(xs[0].dtype)


_erf = np.vectorize(math.erf, otypes=[np.float64])

_POINTWISE: dict[str, Rule] = {
    "Relu": lambda n, xs: np.maximum(xs[0], 0),
    "LeakyRelu": lambda n, xs: np.where(xs[0] < 0, n.get("alpha", 0.01) * xs[0], xs[0]),
    "PRelu": lambda n, xs: np.where(xs[0] < 0, xs[1] * xs[0], xs[0]),
    "Elu": lambda n, xs: _scaled_exponential(xs[0], n.get("alpha", 1.0)),
    "Celu": lambda n, xs: np.maximum(xs[0], 0)
    + np.minimum(0, n.get("alpha", 1.0) * np.expm1(xs[0] / n.get("alpha", 1.0))),
    "Selu": lambda n, xs: n.get("gamma", 1.0507010221481323)
    * _scaled_exponential(xs[0], n.get("alpha", 1.6732631921768188)),
    "ThresholdedRelu": lambda n, xs: np.where(xs[0] > n.get("alpha", 1.0), xs[0], 0),
    "Sigmoid": lambda n, xs: 1 / (1 + np.exp(-xs[0])),
    "HardSigmoid": lambda n, xs: np.clip(n.get("alpha", 0.2) * xs[0] + n.get("beta", 0.5), 0, 1),
    "HardSwish": lambda n, xs: xs[0] * np.clip(xs[0] / 6 + 0.5, 0, 1),
    "Softplus": lambda n, xs: np.log1p(np.exp(-np.abs(xs[0]))) + np.maximum(xs[0], 0),
    "Softsign": lambda n, xs: xs[0] / (1 + np.abs(xs[0])),
    "Gelu": _gelu,
    "Mish": lambda n, xs: xs[0] * np.tanh(np.log1p(np.exp(xs[0]))),
    "Swish": lambda n, xs: xs[0] / (1 + np.exp(-n.get("alpha", 1.0) * xs[0])),
    "Shrink": lambda n, xs: np.where(xs[0] < -n.get("lambd", 0.5), xs[0] + n.get("bias", 0.0),
                                     np.where(xs[0] > n.get("lambd", 0.5), xs[0] - n.get("bias", 0.0), 0)),
    "Reciprocal": lambda n, xs: 1 / xs[0],
    "Neg": lambda n, xs: -xs[0],
    "Round": lambda n, xs: np.rint(xs[0]),
    "Erf": lambda n, xs: _erf(xs[0]),
    "Not": lambda n, xs: ~xs[0],
    "IsNaN": lambda n, xs: np.isnan(xs[0]),
    "IsInf": lambda n, xs: (np.isposinf(xs[0]) & bool(n.get("detect_positive", 1)))
    | (np.isneginf(xs[0]) & bool(n.get("detect_negative", 1))),
    "Identity": lambda n, xs: xs[0],
    "Dropout": lambda n, xs: xs[0],
    "Clip": _clip,
    "Div": _divide,
    "Pow": lambda n, xs: np.power(xs[0], xs[1]).astype(xs[0].dtype),
    "Mod": lambda n, xs: np.fmod(xs[0], xs[1]) if n.get("fmod", 0) else np.mod(xs[0], xs[1]),
    "Min": lambda n, xs: _over(np.minimum, xs),
    "Max": lambda n, xs: _over(np.maximum, xs),
    "Sum": lambda n, xs: _over(np.add, xs),
    "Mean": lambda n, xs: _over(np.add, xs) / len(xs),
    "Where": lambda n, xs: np.where(xs[0], xs[1], xs[2]),
}


def _over(function: Callable[[Array, Array], Array], xs: list[Array]) -> Array:
    found = xs[0]
    for x in xs[1:]:
        found = function(found, x)
    return found


_SAME_IN_NUMPY = {
    "Exp": np.exp, "Log": np.log, "Sqrt": np.sqrt, "Abs": np.abs, "Sign": np.sign, "Floor": np.floor,
    "Ceil": np.ceil, "Sin": np.sin, "Cos": np.cos, "Tan": np.tan, "Asin": np.arcsin, "Acos": np.arccos,
    "Atan": np.arctan, "Sinh": np.sinh, "Cosh": np.cosh, "Tanh": np.tanh, "Asinh": np.arcsinh,
    "Acosh": np.arccosh, "Atanh": np.arctanh, "Add": np.add, "Sub": np.subtract, "Mul": np.multiply,
    "Equal": np.equal, "Greater": np.greater, "GreaterOrEqual": np.greater_equal, "Less": np.less,
    "LessOrEqual": np.less_equal, "And": np.logical_and, "Or": np.logical_or, "Xor": np.logical_xor,
    "MatMul": np.matmul,
}

POINTWISE: dict[str, Rule] = _POINTWISE | {
    name: (lambda n, xs, f=function: f(*xs)) for name, function in _SAME_IN_NUMPY.items()}
