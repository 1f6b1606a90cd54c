"""Cases: the volumes of one patient, each in a file or in memory, of which a rank reads its own cells.

    plan's input (2, 1, 96, 96, 96)    file (96, 96, 96), (1, 96, 96, 96) or (1, 1, 96, 96, 96), or larger in space
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from partitioner.errors import PartitionError
from partitioner.geometry import Box, Interval
from runtime.training.augment import Draw, cells_to_read
from runtime.volumes import array_names, open_source

Volume = str | Path | NDArray[Any] | torch.Tensor | int | float
"""A file (`case.h5:/ct` names an array in it), or an array in memory."""

_PROBES = 4096
"""Cells by which an array in memory is told from another."""


@dataclass(frozen=True)
class Slot:
    """Where the volumes of one name go: to an input of the module, or beside an output.

    Args:
        extents: of the input or output: batch, channels, space.
        box: this rank's part of it.
        number: of the input; None beside an output.
        is_labels: class numbers, delivered as int64 without an axis for one channel.
    """

    name: str
    extents: tuple[int, ...]
    box: Box
    number: int | None
    is_labels: bool

    @property
    def space(self) -> tuple[int, ...]:
        """The spatial extents."""
        return self.extents[2:]

    @property
    def cases(self) -> range:
        """The rank's own cases of a step's."""
        own = self.box.intervals()[0]
        return range(own.start, own.stop)


@dataclass(frozen=True)
class Stored:
    """One volume of a case.

    Args:
        place: path or array.
        where: for messages.
        member: the array's name in a file that holds several.
        shape: as the file gives it.
        identity: by which ranks compare it.
    """

    place: str | NDArray[Any]
    where: str
    member: str | None
    shape: tuple[int, ...]
    identity: str

    def read(self, box: Sequence[Interval], dtype: np.dtype[Any] | None) -> NDArray[Any]:
        """The cells of a box, in their own type without one.

        Raises:
            PartitionError: the file is damaged or gone.
        """
        if isinstance(self.place, str):
            with open_source(self.place, self.member, dtype) as source:
                return source.read(box)
        return np.array(self.place[tuple(slice(i.start, i.stop) for i in box)], dtype)


def look_at(volume: Volume, slot: Slot, sample: int, root: str, dtype: np.dtype[Any]) -> Stored:
    """What a file's header says of a volume.

    Args:
        root: the folder that all files have in common; where it lies may differ from host to host.
        dtype: of values that are no labels.

    Raises:
        PartitionError: no such file, no numbers in it, or extents that do not fit.
    """
    if isinstance(volume, str | Path):
        path = str(volume)
        member = slot.name if slot.name in array_names(path) else None
        with open_source(path, member, None if slot.is_labels else dtype) as source:
            about = f"{os.path.relpath(path, root)} {member} {_times(source.shape)} {source.dtype}"
            stored = Stored(path, path, member, source.shape, about)
    else:
        array = _to_numpy(volume)
        where = f"sample {sample}"
        if array.dtype.kind not in "biuf":
            raise PartitionError(f"{where}: '{slot.name}' holds {array.dtype} values; give real numbers")
        stored = Stored(array, where, None, array.shape, f"{_fingerprint(array)} {_times(array.shape)} {array.dtype}")
    _check_extents(stored, slot)
    return stored


def common_folder(volumes: Sequence[Volume]) -> str:
    """The innermost folder that holds all files."""
    folders = {os.path.dirname(os.path.abspath(v)) for v in volumes if isinstance(v, str | Path)}
    return os.path.commonpath(folders) if folders else os.curdir


def rooms(stored: Stored, slot: Slot) -> tuple[int, ...]:
    """Per spatial axis the cells that the file has beyond the plan's."""
    space = stored.shape[len(stored.shape) - len(slot.space):]
    return tuple(have - need for have, need in zip(space, slot.space, strict=True))


def describe_unlike(volumes: Sequence[tuple[Stored, Slot]], first: Mapping[str, Stored]) -> list[str]:
    """Why the volumes of a case cannot be cropped together, or not stacked with those of the first case.

    With the same room in all files the cells correspond.  So they do in files of the same extents beside a network
    whose output is smaller by the same border on either side.
    """
    problems = [f"{stored.where}: '{slot.name}' has other channels than in {first[slot.name].where}; give the same "
                "in all" for stored, slot in volumes
                if part_extents(stored, slot) != part_extents(first[slot.name], slot)]
    stored, slot = volumes[0]
    for other, its in volumes[1:]:
        if len(its.space) != len(slot.space):
            continue  # no part of the same space, as the class of a whole volume
        room = zip(rooms(stored, slot), rooms(other, its), slot.space, its.space, strict=True)
        if not all(a == b or (a + n == b + m and (a - b) % 2 == 0) for a, b, n, m in room):
            problems.append(f"{other.where}: '{its.name}' has {_times(rooms(other, its))} cells more than the plan, "
                            f"'{slot.name}' in {stored.where} {_times(rooms(stored, slot))}, so their cells do not "
                            "correspond; cut the files to the plan's extents")
    return problems


