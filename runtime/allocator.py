"""The C library's allocator in processes that are ours alone: give large tensors back at once.

glibc raises its threshold for mapped blocks up to 32 MiB as blocks are freed, and then keeps such blocks
in a heap that fragments: a rank held up to a quarter more than its live tensors.  With a fixed threshold
every larger tensor is a mapping of its own, and the measured peak is the planned one.  Smaller ones, and the blocks
in which large results are computed, are kept: their pages would be taken anew for every block.
"""

from __future__ import annotations

import contextlib
import ctypes

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3

MAPPED_FROM = 8 << 20
"""Bytes from which a block is mapped on its own."""


def keep_memory_tight() -> None:
    """Fix the thresholds of this process's allocator; does nothing where it is not glibc's.

    Only for processes that the toolkit starts: the setting concerns all code in the process.
    """
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, MAPPED_FROM)
        library.mallopt(_M_TRIM_THRESHOLD, 2 * MAPPED_FROM)


def give_heap_back() -> None:
    """Return freed memory to the system, so that the next large tensor is of new pages; glibc only."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
