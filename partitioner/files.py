"""Running a plan from files to files: alone, with processes of our own, or as one rank of many."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from partitioner import dialect
from partitioner.api import Backend, Plan, Progress
from partitioner.errors import AgreedError, PartitionError, refuse_all

if TYPE_CHECKING:
    from runtime.group import Place
    from runtime.rank import RankReport, RunFiles
    from runtime.resume import SavedRun
    from runtime.saves import Saving
    from runtime.session import Runner, RunReport
    from runtime.volumes import Sink, Source

Assignments = Sequence[tuple[str | None, str]]
"""(name or None, path) as the user wrote `[NAME=]FILE`."""


def name_files(given: Assignments, names: Sequence[str], what: str) -> dict[str, str]:
    """The file of every input or output; a lone file needs no name, and a .npz, .h5 or .zarr may hold all.

    Raises:
        PartitionError: for an unknown or missing name.
    """
    found: dict[str, str] = {}
    problems: list[str] = []
    for name, path in sorted(given, key=lambda pair: pair[0] is None):  # those with a name first
        free = [n for n in names if n not in found]
        if name is not None and name not in names:
            problems.append(f"{what} '{name}' is unknown; the model has {', '.join(names)}")
        elif not path:
            problems.append(f"--{what} '{name or ''}' names no file; write --{what} {name or names[0]}=FILE")
        elif name in found or not free:
            twice = name or names[0]
            problems.append(f"{what} '{twice}' is given twice, as {found[twice]} and {path}; give one file")
        elif name is not None:
            found[name] = path
        elif len(names) == 1 or path.lower().endswith((".npz", ".h5", ".hdf5", ".zarr")):
            found |= dict.fromkeys(free, path)
        else:
            problems.append(f"{what} file {path}: the model has {len(names)} {what}s ({', '.join(names)}); "
                            f"write NAME={path}")
    refuse_all(problems)
    refuse_all([f"{what} '{n}' has no file; add --{what} {n}=FILE" for n in names if n not in found])
    first: dict[str, str] = {}
    return {name: first.setdefault(os.path.realpath(path), path) for name, path in found.items()}  # one spelling each


def split_paths(text: str) -> list[str]:
    """`a.nii.gz,b.nii.gz` as paths; a file whose name has a comma stays one."""
    return [text] if "," not in text or os.path.exists(text) else text.split(",")


def channels_of(paths: Sequence[str], name: str, axis: int) -> tuple[int, ...]:
    """Channels of the files that fill an input together.

    Raises:
        PartitionError: when a file cannot be read, or they have different extents.
    """
    from runtime.volumes import open_source

    shapes: list[tuple[int, ...]] = []
    for path in paths:
        if not path:
            raise PartitionError(f"input '{name}': names no file in {','.join(paths)}; write A,B,...")
        with open_source(path) as source:
            shapes.append(tuple(source.shape))
    plain = [tuple(n for a, n in enumerate(shape) if a != axis) for shape in shapes]
    refuse_all([
        f"{path}: has extents {'x'.join(map(str, shape))}, {paths[0]} has {'x'.join(map(str, shapes[0]))}; all files "
        f"of input '{name}' must have the same"
        for path, shape, rest in zip(paths, shapes, plain, strict=True) if rest != plain[0]])
    return tuple(shape[axis] if axis < len(shape) else 1 for shape in shapes)


def check_targets(inputs: Mapping[str, str], outputs: Mapping[str, str], overwrite: bool) -> None:
    """Keep what is there: no output is an input's file, and none exists unless it may be replaced.

    Raises:
        PartitionError: otherwise.
    """
    sources = [path for path in map(file_of, inputs.values()) if os.path.exists(path)]
    problems: list[str] = []
    for given in dict.fromkeys(outputs.values()):
        path = file_of(given)
        if not os.path.exists(path):
            continue
        same = next((source for source in sources if os.path.samefile(source, path)), None)
        if same is not None:
            problems.append(f"{given}: is the input {same} as well; name another output")
        elif not overwrite and (os.path.isfile(path) or os.path.splitext(path)[1].lower() == ".zarr"):
            problems.append(f"{given}: exists; add --overwrite to replace it, or name another output")
    refuse_all(problems)


def file_of(path: str) -> str:
    """The file of `scan.h5:/labels`; other paths as they are."""
    file, inside, _ = path.partition(":/")
    return file if inside and "://" not in path and not os.path.exists(path) else path


def open_inputs(files: Mapping[str, str], dtypes: Mapping[str, ir.DataType]) -> dict[str, Source]:
    """Open the file of every input, its values delivered in the input's type.

    Raises:
        PartitionError: when a file is missing, damaged, or of a type that would lose values.
    """
    from runtime.feeds import host_type
    from runtime.volumes import array_names, open_source

    found: dict[str, Source] = {}
    for name, path in files.items():
        members = array_names(path)
        member = name if name in members else None
        if len(members) > 1 and member is None:
            raise PartitionError(f"{path}: holds {', '.join(members)}, none of them '{name}'; rename one")
        others = [n for n, p in files.items() if p == path and n != name]
        if others and members and member is None:
            raise PartitionError(f"{path}: has no array '{name}', and is given for {', '.join(others)} too; "
                                 f"write {name}=FILE")
        found[name] = open_source(path, member, host_type(dtypes[name]))
    return found


def is_first_rank() -> bool:
    """Whether nobody started us as one of several ranks, or as the first of them."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def report_notices(sources: Iterable[Source]) -> None:
    """Say on the standard error, once for all ranks, what a user should know of the files."""
    if is_first_rank():
        for line in dict.fromkeys(line for source in sources for line in source.notices):
            sys.stderr.write(f"partition: note: {line}\n")


