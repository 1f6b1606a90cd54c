"""Where a run's inputs come from and its outputs go: arrays in this process, or files read and written in parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
import torch

from partitioner.geometry import Box, Interval, local_slices
from runtime.census import count_once
from runtime.overlap import BehindWriter
from runtime.volumes import PartFile, Source, Writer


@dataclass(frozen=True)
class Portion:
    """The cells of a model input or output that one rank holds; `tensor` has their extents."""

    rank: int
    box: Box
    tensor: torch.Tensor

    @property
    def slices(self) -> tuple[slice, ...]:
        """The box as slices of the whole array."""
        return tuple(slice(i.start, i.stop) for i in self.box.intervals())


class Feed(Protocol):
    """Fills the input portions of the ranks of this process."""

    def load(self, name: str, portions: Sequence[Portion]) -> None:
        """Write the cells of input `name` into every portion's tensor."""
        ...


class Drain(Protocol):
    """Takes the output portions of the ranks of this process."""

    def store(self, name: str, portion: Portion) -> None:
        """Keep the cells of output `name`; called once per cell over all ranks."""
        ...


@dataclass(frozen=True)
class ArrayFeed:
    """Inputs as numpy arrays or torch tensors, on any device."""

    arrays: Mapping[str, Any]

    def load(self, name: str, portions: Sequence[Portion]) -> None:
        """See `Feed`."""
        source = self.arrays[name]
        for portion in portions:
            portion.tensor.copy_(as_tensor(source[portion.slices]))


@dataclass(frozen=True)
class ArrayDrain:
    """Outputs as torch tensors that have room for the whole."""

    tensors: Mapping[str, torch.Tensor]

    def store(self, name: str, portion: Portion) -> None:
        """See `Drain`."""
        self.tensors[name][portion.slices].copy_(portion.tensor)


def map_part(part: PartFile) -> torch.Tensor:
    """The values of a prepared file of one array, as memory that the processes of one host share."""
    ((_, raw),) = part.arrays
    if 0 in raw.shape:
        return torch.from_numpy(np.empty(raw.shape, raw.dtype))
    mapped = np.memmap(part.temporary, raw.dtype, "r+", raw.offset, raw.shape or (1,))
    return torch.from_numpy(mapped).reshape(raw.shape)


