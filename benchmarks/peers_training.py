"""The sides of a training case: forward, loss, backward and a step of the optimiser, on a network with batch norms.

    torch eager             the torch module
    partitioned, lock-step  `plan.module()` with all shards in this process
    partitioned, gloo       a process per shard, started here and told when to take a step
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Generator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from benchmarks.suite import Case, Side, example_classes, example_input

Array: TypeAlias = NDArray[np.float32]

_LEARNING_RATE = 1e-3
_MOMENTUM = 0.9
_GRACE_SECONDS = 10


@contextmanager
def opened_training(side: Side, case: Case, threads: int) -> Generator[TrainingRunner]:
    """The side's runner, using `threads` threads in all (each process its share)."""
    if side.kind == "partitioned" and side.backend == "gloo":
        with _ranks(side, case, max(1, threads // side.processes)) as pipes:
            yield _Ranks(pipes)
    else:
        yield _Here(side, case, threads)


class TrainingRunner:
    """A network ready to take steps, its weights in memory."""

    def run(self, volume: Array) -> Array:
        """Take a step; all parameters' gradients, in the order of their names."""
        raise NotImplementedError

    def forecast(self) -> None:
        """A plan says nothing of training yet."""

    def counted(self) -> None:
        """A module does not say what it sends."""

    def schedule(self) -> None:
        """Training is not executed depth-first."""


class _Here(TrainingRunner):
    """A module in this process: torch's own, or a plan's with all shards, or with that of this rank."""

    def __init__(self, side: Side, case: Case, threads: int) -> None:
        import torch

        import partitioner as pt

        torch.set_num_threads(threads)
        network: Any = case.network.build()
        self._losses = None
        if side.kind == "partitioned":
            network = pt.partition(network, torch.zeros(case.shape), mesh=side.mesh, train=True).module()
            self._losses = pt.losses
        self._module = network.train()
        self._optimiser = torch.optim.SGD(self._module.parameters(), lr=_LEARNING_RATE, momentum=_MOMENTUM)
        self._labels = torch.from_numpy(self._own(example_classes(case))).long()

    def run(self, volume: Array) -> Array:
        """Take a step."""
        import torch
        from torch.nn import functional

        self._optimiser.zero_grad()
        logits = self._module(torch.from_numpy(volume))
        if self._losses is None:
            loss = functional.cross_entropy(logits, self._labels)
        else:
            loss = self._losses.cross_entropy(self._module, logits, self._labels)
        loss.backward()
        self._optimiser.step()
        # The graph is let go of here, as a training loop does at its next step.
        del logits, loss
        named = sorted(self._module.named_parameters())
        return np.concatenate([p.grad.numpy().reshape(-1) for _, p in named if p.grad is not None])

    def own_input(self, volume: Array) -> Array:
        """This rank's part of the volume, so that the whole is held by none."""
        box = self._module.own_box(self._module.input_names[0])
        return np.ascontiguousarray(volume[tuple(slice(i.start, i.stop) for i in box.intervals())])

    def _own(self, labels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """This rank's part of the labels (batch, *spatial)."""
        if self._losses is None:
            return labels
        batch, _, *space = self._module.own_box(self._module.output_names[0]).intervals()
        return np.ascontiguousarray(labels[tuple(slice(i.start, i.stop) for i in (batch, *space))])


class _Ranks(TrainingRunner):
    """Processes that each hold a shard; all take the step, the first one's gradients are the sums."""

    def __init__(self, pipes: list[Connection]) -> None:
        self._pipes = pipes

    def run(self, volume: Array) -> Array:
        """Let all take a step."""
        for pipe in self._pipes:
            pipe.send("step")
        gradients, *_ = [_received(pipe) for pipe in self._pipes]
        return gradients


@contextmanager
def _ranks(side: Side, case: Case, threads: int) -> Generator[list[Connection]]:
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    spawn = multiprocessing.get_context("spawn")
    pipes: list[Connection] = []
    processes: list[Any] = []
    try:
        for rank in range(side.processes):
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=_serve, args=(rank, store.port, side, case, threads, theirs), daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        for pipe in pipes:
            _received(pipe)
        yield pipes
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


def _serve(rank: int, port: int, side: Side, case: Case, threads: int, pipe: Connection) -> None:
    """A rank: takes steps on its own part of the volume as long as it is told to."""
    import torch.distributed as dist
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    if Path("/sys/class/net/lo").exists():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all ranks are on this host
    store = TCPStore("127.0.0.1", port, is_master=False)
    try:
        dist.init_process_group("gloo", store=store, rank=rank, world_size=side.processes)
        runner = _Here(side, case, threads)
        volume = runner.own_input(example_input(case))
        pipe.send("ready")
        while pipe.recv() == "step":
            gradients = runner.run(volume)
            pipe.send(gradients if rank == 0 else None)
        dist.destroy_process_group()
    except EOFError:
        return
    except Exception as error:
        pipe.send(RuntimeError(f"rank {rank}: {type(error).__name__}: {error}"))
