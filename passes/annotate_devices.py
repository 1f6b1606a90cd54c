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

import itertools
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from partitioner import dialect
from partitioner.layout import Layout
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
        for node in model.graph:
            values = () if dialect.get_partial(node) else filter(dialect.has_layout, node.outputs)
            specs = tuple(sharding(value, mesh) for value in values)
            node.device_configurations = (ir.NodeDeviceConfiguration(devices, specs),)


def sharding(value: ir.Value, mesh: Mesh) -> ir.ShardingSpec:
    """How a value lies on the mesh: shards in row-major order of the split axes, each on a rank or a group."""
    layout = dialect.get_layout(value)
    groups = _groups(layout, mesh)
    devices = tuple(group[0] if len(group) == 1 else -1 - i for i, group in enumerate(groups))
    replicas = tuple(ir.IndexToDeviceGroupMapEntry(-1 - i, group)
                     for i, group in enumerate(groups) if len(group) > 1)
    dims = tuple(
        ir.ShardedDim(axis, (ir.SimpleShardedDim(layout.shape[axis], len(split.parts)),))
        for axis, split in enumerate(layout.axes) if split is not None
    )
    return ir.ShardingSpec(value, devices, replicas, dims)


def _groups(layout: Layout, mesh: Mesh) -> list[tuple[int, ...]]:
    """For every shard, in order, the ranks that hold it."""
    names = [split.mesh_axis for split in layout.axes if split is not None]
    places = [mesh.coordinates(rank) for rank in mesh]
    shards = itertools.product(*(range(mesh.count(name)) for name in names))
    return [tuple(rank for rank, place in enumerate(places) if tuple(place[n] for n in names) == shard)
            for shard in shards]
