"""Other cuts than even ones: at multiples of the network's strides, or where every shard takes as long."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from partitioner import dialect
from partitioner.axes import axis_extents, named_axes
from partitioner.layout import Cuts, even_cuts
from partitioner.mesh import Mesh
from partitioner.timing import PlanTime


def extents_of(model: ir.Model) -> dict[str, int]:
    """Cells along every axis that a mesh can split, of the input with most axes."""
    shapes = {str(v.name): dialect.shape_of(v) for v in model.graph.inputs}
    return axis_extents(named_axes(model), shapes)


def strides_of(model: ir.Model) -> dict[str, int]:
    """By mesh axis how many cells of the input the coarsest value has one for.

    Args:
        model: laid out along every axis that a mesh can split.
    """
    extents, found = extents_of(model), dict.fromkeys(extents_of(model), 1)
    for node in model.graph:
        for value in node.outputs:
            layout = dialect.get_layout(value)
            for n, split in zip(layout.shape, layout.axes, strict=True):
                if split is not None and 1 < n < extents[split.mesh_axis]:
                    found[split.mesh_axis] = max(found[split.mesh_axis], round(extents[split.mesh_axis] / n))
    return found


def aligned_cuts(mesh: Mesh, extents: Mapping[str, int], strides: Mapping[str, int]) -> dict[str, Cuts]:
    """Cuts at the multiples of the strides that are nearest to even ones; axes left out where there is no other."""
    found: dict[str, Cuts] = {}
    for name, count in mesh.axes:
        even, step = even_cuts(extents[name], count), strides.get(name, 1)
        if count > 1 and step > 1 and extents[name] >= count * step:
            cuts = _ascending([step * round(cut / step) for cut in even[1:-1]], step, extents[name])
            if cuts is not None and cuts != even:
                found[name] = cuts
    return found


def balanced_cuts(time: PlanTime, cuts: Mapping[str, Cuts], strides: Mapping[str, int]) -> dict[str, Cuts]:
    """Cuts between which all shards compute as long, if every shard's time is spread evenly over its cells.

    Args:
        time: forecast with these cuts.
        cuts: of every split axis.
    """
    mesh, compute = time.mesh, time.compute
    found: dict[str, Cuts] = {}
    for axis, (name, count) in enumerate(mesh.axes):
        if count == 1:
            continue
        others = tuple(a for a in range(len(mesh.shape)) if a != axis)
        seconds = compute.max(axis=others) if others else compute
        passed = np.concatenate([[0.0], np.cumsum(seconds)])
        inner = np.interp(passed[-1] * np.arange(1, count) / count, passed, cuts[name])
        step = strides.get(name, 1) if cuts[name][-1] >= 4 * count * strides.get(name, 1) else 1
        moved = _ascending([step * round(float(cut) / step) for cut in inner], step, cuts[name][-1])
        if moved is not None and moved != tuple(cuts[name]):
            found[name] = moved
    return found


def _ascending(inner: list[int], step: int, extent: int) -> Cuts | None:
    """The positions as cuts when no shard is empty."""
    cuts = (0, *inner, extent)
    return cuts if all(b > a for a, b in itertools.pairwise(cuts)) and step > 0 else None
