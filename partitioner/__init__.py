"""Spatial partitioning of convolutional networks: ONNX in, exact shards with explicit halo exchanges out.

    import partitioner as pt
    plan = pt.partition("unet3d.onnx", mesh="depth=2,height=2", shapes={"volume": (1, 1, 121, 160, 143)})
    outputs = plan.run({"volume": array})

Names load when they are first used, so that `import partitioner` needs neither torch nor onnx.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from partitioner import monai
    from partitioner.api import Plan, load, partition
    from partitioner.errors import ExecutionError, PartitionError
    from partitioner.mesh import Mesh
    from partitioner.ops.plugins import load_operators
    from partitioner.outlook import forecast
    from partitioner.planner.scaling import Scaling
    from partitioner.profile import Link, Profile
    from partitioner.sessions import Session
    from partitioner.verify import Verification
    from runtime.training import checkpoint, data, losses

__version__ = "0.1.0"

_HOMES = {
    "partition": "partitioner.api",
    "load": "partitioner.api",
    "Plan": "partitioner.api",
    "forecast": "partitioner.outlook",
    "Scaling": "partitioner.planner.scaling",
    "Session": "partitioner.sessions",
    "Verification": "partitioner.verify",
    "Mesh": "partitioner.mesh",
    "load_operators": "partitioner.ops.plugins",
    "Link": "partitioner.profile",
    "Profile": "partitioner.profile",
    "PartitionError": "partitioner.errors",
    "ExecutionError": "partitioner.errors",
}

_MODULES = {"checkpoint": "runtime.training.checkpoint", "data": "runtime.training.data",
            "losses": "runtime.training.losses", "monai": "partitioner.monai"}

__all__ = ["ExecutionError", "Link", "Mesh", "PartitionError", "Plan", "Profile", "Scaling", "Session", "Verification",
           "checkpoint", "data", "forecast", "load", "load_operators", "losses", "monai", "partition"]


def __getattr__(name: str) -> Any:
    import importlib

    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    if name not in _HOMES:
        raise AttributeError(f"module 'partitioner' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
