"""What the tests hold results against: onnxruntime, the float64 reference, lock-step runs full of NaN.

    reference64(model, inputs)            the unsharded graph in float64, by numpy alone
    run_ort(model, inputs)                onnxruntime on the unsharded graph
    compile_plan(model, mesh, cuts=...)   all passes
    run_lockstep(plan, inputs)            all ranks in one process, buffers poisoned, cells and bytes counted
    error(a, b)                           max|a-b| / max|b|, at least 4 eps
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from onnx import TensorProto, numpy_helper

from partitioner import dialect
from partitioner.cost import plan_cost
from partitioner.loader import load_model
from partitioner.mesh import Mesh
from partitioner.ops.dtypes import torch_dtype
from passes.assign_shards import AssignShards
from passes.canonicalize import Canonicalize
from passes.deepen_halos import DeepenHalos
from passes.insert_halo_exchanges import InsertHaloExchanges
from passes.insert_reshards import InsertReshards
from passes.join_exchanges import JoinExchanges
from passes.keep_apart import KeepApart
from passes.merge_exchanges import MergeExchanges
from passes.pipeline import Observer, Pipeline
from passes.read_parts import ReadParts
from passes.schedule import Schedule, Storage
from passes.split_reductions import SplitReductions
from runtime.executor import Executor, Shard, make_shards
from runtime.feeds import ArrayFeed, Portion
from runtime.program import localise
from runtime.transports.lockstep import Lockstep
from tests.reference import reference64

__all__ = ["Run", "as_double", "close", "compile_plan", "error", "ort_bits", "pipeline", "reference64",
           "run_lockstep", "run_ort"]

Array = np.ndarray
Cuts = Mapping[str, Sequence[int]]


def error(found: Array, reference: Array) -> float:
    """max|found - reference| / max|reference|, at least 4 eps of the type found; infinite for NaN and wrong shapes."""
    if found.shape != reference.shape:
        return float("inf")
    floor = 4 * float(np.finfo(found.dtype).eps) if found.dtype.kind == "f" else 0.0
    difference = np.abs(found.astype(np.float64) - reference.astype(np.float64)).max(initial=0.0)
    if not np.isfinite(difference):
        return float("inf")
    scale = float(np.abs(reference.astype(np.float64)).max(initial=0.0))
    return max(floor, float(difference) / scale if scale else float(difference))


def close(found: Array, reference: Array, limit: float) -> bool:
    """Whether the error is below the limit, cells that are not finite alike in both."""
    if found.shape == reference.shape and found.dtype.kind == "f":
        odd = ~np.isfinite(reference)
        if not np.array_equal(found[odd], reference[odd].astype(found.dtype), equal_nan=True):
            return False
        found, reference = np.where(odd, 0, found), np.where(odd, 0, reference)
    return error(found, reference) <= limit


# --- onnxruntime -------------------------------------------------------------------------------------


def run_ort(model: onnx.ModelProto, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Outputs of onnxruntime, graph optimisations off and one thread, so that bits can be compared."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(inputs)), strict=True))


def ort_bits(model: ir.Model, inputs: Mapping[str, Array]) -> dict[str, bytes]:
    """The bits of every output of a model or plan, which must also satisfy the checker."""
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    return {name: array.tobytes() for name, array in run_ort(proto, inputs).items()}


def as_double(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model with float64 where it has float32; the scales and roi of resizes stay as they are."""
    double = onnx.ModelProto()
    double.CopyFrom(model)
    graph = double.graph
    fixed = {name for n in graph.node if n.op_type in ("Resize", "Upsample") for name in n.input[1:]}
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and tensor.name not in fixed:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name))
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = TensorProto.DOUBLE
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
                attribute.i = TensorProto.DOUBLE
        if node.op_type == "LayerNormalization":  # its statistics are outputs too
            kept = [a for a in node.attribute if a.name != "stash_type"]
            del node.attribute[:]
            node.attribute.extend([*kept, onnx.helper.make_attribute("stash_type", TensorProto.DOUBLE)])
    return double


# --- plans and lock-step runs ------------------------------------------------------------------------


