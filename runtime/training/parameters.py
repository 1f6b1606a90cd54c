"""Where the weights of a model stand in a module: in submodules along the dots of their names.

A network may call a layer `join` or a weight `seed`, as the module calls its own methods and attributes: weights stand
beside these, so that the keys of `state_dict` are the names in the file whatever they are.
"""

# pyright: reportPrivateUsage=false
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Place:
    """Where a weight stands: a name among the parameters or buffers of a submodule."""

    owner: nn.Module
    name: str

    @property
    def tensor(self) -> torch.Tensor:
        """What stands there now."""
        found = self.owner._parameters.get(self.name)  # what torch swaps when it cuts parameters
        if found is None:
            found = self.owner._buffers[self.name]
        assert found is not None
        return found

    def put(self, tensor: torch.Tensor, trains: bool, persistent: bool) -> None:
        """Let a tensor stand there, as a parameter or a buffer."""
        if trains:
            self.owner._parameters[self.name] = nn.Parameter(tensor)
            return
        self.owner._buffers[self.name] = tensor
        if not persistent:
            self.owner._non_persistent_buffers_set.add(self.name)


def place_for(module: nn.Module, name: str) -> Place:
    """The place of a weight by its name; submodules are made when they are missing.

    A name that cannot be a path (an empty part, or one that another weight has taken) is one name with its dots
    replaced.
    """
    *path, last = name.split(".")
    if not all((*path, last)) or not _is_free(module, path, last):
        return Place(module, name.replace(".", "_"))
    owner = module
    for part in path:
        inner = owner._modules.get(part)
        if inner is None:
            inner = nn.Module()
            owner._modules[part] = inner
        owner = inner
    return Place(owner, last)


def _is_free(module: nn.Module, path: list[str], last: str) -> bool:
    owner = module
    for part in path:
        if part in owner._parameters or part in owner._buffers:
            return False
        inner = owner._modules.get(part)
        if inner is None:
            return True
        owner = inner
    return not any(last in held for held in (owner._parameters, owner._buffers, owner._modules))
