"""Parameters and buffers of a module from the weights of a model, and back.

A weight stands under its own name.  Constants that canonicalize made of one (a scale per group repeated for every
channel, a vector in other extents) are made of the parameter anew in every pass, so that it gets their gradients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import nn

from partitioner import dialect
from partitioner.ops.weights import is_trainable
from runtime.memory import load_weight
from runtime.training.parameters import Place, place_for


@dataclass(frozen=True)
class Use:
    """A constant of a plan: the weight that it is made of, and its extents where they are others."""

    place: Place
    shape: tuple[int, ...] | None = None

    def tensor(self, device: torch.device) -> torch.Tensor:
        """The constant's value now, on a device."""
        found = self.place.tensor.to(device)
        if self.shape is None:
            return found
        return found.reshape(-1).repeat_interleave(_size(self.shape) // found.numel()).reshape(self.shape)


class State:
    """All weights of a module.

    Args:
        module: gets the parameters and buffers.
        plans: the network as it trains and as it is.
        sources: the weights of the file by name.
        device: where parameters lie.
    """

    def __init__(self, module: nn.Module, plans: Sequence[ir.Model], sources: Mapping[str, ir.TensorProtocol],
                 device: torch.device) -> None:
        self._module = module
        self._device = device
        self._sources = sources
        self.places: dict[str, Place] = {}
        self._uses: dict[str, Use] = {}
        trained = {dialect.get_source(v) for plan in plans for v in plan.graph.initializers.values() if is_trainable(v)}
        for plan in plans:
            for value in plan.graph.initializers.values():
                if value.const_value is not None and value.uses() and str(value.name) not in self._uses:
                    self._add(value, value.const_value, trained)

    def _add(self, value: ir.Value, tensor: ir.TensorProtocol, trained: set[str]) -> None:
        name, source = str(value.name), dialect.get_source(value)
        if source not in self._sources:
            self._uses[name] = Use(self._place(name, tensor, False, False))
            return
        original = self._sources[source]
        place = self.places.get(source) or self._place(source, original, source in trained, True)
        self.places[source] = place
        shape = tuple(int(n) for n in tensor.shape.numpy())
        self._uses[name] = Use(place, None if shape == tuple(place.tensor.shape) else shape)

    def _place(self, name: str, tensor: ir.TensorProtocol, trains: bool, persistent: bool) -> Place:
        place = place_for(self._module, name)
        place.put(load_weight(tensor, self._device, "channels_first"), trains, persistent)
        return place

    def tensors(self, device: torch.device) -> dict[str, torch.Tensor]:
        """Every constant of the plans by name, on a device."""
        return {name: use.tensor(device) for name, use in self._uses.items()}

    def place(self, name: str) -> Place:
        """Where the constant of a plan stands."""
        return self._uses[name].place

    def arrays(self) -> dict[str, torch.Tensor]:
        """Every weight of the file as it is now, whole, in host memory.

        With parameters that are cut over processes, all of these must ask.
        """
        found: dict[str, torch.Tensor] = {}
        for name, place in self.places.items():
            tensor = place.tensor.detach()
            whole = getattr(tensor, "full_tensor", None)
            found[name] = (tensor if whole is None else whole()).cpu()
        return found


def _size(shape: Sequence[int]) -> int:
    size = 1
    for extent in shape:
        size *= extent
    return size
