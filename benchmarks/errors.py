"""The ways in which a benchmark command, or a side of it, comes to no figure."""

from __future__ import annotations


class UsageError(Exception):
    """A mistake on the command line; the message is one clear line (exit code 2)."""


class SideError(Exception):
    """One side of a case could not be measured; the others go on."""


class SideRefusal(Exception):
    """One side of a case says beforehand that it cannot run, and why; that is a result, not a failure."""
