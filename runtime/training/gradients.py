"""Sums of the parameters' gradients over the ranks, in buckets that travel while the backward pass goes on.

Every rank has all parameters and the gradient of its own shard; their sum is the gradient of the whole.  Buckets
are sent in one order on all ranks, the last layers' first, in a process group of their own; a rank without cells,
whose parameters get no gradient, sends zeros.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from partitioner.training_cost import fill_buckets
from runtime.group import Group, peers


@dataclass
class Bucket:
    """Parameters whose gradients travel together.

    Args:
        left: how many of them have no gradient yet in this pass.
    """

    parameters: list[nn.Parameter]
    left: int = 0
    flat: torch.Tensor | None = None
    work: Any = None
    earlier: dict[nn.Parameter, torch.Tensor] = field(default_factory=dict[nn.Parameter, torch.Tensor])

    def reset(self) -> None:
        """Make ready for the next pass."""
        self.left, self.flat, self.work = len(self.parameters), None, None
        self.earlier.clear()


class GradientSum:
    """Adds up the gradients of a module's parameters over the ranks, and averages them over copies of the network.

    Every process of the default group is a rank of a copy.  Gradients that are there before a pass stay as they
    are: the pass's own sum is added to them.  Those of paused passes are summed with the next pass.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], copies: int = 1) -> None:
        self._group = Group.of()
        self._copies = copies
        self._buckets = _make_buckets(list(parameters)[::-1])
        self._bucket_of = {p: bucket for bucket in self._buckets for p in bucket.parameters}
        self._next = 0
        self._paused = False
        self._unsummed: set[nn.Parameter] = set()
        self._fresh: set[nn.Parameter] = set()
        self._running = False
        self._hooks: list[Any] = []
        for parameter in self._bucket_of:
            self._hooks.append(parameter.register_hook(self._before(parameter)))
            self._hooks.append(parameter.register_post_accumulate_grad_hook(self._after))

    def remove(self) -> None:
        """Leave the gradients alone from now on."""
        for hook in self._hooks:
            hook.remove()

    @contextlib.contextmanager
    def paused(self) -> Generator[None]:
        """Let the gradients of several backward passes gather on each rank until one outside the block."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def begin(self) -> None:
        """To be called when a backward pass begins, on every rank: makes sure that it ends with all sums."""
        if self._paused or self._running:
            return
        self._running, self._next = True, 0
        for bucket in self._buckets:
            bucket.reset()
        torch.autograd.Variable._execution_engine.queue_callback(self._finish)  # type: ignore[attr-defined]

    def _before(self, parameter: nn.Parameter) -> Any:
        def hook(grad: torch.Tensor) -> torch.Tensor:
            """Set a gradient of earlier passes aside, unless it is still to be summed."""
            if not self._running:
                return grad
            self._fresh.add(parameter)
            if parameter.grad is not None and parameter not in self._unsummed:
                self._bucket_of[parameter].earlier[parameter] = parameter.grad
                parameter.grad = None
            return grad

        return hook

    def _after(self, parameter: torch.Tensor) -> None:
        assert isinstance(parameter, nn.Parameter)
        if not self._running:
            self._unsummed.add(parameter)
            return
        self._bucket_of[parameter].left -= 1
        while self._next < len(self._buckets) and self._buckets[self._next].left <= 0:
            self._send(self._buckets[self._next])
            self._next += 1

    def _send(self, bucket: Bucket) -> None:
        grads: list[torch.Tensor] = []
        for parameter in bucket.parameters:
            grad = parameter.grad
            if grad is not None and parameter not in self._fresh and parameter not in self._unsummed:
                bucket.earlier[parameter], grad = grad, None  # this pass did not come by here
            grads.append(torch.zeros_like(parameter) if grad is None else grad)
        bucket.flat = torch.cat([g.reshape(-1) for g in grads])
        with peers():
            bucket.work = dist.all_reduce(bucket.flat, group=self._group.resolve(), async_op=True)

    def _finish(self) -> None:
        """Send what has not been sent, wait for everything, and put the sums in their places."""
        self._running = False
        for bucket in self._buckets[self._next :]:
            self._send(bucket)
        for bucket in self._buckets:
            with peers():
                bucket.work.wait()
            assert bucket.flat is not None
            if self._copies > 1:
                bucket.flat /= self._copies
            for parameter, part in zip(bucket.parameters, _parts(bucket.flat, bucket.parameters), strict=True):
                earlier = bucket.earlier.get(parameter)
                parameter.grad = part if earlier is None else earlier + part
            bucket.reset()
        self._unsummed.clear()
        self._fresh.clear()


def _make_buckets(parameters: Sequence[nn.Parameter]) -> list[Bucket]:
    """Parameters of one type and device, in order, a few megabytes each."""
    found: list[Bucket] = []
    for _, run in itertools.groupby(parameters, key=lambda p: (p.dtype, p.device)):
        alike = list(run)
        places = fill_buckets([p.numel() * p.element_size() for p in alike])
        found += [Bucket([alike[place] for place in bucket]) for bucket in places]
    return found


def _parts(flat: torch.Tensor, parameters: Sequence[nn.Parameter]) -> list[torch.Tensor]:
    pieces = flat.split([p.numel() for p in parameters])
    return [piece.view_as(p) for piece, p in zip(pieces, parameters, strict=True)]