def pipeline(mesh: Mesh, cuts: Cuts | None = None, shapes: Mapping[str, Sequence[int]] | None = None,
             storage: Storage = "channels_last", rolled: str | None = None, thickness: int = 1,
             deepened: tuple[str, ...] = (), strips: tuple[str, ...] = (),
             pinned: Mapping[str, tuple[str, ...]] | None = None) -> Pipeline:
    """All passes."""
    chosen = {name: tuple(positions) for name, positions in (cuts or {}).items()}
    axes = () if rolled is None else (rolled,)
    return Pipeline((Canonicalize(shapes or {}), KeepApart(mesh), ReadParts(pinned or (), fewest=1),
                     AssignShards(mesh, chosen, axes, pinned or {}), InsertReshards(), SplitReductions(),
                     *((DeepenHalos(deepened),) if deepened else ()), InsertHaloExchanges(), MergeExchanges(),
                     Schedule(storage, rolled, thickness, strips), JoinExchanges()))



def compile_plan(model: onnx.ModelProto, mesh: str | Mesh | None, cuts: Cuts | None = None,
                 shapes: Mapping[str, Sequence[int]] | None = None, storage: Storage = "channels_last",
                 observe: Sequence[Observer] = (), rolled: str | None = None, thickness: int = 1) -> ir.Model:
    """The plan of a model; depth-first along the axis `rolled`, if it is given."""
    return pipeline(Mesh.parse(mesh), cuts, shapes, storage, rolled, thickness).run(load_model(model), observe)


@dataclass
class CountingDrain:
    """Outputs as arrays that start as NaN (or 0), and how often each of their cells was written."""

    outputs: dict[str, torch.Tensor]
    writes: dict[str, Array] = field(default_factory=dict)

    def store(self, name: str, portion: Portion) -> None:
        self.outputs[name][portion.slices].copy_(portion.tensor)
        counts = self.writes.setdefault(name, np.zeros(tuple(self.outputs[name].shape), int))
        counts[portion.slices] += 1


@dataclass(frozen=True)
class Run:
    """What a lock-step run yielded, and what its plan had foretold."""

    outputs: dict[str, Array]
    sent: Array
    messages: Array


def run_lockstep(plan: ir.Model, inputs: Mapping[str, Array], poison: bool = True,
                 transport: Lockstep | None = None) -> Run:
    """Run all ranks side by side and check the books on the way.

    After every step, all buffers have the extents that the program says; every output cell is written by one
    rank, once; bytes and messages counted where messages leave are those that the plan's cost foretells; no
    buffer outlives the run.
    """
    mesh = dialect.get_mesh(plan)
    transport = transport or Lockstep(mesh.size)
    shards = make_shards([localise(plan, rank) for rank in mesh], [torch.device("cpu")] * mesh.size, poison)
    drain = CountingDrain({str(v.name): _blank(v) for v in plan.graph.outputs})
    slabs = dialect.get_schedule(plan) is not None
    Executor(shards, transport).run(ArrayFeed(inputs), drain, lambda *_: _check_buffers(shards, slabs))
    for name, tensor in drain.outputs.items():
        counts = drain.writes.get(name, np.zeros(tuple(tensor.shape), int))
        assert (counts == 1).all(), f"cells of {name} were written {sorted(set(counts.ravel()))} times"
    sent = np.array([transport.traffic.sent.get(rank, 0) for rank in mesh])
    messages = np.array([transport.traffic.messages.get(rank, 0) for rank in mesh])
    cost = plan_cost(plan)
    assert sent.tolist() == cost.sent.ravel().tolist(), "bytes on the wire are not those foretold"
    assert messages.tolist() == cost.messages.ravel().tolist(), "messages are not those foretold"
    leftover = {name for shard in shards for name in shard.buffers}
    assert not leftover, f"buffers {leftover} outlive the run"
    return Run({name: t.numpy() for name, t in drain.outputs.items()}, sent, messages)


def _check_buffers(shards: Sequence[Shard], slabs: bool) -> None:
    """Buffers have the extents that the program says; the last slab's may be thinner."""
    for shard in shards:
        for name, tensor in shard.buffers.items():
            told = shard.program.buffers[name].box.shape
            smaller = slabs and all(a <= b for a, b in zip(tensor.shape, told, strict=True))
            assert smaller or tuple(tensor.shape) == told, f"{name} is {tuple(tensor.shape)}, the program says {told}"


def _blank(value: ir.Value) -> torch.Tensor:
    assert value.dtype is not None
    tensor = torch.zeros(dialect.shape_of(value), dtype=torch_dtype(value.dtype))
    return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor
