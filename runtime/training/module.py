"""A plan as a torch.nn.Module: its weights are parameters, its forward pass works on shards.

    module = plan.module()                    all shards in this process
    loss = criterion(module(volume), target)
    loss.backward(); optimiser.step()

In a process group every process holds one shard: `module(volume)` takes the whole volume or the rank's own part and
returns the rank's part of the result.  The parameters' gradients are summed over the ranks, and averaged over copies
of the network beside them, as the backward pass makes them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import onnx_ir as ir
import torch
from torch import nn

from partitioner import dialect
from partitioner.errors import PartitionError
from partitioner.geometry import Box
from partitioner.lifetime import find_lifetimes
from partitioner.loader import save_model
from runtime.group import gather
from runtime.memory import storage_on
from runtime.program import localise
from runtime.training.communication import Link, scale_gradient
from runtime.training.differentiable import Differentiable, Shards, Wiring
from runtime.training.gradients import GradientSum
from runtime.training.grid import ProcessGrid
from runtime.training.state import State
from runtime.transports import Transport


@dataclass(frozen=True)
class Network:
    """One network in the forms that a module needs.

    Args:
        source: the model that was partitioned.
        training, evaluation: plans of the network as it trains and as it is, on the same mesh.
    """

    source: ir.Model
    training: ir.Model
    evaluation: ir.Model

    @property
    def weights(self) -> dict[str, ir.TensorProtocol]:
        """The weights of the file; other constants neither train nor belong to the state."""
        return {str(name): v.const_value for name, v in self.source.graph.initializers.items()
                if v.const_value is not None}


@dataclass(frozen=True)
class Ranks:
    """Where the ranks are.

    Args:
        transport: reaches the ranks that are not in this process.
        devices: per local rank.
        grid: this process among all, when there are others.
        across: reaches the other copies of the network.
    """

    transport: Transport
    devices: tuple[torch.device, ...]
    grid: ProcessGrid | None = None
    across: Transport | None = None


@dataclass(frozen=True)
class Options:
    """How a module trains.

    Args:
        biased_variance: let running variances be those of the population, as ONNX has it, not torch's unbiased ones.
        checkpoint: keep few activations and compute the others again in the backward pass.
        global_statistics: take batch statistics over all copies of the network, not over each by itself.
    """

    biased_variance: bool = False
    checkpoint: bool = False
    global_statistics: bool = False


class PartitionedModule(nn.Module):
    """The network of a plan, trained like any other module.

    Parameters and buffers have the names of the model's weights; dots make submodules, so that the keys of
    `state_dict` are those names.  In training mode batch norms use the batch's statistics and dropouts drop;
    in evaluation mode the network is the one in the file.

    Attributes:
        mesh: of the plan.
        grid: this process among all; None when all ranks are in this process.
        seed: the number from which the dropouts' masks are drawn; a new one for every training step.
    """

    def __init__(self, network: Network, ranks: Ranks, options: Options) -> None:
        super().__init__()
        self.mesh = dialect.get_mesh(network.training)
        self.grid = ranks.grid
        self.seed = 0
        self._network = network
        self._options = options
        self._devices = ranks.devices
        self._sum: GradientSum | None = None
        self._shards_parameters = False
        storage = storage_on(ranks.devices[0], dialect.get_storage(network.training))
        wiring = _wiring(ranks, self.mesh.size, storage, options, self._begin)
        self._passes = {training: _differentiable(plan, ranks, wiring, storage, options.checkpoint)
                        for training, plan in ((True, network.training), (False, network.evaluation))}
        values = [*(v for v in network.training.graph.inputs if v.name != dialect.SEED),
                  *network.evaluation.graph.outputs]
        places = [self.mesh.coordinates(rank) for rank in ranks.transport.ranks]
        self._boxes = {str(v.name): [dialect.get_layout(v).box(place) for place in places] for v in values}
        self._replicas = {str(v.name): math.prod(n for name, n in self.mesh.axes
                                                 if name not in dialect.get_layout(v).mesh_axes) for v in values}
        self._extents: dict[str, tuple[int, ...]] = {str(v.name): dialect.shape_of(v) for v in values}
        self.input_names = tuple(str(v.name) for v in network.evaluation.graph.inputs)
        self.output_names = tuple(str(v.name) for v in network.evaluation.graph.outputs)
        self._drops = any(v.name == dialect.SEED for v in network.training.graph.inputs)
        found = {str(v.name): dialect.get_statistic(v) for v in network.training.graph.outputs}
        self._statistics = {name: s for name, s in found.items() if s is not None}
        self._state = State(self, (network.training, network.evaluation), network.weights, ranks.devices[0])
        if self.grid is not None:
            trained = [p for p in self.parameters() if p.requires_grad]
            self._sum = GradientSum(trained, self.grid.replicas)

    # --- where this process stands ---------------------------------------------------------------------

    @property
    def is_distributed(self) -> bool:
        """Whether this process holds the shard of one rank only."""
        return self.grid is not None

    @property
    def replica(self) -> int:
        """Which copy of the network this process belongs to."""
        return 0 if self.grid is None else self.grid.replica

    @property
    def replicas(self) -> int:
        """Copies of the network, each of which trains on samples of its own."""
        return 1 if self.grid is None else self.grid.replicas

    def gather(self, value: Any) -> list[Any]:
        """A value of every process, in order.

        Raises:
            ExecutionError: when a rank is gone.
        """
        return [value] if self.grid is None else gather(value)

    def extents(self, name: str) -> tuple[int, ...]:
        """Extents of a whole input or output."""
        return self._extents[self._known(name)]

    def own_box(self, name: str) -> Box:
        """The cells of an input or output that this process holds: its rank's, or all of them."""
        boxes = self._boxes[self._known(name)]
        return boxes[0] if self.is_distributed else Box.whole(self._extents[name])

    def share(self, output: str | None = None) -> float:
        """The share in an output's cells of this rank's own part: less than 1 where others have the same part."""
        return 1 / self._replicas[self._output(output)]

    def cells(self, output: str | None = None) -> int:
        """Cells of the whole output, channels included."""
        return math.prod(self._extents[self._output(output)])

    def place_cases(self, sums: torch.Tensor, output: str | None = None) -> torch.Tensor:
        """Sums per case (axis 1) of this rank's own part among those of all cases."""
        name = self._output(output)
        cases, box = self._extents[name][0], self._boxes[name][0]
        if not self.is_distributed or sums.shape[1] == cases:
            return sums
        start = next(iter(box.intervals())).start
        return torch.nn.functional.pad(sums, (0, 0, start, cases - start - sums.shape[1]))

    def _known(self, name: str) -> str:
        if name not in self._extents:
            raise PartitionError(f"the module has no input or output '{name}', only "
                                 f"{', '.join((*self.input_names, *self.output_names))}")
        return name

    def _output(self, name: str | None) -> str:
        if name is not None:
            return self._known(name)
        first, *others = self.output_names
        if others:
            raise PartitionError(f"the module has the outputs {', '.join(self.output_names)}; name one")
        return first

    # --- gradients -------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """A backward pass begins."""
        if self._sum is not None:
            self._sum.begin()

    @contextlib.contextmanager
    def no_sync(self) -> Generator[None]:
        """Let gradients gather on each rank, to be summed by the first backward pass after the block."""
        if self._shards_parameters:
            self.set_requires_gradient_sync(False)  # type: ignore[operator]  # of torch's FSDPModule
        with contextlib.nullcontext() if self._sum is None else self._sum.paused():
            yield
        if self._shards_parameters:
            self.set_requires_gradient_sync(True)  # type: ignore[operator]

    def fully_shard(self, over: Literal["batch", "all"] = "batch", **options: Any) -> Self:
        """Cut parameters, gradients and what the optimiser keeps over processes, by torch's `fully_shard` (FSDP2).

        Gradients are summed over the ranks of the mesh and averaged over copies of the network, as without it.

        Args:
            over: `batch`, the copies of the network (the ranks of one hold the same pieces), or `all` processes.
            options: of `torch.distributed.fsdp.fully_shard`, such as `mp_policy` or `reshard_after_forward`.

        Raises:
            PartitionError: when all ranks are in this process.
        """
        from runtime.training.sharding import shard_module

        if self.grid is None:
            raise PartitionError("all ranks are in this process, so there is nobody to share parameters with; "
                                 "start one process for every rank (torchrun)")
        if self._sum is not None:
            self._sum.remove()
            self._sum = None
        shard_module(self, self.grid, over, options)
        self._shards_parameters = True
        return self

    # --- weights ---------------------------------------------------------------------------------------

    def to_onnx(self, path: str | Path) -> None:
        """Write the original model with the weights and running statistics as they are now.

        In a process group all ranks call it; the first one writes.

        Raises:
            PartitionError: when the path cannot be written.
        """
        from runtime.training.export import with_weights

        arrays = self._state.arrays()
        problem: str | None = None
        if self.grid is None or torch.distributed.get_rank() == 0:
            try:
                save_model(with_weights(self._network.source, arrays), Path(path))
            except PartitionError as error:
                problem = str(error)
        found = next(filter(None, self.gather(problem)), None)
        if found is not None:
            raise PartitionError(found)

    # --- passes ----------------------------------------------------------------------------------------

    def forward(self, *arrays: torch.Tensor, **named: torch.Tensor) -> torch.Tensor | dict[str, torch.Tensor]:
        """The network's result: a tensor, or a dict when there are several outputs.

        Args:
            arrays, named: per input the whole tensor or, in a process group, this rank's own part.

        Returns:
            with all ranks in this process the whole result, else this rank's own part.

        Raises:
            PartitionError: for a missing or unknown input or wrong extents.
        """
        if not self._shards_parameters and hasattr(self, "set_gradient_divide_factor"):
            raise PartitionError("parameters were cut by torch's fully_shard, which averages the gradients of shards "
                                 "that must be summed; call module.fully_shard() instead")
        given = {**dict(zip(self.input_names, arrays, strict=False)), **named}
        wrong = [*(n for n in self.input_names if n not in given), *(n for n in given if n not in self.input_names)]
        if wrong or len(arrays) > len(self.input_names):
            raise PartitionError(f"the module takes {', '.join(self.input_names)}; "
                                 f"check {', '.join(wrong) or 'how many there are'}")
        found = self.shards({name: self.cut(name, array) for name, array in given.items()})
        results = {name: self.join(name, shards) for name, shards in found.items()}
        return results if len(results) > 1 else next(iter(results.values()))

    def shards(self, inputs: Mapping[str, Shards]) -> dict[str, Shards]:
        """Per output the cells that every local rank owns, from those of the inputs."""
        given = dict(inputs)
        if self.training and self._drops:
            given[dialect.SEED] = [torch.tensor(self.seed * self.replicas + self.replica) for _ in self._devices]
            self.seed += 1
        weights = {device: self._state.tensors(device) for device in set(self._devices)}
        touched = tuple(p for p in self.parameters() if p.requires_grad) if self._shards_parameters else ()
        found = self._passes[self.training].run(given, [weights[device] for device in self._devices], touched)
        if self.training:
            self._update_statistics(found)
        return {name: shards for name, shards in found.items() if name not in self._statistics}

    @torch.no_grad()
    def _update_statistics(self, found: Mapping[str, Shards]) -> None:
        """Move the running statistics towards the batch's, which all ranks of a copy have alike."""
        copies = self.replicas if self._options.global_statistics else 1
        for name, statistic in self._statistics.items():
            running = self._state.place(statistic.running).tensor
            batch = found[name][0].to(running.device, running.dtype)
            cells = statistic.cells * copies
            if name.endswith(dialect.VARIANCE) and not self._options.biased_variance:
                batch = batch * (cells / max(1, cells - 1))
            if self.grid is not None and copies < self.replicas:
                batch = self.grid.mean_over_replicas(batch)
            running.mul_(statistic.momentum).add_(batch, alpha=1 - statistic.momentum)

    def cut(self, name: str, tensor: torch.Tensor) -> Shards:
        """The parts of the local ranks, of an input's or output's whole tensor; this rank's own part stays as it is.

        Raises:
            PartitionError: for other extents.
        """
        boxes = self._boxes[self._known(name)]
        if self.is_distributed and tuple(tensor.shape) == boxes[0].shape:
            return [tensor.to(self._devices[0])]
        if tuple(tensor.shape) != self._extents[name]:
            raise PartitionError(f"'{name}' has extents {'x'.join(map(str, tensor.shape))}, the plan takes "
                                 f"{'x'.join(map(str, self._extents[name]))}")
        return [tensor[_cells(box)].to(device) for box, device in zip(boxes, self._devices, strict=True)]

    def join(self, name: str, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        """The whole output from the shards of all ranks; in a process group this rank's own part."""
        if self.is_distributed:
            replicas = self._replicas[name]
            found = shards[0].clone() if self._shards_parameters else shards[0]  # FSDP hooks on what is no view
            return found if replicas == 1 else scale_gradient(found, 1 / replicas)
        if self.mesh.size == 1:
            return shards[0]
        whole = torch.zeros(self._extents[name], dtype=shards[0].dtype, device=self._devices[0])
        seen: set[Box] = set()
        for shard, box in zip(shards, self._boxes[name], strict=True):
            if box and box not in seen:  # of replicas the first one counts
                seen.add(box)
                whole[_cells(box)] = shard.to(self._devices[0])
        return whole


def _cells(box: Box) -> tuple[slice, ...]:
    return tuple(slice(i.start, i.stop) for i in box.intervals())


def _wiring(ranks: Ranks, size: int, storage: str, options: Options, on_backward: Callable[[], None]) -> Wiring:
    space = Link(ranks.transport, ranks.transport.ranks, size, storage, on_backward)
    if ranks.grid is None:
        return Wiring(space)
    across = None
    if ranks.across is not None and options.global_statistics:
        across = Link(ranks.across, ranks.across.ranks, ranks.grid.replicas, storage)
    return Wiring(space, across, ranks.grid.gather_space)


def _differentiable(plan: ir.Model, ranks: Ranks, wiring: Wiring, storage: str, checkpoint: bool) -> Differentiable:
    lifetimes = find_lifetimes(plan, in_place=False)
    programs = [localise(plan, rank, lifetimes, storage, overlaps=False) for rank in ranks.transport.ranks]
    return Differentiable(plan, programs, ranks.devices, wiring, checkpoint)