def check_sources(plan: Plan, sources: Mapping[str, Source]) -> None:
    """Hold the files' extents against the plan's.

    Raises:
        PartitionError: when they differ.
    """
    refuse_all([
        f"{sources[name].path}: has extents {'x'.join(map(str, sources[name].shape))}, input '{name}' of the plan "
        f"takes {'x'.join(map(str, shape))}; give a file of these extents or partition the model again"
        for name, shape in plan.input_shapes.items() if tuple(sources[name].shape) != shape])


def make_sinks(plan: Plan, files: Mapping[str, str], like: Source | None) -> tuple[dict[str, Sink], dict[str, Any]]:
    """A sink per output file, and per output its part and its array's name.

    Raises:
        PartitionError: when a format cannot hold an output or a folder cannot be written.
    """
    from runtime.volumes import ArraySpec, create_sink

    values = {str(v.name): v for v in plan.model.graph.outputs}
    sinks: dict[str, Sink] = {}
    places: dict[str, Any] = {}
    for path in dict.fromkeys(files.values()):
        names = [n for n, p in files.items() if p == path]
        sinks[path] = create_sink(path, [ArraySpec(n, dialect.shape_of(values[n]), _numpy_type(values[n]),
                                                   _largest_part(plan, values[n])) for n in names], like)
        twice = next((p for p, s in sinks.items() if p != path and _same_file(s, sinks[path])), None)
        if twice is not None:  # arrays of one HDF5 file
            raise PartitionError(f"{path}: is in the same file as {twice}, and each would replace the other; give all "
                                 f"outputs the one file {sinks[path].part.target}, or each a file of its own")
        several = len(names) > 1
        places |= {n: (sinks[path].part.to_json(), n if several else None) for n in names}
    return sinks, places


def _largest_part(plan: Plan, value: ir.Value) -> tuple[int, ...]:
    """Per axis the extent of the largest part that a rank writes."""
    layout = dialect.get_layout(value)
    boxes = [layout.box(plan.mesh.coordinates(rank)).intervals() for rank in plan.mesh]
    return tuple(max(map(len, intervals)) for intervals in zip(*boxes, strict=True))


def _same_file(one: Sink, other: Sink) -> bool:
    return os.path.realpath(one.part.target) == os.path.realpath(other.part.target)


def _numpy_type(value: ir.Value) -> Any:
    assert value.dtype is not None
    return "bfloat16" if value.dtype == ir.DataType.BFLOAT16 else value.dtype.numpy()


