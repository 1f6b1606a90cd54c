"""Spatial parallelism by hand with torch.distributed over gloo, as one writes it for one network.

    naive    the module as it is; before every 3x3x3 convolution the neighbours' planes, joined by torch.cat
    careful  batch norms folded, channels last, oneDNN called directly; every convolution reads a padded buffer that its
             producer has filled, planes are sent from and received into that buffer

Each rank holds an equal part of the first spatial axis.  The volume and the logits lie in shared memory.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.models import UNetConfig
from benchmarks.ranks import Ranks, Step, opened_ranks
from benchmarks.runner import Runner, Traffic
from benchmarks.suite import Case, Side
from benchmarks.weights import SLOPE, Convolution, folded, refuse_uneven


@contextmanager
def opened_gloo(side: Side, case: Case, threads: int) -> Generator[Runner]:
    """The side's runner, its ranks sharing the threads.

    Raises:
        SideRefusal: for a network or extents that it is not written for.
    """
    weights = folded(case)
    refuse_uneven(case, side.processes)
    classes = len(weights.head.bias)
    volume = torch.empty(case.shape).share_memory_()
    logits = torch.empty(case.shape[0], classes, *case.shape[2:]).share_memory_()
    make = partial(_rank, side, case, max(1, threads // side.processes), volume, logits)
    with opened_ranks(side.processes, make) as ranks:
        yield _Gloo(ranks, volume, logits)


class _Gloo(Runner):
    """Ranks that compute their parts, asked from here."""

    def __init__(self, ranks: Ranks, volume: Tensor, logits: Tensor) -> None:
        self._ranks, self._volume, self._logits = ranks, volume, logits
        self._sent: list[tuple[int, int]] = []

    def run(self, volume: NDArray[np.float32]) -> NDArray[np.float32]:
        self._volume.copy_(torch.from_numpy(volume))
        self._sent = self._ranks.step()
        return self._logits.numpy()

    def counted(self) -> Traffic:
        sent, messages = zip(*self._sent, strict=True)
        return Traffic(sum(sent), sum(messages), 0, max(sent), max(messages))


def _rank(side: Side, case: Case, threads: int, volume: Tensor, logits: Tensor) -> Step:
    """A rank's pass from its part of the volume to its part of the logits; returns bytes and messages sent."""
    torch.set_num_threads(threads)
    extent = case.shape[2] // side.processes
    own = (slice(None), slice(None), slice(dist.get_rank() * extent, (dist.get_rank() + 1) * extent))
    wire = _Wire()
    network = _Naive(case, wire) if side.kind == "naive gloo" else _Careful(case, wire, extent)

    def step() -> tuple[int, int]:
        wire.sent_bytes = wire.messages = 0
        with torch.inference_mode():
            logits[own] = network(volume[own])
        return wire.sent_bytes, wire.messages

    return step


class _Wire:
    """Planes to and from the ranks before and after this one; counts what it sends."""

    def __init__(self) -> None:
        rank, last = dist.get_rank(), dist.get_world_size() - 1
        self.before = rank - 1 if rank else None
        self.after = rank + 1 if rank < last else None
        self.sent_bytes = self.messages = 0

    def exchange(self, first: Tensor, last: Tensor, before: Tensor, after: Tensor) -> None:
        """Send the own first and last planes, receive those beyond them; all are dense."""
        works: list[Any] = []
        for peer, mine, theirs in ((self.before, first, before), (self.after, last, after)):
            if peer is None:
                continue
            works += [dist.irecv(theirs, peer), dist.isend(mine, peer)]
            self.sent_bytes += mine.numel() * mine.element_size()
            self.messages += 1
        for work in works:
            work.wait()


class _Naive:
    """The torch module, with halos joined to the input of every 3x3x3 convolution."""

    def __init__(self, case: Case, wire: _Wire) -> None:
        self._network = case.network.build()
        for module in self._network.modules():
            if isinstance(module, nn.Conv3d) and module.kernel_size[0] == 3:
                vars(module)["forward"] = partial(_joined, wire, module)

    def __call__(self, volume: Tensor) -> Tensor:
        return self._network(volume)


