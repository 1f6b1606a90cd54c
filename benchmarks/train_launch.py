"""The processes of a training run: where this one stands, starting one per rank on this host, ending them all.

Every started process runs the same command with RANK, WORLD_SIZE and so on in its environment, as torchrun does it.

    Ctrl-C once    every rank ends after its step, and a checkpoint is written
    Ctrl-C twice   every rank ends at once
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from benchmarks.errors import SideError

_ROOT = Path(__file__).resolve().parents[1]
_STARTED_BY_US = "PARTITIONER_TRAIN_LAUNCHED"
_GRACE_SECONDS = 10
INTERRUPTED = 130
"""The exit code after Ctrl-C."""


@dataclass(frozen=True)
class Place:
    """Where this process stands among those of a run."""

    rank: int
    size: int
    local_rank: int

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that speaks and writes."""
        return self.rank == 0


def place() -> Place | None:
    """Our place when torchrun, or `launch`, has started us."""
    env = os.environ
    if not all(name in env for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR")):
        return None
    return Place(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", env["RANK"])))


def follow_launcher() -> None:
    """In a process that `launch` has started: end when the launcher does, and at once by Ctrl-C while setting up."""
    if os.environ.get(_STARTED_BY_US):
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # an exception in the midst of imports would be no clear line
        threading.Thread(target=_wait_for_end, daemon=True).start()


def launch(arguments: Sequence[str], size: int, threads: int | None) -> int:
    """Run `python -m benchmarks ARGUMENTS` in `size` processes; returns the exit code.

    Args:
        threads: per process; by default the cores shared out evenly.

    Raises:
        SideError: when a process dies without a word of its own.
        KeyboardInterrupt: when the processes were interrupted before they could say anything.
    """
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    # Our own store, as torchrun has one: no port is free when it is chosen and taken when it is used.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with contextlib.ExitStack() as stack:
        ranks = [_start(arguments, rank, size, store.port, threads, stack) for rank in range(size)]
        stack.callback(_end, ranks)
        stack.enter_context(_interruptions(ranks))
        return _watch(ranks)


@dataclass
class _Rank:
    number: int
    process: subprocess.Popen[bytes]
    errors: IO[bytes] | None
    asked: list[float] = field(default_factory=list[float])


def _start(arguments: Sequence[str], rank: int, size: int, port: int, threads: int | None,
           stack: contextlib.ExitStack) -> _Rank:
    share = str(threads or max(1, len(os.sched_getaffinity(0)) // size))
    env = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank),
           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True",
           "OMP_NUM_THREADS": share, "MKL_NUM_THREADS": share, _STARTED_BY_US: "1",
           "PYTHONPATH": os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))}
    if Path("/sys/class/net/lo").exists():
        env.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all ranks are on this host
    # The first rank speaks for all; what others say matters only when they fail.
    errors = stack.enter_context(tempfile.TemporaryFile()) if rank else None  # noqa: SIM115 (the stack closes it)
    process = subprocess.Popen([sys.executable, "-m", "benchmarks", *arguments], env=env, stdin=subprocess.PIPE,
                               stderr=errors, process_group=0)
    return _Rank(rank, process, errors)


def _watch(ranks: Sequence[_Rank]) -> int:
    """Wait until all have ended; when one fails, the others get a moment to say why, then are ended."""
    deadline: float | None = None
    while any(rank.process.poll() is None for rank in ranks):
        failed = any(rank.process.returncode for rank in ranks)
        if failed and deadline is None:
            deadline = time.monotonic() + _GRACE_SECONDS
        if deadline is not None and time.monotonic() > deadline:
            _end(ranks)
        time.sleep(0.05)
    return _verdict(ranks)


def _verdict(ranks: Sequence[_Rank]) -> int:
    codes = {rank.number: rank.process.returncode for rank in ranks}
    if -signal.SIGINT in codes.values():
        raise KeyboardInterrupt
    if INTERRUPTED in codes.values():
        return INTERRUPTED
    first = codes[0]
    if first == 2 or not any(codes.values()):
        return first
    for rank in ranks:
        words = _last_words(rank)
        code = codes[rank.number]
        if words:
            print(f"rank {rank.number}: {words}", file=sys.stderr)
        elif code < 0:
            name = signal.Signals(-code).name
            hint = ", perhaps for lack of memory" if name == "SIGKILL" else ""
            raise SideError(f"rank {rank.number} was killed by {name}{hint}; --resume goes on from the last checkpoint")
    return 1


def _last_words(rank: _Rank) -> str:
    if rank.errors is None or not rank.process.returncode:
        return ""
    rank.errors.seek(0)
    lines = rank.errors.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""


@contextlib.contextmanager
def _interruptions(ranks: Sequence[_Rank]) -> Generator[None]:
    """Hand Ctrl-C on to the ranks, and a polite end of this process as if it were Ctrl-C."""

    def hand_on(number: int, _: object) -> None:
        for rank in ranks:
            if rank.process.poll() is None:
                rank.process.send_signal(signal.SIGINT)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(ranks: Sequence[_Rank]) -> None:
    for rank in ranks:
        if rank.process.poll() is None:
            rank.process.kill()
    for rank in ranks:
        rank.process.wait()
        if rank.process.stdin is not None:
            rank.process.stdin.close()


def _wait_for_end() -> None:
    """The launcher holds the other end of our standard input."""
    with contextlib.suppress(OSError):
        while os.read(0, 1024):
            pass
    os._exit(INTERRUPTED)


@contextlib.contextmanager
def joined(here: Place | None, backend: str) -> Generator[None]:
    """A block in the process group; without a place there is none."""
    if here is None:
        yield
        return
    import torch
    import torch.distributed as dist

    if backend == "nccl":
        torch.cuda.set_device(here.local_rank % torch.cuda.device_count())
    dist.init_process_group("cpu:gloo,cuda:nccl" if backend == "nccl" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


class Stop:
    """Whether somebody wants the run to end: asked for once, it ends after the step; twice, at once."""

    def __init__(self) -> None:
        self.wanted = False

    @contextlib.contextmanager
    def on_signals(self) -> Generator[None]:
        """A block in which Ctrl-C and SIGTERM set `wanted`, and a second Ctrl-C raises KeyboardInterrupt."""

        def note(number: int, _: object) -> None:
            if self.wanted and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.wanted = True

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
