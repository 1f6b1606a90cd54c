"""What the machine can do at most, and what a case asks of it: `python -m benchmarks.limits SETTINGS` prints JSON.

The arithmetic limit is the best of large convolutions and a matrix product, the copy limit that of a copy of memory
that no cache holds, bytes read and bytes written together.  A side's share of the first is the network's arithmetic
over its seconds; of the second, what it must read and write when every layer's input and output rest in memory.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.errors import SideError
from benchmarks.suite import Case, Device

_TRIES = 5
_CONVOLUTIONS = {"cpu": ((64, 48), (128, 32)), "cuda": ((128, 128), (256, 64))}
_PRODUCT = {"cpu": 2048, "cuda": 8192}
_COPIED_BYTES = {"cpu": 1 << 27, "cuda": 1 << 31}


@dataclass(frozen=True)
class Limits:
    """Operations and bytes per second; `best` names the operation that was fastest."""

    flops: float
    bytes: float
    best: str


@dataclass(frozen=True)
class Work:
    """What a case asks for: floating-point operations, a product and its sum being two, and bytes."""

    flops: int
    bytes: int


def measured(threads: int, device: Device, dtype: str, timeout: float) -> Limits:
    """The limits, found by a process of its own.

    Raises:
        SideError: when that fails.
    """
    settings = json.dumps({"threads": threads, "device": device, "dtype": dtype})
    try:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.limits", settings],
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise SideError(f"the limits of the machine: no answer in {timeout:g} s; raise --timeout") from None
    if done.returncode:
        raise SideError(f"the limits of the machine: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}")
    return Limits(**json.loads(done.stdout))


def work(case: Case) -> Work:
    """Counted on tensors without values; layers that one pass computes (norms, activations) move nothing themselves."""
    import torch
    from torch.nn import functional
    from torch.utils.flop_counter import FlopCounterMode

    network = case.network.build().to("meta", getattr(torch, case.dtype))
    volume = torch.empty(case.shape, device="meta", dtype=getattr(torch, case.dtype))
    moved: list[int] = []
    layers = ("Conv", "Pool")
    for module in network.modules():
        if any(word in type(module).__name__ for word in layers):
            module.register_forward_hook(lambda _, given, found: moved.append(_bytes(given[0]) + _bytes(found)))
    with FlopCounterMode(display=False) as counter:
        logits = network.train(case.task == "training")(volume)
        if case.task == "training":
            labels = torch.zeros(logits.shape[0], *logits.shape[2:], dtype=torch.int64, device="meta")
            functional.cross_entropy(logits, labels).backward()
    # Backwards each layer reads its input and two gradients' worth of its output and writes one of its input.
    return Work(int(counter.get_total_flops()), sum(moved) * (3 if case.task == "training" else 1))


def _bytes(tensor: Any) -> int:
    return tensor.numel() * tensor.element_size()


# --- the process --------------------------------------------------------------------------------------


def main(argv: list[str]) -> int:
    """Measure and print."""
    import torch

    settings = json.loads(argv[0])
    device, dtype = settings["device"], getattr(torch, settings["dtype"])
    torch.set_num_threads(settings["threads"])
    torch.backends.cudnn.benchmark = True
    with torch.inference_mode():
        rates = {name: flops / _best(run, device) for name, flops, run in _operations(device, dtype)}
        source = torch.zeros(_COPIED_BYTES[device], dtype=torch.uint8, device=device)
        target = torch.zeros_like(source)
        copied = 2 * source.numel() / _best(lambda: target.copy_(source), device)
    best = max(rates, key=lambda name: rates[name])
    sys.stdout.write(json.dumps(asdict(Limits(rates[best], copied, best))))
    return 0


def _operations(device: Device, dtype: Any) -> list[tuple[str, int, Callable[[], Any]]]:
    """Name, floating-point operations, and what to call."""
    import torch
    from torch.nn import functional

    found: list[tuple[str, int, Callable[[], Any]]] = []
    for channels, extent in _CONVOLUTIONS[device]:
        volume = torch.rand(1, channels, extent, extent, extent, device=device, dtype=dtype)
        weight = torch.rand(channels, channels, 3, 3, 3, device=device, dtype=dtype)
        given = [tensor.contiguous(memory_format=torch.channels_last_3d) for tensor in (volume, weight)]
        name = f"3x3x3 convolution of {channels} channels on {extent}x{extent}x{extent}"
        found.append((name, 2 * 27 * channels**2 * extent**3, partial(functional.conv3d, *given, padding=1)))
    n = _PRODUCT[device]
    matrix = torch.rand(n, n, device=device, dtype=dtype)
    return [*found, (f"product of {n}x{n} matrices", 2 * n**3, lambda: matrix @ matrix)]


def _best(run: Callable[[], Any], device: Device) -> float:
    """The least seconds of some tries after one to warm up."""
    import torch

    times: list[float] = []
    for _ in range(_TRIES + 1):
        started = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
