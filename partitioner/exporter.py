"""From a torch module and an example input to an ONNX model, by torch.onnx."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir

from partitioner import dialect
from partitioner.errors import PartitionError


def export_module(module: Any, example: Any, train: bool = False) -> tuple[ir.Model, dict[str, tuple[int, ...]]]:
    """Export a module, its spatial axes open where the network allows it.

    In eval mode and simplified; with `train`, so that it can learn: torch's exporter would fold batch norms into
    convolutions and leave out dropouts.  Then everything but norms is traced in training mode and nothing is
    simplified; dropouts stay as nodes, those of whole channels marked as such.

    Args:
        module: a `torch.nn.Module`; left as it was.
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
    with _mode(module, train), _as_plain_dropouts(module) if train else contextlib.nullcontext(frozenset()) as whole:
        model = ir.from_proto(_export(module, examples, not train, (_open_axes(examples), None),
                                      type(module).__name__))
    if train:
        _mark_dropouts(model, whole)
        _drop_made_biases(model)
    shapes = {str(v.name): tuple(int(n) for n in e.shape) for v, e in zip(model.graph.inputs, examples, strict=True)}
    return model, shapes


def export_call(module: Any, inputs: Sequence[Any], named: Mapping[str, Any]) -> tuple[ir.Model, Rebuild]:
    """Export one call of a module in eval mode: for these extents alone, whatever the module returns.

    Args:
        module: a `torch.nn.Module`; left as it was.
        inputs: positional tensors; the graph's inputs are `inputs`, `argument_1`, ...
        named: tensors by keyword; they keep their names.

    Returns:
        the model, and the function that makes of the graph's outputs, in order, what the module returns.

    Raises:
        PartitionError: when torch cannot export the module, or it returns no tensor.
    """
    import torch
    from torch.utils import _pytree as pytree

    seen: list[tuple[list[Any], Any]] = []

    class Call(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = module

        def forward(self, *tensors: Any) -> tuple[Any, ...]:
            first = tensors[: len(inputs)]
            found = self.network(*first, **dict(zip(named, tensors[len(inputs) :], strict=True)))
            leaves, structure = pytree.tree_flatten(found)
            results = list({id(leaf): leaf for leaf in leaves if isinstance(leaf, torch.Tensor)}.values())
            places = {id(result): index for index, result in enumerate(results)}
            seen.append(([_Place(places[id(n)]) if id(n) in places else n for n in leaves], structure))
            return tuple(results)

    names = ("inputs", *(f"argument_{i}" for i in range(1, len(inputs))), *named)
    with _mode(module, False):
        proto = _export(Call(), (*inputs, *named.values()), True, (None,), type(module).__name__, names)
    model = ir.from_proto(proto)
    leaves, structure = seen[-1]
    if not len(model.graph.outputs):
        raise PartitionError(f"{type(module).__name__} returns no tensor; give a network that does")
    _name_outputs(model, pytree.tree_unflatten(leaves, structure))
    return model, lambda results: pytree.tree_unflatten(
        [results[n.index] if isinstance(n, _Place) else n for n in leaves], structure)


Rebuild = Callable[[Sequence[Any]], Any]


@dataclass(frozen=True)
class _Place:
    """Where an output of the graph belongs in what the module returns."""

    index: int


def _name_outputs(model: ir.Model, returned: Any) -> None:
    """Outputs take the keys of a dict, so that the user can name them; where these are taken they keep theirs."""
    if not isinstance(returned, Mapping):
        return
    taken = {v.name for v in (*model.graph.inputs, *model.graph.initializers.values())}
    taken |= {v.name for node in model.graph for v in node.outputs}
    for key, place in returned.items():
        if isinstance(key, str) and isinstance(place, _Place) and key and key not in taken:
            value = model.graph.outputs[place.index]
            if value.producer() is not None and not value.is_graph_input():
                value.name = key
                taken.add(key)


@contextlib.contextmanager
def _mode(module: Any, train: bool) -> Generator[None]:
    """All in eval mode, or all but the norms in training mode; as it was afterwards."""
    import torch

    norms = (torch.nn.modules.batchnorm._BatchNorm, torch.nn.modules.instancenorm._InstanceNorm)  # pyright: ignore
    modes = {part: part.training for part in module.modules()}
    module.train(train)
    for part in modes:
        if isinstance(part, norms):
            part.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


@contextlib.contextmanager
def _as_plain_dropouts(module: Any) -> Generator[frozenset[str]]:
    """Let dropouts of whole channels be exported as if they were of cells; gives their names."""
    import torch
    from torch.nn import functional

    kinds = (torch.nn.Dropout1d, torch.nn.Dropout2d, torch.nn.Dropout3d)
    found = {name: part for name, part in module.named_modules() if isinstance(part, kinds)}
    for part in found.values():
        setattr(part, "forward", partial(functional.dropout, p=part.p, training=True))  # noqa: B010 (its own signature)
    try:
        yield frozenset(found)
    finally:
        for part in found.values():
            del part.forward


def _mark_dropouts(model: ir.Model, whole: frozenset[str]) -> None:
    """Dropouts do nothing unless a plan is made for training; the model names those of whole channels."""
    found: list[str] = []
    for node in model.graph:
        if node.op_type != "Dropout":
            continue
        if len(node.inputs) > 2:
            node.replace_input_with(2, None)
        scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
        if any(f"'{name}'" in scopes for name in whole):
            found.append(str(node.name))
    dialect.set_whole_channels(model, found)


def _drop_made_biases(model: ir.Model) -> None:
    """Leave out the zeros that torch writes for a bias that there is not; in 3D they have wrong extents."""
    for node in model.graph:
        bias = node.inputs[2] if node.op_type == "Conv" and len(node.inputs) > 2 else None
        made = None if bias is None else bias.producer()
        if made is None or made.op_type != "Expand":
            continue
        value = made.inputs[0]
        source = None if value is None else value.producer()
        if source is not None and source.op_type == "CastLike" and not np.any(_constant(source.inputs[0])):
            node.replace_input_with(2, None)


def _constant(value: ir.Value | None) -> Any:
    """The number of a Constant node; NaN for anything else."""
    node = None if value is None else value.producer()
    found = None if node is None or node.op_type != "Constant" else node.attributes.get("value")
    return np.nan if found is None else found.as_tensor().numpy()


def folded_norms(model: ir.Model) -> list[str]:
    """Names of the layers that took up a batch norm when torch exported them, as far as the file shows it.

    torch.export's simplification leaves the norm's module among the node's remarks; the tracer gives weights
    that it computed names of its own.
    """
    return [str(node.name) for node in model.graph if _took_norm(node)]


def _took_norm(node: ir.Node) -> bool:
    if node.op_type not in ("Conv", "ConvTranspose", "Gemm") or len(node.inputs) < 2:
        return False
    remarks = node.metadata_props
    if "FuseBatchNorm" in remarks.get("pkg.onnxscript.rewriter.rule_name", ""):
        return True
    if "BatchNorm" in remarks.get("pkg.torch.onnx.class_hierarchy", ""):
        return True
    weight = node.inputs[1]
    return weight is not None and re.fullmatch(r"onnx::Conv(Transpose)?_\d+", str(weight.name)) is not None


def _export(module: Any, examples: tuple[Any, ...], optimize: bool, extents: Sequence[Any], what: str,
            names: Sequence[str] | None = None) -> Any:
    """The first export that works, with each choice of open axes in turn."""
    import torch

    reason = ""
    for dynamic in extents:
        try:
            with _quiet():
                found = torch.onnx.export(module, examples, dynamo=True, dynamic_shapes=dynamic, optimize=optimize,
                                          verbose=False, input_names=names)
            assert found is not None
            return found.model_proto
        except Exception as error:
            reason = _reason(error)
    raise PartitionError(f"torch.onnx cannot export {what}: {reason[:200]}")


def _open_axes(examples: Sequence[Any]) -> Any:
    """Spatial axes, open where the network allows it."""
    import torch

    return tuple({a: torch.export.Dim.AUTO for a in range(2, e.dim())} for e in examples)


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
