"""Times one side and watches its memory: a fresh process, a first run, then runs in the steady state."""

from __future__ import annotations

import json
import os
import queue
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from benchmarks.errors import SideError, SideRefusal
from benchmarks.memory import ALLOCATOR, Level, level, sampled
from benchmarks.results import Sample
from benchmarks.runner import Traffic
from benchmarks.suite import Side
from benchmarks.worker import Job

_SETTLE_SECONDS = 0.3
_GRACE_SECONDS = 10
_STEADY_SECONDS = 3
_STEADY_RUNS = 9
_REUSE = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
"""Settings of glibc's allocator under which freed blocks stay in the process and serve again."""


def measure(job: Job, side: Side, timeout: float, save: Path | None = None) -> Sample:
    """Open the side in a fresh process, run it once and then for some seconds (once at least), and end the process.

    Args:
        job: what the process opens.
        side: the side of that job.
        timeout: seconds until any single step counts as stuck.
        save: where the last output goes (.npy), or None.

    Raises:
        SideError: when the process fails or is stuck; nothing of it keeps running.
        SideRefusal: when the side cannot be had.
    """
    with _worker(job, side, timeout) as worker:
        worker.reply("input")
        with sampled(worker.pid) as sampler:
            opened = worker.opened()
            opening = sampler.stop()
        time.sleep(_SETTLE_SECONDS)
        idle = level(worker.pid)
        with sampled(worker.pid) as sampler:
            first = worker.ask("run")
            runs = _steady(worker)
            peak = sampler.stop()
        if save is not None:
            worker.ask(f"save {save}")
        worker.quit()
    rises = _rises(idle, peak.private)
    times = tuple(run["seconds"] for run in runs)
    return Sample(
        setup_seconds=opened["setup_seconds"],
        first_seconds=first["seconds"],
        seconds=statistics.median(times),
        idle_bytes=idle.total,
        peak_bytes=peak.total,
        process_bytes=rises[0],
        counted=_traffic(runs[-1]["counted"]),
        forecast=_traffic(opened["forecast"]),
        opening_bytes=opening.total,
        schedule=opened["schedule"],
        runs=times,
        processes_bytes=rises,
        device_bytes=runs[-1]["device_bytes"],
    )


def _steady(worker: _Worker) -> list[dict[str, Any]]:
    """Runs after the first: as many as fit in some seconds, so that short ones are not left to chance."""
    runs = [worker.ask("run")]
    while len(runs) < _STEADY_RUNS and sum(run["seconds"] for run in runs) < _STEADY_SECONDS:
        runs.append(worker.ask("run"))
    return runs


def compute(job: Job, side: Side, timeout: float, save: Path) -> None:
    """Run the side once in a fresh process and keep its output; nothing is measured.

    Raises:
        SideError: when the process fails or is stuck.
    """
    with _worker(job, side, timeout) as worker:
        worker.reply("input")
        worker.opened()
        worker.ask("run")
        worker.ask(f"save {save}")
        worker.quit()


def _rises(idle: Level, peak: dict[int, int]) -> tuple[int, ...]:
    return tuple(sorted((value - idle.private.get(process, 0) for process, value in peak.items()), reverse=True))


def _traffic(fields: dict[str, int] | None) -> Traffic | None:
    return None if fields is None else Traffic(**fields)


class _Worker:
    """The process of `benchmarks.worker`, asked line by line."""

    def __init__(self, process: subprocess.Popen[str], errors: IO[bytes], timeout: float) -> None:
        self._process = process
        self._errors = errors
        self._timeout = timeout
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, command: str) -> dict[str, Any]:
        """Send a command and wait for its reply."""
        self._send(command)
        return self.reply(command.split(maxsplit=1)[0])

    def opened(self) -> dict[str, Any]:
        """What the process says when it is ready.

        Raises:
            SideRefusal: when it will not be.
        """
        found = self.reply("open")
        if "refused" in found:
            raise SideRefusal(found["refused"])
        return found

    def reply(self, step: str) -> dict[str, Any]:
        """The next reply, to the step named in errors."""
        try:
            line = self._lines.get(timeout=self._timeout)
        except queue.Empty:
            raise SideError(f"no answer in {self._timeout:g} s to '{step}'; raise --timeout") from None
        if not line:
            raise SideError(f"ended at '{step}': {self._last_words()}")
        return json.loads(line)

    def quit(self) -> None:
        """Let the process close its session and end."""
        self._send("quit")
        try:
            code = self._process.wait(self._timeout)
        except subprocess.TimeoutExpired:
            raise SideError(f"did not end within {self._timeout:g} s") from None
        if code:
            raise SideError(f"ended with code {code}: {self._last_words()}")

    def _send(self, command: str) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(command + "\n")
            self._process.stdin.flush()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def _last_words(self) -> str:
        """The last line that the process wrote on standard error."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_GRACE_SECONDS)
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit code {self._process.returncode}, no message"


@contextmanager
def _worker(job: Job, side: Side, timeout: float) -> Generator[_Worker]:
    share = str(max(1, job.threads // side.processes))  # each rank's, where the ranks are processes
    settings = ALLOCATOR if job.tight else _REUSE if side.reuse else {}
    compiled = {"TORCHINDUCTOR_CACHE_DIR": str(Path(job.model).with_name("inductor")),
                "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    environment = {**os.environ, **compiled, **settings, "OMP_NUM_THREADS": share, "MKL_NUM_THREADS": share}
    command = [sys.executable, "-m", "benchmarks.worker", job.to_json()]
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
            cwd=Path(__file__).parents[1],
            start_new_session=True,
        ) as process,
    ):
        try:
            yield _Worker(process, errors, timeout)
        finally:
            _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    """End the process and whatever it started: they share a process group of their own."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(_GRACE_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
