"""Places of tensors in one region: apart while they live, and no larger than what is alive asks for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.arena import Arena
from runtime.places import SLACK, Life, find_places

SHAPE = (1, 16, 32, 64, 64)
NBYTES = 4 * 16 * 32 * 64 * 64


@st.composite
def traces(draw: st.DrawFn) -> list[Life]:
    """Tensors that come and go in any order."""
    lives: list[Life] = []
    for clock in range(1, draw(st.integers(2, 40))):
        alive = [life for life in lives if life.died is None]
        if alive and draw(st.booleans()):
            draw(st.sampled_from(alive)).died = clock
        else:
            lives.append(Life(4096 * draw(st.integers(1, 9)), clock))
    for life in lives:
        life.died = life.died or 100
    return lives


def most(lives: list[Life]) -> int:
    return max(sum(a.nbytes for a in lives if a.born <= b.born < (a.died or 0)) for b in lives)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(traces())
def test_what_lives_at_the_same_time_lies_apart(lives: list[Life]) -> None:
    places = find_places(lives, [(0, 1 << 40)])
    assert places is not None and [p.nbytes for p in places] == [life.nbytes for life in lives]
    extent = max(p.offset + p.nbytes for p in places)
    for index, a in enumerate(places):
        for b in places[:index]:
            together = a.born < (b.died or 0) and b.born < (a.died or 0)
            assert not together or a.offset + a.nbytes <= b.offset or b.offset + b.nbytes <= a.offset
    held = most(lives)
    tight = find_places(lives, [(0, 0)])
    assert extent >= held and (tight is None) == (extent - held > SLACK * extent)


def test_there_must_be_room_for_what_is_idle_at_any_time() -> None:
    """The first tensor alone when there is no room beside it: the second one's place may not be held then."""
    lives = [Life(4096, 1, 3), Life(40960, 2, 4)]
    assert find_places(lives, [(0, 40960), (1, 0)]) is not None
    assert find_places(lives, [(0, 0), (1, 0)]) is None
    assert find_places([], [(0, 0)]) is None


def run(arena: Arena, room: int = 0) -> list[int]:
    """Two tensors, then one as large as both."""
    arena.begin()
    arena.keep(2 * NBYTES)
    first, second = (arena.allocate(SHAPE, torch.float32, "channels_last") for _ in range(2))
    found = [first.data_ptr(), second.data_ptr()]
    del first, second
    arena.keep(room)
    third = arena.allocate((1, 32, 32, 64, 64), torch.float32, "channels_last")
    return [*found, third.data_ptr()]


def test_the_second_run_takes_no_memory() -> None:
    """What the first run cannot hand on, being of other sizes, shares one region from then on."""
    arena = Arena()
    run(arena)
    again = run(arena)
    assert again == run(arena) == run(arena)
    assert again[2] == min(again[:2]) and abs(again[0] - again[1]) == NBYTES and arena.kept == 2 * NBYTES


def test_another_run_is_found_out() -> None:
    """A run that brings other tensors into being gets memory all the same, and the next one like it its own places."""
    arena = Arena()
    for _ in range(3):
        run(arena)
    for _ in range(3):
        arena.begin()
        arena.keep(0)
        tensors = [arena.allocate((1, 24, 32, 64, 64), torch.float32, "channels_last") for _ in range(2)]
        for number, tensor in enumerate(tensors):
            tensor.fill_(number)
        assert [float(t.mean()) for t in tensors] == [0.0, 1.0]
        del tensors, tensor
    assert arena.kept == 3 * NBYTES


def test_places_are_looked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there are none: a session runs the same program many times."""
    calls: list[int] = []

    def nowhere(lives: list[Life], rooms: list[tuple[int, int]]) -> None:
        calls.append(len(lives))

    monkeypatch.setattr("runtime.arena.find_places", nowhere)
    arena = Arena()
    for _ in range(5):
        run(arena)
    assert calls == [3]


def test_memory_that_is_in_use_is_not_given_twice() -> None:
    """A tensor of the last run that is still there keeps its cells."""
    arena = Arena()
    for _ in range(2):
        run(arena)
    arena.begin()
    arena.keep(1 << 30)
    kept = arena.allocate(SHAPE, torch.float32, "channels_last").fill_(7)
    arena.begin()
    arena.keep(1 << 30)
    other = arena.allocate(SHAPE, torch.float32, "channels_last").fill_(8)
    assert float(kept.mean()) == 7 and float(other.mean()) == 8
