"""Runs that go on where they were stopped: the folder that stands beside the first output until the run is done.

    labels.nii.gz.resume/request.json   which run it is: model, inputs, options
    labels.nii.gz.resume/plan.onnx      its plan, so that no other schedule is chosen when it goes on
    labels.nii.gz.resume/parts.json     the unfinished output files
    labels.nii.gz.resume/lock           shared by all processes that work on it
    labels.nii.gz.resume/saved.json     see `runtime.saves`, as for the states

Steps are the same and read the same cells, so the result has the same bits as that of a run that was not stopped.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from partitioner.errors import PartitionError
from runtime.claim import Claim
from runtime.saves import SAVED, Saving, state_name
from runtime.volumes import PartFile

SECONDS = 120.0
"""Between one save and the next; PARTITIONER_SAVE_SECONDS sets another number."""

_REQUEST, _PLAN, _PARTS = "request.json", "plan.onnx", "parts.json"


def save_seconds() -> float:
    """Seconds between one save and the next.

    Raises:
        PartitionError: when the environment names no positive number.
    """
    text = os.environ.get("PARTITIONER_SAVE_SECONDS", "").strip()
    if not text:
        return SECONDS
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 < found < math.inf:
        raise PartitionError(f"PARTITIONER_SAVE_SECONDS={text}: is no positive number of seconds; set one, as 120, or "
                             "unset it")
    return found


class SavedRun:
    """The folder of one run.

    Args:
        folder: made when the run begins.
        request: which run it is: `options` by name, and stamps of `files`; another one does not go on from it.
        leads: whether this process makes and removes it; the other ranks of a group only look.

    Raises:
        PartitionError: when the folder is of another run, is not ours, or another process works on it.
    """

    def __init__(self, folder: Path, request: Mapping[str, Mapping[str, Any]], leads: bool = True) -> None:
        self.folder = folder.absolute()
        self._shown = folder
        self._request: dict[str, dict[str, Any]] = json.loads(json.dumps(request, sort_keys=True, default=str))
        self._every = save_seconds()
        self._leads = leads
        self._claim: Claim | None = None
        self._begun = False
        self.parts: dict[str, str] = {}
        self.notice: str | None = None
        if not self.folder.exists():
            self._step, self._members = 0, 1
            return
        if self.folder.is_dir() and any(self.folder.iterdir()) and not self._is_ours():
            raise PartitionError(f"{folder}: is needed to save the run, and holds something else; move it away")
        try:
            self._claim_it()
            self._step, self._members = self._found()
        except BaseException:
            self.release()
            raise

    @property
    def goes_on(self) -> bool:
        """Whether there is something to go on from."""
        return self._step > 0

    @property
    def saving(self) -> Saving:
        """What every process of the run must know."""
        return Saving(self.folder, self._every, self._step, self._members)

    @property
    def plan_file(self) -> Path:
        """The plan of the run that goes on."""
        return self.folder / _PLAN

    def begin(self, save_plan: Callable[[Path], None], parts: Mapping[str, str]) -> None:
        """Note the plan and the output files, as JSON by the path of the output, of a run that begins.

        Raises:
            PartitionError: when the folder cannot be written.
        """
        if self.goes_on:
            return
        try:
            self.folder.mkdir(exist_ok=True)
            self._claim_it()
            self._begun = True
            self._clear()
            (self.folder / _PARTS).write_text(json.dumps(dict(parts)))
            save_plan(self.plan_file)
            (self.folder / _REQUEST).write_text(json.dumps(self._request))
        except OSError as error:
            raise PartitionError(f"{self._shown}: the run cannot be saved here ({error.strerror}); free some space, or "
                                 "run without --resume") from None
        self.parts = dict(parts)

    def remove(self) -> None:
        """The run is done."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def forsake(self) -> None:
        """The run has failed: nothing of it stays that it cannot go on from."""
        if self._begun and not self.saving.is_saved:
            self.remove()

    def release(self) -> None:
        """Let others go on with the run."""
        if self._claim is not None:
            self._claim.release()

    def _claim_it(self) -> None:
        if self._leads and self._claim is None:
            self._claim = Claim(self.folder, alone=True)

    def _is_ours(self) -> bool:
        return any((self.folder / name).exists() for name in (_REQUEST, _PARTS, "lock"))

    def _found(self) -> tuple[int, int]:
        """The step to go on with, 0 when there is none, and how many processes have saved it."""
        saved, told = self._read(SAVED), self._read(_REQUEST)
        if saved is None or told is None:
            return 0, 1
        other = _differences(told, self._request)
        if other:
            raise PartitionError(f"{self._shown}: is of another run (differs in {', '.join(other)}); remove it, or run "
                                 "with what it was begun with")
        try:
            step, members = int(saved["step"]), int(saved["members"])
            self.parts = dict(self._read(_PARTS) or {})
            wanted = [json.loads(part)["temporary"] for part in self.parts.values()]
        except (KeyError, TypeError, ValueError):
            raise self._damaged() from None
        wanted += [str(self.folder / state_name(step, member)) for member in range(members)]
        lost = next((path for path in (*wanted, str(self.plan_file)) if not os.path.exists(path)), None)
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime((self.folder / SAVED).stat().st_mtime))
        if lost is not None:
            self.notice = f"{self._shown}: begins anew, for {lost} is gone"
            return 0, 1
        self.notice = f"{self._shown}: goes on from what was saved at {when}"
        return step, members

    def _read(self, name: str) -> Any:
        try:
            return json.loads((self.folder / name).read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            raise self._damaged() from None

    def _damaged(self) -> PartitionError:
        return PartitionError(f"{self._shown}: is damaged; remove it to begin anew")

    def _clear(self) -> None:
        """Remove what is left of a run that cannot be gone on with, its unfinished outputs too."""
        with contextlib.suppress(PartitionError, TypeError, ValueError, KeyError, AttributeError):
            for part in dict(self._read(_PARTS) or {}).values():
                PartFile.from_json(part).remove()
        for path in self.folder.iterdir():
            if path.name != "lock":
                path.unlink(missing_ok=True)


def _differences(then: Mapping[str, Any], now: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The options and files that are others."""
    before, after = then.get("options", {}), now["options"]
    found = ["the model" if name == "model" else f"--{name.replace('_', '-')}"
             for name in sorted({*before, *after}) if before.get(name) != after.get(name)]
    before, after = then.get("files", {}), now["files"]
    return found or [path for path in sorted({*before, *after}) if before.get(path) != after.get(path)]
