"""Heavy modules that load when they are first used, so that planning and `--help` stay quick."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any


class LazyModule(ModuleType):
    """Stands for a module until an attribute is asked for."""

    def __getattr__(self, name: str) -> Any:
        found = getattr(importlib.import_module(self.__name__), name)
        setattr(self, name, found)
        return found


torch = LazyModule("torch")
functional = LazyModule("torch.nn.functional")
