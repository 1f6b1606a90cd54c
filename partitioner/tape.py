"""Which memory a training step holds when: tensors of forward passes, and gradients of the passes back, per rank.

    forward    node 0, 1, 2 ...        a result lives until its last reader, or until the gradient for which it is kept
    backward   ... 2, 1, 0             a gradient lives from the last reader of a tensor back to its maker

Every node of every pass is a moment.  As `runtime.training` has it, a value before an exchange and the one after it are
two tensors, inputs and outputs are there all along, and gradients that meet are added up in the memory of the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from partitioner import dialect
from partitioner.cost import IntArray, bytes_of, cells, exchange_traffic
from partitioner.lifetime import Lifetimes, find_lifetimes
from partitioner.mesh import Mesh
from partitioner.ops.base import Backward
from partitioner.ops.nodes import needed_layout, operator_of
from partitioner.ops.weights import is_trainable


@dataclass
class Storage:
    """Memory on every rank, in bytes, from one moment to another, both included."""

    nbytes: IntArray
    born: int
    dies: int

    def use(self, moment: int) -> None:
        """Something looks at it."""
        self.dies = max(self.dies, moment)


@dataclass
class Tensor:
    """A value's cells during one pass.

    Args:
        carries: whether it gets a gradient.
        gradient: of it, as far as the pass back has come.
        lent: whether that lies in memory of another gradient.
    """

    storage: Storage
    nbytes: IntArray
    carries: bool
    gradient: Storage | None = None
    lent: bool = False


@dataclass(frozen=True)
class Moment:
    """While a node runs: bytes that it takes beside what lives, and whether all ranks of a process run it at once."""

    workspace: IntArray
    together: bool


@dataclass
class Record:
    """What one node's pass back needs."""

    reads: list[Tensor] = field(default_factory=list[Tensor])
    makes: list[Tensor] = field(default_factory=list[Tensor])
    keeps: list[Storage] = field(default_factory=list[Storage])
    needs: Backward = field(default_factory=Backward)


