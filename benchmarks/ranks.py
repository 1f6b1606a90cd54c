"""Processes that form a gloo group on this host and each do a part of the work when they are told to."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeAlias

Step: TypeAlias = Callable[[], Any]
"""One rank's part of the work; what it returns goes to the process that asked."""

_GRACE_SECONDS = 10


class Ranks:
    """The running processes, asked all at once."""

    def __init__(self, pipes: list[Connection]) -> None:
        self._pipes = pipes

    def step(self) -> list[Any]:
        """Let all do their part; what each returns, in the order of ranks."""
        for pipe in self._pipes:
            pipe.send("step")
        return [_received(pipe) for pipe in self._pipes]


@contextmanager
def opened_ranks(count: int, make: Callable[[], Step]) -> Generator[Ranks]:
    """Ranks that have each called `make` in their group; they end with the block.

    Args:
        count: the processes.
        make: called in every process after the group is there; it goes through pickle.
    """
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    spawn = multiprocessing.get_context("spawn")
    pipes: list[Connection] = []
    processes: list[Any] = []
    try:
        for rank in range(count):
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=_serve, args=(rank, count, store.port, make, theirs), daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        for pipe in pipes:
            _received(pipe)
        yield Ranks(pipes)
    finally:
        for pipe in pipes:
            with suppress(OSError):
                pipe.send("quit")
        for process in processes:
            process.join(_GRACE_SECONDS)
            process.kill()


def _received(pipe: Connection) -> Any:
    try:
        found = pipe.recv()
    except (EOFError, ConnectionResetError):
        raise ConnectionError("a rank has ended without a word") from None
    if isinstance(found, BaseException):
        raise found
    return found


def _serve(rank: int, count: int, port: int, make: Callable[[], Step], pipe: Connection) -> None:
    """A rank: does its part as long as it is told to."""
    import torch.distributed as dist
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    if Path("/sys/class/net/lo").exists():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all ranks are on this host
    store = TCPStore("127.0.0.1", port, is_master=False)
    try:
        dist.init_process_group("gloo", store=store, rank=rank, world_size=count)
        step = make()
        pipe.send("ready")
        while pipe.recv() == "step":
            pipe.send(step())
        dist.destroy_process_group()
    except EOFError:
        return
    except Exception as error:
        pipe.send(RuntimeError(f"rank {rank}: {type(error).__name__}: {error}"))
