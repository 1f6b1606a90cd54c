"""Runs passes in order: refuses a bad order when it is built, verifies every property after passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from partitioner import dialect
from partitioner.garbage import kept_for_later
from passes.base import Check, Pass

Observer = Callable[[int, Pass, ir.Model], None]


class PipelineError(Exception):
    """A fault of the toolkit, not of the user: a bad order of passes, or a pass that broke its promise."""


@dataclass(frozen=True)
class Pipeline:
    """Passes in order.

    Raises:
        PipelineError: when a pass requires what none before it ensures.
    """

    passes: tuple[Pass, ...]

    def __post_init__(self) -> None:
        known: set[str] = set()
        for item in self.passes:
            missing = [c.name for c in item.requires if c.name not in known]
            if missing:
                raise PipelineError(f"pass {item.name} requires {', '.join(missing)}, which no pass before it ensures")
            known -= {c.name for c in item.breaks}
            known |= {c.name for c in item.ensures}

    @kept_for_later()
    def run(self, model: ir.Model, observe: Sequence[Observer] = (), begin: int = 0,
            end: int | None = None, verify: Literal["each", "last"] = "each") -> ir.Model:
        """Apply passes in place and verify; observers see the model after each.

        Args:
            begin, end: the first pass, and the one before which it ends; those before it have run on this model.
            verify: after which passes; of many models that are compared, all that holds in the end says enough.

        Raises:
            PartitionError: from a pass, when the user's model cannot be kept exact.
            PipelineError: when a property that must hold does not.
        """
        holding: dict[str, Check] = {}
        passes = self.passes[:end]
        for index, item in enumerate(passes):
            for check in item.breaks:
                holding.pop(check.name, None)
            holding |= {check.name: check for check in item.ensures}
            if index < begin:
                continue
            item.apply(model)
            dialect.add_pass(model, item.name)
            if verify == "each" or item is passes[-1]:
                _verify(model, item, tuple(holding.values()))
            for see in observe:
                see(index, item, model)
        return model


def _verify(model: ir.Model, item: Pass, checks: Sequence[Check]) -> None:
    found = [f"{check.name}: {problem}" for check in checks for problem in check.problems(model)]
    if found:
        raise PipelineError(f"after pass {item.name}: " + "; ".join(found[:5]))
