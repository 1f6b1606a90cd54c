"""One rank of a distributed run: its program over files, however the process was started."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import onnx_ir as ir
import torch

from partitioner import dialect
from partitioner.errors import ExecutionError, PartitionError
from partitioner.geometry import Box
from partitioner.lifetime import find_lifetimes
from runtime.claim import claimed
from runtime.executor import Executor, Progress, make_shards
from runtime.feeds import ArrayDrain, FileDrain, host_type, map_part
from runtime.group import Place, SharedFeed, agree, broadcast, gather
from runtime.memory import storage_on
from runtime.monitor import PeakMemory
from runtime.overlap import AheadSource, BehindWriter, boxes_read
from runtime.program import Program, localise
from runtime.saves import Saver, Saving, Ties
from runtime.transports import Transport
from runtime.volumes import PartFile, Source, Writer, open_part, open_source

Result = TypeVar("Result")
Sources = dict[str, Source | None]
Writers = dict[str, tuple[Writer, str | None]]


@dataclass(frozen=True)
class FileRef:
    """An array in a file: the member's name where a file holds several."""

    path: str
    member: str | None = None


@dataclass(frozen=True)
class RunFiles:
    """The files of one run.

    Args:
        inputs: per input of the model.
        streamed: inputs whose file can only be read from its start to its end.
        outputs: per output, the prepared part file (as JSON) and the array's name in it.
        folder: a folder of this host for this run only, where its arrays lie, if there is one.
        saving: how the run is saved and where it goes on, if it is.
    """

    inputs: Mapping[str, FileRef]
    streamed: frozenset[str]
    outputs: Mapping[str, tuple[str, str | None]]
    folder: str | None = None
    saving: Saving | None = None

    @property
    def first(self) -> int:
        """The step to begin with."""
        return 0 if self.saving is None else self.saving.step

    @property
    def mapped(self) -> dict[str, torch.Tensor]:
        """The outputs as memory: processes of one host write there what would be many ranges of bytes of a file."""
        return {name: map_part(PartFile.from_json(part)) for name, (part, _) in self.outputs.items()}

    def remove(self) -> None:
        """Remove what a failed run leaves behind, unless it can be gone on with; harmless when it is gone."""
        if self.saving is not None and self.saving.is_saved:
            return
        for part, _ in self.outputs.values():
            PartFile.from_json(part).remove()
        for folder in (self.folder, None if self.saving is None else self.saving.folder):
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class RankReport:
    """What one rank measured in one run.

    Args:
        sent_bytes, messages: payload counted at the transport.
        peak_bytes: most memory above what was in use before the run.
        seconds: wall time of the steps.
        not_finite: per input file, cells of this rank's part that are NaN or infinite; those of a part that several
            ranks hold are counted by the first.
    """

    rank: int
    sent_bytes: int
    messages: int
    peak_bytes: int
    seconds: float
    not_finite: Mapping[str, int] = field(default_factory=dict[str, int])