class Tape:
    """The passes of a training step over a plan's nodes, written down as they go."""

    def __init__(self, plan: ir.Model) -> None:
        self.plan = plan
        self.nodes = list(plan.graph)
        self.mesh: Mesh = dialect.get_mesh(plan)
        self.lifetimes: Lifetimes = find_lifetimes(plan, in_place=False)
        self.moments: list[Moment] = []
        self.storages: list[Storage] = []
        self.weights: list[tuple[int, ir.Value]] = []
        self.zero = np.zeros(self.mesh.shape, dtype=np.int64)
        self.trained = {v for v in plan.graph.initializers.values() if is_trainable(v)}
        self._sizes: dict[ir.Value, IntArray] = {}
        self._costs: dict[int, tuple[Backward, IntArray]] = {}
        self._records: dict[int, Record] = {}
        self.held: dict[str, Tensor] = {}

    @property
    def now(self) -> int:
        """The moment that has come last."""
        return len(self.moments) - 1

    def moment(self, workspace: IntArray | None = None, together: bool = True) -> int:
        """A new moment."""
        self.moments.append(Moment(self.zero if workspace is None else workspace, together))
        return self.now

    def storage(self, nbytes: IntArray) -> Storage:
        """Memory that is taken now."""
        found = Storage(nbytes, self.now, self.now)
        self.storages.append(found)
        return found

    def size(self, value: ir.Value) -> IntArray:
        """Bytes that every rank holds of a value."""
        if value not in self._sizes:
            assert value.dtype is not None
            self._sizes[value] = bytes_of(dialect.get_layout(value), value.dtype, self.mesh)
        return self._sizes[value]

    def tensor_of(self, value: ir.Value | None) -> Tensor | None:
        """The tensor in which a value's cells are now; None for weights and what is not given."""
        name = None if value is None else self.lifetimes.buffer_of.get(str(value.name))
        return None if name is None else self.held.get(name)

    # --- forward ------------------------------------------------------------------------------

    def load(self, value: ir.Value) -> Tensor:
        """An input, there before the step."""
        nbytes = self.size(value)
        tensor = Tensor(self.storage(nbytes), nbytes, carries=False)
        self.held[self.lifetimes.buffer_of[str(value.name)]] = tensor
        return tensor

    def forward(self, start: int, stop: int, is_recorded: bool) -> None:
        """Nodes one after the other; autograd keeps what it needs if they are recorded."""
        for index in range(start, stop):
            node = self.nodes[index]
            needs, workspace = self._cost(index)
            now = self.moment(workspace)
            before = [self.tensor_of(v) for v in node.inputs]
            reads = [t for t in before if t is not None]
            for tensor in reads:
                tensor.storage.use(now)
            carries = dialect.is_communication(node) or any(t.carries for t in reads) or any(
                v in self.trained for v in node.inputs if v is not None)
            makes = [self._make(v, reads if i == 0 and needs.shares else (), carries)
                     for i, v in enumerate(node.outputs)]
            if is_recorded and carries and any(t.carries for t in makes):
                self._records[index] = self._record(before, makes, needs)

    def _make(self, value: ir.Value, shares: Sequence[Tensor], carries: bool) -> Tensor:
        nbytes = self.size(value)
        storage = shares[0].storage if shares else self.storage(nbytes)
        is_float = value.dtype is not None and value.dtype.is_floating_point()
        tensor = Tensor(storage, nbytes, carries and is_float)
        self.held[self.lifetimes.buffer_of[str(value.name)]] = tensor
        return tensor

    def _record(self, before: Sequence[Tensor | None], makes: list[Tensor], needs: Backward) -> Record:
        kept = [t.storage for i in needs.inputs if i < len(before) and (t := before[i]) is not None]
        kept += [makes[i].storage for i in needs.outputs if i < len(makes)]
        if np.any(needs.beside):
            kept.append(self.storage(np.ceil(np.broadcast_to(needs.beside, self.mesh.shape)).astype(np.int64)))
        return Record([t for t in before if t is not None], makes, kept, needs)

    def _cost(self, index: int) -> tuple[Backward, IntArray]:
        """What the gradient of a node needs, and bytes beside its buffers while it runs forward."""
        if index not in self._costs:
            node = self.nodes[index]
            self._costs[index] = self._of_messages(node) if dialect.is_communication(node) else self._of_kernel(node)
        return self._costs[index]

    def _of_messages(self, node: ir.Node) -> tuple[Backward, IntArray]:
        if not dialect.is_exchange(node):
            return Backward(), self.zero
        sent, received, _ = exchange_traffic(node, self.mesh)
        return Backward(workspace=sent + received), sent + received  # pyright: ignore[reportArgumentType]

    def _of_kernel(self, node: ir.Node) -> tuple[Backward, IntArray]:
        operator = operator_of(node)
        layouts = [None if v is None else needed_layout(node, i) for i, v in enumerate(node.inputs)]
        ins = [self.zero.astype(float) if lay is None else cells(lay, self.mesh).astype(float) for lay in layouts]
        outs = [cells(dialect.get_layout(v), self.mesh).astype(float) for v in node.outputs]
        found = np.broadcast_to(np.asarray(operator.workspace(ins, outs), float), self.mesh.shape)  # pyright: ignore
        return operator.backward(ins, outs), np.ceil(found).astype(np.int64)  # pyright: ignore[reportArgumentType]

    # --- backward -----------------------------------------------------------------------------

    def backward(self, start: int, stop: int) -> None:
        """The gradients of recorded nodes, the last one's first."""
        for index in reversed(range(start, stop)):
            record = self._records.pop(index, None)
            if record is None or not any(t.gradient is not None for t in record.makes):
                continue
            node, workspace = self.nodes[index], np.broadcast_to(record.needs.workspace, self.mesh.shape)
            now = self.moment(np.ceil(workspace).astype(np.int64), together=dialect.is_communication(node))
            arriving = next((t.gradient for t in record.makes if t.gradient is not None), None)
            for storage in (*record.keeps, *(t.gradient for t in record.makes if t.gradient is not None)):
                storage.use(now)
            for tensor in record.reads:
                if tensor.carries:
                    self._add(tensor, arriving if record.needs.hands_on else None)
            self.weights += [(now, v) for v in node.inputs if v is not None and v in self.trained]

    def _add(self, tensor: Tensor, lent: Storage | None) -> None:
        """One more reader's part of a tensor's gradient: in memory of its own, or lent from the reader's."""
        if tensor.gradient is None:
            tensor.gradient, tensor.lent = lent or self.storage(tensor.nbytes), lent is not None
            return
        tensor.gradient.use(self.now)
        if lent is None:
            self.storage(tensor.nbytes)
        if tensor.lent:
            tensor.gradient, tensor.lent = self.storage(tensor.nbytes), False
