"""The table of operators: (domain, ONNX name) -> operator class."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

from partitioner.ops.base import Operator

T = TypeVar("T", bound=Operator)

_OPERATORS: dict[tuple[str, str], type[Operator]] = {}


def register(cls: type[T]) -> type[T]:
    """Class decorator: makes an operator known under every name in its `op_types`."""
    for name in cls.op_types:
        _OPERATORS[cls.domain, name] = cls
    return cls


def lookup(domain: str, op_type: str) -> type[Operator] | None:
    """The operator class of an ONNX operator, or None when there is no rule for it."""
    return _OPERATORS.get(("" if domain == "ai.onnx" else domain, op_type))


def registered() -> Iterator[tuple[str, str, type[Operator]]]:
    """Every (domain, name, class), sorted by name."""
    for (domain, name), cls in sorted(_OPERATORS.items()):
        yield domain, name, cls
