"""Headers made by libraries, without the values that will lie between them."""

from __future__ import annotations

import io
import os
from typing import Any


class HeaderFile(io.RawIOBase):
    """A file that remembers what is written where, and holds nothing between; libraries write headers into it."""

    def __init__(self) -> None:
        self.blocks: list[tuple[int, bytes]] = []
        self.size = 0
        self._at = 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self.size}[whence]
        return self._at

    def write(self, block: Any, /) -> int:
        written = bytes(block)
        self.blocks.append((self._at, written))
        self._at += len(written)
        self.size = max(self.size, self._at)
        return len(written)

    def readinto(self, buffer: Any, /) -> int:
        """What was written, zeros elsewhere."""
        count = max(0, min(len(buffer), self.size - self._at))
        found = bytearray(count)
        for offset, block in self.blocks:
            begin, end = max(offset, self._at), min(offset + len(block), self._at + count)
            if begin < end:
                found[begin - self._at : end - self._at] = block[begin - offset : end - offset]
        buffer[:count] = found
        self._at += count
        return count

    def truncate(self, size: int | None = None, /) -> int:
        self.size = self._at if size is None else size
        return self.size
