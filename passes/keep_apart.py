"""keep-apart: what the network merges and the mesh splits is kept apart, where that can be done to its end.

    before, the mesh splits height            after
    a = Flatten(x (N, C, H, W))               b = Einsum(x, w' (O, C, H, W))  nchw,ochw->no
    y = Gemm(a, w, bias)                      y = Add(b, bias)

How is told in `passes.apart`.  This is the first pass that knows the mesh: what canonicalize leaves serves all meshes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
import onnx_ir.passes.common as library

from partitioner import dialect
from partitioner.mesh import Mesh
from passes.apart import keep_apart
from passes.base import Check, Pass
from passes.checks import KNOWN, STATIC
from passes.rewrite import name_nodes, name_results


@dataclass(frozen=True)
class KeepApart(Pass):
    """Let no axis that the mesh splits be merged behind another one.

    Args:
        mesh: the mesh of ranks.
        trains: whether weights must stay as they are but for their extents, and dropouts need their axes as they are.
    """

    name: ClassVar[str] = "keep-apart"
    requires: ClassVar[tuple[Check, ...]] = (STATIC, KNOWN)
    ensures: ClassVar[tuple[Check, ...]] = (STATIC, KNOWN)

    mesh: Mesh
    trains: bool = False

    def apply(self, model: ir.Model) -> None:
        if not keep_apart(model, self.mesh, self.trains):
            return
        library.RemoveUnusedNodesPass()(model)
        name_nodes(model.graph)
        name_results(model.graph)
        dialect.declare(model)