def _joined(wire: _Wire, convolution: nn.Conv3d, x: Tensor) -> Tensor:
    first, last = x[:, :, :1].contiguous(), x[:, :, -1:].contiguous()
    before, after = torch.zeros_like(first), torch.zeros_like(last)
    wire.exchange(first, last, before, after)
    return functional.conv3d(torch.cat([before, x, after], 2), convolution.weight, convolution.bias, padding=(0, 1, 1))


class _Careful:
    """Folded weights, padded buffers made once, oneDNN's convolution whatever the extents."""

    def __init__(self, case: Case, wire: _Wire, depth: int) -> None:
        assert isinstance(case.network, UNetConfig)
        weights = folded(case)
        self._wire, self._window = wire, weights.window
        self._encoder = [[_channels_last(c) for c in pair] for pair in weights.encoder]
        self._decoder = [[_channels_last(c) for c in pair] for pair in weights.decoder]
        self._ups, self._head = [_channels_last(c) for c in weights.ups], _channels_last(weights.head)
        space = (depth, *case.shape[3:])
        self._levels = [tuple(n >> level for n in space) for level in range(len(weights.encoder))]
        self._batch = case.shape[0]
        assert self._batch == 1, "planes of a padded buffer are dense for one volume alone"

    def __call__(self, volume: Tensor) -> Tensor:
        skips: list[Tensor] = []
        x = volume
        for level, pair in enumerate(self._encoder):
            buffer = self._buffer(level, pair[0])
            if level:
                _inner(buffer).copy_(functional.max_pool3d(x, 2))
            elif self._window is None:
                _inner(buffer).copy_(x)
            else:
                torch.tanh((x - self._window[0]) / self._window[1], out=_inner(buffer))
            x = self._pair(buffer, level, pair)
            skips.append(x)
        skips.pop()
        for up, pair in zip(self._ups, self._decoder, strict=True):
            skip, level = skips.pop(), len(skips)
            buffer = self._buffer(level, pair[0])
            inner, channels = _inner(buffer), skip.shape[1]
            inner[:, :channels].copy_(skip)
            del skip
            inner[:, channels:].copy_(functional.conv_transpose3d(x, up.weight, up.bias, stride=2))
            x = self._pair(buffer, level, pair)
        return functional.conv3d(x, self._head.weight, self._head.bias)

    def _buffer(self, level: int, convolution: Convolution) -> Tensor:
        """Room for the input of a convolution with a plane before and after it, zeros at the volume's border."""
        depth, height, width = self._levels[level]
        shape = (self._batch, convolution.weight.shape[1], depth + 2, height, width)
        found = torch.empty(shape, memory_format=torch.channels_last_3d)
        if self._wire.before is None:
            found[:, :, :1].zero_()
        if self._wire.after is None:
            found[:, :, -1:].zero_()
        return found

    def _pair(self, buffer: Tensor, level: int, pair: list[Convolution]) -> Tensor:
        """Two convolutions; the first one's activation writes into the second one's buffer."""
        middle = self._buffer(level, pair[1])
        y = self._convolved(buffer, pair[0])
        torch.ops.aten.leaky_relu.out(y, SLOPE, out=_inner(middle))
        return functional.leaky_relu_(self._convolved(middle, pair[1]), SLOPE)

    def _convolved(self, buffer: Tensor, convolution: Convolution) -> Tensor:
        dense = buffer.permute(0, 2, 3, 4, 1)[0]  # (depth, height, width, channels), without gaps
        self._wire.exchange(dense[1], dense[-2], dense[0], dense[-1])
        one = [1, 1, 1]
        return torch.ops.mkldnn._convolution_pointwise(
            buffer, convolution.weight, convolution.bias, [0, 1, 1], one, one, 1, "none", [], ""
        )


def _inner(buffer: Tensor) -> Tensor:
    """A padded buffer without the planes of its neighbours."""
    return buffer[:, :, 1:-1]


def _channels_last(found: Convolution) -> Convolution:
    return Convolution(found.weight.contiguous(memory_format=torch.channels_last_3d), found.bias)
