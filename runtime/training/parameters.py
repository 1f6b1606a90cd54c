"""Where the weights of a model stand in a module."""

from __future__ import annotations

from torch import nn


def place_for(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The submodule and attribute for a weight: dots make submodules, which are made when they are missing.

    A name that cannot be a path (an empty part, or one that another weight has taken) is one attribute with
    its dots replaced.
    """
    *path, last = name.split(".")
    if not all((*path, last)) or not _is_free(module, path, last):
        return module, name.replace(".", "_")
    owner = module
    for part in path:
        inner = getattr(owner, part, None)
        if not isinstance(inner, nn.Module):
            inner = nn.Module()
            owner.add_module(part, inner)
        owner = inner
    return owner, last


def _is_free(module: nn.Module, path: list[str], last: str) -> bool:
    owner = module
    for part in path:
        inner = getattr(owner, part, None)
        if not isinstance(inner, nn.Module):
            return inner is None
        owner = inner
    return not hasattr(owner, last)
