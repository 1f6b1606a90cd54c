"""The process of one rank that the launcher starts: obeys its pipe, and ends when the pipe does.

Messages in:  ("plan", path), ("run", RunFiles), ("close",)
Messages out: ("ready",), ("progress", done, count, name), ("done", RankReport), ("error", kind, text)
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from partitioner.errors import ExecutionError, PartitionError
from runtime.allocator import keep_memory_tight

if TYPE_CHECKING:
    from runtime.rank import RunFiles


def main() -> int:
    """Serve the launcher until it closes the pipe; the arguments are one JSON object."""
    options = json.loads(sys.argv[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher decides what Ctrl-C means
    remains = _Remains(options["folder"])
    _die_with(options["parent"], remains)
    keep_memory_tight()
    pipe = _Pipe(Connection(options["pipe"]), remains)
    try:
        return _serve(pipe, options, remains)
    except PartitionError as error:
        pipe.send(("error", "user", str(error)))
    except ExecutionError as error:
        pipe.send(("error", "run", str(error)))
    except Exception as error:
        line = (str(error).strip().splitlines() or ["no reason given"])[0]
        pipe.send(("error", "bug", f"rank {options['rank']}: {type(error).__name__}: {line[:200]}"))
        if os.environ.get("PARTITIONER_TRACEBACK"):
            raise
    return 1


class _Pipe:
    """The way to the launcher; without a launcher there is nothing left to do but to clean up."""

    def __init__(self, connection: Connection[Any, Any], remains: _Remains) -> None:
        self._connection = connection
        self._remains = remains

    def send(self, message: tuple[Any, ...]) -> None:
        """Tell the launcher."""
        try:
            self._connection.send(message)
        except OSError:
            self._remains.end()

    def receive(self) -> tuple[Any, ...]:
        """The launcher's next wish."""
        try:
            return self._connection.recv()
        except (EOFError, OSError):
            self._remains.end()


@dataclass
class _Remains:
    """What the launcher would clean up; the ranks do when it is killed."""

    folder: str
    files: RunFiles | None = None

    def end(self) -> NoReturn:
        """Remove files and folders, where no other rank was faster, and end this process."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.files is not None:
            self.files.remove()
        os._exit(1)


def _serve(pipe: _Pipe, options: dict[str, Any], remains: _Remains) -> int:
    import torch

    from partitioner.loader import load_file
    from partitioner.profile import Link
    from runtime.group import Place, join, leave, rank_device
    from runtime.rank import RankRunner, guarded
    from runtime.transports.catalog import make_transport

    place = Place(options["rank"], options["size"], options["rank"])
    device = rank_device(options["device"], place)
    torch.set_num_threads(options["threads"])
    join(place, options["backend"], (Path(options["folder"]) / "rendezvous").as_uri())
    link = None if options["link"] is None else Link(*options["link"])
    transport = make_transport(options["backend"], device, link)
    runner: RankRunner | None = None
    report = _Reporter(pipe) if place.rank == 0 else None
    pipe.send(("ready",))
    while True:
        request = pipe.receive()
        if request[0] == "close":
            leave()
            return 0
        if request[0] == "plan":
            runner = RankRunner(load_file(Path(request[1])), place, device, transport)
            pipe.send(("ready",))
            continue
        assert runner is not None
        remains.files = request[1]
        pipe.send(("done", guarded(partial(runner.run, request[1], report), f"rank {place.rank}: ")))
        remains.files = None


class _Reporter:
    """Tells the launcher how far the run is, ten times a second at most."""

    def __init__(self, pipe: _Pipe) -> None:
        self._pipe = pipe
        self._next = 0.0

    def __call__(self, done: int, count: int, name: str) -> None:
        now = time.monotonic()
        if now >= self._next or done == count:
            self._next = now + 0.1
            self._pipe.send(("progress", done, count, name))


def _die_with(parent: int, remains: _Remains) -> None:
    """End this process when the launcher is gone, even in the middle of an exchange."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        remains.end()

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # a peer that waits in an exchange learns at once that we are gone
