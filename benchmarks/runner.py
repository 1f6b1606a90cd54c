"""What every side of a case is to the process that measures it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Traffic:
    """What one forward pass sends between shards, all ranks together, and the most memory of one process.

    Args:
        rank_bytes: activations that the process with most of them holds.
        rank_sent_bytes, rank_messages: of the rank that sends most.
    """

    sent_bytes: int
    messages: int
    rank_bytes: int = 0
    rank_sent_bytes: int = 0
    rank_messages: int = 0


class Runner(Protocol):
    """A network ready to run, its weights in memory; what it says of itself by default is that of a whole network."""

    def run(self, volume: NDArray[np.float32]) -> Any:
        """One forward pass or training step; done when this returns."""
        ...

    def hold(self) -> None:
        """Take memory for the output, where a user would have it before the first run."""

    def array(self, output: Any) -> NDArray[Any]:
        """What `run` returned as an array, to be compared with other sides'."""
        return np.asarray(output)

    def forecast(self) -> Traffic | None:
        """What the plan predicts; None for a side that predicts nothing."""
        return None

    def counted(self) -> Traffic | None:
        """What the last pass counted at the transport; None for a side that sends nothing."""
        return None

    def schedule(self) -> str | None:
        """How the plan is executed depth-first; None where the volume is taken whole."""
        return None

    def device_bytes(self) -> int | None:
        """The most memory that the accelerator held during runs, over that of the idle process; None on the CPU."""
        return None
