"""Unsigned integers for which torch has no arithmetic, computed in int64.

    uint16, uint32   int64 holds them all; results are taken modulo 2^16 and 2^32
    uint64           sums, differences, products and bits are those of int64, modulo 2^64;
                     order is that of int64 with the first bit flipped; quotients by half steps

Pointwise operators and those that only move cells do so; the others refuse these types.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import onnx_ir as ir

from partitioner.ops.base import NodeView, Unsupported

if TYPE_CHECKING:
    import torch
else:
    from partitioner.lazy import torch

Tensors = Sequence["torch.Tensor"]
Kernel = Callable[[list["torch.Tensor"]], "torch.Tensor"]

_FIRST_BIT = -(2**63)

_TYPES = frozenset({ir.DataType.UINT16, ir.DataType.UINT32, ir.DataType.UINT64})

_COMBINING = frozenset({
    "ReduceSum", "ReduceProd", "ReduceMax", "ReduceMin", "ReduceMean", "ReduceL1", "ReduceL2", "ReduceSumSquare",
    "ReduceLogSum", "ReduceLogSumExp", "ArgMax", "ArgMin", "CumSum", "CumProd", "MatMul", "Gemm", "Einsum",
    "MaxPool"})
"""Operators that combine cells of one tensor, for which torch has no kernel of these types."""


def refuse_unsigned(view: NodeView) -> None:
    """Refuse arithmetic that torch lacks.

    Raises:
        Unsupported: for operators that combine cells.
    """
    scatters = view.op_type.startswith("Scatter") and view.text("reduction", "none") != "none"
    for given in view.inputs if scatters or view.op_type in _COMBINING else ():
        if given is not None and given.dtype in _TYPES:
            raise Unsupported(f"arithmetic of {given.dtype.name} is not supported here; cast to INT64 before it")


def moved(kernel: Callable[..., torch.Tensor], *xs: torch.Tensor) -> torch.Tensor:
    """Run a kernel that only moves cells, on signed integers of the same width where torch lacks unsigned ones."""
    wide = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}.get(xs[0].dtype)
    return kernel(*xs) if wide is None else kernel(*(x.view(wide) for x in xs)).view(xs[0].dtype)


def narrow_types() -> tuple[torch.dtype, ...]:
    """The types that int64 holds."""
    return torch.uint16, torch.uint32


def widened(x: torch.Tensor) -> torch.Tensor:
    """A tensor of a type with arithmetic: uint16 and uint32 as int64."""
    return x.to(torch.int64) if x.dtype in narrow_types() else x


def compute(op_type: str, kernel: Kernel, xs: Tensors,
            dtype: torch.dtype) -> torch.Tensor:
    """Run a kernel, a pointwise operator's, on tensors of any element type.

    Args:
        dtype: element type of the result.
    """
    if xs and all(x.dtype == torch.uint64 for x in xs) and op_type in _BY_BITS:
        found = _BY_BITS[op_type](kernel, [x.view(torch.int64) for x in xs])
        return found.view(dtype) if dtype == torch.uint64 else found
    result = kernel([_number(op_type, widened(x)) for x in xs])
    return result.to(dtype) if dtype in (*narrow_types(), torch.uint64) else result


def _number(op_type: str, x: torch.Tensor) -> torch.Tensor:
    """uint64 beside other types: an exponent, which float64 holds as far as a power is not infinite."""
    return x.to(torch.float64) if x.dtype == torch.uint64 and op_type == "Pow" else x


def shifted(x: torch.Tensor, places: torch.Tensor, left: bool) -> torch.Tensor:
    """Bits moved by some places; those that leave are gone, and a sign fills up from the left."""
    width, is_wide = x.element_size() * 8, x.dtype == torch.uint64
    bits, places = x.view(torch.int64) if is_wide else x.to(torch.int64), places.to(torch.int64)
    places = torch.where(places < 0, width, places)  # of uint64 from 2^63 on
    if left:
        moved = torch.where(places >= width, 0, bits << places.clamp(max=width - 1))
    elif is_wide:
        moved = ((bits >> 1) & ~_FIRST_BIT) >> (places - 1).clamp(min=0, max=63)
        moved = torch.where(places == 0, bits, moved)
    else:
        moved = bits >> places.clamp(max=63)
    return moved.view(x.dtype) if is_wide else moved.to(x.dtype)


def _as_they_are(kernel: Kernel, xs: Tensors) -> torch.Tensor:
    return kernel(list(xs))


def _compared(kernel: Kernel, xs: Tensors) -> torch.Tensor:
    return kernel([x ^ _FIRST_BIT for x in xs])


def _chosen(kernel: Kernel, xs: Tensors) -> torch.Tensor:
    return _compared(kernel, xs) ^ _FIRST_BIT


def _quotient(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x / y: half of x fits into int64, the quotient of that is off by at most one."""
    small = y.clamp(min=1)  # of the divisors from 2^63 on, whose quotients are 0 and 1
    half = torch.div((x >> 1) & ~_FIRST_BIT, small, rounding_mode="floor") << 1
    rest = x - half * small
    near = half + ((rest ^ _FIRST_BIT) >= (small ^ _FIRST_BIT))
    return torch.where(y < 0, ((x ^ _FIRST_BIT) >= (y ^ _FIRST_BIT)).to(x.dtype), near)


def _divided(kernel: Kernel, xs: Tensors) -> torch.Tensor:
    return _quotient(xs[0], xs[1])


def _remainder(kernel: Kernel, xs: Tensors) -> torch.Tensor:
    return xs[0] - _quotient(xs[0], xs[1]) * xs[1]


_BY_BITS: dict[str, Callable[[Kernel, Tensors], torch.Tensor]] = {
    **dict.fromkeys(("Add", "Sub", "Mul", "Sum"), _as_they_are),
    **dict.fromkeys(("Greater", "GreaterOrEqual", "Less", "LessOrEqual"), _compared),
    **dict.fromkeys(("Min", "Max", "Clip"), _chosen),
    "Div": _divided,
    "Mod": _remainder,
    "Abs": lambda kernel, xs: xs[0],
    "Sign": lambda kernel, xs: (xs[0] != 0).to(xs[0].dtype),
}
"""Operators on uint64 that torch lacks."""
