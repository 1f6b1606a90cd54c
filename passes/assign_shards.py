"""assign-shards: every value gets a layout; the layouts follow the data.

    before                             after
    x (1,1,121,...)                    x [1, 1, depth(0|61|121), ...]
    y = Conv(x)  stride 2              y [1, 8, depth(0|31|61), ...]
    u = ConvTranspose(y)               u [1, 8, depth(0|61|121), ...]   as the skip that it joins
    z = Concat(u, skip)                z [1, 16, depth(0|61|121), ...]

Axes that must correspond cell by cell (pointwise operators, concatenations beside their axis) form one
class and share their cuts, so that they need no re-layout; the first value of a class in the graph's
order decides, by following the cuts of its operator's input.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import networkx as nx
import onnx_ir as ir

from partitioner import dialect
from partitioner.axes import named_axes
from partitioner.errors import refuse_all
from partitioner.layout import AxisLayout, Cuts, Layout, even_cuts
from partitioner.mesh import Mesh
from partitioner.ops.base import Need
from partitioner.ops.nodes import needs_of, operator_of, separable_axes
from passes.base import Check, Pass
from passes.checks import COVER, KNOWN, LAID_OUT, STATIC

AxisKey = tuple[str, int]
"""A value's name and one of its axes."""


@dataclass(frozen=True)
class AssignShards(Pass):
    """Lay out every value over a mesh.

    Args:
        mesh: the mesh of ranks.
        cuts: the user's own cuts of the inputs' axes, by mesh axis; even ones otherwise.
        rolled: mesh axes of one rank that are laid out all the same, because a rank goes along them slab by slab.
        pinned: nodes that are computed by all ranks along some mesh axes, by name with these axes.
    """

    name: ClassVar[str] = "assign-shards"
    requires: ClassVar[tuple[Check, ...]] = (STATIC, KNOWN)
    ensures: ClassVar[tuple[Check, ...]] = (LAID_OUT, COVER)

    mesh: Mesh
    cuts: Mapping[str, Cuts] = field(default_factory=dict[str, Cuts])
    rolled: tuple[str, ...] = ()
    pinned: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])

    def apply(self, model: ir.Model) -> None:
        mesh = self.mesh.with_axes(self.rolled)
        seeds = seed_layouts(model, mesh, self.cuts, self.rolled)
        dialect.set_mesh(model, mesh)
        classes = _axis_classes(model)
        decided: dict[AxisKey, AxisLayout] = {}
        for value in model.graph.inputs:
            for axis, split in enumerate(seeds[str(value.name)]):
                root = classes.get((str(value.name), axis), (str(value.name), axis))
                if split is not None:
                    decided.setdefault(root, split)
            _assign(value, classes, decided)
        for node in model.graph:
            for output, value in enumerate(node.outputs):
                _follow(node, output, value, classes, decided)
                _assign(value, classes, decided, separable_axes(node, output))
        _pin(model, self.pinned)


def seed_layouts(model: ir.Model, mesh: Mesh, cuts: Mapping[str, Cuts],
                 rolled: Collection[str] = ()) -> dict[str, list[AxisLayout | None]]:
    """How the inputs' batch and spatial axes lie on the mesh.

    The user's cuts hold for the inputs of their extent, other inputs get even ones; an input with fewer
    cells than ranks (a vector that is broadcast) is not split if another one has enough.

    Raises:
        PartitionError: when an axis of the mesh finds no axis to split, or has more ranks than there are cells.
    """
    problems: list[str] = []
    seeds: dict[str, list[AxisLayout | None]] = {
        str(v.name): [None] * len(dialect.shape_of(v)) for v in model.graph.inputs}
    named = named_axes(model)
    for name, count in mesh.axes:
        if count == 1 and name not in rolled:
            continue
        places = [(str(v.name), axis, dialect.shape_of(v)[axis]) for v in model.graph.inputs
                  for found, axis in named[str(v.name)].items() if found == name]
        if not places:
            ranks = ", ".join(f"{v.name} {list(dialect.shape_of(v))}" for v in model.graph.inputs)
            problems.append(f"mesh axis {name}={count}: no input has such an axis ({ranks}); "
                            f"use the axes {', '.join(_all_names(named)) or 'of another model'}")
        given = cuts.get(name)
        for value, axis, n in [p for p in places if p[2] >= count] or places:
            fits = given is not None and (given[-1:] == (n,) or all(given[-1:] != (m,) for _, _, m in places))
            chosen = given if given is not None and fits else even_cuts(n, count)
            problem = _cuts_problem(value, axis, n, name, count, chosen)
            if problem is None:
                seeds[value][axis] = AxisLayout.from_cuts(name, chosen)
            else:
                problems.append(problem)
    for name in cuts:
        if mesh.count(name) == 1:
            problems.append(f"cuts of {name}: the mesh does not split that axis; add {name}=N to the mesh")
    refuse_all(problems)
    return seeds