class Tally:
    """Cells that are NaN or infinite per input: each counted once, though several chains may read it slab by slab."""

    def __init__(self) -> None:
        self.cells: dict[str, int] = {}
        self._first: dict[str, list[list[int]]] = {}
        self._over: list[str] = []

    def is_new(self, name: str, box: Box) -> bool:
        """Whether a box is of the first pass over its input; a second one begins where the first began."""
        place = [[i.start, i.stop] for i in box.intervals()]
        first = self._first.setdefault(name, place)
        if name in self.cells and place == first:
            self._over.append(name)
        return name not in self._over

    def add(self, name: str, count: int) -> None:
        """Add to an input's number."""
        self.cells[name] = self.cells.get(name, 0) + count

    def state(self) -> dict[str, Any]:
        """All of it as plain values, to be saved."""
        return {"cells": dict(self.cells), "first": dict(self._first), "over": list(self._over)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`."""
        self.cells = dict(state["cells"])
        self._first, self._over = dict(state["first"]), list(state["over"])


@dataclass(frozen=True)
class FileFeed:
    """Inputs from files: each portion is read by itself, or one pass over the file fills them all.

    Args:
        tally: per input, how many of its cells are NaN or infinite; filled while loading.
        counted: of inputs whose portions overlap, the cells of each rank that are counted.
    """

    sources: Mapping[str, Source]
    tally: Tally = field(default_factory=lambda: Tally())
    counted: Mapping[str, Sequence[Box]] = field(default_factory=dict[str, Sequence[Box]])

    def load(self, name: str, portions: Sequence[Portion]) -> None:
        """See `Feed`."""
        self._fill(name, portions)
        if self.tally.is_new(name, portions[0].box):
            self.tally.add(name, count_once(self._counted(name, portion) for portion in portions))

    def _counted(self, name: str, portion: Portion) -> tuple[Box, torch.Tensor]:
        """The cells of a portion that no portion before it holds, where portions overlap."""
        if name not in self.counted:
            return portion.box, portion.tensor
        alone = portion.box & self.counted[name][portion.rank]
        places = zip(portion.box.axes, alone.axes, strict=True)
        slices = tuple(local_slices(held, part)[0] if part else slice(0, 0) for held, part in places)
        return alone, portion.tensor[slices]

    def _fill(self, name: str, portions: Sequence[Portion]) -> None:
        source = self.sources[name]
        if source.random_access:
            for portion in portions:
                portion.tensor.copy_(torch.from_numpy(source.read(portion.slices)))
            return
        for start, values in source.slabs():
            for portion in portions:
                fill_from_slab(portion, start, values)


@dataclass(frozen=True)
class FileDrain:
    """Outputs into files, each portion at its place: writer and array name per output."""

    writers: Mapping[str, tuple[Writer | BehindWriter, str | None]]

    def store(self, name: str, portion: Portion) -> None:
        """See `Drain`."""
        writer, member = self.writers[name]
        writer.write(portion.slices, to_numpy(portion.tensor), member)

    def settle(self) -> None:
        """Bring all that was stored to the disk.

        Raises:
            ExecutionError: the disk is full or gone.
        """
        for writer, _ in self.writers.values():
            writer.flush()


def host_type(dtype: ir.DataType) -> np.dtype[Any]:
    """The numpy type in which values lie in host memory and files; float32 holds bfloat16, which numpy lacks."""
    return np.dtype(np.float32) if dtype == ir.DataType.BFLOAT16 else np.dtype(dtype.numpy())


def as_tensor(values: Any) -> torch.Tensor:
    """A tensor or array as a tensor; read-only and re-ordered arrays are copied."""
    if isinstance(values, torch.Tensor):
        return values
    array = np.asarray(values)
    if array.dtype.name == "bfloat16":  # of the package ml_dtypes
        return torch.from_numpy(array.astype(np.float32)).bfloat16()
    plain = array.flags.writeable and all(step >= 0 for step in array.strides) and array.dtype.isnative
    return torch.from_numpy(array if plain else array.astype(array.dtype.newbyteorder("="), order="C", copy=True))


def to_numpy(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """A tensor's values in host memory; bfloat16 becomes float32, which holds it exactly."""
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.float()
    return tensor.detach().cpu().numpy()


def fill_from_slab(portion: Portion, start: Sequence[int], values: np.ndarray[Any, Any]) -> None:
    """Copy what a slab of the whole array and a portion have in common."""
    slab = tuple(Interval(a, a + n) for a, n in zip(start, values.shape, strict=True))
    common = tuple(a & b for a, b in zip(slab, portion.box.intervals(), strict=True))
    if not all(common):
        return
    inside = tuple(slice(c.start - s.start, c.stop - s.start) for c, s in zip(common, slab, strict=True))
    target = tuple(slice(c.start - p.start, c.stop - p.start)
                   for c, p in zip(common, portion.box.intervals(), strict=True))
    portion.tensor[target].copy_(torch.from_numpy(np.ascontiguousarray(values[inside])))


def slab_parts(start: Sequence[int], values: np.ndarray[Any, Any],
               boxes: Sequence[Box]) -> Iterator[tuple[int, np.ndarray[Any, Any]]]:
    """(rank, its part of a slab) for every rank whose box meets the slab, in rank order."""
    slab = tuple(Interval(a, a + n) for a, n in zip(start, values.shape, strict=True))
    for rank, box in enumerate(boxes):
        common = tuple(a & b for a, b in zip(slab, box.intervals(), strict=True))
        if all(common):
            inside = tuple(slice(c.start - s.start, c.stop - s.start) for c, s in zip(common, slab, strict=True))
            yield rank, np.ascontiguousarray(values[inside])
