"""What a step of training costs every rank, from boxes alone: memory over both passes, messages, operations.

    forward | loss | backward                                    all that autograd keeps, and gradients
    forward | loss | last segment again, backward | ... | first  with checkpoint=True

Figures are arrays of the mesh's shape, as those of `partitioner.cost`.  The loss counts as a cross entropy does: as
much as the outputs for its own result, kept, and as much again for each of two gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import onnx_ir as ir

from partitioner import dialect
from partitioner.cost import FloatArray, IntArray, all_reduce_traffic, exchange_traffic, operations
from partitioner.errors import PartitionError
from partitioner.exchange import plan_exchange
from partitioner.mesh import Mesh
from partitioner.ops.nodes import operator_of
from partitioner.ops.weights import is_trainable
from partitioner.segments import Segments, find_segments
from partitioner.tape import Moment, Storage, Tape, Tensor

Optimiser = Literal["none", "sgd", "momentum", "adam"]

WORDS: dict[str, int] = {"none": 0, "sgd": 0, "momentum": 1, "adam": 2}
"""Numbers that an optimiser keeps of each parameter."""

BUCKET_BYTES = 8 << 20
"""A bucket of gradients that travel together is full when it holds this much."""


@dataclass(frozen=True)
class TrainingCost:
    """One step of training; arrays are per rank, of the mesh's shape.

    Args:
        segments: runs of nodes that keep what enters them and run again; one, of all nodes, without checkpointing.
        kept: bytes that autograd keeps of activations when the forward pass has ended.
        peak: most bytes at once of activations, their gradients, halos and what kernels take beside them; inputs,
            outputs and the loss included.
        peak_together: that of all ranks in one process.
        total: `peak` with weights, their gradients as far as they are there, and the optimiser's state, in bytes.
        total_together: that of all ranks in one process, which have their weights in common.
        weights: bytes of constants on every rank, parameters included.
        parameters: bytes of those that train; as much are their gradients.
        optimiser: bytes of the optimiser's state on every rank.
        forward_sent, backward_sent: bytes sent in exchanges and merges, what runs again included in the second.
        forward_messages, backward_messages: messages sent.
        buckets: buckets in which processes sum up the gradients of the parameters; 0 on one rank.
        summed: bytes that every process sends for these sums, as a ring does.
        forward_flops, backward_flops: floating-point operations, what runs again included in the second.
    """

    mesh: Mesh
    segments: Segments
    kept: IntArray
    peak: IntArray
    peak_together: int
    total: IntArray
    total_together: int
    weights: int
    parameters: int
    optimiser: int
    forward_sent: IntArray
    backward_sent: IntArray
    forward_messages: IntArray
    backward_messages: IntArray
    buckets: int
    summed: int
    forward_flops: FloatArray
    backward_flops: FloatArray

    @property
    def gradients(self) -> int:
        """Bytes of the parameters' gradients on every rank."""
        return self.parameters

    @property
    def sent(self) -> IntArray:
        """Bytes that every rank sends in exchanges and merges."""
        return self.forward_sent + self.backward_sent

    @property
    def messages(self) -> IntArray:
        """Messages that every rank sends in exchanges and merges."""
        return self.forward_messages + self.backward_messages


