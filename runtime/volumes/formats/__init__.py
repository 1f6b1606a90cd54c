"""One module per file format; each offers its `VolumeFormat` under the name FORMAT."""

import importlib
import pkgutil
from functools import cache

from runtime.volumes.base import VolumeFormat


@cache
def all_formats() -> tuple[VolumeFormat, ...]:
    """Every format in this folder, by module name."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return tuple(importlib.import_module(f"{__name__}.{name}").FORMAT for name in names)
