"""From the options of the command to plans, files and runs."""

from __future__ import annotations

import argparse
import os
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from partitioner import dialect
from partitioner.api import Backend, Plan, Progress
from partitioner.axes import axis_extents, named_axes
from partitioner.compiler import Steering
from partitioner.compose import Wrapping, compose, equal_counts, input_channel_axis, part_names
from partitioner.damage import check_plan
from partitioner.errors import PartitionError
from partitioner.files import (
    FileRun,
    channels_of,
    check_sources,
    check_targets,
    file_of,
    is_first_rank,
    name_files,
    open_inputs,
    report_notices,
    split_paths,
)
from partitioner.loader import load_file
from partitioner.mesh import AXIS_NAMES, Mesh
from partitioner.planning import Devices, Request, devices_of, pinned_axes
from partitioner.sessions import KEPT_PLANS
from partitioner.shapes import spatial_rank

if TYPE_CHECKING:
    from partitioner.budget import Budget
    from runtime.resume import SavedRun

WORDS = ("preprocess", "channels", "tta", "ensemble", "output_op")
"""The options that put something around the network."""


def given_shapes(options: argparse.Namespace, asked: Asked) -> dict[str, tuple[int, ...]]:
    """Extents per input, as `--shape` gives them."""
    names = [*(n for n in asked.channels), *(n for n in asked.names if n.rpartition("/")[0] not in asked.channels)]
    found: dict[str, tuple[int, ...]] = {}
    for text in options.shape:
        name, _, extents = text.rpartition("=")
        if not name and len(names) != 1:
            raise PartitionError(f"--shape {text}: the model has {len(names)} inputs ({', '.join(names)}); "
                                 f"write NAME={text}")
        if (name or names[0]) in found:
            raise PartitionError(f"--shape {text}: the shape of input '{name or names[0]}' is given twice; give one")
        try:
            found[name or names[0]] = tuple(int(n) for n in extents.lower().split("x"))
        except ValueError:
            raise PartitionError(f"--shape {text}: extents are integers joined by x, as 1x1x64x64x64") from None
    return dict(_of_parts(found, asked))


