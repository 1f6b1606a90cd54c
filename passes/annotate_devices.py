"""annotate-devices: ONNX's own multi-device annotation on the plan's nodes, for other tools to read.

    before                                    after
    y = Conv(h)  depth(0|61|121), 4 ranks     y = Conv(h)
                                                  devices [-1, -2]   -1: ranks 0, 1   -2: ranks 2, 3
                                                  axis 2: 121 cells in 2 shards

A projection that this toolkit never reads back: ONNX knows a number of equal shards per axis, so the exact
cuts and the halos stay in the layouts alone; a halo exchange's result is annotated as the shards to
which its halos belong, and partial results, which ONNX cannot name, are left out.  The annotation needs
IR version 11, which onnxruntime reads from 1.23 on.  It lists ranks, so a mesh of more than 64 is left
without it (a plan does not grow with the mesh), and so is a mesh of one rank, which has nothing to say.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from partitioner import dialect
from partitioner.mesh import Mesh
from passes.base import Check, Pass
from passes.checks import LAID_OUT

LARGEST = 64
IR_VERSION = 11
CONFIGURATION = "mesh"


@dataclass(frozen=True)
class AnnotateDevices(Pass):
    """Describe every node's outputs as sharded over devices, one device per rank."""

    name: ClassVar[str] = "annotate-devices"
    requires: ClassVar[tuple[Check, ...]] = (LAID_OUT,)

    def apply(self, model: ir.Model) -> None:
        mesh = dialect.get_mesh(model)
        model.device_configurations = ()
        for node in model.graph:
            node.device_configurations = ()
        if not 1 < mesh.size <= LARGEST:
            return
        devices = model.add_device_configuration(CONFIGURATION, device_names=[f"rank{rank}" for rank in mesh])
        model.ir_version = max(model.ir_version, IR_VERSION)
        places = functools.cache(lambda names: _places(names, mesh))
        for node in model.graph:
            values = () if dialect.get_partial(node) else filter(dialect.has_layout, node.outputs)
            specs = tuple(_sharding(value, places) for value in values)
            node.device_configurations = (ir.NodeDeviceConfiguration(devices, specs),)


Places = tuple[tuple[int, ...], tuple[ir.IndexToDeviceGroupMapEntry, ...]]
"""Per shard a rank, or the negative number of a group of ranks; and the groups."""


def _sharding(value: ir.Value, places: Callable[[tuple[str, ...]], Places]) -> ir.ShardingSpec:
    """How a value lies on the mesh: shards in row-major order of the split axes, each on a rank or a group."""
    layout = dialect.get_layout(value)
    devices, replicas = places(tuple(split.mesh_axis for split in layout.axes if split is not None))
    dims = tuple(
        ir.ShardedDim(axis, (ir.SimpleShardedDim(layout.shape[axis], len(split.parts)),))
        for axis, split in enumerate(layout.axes) if split is not None
    )
    return ir.ShardingSpec(value, devices, replicas, dims)


def _places(names: tuple[str, ...], mesh: Mesh) -> Places:
    """Where the shards of values lie that are split along these mesh axes."""
    held: dict[tuple[int, ...], list[int]] = {}
    for rank in mesh:
        here = mesh.coordinates(rank)
        held.setdefault(tuple(here[name] for name in names), []).append(rank)
    groups = [tuple(ranks) for _, ranks in sorted(held.items())]
    devices = tuple(group[0] if len(group) == 1 else -1 - i for i, group in enumerate(groups))
    return devices, tuple(ir.IndexToDeviceGroupMapEntry(-1 - i, group)
                          for i, group in enumerate(groups) if len(group) > 1)
