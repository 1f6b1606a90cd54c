"""The sides of a case on one accelerator: the volume lies there, the output stays there; a run ends when it is done."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.errors import SideRefusal
from benchmarks.models import INPUT_NAME, OUTPUT_NAME
from benchmarks.runner import Runner
from benchmarks.suite import Case, Device, Side, example_input

if TYPE_CHECKING:
    import partitioner as pt


@contextmanager
def opened_on_device(side: Side, case: Case, model: Path, device: Device) -> Generator[Runner]:
    """The side's runner.

    Raises:
        SideRefusal: for a side that is not written for accelerators.
    """
    if side.own:
        import partitioner as pt

        plan = pt.partition(model, mesh=side.mesh, shapes={INPUT_NAME: case.shape})
        with plan.session(backend=side.backend, device=device) as session:
            yield _Session(session, case, device)
    elif side.kind in ("torch eager", "torch channels last", "torch.compile"):
        yield _Module(side, case, device)
    else:
        raise SideRefusal(f"{side.kind} is not measured on {device}")


class _OnDevice(Runner):
    """The volume on the device, and how much memory it holds."""

    def __init__(self, case: Case, device: Device) -> None:
        import torch

        self._torch = torch
        self._cuda = device == "cuda"
        torch.backends.cudnn.benchmark = True
        self._volume = torch.from_numpy(example_input(case)).to(device, getattr(torch, case.dtype))
        self._idle: int | None = None

    def run(self, volume: NDArray[np.float32]) -> Any:
        """On the volume that lies there; the one given is the same."""
        if self._cuda and self._idle is None:
            self._torch.cuda.reset_peak_memory_stats()
            self._idle = self._torch.cuda.memory_allocated()
        with self._torch.inference_mode():
            output = self.forward()
        if self._cuda:
            self._torch.cuda.synchronize()
        return output

    @abstractmethod
    def forward(self) -> Any:
        """The pass itself."""

    def array(self, output: Any) -> NDArray[np.float32]:
        return output.float().cpu().numpy()

    def device_bytes(self) -> int | None:
        return self._torch.cuda.max_memory_allocated() - (self._idle or 0) if self._cuda else None


class _Module(_OnDevice):
    """The torch module, compiled or not, channels last unless it is plain eager."""

    def __init__(self, side: Side, case: Case, device: Device) -> None:
        super().__init__(case, device)
        torch = self._torch
        network: Any = case.network.build().to(device, getattr(torch, case.dtype))
        if side.kind != "torch eager":
            network = network.to(memory_format=torch.channels_last_3d)
            self._volume = self._volume.contiguous(memory_format=torch.channels_last_3d)
        self._network = torch.compile(network, dynamic=False) if side.kind == "torch.compile" else network
        if side.kind == "torch.compile":
            with torch.inference_mode():
                self.forward()

    def forward(self) -> Any:
        return self._network(self._volume)


class _Session(_OnDevice):
    """A plan's session, all shards on the one device."""

    def __init__(self, session: pt.Session, case: Case, device: Device) -> None:
        super().__init__(case, device)
        self._session = session

    def forward(self) -> Any:
        return self._session.run({INPUT_NAME: self._volume})[OUTPUT_NAME]
