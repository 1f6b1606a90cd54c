"""A trained network as an ONNX file."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
import torch

from runtime.feeds import to_numpy


def with_weights(source: ir.Model, arrays: Mapping[str, torch.Tensor]) -> ir.Model:
    """The model with other weights, by name, in the types and extents of its own."""
    model = source.clone()
    for name, tensor in arrays.items():
        value = model.graph.initializers[name]
        assert value.const_value is not None
        kept = value.const_value
        array = to_numpy(tensor).reshape([int(n) for n in kept.shape.numpy()])
        value.const_value = ir.tensor(array.astype(kept.dtype.numpy()), name=name)
    return model
