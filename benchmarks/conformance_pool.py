"""Cases checked in processes of their own: one that dies or hangs takes only its case with it."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from benchmarks.conformance_cases import Result, check, operator_under_test

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass
class Worker:
    """A process and the case that it works on."""

    process: BaseProcess
    pipe: Connection
    case: str = ""
    since: float = 0.0

    @classmethod
    def start(cls) -> Worker:
        """A fresh process, one thread."""
        context = multiprocessing.get_context("spawn")
        mine, its = context.Pipe()
        process = context.Process(target=serve, args=(its,), daemon=True)
        before = {name: os.environ.get(name) for name in THREADS}
        os.environ.update(dict.fromkeys(THREADS, "1"))
        try:
            process.start()
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
        its.close()
        return cls(process, mine)

    def give(self, case: str) -> None:
        """Let it check a case."""
        self.case, self.since = case, time.monotonic()
        self.pipe.send(case)

    def end(self) -> None:
        """End the process, whatever it does."""
        self.process.kill()
        self.process.join()
        self.pipe.close()


def serve(pipe: Connection) -> None:
    """Check the cases that arrive, one by one, until there are no more."""
    while True:
        try:
            name = pipe.recv()
        except EOFError:
            return
        pipe.send(check(name))


def check_all(names: Sequence[str], jobs: int, timeout: float) -> Iterator[Result]:
    """The result of every case, as they end; a process that dies or takes too long fails its case."""
    waiting, workers = list(reversed(names)), list[Worker]()
    try:
        while waiting or workers:
            while waiting and len(workers) < jobs:
                workers.append(Worker.start())
                _give_while_alive(workers[-1], waiting)
            oldest = min(w.since for w in workers)
            ready = wait([w.pipe for w in workers], max(0.0, oldest + timeout - time.monotonic()))
            for worker in list(workers):
                result = _result_of(worker, worker.pipe in ready, timeout)
                if result is None:
                    continue
                yield result
                if worker.process.is_alive() and waiting:
                    _give_while_alive(worker, waiting)
                else:
                    worker.end()
                    workers.remove(worker)
    finally:
        for worker in workers:
            worker.end()


def _give_while_alive(worker: Worker, waiting: list[str]) -> None:
    try:
        worker.give(waiting.pop())
    except BrokenPipeError:  # it died after its last result; the pipe says so when it is read
        return


def _result_of(worker: Worker, ready: bool, timeout: float) -> Result | None:
    """What became of the worker's case; None while it works."""
    if ready:
        try:
            return worker.pipe.recv()
        except (EOFError, ConnectionResetError):
            worker.process.join()
            return _lost(worker, f"its process died ({worker.process.exitcode})")
    if time.monotonic() - worker.since < timeout:
        return None
    worker.process.kill()
    worker.process.join()
    return _lost(worker, f"it was not done after {timeout:.0f} s")


def _lost(worker: Worker, detail: str) -> Result:
    return Result(worker.case, operator_under_test(worker.case), "failed", detail=detail)
