"""Runs that go on where they were stopped: the next step and all buffers, saved every few minutes.

Beside the first output stands a folder until the run is done:

    labels.nii.gz.resume/request.json   which run it is: model, inputs, options
    labels.nii.gz.resume/plan.onnx      its plan, so that no other schedule is chosen when it goes on
    labels.nii.gz.resume/state.pt       the next step, the buffers, and the unfinished output files

Steps are the same and read the same cells, so the result has the same bits as that of a run that was not stopped.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from partitioner.errors import ExecutionError, PartitionError
from runtime.memory import allocate_buffer

if TYPE_CHECKING:
    from runtime.executor import Shard

SECONDS = 120.0
"""Between one save and the next; PARTITIONER_SAVE_SECONDS sets another number."""


class SavedRun:
    """The folder of one run.

    Args:
        folder: made by the first save.
        request: which run it is; another one does not go on from it.

    Raises:
        PartitionError: when the folder is of another run.
    """

    def __init__(self, folder: Path, request: Mapping[str, Any]) -> None:
        self.folder = folder
        self._request = json.dumps(request, sort_keys=True, default=str)
        self._every = float(os.environ.get("PARTITIONER_SAVE_SECONDS", SECONDS))
        self._next = time.monotonic() + self._every
        self._state = self._found()
        self.parts: dict[str, str] = {}

    def _found(self) -> dict[str, Any] | None:
        told, state = self.folder / "request.json", self.folder / "state.pt"
        if not told.exists() or not state.exists():
            return None
        if told.read_text() != self._request:
            raise PartitionError(f"{self.folder}: is of another run (another model, input or option); remove it, or "
                                 "run with what it was begun with")
        try:
            found = torch.load(state, mmap=True, weights_only=True)
        except (OSError, RuntimeError, pickle.UnpicklingError, EOFError):
            raise PartitionError(f"{self.folder}: is damaged; remove it to begin anew") from None
        return found if all(os.path.exists(json.loads(part)["temporary"]) for part in found["parts"].values()) else None

    @property
    def goes_on(self) -> bool:
        """Whether there is something to go on from."""
        return self._state is not None

    @property
    def is_saved(self) -> bool:
        """Whether a run that fails now can go on later."""
        return (self.folder / "state.pt").exists()

    @property
    def plan_file(self) -> Path:
        """The plan of the run that goes on."""
        return self.folder / "plan.onnx"

    @property
    def saved_parts(self) -> dict[str, str]:
        """The unfinished output files, as JSON, by the path of the output."""
        return {} if self._state is None else dict(self._state["parts"])

    def begin(self, save_plan: Callable[[Path], None], parts: Mapping[str, str]) -> None:
        """Note the plan and the output files of a run that begins or goes on."""
        self.parts = dict(parts)
        if self.goes_on:
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        save_plan(self.plan_file)
        (self.folder / "request.json").write_text(self._request)

    def restore(self, shards: Sequence[Shard]) -> int:
        """Bring the buffers back; returns the step to go on with."""
        state, self._state = self._state, None
        if state is None:
            return 0
        for shard, buffers in zip(shards, state["buffers"], strict=True):
            for name, saved in buffers.items():
                spec = shard.program.buffers[name]
                if spec.place != "memory" and tuple(saved.shape) == spec.box.shape:
                    shard.buffers[name] = allocate_buffer(spec, shard.device, shard.program.storage, False)
                    shard.buffers[name].copy_(saved)
                else:
                    shard.buffers[name] = saved.clone(memory_format=torch.preserve_format)
        return int(state["step"])

    def after(self, step: int, shards: Sequence[Shard], settle: Callable[[], None]) -> None:
        """Save now and then.

        Args:
            step: the next one.
            settle: brings what has been handed out to the files.
        """
        if time.monotonic() < self._next:
            return
        settle()
        state = {"step": step, "parts": self.parts, "buffers": [dict(shard.buffers) for shard in shards]}
        beside = self.folder / "state.pt.part"
        try:
            torch.save(state, beside)
            beside.replace(self.folder / "state.pt")
        except (OSError, RuntimeError) as error:  # torch has no type of its own for a full disk
            beside.unlink(missing_ok=True)
            reason = str(error).splitlines()[0][:120]
            raise ExecutionError(f"{self.folder}: the run cannot be saved ({reason}); free some space, or run without "
                                 "--resume") from None
        self._next = time.monotonic() + self._every

    def remove(self) -> None:
        """The run is done."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def forsake(self) -> None:
        """The run has failed before anything was saved."""
        if not self.is_saved:
            with contextlib.suppress(OSError):
                self.remove()
