"""All suites, as data."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.errors import UsageError
from benchmarks.models import Norm
from benchmarks.phantom import DEFAULT_SHAPE
from benchmarks.suite import DEMO_NETWORK, Bar, Case, Side, Suite, Window, names

BATCH_NETWORK = replace(DEMO_NETWORK, norm="batch", down="maxpool")
_U_NET = "3D U-Net, 4 levels, base 16, batch norm, max pool"
_TINY_NETWORK = replace(BATCH_NETWORK, levels=2, base=4)

OURS = Side("ours", "partitioned")
WHOLE = Side("whole shards", "partitioned", slabs=False)
LEAST = Side("least budget", "partitioned", share=0.0)
RANKS = Side("ours on 2 ranks", "partitioned", "depth=2", "gloo", 2)
SHARED = Side("ours on 2 ranks, shared memory", "partitioned", "depth=2", "shm", 2)
EAGER = Side("torch eager", "torch eager")
CHANNELS_LAST = Side("torch channels last", "torch channels last")
REUSED = Side("torch channels last (reuse)", "torch channels last", reuse=True)
COMPILED = Side("torch.compile", "torch.compile")
ONNXRUNTIME = Side("onnxruntime", "onnxruntime")
JAX = Side("JAX on 2 devices", "jax", "depth=2")
NAIVE = Side("gloo by hand (naive)", "naive gloo", "depth=2", "gloo", 2)
CAREFUL = Side("gloo by hand (careful)", "careful gloo", "depth=2", "gloo", 2)
WINDOWS = tuple(
    Side(f"sliding window, {overlap}", "sliding window", window=Window(96, overlap)) for overlap in (0.25, 0.5)
)

PEERS = (EAGER, ONNXRUNTIME)
SHARDS = (
    Side("1 shard", "partitioned"),
    Side("2 shards", "partitioned", "depth=2", "gloo", 2),
    Side("4 shards", "partitioned", "depth=2,height=2", "gloo", 4),
)
TRAINERS = (EAGER, OURS, RANKS, SHARED)
TRAINING_RANKS = (
    Side("1 rank", "partitioned", "single", "gloo", 1),
    Side("2 ranks", "partitioned", "depth=2", "gloo", 2),
    Side("4 ranks", "partitioned", "depth=2,height=2", "gloo", 4),
    Side("8 ranks", "partitioned", "depth=2,height=2,width=2", "gloo", 8),
)

BUDGETS = (*(Side(f"budget 1/{n}", "partitioned", share=1 / n) for n in (2, 3, 4, 5, 6)), LEAST)
FLOAT64 = Side("float64", "float64")
"""What the errors of the sides under budgets are against; no side of any case, and not measured."""


def _cube(extent: int) -> tuple[int, ...]:
    return (1, 1, extent, extent, extent)


def _whole(extent: int, bars: tuple[Bar, ...], windows: tuple[Side, ...] = ()) -> Case:
    """One process with the default schedule beside whole-volume peers."""
    sides = (EAGER, CHANNELS_LAST, REUSED, COMPILED, ONNXRUNTIME, OURS, *windows)
    bars = (*bars, *(Bar("time", OURS.name, window.name, 1.0) for window in windows))
    what = f"{_U_NET}; {extent} x {extent} x {extent} voxels in one process"
    return Case(f"whole-{extent}", what, BATCH_NETWORK, _cube(extent), sides, bars=bars, limits=True)


def _ahead(eager: float, onnxruntime: float, memory: float) -> tuple[Bar, ...]:
    return (
        Bar("time", OURS.name, EAGER.name, eager),
        Bar("time", OURS.name, ONNXRUNTIME.name, onnxruntime),
        Bar("memory", OURS.name, ONNXRUNTIME.name, memory),
    )


def _ranks(extent: int, time: float, shared: float, more: tuple[Bar, ...] = ()) -> Case:
    """Two ranks of one thread beside one process of two, and beside others that split the volume."""
    peers = (JAX, NAIVE, CAREFUL)
    bars = (Bar("time", RANKS.name, OURS.name, time), Bar("time", SHARED.name, OURS.name, shared), *more,
            *(Bar("time", RANKS.name, peer.name, 1.0) for peer in peers))
    what = f"{_U_NET}; {extent} x {extent} x {extent} voxels on two ranks"
    whole = (WHOLE,) if more else ()  # ranks take whole shards: memory is compared with what does so too
    sides = (EAGER, OURS, *whole, RANKS, SHARED, *peers)
    return Case(f"ranks-{extent}", what, BATCH_NETWORK, _cube(extent), sides, bars=bars, limits=True)


def _training(extent: int, bar: float | None) -> Case:
    bars = () if bar is None else tuple(Bar("time", side.name, OURS.name, bar) for side in (RANKS, SHARED))
    what = f"{_U_NET}; a training step on {extent} x {extent} x {extent} voxels, batch statistics over all ranks"
    return Case(f"train-{extent}", what, BATCH_NETWORK, _cube(extent), TRAINERS, "training", bars=bars, limits=True)


_OPTIMUM = (
    Bar("process", RANKS.name, WHOLE.name, 0.55),
    Bar("sent per rank", RANKS.name, None, 7.625 * 2**20),
    Bar("messages per rank", RANKS.name, None, 14),
)
"""Half the memory and a margin; one exchange for each convolution, both ways: what GSPMD sends."""

FULL = Suite(
    "full",
    "every figure that the toolkit promises, each beside its peers and its bar",
    (
        _whole(128, _ahead(0.50, 0.55, 0.35), WINDOWS[:1]),
        _whole(256, _ahead(0.45, 0.50, 0.35)),
        _ranks(64, 1.10, 1.08),
        _ranks(128, 1.05, 1.03, _OPTIMUM),
        _training(64, 1.30),
        _training(96, 1.15),
    ),
)

QUICK = Suite(
    "quick",
    "a few minutes: every peer on small volumes, where start-up costs and messages weigh most",
    (
        Case("whole-64", f"{_U_NET}; 64 x 64 x 64 voxels in one process", BATCH_NETWORK, _cube(64),
             (EAGER, CHANNELS_LAST, COMPILED, ONNXRUNTIME, OURS,
              Side("sliding window, 0.25", "sliding window", window=Window(48, 0.25))),
             limits=True),
        _ranks(64, 1.10, 1.08),
        _training(48, None),
    ),
)


def _on_gpu(extent: int) -> Case:
    network = replace(BATCH_NETWORK, base=32)
    shards = replace(OURS, name="ours in 8 shards", mesh="depth=2,height=2,width=2")
    bars = (Bar("time", OURS.name, COMPILED.name, 1.0), Bar("time", shards.name, OURS.name, 1.10))
    what = f"3D U-Net, 4 levels, base 32, batch norm, max pool; {extent} x {extent} x {extent} voxels in bfloat16"
    return Case(f"gpu-{extent}", what, network, _cube(extent), (CHANNELS_LAST, COMPILED, OURS, shards),
                bars=bars, limits=True, dtype="bfloat16")


def _under_budgets(norm: Norm, extent: int, optional: bool = False) -> Case:
    return Case(
        f"{norm}-{extent}",
        f"3D U-Net, 4 levels, base 16, {norm} norm, max pool; {extent} x {extent} x {extent} voxels",
        replace(DEMO_NETWORK, norm=norm, down="maxpool"),
        _cube(extent),
        (WHOLE, replace(OURS, name="default"), *BUDGETS, *PEERS, *WINDOWS),
        "budgets",
        optional,
    )


_SMOKE = Suite(
    "smoke",
    "seconds long: whether every side runs and agrees, no figure to quote",
    (
        Case("tiny", "3D U-Net, 3 levels, base 4, instance norm; 29 x 37 x 31 voxels",
             replace(DEMO_NETWORK, levels=3, base=4), (1, 1, 29, 37, 31), PEERS + SHARDS),
        Case("peers", "3D U-Net, 2 levels, base 4, batch norm; 16 x 12 x 20 voxels", _TINY_NETWORK, (1, 1, 16, 12, 20),
             (EAGER, CHANNELS_LAST, REUSED, ONNXRUNTIME, JAX, NAIVE, CAREFUL,
              Side("sliding window, 0.25", "sliding window", window=Window(8, 0.25)), OURS, RANKS),
             bars=(Bar("time", OURS.name, EAGER.name, 1.0), Bar("messages per rank", RANKS.name, None, 8)),
             limits=True),
        Case("compiled", "the network of `peers` with torch.compile, which compiles for a minute", _TINY_NETWORK,
             (1, 1, 16, 12, 20), (EAGER, COMPILED, OURS), optional=True),
    ),
)

SUITES = (
    QUICK,
    FULL,
    Suite("gpu", "one CUDA device: whole volumes, and eight shards in turn on it", (_on_gpu(256), _on_gpu(512)),
          "cuda"),
    Suite(
        "demo",
        "the demo's network and volume on 1, 2 and 4 shards beside torch eager and onnxruntime",
        (Case("demo", "3D U-Net, 4 levels, base 16, instance norm; 121 x 160 x 143 voxels", DEMO_NETWORK,
              (1, 1, *DEFAULT_SHAPE), PEERS + SHARDS),),
    ),
    _SMOKE,
    Suite(
        "training",
        "how the memory of a process (and of all) in a step of training goes with the number of ranks, 1 to 8",
        (Case("memory", f"{_U_NET}; 96 x 96 x 96 voxels", BATCH_NETWORK, _cube(96), TRAINING_RANKS, "training"),),
    ),
    Suite(
        "training-smoke",
        "seconds long: whether every side of training runs and agrees, no figure to quote",
        (Case("tiny", "3D U-Net, 3 levels, base 4, batch norm; 29 x 37 x 31 voxels",
              replace(BATCH_NETWORK, levels=3, base=4), (1, 1, 29, 37, 31), TRAINERS + TRAINING_RANKS, "training"),),
    ),
    Suite(
        "depth-first",
        "time against memory: the whole volume, memory budgets, torch eager, onnxruntime and MONAI's sliding window",
        (
            *(_under_budgets(norm, extent) for extent in (128, 192) for norm in ("batch", "instance")),
            *(_under_budgets(norm, 256, optional=True) for norm in ("batch", "instance")),
        ),
    ),
    Suite(
        "depth-first-smoke",
        "seconds long: whether budgets are kept or refused and every side agrees, no figure to quote",
        (Case("tiny", "3D U-Net, 2 levels, base 8, batch norm; 64 x 60 x 62 voxels",
              replace(BATCH_NETWORK, levels=2, base=8), (1, 1, 64, 60, 62),
              (WHOLE, Side("budget 1/10", "partitioned", share=0.1), LEAST, ONNXRUNTIME,
               Side("sliding window, 0.25", "sliding window", window=Window(48, 0.25))),
              "budgets"),),
    ),
)


def find_suite(name: str) -> Suite:
    """The suite of this name.

    Raises:
        UsageError: for an unknown name.
    """
    found = next((suite for suite in SUITES if suite.name == name), None)
    if found is None:
        raise UsageError(f"suite '{name}' is unknown; choose from {names(SUITES)}")
    return found
