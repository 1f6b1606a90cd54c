"""Sessions: a plan made ready to run, in this process or in one process per rank."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
import torch

from partitioner import dialect
from partitioner.errors import ExecutionError, PartitionError, refuse_all
from partitioner.geometry import Box
from partitioner.lifetime import find_lifetimes
from partitioner.ops.dtypes import torch_dtype
from partitioner.ops.nodes import operator_of
from partitioner.ops.plugins import reaches_other_processes
from partitioner.profile import Link
from runtime.claim import claimed
from runtime.executor import Executor, Progress, make_shards
from runtime.feeds import (
    ArrayDrain,
    ArrayFeed,
    Drain,
    Feed,
    FileDrain,
    FileFeed,
    as_tensor,
    host_type,
    map_part,
    to_numpy,
)
from runtime.group import check_backend, check_device
from runtime.launcher import RankPool
from runtime.memory import storage_on
from runtime.monitor import PeakMemory
from runtime.overlap import AheadSource, BehindWriter, boxes_read
from runtime.program import localise
from runtime.rank import FileRef, RankReport, RunFiles, guarded
from runtime.saves import Saver, Saving
from runtime.transports.lockstep import Lockstep
from runtime.volumes import ArraySpec, PartFile, Source, create_sink, open_part, open_source
from runtime.volumes.spool import spooled

_SHARED = "/dev/shm"
"""Where files are memory, on Linux."""


@dataclass(frozen=True)
class RunReport:
    """What a run measured.

    Args:
        ranks: per rank.
        seconds: wall time, loading and storing included.
        peak_bytes: for lock-step the peak of the whole process; else the largest rank's.
    """

    ranks: tuple[RankReport, ...]
    seconds: float
    peak_bytes: int

    @property
    def not_finite(self) -> dict[str, int]:
        """Per input file that has any, how many of its cells are NaN or infinite."""
        names = dict.fromkeys(name for rank in self.ranks for name in rank.not_finite)
        found = {name: sum(rank.not_finite.get(name, 0) for rank in self.ranks) for name in names}
        return {name: count for name, count in found.items() if count}


class Runner(Protocol):
    """Runs one plan on arrays or on files."""

    def run_arrays(self, arrays: Mapping[str, Any], progress: Progress | None = None,
                   out: Mapping[str, Any] | None = None) -> dict[str, torch.Tensor]:
        """Whole inputs to whole outputs, in host memory: that of `out` where it has an array of the name."""
        ...

    def run_files(self, files: RunFiles, progress: Progress | None = None) -> None:
        """From files into prepared part files."""
        ...

    @property
    def report(self) -> RunReport | None:
        """Figures of the last run."""
        ...

    def switch(self, model: ir.Model) -> Runner:
        """A runner of the same kind for another plan on the same mesh; this one is used up."""
        ...

    def close(self) -> None:
        """Give back processes and memory."""
        ...


class LockstepRunner:
    """All ranks in this process, on the given devices in turn.

    Args:
        poison: fill new buffers with NaN, so that a cell that nobody wrote is seen.
        threads: CPU threads while it runs; torch's own number when not given.
    """

    def __init__(self, model: ir.Model, device: str = "cpu", poison: bool = False, threads: int | None = None) -> None:
        mesh, lifetimes = dialect.get_mesh(model), find_lifetimes(model)
        devices = [check_device(name) for name in device.split(",")]
        storage = storage_on(devices[0], dialect.get_storage(model))
        programs = [localise(model, rank, lifetimes, storage) for rank in mesh]
        self._model = model
        self._options = (device, poison, threads)
        self._devices = [devices[rank % len(devices)] for rank in mesh]
        self.transport = Lockstep(mesh.size)
        shards = guarded(lambda: make_shards(programs, self._devices, poison))
        self._executor = Executor(shards, self.transport)
        self.report: RunReport | None = None

    def run_arrays(self, arrays: Mapping[str, Any], progress: Progress | None = None,
                   out: Mapping[str, Any] | None = None) -> dict[str, torch.Tensor]:
        """See `Runner`."""
        given, results = out or {}, dict[str, torch.Tensor]()
        for name, value in ((str(v.name), v) for v in self._model.graph.outputs):
            assert value.dtype is not None
            results[name] = as_tensor(given[name]) if name in given else torch.empty(
                dialect.shape_of(value), dtype=torch_dtype(value.dtype))
        self._run(ArrayFeed(arrays), ArrayDrain(results), progress)
        return results

    def run_files(self, files: RunFiles, progress: Progress | None = None) -> None:
        """See `Runner`."""
        with contextlib.ExitStack() as stack:
            sources = {}
            for value in self._model.graph.inputs:
                ref = files.inputs[str(value.name)]
                assert value.dtype is not None
                source = stack.enter_context(open_source(ref.path, ref.member, host_type(value.dtype)))
                sources[str(value.name)] = self._ready(source, str(value.name), files.first, stack)
            writers: dict[str, Any] = {}
            for name, (part, member) in files.outputs.items():
                writer = stack.enter_context(open_part(PartFile.from_json(part)))
                writers[name] = (stack.enter_context(BehindWriter(writer)) if self._slabs else writer, member)
            self._run(FileFeed(sources, counted=self._counted()), FileDrain(writers), progress, files.saving)

    def _counted(self) -> dict[str, list[Box]]:
        """Of inputs whose shards overlap, the cells that each rank has alone or first."""
        mesh = dialect.get_mesh(self._model)
        layouts = {str(v.name): dialect.get_layout(v) for v in self._model.graph.inputs}
        return {name: [layout.each_once().box(mesh.coordinates(rank)) for rank in mesh]
                for name, layout in layouts.items() if not layout.is_partition}

    @property
    def _slabs(self) -> bool:
        return dialect.get_schedule(self._model) is not None

    def _ready(self, source: Source, name: str, first: int, stack: contextlib.ExitStack) -> Any:
        """A source that is read slab by slab: a copy of what can only be read at once, the next slab ahead."""
        if not self._slabs:
            return source
        if not source.random_access:
            source = stack.enter_context(spooled(source))
        programs = [shard.program for shard in self._executor.shards]
        return stack.enter_context(AheadSource(source, boxes_read(programs, name, first)))

    def _run(self, feed: Feed, drain: Drain, progress: Progress | None, saving: Saving | None = None) -> None:
        traffic = self.transport.traffic
        before = dict(traffic.sent), dict(traffic.messages)
        start = time.perf_counter()
        with PeakMemory(self._devices[0], self._executor.kept) as memory, cpu_threads(self._options[2]):
            try:
                guarded(lambda: self._execute(feed, drain, progress, saving, memory))
            finally:
                for shard in self._executor.shards:
                    shard.buffers.clear()
            for device in {d for d in self._devices if d.type == "cuda"}:
                torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
        ranks = tuple(
            RankReport(rank, traffic.sent.get(rank, 0) - before[0].get(rank, 0),
                       traffic.messages.get(rank, 0) - before[1].get(rank, 0), 0, seconds,
                       feed.tally.cells if rank == 0 and isinstance(feed, FileFeed) else {})
            for rank in self.transport.ranks)
        self.report = RunReport(ranks, seconds, memory.rise)

    def _execute(self, feed: Feed, drain: Drain, progress: Progress | None, saving: Saving | None,
                 memory: PeakMemory) -> None:
        if saving is None or not isinstance(feed, FileFeed) or not isinstance(drain, FileDrain):
            self._executor.run(feed, drain, progress, watch=memory.sample)
            return
        with claimed(saving.folder):
            saver = Saver(saving, self._executor.shards, feed.tally, drain.settle)
            self._executor.run(feed, drain, progress, saver.restore(), saver.after, memory.sample)

    def switch(self, model: ir.Model) -> LockstepRunner:
        """See `Runner`."""
        self.close()
        return LockstepRunner(model, *self._options)

    def close(self) -> None:
        """See `Runner`."""
        self._executor = Executor((), self.transport)  # weights go, whoever holds the runner


def refuse_strips(model: ir.Model) -> None:
    """Make sure that a plan is for processes of their own.

    Raises:
        PartitionError: when one process takes all ranks, strip by strip.
    """
    schedule = dialect.get_schedule(model)
    if schedule is not None and schedule.strips:
        raise PartitionError(f"this plan goes through strips along {' and '.join(schedule.strips)} in one process; run "
                             "it with backend lockstep, or partition with a mesh for processes of their own")


def _check_operators(model: ir.Model) -> None:
    """Make sure that other processes know every operator of a plan.

    Raises:
        PartitionError: when a class is registered in this process only.
    """
    classes = {type(operator_of(node)): node for node in model.graph if not dialect.is_communication(node)}
    refuse_all([f"{node.name} ({node.op_type}): its class {cls.__name__} is registered in this process only "
                f"(module {cls.__module__}); put it in a file and name it: pt.load_operators('my_operators.py')"
                for cls, node in classes.items() if not reaches_other_processes(cls)])


class PoolRunner:
    """One process per rank on this host, over a slower network if a link is given."""

    def __init__(self, model: ir.Model, backend: str, device: str = "cpu", threads: int | None = None,
                 link: Link | None = None) -> None:
        self._model = model
        refuse_strips(model)
        size = dialect.get_mesh(model).size
        if device != "cpu":
            for name in device.split(","):
                check_device(name)
        check_backend(backend, device, size)
        _check_operators(model)
        self.pool = RankPool(size, backend, device, threads, link)
        self.report: RunReport | None = None
        try:
            self.pool.load(model)
        except BaseException:
            self.pool.kill()
            raise

    def run_arrays(self, arrays: Mapping[str, Any], progress: Progress | None = None,
                   out: Mapping[str, Any] | None = None) -> dict[str, torch.Tensor]:
        """See `Runner`; the arrays travel through files in shared memory where there is room."""
        with tempfile.TemporaryDirectory(prefix="partitioner-", dir=_roomy_folder(self._model)) as folder:
            files, parts = _lay_out(Path(folder), arrays, self._model)
            self.run_files(files, progress)
            return {name: _take(parts[name], v, (out or {}).get(name))
                    for name, v in ((str(v.name), v) for v in self._model.graph.outputs)}

    def run_files(self, files: RunFiles, progress: Progress | None = None) -> None:
        """See `Runner`."""
        start = time.perf_counter()
        reports = self.pool.run(files, progress)
        self.report = RunReport(tuple(reports), time.perf_counter() - start, max(r.peak_bytes for r in reports))

    def switch(self, model: ir.Model) -> PoolRunner:
        """See `Runner`; the processes stay."""
        self._model = model
        self.pool.load(model)
        return self

    def close(self) -> None:
        """See `Runner`."""
        self.pool.close()


def _lay_out(folder: Path, arrays: Mapping[str, Any], model: ir.Model) -> tuple[RunFiles, dict[str, PartFile]]:
    """Inputs as files in a folder, and room in it for the outputs.

    Raises:
        ExecutionError: when there is not enough room.
    """
    try:
        inputs = {name: FileRef(str(_put(folder / f"in{i}.npy", array)))
                  for i, (name, array) in enumerate(arrays.items())}
        sinks = {str(v.name): create_sink(folder / f"out{i}.npy", [_spec(v)])
                 for i, v in enumerate(model.graph.outputs)}
        for sink in sinks.values():
            sink.prepare()
    except (OSError, PartitionError) as error:
        raise ExecutionError(f"no room for the arrays between the processes ({error}); "
                             "set TMPDIR to a folder with room") from None
    outputs = {name: (sink.part.to_json(), None) for name, sink in sinks.items()}
    return RunFiles(inputs, frozenset(), outputs, str(folder)), {name: sink.part for name, sink in sinks.items()}


@contextlib.contextmanager
def cpu_threads(count: int | None) -> Generator[None]:
    """Let torch use a number of CPU threads in a block (None: as many as it does)."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if count is not None:
            torch.set_num_threads(before)


