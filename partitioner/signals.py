"""Ending in good order when a signal asks for it: Ctrl-C, a scheduler's SIGTERM, a lost terminal."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Generator


class Ended(BaseException):
    """A signal has asked this process to end; no mistake of anybody.

    Attributes:
        code: the exit code, 128 + the signal's number.
        reason: in words.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.code = 128 + number
        self.reason = "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"


@contextlib.contextmanager
def orderly_end() -> Generator[None]:
    """Turn the first signal in a block into `Ended`; later ones do not disturb the cleaning up.

    Signals that the caller ignores stay ignored, and only the main thread can take any.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ending: list[int] = []

    def end(number: int, _: object) -> None:
        if not ending:
            ending.append(number)
            raise Ended(number)

    names = ("SIGINT", "SIGTERM", "SIGHUP")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {n: signal.signal(n, end) for n in numbers if signal.getsignal(n) != signal.SIG_IGN}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
