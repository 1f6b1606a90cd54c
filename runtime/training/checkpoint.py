"""Checkpoints of training, by torch.distributed.checkpoint: written by all ranks, read again on any mesh.

    pt.checkpoint.save("run/last", module, optimiser, {"step": 120})
    extra = pt.checkpoint.load("run/last", module, optimiser)

A checkpoint is a folder.  It is written beside its place and renamed when complete, so that a process that is killed
leaves the one before.  The dropouts' seed and the random state that you put into `extra` go with it.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import uuid
import warnings
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from partitioner.errors import AgreedError, ExecutionError, PartitionError
from runtime.training.module import PartitionedModule

_ABOUT = "about.json"
_VERSION = 1


def save(folder: str | Path, module: PartitionedModule, optimiser: torch.optim.Optimizer,
         extra: Mapping[str, Any] | None = None) -> None:
    """Write weights, running statistics and the optimiser's state; in a process group all ranks call it.

    Args:
        folder: is replaced when it exists.
        extra: what JSON can hold (steps, losses, schedules).

    Raises:
        PartitionError: when `extra` is nothing that JSON can hold.
        ExecutionError: on every rank, when the folder cannot be written; the one before stays.
    """
    target = Path(folder)
    try:
        about = json.dumps({"version": _VERSION, "seed": module.seed, "weights": _shapes(module), "extra": extra or {}})
    except TypeError as error:
        raise PartitionError(f"the checkpoint's extra values: {error}; give numbers, texts, lists and dicts") from None
    beside = target.with_name(f".{target.name}.{_first(module, uuid.uuid4().hex)}.part")
    problem: str | None = None
    try:
        _write(beside, module, optimiser)
    except (Exception, CheckpointException) as error:  # whatever the libraries raise for a full disk
        problem = _line(error)
    try:
        _agree(module, problem, f"{target}: the checkpoint cannot be written")
        problem = _try(lambda: _replace(beside, target, about)) if _is_first(module) else None
        _agree(module, problem, f"{target}: the checkpoint cannot be written")
    finally:
        if _is_first(module):
            shutil.rmtree(beside, ignore_errors=True)


def load(folder: str | Path, module: PartitionedModule,
         optimiser: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """Take up a checkpoint, which may come from another mesh; in a process group all ranks call it.

    Returns:
        `extra` as it was given to `save`.

    Raises:
        PartitionError: on every rank, for a folder that is no checkpoint, is damaged, or is of another model.
    """
    source = Path(folder)
    about: dict[str, Any] = {}
    problem: str | None = None
    try:
        about = _read_about(source)
        problem = _difference(source, about["weights"], _shapes(module))
    except PartitionError as error:
        problem = str(error)
    _refuse(module, problem)
    try:
        _read(source, module, optimiser)
    except (Exception, CheckpointException) as error:
        problem = f"{source}: the checkpoint is damaged ({_line(error)}); use another one"
    _refuse(module, problem)
    module.seed = int(about["seed"])
    return dict(about["extra"])


def _write(folder: Path, module: PartitionedModule, optimiser: torch.optim.Optimizer) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    weights, state = get_state_dict(module, optimiser)
    with _quiet():
        state_dict_saver.save({"weights": weights, "optimiser": state}, checkpoint_id=folder,
                              no_dist=not module.is_distributed)


def _read(folder: Path, module: PartitionedModule, optimiser: torch.optim.Optimizer | None) -> None:
    weights, state = get_state_dict(module, () if optimiser is None else optimiser)
    found: dict[str, Any] = {"weights": weights} if optimiser is None else {"weights": weights, "optimiser": state}
    with _quiet():
        state_dict_loader.load(found, checkpoint_id=folder, no_dist=not module.is_distributed)
    set_state_dict(module, () if optimiser is None else optimiser, model_state_dict=found["weights"],
                   optim_state_dict=found.get("optimiser", {}))


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Without the remark that there is one process, which is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def _replace(beside: Path, target: Path, about: str) -> None:
    """Let a complete folder take the place of an older one."""
    (beside / _ABOUT).write_text(about, encoding="utf-8")
    old = target.with_name(f"{beside.name}.old")
    if target.exists():
        target.rename(old)
    beside.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _read_about(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
        assert isinstance(found["weights"], dict) and isinstance(found["extra"], dict) and int(found["seed"]) >= 0
    except OSError as error:
        raise PartitionError(f"{folder}: is no checkpoint ({error.strerror}: {_ABOUT}); check the path") from None
    except (ValueError, KeyError, TypeError, AssertionError):
        raise PartitionError(f"{folder}: the checkpoint is damaged ({_ABOUT}); use another one") from None
    if found.get("version") != _VERSION:
        raise PartitionError(f"{folder}: is a checkpoint of format {found.get('version')}, this program reads format "
                             f"{_VERSION}; use the program that wrote it")
    return found


def _shapes(module: PartitionedModule) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in module.state_dict().items()}


def _difference(folder: Path, stored: Mapping[str, Any], own: Mapping[str, Any]) -> str | None:
    """How the weights of a checkpoint are not those of the module."""
    names = [n for n in (*own, *(s for s in stored if s not in own)) if stored.get(n) != own.get(n)]
    if not names:
        return None
    name = names[0]
    there, here = (("x".join(map(str, w[name])) or "one number") if name in w else "nothing" for w in (stored, own))
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return (f"{folder}: is a checkpoint of another model: '{name}' is {there} there and {here} here{more}; "
            "give the checkpoint of this model")


# --- all ranks alike -------------------------------------------------------------------------------------


def _is_first(module: PartitionedModule) -> bool:
    return not module.is_distributed or dist.get_rank() == 0


def _first(module: PartitionedModule, value: Any) -> Any:
    """The first rank's value on all."""
    return module.gather(value)[0]


def _agree(module: PartitionedModule, problem: str | None, what: str) -> None:
    found = next(filter(None, module.gather(problem)), None)
    if found is not None:
        raise ExecutionError(f"{what} ({found}); make room or choose another folder")


def _refuse(module: PartitionedModule, problem: str | None) -> None:
    found = next(filter(None, module.gather(problem)), None)
    if found is not None:
        raise AgreedError(found) if module.is_distributed else PartitionError(found)


def _try(action: Any) -> str | None:
    try:
        action()
    except OSError as error:
        return _line(error)
    return None


def _line(error: BaseException) -> str:
    if isinstance(error, CheckpointException) and error.failures:
        (error, *_), *_ = error.failures.values()
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return text[:200]
