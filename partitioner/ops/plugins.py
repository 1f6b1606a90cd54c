"""Operators from outside: a user's own classes, found in files, modules or installed packages.

    pt.load_operators("my_operators.py")      partition run ... --operators my_operators.py
    PARTITIONER_OPERATORS=my_operators.py     [project.entry-points."partitioner.operators"] mine = "my_package.ops"

What is loaded by name is written to the environment, so that processes which a session starts load it too.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType

from partitioner.errors import PartitionError
from partitioner.ops.base import Operator

VARIABLE = "PARTITIONER_OPERATORS"
GROUP = "partitioner.operators"

_LOADED: set[str] = set()


def load_operators(name: str | Path) -> None:
    """Import a file (`*.py`) or a module whose classes are registered with `@register`.

    Raises:
        PartitionError: when it is not there or cannot be imported.
    """
    text = os.path.abspath(name) if str(name).endswith(".py") else str(name)
    _import(text)
    known = [item for item in os.environ.get(VARIABLE, "").split(os.pathsep) if item]
    if text not in known:
        os.environ[VARIABLE] = os.pathsep.join([*known, text])


def load_declared() -> None:
    """Import what the environment and installed packages name."""
    for item in os.environ.get(VARIABLE, "").split(os.pathsep):
        if item:
            _import(item)
    for entry in entry_points(group=GROUP):
        _import(entry.module)


def reaches_other_processes(cls: type[Operator]) -> bool:
    """Whether a process that we start knows this class too."""
    return cls.__module__.startswith("partitioner.") or cls.__module__.split(".")[0] in _LOADED


def _import(name: str) -> None:
    try:
        module = _from_file(Path(name)) if name.endswith(".py") else importlib.import_module(name)
    except FileNotFoundError:
        raise PartitionError(f"operators {name}: no such file") from None
    except Exception as error:
        line = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise PartitionError(f"operators {name}: cannot be imported ({type(error).__name__}: {line[:200]})") from None
    _LOADED.add(module.__name__.split(".")[0])


def _from_file(path: Path) -> ModuleType:
    name = f"partitioner_operators_{path.stem}"
    known = sys.modules.get(name)
    if known is not None and known.__file__ == str(path):
        return known
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
