"""Anonymous resident memory of a process and its descendants, read from /proc while they run (Linux)."""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_SAMPLE_SECONDS = 0.005
_TREE_SECONDS = 0.1


@dataclass(frozen=True)
class Level:
    """Bytes at one moment: private memory per process, and shared memory of the process that maps most."""

    private: dict[int, int]
    shared: int

    @property
    def total(self) -> int:
        """Private memory of all processes and the shared memory once."""
        return sum(self.private.values()) + self.shared


@dataclass(frozen=True)
class Peak:
    """The highest levels seen, in bytes: of all processes at one moment, and of each for itself."""

    total: int
    private: dict[int, int]


ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(8 << 20), "MALLOC_TRIM_THRESHOLD_": str(16 << 20)}
"""Settings of glibc's allocator, as variables of the environment: those that `partition run` makes for itself."""


def give_back_memory() -> None:
    """Collect garbage and give free pages of this process back to the system."""
    gc.collect()
    with suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)


def level(root: int) -> Level:
    """The present level of the process tree."""
    return _level(tree(root))


def tree(root: int) -> list[int]:
    """The process and its living descendants."""
    found: list[int] = []
    waiting = [root]
    while waiting:
        process = waiting.pop()
        found.append(process)
        waiting.extend(_children(process))
    return found


class Sampler:
    """Keeps the peak of a process tree from the moment it starts until `stop`."""

    def __init__(self, root: int) -> None:
        self._root = root
        self._total = 0
        self._private: dict[int, int] = {}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> Peak:
        """The peak so far; the sampler ends."""
        self._stopped.set()
        self._thread.join()
        return Peak(self._total, self._private)

    def _watch(self) -> None:
        processes: list[int] = []
        countdown = 0
        while True:
            if countdown <= 0:
                processes = tree(self._root)
                countdown = round(_TREE_SECONDS / _SAMPLE_SECONDS)
            countdown -= 1
            self._note(_level(processes))
            if self._stopped.wait(_SAMPLE_SECONDS):
                return

    def _note(self, now: Level) -> None:
        self._total = max(self._total, now.total)
        for process, value in now.private.items():
            self._private[process] = max(self._private.get(process, 0), value)


@contextmanager
def sampled(root: int) -> Generator[Sampler]:
    """A sampler that ends with the block, whatever happens in it."""
    sampler = Sampler(root)
    try:
        yield sampler
    finally:
        sampler.stop()


def _level(processes: list[int]) -> Level:
    private: dict[int, int] = {}
    shared = 0
    for process in processes:
        fields = _status(process)
        if fields is None:
            continue
        private[process] = fields[0]
        shared = max(shared, fields[1])
    return Level(private, shared)


def _status(process: int) -> tuple[int, int] | None:
    """Anonymous and shared-memory bytes; None when the process has ended."""
    try:
        text = (_PROC / str(process) / "status").read_text()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in text.splitlines())
    if "RssAnon" not in fields:
        return None
    return _kibibytes(fields["RssAnon"]), _kibibytes(fields["RssShmem"])


def _kibibytes(text: str) -> int:
    return int(text.split(maxsplit=1)[0]) * 1024


def _children(process: int) -> list[int]:
    try:
        lists = [path.read_text() for path in (_PROC / str(process) / "task").glob("*/children")]
    except OSError:
        return []
    return [int(word) for text in lists for word in text.split()]
