"""The demo: a 3D U-Net and a CT-like scan, from torch to exact results on several processes and a picture.

Every step is a command that the user can type; the demo prints it, runs it, and says how long it took.
"""

from __future__ import annotations

import importlib.util
import math
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.markup import escape

from benchmarks.errors import UsageError
from benchmarks.models import INPUT_NAME, OUTPUT_NAME, export
from benchmarks.phantom import CLASS_NAMES, Phantom, phantom, write_nifti
from benchmarks.picture import draw
from benchmarks.suite import DEMO_NETWORK
from benchmarks.training import fit

if TYPE_CHECKING:
    import partitioner as pt

_LARGEST_AXIS = 1024


@dataclass(frozen=True)
class Demo:
    """What the demo computes, and the folder for its files.

    Args:
        workdir: made when missing; files of an earlier demo are overwritten.
        size: voxels along depth, height and width.
        shards: the mesh, as for `partition --mesh`.
        base: the U-Net's filters at the finest level.
        train_steps: 0 leaves the weights random.
    """

    workdir: Path
    size: tuple[int, int, int]
    shards: str
    base: int
    train_steps: int

    @property
    def model(self) -> Path:
        """The exported network."""
        return self.workdir / "unet3d.onnx"

    @property
    def plan(self) -> Path:
        """The partitioned network."""
        return self.workdir / "unet3d.plan.onnx"

    @property
    def scan(self) -> Path:
        """The phantom."""
        return self.workdir / "phantom.nii.gz"

    @property
    def logits(self) -> Path:
        """The network's output."""
        return self.workdir / "logits.npy"


class _StepFailed(Exception):
    """A command of the demo ended with this code; it has said why."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def parse_size(text: str) -> tuple[int, int, int]:
    """`121x160x143` as three extents.

    Raises:
        UsageError: for another form, or an extent that the network's three halvings cannot take.
    """
    try:
        depth, height, width = (int(word) for word in text.lower().split("x"))
    except ValueError:
        raise UsageError(f"--size '{text}' is not understood; write 121x160x143") from None
    smallest = 1 << DEMO_NETWORK.levels
    for extent in (depth, height, width):
        if not smallest <= extent <= _LARGEST_AXIS:
            raise UsageError(f"--size '{text}': each extent must lie between {smallest} and {_LARGEST_AXIS}")
    return depth, height, width


def run_demo(demo: Demo, console: Console) -> int:
    """Run all steps; 0 when the partitioned result agrees with onnxruntime's, else the failed step's code.

    Raises:
        UsageError: when the mesh does not fit, or the folder cannot be written.
    """
    started = time.perf_counter()
    scan = _make_inputs(demo, console)
    try:
        _partition(demo, console, "plan", str(demo.model), "--mesh", demo.shards)
        _partition(demo, console, "compile", str(demo.model), "--mesh", demo.shards, "-o", str(demo.plan))
        files = ("--input", f"{INPUT_NAME}={demo.scan}", "--output", f"{OUTPUT_NAME}={demo.logits}")
        _partition(demo, console, "run", str(demo.plan), *files, "--backend", "gloo", "--overwrite")
        _partition(demo, console, "verify", str(demo.plan), *files[:2], "--backend", "gloo")
    except _StepFailed as failure:
        return failure.code
    with _step(console, "a picture of a slice, and the classes as NIfTI"):
        written = _show(demo, scan)
    console.print(f"\n[bold]finished in {time.perf_counter() - started:.0f} s[/bold]; look at:")
    for path in (*written, demo.plan):
        console.print(f"  {path}", highlight=False)
    return 0


def _make_inputs(demo: Demo, console: Console) -> Phantom:
    """The network as ONNX and the scan as NIfTI, in the folder."""
    _check(demo)
    config = replace(DEMO_NETWORK, base=demo.base)
    network = config.build()
    with _step(console, f"a CT-like scan of {_times(demo.size)} voxels: {demo.scan}"):
        scan = phantom(demo.size)
        write_nifti(scan.hounsfield, scan.affine, demo.scan)
    with _step(console, f"teach a {config.levels}-level 3D U-Net the phantom (weights for a picture with organs)"):
        taken = fit(network, demo.train_steps)
        console.print(f"{taken} of {demo.train_steps} steps")
    with _step(console, f"export it with torch.onnx: {demo.model}"):
        export(network, (1, 1, *demo.size), demo.model)
    return scan


def _check(demo: Demo) -> None:
    """Find the user's mistakes before the minutes of work."""
    import partitioner as pt

    missing = [name for name in ("nibabel", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"the demo needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    try:
        pt.Mesh.parse(demo.shards)
    except pt.PartitionError as error:
        raise UsageError(f"--shards: {error}") from None
    try:
        demo.workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=demo.workdir):
            pass
    except OSError as error:
        raise UsageError(f"--workdir {demo.workdir}: {error.strerror}; choose another folder") from None


def _partition(demo: Demo, console: Console, *arguments: str) -> None:
    """Run one command of the toolkit as the user would, after showing it."""
    command = [sys.executable, "-m", "partitioner.cli", *arguments]
    console.rule(style="dim")
    console.print(f"[bold]$[/bold] {escape(shlex.join(['partition', *arguments]))}", highlight=False, soft_wrap=True)
    started = time.perf_counter()
    code = subprocess.run(command, check=False).returncode
    if code:
        console.print(f"[red]the command ended with code {code}; the demo stops here[/red]")
        raise _StepFailed(code)
    _finished(console, started)


@contextmanager
def _step(console: Console, what: str) -> Generator[None]:
    console.rule(style="dim")
    console.print(escape(what), highlight=False, soft_wrap=True)
    started = time.perf_counter()
    yield
    _finished(console, started)


def _finished(console: Console, started: float) -> None:
    console.print(f"[dim]({time.perf_counter() - started:.1f} s)[/dim]")


def _show(demo: Demo, scan: Phantom) -> tuple[Path, Path]:
    """The class of every voxel as NIfTI, and the picture with the plan's cuts."""
    import partitioner as pt

    logits = np.load(demo.logits, mmap_mode="r")
    classes = logits[0].argmax(axis=0).astype(np.uint8)
    segmentation = write_nifti(classes, scan.affine, demo.workdir / "classes.nii.gz")
    cuts = spatial_cuts(pt.load(demo.plan))
    shards = math.prod(len(axis) - 1 for axis in cuts)
    picture = draw(
        demo.workdir / "slice.png",
        scan.hounsfield,
        classes,
        CLASS_NAMES,
        cuts,
        np.linalg.norm(scan.affine[:3, :3], axis=0).tolist(),
        f"3D U-Net on {_times(demo.size)} voxels, {shards} processes ({demo.shards}); dashed: their borders",
    )
    return picture, segmentation


def spatial_cuts(plan: pt.Plan) -> tuple[tuple[int, ...], ...]:
    """Where the plan cuts its input's spatial axes, each from 0 to the extent."""
    (volume,) = plan.to_dict()["inputs"]
    split = {entry["axis"]: tuple(entry["cuts"]) for entry in volume["splits"]}
    shape = volume["shape"]
    return tuple(split.get(axis, (0, shape[axis])) for axis in range(2, len(shape)))


def _times(size: Sequence[int]) -> str:
    return " x ".join(map(str, size))
