"""What the command prints: lines, JSON, a progress bar; and who of many ranks speaks."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from partitioner.api import Progress


class Unwritable(Exception):
    """The standard output takes nothing more."""


def speaks_for_all() -> bool:
    """Whether this rank says what all ranks of the group found."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def complain(error: Exception | str, code: int) -> int:
    """Say on the standard error what is wrong; returns the exit code."""
    for line in str(error).splitlines():
        sys.stderr.write(f"partition: {line}\n")
    return code


def console() -> Any:
    """Where tables are printed, without colours where nobody sees them."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=160, no_color=True)


def show(*items: Any) -> None:
    """Print tables and texts.

    Raises:
        Unwritable: when the standard output takes no more.
    """
    try:
        console().print(*items)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise Unwritable(error.strerror or str(error)) from None


def say(text: str) -> None:
    """Print a line."""
    write(text + "\n")


def write(text: str) -> None:
    """Print a text.

    Raises:
        Unwritable: when the standard output takes no more.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise Unwritable(error.strerror or str(error)) from None


def print_json(data: Any) -> None:
    """Print data as JSON."""
    write(json.dumps(data, indent=1, allow_nan=False) + "\n")


class ProgressBar:
    """A progress bar on a terminal; nothing elsewhere."""

    def __init__(self, options: argparse.Namespace, wanted: bool, label: str = "") -> None:
        self._label = f"{label}: " if label else ""
        self._bar: Any = None
        self._wanted = wanted and not options.json and sys.stderr.isatty()

    def __enter__(self) -> Progress | None:
        if not self._wanted:
            return None
        from rich.console import Console
        from rich.progress import Progress as Bar

        self._bar = Bar(console=Console(stderr=True), transient=True)
        self._bar.start()
        task = self._bar.add_task(f"{self._label}starting", total=None)

        def show(done: int, count: int, name: str) -> None:
            self._bar.update(task, completed=done, total=count, description=self._label + name[:40])

        return show

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()


def vars_of(record: Any) -> dict[str, Any]:
    """A dataclass as a dict."""
    from dataclasses import asdict

    return asdict(record)
