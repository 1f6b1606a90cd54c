"""The demo's picture: one slice of the scan, its predicted classes, and where the shards lie."""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_AXIS_NAMES = ("depth", "height", "width")
_COLOURS = ("#00000000", "#5b7fa680", "#e0703bb0", "#ffe14dd0", "#6fd08cb0")
_WINDOW_HU = (-160, 240)


@dataclass(frozen=True)
class Slice:
    """One index along one axis; the other two axes, vertical first, are seen."""

    axis: int
    index: int

    @property
    def seen(self) -> tuple[int, int]:
        """The vertical and the horizontal axis."""
        vertical, horizontal = (a for a in range(3) if a != self.axis)
        return vertical, horizontal

    def of(self, volume: NDArray[Any]) -> NDArray[Any]:
        """The slice of a volume of shape (depth, height, width)."""
        return np.take(volume, self.index, axis=self.axis)


def choose_slice(classes: NDArray[np.uint8], cuts: Sequence[Sequence[int]]) -> Slice:
    """The slice across the least split axis, so that most borders are seen, with most of every class."""
    axis = min((2, 1, 0), key=lambda a: len(cuts[a]))
    others = tuple(a for a in range(3) if a != axis)
    kinds = range(int(classes.max()) + 1)
    score = sum(np.sqrt((classes == kind).sum(axis=others)) for kind in kinds)
    return Slice(axis, int(np.argmax(score)))


def draw(
    path: str | os.PathLike[str],
    scan: NDArray[np.int16],
    classes: NDArray[np.uint8],
    class_names: Sequence[str],
    cuts: Sequence[Sequence[int]],
    spacing: Sequence[float],
    title: str,
) -> Path:
    """Write a PNG of two panels, the scan and the classes over it, both with the shards' borders.

    Args:
        path: the file to write.
        scan: Hounsfield units, (depth, height, width).
        classes: the class of every voxel, (depth, height, width).
        class_names: the name of each class.
        cuts: per axis, ascending from 0 to the extent; ranks count row-major over the shards.
        spacing: millimetres per voxel along each axis.
        title: one or two lines above the panels.

    Raises:
        ImportError: without matplotlib.
        OSError: when the path cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    place = choose_slice(classes, cuts)
    figure = Figure(figsize=(12, 6.8), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    style = _Style(
        aspect=spacing[place.seen[0]] / spacing[place.seen[1]],
        origin="lower" if place.seen[0] == 0 else "upper",  # the head is at the high end of depth
    )
    for panel in (left, right):
        _draw_scan(panel, place.of(scan), style)
        _draw_borders(panel, cuts, place)
    _draw_classes(right, place.of(classes), class_names, style)
    low, high = _WINDOW_HU
    left.set_title(f"scan, {_AXIS_NAMES[place.axis]} {place.index} (Hounsfield units {low} to {high})")
    right.set_title("predicted class, computed by the shards")
    figure.suptitle(title)
    return save(figure, Path(path))


@dataclass(frozen=True)
class _Style:
    """How a slice is laid on the page."""

    aspect: float
    origin: Literal["lower", "upper"]


def _draw_scan(panel: Axes, scan: NDArray[np.int16], style: _Style) -> None:
    low, high = _WINDOW_HU
    panel.imshow(scan, cmap="gray", vmin=low, vmax=high, aspect=style.aspect, origin=style.origin)


def _draw_classes(panel: Axes, classes: NDArray[np.uint8], class_names: Sequence[str], style: _Style) -> None:
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    panel.imshow(
        classes,
        cmap=ListedColormap(_COLOURS),
        vmin=-0.5,
        vmax=len(_COLOURS) - 0.5,
        aspect=style.aspect,
        origin=style.origin,
        interpolation="nearest",
    )
    patches = [Patch(color=c, label=n) for c, n in zip(_COLOURS[1:], class_names[1:], strict=True)]
    panel.legend(handles=patches, loc="lower right", framealpha=0.9)


def _draw_borders(panel: Axes, cuts: Sequence[Sequence[int]], place: Slice) -> None:
    """Dashed lines between the shards, the cuts as ticks, and the rank in the corner of each shard."""
    vertical, horizontal = place.seen
    for cut in cuts[vertical][1:-1]:
        panel.axhline(cut - 0.5, color="#35d6ff", linewidth=1.4, linestyle="--")
    for cut in cuts[horizontal][1:-1]:
        panel.axvline(cut - 0.5, color="#35d6ff", linewidth=1.4, linestyle="--")
    panel.set_yticks([cut - 0.5 for cut in cuts[vertical]], [str(cut) for cut in cuts[vertical]])
    panel.set_xticks([cut - 0.5 for cut in cuts[horizontal]], [str(cut) for cut in cuts[horizontal]])
    panel.set_ylabel(_AXIS_NAMES[vertical])
    panel.set_xlabel(_AXIS_NAMES[horizontal])
    for rank, box in enumerate(product(*(pairwise(axis) for axis in cuts))):
        start, stop = box[place.axis]
        if not start <= place.index < stop or any(a == b for a, b in box):
            continue
        panel.annotate(
            f"rank {rank}",
            ((box[horizontal][0] + box[horizontal][1]) / 2, (box[vertical][0] + box[vertical][1]) / 2),
            xytext=(0, 0), textcoords="offset points", color="#35d6ff", fontsize=9, ha="center", va="center",
            bbox={"boxstyle": "round,pad=0.2", "facecolor": "#000000a0", "edgecolor": "none"},
        )  # fmt: skip


def save(figure: Figure, target: Path) -> Path:
    """Write a figure as PNG, and leave no half-written file behind.

    Raises:
        OSError: when the path cannot be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{uuid.uuid4().hex}.png")
    try:
        figure.savefig(beside, dpi=110)
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)
    return target
