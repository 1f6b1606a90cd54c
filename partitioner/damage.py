"""Plans that come from files: whether they are plans, of this version, and as they were written."""

from __future__ import annotations

import onnx_ir as ir

from partitioner import dialect, seal
from partitioner.errors import PartitionError
from passes.checks import ALL


def check_plan(model: ir.Model, where: str) -> None:
    """Verify a plan that comes from a file, from its nodes and layouts alone.

    Raises:
        PartitionError: when it is no plan, of another version, or was altered.
    """
    if not dialect.is_plan(model):
        raise PartitionError(f"{where}: is no plan; make one with `partition compile` or pt.partition")
    version = model.graph.opset_imports.get(dialect.DOMAIN)
    if version is not None and version != dialect.VERSION:
        raise PartitionError(f"{where}: is a plan of format {version}, this program reads format {dialect.VERSION}; "
                             "compile the model again")
    problem = "its format is not named" if version is None else _damage(model)
    if problem is not None:
        raise PartitionError(f"{where}: the plan is damaged ({problem}); compile the model again")
    dialect.declare(model)


def _damage(model: ir.Model) -> str | None:
    """What is wrong with a plan that has been read from a file."""
    try:
        dialect.get_mesh(model)
        found = next((problem for check in ALL for problem in check.problems(model)), None)
        if found is None and not seal.is_intact(model):
            return "it is not as it was written"
        return found
    except Exception as error:  # a damaged file can break any assumption
        return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
