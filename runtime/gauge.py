"""Times single kernels as the executor runs them: the operator's own kernel, channels-last buffers, used memory."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from partitioner.dialect import DOMAIN
from partitioner.geometry import Box
from partitioner.mesh import Mesh
from partitioner.ops.base import NodeView, Operator, TensorType
from partitioner.ops.registry import lookup
from runtime.allocator import MAPPED_FROM, give_heap_back
from runtime.executor import Shard, compute
from runtime.fuse import in_blocks
from runtime.memory import allocate_buffer, load_weight, storage_on
from runtime.program import BufferSpec, Compute, Program, place

Extents = tuple[int, ...]

MOST_RUNS = 500
"""Runs of one trial at most."""


@dataclass(frozen=True)
class Trial:
    """A node to time.

    Args:
        inputs: extents of its data inputs, which lie in buffers as activations do.
        weights: extents of further inputs.
        constants: further inputs that are known when the node is read.
        into: whether the result goes to its place in a buffer that is there already.
    """

    op_type: str
    inputs: tuple[Extents, ...]
    weights: tuple[Extents, ...] = ()
    constants: tuple[Any, ...] = ()
    attributes: Mapping[str, Any] | None = None
    domain: str = ""
    into: bool = False

    def operator(self) -> Operator:
        """The node's operator, as a graph would have it."""
        given = [TensorType(shape, ir.DataType.FLOAT) for shape in (*self.inputs, *self.weights)]
        arrays = [ir.tensor(c) for c in self.constants]
        types = (*given, *(TensorType(a.numpy().shape, a.dtype) for a in arrays))
        cls = lookup(self.domain, self.op_type)
        assert cls is not None, self.op_type
        view = NodeView(self.op_type, 1 if self.domain == DOMAIN else 18, types,
                        (*(None for _ in given), *arrays), self.attributes or {}, (True,) * 3)
        return cls.read(view if self.domain == DOMAIN else _with_one_output(view))

    def nbytes(self) -> int:
        """Bytes of its data inputs and of its outputs."""
        outputs = self.operator().outputs
        return 4 * (sum(map(math.prod, self.inputs)) + sum(math.prod(t.shape) for t in outputs))


def _with_one_output(view: NodeView) -> NodeView:
    return NodeView(view.op_type, view.version, view.inputs, view.constants, view.attributes, (True,))


@dataclass(frozen=True)
class Gauge:
    """Times trials on one device.

    Args:
        patience: seconds spent on one trial, beside a run to warm up.
        fewest: runs of a trial at least.
    """

    device: torch.device
    patience: float
    fewest: int = 3

    def seconds(self, trial: Trial) -> float:
        """The usual time of one call."""
        shard, action = self.prepare(trial)
        shard.arena.keep(1 << 62)  # in a run most results are of memory that others have had

        def once() -> None:
            compute(shard, action)

        def after() -> None:
            if trial.into:
                return
            results = [shard.buffers.pop(window.buffer) for window in action.writes]
            large = any(t.nbytes >= MAPPED_FROM for t in results)
            results.clear()
            if large:  # what is not the arena's comes from the system, time and again
                give_heap_back()

        return self.usual(once, after)

    def reorder_seconds(self, shape: Extents) -> float:
        """The usual time in which an activation is copied into a whole array, as outputs are."""
        spec = BufferSpec("x", Box.whole(shape), ir.DataType.FLOAT)
        source = allocate_buffer(spec, self.device, storage_on(self.device, "channels_last"), False).normal_()

        def work() -> None:
            torch.empty(shape, device=self.device).copy_(source)

        return self.usual(work, give_heap_back)

    def page_seconds(self, nbytes: int) -> float:
        """The usual time in which the system gives the pages of a resting buffer, as its cells are first written."""
        spec = BufferSpec("x", Box.whole((1, 1, max(1, nbytes // 4096), 32, 32)), ir.DataType.FLOAT, "resting", 2)
        storage = storage_on(self.device, "channels_last")
        used = allocate_buffer(spec, self.device, storage, False)

        def work() -> None:
            allocate_buffer(spec, self.device, storage, False).zero_()

        return max(1e-9, self.usual(work) - self.usual(used.zero_))

    def usual(self, work: Callable[[], Any], after: Callable[[], Any] = lambda: None) -> float:
        """The lower quartile of the times of some work; what is done after it is not timed."""
        times: list[float] = []
        clock = self._clock()
        with torch.inference_mode():
            work()
            self._finish()
            after()
            while len(times) < self.fewest or (sum(times) < self.patience and len(times) < MOST_RUNS):
                start = clock()
                work()
                self._finish()
                times.append(clock() - start)
                after()
                if sum(times) > 10 * self.patience:
                    break
        return sorted(times)[len(times) // 4]

    def _clock(self) -> Callable[[], float]:
        """On one thread its own time, so that what else the machine does counts for little; else time as it passes."""
        alone = self.device.type == "cpu" and torch.get_num_threads() == 1
        return time.thread_time if alone else time.perf_counter

    def _finish(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def prepare(self, trial: Trial) -> tuple[Shard, Compute]:
        """A shard that holds a trial's inputs, and the step that runs it."""
        operator = trial.operator()
        storage = storage_on(self.device, "channels_last")
        specs, reads = _specs("x", trial.inputs)
        weights: dict[str, torch.Tensor] = {}
        for index, shape in enumerate(trial.weights):
            values = np.random.default_rng(index).uniform(0.1, 1.0, shape).astype(np.float32)
            with torch.inference_mode():
                weights[f"w{index}"] = load_weight(ir.tensor(values), self.device, storage)
        _, more = _specs("w", trial.weights)
        outs, writes = _specs("y", [t.shape for t in operator.outputs])
        if trial.into:
            writes = [place(w.buffer, w.box, w.box) for w in writes]
            writes = [type(w)(w.buffer, w.box, w.slices, False) for w in writes]
        reads = [*reads, *more, *(None for _ in trial.constants)]
        program = Program(0, Mesh(()), storage, {**specs, **outs}, {}, ())
        shard = Shard(program, self.device, weights)
        for name, spec in specs.items():
            shard.buffers[name] = allocate_buffer(spec, self.device, storage, False).normal_()
        action = in_blocks(Compute(trial.op_type, operator, tuple(reads), tuple(writes)))
        assert isinstance(action, Compute)
        return shard, action


def _specs(prefix: str, shapes: Sequence[Extents]) -> tuple[dict[str, BufferSpec], list[Any]]:
    boxes = {f"{prefix}{i}": Box.whole(shape) for i, shape in enumerate(shapes)}
    specs = {name: BufferSpec(name, box, ir.DataType.FLOAT) for name, box in boxes.items()}
    return specs, [place(name, box, box) for name, box in boxes.items()]
