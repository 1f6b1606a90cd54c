"""An input whose channels come from several files: one input for each, joined in the graph.

    before                         after
    volume (1, 4, D, H, W)         volume/0 ... volume/3 (1, 1, D, H, W)
    ... = Conv(volume)             all = Concat(volume/0, ..., volume/3)
                                   ... = Conv(all)
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from partitioner.compose.graph import Writer, copied, find_input, input_names, new_input, spatial_axes, take_input
from partitioner.errors import PartitionError


def part_names(name: str, count: int) -> tuple[str, ...]:
    """Names of the inputs that take the place of one."""
    return tuple(f"{name}/{index}" for index in range(count))


def with_channels_split(model: ir.Model, name: str, counts: Sequence[int]) -> ir.Model:
    """A model that takes the channels of an input as several inputs, `NAME/0`, `NAME/1` and so on.

    Args:
        counts: channels of each.

    Raises:
        PartitionError: for an unknown input, or when the counts do not add up to the model's channels.
    """
    found = copied(model)
    names = input_names(found)
    if name not in names:
        raise PartitionError(f"input '{name}' is unknown; the model has {', '.join(names)}")
    old = find_input(found, name)
    if old.shape is None or len(old.shape) < 2:
        raise PartitionError(f"input '{name}' has no channels that could come from several files; give one file")
    axis = input_channel_axis(found, name)
    wanted = old.shape[axis]
    if isinstance(wanted, int) and sum(counts) != wanted:
        each = " + ".join(map(str, counts))
        raise PartitionError(f"input '{name}' takes {wanted} channels, {len(counts)} files hold "
                             f"{each if len(set(counts)) > 1 else sum(counts)}; give files for all channels")
    values = [new_input(part, old.dtype, ir.Shape([count if a == axis else n for a, n in enumerate(old.shape)]))
              for part, count in zip(part_names(name, len(counts)), counts, strict=True)]
    take_input(found, old, values)
    old.replace_all_uses_with(Writer(found, name, in_front=True).op("Concat", *values, axis=axis))
    return found


def equal_counts(model: ir.Model, name: str, files: int) -> tuple[int, ...]:
    """Channels of every file when all have the same number.

    Raises:
        PartitionError: when they cannot.
    """
    shape = find_input(model, name).shape if name in input_names(model) else None
    if shape is None or len(shape) < 2:
        raise PartitionError(f"input '{name}' is unknown or has no channels; the model has "
                             f"{', '.join(input_names(model))}")
    channels = shape[input_channel_axis(model, name)]
    if not isinstance(channels, int):
        return (1,) * files
    if files < 1 or channels % files:
        raise PartitionError(f"input '{name}' has {channels} channels, which {files} files cannot share evenly; "
                             f"give a divisor, as {channels}")
    return (channels // files,) * files


def input_channel_axis(model: ir.Model, name: str) -> int:
    """Where the channels of an input stand: axis 1, or the last one where the network sees it so."""
    shape = find_input(model, name).shape
    rank, taken = 0 if shape is None else len(shape), spatial_axes(model, name).values()
    return next((a for a in range(1, rank) if a not in taken), 1) if len(taken) == rank - 2 else 1
