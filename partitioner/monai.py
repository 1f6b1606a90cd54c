"""MONAI's inferers, whole volumes: the network is run exactly, depth-first under a memory budget, not window by window.

    inferer = pt.monai.WholeVolumeInferer(memory="8GiB")
    logits = inferer(inputs, network)                   # as with monai.inferers.SlidingWindowInferer
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import threading
import weakref
import zlib
from collections import OrderedDict
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch

from partitioner.api import Backend, partition
from partitioner.budget import Budget
from partitioner.errors import PartitionError
from partitioner.exporter import Rebuild, export_call
from partitioner.guards import MeshLike
from partitioner.sessions import Session

Key = tuple[tuple[str, torch.Size, torch.dtype], ...]


def _inferer_class() -> type:
    """MONAI's base class, so that its trainers and evaluators take ours; a plain class without MONAI."""
    try:
        return importlib.import_module("monai.inferers").Inferer
    except ImportError:
        return object


if TYPE_CHECKING:
    _Inferer = object
else:
    _Inferer = _inferer_class()


class WholeVolumeInferer(_Inferer):
    """Takes the place of `monai.inferers.SlidingWindowInferer`: the same call, the result of the network run whole.

    The module is exported by torch.onnx in eval mode, whatever mode it is in (it is put back), once per extents of
    its inputs; the last `keep` of these stay ready.  Weights, buffers and the module's printed form are looked at
    before every call, and a module that has changed is exported again; after changing a plain attribute that is not
    printed, call `close`.  Autocast does not reach the graph: it is computed in the types of weights and inputs.
    Results carry no gradient.

    Args:
        memory: what the process may hold, as `"8GiB"` or in bytes, arrays and the program itself included; see
            `partitioner.partition`.  Without it the network is run layer by layer.
        host_memory: of that, what tensors may take that rest between chains.
        mesh: shards beside or in place of a budget, as `"depth=2"`.
        device: `cpu`, `cuda`, or a list for the ranks in turn; results come back to where the inputs lie.
        output_ops: what becomes of the outputs within the graph: `["softmax", "argmax"]`.
        backend: `lockstep`, or one process per rank: `gloo`, `nccl`, `shm`.
        keep: for how many extents a module stays exported, each with its weights.

    Raises:
        PartitionError: for no amount of memory, or a `keep` below 1.
    """

    def __init__(self, *, memory: str | int | None = None, host_memory: str | int | None = None,
                 mesh: MeshLike = None, device: str | torch.device = "cpu", output_ops: Sequence[str] = (),
                 backend: Backend = "lockstep", keep: int = 2) -> None:
        super().__init__()
        if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
            raise PartitionError(f"keep={keep!r}: give how many extents stay ready, at least 1")
        if memory is not None or host_memory is not None:
            Budget.of(memory, host_memory)
        self.keep = keep
        self._partition: dict[str, Any] = {"memory": memory, "host_memory": host_memory, "mesh": mesh}
        if output_ops:
            self._partition["output_ops"] = output_ops
        self._backend: Backend = backend
        self._device = str(device)
        self._lock = threading.RLock()
        self._modules: weakref.WeakKeyDictionary[torch.nn.Module, _Kept] = weakref.WeakKeyDictionary()

    def __call__(self, inputs: torch.Tensor, network: Any, *args: Any, **kwargs: Any) -> Any:
        """The network's result on whole inputs.

        Args:
            inputs: (batch, channel, *spatial), of the element type that the network takes, on any device.
            network: a `torch.nn.Module`.
            args: further tensors for the network, whole like the inputs.
            kwargs: the same, by keyword.

        Returns:
            what the network returns: a tensor, or a tuple, list or dict of them, on the inputs' device; of MONAI's
            MetaTensor, with the inputs' meta data, where the inputs are one.

        Raises:
            PartitionError: when the network is no module, cannot be exported or kept exact, an argument is no tensor,
                or the budget is too small.
            ExecutionError: when a run fails.
        """
        module = _module_of(network)
        given = {0: inputs, **dict(enumerate(args, start=1)), **kwargs}
        tensors = {name: _plain_tensor(value, name) for name, value in given.items()}
        with self._lock, _in_its_own_types(inputs.device, self._device):
            ready = self._ready(module, list(tensors.values())[: 1 + len(args)], {n: tensors[n] for n in kwargs})
            arrays = zip(ready.names, tensors.values(), strict=True)
            wanted = ready.session.plan.input_shapes
            found = ready.session.run({name: tensor for name, tensor in arrays if name in wanted})
        return ready.rebuild([_like(found[name], inputs) for name in ready.outputs])

    def session_of(self, network: torch.nn.Module) -> Session | None:
        """The session of a module's last call, with its plan and the figures of its last run."""
        kept = self._modules.get(_module_of(network))
        return next(reversed(kept.ready.values())).session if kept is not None and kept.ready else None

    def close(self) -> None:
        """End processes and give back memory; harmless when repeated, and a later call exports anew."""
        with self._lock:
            for kept in self._modules.values():
                kept.close()
            self._modules.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        """A copy has the options and no sessions."""
        return {name: value for name, value in vars(self).items() if name not in ("_lock", "_modules")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.RLock(), _modules=weakref.WeakKeyDictionary())

    def _ready(self, module: torch.nn.Module, inputs: Sequence[torch.Tensor],
               named: Mapping[str, torch.Tensor]) -> _Ready:
        kept, state = self._modules.get(module), _state_of(module)
        if kept is None:
            kept = self._modules[module] = _Kept(state)
            weakref.finalize(module, kept.close)
        if kept.state != state:
            kept.close()
            kept.state = state
        places = [(str(i), tensor) for i, tensor in enumerate(inputs)]
        key: Key = tuple((name, tensor.shape, tensor.dtype) for name, tensor in (*places, *named.items()))
        if key not in kept.ready:
            kept.shrink(self.keep - 1)
            kept.ready[key] = self._prepare(module, inputs, named)
        kept.ready.move_to_end(key)
        return kept.ready[key]

    def _prepare(self, module: torch.nn.Module, inputs: Sequence[torch.Tensor],
                 named: Mapping[str, torch.Tensor]) -> _Ready:
        place = next((t.device for t in _tensors_of(module)), torch.device("cpu"))
        with torch.inference_mode(False), torch.no_grad():
            examples = [_example(tensor, place) for tensor in inputs]
            model, rebuild = export_call(module, examples, {n: _example(t, place) for n, t in named.items()})
        del examples
        gc.collect()  # what the exporter leaves would count as taken
        names = tuple(str(value.name) for value in model.graph.inputs)
        plan = partition(model, **self._partition)
        outputs = tuple(str(value.name) for value in plan.model.graph.outputs)
        return _Ready(plan.session(self._backend, self._device), names, outputs, rebuild)


