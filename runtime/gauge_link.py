"""Times messages: two ranks that send each other some bytes at once, as neighbours in a halo exchange do.

As a program of its own it is one of two local processes; the first one prints seconds per size as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from partitioner.errors import ExecutionError
from runtime.transports import Job, Parcel, Transport

WAIT = 60.0
"""Seconds until the two processes count as stuck."""

_ROOT = Path(__file__).resolve().parent.parent


def copy_times(sizes: Sequence[int], patience: float) -> dict[int, float]:
    """Seconds of one message in one process, by bytes."""
    from runtime.transports.lockstep import Lockstep

    return _times(Lockstep(2), sizes, lambda _: patience)


def process_times(backend: str, sizes: Sequence[int], patience: float, threads: int = 1) -> dict[int, float]:
    """Seconds of one message between two processes on this host, by bytes, while another one comes back.

    Args:
        backend: gloo or shm.

    Raises:
        ExecutionError: when they fail or do not end.
    """
    with tempfile.TemporaryDirectory(prefix="partitioner-") as folder:
        environment = dict(os.environ, OMP_NUM_THREADS=str(threads))
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(_ROOT), environment.get("PYTHONPATH"))))
        if Path("/sys/class/net/lo").exists():
            environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
        told = json.dumps({"sizes": list(sizes), "patience": patience, "folder": folder, "threads": threads,
                           "backend": backend})
        processes = [
            subprocess.Popen([sys.executable, "-P", "-m", "runtime.gauge_link", str(rank), told], env=environment,
                             stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for rank in range(2)]
        try:
            said = [process.communicate(timeout=WAIT) for process in processes]
        except subprocess.TimeoutExpired:
            raise ExecutionError(f"{backend}: the two processes do not answer; check that this host reaches itself"
                                 ) from None
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                    process.wait()
    for process, (_, errors) in zip(processes, said, strict=True):
        if process.returncode:
            line = (errors.strip().splitlines() or ["no reason given"])[-1]
            raise ExecutionError(f"{backend}: messages between two processes failed ({line[:160]})")
    return {int(n): float(s) for n, s in json.loads(said[0][0]).items()}


def _times(transport: Transport, sizes: Sequence[int], patience: Callable[[int], float]) -> dict[int, float]:
    return {size: _usual(transport, [_job(rank, size) for rank in transport.ranks], patience(size))
            / len(transport.ranks) for size in sizes}


def _job(rank: int, size: int) -> Job:
    mine, theirs = torch.ones(max(1, size // 4)), torch.zeros(max(1, size // 4))
    return Job(rank, (Parcel(1 - rank, (mine,)),), (Parcel(1 - rank, (theirs,)),))


def _usual(transport: Transport, jobs: Sequence[Job], patience: float) -> float:
    transport.exchange(jobs)
    times: list[float] = []
    runs = max(5, min(500, int(patience / 2e-4)))
    for _ in range(runs):  # as many on both sides
        start = time.perf_counter()
        transport.exchange(jobs)
        times.append(time.perf_counter() - start)
        if len(transport.ranks) > 1 and sum(times) > patience:
            break
    return sorted(times)[len(times) // 4]


def main() -> int:
    """One of the two processes."""
    from runtime.group import Place, join, leave
    from runtime.transports.catalog import make_transport

    rank, told = int(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(told["threads"])
    join(Place(rank, 2, rank), "gloo", (Path(told["folder"]) / "rendezvous").as_uri())
    transport = make_transport(told["backend"], torch.device("cpu"))

    def share(size: int) -> float:
        return told["patience"] * min(1.0, (1 << 18) / max(1, size))

    found = _times(transport, told["sizes"], share)
    leave()
    if rank == 0:
        sys.stdout.write(json.dumps(found))
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
