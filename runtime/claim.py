"""Whose run a folder is: the processes that work on it share a lock, which the system takes back when they end.

So a run that is gone on with waits until the ranks of the killed one have noticed that they are alone, and two commands
do not write one output.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Generator
from pathlib import Path

from partitioner.errors import PartitionError

WAIT = 10.0
"""Seconds that the processes of a run which was killed get to end."""

_LOCK = "lock"


class Claim:
    """A share in the lock of a folder, until it is let go of or this process ends.

    File systems that know no locks are taken as they are.

    Args:
        folder: exists.
        alone: wait until nobody else has a share.

    Raises:
        PartitionError: somebody else still has.
    """

    def __init__(self, folder: Path, alone: bool = False) -> None:
        self._file: int | None = None
        try:
            self._file = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            if alone and not _wait(self._file, time.monotonic() + WAIT):
                raise PartitionError(f"{folder}: another process works on this run; wait for it, or end it")
            fcntl.flock(self._file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:  # no locks here, or no leave to write: what is written next will tell
            self.release()
        except PartitionError:
            self.release()
            raise

    def release(self) -> None:
        """Let go of it; harmless when repeated."""
        file, self._file = self._file, None
        if file is not None:
            os.close(file)


@contextlib.contextmanager
def claimed(folder: Path) -> Generator[None]:
    """A block that works on a run."""
    claim = Claim(folder)
    try:
        yield
    finally:
        claim.release()


def _wait(file: int, deadline: float) -> bool:
    """Whether nobody else has a share any more."""
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        else:
            return True
