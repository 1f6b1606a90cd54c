"""The two errors of the toolkit: a mistake the user can mend, and a failure while running."""

from __future__ import annotations

from collections.abc import Sequence


class PartitionError(Exception):
    """A mistake that the user can mend; the message says where, what and what to do (exit code 2)."""


class ShapeError(PartitionError):
    """The network cannot take the extents given; it might take others."""


class BudgetError(PartitionError):
    """A memory budget that no schedule keeps.

    Attributes:
        needed: bytes that the most frugal schedule needs.
    """

    def __init__(self, message: str, needed: int) -> None:
        super().__init__(message)
        self.needed = needed


class AgreedError(PartitionError):
    """A mistake that all ranks of a group know of; one of them tells it."""


class ExecutionError(Exception):
    """A failure while running a valid plan: a rank died, a disk filled up (exit code 1)."""


class AgreedFailure(ExecutionError):
    """A failure that all ranks of a group know of; one of them tells it."""


def refuse_all(problems: Sequence[str]) -> None:
    """Raise one `PartitionError` that lists every problem, or return when there is none."""
    if problems:
        raise PartitionError("\n".join(problems))
