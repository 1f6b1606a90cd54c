"""All that is put around a network, in one order: models and flips inside, then channels, steps, operations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

import onnx_ir as ir

from partitioner.compose.channels import part_names, with_channels_split
from partitioner.compose.copies import averaged, with_flips
from partitioner.compose.outputs import with_output_ops
from partitioner.compose.preprocess import with_preprocess
from partitioner.errors import PartitionError
from partitioner.loader import load_model


class Around(TypedDict, total=False):
    """What `pt.partition` takes beside the model, by the words of the command; see `Wrapping`."""

    preprocess: Sequence[str]
    output_ops: Sequence[str]
    tta: str | None
    ensemble: Sequence[Any]


@dataclass(frozen=True)
class Wrapping:
    """What is put around a network.

    Args:
        preprocess: steps before it, see `with_preprocess`.
        output_ops: operations after it, see `with_output_ops`.
        tta: `flips`, see `with_flips`.
        ensemble: further models with which it is averaged.
        channels: per input that several files fill, the channels of each.
    """

    preprocess: tuple[str, ...] = ()
    output_ops: tuple[str, ...] = ()
    tta: str | None = None
    ensemble: tuple[ir.Model, ...] = ()
    channels: Mapping[str, Sequence[int]] = field(default_factory=dict[str, Sequence[int]])

    @classmethod
    def of(cls, around: Around, load: Callable[[Any], ir.Model] = load_model) -> Wrapping:
        """What a user of the API gave; `load` reads the models of an ensemble.

        Raises:
            PartitionError: when a model of the ensemble cannot be read.
            TypeError: for an unknown word.
        """
        unknown = next((word for word in around if word not in Around.__annotations__), None)
        if unknown is not None:
            raise TypeError(f"partition() got an unexpected keyword argument '{unknown}'")
        tta = around.get("tta")
        if tta is not None and not isinstance(tta, str):
            raise PartitionError(f"tta={tta!r}: give a text, as 'flips' or 'flips=depth,height'")
        return cls(_texts(around.get("preprocess"), "preprocess"), _texts(around.get("output_ops"), "output_ops"), tta,
                   tuple(load(m) for m in _list(around.get("ensemble"))))

    def __bool__(self) -> bool:
        return bool(self.preprocess or self.output_ops or self.tta is not None or self.ensemble or self.channels)


def compose(model: ir.Model, wrapping: Wrapping) -> ir.Model:
    """A model with all that is put around it; the model itself stays as it is.

    Raises:
        PartitionError: for words that are not understood, or what makes no sense with this model.
    """
    found = model
    if wrapping.ensemble:
        found = averaged([found, *wrapping.ensemble])
    if wrapping.tta is not None:
        found = with_flips(found, wrapping.tta)
    for name, counts in wrapping.channels.items():
        found = with_channels_split(found, name, counts)
    if wrapping.preprocess:
        parts = {name: part_names(name, len(counts)) for name, counts in wrapping.channels.items()}
        found = with_preprocess(found, wrapping.preprocess, parts)
    if wrapping.output_ops:
        found = with_output_ops(found, wrapping.output_ops)
    return found


def _list(given: Any) -> tuple[Any, ...]:
    """A list as the user gave it; a single text or model is a list of one."""
    if given is None:
        return ()
    if isinstance(given, str) or not isinstance(given, Sequence):
        return (given,)
    return tuple(given)


def _texts(given: Any, what: str) -> tuple[str, ...]:
    found = _list(given)
    wrong = next((item for item in found if not isinstance(item, str)), None)
    if wrong is not None:
        raise PartitionError(f"{what}={given!r}: give a list of texts")
    return found
