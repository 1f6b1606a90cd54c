"""Pauses Python's search for cyclic garbage where many small objects are made that stay."""

from __future__ import annotations

import gc
from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def kept_for_later() -> Generator[None]:
    """Leave cyclic garbage for after a block, or after a function that this decorates.

    Passes, costs and programs make hundreds of thousands of objects, all of which stay; the collector would go
    through them, and through all that torch has loaded, again and again: half of the time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
