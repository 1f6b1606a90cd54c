"""From a torch module and an example input to an ONNX model, by torch.onnx."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Generator
from typing import Any

import onnx_ir as ir

from partitioner.errors import PartitionError


def export_module(module: Any, example: Any) -> tuple[ir.Model, dict[str, tuple[int, ...]]]:
    """Export a module in eval mode, its spatial axes open where the network allows it.

    Args:
        module: a `torch.nn.Module`.
        example: one input tensor, or a tuple of them.

    Returns:
        the model, and the example's extents per input name.

    Raises:
        PartitionError: when there is no example or torch cannot export the module.
    """
    import torch

    if not isinstance(module, torch.nn.Module):
        raise PartitionError(f"an example input goes with a torch.nn.Module, not with {type(module).__name__}")
    if example is None:
        raise PartitionError("a torch module needs an example input: pt.partition(module, example, mesh=...)")
    examples: tuple[Any, ...] = example if isinstance(example, tuple) else (example,)
    other = next((type(e).__name__ for e in examples if not isinstance(e, torch.Tensor)), None)
    if other is not None:
        raise PartitionError(f"the example input is a {other}; give a torch tensor, or a tuple of them")
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        program = _export(module, examples)
    finally:
        for part, training in modes.items():
            part.training = training
    model = ir.from_proto(program)
    shapes = {str(v.name): tuple(int(n) for n in e.shape) for v, e in zip(model.graph.inputs, examples, strict=True)}
    return model, shapes


def _export(module: Any, examples: tuple[Any, ...]) -> Any:
    import torch

    open_axes = tuple({a: torch.export.Dim.AUTO for a in range(2, e.dim())} for e in examples)
    reason = ""
    for dynamic in (open_axes, None):
        try:
            with _quiet():
                found = torch.onnx.export(module, examples, dynamo=True, dynamic_shapes=dynamic, verbose=False)
            assert found is not None
            return found.model_proto
        except Exception as error:
            reason = _reason(error)
    raise PartitionError(f"torch.onnx cannot export {type(module).__name__}: {reason[:200]}")


def _reason(error: BaseException) -> str:
    """What the innermost error says, without colours."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    return f"{type(error).__name__}: {next(filter(None, map(str.strip, text.splitlines())), 'no reason given')}"


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Keep the exporter's chatter away from our output; what it cannot do it raises as well."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
