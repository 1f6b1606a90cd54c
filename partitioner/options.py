"""From the options of the command to plans, files and runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from partitioner import dialect
from partitioner.api import Backend, Plan, check_plan
from partitioner.axes import axis_extents, named_axes
from partitioner.errors import PartitionError
from partitioner.files import FileRun, check_sources, name_files, open_inputs, report_notices
from partitioner.loader import load_file
from partitioner.mesh import AXIS_NAMES, Mesh
from partitioner.shapes import spatial_rank


def _shapes(options: argparse.Namespace, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
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
    return found


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


def load_plan(options: argparse.Namespace, file_shapes: dict[str, tuple[int, ...]] | None = None) -> Plan:
    """The plan that the options ask for: read from a file, or compiled now."""
    model = load_file(Path(options.model))
    values = [v for v in model.graph.inputs if v.name not in model.graph.initializers]
    given = _shapes(options, [str(v.name) for v in values])
    if dialect.is_plan(model):
        return _checked_plan(model, options, given)
    shapes = {**(file_shapes or {}), **given}
    known = {str(v.name): dialect.shape_of(v) for v in values if v.shape is not None and v.shape.is_static()}
    cuts = _cuts(options, axis_extents(named_axes(model), {**known, **shapes}))
    dump: str | None = getattr(options, "dump_dir", None)
    return Plan.compile(model, options.mesh, shapes, cuts, None if dump is None else Path(dump), options.strict)


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


def prepare_files(options: argparse.Namespace) -> tuple[Plan, dict[str, str]]:
    """The plan and its input files; open axes take their extents from the files."""
    model = load_file(Path(options.model))
    values = {str(v.name): v for v in model.graph.inputs if v.name not in model.graph.initializers}
    files = name_files(_assignments(options.input, list(values)), list(values), "input")
    dtypes = {name: v.dtype for name, v in values.items() if v.dtype is not None}
    sources = open_inputs(files, dtypes)
    shapes = {name: tuple(source.shape) for name, source in sources.items()}
    report_notices(sources.values())
    for source in sources.values():
        source.close()
    return load_plan(options, None if dialect.is_plan(model) else shapes), files


def file_run(options: argparse.Namespace, backend: Backend) -> FileRun:
    """The run from files to files that the options ask for."""
    plan, inputs = prepare_files(options)
    names = [str(v.name) for v in plan.model.graph.outputs]
    outputs = name_files(_assignments(options.output, names), names, "output")
    return FileRun(plan, inputs, outputs, backend, options.device)


def read_all(plan: Plan, files: dict[str, str]) -> dict[str, Any]:
    """The whole arrays of a plan's input files."""
    dtypes = {str(v.name): v.dtype for v in plan.model.graph.inputs if v.dtype is not None}
    sources = open_inputs(files, dtypes)
    check_sources(plan, sources)
    return {name: source.read() for name, source in sources.items()}