def _of_parts(shapes: Mapping[str, tuple[int, ...]], asked: Asked) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Extents per input; those of an input that several files fill become those of each."""
    for name, shape in shapes.items():
        counts = asked.channels.get(name)
        if counts is None:
            yield name, shape
            continue
        axis = input_channel_axis(asked.model, part_names(name, 1)[0])
        for part, count in zip(part_names(name, len(counts)), counts, strict=True):
            yield part, tuple(count if a == axis else n for a, n in enumerate(shape))


def _cuts(options: argparse.Namespace, extents: dict[str, int]) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for text in options.cuts:
        name, _, positions = text.partition("=")
        try:
            inner = tuple(int(p) for p in positions.split(",") if p)
        except ValueError:
            raise PartitionError(f"--cuts {text}: positions are integers joined by commas, as depth=50,80") from None
        if name not in extents:
            raise PartitionError(f"--cuts {text}: the volume has no axis '{name}'; use {', '.join(extents)}")
        if name in found:
            raise PartitionError(f"--cuts {text}: the cuts of {name} are given twice; give all in one, as depth=50,80")
        found[name] = (0, *inner, extents[name])
    return found


@dataclass(frozen=True)
class Asked:
    """The model that the options ask for, with all that is put around it, or a plan, before it is compiled.

    Args:
        channels: per input that several files fill, the channels of each.
    """

    model: ir.Model
    channels: Mapping[str, Sequence[int]]

    @property
    def names(self) -> list[str]:
        """The inputs."""
        return [str(v.name) for v in self.model.graph.inputs if v.name not in self.model.graph.initializers]

    @property
    def output_names(self) -> list[str]:
        """The outputs."""
        return [str(v.name) for v in self.model.graph.outputs]

    @property
    def dtypes(self) -> dict[str, ir.DataType]:
        """Element types of the inputs."""
        return {str(v.name): v.dtype for v in self.model.graph.inputs if v.dtype is not None}


def asked_model(options: argparse.Namespace, base: ir.Model | None = None,
                channels: Mapping[str, Sequence[int]] | None = None) -> Asked:
    """Read the model and put around it what the options say.

    Args:
        base: the model where it has been read already.
        channels: channels of the files that fill an input together.

    Raises:
        PartitionError: for a file that is no model, and words that are not understood.
    """
    model = load_file(Path(options.model)) if base is None else base
    words = [f"--{word.replace('_', '-')}" for word in WORDS if getattr(options, word)]
    if dialect.is_plan(model):
        if words:
            raise PartitionError(f"{options.model}: is a plan, into which {words[0]} cannot be put any more; give "
                                 f"{', '.join(words)} when the model is compiled")
        return Asked(model, {})
    if not words and not channels:
        return Asked(model, {})
    found = {**dict(_channel_counts(options, model)), **(channels or {})}
    others = tuple(load_file(Path(path)) for path in options.ensemble)
    wrapping = Wrapping(tuple(options.preprocess), tuple(options.output_op), options.tta, others, found)
    return Asked(compose(model, wrapping), found)


def _channel_counts(options: argparse.Namespace, model: ir.Model) -> Iterator[tuple[str, tuple[int, ...]]]:
    names = [str(v.name) for v in model.graph.inputs if v.name not in model.graph.initializers]
    for text in options.channels:
        name, _, count = text.rpartition("=")
        if not name and len(names) != 1:
            raise PartitionError(f"--channels {text}: the model has {len(names)} inputs ({', '.join(names)}); "
                                 f"write NAME={text}")
        if not count.isdecimal():
            raise PartitionError(f"--channels {text}: is not understood; write the number of files, as --channels 4")
        yield name or names[0], equal_counts(model, name or names[0], int(count))


def load_plan(options: argparse.Namespace, asked: Asked | None = None,
              file_shapes: dict[str, tuple[int, ...]] | None = None, progress: Progress | None = None) -> Plan:
    """The plan that the options ask for: read from a file, or compiled now."""
    asked = asked_model(options) if asked is None else asked
    model = asked.model
    given = given_shapes(options, asked)
    if dialect.is_plan(model):
        return _checked_plan(model, options, given)
    shapes = {**(file_shapes or {}), **given}
    known = {str(v.name): dialect.shape_of(v) for v in model.graph.inputs if v.name in asked.names
             and v.shape is not None and v.shape.is_static()}
    cuts = _cuts(options, axis_extents(named_axes(model), {**known, **shapes}))
    dump: str | None = getattr(options, "dump_dir", None)
    folder = None if dump is None else Path(dump)
    steering = Steering(pinned_axes(_pins(options)), _chosen(options.deepen), _chosen(options.overlap))
    request = Request(options.mesh, shapes, cuts, options.strict, None, steering, not options.no_slabs)
    if options.devices is not None:
        return Plan.search(model, request, _devices(options), folder, progress)
    tells = {} if getattr(options, "train", None) else {"profile": options.profile}
    if tells and options.action_name in ("plan", "report", "compile") and options.memory is None:
        tells["backend"] = options.backend  # with a memory it says that every rank has a process of its own
    word = next((word for word, given in tells.items() if given is not None), None)
    if word is not None:
        raise PartitionError(f"--{word} is for choosing a mesh; give --devices too, as --devices 8")
    return Plan.compile(model, replace(request, budget=_budget(options)), folder)


def _devices(options: argparse.Namespace) -> Devices:
    """What the planner is to choose for: in a group that has been joined, a mesh of all its ranks."""
    found = devices_of(options.devices, options.profile, getattr(options, "backend", None), options.memory,
                       options.host_memory, getattr(options, "train", None) or False)
    return found if options.held is None else replace(found, all_of_them=True)


def _pins(options: argparse.Namespace) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in options.pin:
        node, _, words = text.rpartition("=")
        if not node:
            raise PartitionError(f"--pin {text}: name the node, as --pin conv7=replicated")
        found[node] = words
    return found


def _chosen(names: Sequence[str]) -> frozenset[str] | None:
    """The names given; None for all."""
    return None if "all" in names else frozenset(names)


def _budget(options: argparse.Namespace) -> Budget | None:
    """The budget of a process: of one rank where ranks are processes, as in a group that has been joined."""
    if options.memory is None and options.host_memory is None:
        return None
    from partitioner.budget import Budget

    together = options.held is None and getattr(options, "backend", None) in (None, "lockstep")
    return Budget.of(options.memory, options.host_memory, options.action_name == "verify", together, options.held)


def _checked_plan(model: ir.Model, options: argparse.Namespace, given: dict[str, tuple[int, ...]]) -> Plan:
    """A plan from a file, held against the options."""
    check_plan(model, options.model)
    plan = Plan(model)
    mesh = Mesh.parse(options.mesh, spatial_rank(model)) if options.mesh else plan.mesh
    if any(mesh.count(name) != plan.mesh.count(name) for name in AXIS_NAMES):
        raise PartitionError(f"{options.model}: is a plan for the mesh {plan.mesh}, not {options.mesh}; "
                             "leave --mesh out, or give the model")
    if options.cuts:
        raise PartitionError(f"{options.model}: is a plan with cuts of its own; give the model to cut it anew")
    late = ("devices", "profile", "pin", "deepen", "overlap", "train")
    word = next((w for w in late if getattr(options, w, None)), None)
    if word is not None:
        raise PartitionError(f"{options.model}: is a plan, with which --{word} comes too late; give the model")
    if options.memory is not None or options.host_memory is not None or options.no_slabs:
        word = "no-slabs" if options.no_slabs else "memory"
        raise PartitionError(f"{options.model}: is a plan with its schedule; give --{word} when the model is compiled")
    if getattr(options, "dump_dir", None) is not None:
        raise PartitionError(f"{options.model}: is a plan, which has been through all passes; give the model "
                             "to dump what they do")
    wrong = {n: s for n, s in given.items() if plan.input_shapes.get(n) != s}
    return plan.with_shapes(wrong) if wrong else plan


def _assignments(given: Sequence[str], names: Sequence[str]) -> list[tuple[str | None, str]]:
    """`NAME=FILE` or `FILE`; a path may have an equals sign of its own, and so may a name."""
    found: list[tuple[str | None, str]] = []
    for text in given:
        name = max((n for n in names if text.startswith(f"{n}=")), key=len, default=None)
        if name is None and "=" in text and not any(sep in text.partition("=")[0] for sep in "/\\"):
            name = text.partition("=")[0]  # unknown, and refused as such
        found.append((None, text) if name is None else (name, text[len(name) + 1 :]))
    return found


def _expanded(given: Sequence[tuple[str | None, str]], asked: Asked) -> tuple[
        list[tuple[str | None, str]], dict[str, list[str]]]:
    """Lists of files as a file for each part of an input, and the lists by the input's name."""
    heads = _heads(asked)
    found: list[tuple[str | None, str]] = []
    lists: dict[str, list[str]] = {}
    for name, text in given:
        paths = split_paths(text)
        head = name if name is not None or len(heads) != 1 else heads[0]
        if len(paths) == 1 or head is None:
            found.append((name, text))
            continue
        found += zip(part_names(head, len(paths)), paths, strict=True)
        lists[head] = paths
    return found, lists