def offsets(volumes: Sequence[tuple[Stored, Slot]], what: Draw) -> list[tuple[int, ...]]:
    """Per volume of a case where in its file the cells that are taken begin."""
    space = len(volumes[0][1].space)
    all_rooms = [rooms(stored, slot) for stored, slot in volumes]
    alike = [r for r in all_rooms if len(r) == space]
    least = tuple(map(min, zip(*alike, strict=True)))
    begin = tuple(what.offset(axis, room) for axis, room in enumerate(least))
    return [tuple(b + (r - low) // 2 for b, r, low in zip(begin, own, least, strict=True)) if len(own) == space
            else tuple(r // 2 for r in own) for own in all_rooms]


def read_part(stored: Stored, slot: Slot, what: Draw, begin: Sequence[int], dtype: np.dtype[Any]) -> torch.Tensor:
    """This rank's cells of a volume as the plan sees it: (channels, space), of labels with one channel (space).

    Args:
        begin: where in the file the cells that are taken begin.
        dtype: of values that are no labels.

    Raises:
        PartitionError: the file is damaged, or labels have fractions.
    """
    lead = _lead(stored.shape, slot)
    assert lead is not None
    own = slot.box.intervals()
    moved = len(slot.space) == len(what.flips)
    flips = what.flips if moved else (False,) * len(slot.space)
    cells = [cells_to_read(*axis) for axis in zip(own[2:], slot.space, begin, flips, strict=True)]
    channels = stored.shape[lead - 1] if lead else 1
    taken = own[1] if channels == slot.extents[1] else Interval(0, channels)
    box = [*(Interval(0, 1),) * (lead - 1), *((taken,) if lead else ()), *cells]
    values = stored.read(box, None if slot.is_labels else dtype)
    values = values.reshape(len(taken), *values.shape[lead:])
    part = torch.from_numpy(_whole_numbers(values, stored) if slot.is_labels else values)
    part = part.flip([axis + 1 for axis, is_flipped in enumerate(flips) if is_flipped])
    if slot.is_labels and channels == 1:
        return part[0]
    if slot.number is None or slot.is_labels:
        return part
    for change in what.changes:
        part = change.apply(part, Box(((taken,), *slot.box.axes[2:])), slot.extents[1:], slot.number)
    return part


def part_extents(stored: Stored, slot: Slot) -> tuple[int, ...]:
    """Extents of what `read_part` gives."""
    lead = _lead(stored.shape, slot)
    channels = stored.shape[lead - 1] if lead else 1
    own = slot.box.shape
    if slot.is_labels and channels == 1:
        return own[2:]
    return (own[1] if channels == slot.extents[1] else channels, *own[2:])


def _check_extents(stored: Stored, slot: Slot) -> None:
    """Make sure that a volume can go where it should."""
    lead = _lead(stored.shape, slot)
    if lead is None:
        raise PartitionError(f"{stored.where}: '{slot.name}' has extents {_times(stored.shape)}, the plan takes "
                             f"{_times(slot.extents[1:])} of a case; give one case per file, spatial axes last")
    space = stored.shape[lead:]
    if any(have < need for have, need in zip(space, slot.space, strict=True)):
        raise PartitionError(f"{stored.where}: '{slot.name}' is {_times(space)} cells, smaller than the plan's "
                             f"{_times(slot.space)}; pad the file or partition the model for smaller volumes")
    channels, expected = (stored.shape[lead - 1] if lead else 1), slot.extents[1]
    if channels == expected or (slot.number is None and channels == 1):
        return
    takes, more = ("takes", "") if slot.number is not None else ("gives", " or 1")
    raise PartitionError(f"{stored.where}: '{slot.name}' has {channels} channels, the plan {takes} {expected}; give "
                         f"{expected}{more}")


def _lead(shape: Sequence[int], slot: Slot) -> int | None:
    """Axes in front of the spatial ones: none, channels, or a batch of one and channels; None for anything else."""
    lead = len(shape) - len(slot.space)
    return lead if lead in (0, 1) or (lead == 2 and shape[0] == 1) else None


def _whole_numbers(values: NDArray[Any], stored: Stored) -> NDArray[np.int64]:
    with np.errstate(invalid="ignore"):
        numbers = np.array(values, np.int64, order="C")
    if values.dtype.kind == "f" and not np.array_equal(numbers, values):
        raise PartitionError(f"{stored.where}: its labels are no whole numbers; store classes, or name it otherwise "
                             "than `labels` says to have the values as they are")
    return numbers


def _to_numpy(volume: NDArray[Any] | torch.Tensor | float) -> NDArray[Any]:
    if not isinstance(volume, torch.Tensor):
        return np.asarray(volume)
    plain = volume.detach().cpu()
    return (plain.float() if plain.dtype == torch.bfloat16 else plain).numpy()


def _fingerprint(array: NDArray[Any]) -> str:
    """Tells an array from another by some of its cells, so that a mapped one is not read."""
    probes = array.reshape(-1)[:: max(1, array.size // _PROBES)] if array.flags.c_contiguous else array.flat[:_PROBES]
    return f"array {zlib.crc32(np.ascontiguousarray(probes).tobytes()):08x}"


def _times(extents: Sequence[int]) -> str:
    return "x".join(map(str, extents)) or "a number"