def training_cost(plan: ir.Model, checkpoint: bool = False, optimiser: Optimiser = "adam") -> TrainingCost:
    """The cost of a step of a plan that was compiled for training.

    Raises:
        PartitionError: for an optimiser that is not known.
    """
    optimiser = known_optimiser(optimiser)
    tape = Tape(plan)
    count = len(tape.nodes)
    segments = find_segments(plan, tape.lifetimes) if checkpoint else ((0, count),)
    kept = _Step(tape, segments).run()
    parameters = parameter_bytes(plan)
    total = sum(parameters)
    peaks = _Peaks(tape, tape.mesh.size > 1)
    held = _weight_bytes(plan)
    again = len(segments) > 1
    forward, backward = _traffic(tape, again)
    flops = _operations(tape, again)
    buckets = len(fill_buckets(parameters[::-1])) if tape.mesh.size > 1 else 0
    state = WORDS[optimiser] * total
    return TrainingCost(
        tape.mesh, segments, kept, peaks.each, peaks.all_ranks, peaks.each_with_weights + held + state,
        peaks.all_with_weights + held + state, held, total, state, forward[0], backward[0], forward[1], backward[1],
        buckets, 2 * total * (tape.mesh.size - 1) // tape.mesh.size, *flops)


# --- the passes -------------------------------------------------------------------------------------------


class _Step:
    """Writes the passes of one step down on a tape."""

    def __init__(self, tape: Tape, segments: Segments) -> None:
        self.tape = tape
        self.segments = segments
        self.lasting: list[Storage] = []

    def run(self) -> IntArray:
        """All passes; bytes that are kept between forward and backward."""
        tape = self.tape
        tape.moment()
        self.lasting = [tape.load(value).storage for value in tape.plan.graph.inputs]
        if len(self.segments) == 1:
            tape.forward(0, len(tape.nodes), is_recorded=True)
            outputs, between = self._loss()
            tape.backward(0, len(tape.nodes))
            return self._finish(outputs, between)
        entries = [self._forward(start, stop) for start, stop in self.segments]
        outputs, between = self._loss()
        for (start, stop), entry in reversed(list(zip(self.segments, entries, strict=True))):
            self._again(start, stop, entry)
        return self._finish(outputs, between)

    def _finish(self, outputs: Sequence[Tensor], between: int) -> IntArray:
        """Inputs and outputs stay to the end; what lives between the passes is what was kept."""
        for storage in (*self.lasting, *(t.storage for t in outputs)):
            storage.use(self.tape.now)
        own = {id(s) for s in self.lasting}
        kept = [s.nbytes for s in self.tape.storages if s.born <= between < s.dies and id(s) not in own]
        return sum(kept, start=self.tape.zero)

    def _loss(self) -> tuple[list[Tensor], int]:
        """The loss of all outputs, its gradients, and the moment between the passes."""
        tape, outputs = self.tape, list[Tensor]()
        for value in tape.plan.graph.outputs:
            tensor = tape.tensor_of(value)
            if tensor is not None and tensor.carries and dialect.get_statistic(value) is None:
                outputs.append(tensor)
        between = tape.moment()
        results = [tape.storage(t.nbytes) for t in outputs]
        for tensor in outputs:
            tensor.storage.use(between)
        tape.moment(sum((t.nbytes for t in outputs), start=tape.zero))
        for tensor, result in zip(outputs, results, strict=True):
            result.use(tape.now)
            tensor.gradient = tape.storage(tensor.nbytes)
        return outputs, between

    def _forward(self, start: int, stop: int) -> dict[str, Tensor]:
        """A segment that is not recorded; the tensors that enter it."""
        tape = self.tape
        entry = dict(tape.held)
        tape.forward(start, stop, is_recorded=False)
        for name, tensor in tape.held.items():
            if entry.get(name) is not tensor:
                tensor.carries = True
        return entry

    def _again(self, start: int, stop: int, entry: dict[str, Tensor]) -> None:
        """A segment once more, and its gradients; what enters it is kept until then."""
        tape = self.tape
        leaving = {str(v.name) for v in tape.plan.graph.outputs}
        after = {name: tensor for name, tensor in tape.held.items()
                 if tape.lifetimes.buffers[name].dies >= stop or name in leaving}
        read = self._entering(start, stop)
        entering = {name: tensor for name, tensor in entry.items() if name in read}
        # inside, gradients are found anew and handed out at the end
        inner = {name: Tensor(t.storage, t.nbytes, t.carries) for name, t in entering.items()}
        tape.held = dict(inner)
        tape.forward(start, stop, is_recorded=True)
        results = [(tape.held[name], tensor) for name, tensor in after.items()
                   if name in tape.held and entry.get(name) is not tensor]
        for result, tensor in results:
            result.gradient, result.lent = tensor.gradient, True
        tape.backward(start, stop)
        for result, tensor in results:
            result.storage.use(tape.now)
            if tensor.gradient is not None:
                tensor.gradient.use(tape.now)
        self._hand_out(entering, inner)
        tape.held = entry

    def _hand_out(self, entering: dict[str, Tensor], inner: dict[str, Tensor]) -> None:
        """Gradients of what entered a segment join those that other segments have found."""
        for name, tensor in entering.items():
            tensor.storage.use(self.tape.now)
            found = inner[name].gradient
            if found is None:
                continue
            found.use(self.tape.now)
            if tensor.gradient is None:
                tensor.gradient = found
            tensor.gradient.use(self.tape.now)

    def _entering(self, start: int, stop: int) -> set[str]:
        """Buffers that the nodes of a segment read."""
        names = self.tape.lifetimes.buffer_of
        return {names[str(v.name)] for node in self.tape.nodes[start:stop] for v in node.inputs
                if v is not None and str(v.name) in names}


# --- how much lives at once -------------------------------------------------------------------------------


class _Peaks:
    """The most that lives at any moment, of each rank and of all in one process, without weights and with theirs."""

    def __init__(self, tape: Tape, in_buckets: bool) -> None:
        born, dies, grown = _changes(tape)
        self.each = self.each_with_weights = tape.zero
        self.all_ranks = self.all_with_weights = 0
        live, gradients = tape.zero, 0
        for index, moment in enumerate(tape.moments):
            during = live + born.get(index, tape.zero)
            after = during - dies.get(index, tape.zero)
            gradients += grown.get(index, 0) * (2 if in_buckets else 1)  # and the buckets in which they are summed
            self.each = np.maximum(self.each, during + moment.workspace)
            self.each_with_weights = np.maximum(self.each_with_weights, during + moment.workspace + gradients)
            together = _together(moment, live, during, after)
            self.all_ranks = max(self.all_ranks, together)
            self.all_with_weights = max(self.all_with_weights, together + gradients // (2 if in_buckets else 1))
            live = after
        self.each_with_weights = np.maximum(self.each_with_weights, live + gradients)


def _changes(tape: Tape) -> tuple[dict[int, IntArray], dict[int, IntArray], dict[int, int]]:
    """What comes and goes at every moment, and bytes of gradients of weights that come."""
    born: dict[int, IntArray] = {}
    dies: dict[int, IntArray] = {}
    for storage in tape.storages:
        born[storage.born] = born.get(storage.born, tape.zero) + storage.nbytes
        dies[storage.dies] = dies.get(storage.dies, tape.zero) + storage.nbytes
    grown: dict[int, int] = {}
    for moment, value in {str(v.name): (m, v) for m, v in reversed(tape.weights)}.values():
        grown[moment] = grown.get(moment, 0) + _nbytes(value)
    return born, dies, grown


def _together(moment: Moment, before: IntArray, during: IntArray, after: IntArray) -> int:
    """Bytes of all ranks: side by side, or one rank after the other, each of which lets go before the next one."""
    if moment.together:
        return int(during.sum() + moment.workspace.max(initial=0))
    calm = np.maximum(before, after)
    return int(calm.sum() + (during + moment.workspace - calm).max(initial=0))


# --- weights, messages, operations ------------------------------------------------------------------------


def known_optimiser(word: str) -> Optimiser:
    """An optimiser by its name.

    Raises:
        PartitionError: for one that is not known.
    """
    found = next((name for name in get_args(Optimiser) if name == word), None)
    if found is None:
        raise PartitionError(f"optimiser '{word}' is unknown; use {', '.join(get_args(Optimiser))}")
    return found


def parameter_bytes(plan: ir.Model) -> list[int]:
    """Bytes of the parameters, in the order of the plan; a weight that the plan holds in several forms counts once."""
    found: dict[str, int] = {}
    for value in plan.graph.initializers.values():
        if is_trainable(value) and value.uses():
            source = dialect.get_source(value)
            found[source] = min(found.get(source, _nbytes(value)), _nbytes(value))
    return list(found.values())


def fill_buckets(sizes: Sequence[int], limit: int = BUCKET_BYTES) -> list[list[int]]:
    """Places in a list of sizes, in order, in buckets of at most `limit` together; a larger one stands alone."""
    found: list[list[int]] = []
    size = 0
    for place, nbytes in enumerate(sizes):
        if not found or size + nbytes > limit:
            found.append([])
            size = 0
        found[-1].append(place)
        size += nbytes
    return found


def _weight_bytes(plan: ir.Model) -> int:
    return sum(_nbytes(v) for v in plan.graph.initializers.values() if v.uses())


def _nbytes(value: ir.Value) -> int:
    return 0 if value.const_value is None else int(value.const_value.nbytes)


Sent = tuple[IntArray, IntArray]


def _traffic(tape: Tape, again: bool) -> tuple[Sent, Sent]:
    """Bytes and messages sent forward, and backward: an exchange turned round, a merge as it was."""
    forward = backward = (tape.zero, tape.zero)
    for node in tape.nodes:
        if dialect.is_exchange(node):
            source = node.inputs[0]
            assert source is not None
            sent, received, messages = exchange_traffic(node, tape.mesh)
            plan = plan_exchange(tape.mesh, dialect.get_layout(source), dialect.get_layout(node.outputs[0]))
            there, back = (sent, messages), (received, plan.messages_received)
        elif dialect.is_all_reduce(node):
            there = back = all_reduce_traffic(node, tape.mesh)
        else:
            continue
        forward = (forward[0] + there[0], forward[1] + there[1])
        backward = (backward[0] + back[0], backward[1] + back[1])
    if again:
        backward = (backward[0] + forward[0], backward[1] + forward[1])
    return forward, backward


def _operations(tape: Tape, again: bool) -> tuple[FloatArray, FloatArray]:
    """Operations forward, and backward."""
    forward = backward = np.zeros(tape.mesh.shape)
    for node in tape.nodes:
        if dialect.is_communication(node):
            continue
        found = operations(node, dialect.get_layout(node.outputs[0]), tape.mesh)
        forward = forward + found
        backward = backward + found * operator_of(node).gradient_work
    return forward, backward + forward if again else backward
