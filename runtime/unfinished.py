"""Outputs in the making: prepared, finished together, and removed or kept when a run fails."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from pathlib import Path

from partitioner.errors import AgreedError
from runtime.rank import RunFiles
from runtime.resume import SavedRun
from runtime.volumes import Sink


@contextlib.contextmanager
def prepared(sinks: Iterable[Sink]) -> Generator[None]:
    """Prepare all sinks, commit them when the block succeeds, remove them when it fails.

    Raises:
        ExecutionError: when the disk is full.
    """
    known = list(sinks)
    try:
        for sink in known:
            sink.prepare()
        yield
        for sink in known:
            sink.commit()
    except BaseException:
        _surely(lambda: _abort(known))
        raise


@contextlib.contextmanager
def removed(files: RunFiles) -> Generator[None]:
    """Remove the prepared outputs when the block fails: rank 0, which makes and removes them, may be the one that died.

    What all have agreed on is left to rank 0.
    """
    try:
        yield
    except AgreedError:
        raise
    except BaseException:
        _surely(files.remove)
        raise


@contextlib.contextmanager
def kept(saved: SavedRun, sinks: Mapping[str, Sink], save_plan: Callable[[Path], None]) -> Generator[None]:
    """As `prepared`, but what is unfinished stays when the block fails after the run was saved.

    Raises:
        PartitionError: when there is no room for it.
        ExecutionError: when the disk is full.
    """
    try:
        saved.begin(save_plan, {path: sink.part.to_json() for path, sink in sinks.items()})
        if not saved.goes_on:
            for sink in sinks.values():
                sink.prepare()
        yield
        for sink in sinks.values():
            sink.commit(keep=saved.saving.is_saved)
        saved.remove()
    except BaseException:
        if not saved.saving.is_saved:
            _surely(lambda: _abort(list(sinks.values())))
            _surely(saved.forsake)
        raise
    finally:
        saved.release()


def _surely(clean: Callable[[], None]) -> None:
    """Clean up, also when a signal comes in the middle: it finishes first, for later signals do not disturb it."""
    try:
        clean()
    except BaseException:
        clean()
        raise


def _abort(sinks: Sequence[Sink]) -> None:
    for sink in sinks:
        sink.abort()

