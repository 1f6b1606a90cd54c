"""The sides of a case behind one small protocol: open, run an array, ask for its traffic, close."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from benchmarks.models import INPUT_NAME, OUTPUT_NAME
from benchmarks.suite import Backend, Case, Side

if TYPE_CHECKING:
    import partitioner as pt


@dataclass(frozen=True)
class Traffic:
    """What one forward pass sends between shards, all ranks together, and the most memory of one process."""

    sent_bytes: int
    messages: int
    rank_bytes: int


class Runner(Protocol):
    """A network ready to run, its weights in memory."""

    def run(self, volume: NDArray[np.float32]) -> NDArray[np.float32]:
        """The logits of one forward pass."""
        ...

    def forecast(self) -> Traffic | None:
        """What the plan predicts; None for a side that predicts nothing."""
        ...

    def counted(self) -> Traffic | None:
        """What the last pass counted at the transport; None for a side that sends nothing."""
        ...


@contextmanager
def opened(side: Side, case: Case, model: Path, threads: int) -> Generator[Runner]:
    """The side's runner, using `threads` threads in all (each process its share)."""
    if case.task == "training":
        from benchmarks.peers_training import opened_training

        with opened_training(side, case, threads) as runner:
            yield runner
    elif side.kind == "torch eager":
        yield _Eager(case, threads)
    elif side.kind == "onnxruntime":
        yield _OnnxRuntime(model, threads)
    else:
        with _partitioned(side, case, model, threads) as runner:
            yield runner


class _Eager:
    """The torch module as a user would call it."""

    def __init__(self, case: Case, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._torch = torch
        self._network = case.network.build()

    def run(self, volume: NDArray[np.float32]) -> NDArray[np.float32]:
        with self._torch.inference_mode():
            return self._network(self._torch.from_numpy(volume)).numpy()

    def forecast(self) -> None:
        return None

    def counted(self) -> None:
        return None


class _OnnxRuntime:
    """The exported file in onnxruntime with its default optimisations."""

    def __init__(self, model: Path, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])

    def run(self, volume: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.asarray(self._session.run([OUTPUT_NAME], {INPUT_NAME: volume})[0])

    def forecast(self) -> None:
        return None

    def counted(self) -> None:
        return None


class _Partitioned:
    """The exported file through the toolkit, in a session that stays open."""

    def __init__(self, plan: pt.Plan, session: pt.Session, backend: Backend) -> None:
        self._session = session
        totals = plan.to_dict()["totals"]
        peak = totals["peak_bytes_lockstep" if backend == "lockstep" else "peak_bytes_max"]
        self._forecast = Traffic(totals["sent_bytes"], totals["messages"], peak)

    def run(self, volume: NDArray[np.float32]) -> NDArray[np.float32]:
        return self._session.run({INPUT_NAME: volume})[OUTPUT_NAME]

    def forecast(self) -> Traffic:
        return self._forecast

    def counted(self) -> Traffic:
        report = self._session.last_run
        assert report is not None
        sent = sum(rank.sent_bytes for rank in report.ranks)
        return Traffic(sent, sum(rank.messages for rank in report.ranks), report.peak_bytes)


@contextmanager
def _partitioned(side: Side, case: Case, model: Path, threads: int) -> Generator[Runner]:
    import partitioner as pt

    plan = pt.partition(model, mesh=side.mesh, shapes={INPUT_NAME: case.shape})
    with plan.session(backend=side.backend, threads=max(1, threads // side.processes)) as session:
        yield _Partitioned(plan, session, side.backend)
