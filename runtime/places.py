"""Where tensors lie in one region, so that those alive at the same time lie apart: a plan by lifetimes.

The largest come first, each to the lowest place that is free as long as it lives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

MOST = 400
"""Tensors of a run at most: those of slabs are many, small, and of few sizes."""

SLACK = 0.05
"""By which part a region may be larger than what is alive in it and what the program has room for besides."""


@dataclass
class Life:
    """A tensor: its bytes, when it came into being and when it went (None: it has not), and its place."""

    nbytes: int
    born: int
    died: int | None = None
    offset: int = 0


def extent_of(lives: Sequence[Life]) -> int | None:
    """Bytes of a region for tensors that have all gone; None where they get none."""
    found = _lay_out(lives) if 0 < len(lives) <= MOST else []
    return max(life.offset + life.nbytes for life in found) if found else None


def find_places(lives: Sequence[Life], rooms: Sequence[tuple[int, int]]) -> list[Life] | None:
    """The tensors with their places; None where a region would hold much more than tensors one by one.

    Args:
        lives: in the order in which they came into being; all of them have gone.
        rooms: from when on how many bytes may be held beside all that is alive.
    """
    if not lives or len(lives) > MOST:
        return None
    found = _lay_out(lives)
    extent = max(life.offset + life.nbytes for life in found)
    peaks = _peaks(lives, [start for start, _ in rooms])
    if any(extent - peak > room + SLACK * extent for peak, (_, room) in zip(peaks, rooms, strict=True)):
        return None
    return found


def _lay_out(lives: Sequence[Life]) -> list[Life]:
    placed: list[Life] = []
    found: dict[int, Life] = {}
    for index in sorted(range(len(lives)), key=lambda i: -lives[i].nbytes):
        life = lives[index]
        offset = 0
        for other in sorted((o for o in placed if _meet(o, life)), key=lambda o: o.offset):
            if offset + life.nbytes <= other.offset:
                break
            offset = max(offset, other.offset + other.nbytes)
        found[index] = replace(life, offset=offset)
        placed.append(found[index])
    return [found[index] for index in range(len(lives))]


def _meet(a: Life, b: Life) -> bool:
    assert a.died is not None and b.died is not None
    return a.born < b.died and b.born < a.died


def _peaks(lives: Sequence[Life], starts: Sequence[int]) -> list[int]:
    """Most bytes alive at once from each start, after the event of that number, until the next start."""
    events = sorted((when, size) for life in lives
                    for when, size in ((life.born, life.nbytes), (life.died or 0, -life.nbytes)))
    peaks: list[int] = []
    alive = place = 0
    for index, start in enumerate(starts):
        while place < len(events) and events[place][0] <= start:
            alive += events[place][1]
            place += 1
        end = starts[index + 1] if index + 1 < len(starts) else events[-1][0]
        most = alive
        while place < len(events) and events[place][0] <= end:
            alive += events[place][1]
            most = max(most, alive)
            place += 1
        peaks.append(most)
    return peaks
