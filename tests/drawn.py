"""All drawers: every module of drawn nodes registers its own."""

from __future__ import annotations

from collections.abc import Callable

from tests import (
    drawn_dense,
    drawn_index,
    drawn_nodes,
    drawn_norms,
    drawn_opaque,
    drawn_pointwise,
    drawn_quantized,
    drawn_sampling,
    drawn_shapes,
)
from tests.builder import DRAWERS, Builder
from tests.drawn_nodes import conv, conv_transpose, join, norm, pool, skip
from tests.drawn_opaque import IN_FLOAT32, WITHOUT_RULE
from tests.drawn_pointwise import unary
from tests.drawn_sampling import resize

__all__ = ["CONVOLUTIONAL", "DRAWN", "IN_FLOAT32", "MODULES", "SPATIAL", "WITHOUT_RULE", "drawers"]

MODULES = (drawn_dense, drawn_index, drawn_nodes, drawn_norms, drawn_opaque, drawn_pointwise, drawn_quantized,
           drawn_sampling, drawn_shapes)

SPATIAL = (conv, conv, conv_transpose, pool, resize, unary)
CONVOLUTIONAL = (conv, conv, skip, conv_transpose, pool, norm, unary, resize, join)
DRAWN = frozenset(name for drawer in DRAWERS for name in drawer.names)
"""The operators that some drawer draws."""


def drawers(exact: bool, focus: str = "") -> list[Callable[[Builder], bool]]:
    """The functions that draw nodes.

    Args:
        exact: only those that small whole numbers leave exact.
        focus: only those of this operator.
    """
    return [d.draw for d in DRAWERS if (d.exact or not exact) and (not focus or focus in d.names)]
