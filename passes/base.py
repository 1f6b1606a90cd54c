"""What a pass is: a frozen dataclass with options, named checks before and after, and `apply`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir


@dataclass(frozen=True)
class Check:
    """A property of a model, found again from the model alone; `problems` yields every violation."""

    name: str
    problems: Callable[[ir.Model], Iterator[str]]


@dataclass(frozen=True)
class Pass(ABC):
    """One rewriting of the model, in place.

    `requires` must hold before, `ensures` holds afterwards; `breaks` no longer does.
    """

    name: ClassVar[str]
    requires: ClassVar[tuple[Check, ...]] = ()
    ensures: ClassVar[tuple[Check, ...]] = ()
    breaks: ClassVar[tuple[Check, ...]] = ()

    @abstractmethod
    def apply(self, model: ir.Model) -> None:
        """Rewrite the model.

        Raises:
            PartitionError: when the model cannot be kept exact; every reason is listed.
        """
