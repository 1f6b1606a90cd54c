"""What the processes of a run save, and when: all of them before the same step.

    labels.nii.gz.resume/state-812-0.pt     the buffers of process 0 before step 812
    labels.nii.gz.resume/state-812-1.pt     those of process 1
    labels.nii.gz.resume/saved.json         the step that all go on with; written when the states of all are

A save counts once its step stands in `saved.json`, and only then the states of the one before are removed: whoever is
killed at whatever moment leaves a whole save.  All ranks have the same steps, so a number says where all of them are.
When to save is for one process to say, by its clock; it tells the others at a few steps, and at which they meet next.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from partitioner.errors import AgreedError, AgreedFailure, ExecutionError, PartitionError
from runtime.memory import allocate_buffer, refill

if TYPE_CHECKING:
    from runtime.executor import Shard
    from runtime.feeds import Tally

SAVED = "saved.json"
"""Names the step of the last save that counts, and how many processes have a state of it."""

MEETINGS = 8
"""How often processes meet between one save and the next, so far as the pace of the steps can be foretold."""


def state_name(step: int, member: int) -> str:
    """The file in which a process has saved its state before a step."""
    return f"state-{step}-{member}.pt"


@dataclass(frozen=True)
class Saving:
    """How a run is saved, and where it goes on; travels to every process of it.

    Args:
        folder: absolute, reached by all processes.
        every: seconds between one save and the next.
        step: the one to go on with, 0 for a run that begins.
        members: how many processes have saved it.
    """

    folder: Path
    every: float
    step: int = 0
    members: int = 1

    @property
    def is_saved(self) -> bool:
        """Whether the run can be gone on with when it fails now."""
        return (self.folder / SAVED).exists()


@dataclass(frozen=True)
class Ties:
    """What ties the processes of a run together.

    Args:
        size: how many there are.
        tell: the value that process 0 gives, on all of them.
        gather: the values of all of them, on all of them.
    """

    size: int
    tell: Callable[[Any], Any]
    gather: Callable[[Any], list[Any]]


ALONE = Ties(1, lambda value: value, lambda value: [value])
"""One process that has all ranks."""


class Pace:
    """One process's clock: at which steps all meet, and whether a save is due there.

    Args:
        every: seconds between one save and the next.
        step: the first one.
    """

    def __init__(self, every: float, step: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._every = every
        self._clock = clock
        self._step, self._time = step, clock()
        self._due = self._time + every

    def meet(self, step: int) -> tuple[bool, int]:
        """Whether to save before this step, and at which one to meet again.

        That is where an eighth of the time between saves will have passed at the pace since the last meeting, yet at
        most twice as many steps away as that was, for steps take unequal time.
        """
        now = self._clock()
        save = now >= self._due
        ahead = min(self._every / MEETINGS, self._every if save else self._due - now)
        gap, seconds = step - self._step, now - self._time
        reach = 2 * gap if seconds * 2 <= ahead else math.ceil(gap * ahead / seconds)
        self._step, self._time = step, now
        return save, step + max(1, reach)

    def saved(self) -> None:
        """The time that saving took is not the steps'."""
        self._time = self._clock()
        self._due = self._time + self._every