def _spec(value: ir.Value) -> ArraySpec:
    assert value.dtype is not None
    name = "bfloat16" if value.dtype == ir.DataType.BFLOAT16 else value.dtype.numpy()
    return ArraySpec(str(value.name), dialect.shape_of(value), name)


def _put(path: Path, array: Any) -> Path:
    found = to_numpy(array) if isinstance(array, torch.Tensor) else np.asarray(array)
    np.save(path, found.astype(np.float32) if found.dtype.name == "bfloat16" else found)
    return path


def _take(part: PartFile, value: ir.Value, out: Any = None) -> torch.Tensor:
    """A result that the ranks have written, in memory that is given, or in that of the file: the file's name goes."""
    assert value.dtype is not None
    dtype, found = torch_dtype(value.dtype), map_part(part)
    if out is not None:
        return as_tensor(out).copy_(found)
    return found.to(dtype) if str(part.temporary).startswith(_SHARED) else found.to(dtype, copy=True)


def _roomy_folder(model: ir.Model) -> str | None:
    """Shared memory when everything fits twice; the system's folder for temporary files otherwise."""
    import math
    import shutil

    shared = Path(_SHARED)
    if not shared.is_dir():
        return None
    sizes = [math.prod(dialect.shape_of(v)) * v.dtype.itemsize
             for v in (*model.graph.inputs, *model.graph.outputs) if v.dtype is not None]
    return str(shared) if shutil.disk_usage(shared).free > 2 * sum(sizes) else None


def make_runner(model: ir.Model, backend: str, device: str = "cpu", threads: int | None = None,
                link: Link | None = None) -> Runner:
    """A runner by the backend's name: lockstep, gloo, nccl or shm.

    Args:
        link: a slower network that gloo's messages are to travel over.

    Raises:
        PartitionError: when the backend sends nothing that could be slowed down.
    """
    if link is not None and backend != "gloo":
        raise PartitionError(f"link: a slower network is emulated for backend gloo, not {backend}; leave it out")
    if backend == "lockstep":
        return LockstepRunner(model, device, threads=threads)
    return PoolRunner(model, backend, device, threads, link)


