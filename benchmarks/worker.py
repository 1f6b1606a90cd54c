"""One side of a case in a process of its own, driven line by line: `python -m benchmarks.worker JOB`.

The job names suite, case and side (JSON, see `Job`).  Commands come on standard input, one per line; every
reply is one line of JSON on standard output.

    (start)      {"shape": extents}                                  nothing is in memory but the program
    (start)      {"setup_seconds": s, "forecast": traffic or null, "schedule": text or null}
                 the network is in memory, the input, and room for the output where the side can write to that; or
                 {"refused": why}, and the process ends
    run          {"seconds": s, "counted": traffic or null, "device_bytes": n or null}    traffic: see `runner.Traffic`
    save PATH    {"saved": PATH}                                     the last output, as .npy
    quit         (the process ends)
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from benchmarks.errors import SideRefusal
from benchmarks.memory import give_back_memory
from benchmarks.peers import opened
from benchmarks.runner import Runner, Traffic
from benchmarks.suite import example_input
from benchmarks.suites import FLOAT64, find_suite


@dataclass(frozen=True)
class Job:
    """Which side to open, and with how many threads in all.

    Args:
        budget: bytes that the process may hold, for a side with a share.
        tight: freed memory goes back at once (by the allocator's settings), so that what is idle holds nothing more.
    """

    suite: str
    case: str
    side: str
    model: str
    threads: int
    budget: int | None = None
    tight: bool = False

    def to_json(self) -> str:
        """The form in which the job is handed to the process."""
        return json.dumps(asdict(self))


def main(argv: list[str]) -> int:
    """Open the job's side and obey until `quit` or the end of the input."""
    # Asked to end, close the session and remove its files instead of dropping everything.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    replies = _own_standard_output()
    job = Job(**json.loads(argv[0]))
    suite = find_suite(job.suite)
    case = suite.case(job.case)
    side = next(side for side in (*case.sides, FLOAT64) if side.name == job.side)
    _reply(replies, {"shape": case.shape})
    started = time.perf_counter()
    try:
        with opened(side, case, Path(job.model), job.threads, job.budget, suite.device) as runner:
            seconds = time.perf_counter() - started
            volume = example_input(case)
            runner.hold()
            # What was freed since the start would otherwise take up what runs need, and hide it.
            give_back_memory()
            facts = {"forecast": _plain(runner.forecast()), "schedule": runner.schedule()}
            _reply(replies, {"setup_seconds": seconds, **facts})
            _obey(runner, volume, replies)
    except SideRefusal as refusal:
        _reply(replies, {"refused": str(refusal)})
    return 0


def _obey(runner: Runner, volume: NDArray[np.float32], replies: TextIO) -> None:
    output: Any = volume
    for line in sys.stdin:
        command, _, argument = line.strip().partition(" ")
        if command == "quit":
            return
        if command == "save":
            np.save(argument, runner.array(output))
            _reply(replies, {"saved": argument})
            continue
        # Let go of the last output first, or its memory would count as the next run's.
        output = volume
        started = time.perf_counter()
        output = runner.run(volume)
        seconds = time.perf_counter() - started
        found = {"seconds": seconds, "counted": _plain(runner.counted()), "device_bytes": runner.device_bytes()}
        _reply(replies, found)


def _plain(traffic: Traffic | None) -> dict[str, int] | None:
    return None if traffic is None else asdict(traffic)


def _reply(replies: TextIO, fields: dict[str, Any]) -> None:
    replies.write(json.dumps(fields) + "\n")
    replies.flush()


def _own_standard_output() -> TextIO:
    """Keep the pipe for replies; what libraries print goes to standard error instead."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return replies


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
