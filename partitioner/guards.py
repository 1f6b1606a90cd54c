"""Guards at the border: what users give the API, checked and brought into one form."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from partitioner import dialect
from partitioner.errors import PartitionError, refuse_all
from partitioner.mesh import Mesh
from partitioner.ops.dtypes import is_known
from partitioner.profile import Link
from partitioner.shapes import spatial_rank

MeshLike = str | Mapping[str, int] | Mesh | None
Arrays = Mapping[str, Any]


def whole_numbers(given: Mapping[str, Sequence[int]] | None, what: str, example: str) -> dict[str, tuple[int, ...]]:
    """Names with whole numbers, as the user gave them; nothing is rounded.

    Raises:
        PartitionError: for anything else.
    """
    if given is not None and not isinstance(given, Mapping):
        raise PartitionError(f"{what}: is a {type(given).__name__}; give a dict, as {example}")
    found: dict[str, tuple[int, ...]] = {}
    for name, numbers in (given or {}).items():
        try:
            found[name] = tuple(operator.index(n) for n in numbers)
        except TypeError:
            raise PartitionError(
                f"{what}: {name}={numbers!r} is no list of whole numbers; give them as {example}") from None
    return found


def checked_path(given: Any) -> Path:
    """The path of a file, as text or as a Path.

    Raises:
        PartitionError: for anything else.
    """
    if not isinstance(given, str | os.PathLike):
        raise PartitionError(f"{given!r} is no path of a file; give a text or a pathlib.Path")
    return Path(os.fspath(given))  # pyright: ignore


def parse_mesh(given: MeshLike, model: ir.Model) -> Mesh:
    """The mesh that the user gave in any form; the short form names the model's spatial axes.

    Raises:
        PartitionError: when it is none.
    """
    if isinstance(given, Mesh):
        given = dict(given.axes)
    if given is not None and not isinstance(given, str | Mapping):
        raise PartitionError(f"mesh {given!r} is not understood; give 'depth=2,height=2', '2x2x1', a dict or a Mesh")
    if isinstance(given, Mapping):
        given = {name: _plain(count) for name, count in given.items()}
    return Mesh.parse(given, spatial_rank(model))


def _plain(count: Any) -> Any:
    """A number of any integer type as Python's own; anything else stays, for `Mesh.parse` to refuse."""
    return int(count) if hasattr(count, "__index__") and not isinstance(count, bool) else count


def check_inputs(model: ir.Model, inputs: Arrays) -> None:
    """Names, ranks and element types of the arrays given.

    Raises:
        PartitionError: with every problem.
    """
    wanted = {str(v.name): v for v in model.graph.inputs}
    if not isinstance(inputs, Mapping):
        raise PartitionError(f"the inputs are a {type(inputs).__name__}; give a dict from name to array: "
                             f"{', '.join(wanted)}")
    problems = [f"input '{n}' is unknown; the model has {', '.join(wanted)}" for n in inputs if n not in wanted]
    for name, value in wanted.items():
        problem = _array_problem(value, inputs[name]) if name in inputs else "is missing; give it"
        if problem is not None:
            problems.append(f"input '{name}' {problem}")
    refuse_all(problems)


def check_outputs(model: ir.Model, out: Arrays, inputs: Arrays) -> None:
    """Arrays that the outputs of a plan are to be written to.

    Raises:
        PartitionError: with every problem.
    """
    wanted = {str(v.name): v for v in model.graph.outputs}
    if not isinstance(out, Mapping):
        raise PartitionError(f"out is a {type(out).__name__}; give a dict from name to array: {', '.join(wanted)}")
    problems = [f"output '{n}' is unknown; the model has {', '.join(wanted)}" for n in out if n not in wanted]
    taken = {f"input '{name}'": _addresses(array) for name, array in inputs.items()}
    for name, array in out.items():
        if name not in wanted:
            continue
        problem = _room_problem(wanted[name], array)
        if problem is None:
            here = _addresses(array)
            others = [n for n, there in taken.items() if here.start < there.stop and there.start < here.stop]
            problem = f"lies where {others[0]} lies; give it memory of its own" if others else None
            taken[f"output '{name}'"] = here
        if problem is not None:
            problems.append(f"out: output '{name}' {problem}")
    refuse_all(problems)