@dataclass(frozen=True)
class _Ready:
    """A module exported for certain extents: its session, the graph's inputs and outputs in order, what to return."""

    session: Session
    names: tuple[str, ...]
    outputs: tuple[str, ...]
    rebuild: Rebuild


@dataclass
class _Kept:
    """What is ready of one module, the last used at the end, and the module's state when it was exported."""

    state: tuple[Any, ...]
    ready: OrderedDict[Key, _Ready] = field(default_factory=OrderedDict[Key, "_Ready"])

    def shrink(self, count: int) -> None:
        """Keep the last few."""
        while len(self.ready) > count:
            _, oldest = self.ready.popitem(last=False)
            oldest.session.close()

    def close(self) -> None:
        """Keep none."""
        self.shrink(0)


def _module_of(network: Any) -> torch.nn.Module:
    """The module itself, of what torch wraps around it for compilation or data parallelism."""
    if not isinstance(network, torch.nn.Module):
        name = getattr(network, "__name__", type(network).__name__)
        raise PartitionError(f"network: {name} is a {type(network).__name__}, which cannot be exported; give the "
                             "torch.nn.Module itself, or one whose forward does what the function does")
    if isinstance(network, torch.jit.ScriptModule):
        raise PartitionError(f"network: {type(network).__name__} is TorchScript, which cannot be exported; give the "
                             "torch.nn.Module that it was made from")
    wrapped = {"OptimizedModule": "_orig_mod", "DataParallel": "module", "DistributedDataParallel": "module"}
    inner = getattr(network, wrapped.get(type(network).__name__, ""), None)
    return inner if isinstance(inner, torch.nn.Module) else network


def _plain_tensor(value: Any, name: int | str) -> torch.Tensor:
    """A tensor without gradient, and without what MONAI adds."""
    what = name if isinstance(name, str) else f"argument {name}" if name else "inputs"
    if not isinstance(value, torch.Tensor):
        remedy = "give a torch tensor" if name == 0 else (
            "which the exported graph cannot take; give a tensor, or call the network with it in the forward of a "
            "torch.nn.Module of your own")
        raise PartitionError(f"{what}: is a {type(value).__name__}, {remedy}")
    if value.is_meta or value.layout != torch.strided:
        raise PartitionError(f"{what}: is a tensor of {'no data' if value.is_meta else value.layout}; give a dense one")
    if name == 0 and value.dim() < 3:
        raise PartitionError(f"inputs: has {value.dim()} axes; give (batch, channel, *spatial), as volume[None, None]")
    return value.detach().as_subclass(torch.Tensor)  # pyright: ignore[reportUnknownArgumentType]


def _like(result: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """A result as what the inputs are: MONAI's tensor with their affine and meta data, or torch's."""
    if not hasattr(inputs, "copy_meta_from"):
        return result
    kind: Any = type(inputs)
    return kind(result).copy_meta_from(inputs, copy_attr=False)


def _example(tensor: torch.Tensor, place: torch.device) -> torch.Tensor:
    """What the module is traced with: extents and type count, no cell is touched."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=place)


@contextlib.contextmanager
def _in_its_own_types(*devices: torch.device | str) -> Generator[None]:
    """Without autocast, which would change what the graph and its kernels compute."""
    with contextlib.ExitStack() as stack:
        for kind in {"cpu", *(str(device).split(":")[0] for device in devices)}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def _tensors_of(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Parameters, buffers, and tensors that are plain attributes."""
    for part in module.modules():
        for group in (vars(part), part._parameters, part._buffers):  # pyright: ignore[reportPrivateUsage]
            yield from (value for value in group.values() if isinstance(value, torch.Tensor))


def _state_of(module: torch.nn.Module) -> tuple[Any, ...]:
    """What the export depends on: the module's printed form and a checksum of every tensor's bits.

    Versions and addresses would not do: changes through `.data`, as of moving averages, leave both alone.

    Raises:
        PartitionError: for tensors without data.
    """
    return (repr(module), *map(_tensor_state, _tensors_of(module)))


def _tensor_state(tensor: torch.Tensor) -> tuple[torch.Size, torch.dtype, int]:
    if torch.nn.parameter.is_lazy(tensor) or tensor.is_meta:
        raise PartitionError("network: has parameters without data; load its weights first")
    if tensor.layout != torch.strided:
        raise PartitionError(f"network: has a parameter of {tensor.layout}; make it dense")
    cells: Any = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return tensor.shape, tensor.dtype, zlib.crc32(cells)
