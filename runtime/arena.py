"""Memory of large tensors: taken from the system in large pages, and handed on from tensor to tensor.

New memory costs: the system clears every page at its first touch, 4 KiB at a time, which takes as long as a pointwise
kernel.  Memory that a tensor gives up is kept for the next one of its size, also from run to run, as long as what is
kept and what is alive stay within what the program needs at its peak anyway.
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Sequence

import torch

from runtime.program import storage_order

LARGE = 4 << 20
"""Bytes from which a tensor's memory is taken here; the C library keeps smaller blocks by itself."""

LARGE_PAGE = 2 << 20
"""Bytes of a large page on most machines."""


class _Pages:
    """Memory of the system, its first tensor at the start of a large page."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._mapping = mmap.mmap(-1, nbytes + LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        address = torch.frombuffer(self._mapping, dtype=torch.uint8, count=1).data_ptr()
        self._start = -address % LARGE_PAGE
        large = nbytes // LARGE_PAGE * LARGE_PAGE
        if large and hasattr(mmap, "MADV_HUGEPAGE"):
            self._mapping.madvise(mmap.MADV_HUGEPAGE, self._start, large)

    def lend(self) -> memoryview:
        """The memory, for one tensor at a time; it lives as long as the tensor's."""
        return memoryview(self._mapping)[self._start : self._start + self.nbytes]


class Arena:
    """Memory that large tensors of one process hand on; what is kept goes with the arena."""

    def __init__(self) -> None:
        self._kept: list[_Pages] = []
        self._room = 0

    @property
    def kept(self) -> int:
        """Bytes that no tensor uses at the moment."""
        return sum(pages.nbytes for pages in self._kept)

    def keep(self, room: int) -> None:
        """Keep so many bytes at most from now on; what has been kept longest goes first."""
        self._room = room
        while self._kept and self.kept > room:
            self._kept.pop(0)

    def allocate(self, shape: Sequence[int], dtype: torch.dtype, storage: str) -> torch.Tensor:
        """A tensor in storage order whose cells may hold anything."""
        order = storage_order(storage, len(shape))
        stored = [shape[a] for a in order]
        count = 1
        for n in stored:
            count *= n
        pages = self._take(-(-count * dtype.itemsize // mmap.PAGESIZE) * mmap.PAGESIZE)
        lent = pages.lend()
        weakref.finalize(lent, self._take_back, pages).atexit = False
        tensor = torch.frombuffer(lent, dtype=dtype, count=count).view(stored)
        return tensor.permute([order.index(a) for a in range(len(order))])

    def _take(self, nbytes: int) -> _Pages:
        for index in range(len(self._kept) - 1, -1, -1):
            if self._kept[index].nbytes == nbytes:
                return self._kept.pop(index)
        return _Pages(nbytes)

    def _take_back(self, pages: _Pages) -> None:
        self._kept.append(pages)
        self.keep(self._room)
