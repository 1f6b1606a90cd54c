"""JAX: the U-Net under `jax.jit`, its volume sharded over virtual devices of one process; XLA finds the messages.

Channels last and batch norms folded, which XLA is fastest with on CPUs.  What is sent is read from the compiled
program: every pair of a collective-permute is a message.
"""

from __future__ import annotations

import os
import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.errors import SideRefusal
from benchmarks.runner import Runner, Traffic
from benchmarks.suite import Case, Side
from benchmarks.weights import SLOPE, Convolution, Weights, folded, refuse_uneven

_LAYOUT = ("NDHWC", "DHWIO", "NDHWC")
_BYTES = {"f32": 4, "bf16": 2, "f64": 8, "s32": 4, "pred": 1}
_SENT = re.compile(r"= (\w+)\[([\d,]*)\]\S* (collective-permute|all-gather|all-to-all|all-reduce)\(.*")
_PAIRS = re.compile(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}")


class Jax(Runner):
    """The network compiled for the case's extents, on as many virtual devices as the side has shards."""

    def __init__(self, side: Side, case: Case, threads: int) -> None:
        weights = folded(case)
        refuse_uneven(case, side.shards)
        jax = _started(side.shards, threads)
        from jax.sharding import Mesh, NamedSharding, PartitionSpec

        mesh = Mesh(np.array(jax.devices()[: side.shards]), ("depth",))
        split, everywhere = NamedSharding(mesh, PartitionSpec(None, "depth")), NamedSharding(mesh, PartitionSpec())
        self._jax, self._split = jax, split
        self._weights = jax.device_put(_arrays(weights), everywhere)
        batch, channels, *space = case.shape
        example = jax.ShapeDtypeStruct((batch, *space, channels), np.float32)
        forward = jax.jit(_forward(weights.window), in_shardings=(everywhere, split), out_shardings=split)
        self._program = forward.lower(self._weights, example).compile()
        self._traffic = traffic(self._program.as_text(), side.shards)

    def run(self, volume: NDArray[np.float32]) -> NDArray[np.float32]:
        """The volume to the devices, the pass, and the logits back."""
        laid_out = self._jax.device_put(np.moveaxis(volume, 1, -1), self._split)
        return np.moveaxis(np.asarray(self._program(self._weights, laid_out)), -1, 1)

    def counted(self) -> Traffic:
        return self._traffic


def _started(devices: int, threads: int) -> Any:
    """The library on the CPU with virtual devices.

    Raises:
        SideRefusal: where it is not installed.
    """
    # XLA takes the cores that the process may use, and knows no number of threads.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    os.environ["JAX_PLATFORMS"] = "cpu"
    try:
        import jax
    except ImportError:
        raise SideRefusal('JAX is not installed; pip install "partitioner[peers]"') from None
    return jax


def traffic(program: str, devices: int) -> Traffic:
    """Bytes and messages of a compiled program; a collective that is no permute counts as one to each other device."""
    sent = messages = 0
    for line in program.splitlines():
        found = _SENT.search(line)
        if found is None:
            continue
        kind, extents, operation = found.groups()
        size = _BYTES.get(kind, 4) * int(np.prod([int(n) for n in extents.split(",") if n]))
        pairs = _PAIRS.search(line)
        count = pairs[1].count("{") if pairs and operation == "collective-permute" else devices * (devices - 1)
        sent, messages = sent + size * count, messages + count
    return Traffic(sent, messages, 0, sent // devices, messages // devices)


def _arrays(weights: Weights) -> dict[str, Any]:
    """The weights as XLA wants them, (depth, height, width, in, out)."""

    def plain(found: Convolution) -> tuple[Any, Any]:
        return found.weight.permute(2, 3, 4, 1, 0).contiguous().numpy(), found.bias.numpy()

    return {
        "encoder": [[plain(c) for c in pair] for pair in weights.encoder],
        "decoder": [[plain(c) for c in pair] for pair in weights.decoder],
        "ups": [(up.weight.permute(2, 3, 4, 0, 1).contiguous().numpy(), up.bias.numpy()) for up in weights.ups],
        "head": plain(weights.head),
    }


def _forward(window: tuple[float, float] | None) -> Any:
    import jax.numpy as jnp
    from jax import lax

    def convolution(x: Any, weight: Any, bias: Any) -> Any:
        y = lax.conv_general_dilated(x, weight, (1, 1, 1), "SAME", dimension_numbers=_LAYOUT) + bias
        return jnp.where(y > 0, y, SLOPE * y)

    def halved(x: Any) -> Any:
        return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 2, 1), (1, 2, 2, 2, 1), "VALID")

    def doubled(x: Any, weight: Any, bias: Any) -> Any:
        """A transposed convolution of kernel and stride 2 is a product for each voxel: nothing is exchanged."""
        n, d, h, w, _ = x.shape
        y = jnp.einsum("ndhwi,abcio->ndahbwco", x, weight)
        return y.reshape(n, 2 * d, 2 * h, 2 * w, -1) + bias

    def forward(weights: Any, x: Any) -> Any:
        x = x if window is None else jnp.tanh((x - window[0]) / window[1])
        skips: list[Any] = []
        for level, pair in enumerate(weights["encoder"]):
            x = halved(x) if level else x
            for one in pair:
                x = convolution(x, *one)
            skips.append(x)
        for up, pair, skip in zip(weights["ups"], weights["decoder"], skips[-2::-1], strict=True):
            x = jnp.concatenate([skip, doubled(x, *up)], axis=-1)
            for one in pair:
                x = convolution(x, *one)
        weight, bias = weights["head"]
        return jnp.einsum("ndhwi,io->ndhwo", x, weight[0, 0, 0]) + bias

    return forward
