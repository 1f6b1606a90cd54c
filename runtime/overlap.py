"""Reading ahead and writing behind while slabs are computed: one thread each, one slab ahead or behind.

A rank's program names every box that it will read, in order; so the next one can be on its way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import numpy as np

from runtime.program import Load, Program, in_turns
from runtime.volumes import Source, Writer

Slices = tuple[slice, ...]


def boxes_read(programs: Sequence[Program], name: str, first: int = 0) -> list[Slices]:
    """The boxes of an input in the order in which the ranks of a process, from a first turn on, read them."""
    steps = (programs[place].steps[number] for number, places in in_turns(programs)[first:] for place in places)
    return [tuple(slice(i.start, i.stop) for i in step.action.window.box.intervals())
            for step in steps if isinstance(step.action, Load) and step.action.name == name]


class AheadSource:
    """A source whose next box is read while others compute; boxes out of turn are read at once.

    Args:
        source: read by one thread at a time.
        upcoming: the boxes that will be asked for.
    """

    random_access = True

    def __init__(self, source: Source, upcoming: Iterable[Slices]) -> None:
        self._source = source
        self._upcoming = deque(upcoming)
        self._pool = ThreadPoolExecutor(1, "partitioner-reader")
        self._pending: tuple[Slices, Future[Any]] | None = None

    def read(self, box: Slices) -> np.ndarray[Any, Any]:
        """The values in a box; the next one is on its way then."""
        pending, self._pending = self._pending, None
        if pending is not None and pending[0] == box:
            found = pending[1].result()
        else:
            found = self._pool.submit(self._source.read, box).result()
        if self._upcoming and self._upcoming[0] == box:
            self._upcoming.popleft()
        if self._upcoming:
            self._pending = (self._upcoming[0], self._pool.submit(self._source.read, self._upcoming[0]))
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)


class BehindWriter:
    """A writer that keeps a copy of what it is given and writes it while the next slab computes."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._pool = ThreadPoolExecutor(1, "partitioner-writer")
        self._pending: Future[None] | None = None

    def write(self, box: Slices, values: np.ndarray[Any, Any], name: str | None = None) -> None:
        """See `Writer.write`; raises what went wrong with the box before."""
        self.settle()
        self._pending = self._pool.submit(self._writer.write, box, values.copy(), name)

    def settle(self) -> None:
        """Wait for the box that is being written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def flush(self) -> None:
        """See `Writer.flush`."""
        self.settle()
        self._writer.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self.settle()
        finally:
            self._pool.shutdown(cancel_futures=True)
