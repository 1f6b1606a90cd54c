"""Memory of large tensors: taken from the system in large pages, and handed on from tensor to tensor.

New memory costs: the system clears every page at its first touch, 4 KiB at a time, which takes as long as a pointwise
kernel.  Memory that a tensor gives up is kept for the next one of its size, also from run to run, as long as what is
kept and what is alive stay within what the program needs at its peak anyway.

A run brings the same tensors into being as the run before: from the second on all of them have their places in one
region (`runtime.places`), and no memory is taken any more.
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Sequence

import torch

from runtime.places import Life, find_places
from runtime.program import storage_order

LARGE = 1 << 20
"""Bytes from which a tensor's memory is taken here; the C library's heap holds smaller ones without many gaps."""

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

    def lend(self, offset: int = 0, nbytes: int | None = None) -> memoryview:
        """The memory, or a part of it, for one tensor at a time; it lives as long as the tensor's."""
        start = self._start + offset
        return memoryview(self._mapping)[start : start + (self.nbytes if nbytes is None else nbytes)]


class Arena:
    """Memory that large tensors of one process hand on; what is kept goes with the arena."""

    def __init__(self) -> None:
        self._kept: list[_Pages] = []
        self._room = 0
        self._clock = 0
        self._lives: list[Life] = []
        self._rooms: list[tuple[int, int]] = []
        self._known: list[int] = []
        self._places: list[Life] | None = None
        self._region: _Pages | None = None
        self._busy: dict[int, Life] = {}

    @property
    def kept(self) -> int:
        """Bytes that no tensor uses at the moment."""
        return sum(pages.nbytes for pages in self._kept) + self._idle

    @property
    def _idle(self) -> int:
        """Bytes of the region that no tensor uses at the moment."""
        return 0 if self._region is None else self._region.nbytes - sum(life.nbytes for life in self._busy.values())

    def begin(self) -> None:
        """A run begins: what the last one brought into being gets places in one region, if it fits there well."""
        last = [life.nbytes for life in self._lives]
        if last != self._known and not self._busy and all(life.died is not None for life in self._lives):
            self._known = last
            self._region, self._places = None, find_places(self._lives, self._rooms)
            if self._places is not None:
                self.keep(0)
                self._region = _Pages(max(life.offset + life.nbytes for life in self._places))
        self._clock, self._lives, self._rooms = 0, [], []

    def keep(self, room: int) -> None:
        """Keep so many bytes at most from now on; what has been kept longest goes first."""
        self._rooms.append((self._clock, room))
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
        lent = self._lend(-(-count * dtype.itemsize // mmap.PAGESIZE) * mmap.PAGESIZE)
        tensor = torch.frombuffer(lent, dtype=dtype, count=count).view(stored)
        return tensor.permute([order.index(a) for a in range(len(order))])

    def _lend(self, nbytes: int) -> memoryview:
        life = Life(nbytes, self._tick())
        number = len(self._lives)
        self._lives.append(life)
        place = self._place(number, nbytes)
        if place is not None and self._region is not None:
            life.offset = place
            self._busy[id(life)] = life
            lent = self._region.lend(place, nbytes)
            weakref.finalize(lent, self._leave, life).atexit = False
            return lent
        pages = self._take(nbytes)
        lent = pages.lend()
        weakref.finalize(lent, self._take_back, life, pages).atexit = False
        return lent

    def _place(self, number: int, nbytes: int) -> int | None:
        """Where in the region a tensor has its place, unless this run is another than the one they were found from."""
        if self._places is None or number >= len(self._places) or self._places[number].nbytes != nbytes:
            return None
        start = self._places[number].offset
        taken = any(other.offset < start + nbytes and start < other.offset + other.nbytes
                    for other in self._busy.values())
        return None if taken else start

    def _tick(self) -> int:
        self._clock += 1
        return self._clock

    def _take(self, nbytes: int) -> _Pages:
        for index in range(len(self._kept) - 1, -1, -1):
            if self._kept[index].nbytes == nbytes:
                return self._kept.pop(index)
        return _Pages(nbytes)

    def _leave(self, life: Life) -> None:
        life.died = self._tick()
        self._busy.pop(id(life), None)

    def _take_back(self, life: Life, pages: _Pages) -> None:
        life.died = self._tick()
        self._kept.append(pages)
        while self._kept and self.kept > self._room:
            self._kept.pop(0)
