"""The sides of a training case: forward, loss, backward and a step of the optimiser, on a network with batch norms.

    torch eager             the torch module
    partitioned, lock-step  `plan.module()` with all shards in this process
    partitioned, gloo       a process per shard, started here and told when to take a step; messages over gloo
    partitioned, shm        the same, messages through shared memory, as is the default on one host
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from benchmarks.ranks import Ranks, Step, opened_ranks
from benchmarks.runner import Runner
from benchmarks.suite import Case, Side, example_classes, example_input

Array: TypeAlias = NDArray[np.float32]

_LEARNING_RATE = 1e-3
_MOMENTUM = 0.9


@contextmanager
def opened_training(side: Side, case: Case, threads: int) -> Generator[Runner]:
    """The side's runner, using `threads` threads in all (each process its share).

    One run takes a step and returns the first step's gradients of all parameters, in the order of their names: later
    ones belong to weights that differ by their rounding, and to as many steps as a side has time for.
    """
    if side.own and side.backend in ("gloo", "shm"):
        share = max(1, threads // side.processes)
        with opened_ranks(side.processes, partial(_rank, side, case, share)) as ranks:
            yield _Ranks(ranks)
    else:
        yield _Here(side, case, threads)


class _Here(Runner):
    """A module in this process: torch's own, or a plan's with all shards, or with that of this rank."""

    def __init__(self, side: Side, case: Case, threads: int) -> None:
        import torch

        import partitioner as pt

        torch.set_num_threads(threads)
        network: Any = case.network.build()
        self._losses = None
        if side.own:
            plan = pt.partition(network, torch.zeros(case.shape), mesh=side.mesh, train=True)
            network = plan.module(backend=side.backend if torch.distributed.is_initialized() else None)
            self._losses = pt.losses
        self._module = network.train()
        self._optimiser = torch.optim.SGD(self._module.parameters(), lr=_LEARNING_RATE, momentum=_MOMENTUM)
        self._labels = torch.from_numpy(self._own(example_classes(case))).long()
        self._first: Array | None = None

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
        if self._first is None:
            named = sorted(self._module.named_parameters())
            self._first = np.concatenate([p.grad.numpy().reshape(-1) for _, p in named if p.grad is not None])
        return self._first

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


class _Ranks(Runner):
    """Processes that each hold a shard; all take the step, the first one's gradients are the sums."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks

    def run(self, volume: Array) -> Array:
        """Let all take a step."""
        return self._ranks.step()[0]


def _rank(side: Side, case: Case, threads: int) -> Step:
    """A rank's steps on its own part of the volume; gradients come from rank 0 alone."""
    import torch.distributed as dist

    runner = _Here(side, case, threads)
    volume = runner.own_input(example_input(case))
    return lambda: _only(runner.run(volume), dist.get_rank() == 0)


def _only(gradients: Array, wanted: bool) -> Array | None:
    return gradients if wanted else None