def _addresses(array: Any) -> range:
    """Where an array of host memory lies, from its first byte to its last."""
    if 0 in array.shape or (is_tensor(array) and array.device.type != "cpu"):
        return range(0)
    start, item = (array.data_ptr(), array.element_size()) if is_tensor(array) else (array.ctypes.data, array.itemsize)
    steps = [s * item for s in array.stride()] if is_tensor(array) else array.strides
    ends = [(n - 1) * step for n, step in zip(array.shape, steps, strict=True)]
    return range(start + sum(min(0, e) for e in ends), start + sum(max(0, e) for e in ends) + item)


def _room_problem(value: ir.Value, array: Any) -> str | None:
    problem = _array_problem(value, array)
    if problem is not None:
        return problem
    expected = dialect.shape_of(value)
    if tuple(array.shape) != expected:
        return f"is {'x'.join(map(str, array.shape))}; the model makes {'x'.join(map(str, expected))}"
    if is_tensor(array):
        return None if array.device.type == "cpu" else f"lies on {array.device}; give one in host memory"
    if array.dtype.name == "bfloat16":
        return "is bfloat16, which only torch can write to; give a torch tensor"
    if not array.flags.writeable or not array.dtype.isnative or any(step < 0 for step in array.strides):
        return "is an array that torch cannot write to; give a new one, as numpy.empty makes it"
    return None


def _array_problem(value: ir.Value, array: Any) -> str | None:
    if not hasattr(array, "shape") or not hasattr(array, "dtype"):
        return f"is a {type(array).__name__}; give a numpy array or a torch tensor"
    if np.ma.is_masked(array):
        return "is an array with masked values; give plain ones, as array.filled(0)"
    expected = dialect.shape_of(value)
    if len(array.shape) != len(expected):
        return (f"has {len(array.shape)} axes ({'x'.join(map(str, array.shape))}); "
                f"the model takes {len(expected)}, as {'x'.join(map(str, expected))}")
    if is_tensor(array) and (array.is_meta or str(array.layout) != "torch.strided"):
        return f"is a tensor of {'no data' if array.is_meta else array.layout}; give a dense one"
    assert value.dtype is not None
    given = str(array.dtype if is_tensor(array) else array.dtype.newbyteorder("=")).removeprefix("torch.")
    known = str(value.dtype.numpy()) if value.dtype != ir.DataType.BFLOAT16 else "bfloat16"
    if given != known:
        return f"is {given}; the model takes {known}: convert it"
    return None


def is_tensor(value: Any) -> bool:
    """Whether a value is a torch tensor; torch is not loaded for the answer."""
    return type(value).__module__.startswith("torch")


def source_problems(model: ir.Model) -> list[str]:
    """Why a model cannot be partitioned, whatever its operators."""
    if dialect.is_plan(model):
        return ["the model is a plan already; load it with pt.load, or give the model that it was made from"]
    return [f"input '{v.name}' is {v.dtype.name}, which the runtime cannot hold; export it with another type"
            for v in model.graph.inputs if v.dtype is not None and not is_known(v.dtype)]


def chosen_names(word: str, given: bool | Collection[str], what: str) -> frozenset[str] | None:
    """The names that an option chooses; None for all.

    Args:
        word: the option, `what` what it names, for messages.

    Raises:
        PartitionError: for anything else than a bool or names.
    """
    if isinstance(given, bool):
        return None if given else frozenset()
    if isinstance(given, str) or not isinstance(given, Collection) or not all(isinstance(n, str) for n in given):
        raise PartitionError(f"{word}={given!r} is not understood; give True, or names of {what} in a list")
    return frozenset(given)


def check_link(link: Any) -> None:
    """Make sure that a link can be emulated.

    Raises:
        PartitionError: when it is none, was measured as a curve, or has impossible figures.
    """
    if not isinstance(link, Link) or link.curve is not None:
        raise PartitionError("link: give seconds and bytes per second, as pt.Link(latency=0.002, bandwidth=1e9)")
    if not 0 <= link.latency < math.inf or not link.bandwidth > 0:
        raise PartitionError(f"link: latency {link.latency} and bandwidth {link.bandwidth} are impossible; give "
                             "seconds from 0 on, and bytes per second above 0")
