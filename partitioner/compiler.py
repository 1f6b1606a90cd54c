"""From a model to a plan: the standard pipeline, and the way back to the plain model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import onnx_ir as ir
import onnx_ir.passes.common as library

from partitioner import dialect
from partitioner.errors import PartitionError
from partitioner.garbage import kept_for_later
from partitioner.layout import Cuts
from partitioner.loader import save_model
from partitioner.mesh import Mesh
from passes.annotate_devices import AnnotateDevices
from passes.assign_shards import AssignShards
from passes.base import Pass
from passes.canonicalize import Canonicalize
from passes.deepen_halos import DeepenHalos
from passes.insert_halo_exchanges import InsertHaloExchanges
from passes.insert_reshards import InsertReshards
from passes.join_exchanges import JoinExchanges
from passes.keep_apart import KeepApart
from passes.merge_exchanges import MergeExchanges
from passes.overlap_halos import OverlapHalos
from passes.pipeline import Observer, Pipeline
from passes.prepare_training import PrepareTraining
from passes.read_parts import ReadParts
from passes.schedule import Schedule
from passes.split_reductions import SplitReductions

Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class DepthFirst:
    """How ranks go through their shards.

    Args:
        axis: the mesh axis along which they go slab by slab; `partitioner.schedules` chooses how thick slabs are.
        strips: shards along other mesh axes that one rank takes one after the other, as (mesh axis, count).
        recomputed: values whose halos every strip computes itself; None for all for which that can be done.
    """

    axis: str
    strips: tuple[tuple[str, int], ...] = ()
    recomputed: frozenset[str] | None = None

    @property
    def strip_axes(self) -> tuple[str, ...]:
        """The mesh axes of the strips."""
        return tuple(name for name, _ in self.strips)


@dataclass(frozen=True)
class Steering:
    """What is decided about a plan beside its mesh and cuts: by the planner, or by the user.

    Args:
        pinned: nodes that are computed by all ranks along some mesh axes, by name with these axes.
        deepened: values of which ranks compute the halos themselves instead of exchanging them; None for all for which
            that can be done.
        overlapped: halo exchanges whose messages travel while an interior is computed; None for all that can.
        joined: whether exchanges of several values share their messages.
    """

    pinned: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    deepened: frozenset[str] | None = frozenset()
    overlapped: frozenset[str] | None = frozenset()
    joined: bool = True


Purpose = Literal["inference", "evaluation", "training"]
"""What a plan is for: inference folds weights together, evaluation keeps them as the file has them (for a module
that also trains), training replaces layers by what they do in training."""


def standard_pipeline(mesh: Mesh, shapes: Shapes, cuts: Mapping[str, Cuts], strict: bool = False,
                      purpose: Purpose = "inference", order: DepthFirst | None = None,
                      steering: Steering | None = None) -> Pipeline:
    """The passes that make a plan, in order."""
    steering = steering or Steering()
    rolled, strips = (None, ()) if order is None else (order.axis, order.strip_axes)
    if order is not None:
        mesh = Mesh.parse({**dict(mesh.axes), **dict(order.strips)})
    return Pipeline((
        Canonicalize(shapes, strict, fold_norms=purpose == "inference"),
        KeepApart(mesh, trains=purpose != "inference"),
        *((ReadParts(frozenset(steering.pinned)),) if purpose == "inference" else ()),
        *((PrepareTraining(),) if purpose == "training" else ()),
        AssignShards(mesh, cuts, () if rolled is None else (rolled,), steering.pinned),
        InsertReshards(),
        SplitReductions(),
        *((DeepenHalos(mesh.names, steering.deepened),) if steering.deepened != frozenset() else ()),
        *((DeepenHalos(strips, order.recomputed),) if order is not None and strips else ()),
        InsertHaloExchanges(),
        MergeExchanges(),
        Schedule(rolled=rolled, strips=strips),
        *((OverlapHalos(steering.overlapped),) if steering.overlapped != frozenset() else ()),
        *((JoinExchanges(),) if purpose == "inference" and steering.joined else ()),
        AnnotateDevices(),
    ))


def compile_plan(source: ir.Model, mesh: Mesh, shapes: Shapes, cuts: Mapping[str, Cuts],  # noqa: PLR0913
                 dump_dir: Path | None = None, strict: bool = False, purpose: Purpose = "inference",
                 order: DepthFirst | None = None, steering: Steering | None = None) -> ir.Model:
    """A plan of a model; the model itself stays as it is.

    Args:
        dump_dir: folder for a numbered ONNX file after every pass.
        strict: refuse operators that have no sharded rule.
        purpose: see `Purpose`.
        order: how ranks go through their shards when not all at once.
        steering: what is decided beside mesh and cuts.

    Raises:
        PartitionError: when the model cannot be kept exact on this mesh with these extents.
    """
    observers: list[Observer] = [] if dump_dir is None else [_dumper(dump_dir)]
    return standard_pipeline(mesh, shapes, cuts, strict, purpose, order, steering).run(source.clone(), observers)


@dataclass(frozen=True)
class Prepared:
    """A model as far as no mesh is needed, to be laid out many times; see `prepare`.

    Args:
        model: after `canonicalize`; stays as it is.
    """

    model: ir.Model
    shapes: Shapes
    strict: bool
    purpose: Purpose

    @kept_for_later()
    def lay_out(self, mesh: Mesh, cuts: Mapping[str, Cuts] | None = None, order: DepthFirst | None = None,
                steering: Steering | None = None) -> ir.Model:
        """The plan for a mesh: what `compile_plan` makes of the source.

        Raises:
            PartitionError: when the model cannot be kept exact on this mesh.
        """
        passes = standard_pipeline(mesh, self.shapes, cuts or {}, self.strict, self.purpose, order, steering)
        return passes.run(self.model.clone(), begin=_MESHLESS, verify="last")


_MESHLESS = 1
"""Passes of the standard pipeline, its first, that know nothing of the mesh."""


def prepare(source: ir.Model, shapes: Shapes, strict: bool = False, purpose: Purpose = "inference") -> Prepared:
    """Do once what all meshes have in common; the arguments are those of `compile_plan`.

    Raises:
        PartitionError: when the model cannot be kept exact with these extents, whatever the mesh.
    """
    passes = standard_pipeline(Mesh(()), shapes, {}, strict, purpose)
    return Prepared(passes.run(source.clone(), end=_MESHLESS), shapes, strict, purpose)


def _dumper(folder: Path) -> Callable[[int, Pass, ir.Model], None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PartitionError(f"{folder}: cannot be made ({error.strerror}); choose another --dump-dir") from None

    def dump(index: int, item: Pass, model: ir.Model) -> None:
        save_model(model.clone(), folder / f"{index:02d}-{item.name}.onnx")

    return dump


def plain_model(plan: ir.Model) -> ir.Model:
    """The unpartitioned model in a plan: our nodes replaced by their global meaning, layouts dropped."""
    model = plan.clone()
    _join_norms(model)
    library.InlinePass()(model)
    model.functions.clear()
    model.graph.opset_imports.pop(dialect.DOMAIN, None)
    model.device_configurations = ()
    for key in [k for k in model.metadata_props if k.startswith("partitioner.")]:
        del model.metadata_props[key]
    for node in model.graph:
        node.device_configurations = ()
        _strip(node)
        for value in node.outputs:
            _strip(value)
    for value in model.graph.inputs:
        _strip(value)
    return model


def _join_norms(model: ir.Model) -> None:
    """Moments, their merge and Normalize become the InstanceNormalization that they were split from."""
    for node in list(model.graph):
        if node.domain != dialect.DOMAIN or node.op_type != dialect.NORMALIZE:
            continue
        x, _, mean, _, scale, bias = node.inputs
        assert x is not None
        if not _are_moments_of_space(mean, len(dialect.shape_of(x))):
            continue  # of groups, or of the batch: the nodes are plain as they are
        epsilon = float(dialect.attributes_of(node)["epsilon"])
        joined = ir.Node("", "InstanceNormalization", [x, scale, bias], [ir.AttrFloat32("epsilon", epsilon)],
                         outputs=[ir.Value(name=f"{node.name}/joined")], name=f"{node.name}/joined")
        model.graph.insert_before(node, joined)
        old, new = node.outputs[0], joined.outputs[0]
        new.shape, new.type = old.shape, old.type
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        model.graph.remove(node, safe=True)
        new.name = old.name
    library.RemoveUnusedNodesPass()(model)


def _are_moments_of_space(mean: ir.Value | None, rank: int) -> bool:
    """Whether a mean is merged from moments over the spatial axes alone."""
    merge = None if mean is None else mean.producer()
    if merge is None or merge.op_type != dialect.ALL_REDUCE_MOMENTS or merge.inputs[1] is None:
        return False
    source = merge.inputs[1].producer()
    return source is not None and list(dialect.attributes_of(source)["axes"]) == list(range(2, rank))


def _strip(item: ir.Node | ir.Value) -> None:
    for key in [k for k in item.metadata_props if k.startswith("partitioner.")]:
        del item.metadata_props[key]
    item.meta.clear()