def _heads(asked: Asked) -> list[str]:
    """The inputs, those that several files fill by one name."""
    if not dialect.is_plan(asked.model):
        return asked.names
    found = [name if not name.rpartition("/")[2].isdecimal() else name.rpartition("/")[0] for name in asked.names]
    return list(dict.fromkeys(found))


@dataclass
class Known:
    """What was read and planned for earlier files of the same options."""

    base: ir.Model | None = None
    asked: dict[tuple[tuple[str, tuple[int, ...]], ...], Asked] = field(default_factory=dict[Any, Asked])
    plans: OrderedDict[Any, Plan] = field(default_factory=OrderedDict[Any, Plan])

    def model(self, options: argparse.Namespace, channels: Mapping[str, tuple[int, ...]]) -> Asked:
        """See `asked_model`."""
        key = tuple(channels.items())
        if key not in self.asked:
            self.asked[key] = asked_model(options, self.base, channels)
        return self.asked[key]

    def plan(self, options: argparse.Namespace, asked: Asked, shapes: dict[str, tuple[int, ...]]) -> Plan:
        """See `load_plan`; the last few plans are kept."""
        fixed = dialect.is_plan(asked.model)
        key = None if fixed else (tuple(asked.channels.items()), tuple(shapes.items()))
        if key not in self.plans:
            self.plans[key] = load_plan(options, asked, None if fixed else shapes)
        self.plans.move_to_end(key)
        while len(self.plans) > KEPT_PLANS:
            self.plans.popitem(last=False)
        return self.plans[key]


