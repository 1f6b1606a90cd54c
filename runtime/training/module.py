"""A plan as a torch.nn.Module: its weights are parameters, its forward pass works on shards.

    module = plan.module()                    all shards in this process
    loss = criterion(module(volume), target)
    loss.backward(); optimiser.step()

In a process group every rank holds one shard: `module(volume)` takes the whole volume or the rank's own part and
returns the rank's part of the result.  The parameters' gradients are summed over the ranks as the backward pass
makes them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Mapping, Sequence

import onnx_ir as ir
import torch
from torch import nn

from partitioner import dialect
from partitioner.errors import PartitionError
from partitioner.geometry import Box
from partitioner.lifetime import find_lifetimes
from runtime.memory import load_weight, storage_on
from runtime.program import localise
from runtime.training.communication import scale_gradient
from runtime.training.differentiable import Differentiable, Shards
from runtime.training.gradients import GradientSum
from runtime.training.parameters import is_trainable, place_for
from runtime.transports import Transport


class PartitionedModule(nn.Module):
    """The network of a plan, trained like any other module.

    Parameters and buffers have the names of the model's weights; dots make submodules, so that the keys of
    `state_dict` are those names.  In training mode batch norms use the batch's statistics and dropouts drop;
    in evaluation mode the network is the one in the file.

    Args:
        training_plan, evaluation_plan: the network as it trains and as it is, on the same mesh.
        weights: names of the weights of the file; other constants are no part of the state.
        transport: reaches the ranks that are not in this process.
        devices: per local rank.
        biased_variance: let running variances be those of the population, as ONNX has it, not torch's unbiased ones.

    Attributes:
        seed: the number from which the dropouts' masks are drawn; a new one for every training step.
    """

    def __init__(self, training_plan: ir.Model, evaluation_plan: ir.Model, weights: frozenset[str],
                 transport: Transport, devices: Sequence[torch.device], biased_variance: bool = False) -> None:
        super().__init__()
        self.mesh = dialect.get_mesh(training_plan)
        self.seed = 0
        self._biased = biased_variance
        self._devices = tuple(devices)
        self._sum: GradientSum | None = None
        self._passes = {training: _differentiable(plan, transport, devices, self._begin)
                        for training, plan in ((True, training_plan), (False, evaluation_plan))}
        coordinates = [self.mesh.coordinates(rank) for rank in transport.ranks]
        values = [*(v for v in training_plan.graph.inputs if v.name != dialect.SEED), *evaluation_plan.graph.outputs]
        self._boxes = {str(v.name): [dialect.get_layout(v).box(place) for place in coordinates] for v in values}
        self._replicas = {str(v.name): math.prod(n for name, n in self.mesh.axes
                                                 if name not in dialect.get_layout(v).mesh_axes) for v in values}
        self._outputs = tuple(str(v.name) for v in evaluation_plan.graph.outputs)
        self._extents: dict[str, tuple[int, ...]] = {str(v.name): dialect.shape_of(v) for v in values}
        self._inputs = tuple(str(v.name) for v in evaluation_plan.graph.inputs)
        self._drops = any(v.name == dialect.SEED for v in training_plan.graph.inputs)
        found = {str(v.name): dialect.get_statistic(v) for v in training_plan.graph.outputs}
        self._statistics = {name: s for name, s in found.items() if s is not None}
        self._places: dict[str, tuple[nn.Module, str]] = {}
        for plan in (training_plan, evaluation_plan):
            self._add_weights(plan, weights)
        if len(transport.ranks) < self.mesh.size:
            self._sum = GradientSum([p for p in self.parameters() if p.requires_grad])

    @property
    def is_distributed(self) -> bool:
        """Whether other processes have the other ranks."""
        return self._sum is not None

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

    def _output(self, name: str | None) -> str:
        if name is not None:
            return name
        first, *others = self._outputs
        if others:
            raise PartitionError(f"the module has the outputs {', '.join(self._outputs)}; name one")
        return first

    def _begin(self) -> None:
        """A backward pass begins."""
        if self._sum is not None:
            self._sum.begin()

    @contextlib.contextmanager
    def no_sync(self) -> Generator[None]:
        """Let gradients gather on each rank, to be summed by the first backward pass after the block."""
        with contextlib.nullcontext() if self._sum is None else self._sum.paused():
            yield

    def _add_weights(self, plan: ir.Model, weights: frozenset[str]) -> None:
        """Every weight under its own name, in submodules along its dots."""
        for value in plan.graph.initializers.values():
            name = str(value.name)
            if value.const_value is None or not value.uses() or name in self._places:
                continue
            tensor = load_weight(value.const_value, self._devices[0], "channels_first")
            owner, attribute = place_for(self, name)
            if name in weights and is_trainable(value):
                owner.register_parameter(attribute, nn.Parameter(tensor))
            else:
                owner.register_buffer(attribute, tensor, persistent=name in weights)
            self._places[name] = (owner, attribute)

    def weights(self, device: torch.device) -> dict[str, torch.Tensor]:
        """Every weight by the model's name, on a device."""
        return {name: getattr(owner, attribute).to(device) for name, (owner, attribute) in self._places.items()}

    def forward(self, *arrays: torch.Tensor, **named: torch.Tensor) -> torch.Tensor | dict[str, torch.Tensor]:
        """The network's result: a tensor, or a dict when there are several outputs.

        Args:
            arrays, named: per input the whole tensor or, in a process group, this rank's own part.

        Returns:
            with all ranks in this process the whole result, else this rank's own part.

        Raises:
            PartitionError: for a missing or unknown input or wrong extents.
        """
        given = {**dict(zip(self._inputs, arrays, strict=False)), **named}
        wrong = [*(n for n in self._inputs if n not in given), *(n for n in given if n not in self._inputs)]
        if wrong or len(arrays) > len(self._inputs):
            raise PartitionError(f"the module takes {', '.join(self._inputs)}; "
                                 f"check {', '.join(wrong) or 'how many there are'}")
        found = self.shards({name: self.cut(name, array) for name, array in given.items()})
        results = {name: self.join(name, shards) for name, shards in found.items()}
        return results if len(results) > 1 else next(iter(results.values()))

    def shards(self, inputs: Mapping[str, Shards]) -> dict[str, Shards]:
        """Per output the cells that every local rank owns, from those of the inputs."""
        given = dict(inputs)
        if self.training and self._drops:
            given[dialect.SEED] = [torch.tensor(self.seed) for _ in self._devices]
            self.seed += 1
        weights = {device: self.weights(device) for device in set(self._devices)}
        found = self._passes[self.training].run(given, [weights[device] for device in self._devices])
        if self.training:
            self._update_statistics(found)
        return {name: shards for name, shards in found.items() if name not in self._statistics}

    @torch.no_grad()
    def _update_statistics(self, found: Mapping[str, Shards]) -> None:
        """Move the running statistics towards the batch's, which all ranks have alike."""
        for name, statistic in self._statistics.items():
            owner, attribute = self._places[statistic.running]
            running = getattr(owner, attribute)
            batch = found[name][0].to(running.device, running.dtype)
            if name.endswith(dialect.VARIANCE) and not self._biased:
                batch = batch * (statistic.cells / max(1, statistic.cells - 1))
            running.mul_(statistic.momentum).add_(batch, alpha=1 - statistic.momentum)

    def cut(self, name: str, tensor: torch.Tensor) -> Shards:
        """The parts of the local ranks, of an input's or output's whole tensor; this rank's own part stays as it is.

        Raises:
            PartitionError: for other extents.
        """
        boxes = self._boxes[name]
        if len(boxes) == 1 and tuple(tensor.shape) == boxes[0].shape:
            return [tensor.to(self._devices[0])]
        if tuple(tensor.shape) != self._extents[name]:
            raise PartitionError(f"'{name}' has extents {'x'.join(map(str, tensor.shape))}, the plan takes "
                                 f"{'x'.join(map(str, self._extents[name]))}")
        return [tensor[_cells(box)].to(device) for box, device in zip(boxes, self._devices, strict=True)]

    def join(self, name: str, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        """The whole output from the shards of all ranks; in a process group this rank's own part."""
        if self.is_distributed:
            replicas = self._replicas[name]
            return shards[0] if replicas == 1 else scale_gradient(shards[0], 1 / replicas)
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


def _differentiable(plan: ir.Model, transport: Transport, devices: Sequence[torch.device],
                    on_backward: Callable[[], None]) -> Differentiable:
    lifetimes = find_lifetimes(plan)
    storage = storage_on(devices[0], dialect.get_storage(plan))
    programs = [localise(plan, rank, lifetimes, storage) for rank in transport.ranks]
    return Differentiable(programs, devices, transport, on_backward)
