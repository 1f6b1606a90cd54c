"""The sides of a case behind one small protocol: open, run an array, ask for its traffic, close."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from benchmarks.errors import SideRefusal
from benchmarks.models import INPUT_NAME, OUTPUT_NAME
from benchmarks.runner import Runner, Traffic
from benchmarks.suite import Backend, Case, Device, Side

if TYPE_CHECKING:
    import partitioner as pt


@contextmanager
def opened(
    side: Side, case: Case, model: Path, threads: int, budget: int | None = None, device: Device = "cpu"
) -> Generator[Runner]:
    """The side's runner, using `threads` threads in all (each process its share).

    Raises:
        SideRefusal: when the budget (bytes) is too small, or a package is missing.
    """
    if case.task == "training":
        from benchmarks.peers_training import opened_training

        with opened_training(side, case, threads) as runner:
            yield runner
    elif side.kind in ("naive gloo", "careful gloo"):
        from benchmarks.peers_gloo import opened_gloo

        with opened_gloo(side, case, threads) as runner:
            yield runner
    elif device == "cuda":
        from benchmarks.peers_device import opened_on_device

        with opened_on_device(side, case, model, device) as runner:
            yield runner
    elif side.own:
        with _partitioned(side, case, model, threads, budget) as runner:
            yield runner
    else:
        yield _in_process(side, case, model, threads)


def _in_process(side: Side, case: Case, model: Path, threads: int) -> Runner:
    """A peer that computes the whole volume in this process."""
    if side.kind == "jax":
        from benchmarks.peers_jax import Jax

        return Jax(side, case, threads)
    if side.kind == "onnxruntime":
        return _OnnxRuntime(model, threads)
    if side.kind == "torch.compile":
        return _Compiled(case, threads)
    if side.kind == "torch channels last":
        return _ChannelsLast(case, threads)
    if side.kind == "sliding window":
        return _SlidingWindow(side, case, threads)
    return _Float64(case, threads) if side.kind == "float64" else _Eager(case, threads)


class _Eager(Runner):
    """The torch module as a user would call it."""

    def __init__(self, case: Case, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._torch = torch
        self._network = case.network.build()

    def run(self, volume: NDArray[np.float32]) -> NDArray[np.float32]:
        with self._torch.inference_mode():
            return self._network(self._torch.from_numpy(volume)).numpy()


class _ChannelsLast(_Eager):
    """The same with weights and activations in the memory format that oneDNN is fastest with."""

    def __init__(self, case: Case, threads: int) -> None:
        super().__init__(case, threads)
        three = self._torch.channels_last_3d if len(case.shape) == 5 else self._torch.channels_last
        self._format = three
        self._network = self._network.to(memory_format=three)  # pyright: ignore[reportCallIssue]

    def run(self, volume: NDArray[np.float32]) -> NDArray[np.float32]:
        with self._torch.inference_mode():
            laid_out = self._torch.from_numpy(volume).contiguous(memory_format=self._format)
            return self._network(laid_out).numpy()


class _Compiled(_Eager):
    """The module through torch.compile, compiled for the extents before the first run."""

    def __init__(self, case: Case, threads: int) -> None:
        super().__init__(case, threads)
        refuse_without_compiler()
        self._network = self._torch.compile(self._network, dynamic=False)
        self.run(np.zeros(case.shape, np.float32))


def refuse_without_compiler() -> None:
    """torch.compile writes C++ for the CPU.

    Raises:
        SideRefusal: where nothing can compile that.
    """
    from torch._inductor import exc
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        raise SideRefusal("torch.compile needs a C++ compiler; there is none, install g++") from None


class _SlidingWindow(_Eager):
    """The torch module on a window that MONAI slides over the volume, predictions blended by Gaussian weights."""

    def __init__(self, side: Side, case: Case, threads: int) -> None:
        try:
            from monai.inferers.inferer import SlidingWindowInferer
        except ImportError:
            raise SideRefusal("MONAI is not installed; pip install monai") from None
        super().__init__(case, threads)
        assert side.window is not None
        extents = (side.window.extent,) * (len(case.shape) - 2)
        self._inferer = SlidingWindowInferer(extents, overlap=side.window.overlap, mode="gaussian")

    def run(self, volume: NDArray[np.float32]) -> NDArray[np.float32]:
        with self._torch.inference_mode():
            return np.asarray(self._inferer(self._torch.from_numpy(volume), self._network))


class _Float64(Runner):
    """The torch module in float64, what errors are against."""

    def __init__(self, case: Case, threads: int) -> None:
        import torch

        from benchmarks.float64 import in_float64

        torch.set_num_threads(threads)
        self._torch = torch
        self._network = in_float64(case.network.build())

    def run(self, volume: NDArray[np.float32]) -> NDArray[np.float32]:
        """In float64."""
        with self._torch.inference_mode():
            return self._network(self._torch.from_numpy(volume).double()).numpy()


class _OnnxRuntime(Runner):
    """The exported file in onnxruntime with its default optimisations."""

    def __init__(self, model: Path, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])

    def run(self, volume: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.asarray(self._session.run([OUTPUT_NAME], {INPUT_NAME: volume})[0])


class Partitioned(Runner):
    """The exported file through the toolkit, in a session that stays open."""

    def __init__(self, plan: pt.Plan, session: pt.Session, backend: Backend) -> None:
        self._session = session
        self._schedule = _schedule(plan)
        totals = plan.to_dict()["totals"]
        peak = totals["peak_bytes_lockstep" if backend == "lockstep" else "peak_bytes_max"]
        self._forecast = Traffic(totals["sent_bytes"], totals["messages"], peak)
        self._shape = next(tuple(map(int, v.shape or ())) for v in plan.model.graph.outputs if v.name == OUTPUT_NAME)
        self._room: dict[str, NDArray[np.float32]] = {}
        self._holds = backend == "lockstep"  # ranks write to memory that they share, which is handed out as it is

    def run(self, volume: NDArray[np.float32]) -> NDArray[np.float32]:
        return self._session.run({INPUT_NAME: volume}, out=self._room)[OUTPUT_NAME]

    def hold(self) -> None:
        if self._holds:
            self._room = {OUTPUT_NAME: np.full(self._shape, np.nan, np.float32)}

    def forecast(self) -> Traffic:
        return self._forecast

    def counted(self) -> Traffic:
        report = self._session.last_run
        assert report is not None
        sent, messages = ([getattr(r, name) for r in report.ranks] for name in ("sent_bytes", "messages"))
        return Traffic(sum(sent), sum(messages), report.peak_bytes, max(sent), max(messages))

    def schedule(self) -> str | None:
        return self._schedule


def _schedule(plan: pt.Plan) -> str | None:
    """The axis, the thickness of slabs in every chain, and how many tensors rest in files: `depth/32,16 2 in files`."""
    graph = plan.model.graph
    values = (*graph.inputs, *(value for node in graph for value in node.outputs))
    filed = sum(value.metadata_props.get("partitioner.rest") == "file" for value in values)
    found = plan.model.metadata_props.get("partitioner.schedule")
    return f"{found} {filed} in files" if found and filed else found


@contextmanager
def _partitioned(side: Side, case: Case, model: Path, threads: int, budget: int | None) -> Generator[Runner]:
    import partitioner as pt

    try:
        plan = pt.partition(model, mesh=side.mesh, shapes={INPUT_NAME: case.shape}, memory=budget, slabs=side.slabs)
    except pt.PartitionError as error:
        if budget is None:
            raise
        raise SideRefusal(str(error)) from None
    with plan.session(backend=side.backend, threads=max(1, threads // side.processes)) as session:
        yield Partitioned(plan, session, side.backend)