class RankRunner:
    """Keeps one rank's weights and program from run to run."""

    def __init__(self, model: ir.Model, place: Place, device: torch.device, transport: Transport) -> None:
        self.place = place
        self.device = device
        self._model = model
        self._transport = transport
        self._programs: dict[frozenset[str], Program] = {}
        self._executor = Executor(make_shards([self._localise(frozenset())], [device]), self._transport)
        self._dtypes = {str(v.name): v.dtype for v in model.graph.inputs}
        mesh = dialect.get_mesh(model)
        self._boxes: dict[str, Sequence[Box]] = {
            str(v.name): [dialect.get_layout(v).box(mesh.coordinates(r)) for r in mesh] for v in model.graph.inputs}
        self._counted = frozenset(n for n, boxes in self._boxes.items() if boxes.index(boxes[place.rank]) == place.rank)

    def _localise(self, streamed: frozenset[str]) -> Program:
        """The program for files of which some can only be read at once, made once."""
        if streamed not in self._programs:
            storage = storage_on(self.device, dialect.get_storage(self._model))
            lifetimes = find_lifetimes(self._model)
            self._programs[streamed] = localise(self._model, self.place.rank, lifetimes, storage, streamed)
        return self._programs[streamed]

    def run(self, files: RunFiles, progress: Progress | None = None) -> RankReport:
        """Run once over files.

        Raises:
            PartitionError: on every rank, when any rank cannot open its files.
            ExecutionError: when a peer is gone or a disk is full.
        """
        with contextlib.ExitStack() as stack:
            sources, writers = self._open(files, stack)
            boxes = {name: self._boxes[name] for name in files.streamed}
            if dialect.get_schedule(self._model) is not None:
                (shard,) = self._executor.shards
                shard.program = self._localise(files.streamed)
                self._overlap(sources, writers, stack, shard.program, files.first)
            before = dict(self._transport.traffic.sent), dict(self._transport.traffic.messages)
            start = time.perf_counter()
            with PeakMemory(self.device, self._executor.kept) as memory:
                feed = SharedFeed(sources, boxes, self._counted)
                if files.saving is None:
                    drain = FileDrain(writers) if files.folder is None else ArrayDrain(files.mapped)
                    self._executor.run(feed, drain, progress, watch=memory.sample)
                else:
                    self._run_saved(files.saving, feed, FileDrain(writers), progress, memory)
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
            seconds = time.perf_counter() - start
        rank, traffic = self.place.rank, self._transport.traffic
        return RankReport(rank, traffic.sent.get(rank, 0) - before[0].get(rank, 0),
                          traffic.messages.get(rank, 0) - before[1].get(rank, 0), memory.rise, seconds,
                          feed.tally.cells)

    def _run_saved(self, saving: Saving, feed: SharedFeed, drain: FileDrain, progress: Progress | None,
                   memory: PeakMemory) -> None:
        """Go on from where the run was saved, and save it on the way together with the other ranks."""
        ties = Ties(self.place.size, broadcast, gather)
        with claimed(saving.folder):
            saver = Saver(saving, self._executor.shards, feed.tally, drain.settle, self.place.rank, ties)
            self._executor.run(feed, drain, progress, saver.restore(), saver.after, memory.sample)

    def _overlap(self, sources: Sources, writers: Writers, stack: contextlib.ExitStack, program: Program,
                 first: int) -> None:
        """Read the next slab, and write the last one, while this one is computed."""
        for name, source in sources.items():
            if source is not None and source.random_access:
                ahead = AheadSource(source, boxes_read([program], name, first))
                sources[name] = stack.enter_context(ahead)  # pyright: ignore[reportArgumentType]
        for name, (writer, member) in writers.items():
            behind = stack.enter_context(BehindWriter(writer))
            writers[name] = (behind, member)  # pyright: ignore[reportArgumentType]

    def _open(self, files: RunFiles, stack: contextlib.ExitStack) -> tuple[Sources, Writers]:
        """Open everything, or tell all ranks that it cannot be; files that the launcher has made are there."""
        problem: str | None = None
        sources: Sources = {}
        writers: Writers = {}
        try:
            for name, ref in files.inputs.items():
                mine = name not in files.streamed or self.place.rank == 0
                sources[name] = stack.enter_context(self._source(name, ref)) if mine else None
            for name, (part, member) in files.outputs.items() if files.folder is None else ():
                writers[name] = (stack.enter_context(open_part(PartFile.from_json(part))), member)
        except PartitionError as error:
            if files.folder is not None:
                raise
            problem = str(error)
        if files.folder is None:
            agree(problem)
        return sources, writers

    def _source(self, name: str, ref: FileRef) -> Source:
        dtype = self._dtypes[name]
        assert dtype is not None
        return open_source(ref.path, ref.member, host_type(dtype))


def guarded(work: Callable[[], Result], who: str = "") -> Result:
    """Run, turning the errors of torch and of the system into one line that begins with `who`.

    Raises:
        ExecutionError: instead of out-of-memory and system errors.
    """
    try:
        return work()
    except torch.OutOfMemoryError as error:
        line = str(error).splitlines()[0]
        raise ExecutionError(f"{who}out of device memory ({line[:160]}); use more shards") from None
    except MemoryError:
        raise ExecutionError(f"{who}out of memory; use more shards or another host") from None
    except OSError as error:
        raise ExecutionError(f"{who}{error.strerror or error}") from None
    except RuntimeError as error:  # torch has no type of its own for this one
        if "allocate memory" not in str(error):
            raise
        raise ExecutionError(f"{who}out of memory; use more shards or another host") from None
