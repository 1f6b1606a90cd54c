"""CPU time of the processes below this one, to the microsecond where the system has a clock for each (Linux)."""

from __future__ import annotations

import sys
import time

import psutil

_SCHEDULED = 2
"""Which clock of a process: time on a core, of all its threads (`CPUCLOCK_SCHED` of the kernel's posix-timers.h)."""


def cpu_seconds_below() -> float:
    """CPU time of all processes that this one has started, and of those that they have, so far."""
    return sum(_cpu_seconds(process) for process in psutil.Process().children(recursive=True))


def _cpu_seconds(process: psutil.Process) -> float:
    if sys.platform == "linux":
        try:
            return time.clock_gettime(~process.pid << 3 | _SCHEDULED)
        except OSError:  # it has ended, or the kernel offers no such clock
            pass
    try:
        return sum(process.cpu_times()[:2])
    except psutil.NoSuchProcess:
        return 0.0
