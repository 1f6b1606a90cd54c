"""Peak memory of a run as the operating system and CUDA count it."""

from __future__ import annotations

import os
import threading
from types import TracebackType
from typing import Self

import torch


def anonymous_memory() -> int:
    """Resident anonymous memory of this process in bytes; 0 where the system does not tell."""
    try:
        counts = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)  # in pages, see proc_pid_statm(5)
    except OSError:
        return 0
    try:
        _, resident, shared, *_ = os.read(counts, 128).split()
    finally:
        os.close(counts)
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")


class PeakMemory:
    """Samples memory while a block runs: when it is told, as after every step, and now and then in long steps.

    Args:
        kept: bytes that the process holds for the block already.
        interval: seconds between samples in steps; every two milliseconds would cost a tenth of the block's time where
            all cores compute.

    Attributes:
        before: bytes in use at the start, beside those kept for the block.
        peak: most bytes in use at any sample.
    """

    def __init__(self, device: torch.device, kept: int = 0, interval: float = 0.02) -> None:
        self.before = 0
        self.peak = 0
        self._device = device
        self._kept = kept
        self._interval = interval
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def rise(self) -> int:
        """Bytes at the peak above those at the start."""
        return self.peak - self.before

    def __enter__(self) -> Self:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            self.before = torch.cuda.memory_allocated(self._device)
            return self
        self.peak = anonymous_memory()
        self.before = max(0, self.peak - self._kept)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if self._device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self._device)
            return
        self._stop.set()
        self._thread.join()

    def sample(self) -> None:
        """Look now; on a GPU there is no need to."""
        if self._device.type != "cuda":
            self.peak = max(self.peak, anonymous_memory())

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            self.sample()
