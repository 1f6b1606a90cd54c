"""Layouts as numbers: every layout and every split of an axis is on the page once."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from partitioner import dialect
from partitioner.layout import AxisLayout, Layout
from partitioner.mesh import spatial_names

DRAWN = 3
"""Axes of a value that are drawn at most."""


class Tables:
    """The layouts and splits that were asked for so far.

    Attributes:
        layouts: `{"shape", "axes": numbers of splits or None, "drawn": axes, "names": of the drawn axes}`.
        axes: `{"mesh": name of the mesh axis, "cuts": positions}`, or with `"parts"`, a flat list of starts and
            stops per coordinate, where shards overlap.
    """

    def __init__(self, model: ir.Model) -> None:
        ranks = [len(dialect.shape_of(v)) for v in model.graph.inputs if v.name not in model.graph.initializers]
        self._rank = max(ranks, default=0)
        self.layouts: list[dict[str, Any]] = []
        self.axes: list[dict[str, Any]] = []
        self._layouts: dict[Layout, int] = {}
        self._axes: dict[AxisLayout, int] = {}

    def number(self, layout: Layout) -> int:
        """The place of a layout in `layouts`."""
        if layout not in self._layouts:
            self._layouts[layout] = len(self.layouts)
            drawn = drawn_axes(layout)
            self.layouts.append({
                "shape": list(layout.shape), "axes": [None if a is None else self._axis(a) for a in layout.axes],
                "drawn": drawn, "names": [self._name(layout, axis) for axis in drawn]})
        return self._layouts[layout]

    def _axis(self, split: AxisLayout) -> int:
        if split not in self._axes:
            self._axes[split] = len(self.axes)
            cuts = split.cuts
            parts = [[end for i in part for end in (i.start, i.stop)] for part in split.parts]
            self.axes.append({"mesh": split.mesh_axis, "parts": parts} if cuts is None else
                             {"mesh": split.mesh_axis, "cuts": list(cuts)})
        return self._axes[split]

    def _name(self, layout: Layout, axis: int) -> str:
        split = layout.axes[axis]
        if split is not None:
            return split.mesh_axis
        rank = len(layout.shape)
        is_volume = rank == self._rank and 3 <= rank <= 5 and axis >= 2
        return spatial_names(rank - 2)[axis - 2] if is_volume else f"axis {axis}"


def drawn_axes(layout: Layout) -> list[int]:
    """The axes that make a picture: those behind the channels, the split and the long ones first; in order."""
    rank = len(layout.shape)
    spatial = list(range(2, rank)) if rank > 2 else [a for a in range(rank) if layout.axes[a] is not None]
    split = [a for a in spatial if layout.axes[a] is not None]
    rest = sorted((a for a in spatial if a not in split), key=lambda a: -layout.shape[a])
    return sorted([*split, *rest][:DRAWN])
