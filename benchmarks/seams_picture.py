"""The picture of `seams`: one slice as the whole volume and as windows give it, and how far each is from torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.phantom import CLASS_NAMES
from benchmarks.picture import Slice, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = ("#00000000", "#5b7fa680", "#e0703bb0", "#ffe14dd0", "#6fd08cb0")
_BORDER = "#35d6ff"
_LOWEST = 1e-7


def draw_seams(
    path: Path,
    scan: NDArray[np.int16],
    classes: Sequence[NDArray[np.uint8]],
    differences: Sequence[NDArray[np.float32]],
    borders: Sequence[int],
    place: Slice,
) -> Path:
    """Write a PNG of four panels: classes above, differences below; left the whole volume, right the windows.

    Args:
        path: the file to write.
        scan: Hounsfield units, (depth, height, width).
        classes: the class of every voxel, by the whole volume and by windows.
        differences: from torch on the whole volume, in deviations of its output, in the same order.
        borders: where windows begin or end, along each axis.
        place: the slice that is shown.

    Raises:
        OSError: when the path cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.5, 11), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    panels: Any = figure.subplots(2, 2, sharex=True, sharey=True)
    for panel, found, name in zip(panels[0], classes, ("WholeVolumeInferer", "SlidingWindowInferer"), strict=True):
        _draw_classes(panel, place.of(scan), place.of(found))
        panel.set_title(f"{name}: predicted class")
    flips = int((place.of(classes[0]) != place.of(classes[1])).sum())
    scale = LogNorm(_LOWEST, max(1.0, *(float(d.max()) for d in differences)))
    shown = None
    for panel, difference in zip(panels[1], differences, strict=True):
        part = place.of(difference)
        shown = panel.imshow(np.maximum(part, _LOWEST), cmap="magma", norm=scale)
        panel.set_title(f"difference from torch, whole: at most {part.max():.2g}")
    figure.colorbar(shown, ax=list(panels[1]), label="largest over classes, in deviations of the output", shrink=0.8)
    for panel in (panels[0][1], panels[1][1]):
        for border in borders:
            panel.axhline(border - 0.5, color=_BORDER, linewidth=0.9, linestyle="--")
            panel.axvline(border - 0.5, color=_BORDER, linewidth=0.9, linestyle="--")
    figure.suptitle(f"depth {place.index}: {flips} of {classes[0][0].size} labels differ; dashed: where windows begin "
                    "or end")
    return save(figure, path)


def _draw_classes(panel: Axes, scan: NDArray[np.int16], classes: NDArray[np.uint8]) -> None:
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    panel.imshow(scan, cmap="gray", vmin=-160, vmax=240)
    panel.imshow(classes, cmap=ListedColormap(_COLOURS), vmin=-0.5, vmax=len(_COLOURS) - 0.5, interpolation="nearest")
    patches = [Patch(color=c, label=n) for c, n in zip(_COLOURS[1:], CLASS_NAMES[1:], strict=True)]
    panel.legend(handles=patches, loc="lower right", framealpha=0.9)
