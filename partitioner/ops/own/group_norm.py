"""Group normalisation as older files spell it: a node of ours that stands for the spelling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from partitioner.dialect import DOMAIN, GROUP_NORMALIZATION
from partitioner.ops.base import Example, NodeView, Unsupported
from partitioner.ops.registry import register
from partitioner.ops.standard.group_norm import GroupNormalization


@register
@dataclass(frozen=True)
class SpelledGroupNormalization(GroupNormalization):
    """Group normalisation with scale and bias per channel, in every opset.

    Its function is Reshape(x, [0, G, -1]), InstanceNormalization, Reshape, Mul, Add: what exporters write.
    Source: put in by canonicalize.
    """

    op_types: ClassVar[tuple[str, ...]] = (GROUP_NORMALIZATION,)
    domain: ClassVar[str] = DOMAIN
    examples: ClassVar[tuple[Example, ...]] = ()

    @classmethod
    def read(cls, view: NodeView) -> Self:
        data, groups = view.input(0), view.int("num_groups", 0)
        channels = data.shape[1] if data.rank > 2 else 0
        if groups < 1 or not channels or channels % groups:
            raise Unsupported(f"extents {list(data.shape)} have no {groups} groups of channels; correct the file")
        if any(view.input(i).shape != (channels,) for i in (1, 2)):
            raise Unsupported(f"scale of {list(view.input(1).shape)} for {channels} channels; correct the file")
        return cls(view.inputs, (data,), groups, view.float("epsilon", 1e-5))