def _all_names(named: Mapping[str, Mapping[str, int]]) -> list[str]:
    return sorted({name for axes in named.values() for name in axes})


def _cuts_problem(value: str, axis: int, n: int, name: str, shards: int, cuts: Cuts) -> str | None:
    if shards > n:
        return (f"mesh axis {name}={shards}: axis {axis} of input '{value}' has only {n} cells; "
                f"use at most {name}={n}")
    if len(cuts) != shards + 1 or cuts[0] != 0 or cuts[-1] != n or list(cuts) != sorted(cuts):
        return (f"cuts of {name} {list(cuts)}: {shards} shards of axis {axis} of input '{value}' need "
                f"{shards - 1} ascending positions between 0 and {n}")
    return None


def _axis_classes(model: ir.Model) -> dict[AxisKey, AxisKey]:
    """Every axis to the representative of the class of axes that correspond cell by cell."""
    links: nx.Graph[AxisKey] = nx.Graph()
    for node in model.graph:
        for output, result in enumerate(node.outputs):
            for value, axis, need in _needs(node, output):
                if need.axis is not None and need.map.corresponds:
                    links.add_edge((str(value.name), axis), (str(result.name), need.axis))
    found: dict[AxisKey, AxisKey] = {}
    for component in nx.connected_components(links):
        representative = min(component)
        found |= dict.fromkeys(component, representative)
    return found


def _needs(node: ir.Node, output: int) -> list[tuple[ir.Value, int, Need]]:
    """(input value, its axis, need) for the data inputs of an output."""
    operator = operator_of(node)
    if output >= len(operator.outputs):
        return []
    return [
        (value, axis, need)
        for value, needs in zip(node.inputs, needs_of(node, output), strict=False)
        if value is not None and needs is not None and value.const_value is None
        for axis, need in enumerate(needs)
    ]


def _follow(node: ir.Node, output: int, value: ir.Value, classes: Mapping[AxisKey, AxisKey],
            decided: dict[AxisKey, AxisLayout]) -> None:
    """Decide the cuts of an output's axes that no earlier value of their class has decided."""
    for source, axis, need in _needs(node, output):
        if need.axis is None or (need.is_whole and not need.map.corresponds):
            continue
        root = classes.get((str(value.name), need.axis), (str(value.name), need.axis))
        split = dialect.get_layout(source).axes[axis]
        if root in decided or split is None or split.cuts is None:
            continue
        decided[root] = split.followed(need.map)


def _assign(value: ir.Value, classes: Mapping[AxisKey, AxisKey], decided: Mapping[AxisKey, AxisLayout],
            separable: frozenset[int] | None = None) -> None:
    """Lay out a value as its axes' classes say, as far as they are separable; a mesh axis splits one axis only."""
    if value.shape is None:
        return
    shape = dialect.shape_of(value)
    axes: list[AxisLayout | None] = []
    for axis in range(len(shape)):
        split = decided.get(classes.get((str(value.name), axis), (str(value.name), axis)))
        split = split if separable is None or axis in separable else None
        taken = {a.mesh_axis for a in axes if a is not None}
        axes.append(None if split is None or split.mesh_axis in taken else split)
    dialect.set_layout(value, Layout(shape, tuple(axes)))


def _pin(model: ir.Model, pinned: Mapping[str, tuple[str, ...]]) -> None:
    """Take mesh axes out of the layouts of some nodes' results, after all others have been found as without.

    Raises:
        PartitionError: for a name that no node has.
    """
    nodes = {str(node.name): node for node in model.graph}
    refuse_all([f"pinned node '{name}': the network has no node of this name, as it is laid out; `partition plan` "
                "lists the names" for name in pinned if name not in nodes])
    for name, mesh_axes in pinned.items():
        for value in nodes[name].outputs:
            if dialect.has_layout(value):
                layout = dialect.get_layout(value)
                axes = tuple(None if a is not None and a.mesh_axis in mesh_axes else a for a in layout.axes)
                dialect.set_layout(value, Layout(layout.shape, axes))


def assign_new(node: ir.Node) -> None:
    """Lay out the outputs of a node that a later pass has put in, following its inputs."""
    operator = operator_of(node)
    for output, value in enumerate(node.outputs[: len(operator.outputs)]):
        shape = operator.outputs[output].shape
        axes: list[AxisLayout | None] = [None] * len(shape)
        for source, axis, need in _needs(node, output):
            split = dialect.get_layout(source).axes[axis]
            taken = {a.mesh_axis for a in axes if a is not None}
            if need.axis is None or split is None or split.cuts is None or split.mesh_axis in taken:
                continue
            axes[need.axis] = axes[need.axis] or split.followed(need.map)
        dialect.set_layout(value, Layout(shape, tuple(axes)))


