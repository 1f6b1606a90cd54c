"""The nodes that a calibration times: for every kind of kernel one, of the size that is asked for."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from partitioner.dialect import DOMAIN
from runtime.gauge import Trial

CHANNELS = 16
"""Of the tensors on which kernels without a convolution are timed."""


def _cube(cells: float, axes: int = 3) -> tuple[int, ...]:
    return (max(2, round(cells ** (1 / axes))),) * axes


def block(cells: float) -> tuple[int, ...]:
    """Extents of just about so many cells, the inner two of them a power of two."""
    side = 1 << max(1, round(math.log2(cells) / 3))
    return max(1, round(cells / side**2)), side, side


def _unary(op_type: str) -> Callable[[int], Trial]:
    return lambda size: Trial(op_type, ((1, CHANNELS, *block(size / 8 / CHANNELS)),))


def _moments(size: int) -> Trial:
    shape = (1, CHANNELS, *block(size / 4 / CHANNELS))
    return Trial("Moments", (shape,), attributes={"axes": [2, 3, 4]}, domain=DOMAIN)


def _affine(into: bool) -> Callable[[int], Trial]:
    return lambda size: Trial("BatchNormalization", ((1, CHANNELS, *block(size / 8 / CHANNELS)),),
                              ((CHANNELS,),) * 4, into=into)


def _concat(size: int) -> Trial:
    shape = (1, CHANNELS, *block(size / 16 / CHANNELS))
    return Trial("Concat", (shape, shape), attributes={"axis": 1})


def _pool(size: int) -> Trial:
    extents = tuple(max(2, n // 2 * 2) for n in block(size / 4.5 / CHANNELS))
    return Trial("MaxPool", ((1, CHANNELS, *extents),), attributes={"kernel_shape": [2] * 3, "strides": [2] * 3})


def _resize(size: int) -> Trial:
    shape = (1, CHANNELS, *block(size / 4 / 36 / CHANNELS))  # slow: less of it
    scales = np.array([1, 1, 2, 2, 2], np.float32)
    return Trial("Resize", (shape,), constants=(np.zeros(0, np.float32), scales), attributes={"mode": "linear"})


KINDS: dict[str, Callable[[int], Trial]] = {
    "pointwise": _unary("Relu"),
    "function": _unary("Sigmoid"),
    "softmax": lambda size: Trial("Softmax", ((1, CHANNELS, *block(size / 8 / CHANNELS)),), attributes={"axis": 1}),
    "moments": _moments,
    "affine": _affine(False),
    "affine in place": _affine(True),
    "reduce": lambda size: Trial("GlobalAveragePool", ((1, CHANNELS, *block(size / 4 / CHANNELS)),)),
    "pool": _pool,
    "resize": _resize,
    "copy": _concat,
    "move": lambda size: Trial("Relu", ((1, CHANNELS, *block(size / 8 / CHANNELS)),), into=True),
}
"""By kind, from bytes read and written."""


def _convolution(inputs: int, outputs: int, window: int, cells: int) -> tuple[Trial, float]:
    axes = 2 if window == 9 else 3
    extents, side = _cube(cells, axes), 1 if window == 1 else 3
    attributes = {"pads": [side // 2] * 2 * axes}
    trial = Trial("Conv", ((1, inputs, *extents),), ((outputs, inputs, *(side,) * axes), (outputs,)),
                  attributes=attributes)
    return trial, 2.0 * inputs * outputs * window * math.prod(extents)


def _transposed(inputs: int, outputs: int, cells: int) -> tuple[Trial, float]:
    extents = _cube(cells / 8)
    trial = Trial("ConvTranspose", ((1, inputs, *extents),), ((inputs, outputs, 2, 2, 2), (outputs,)),
                  attributes={"strides": [2, 2, 2]})
    return trial, 2.0 * inputs * outputs * 8 * math.prod(extents)


def _depthwise(window: int, cells: int) -> tuple[Trial, float]:
    channels, axes = 32, 2 if window == 9 else 3
    extents = _cube(cells / channels, axes)
    trial = Trial("Conv", ((1, channels, *extents),), ((channels, 1, *(3,) * axes), (channels,)),
                  attributes={"pads": [1] * 2 * axes, "group": channels})
    return trial, 2.0 * channels * window * math.prod(extents)


CONVOLUTIONS: dict[str, Callable[..., tuple[Trial, float]]] = {
    "conv": _convolution, "transposed": _transposed, "depthwise": _depthwise,
}
"""By family, from the features of its grid: a trial and its operations."""
