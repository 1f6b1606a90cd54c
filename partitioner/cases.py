"""A folder of cases: every volume in it is one run, its outputs under the same name in another folder.

    --input scans/ --output labels/            scans/a.nii.gz -> labels/a.nii.gz, scans/b.nii.gz -> labels/b.nii.gz
    --input ct=ct/ --input pet=pet/ ...        files of one name belong together
    --input volume=t1/,flair/ ...              so do those that hold the channels of one input
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass

from partitioner.api import Backend, Plan, Progress
from partitioner.errors import ExecutionError, PartitionError
from partitioner.files import FileRun, file_of, split_paths
from partitioner.options import Known, file_run
from runtime.session import Runner, RunReport, make_runner

FALLBACK = ".nii.gz"
"""Ends the names of outputs of cases in formats that are not written, as DICOM."""


@dataclass(frozen=True)
class Case:
    """One run of many.

    Args:
        name: of its files.
        inputs, outputs: as `--input` and `--output` take them.
        problem: why it cannot be run.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    problem: str | None = None

    def options(self, given: argparse.Namespace) -> argparse.Namespace:
        """The options of this run alone."""
        return argparse.Namespace(**{**vars(given), "input": list(self.inputs), "output": list(self.outputs)})


@dataclass(frozen=True)
class _Word:
    """`[NAME=]PATH[,PATH...]`, as the user wrote it."""

    prefix: str
    paths: tuple[str, ...]

    @property
    def folders(self) -> tuple[str, ...]:
        """The paths that are folders of cases."""
        return tuple(path for path in self.paths if is_folder_of_cases(path))

    def of_case(self, name: str) -> str:
        """The word with the files of a case in place of the folders."""
        return self.prefix + ",".join(os.path.join(p, name) if is_folder_of_cases(p) else p for p in self.paths)


def is_folder_of_cases(path: str) -> bool:
    """Whether a path is a folder and not itself one volume, as a Zarr store or a DICOM series."""
    from runtime.volumes import is_volume

    return os.path.isdir(path) and not is_volume(path)


def find_cases(options: argparse.Namespace) -> list[Case] | None:
    """The cases of the folders that are given as inputs, by name; None when none is a folder.

    Raises:
        PartitionError: for a folder without volumes, or outputs that are no folders.
    """
    words = [_word(text) for text in options.input]
    folders = {folder: _volumes(folder) for word in words for folder in word.folders}
    if not folders:
        return None
    empty = next((folder for folder, names in folders.items() if not names), None)
    if empty is not None:
        from runtime.volumes import known_suffixes

        raise PartitionError(f"{empty}: holds no volume file ({', '.join(known_suffixes())}); name the volume or the "
                             "folder of the cases")
    if options.resume:
        raise PartitionError("--resume: goes on with one run; of a folder of cases those that are done are kept")
    outputs = [_output_folder(text, list(folders)) for text in options.output]
    return [_case(name, words, folders, outputs) for name in dict.fromkeys(n for names in folders.values()
                                                                           for n in names)]


def _word(text: str) -> _Word:
    """The reading with most folders: a name and a path may both have equals signs."""
    ends = (0, *(index + 1 for index, letter in enumerate(text) if letter == "="))
    return max((_Word(text[:end], tuple(split_paths(text[end:]))) for end in ends), key=lambda word: len(word.folders))


def _volumes(folder: str) -> list[str]:
    """Names of the volumes in a folder, hidden ones left out."""
    from runtime.volumes import is_volume, known_suffixes

    try:
        with os.scandir(folder) as entries:
            return sorted(e.name for e in entries if not e.name.startswith(".") and (
                is_volume(e.path) if e.is_dir() else e.name.lower().endswith(known_suffixes())))
    except OSError as error:
        raise PartitionError(f"{folder}: cannot be read ({error.strerror}); check its permissions") from None


def _output_folder(text: str, inputs: Sequence[str]) -> _Word:
    """Where an output of all cases goes.

    Raises:
        PartitionError: when it is a file, or a folder of the inputs.
    """
    from runtime.volumes import known_suffixes

    name, equals, path = text.partition("=")
    found = _Word(f"{name}=", (path,)) if equals and "/" not in name else _Word("", (text,))
    (folder,) = found.paths
    if os.path.isfile(folder) or folder.lower().endswith(known_suffixes()):
        raise PartitionError(f"{folder}: is a file, but the input is a folder of cases; name a folder for the outputs")
    same = next((path for path in inputs if os.path.isdir(folder) and os.path.samefile(path, folder)), None)
    if same is not None:
        raise PartitionError(f"{folder}: is the folder of the inputs {same} as well; name another folder")
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise PartitionError(f"{folder}: cannot be made ({error.strerror}); choose another folder") from None
    return found


def _case(name: str, words: Sequence[_Word], folders: dict[str, list[str]], outputs: Sequence[_Word]) -> Case:
    from runtime.volumes import known_suffixes

    lacking = next((folder for folder, names in folders.items() if name not in names), None)
    target = name if name.lower().endswith(known_suffixes(written=True)) else name + FALLBACK
    problem = None if lacking is None else f"{os.path.join(lacking, name)}: no such file, while other inputs have it"
    return Case(name, tuple(word.of_case(name) for word in words),
                tuple(word.prefix + os.path.join(word.paths[0], target) for word in outputs), problem)


def is_done(case: Case) -> bool:
    """Whether all outputs of a case exist."""
    return all(os.path.exists(file_of(_word_path(text))) for text in case.outputs)


def _word_path(text: str) -> str:
    name, equals, path = text.partition("=")
    return path if equals and "/" not in name else text


class CaseRuns:
    """Runs cases one after the other; those of the same extents share their plan, weights and processes."""

    def __init__(self, options: argparse.Namespace, backend: Backend) -> None:
        self._options = options
        self._backend: Backend = backend
        self._known = Known()
        self._runner: Runner | None = None
        self._plan: Plan | None = None

    def prepare(self, case: Case) -> FileRun:
        """The run of a case.

        Raises:
            PartitionError: when its files are not those that the model takes.
        """
        if case.problem is not None:
            raise PartitionError(case.problem)
        return file_run(case.options(self._options), self._backend, self._known)

    def run(self, job: FileRun, progress: Progress | None = None) -> RunReport:
        """Run a case in this process, or in those that the case before has left.

        Raises:
            PartitionError, ExecutionError: as `FileRun.run`.
        """
        try:
            return job.run(progress, self._runner_for(job))
        except (PartitionError, ExecutionError):  # processes of which one has failed are of no use any more
            self.close()
            raise

    def close(self) -> None:
        """End the processes."""
        if self._runner is not None:
            self._runner.close()
        self._runner = self._plan = None

    def _runner_for(self, job: FileRun) -> Runner:
        if self._runner is None:
            self._runner = make_runner(job.plan.model, job.backend, job.device)
        elif job.plan is not self._plan:
            self._runner = self._runner.switch(job.plan.model)
        self._plan = job.plan
        return self._runner
