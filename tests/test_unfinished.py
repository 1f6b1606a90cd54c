"""What is half made goes when a run fails, whoever dies and whatever comes in the middle of cleaning up."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from partitioner.errors import AgreedError, ExecutionError
from partitioner.signals import Ended
from runtime.rank import RunFiles
from runtime.unfinished import prepared, removed
from runtime.volumes import ArraySpec, Sink, create_sink


def made(folder: Path) -> tuple[Sink, RunFiles]:
    """An output that rank 0 prepares, and what the others know of it."""
    sink = create_sink(folder / "y.npy", [ArraySpec("y", (3, 4), np.dtype(np.float32))])
    return sink, RunFiles({}, frozenset(), {"y": (sink.part.to_json(), None)})


def test_other_ranks_clean_up_after_rank_0(tmp_path: Path) -> None:
    sink, files = made(tmp_path)
    with pytest.raises(ExecutionError), removed(files):
        sink.prepare()  # by rank 0, which is killed
        raise ExecutionError("rank 1: the exchange with ranks [0] failed")
    assert list(tmp_path.iterdir()) == []


def test_what_all_agree_on_is_left_to_rank_0(tmp_path: Path) -> None:
    sink, files = made(tmp_path)
    with pytest.raises(AgreedError), removed(files):
        sink.prepare()
        raise AgreedError("rank 0: no room")
    assert Path(sink.part.temporary).exists()


@pytest.mark.parametrize("who", ["rank 0", "another"])
def test_a_signal_in_the_middle_of_cleaning_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, who: str) -> None:
    """torchrun ends the ranks that are left while they clean up after the one that died."""
    sink, files = made(tmp_path)
    calls: list[str] = []
    remove = type(sink.part).remove

    def disturbed(part: object) -> None:
        calls.append("remove")
        if len(calls) == 1:
            raise Ended(15)
        remove(part)  # type: ignore[arg-type]

    monkeypatch.setattr(type(sink.part), "remove", disturbed)
    if who == "another":
        sink.prepare()
    with pytest.raises(Ended), prepared([sink]) if who == "rank 0" else removed(files):
        raise ExecutionError("a rank is gone")
    assert len(calls) == 2 and list(tmp_path.iterdir()) == []
