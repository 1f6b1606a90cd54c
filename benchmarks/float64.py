"""A 3D network in float64, its convolutions computed slab by slab.

torch has no float64 convolution that works in place: it writes the windows of the whole volume out as a matrix, 27
times the input for a kernel of 3.  Slab by slab along the first axis that matrix is small, and the result is the same.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

_MATRIX_BYTES = 2**28


def in_float64(network: nn.Module) -> nn.Module:
    """The network itself, its weights and buffers in float64; plain 3D convolutions compute slab by slab."""
    for module in network.modules():
        if isinstance(module, nn.Conv3d) and set((*module.stride, *module.dilation, module.groups)) == {1}:
            vars(module)["forward"] = partial(_in_slabs, module)
    return network.double()


def _in_slabs(convolution: nn.Conv3d, volume: Tensor) -> Tensor:
    """The convolution of a volume, with stride 1 and zeros around it."""
    kernel, (pad, *others) = convolution.kernel_size[0], (int(p) for p in convolution.padding)
    depth = volume.shape[2] + 2 * pad - kernel + 1
    plane = volume[:, :, 0].numel() * volume.element_size() * convolution.weight[0, 0].numel()
    thickness = max(1, _MATRIX_BYTES // plane)
    slabs: list[Tensor] = []
    for start in range(0, depth, thickness):
        first, last = start - pad, min(start + thickness, depth) - pad + kernel - 1
        part = volume[:, :, max(0, first) : min(last, volume.shape[2])]
        around = (0, 0, 0, 0, max(0, -first), max(0, last - volume.shape[2]))
        part = functional.pad(part, around)
        slabs.append(functional.conv3d(part, convolution.weight, convolution.bias, padding=(0, *others)))
    return torch.cat(slabs, dim=2)