@dataclass(frozen=True)
class FileRun:
    """A run from files to files.

    Args:
        inputs, outputs: file per input and per output.
        backend: lockstep, gloo, nccl or shm.
        device: cpu, cuda, or a list.
    """

    plan: Plan
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    backend: Backend
    device: str
    saved: SavedRun | None = None

    def run(self, progress: Progress | None = None, shared: Runner | None = None) -> RunReport:
        """Start what is needed, run, and put every output in its place when all of it is there.

        Args:
            shared: a runner of this plan, which stays open.

        Raises:
            PartitionError: for files that do not fit; nothing is written then.
            ExecutionError: when a rank dies or a disk fills up; nothing is left behind then.
        """
        from runtime.rank import RunFiles
        from runtime.session import make_runner

        with contextlib.ExitStack() as stack:
            sources, refs = self._sources(stack)
            sinks, places = self._sinks(sources)
            runner = make_runner(self.plan.model, self.backend, self.device) if shared is None else shared
            if shared is None:
                stack.callback(runner.close)
            with self._prepared(sinks):
                runner.run_files(RunFiles(refs, streamed(sources), places, saving=self._saving), progress)
            assert runner.report is not None
            return runner.report

    @property
    def _saving(self) -> Saving | None:
        return None if self.saved is None else self.saved.saving

    def _sinks(self, sources: Mapping[str, Source]) -> tuple[dict[str, Sink], dict[str, Any]]:
        """See `make_sinks`; a run that goes on has its unfinished files."""
        sinks, places = make_sinks(self.plan, self.outputs, _spatial(sources))
        if self.saved is None or not self.saved.goes_on:
            return sinks, places
        for path, part in self.saved.parts.items():
            sinks[path].part = type(sinks[path].part).from_json(part)
        return sinks, {name: (_part_of(sinks, part), member) for name, (part, member) in places.items()}

    def _prepared(self, sinks: Mapping[str, Sink]) -> contextlib.AbstractContextManager[None]:
        from runtime.unfinished import kept, prepared

        return prepared(sinks.values()) if self.saved is None else kept(self.saved, sinks, self.plan.save)

    def join(self, place: Place, progress: Progress | None = None) -> RunReport | None:
        """Run as one rank of a group that has been joined; rank 0 returns the figures.

        All checks are agreed upon, so that no rank waits for one that has given up.

        Raises:
            PartitionError, ExecutionError: as `run`, on every rank.
        """
        from runtime import group
        from runtime.rank import RunFiles
        from runtime.unfinished import removed

        problem: str | None = None
        refs, streams, sinks, places = {}, frozenset[str](), {}, {}
        with contextlib.ExitStack() as stack:
            try:
                self._check_place(place)
                sources, refs = self._sources(stack)
                streams = streamed(sources)
                if place.rank == 0:
                    sinks, places = self._sinks(sources)
            except PartitionError as error:
                problem = str(error)
            group.agree(problem)
            self._compare_plans()
            places, saving = group.broadcast((places, self._saving))
            files = RunFiles(refs, streams, places, saving=saving)
            with removed(files):  # by then all know what rank 0 is about to make
                try:
                    if place.rank == 0:
                        stack.enter_context(self._prepared(sinks))
                except PartitionError as error:
                    problem = str(error)
                group.agree(problem)
                reports = self._run_rank(place, files, progress)
        return _summary(reports) if place.rank == 0 else None

    def _run_rank(self, place: Place, files: RunFiles, progress: Progress | None) -> list[RankReport]:
        """This rank's part; every rank's figures, when all have written theirs."""
        from runtime import group
        from runtime.rank import RankRunner, guarded
        from runtime.transports.catalog import make_transport

        device = group.rank_device(self.device, place)
        who = f"rank {place.rank}: "
        transport = guarded(lambda: make_transport(self.backend, device), who)
        runner = guarded(lambda: RankRunner(self.plan.model, place, device, transport), who)
        return group.gather(guarded(lambda: runner.run(files, progress), who))

    def _check_place(self, place: Place) -> None:
        from runtime import group
        from runtime.session import refuse_strips

        refuse_strips(self.plan.model)
        size = self.plan.mesh.size
        if place.size != size:
            raise PartitionError(f"the mesh {self.plan.mesh} has {size} ranks but {place.size} processes "
                                 "were started; make them equal")
        device = group.rank_device(self.device, place)
        if device.type == "cuda":
            import torch

            torch.cuda.set_device(device)

    def _compare_plans(self) -> None:
        from partitioner import seal
        from runtime import group

        digests = group.gather(seal.digest(self.plan.model))
        other = next((rank for rank, found in enumerate(digests) if found != digests[0]), None)
        if other is not None:
            raise AgreedError(f"rank {other} has another model than rank 0; give all hosts the same file")

    def _sources(self, stack: contextlib.ExitStack) -> tuple[dict[str, Source], dict[str, Any]]:
        from runtime.rank import FileRef
        from runtime.volumes import absolute_place, array_names

        dtypes = {str(v.name): v.dtype for v in self.plan.model.graph.inputs if v.dtype is not None}
        sources = open_inputs(self.inputs, dtypes)
        for source in sources.values():
            stack.enter_context(source)
        check_sources(self.plan, sources)
        refs = {n: FileRef(absolute_place(p), n if n in array_names(p) else None) for n, p in self.inputs.items()}
        return sources, refs


def _part_of(sinks: Mapping[str, Sink], part: str) -> str:
    """The unfinished file of the same output as another that was planned for it."""
    from runtime.volumes import PartFile

    target = PartFile.from_json(part).target
    return next(s.part.to_json() for s in sinks.values() if s.part.target == target)


def _summary(reports: list[RankReport]) -> RunReport:
    from runtime.session import RunReport

    return RunReport(tuple(reports), max(r.seconds for r in reports), max(r.peak_bytes for r in reports))


def streamed(sources: Mapping[str, Source]) -> frozenset[str]:
    """Inputs whose file must be read from its start to its end."""
    return frozenset(name for name, source in sources.items() if not source.random_access)


def _spatial(sources: Mapping[str, Source]) -> Source | None:
    """The source whose place in the world goes over to the outputs, the first where none has one."""
    known = tuple(sources.values())
    return next(iter((*(s for s in known if s.meta is not None), *known)), None)