class Saver:
    """One process's part of saving a run and of going on with it.

    Args:
        shards: the ranks of this process.
        tally: what was counted of the inputs on the way.
        settle: brings what has been handed out to the disk.
        member: the number of this process.
        ties: to the other processes.
    """

    def __init__(self, saving: Saving, shards: Sequence[Shard], tally: Tally, settle: Callable[[], None],
                 member: int = 0, ties: Ties = ALONE) -> None:
        self._saving = saving
        self._shards = shards
        self._tally = tally
        self._settle = settle
        self._member = member
        self._ties = ties
        self._pace = Pace(saving.every, saving.step)
        self._meeting = saving.step + 1

    def restore(self) -> int:
        """Bring back the buffers; returns the step to go on with.

        Raises:
            PartitionError: on every rank, when the state of any is not there, damaged or of another program.
        """
        if not self._saving.step:
            return 0
        problem: str | None = None
        try:
            self._bring_back(_loaded(self._path(self._saving.step), self._saving.folder))
        except PartitionError as error:
            problem = str(error)
        found = [text for text in self._ties.gather(problem) if text is not None]
        if found:
            raise AgreedError(found[0])
        return self._saving.step

    def after(self, step: int) -> None:
        """Save now and then: at the first step from the meeting's on before which no message is under way.

        Args:
            step: the next one.

        Raises:
            ExecutionError: on every rank, when any cannot save.
        """
        if step < self._meeting:
            return
        save, self._meeting = self._ties.tell(self._decision(step))
        if save:
            self._save(step)
            self._pace.saved()

    def _decision(self, step: int) -> tuple[bool, int]:
        """Mine; that of process 0 is taken.  Alone, a look at the clock after every step costs nothing."""
        save, meeting = self._pace.meet(step)
        return save, step + 1 if self._ties.size == 1 else meeting

    def _bring_back(self, state: Mapping[str, Any]) -> None:
        if state["members"] != self._ties.size or state["steps"] != len(self._shards[0].program.steps):
            raise PartitionError(f"{self._saving.folder}: was saved by {state['members']} processes or another version "
                                 "of this program; remove it to begin anew")
        self._tally.restore(state["tally"])
        for shard, buffers in zip(self._shards, state["buffers"], strict=True):
            for name, saved in buffers.items():
                spec = shard.program.buffers[name]
                if spec.place != "memory" and tuple(saved.shape) == spec.box.shape:
                    room = allocate_buffer(spec, shard.device, shard.program.storage, False)
                    refill(room, saved, spec.axis)
                    shard.buffers[name] = room
                else:
                    shard.buffers[name] = saved.to(shard.device, copy=True, memory_format=torch.preserve_format)

    def _save(self, step: int) -> None:
        found = [text for text in self._ties.gather(self._write(step)) if text is not None]
        if found:
            self._path(step).unlink(missing_ok=True)
            raise AgreedFailure(found[0])
        if self._member == 0:
            _part(self._saving.folder / SAVED).replace(self._saving.folder / SAVED)
            for path in self._saving.folder.glob("state-*"):
                if not path.name.startswith(f"state-{step}-"):
                    path.unlink(missing_ok=True)

    def _write(self, step: int) -> str | None:
        """Bring my state to the disk; returns what went wrong."""
        path, marker = self._path(step), self._saving.folder / SAVED
        state = {"members": self._ties.size, "steps": len(self._shards[0].program.steps),
                 "tally": self._tally.state(), "buffers": [dict(shard.buffers) for shard in self._shards]}
        try:
            self._settle()
            torch.save(state, _part(path))
            flush(_part(path))
            _part(path).replace(path)
            if self._member == 0:
                _part(marker).write_text(json.dumps({"step": step, "members": self._ties.size}))
                flush(_part(marker))
        except ExecutionError as error:
            return str(error)
        except (OSError, RuntimeError) as error:
            reason = _reason(error, _part(path))
            _part(path).unlink(missing_ok=True)
            return (f"{self._saving.folder}: the run cannot be saved ({reason}); free some space, or run without "
                    "--resume")
        return None

    def _path(self, step: int) -> Path:
        return self._saving.folder / state_name(step, self._member)


def _part(path: Path) -> Path:
    """Where a file is made."""
    return path.with_name(f"{path.name}.part")


def flush(path: Path) -> None:
    """Bring a file to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _loaded(path: Path, folder: Path) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except FileNotFoundError:
        raise PartitionError(f"{path}: no such file; save runs in a folder that all hosts share, or remove {folder} to "
                             "begin anew") from None
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError):
        raise PartitionError(f"{folder}: is damaged; remove it to begin anew") from None


def _reason(error: BaseException, path: Path) -> str:
    """Why a file could not be written; torch does not say it, so that the system is asked again."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    try:
        with path.open("ab") as file:
            file.write(bytes(1 << 20))
    except OSError as found:
        return found.strerror or str(found)
    return (str(error).strip().splitlines() or ["no reason given"])[0][:120]
