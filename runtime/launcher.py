"""Starts one process per rank on this host, watches them, and ends them all when one fails."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

import onnx_ir as ir

from partitioner.errors import ExecutionError, PartitionError
from partitioner.loader import save_model
from partitioner.profile import Link
from runtime.executor import Progress
from runtime.group import GONE
from runtime.rank import RankReport, RunFiles

GRACE = 3.0
"""Seconds that the other ranks get to report their own error after the first failure."""

_ENDED = "the ranks of this session have ended; open another with plan.session()"

_ROOT = Path(__file__).resolve().parent.parent


class RankPool:
    """The processes of all ranks; a plan is loaded once and run any number of times.

    Args:
        size: number of ranks.
        backend: gloo or nccl.
        device: cpu, cuda, or a list such as cuda:0,cuda:1.
        threads: CPU threads per rank; by default the host's cores shared out evenly.
        link: a slower network that is emulated.

    Raises:
        ExecutionError: when a rank dies.
        PartitionError: when a rank finds a mistake of the user.
    """

    def __init__(self, size: int, backend: str, device: str, threads: int | None = None,
                 link: Link | None = None) -> None:
        self.size = size
        self._link = None if link is None else (link.latency, link.bandwidth)
        self._folder = tempfile.TemporaryDirectory(prefix="partitioner-")
        self._pipes: list[Connection[Any, Any]] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._plans = 0
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        shares = threads or max(1, cores // size)
        try:
            for rank in range(size):
                self._start(rank, backend, device, shares)
            self._expect("ready")
        except BaseException:
            self.kill()
            raise

    def load(self, model: ir.Model) -> None:
        """Give every rank a plan."""
        self._plans += 1
        path = Path(self._folder.name) / f"plan{self._plans}.onnx"
        try:
            save_model(model.clone(), path)
        except PartitionError as error:
            raise ExecutionError(f"no room for temporary files ({error}); set TMPDIR to a folder with room") from None
        self._request(("plan", str(path)), "ready")
        for file in Path(self._folder.name).glob(f"{path.name}*"):
            file.unlink()

    def run(self, files: RunFiles, progress: Progress | None = None) -> list[RankReport]:
        """Run the loaded plan over files; returns every rank's report."""
        return [message[1] for message in self._request(("run", files), "done", progress)]

    def _request(self, message: tuple[Any, ...], kind: str, progress: Progress | None = None) -> list[tuple[Any, ...]]:
        """Ask all ranks and wait for their answers; whatever goes wrong ends them, for they may be out of step."""
        if not self._pipes:
            raise ExecutionError(_ENDED)
        try:
            self._tell(message)
            return self._expect(kind, progress)
        except BaseException:
            self.kill()
            raise

    def close(self) -> None:
        """End all ranks; harmless when repeated."""
        with contextlib.suppress(ExecutionError):
            self._tell(("close",))
        deadline = time.monotonic() + GRACE
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                break
        self.kill()

    def kill(self) -> None:
        """End all ranks at once."""
        for process in self._processes:
            if process.poll() is None:
                process.kill()
        for process in self._processes:
            process.wait()
        for pipe in self._pipes:
            pipe.close()
        self._pipes, self._processes = [], []
        self._folder.cleanup()

    def _start(self, rank: int, backend: str, device: str, threads: int) -> None:
        ours, theirs = Pipe()
        options = {
            "rank": rank, "size": self.size, "backend": backend, "device": device, "threads": threads,
            "pipe": theirs.fileno(), "parent": os.getpid(), "folder": self._folder.name, "link": self._link,
        }
        env = dict(os.environ, OMP_NUM_THREADS=str(threads))
        env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(_ROOT), env.get("PYTHONPATH"))))
        if Path("/sys/class/net/lo").exists():
            env.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all ranks are on this host
        # -P: a folder named like one of our packages where the user stands must not shadow it.
        command = [sys.executable, "-P", "-m", "runtime.worker", json.dumps(options)]
        # A group of its own: Ctrl-C reaches the launcher, which ends the ranks.
        process = subprocess.Popen(command, env=env, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
                                   process_group=0)
        theirs.close()
        self._pipes.append(ours)
        self._processes.append(process)

    def _tell(self, message: tuple[Any, ...]) -> None:
        for rank, pipe in enumerate(self._pipes):
            try:
                pipe.send(message)
            except (BrokenPipeError, OSError):
                self._fail(rank, None)

    def _expect(self, kind: str, progress: Progress | None = None) -> list[tuple[Any, ...]]:
        """One message of a kind from every rank; what goes wrong first ends all."""
        found: dict[int, tuple[Any, ...]] = {}
        while len(found) < self.size:
            waiting = {pipe: rank for rank, pipe in enumerate(self._pipes) if rank not in found}
            for pipe in wait(list(waiting)):
                rank = waiting[pipe]  # pyright: ignore[reportArgumentType]
                message = self._receive(rank)
                if message is None or message[0] == "error":
                    self._fail(rank, message)
                elif message[0] == "progress":
                    if progress is not None:
                        progress(*message[1:])
                else:
                    assert message[0] == kind, message
                    found[rank] = message
        return [found[rank] for rank in range(self.size)]

    def _receive(self, rank: int) -> tuple[Any, ...] | None:
        try:
            return self._pipes[rank].recv()
        except (EOFError, ConnectionResetError):
            return None

    def _fail(self, rank: int, message: tuple[Any, ...] | None) -> None:
        """Collect what the other ranks have to say, end them, and raise the first cause."""
        found = {rank: message}
        deadline = time.monotonic() + GRACE
        while len(found) < len(self._pipes) and time.monotonic() < deadline:
            left = [r for r in range(len(self._pipes)) if r not in found]
            for pipe in wait([self._pipes[r] for r in left], max(0.0, deadline - time.monotonic())):
                other = self._pipes.index(pipe)  # pyright: ignore[reportArgumentType]
                said = self._receive(other)
                if said is None or said[0] == "error":
                    found[other] = said
        codes = {r: self._exit_code(r) for r, said in found.items() if said is None}
        self.kill()
        raise _first_cause(found, codes)

    def _exit_code(self, rank: int) -> int | None:
        try:
            return self._processes[rank].wait(1.0)
        except subprocess.TimeoutExpired:
            return None


def _first_cause(found: dict[int, tuple[Any, ...] | None], codes: dict[int, int | None]) -> Exception:
    """A user's mistake before a death, a death before the failures that it caused in other ranks."""
    said = [m for m in found.values() if m is not None]
    for kind, make in (("user", PartitionError), ("bug", ExecutionError)):
        text = next((m[2] for m in said if m[1] == kind), None)
        if text is not None:
            return make(text)
    dead = sorted(codes.items())
    if dead:
        rank, code = dead[0]
        return ExecutionError(f"rank {rank} {_describe(code)}; the run was stopped and no output was written")
    return ExecutionError(_unprovoked([m[2] for m in said]))


def _unprovoked(texts: Sequence[str]) -> str:
    """The failure that is not about a peer, if there is one."""
    return next((t for t in texts if GONE not in t), texts[0])


def _describe(code: int | None) -> str:
    if code is None:
        return "does not answer"
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name
    hint = ", perhaps for lack of memory" if name == "SIGKILL" else ""
    return f"was killed by {name}{hint}"


