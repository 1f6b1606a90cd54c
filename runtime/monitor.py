"""Peak memory of a run as the operating system and CUDA count it."""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

_STATUS = Path("/proc/self/status")


def anonymous_memory() -> int:
    """Resident anonymous memory of this process in bytes; 0 where the system does not tell."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


class PeakMemory:
    """Samples memory while a block runs.

    Args:
        kept: bytes that the process holds for the block already.

    Attributes:
        before: bytes in use at the start, beside those kept for the block.
        peak: most bytes in use at any sample.
    """

    def __init__(self, device: torch.device, kept: int = 0, interval: float = 0.002) -> None:
        self.before = 0
        self.peak = 0
        self._device = device
        self._kept = kept
        self._interval = interval
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

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

    def _sample(self) -> None:
        while not self._stop.wait(self._interval):
            self.peak = max(self.peak, anonymous_memory())
