"""What a rolled program asks again for every slab: answers differ along the rolled axis only.

Boxes of slabs are made of the very same pieces along all other axes, so that answers are found by what is asked about
itself, not by what is equal to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir

from partitioner import dialect
from partitioner.geometry import Box, Pieces, local_slices
from partitioner.ops.base import need_pieces
from partitioner.ops.nodes import input_box, needs_of, reduction_splits
from partitioner.rolling import rolled_axis
from runtime.program import Window

_Axis = tuple[Pieces | None, Pieces]
"""Cells of an output, and those of an input that they need."""


Make = Callable[[ir.Value, Box | None, bool], Window]
"""Makes the window of a value: of a box of it, or of all that the rank owns."""


class Memo:
    """Answers for one rank.

    Args:
        here: the rank's coordinates in the mesh.
        name: the rolled mesh axis.
    """

    def __init__(self, here: Mapping[str, int], name: str) -> None:
        self.here = here
        self.name = name
        self._owned: dict[ir.Value, Box] = {}
        self._axes: dict[ir.Value, int | None] = {}
        self._needed: dict[tuple[ir.Node, int], tuple[tuple[_Axis, ...], Box]] = {}
        self._slices: dict[tuple[int, int, bool], tuple[Pieces, Pieces, tuple[slice, ...]]] = {}
        self._windows: dict[tuple[ir.Value, int, bool], tuple[Box | None, Window]] = {}
        self._partial: dict[tuple[ir.Node, int], tuple[tuple[Box, ...], Box | None, Sequence[tuple[int, str]]]] = {}

    def owned(self, value: ir.Value) -> Box:
        """What the rank holds of a value."""
        if value not in self._owned:
            self._owned[value] = dialect.get_layout(value).box(self.here)
        return self._owned[value]

    def axis(self, value: ir.Value) -> int | None:
        """The axis of a value that is rolled."""
        if value not in self._axes:
            self._axes[value] = rolled_axis(value, self.name)
        return self._axes[value]

    def slices(self, held: Pieces, wanted: Pieces, joined: bool) -> tuple[slice, ...]:
        """See `partitioner.geometry.local_slices`; an empty slice where nothing is wanted."""
        key = (id(held), id(wanted), joined)
        known = self._slices.get(key)
        if known is None:  # what is kept in the answer keeps its identity
            known = self._slices[key] = (held, wanted, local_slices(held, wanted, joined) or (slice(0, 0),))
        return known[2]

    def window(self, value: ir.Value, box: Box | None, joined: bool, make: Make) -> Window:
        """The window of a value that is not rolled: the same for the same box."""
        key = (value, id(box), joined)
        known = self._windows.get(key)
        if known is None:
            known = self._windows[key] = (box, make(value, box, joined))
        return known[1]

    def input_box(self, node: ir.Node, index: int, outs: tuple[Box, ...],
                  taken: Mapping[str, Pieces] | None) -> Box | None:
        """See `partitioner.ops.nodes.input_box`."""
        if taken is not None:
            return self._partial_box(node, index, outs, taken)
        if len(outs) != 1 or not outs[0] or dialect.get_partial(node):
            return input_box(node, index, outs, self.here, taken)
        needs, out = needs_of(node, 0)[index], outs[0]
        if needs is None:
            return None
        before = self._needed.get((node, index))
        given = [None if need.axis is None else out.axes[need.axis] for need in needs]
        if before is not None and all(a is b for a, (b, _) in zip(given, before[0], strict=True)):
            return before[1]
        known = before[0] if before is not None else [((), ())] * len(needs)
        axes = tuple([(parts, old[1] if before is not None and parts is old[0] else need_pieces(need, out))
                      for need, parts, old in zip(needs, given, known, strict=True)])
        box = Box(tuple([found for _, found in axes]))
        self._needed[node, index] = (axes, box)
        return box

    def _partial_box(self, node: ir.Node, index: int, outs: tuple[Box, ...], taken: Mapping[str, Pieces]) -> Box | None:
        """The cells of which a partial result is taken."""
        known = self._partial.get((node, index))
        if known is None or any(a is not b for a, b in zip(known[0], outs, strict=True)):
            splits = [(axis, split.mesh_axis) for axis, split in reduction_splits(node).get(index, {}).items()]
            known = self._partial[node, index] = (outs, input_box(node, index, outs, self.here), splits)
        _, box, splits = known
        if box is None:
            return None
        cells = {axis: taken[name] for axis, name in splits if name in taken}
        return Box(tuple([cells.get(axis, parts) for axis, parts in enumerate(box.axes)]))
