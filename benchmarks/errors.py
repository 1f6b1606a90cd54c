"""The two ways in which a benchmark command fails."""

from __future__ import annotations


class UsageError(Exception):
    """A mistake on the command line; the message is one clear line (exit code 2)."""


class SideError(Exception):
    """One side of a case could not be measured; the others go on."""