def asked_files(options: argparse.Namespace, known: Known) -> tuple[
        Asked, dict[str, str], dict[str, tuple[int, ...]]]:
    """The model, the file of every input, and the extents of the files."""
    base = known.base = load_file(Path(options.model)) if known.base is None else known.base
    plain = Asked(base, {})
    given, lists = _expanded(_assignments(options.input, list(dict.fromkeys([*plain.names, *_heads(plain)]))), plain)
    if dialect.is_plan(base):
        asked = known.model(options, {})
        single = next((head for head, paths in lists.items() if part_names(head, len(paths))[-1] not in asked.names
                       or part_names(head, len(paths) + 1)[-1] in asked.names), None)
        if single is not None:
            raise PartitionError(f"{options.model}: is a plan that does not take {len(lists[single])} files for input "
                                 f"'{single}'; compile the model with --channels {single}={len(lists[single])}")
    else:
        unknown = next((head for head in lists if head not in plain.names), None)
        if unknown is not None:
            raise PartitionError(f"input '{unknown}' is unknown; the model has {', '.join(plain.names)}")
        channels = {head: channels_of(paths, head, input_channel_axis(base, head)) for head, paths in lists.items()}
        asked = known.model(options, channels)
        given = [pair if pair[0] is not None else next(
            iter(_assignments([pair[1]], asked.names))) for pair in given]
    files = name_files(given, asked.names, "input")
    sources = open_inputs(files, asked.dtypes)
    shapes = {name: tuple(source.shape) for name, source in sources.items()}
    report_notices(sources.values())
    for source in sources.values():
        source.close()
    return asked, files, shapes


def prepare_files(options: argparse.Namespace) -> tuple[Plan, dict[str, str]]:
    """The plan and its input files; open axes take their extents from the files."""
    known = Known()
    asked, files, shapes = asked_files(options, known)
    return known.plan(options, asked, shapes), files


def file_run(options: argparse.Namespace, backend: Backend, known: Known | None = None) -> FileRun:
    """The run from files to files that the options ask for."""
    known = Known() if known is None else known
    asked, inputs, shapes = asked_files(options, known)
    outputs = name_files(_assignments(options.output, asked.output_names), asked.output_names, "output")
    check_targets(inputs, outputs, options.overwrite)
    saved = _saved_run(options, inputs, outputs, backend)
    if saved is not None and saved.goes_on:
        return FileRun(Plan(load_file(saved.plan_file)), inputs, outputs, backend, options.device, saved)
    plan = known.plan(options, asked, shapes)
    return FileRun(plan, inputs, outputs, backend, options.device, saved)


def _saved_run(options: argparse.Namespace, inputs: dict[str, str], outputs: dict[str, str],
               backend: Backend) -> SavedRun | None:
    """What `--resume` goes on from, or keeps for later."""
    if not options.resume:
        return None
    from runtime.resume import SavedRun

    passing = ("action", "action_name", "overwrite", "json", "resume", "held")
    words = {**{k: v for k, v in vars(options).items() if k not in passing}, "backend": backend}
    read = (options.model, *options.ensemble, *options.operators, *map(file_of, inputs.values()))
    stamps = {path: (os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in read if os.path.exists(path)}
    first = file_of(next(iter(outputs.values())))
    leads = is_first_rank()
    found = SavedRun(Path(f"{first}.resume"), {"options": words, "files": stamps}, leads)
    if found.notice is not None and leads:
        sys.stderr.write(f"partition: note: {found.notice}\n")
    return found


def read_all(plan: Plan, files: dict[str, str]) -> dict[str, Any]:
    """The whole arrays of a plan's input files."""
    dtypes = {str(v.name): v.dtype for v in plan.model.graph.inputs if v.dtype is not None}
    sources = open_inputs(files, dtypes)
    check_sources(plan, sources)
    return {name: source.read() for name, source in sources.items()}
