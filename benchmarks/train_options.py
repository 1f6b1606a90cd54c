"""The options of `python -m benchmarks train`, checked before any work starts."""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from benchmarks.errors import UsageError

Backend: TypeAlias = Literal["lockstep", "gloo", "nccl"]
Amp: TypeAlias = Literal["none", "bfloat16"]

_LARGEST_AXIS = 4096


@dataclass(frozen=True)
class TrainOptions:
    """What is trained on what, and how; the help texts of `add_arguments` say what each means."""

    mesh: str | None
    processes: bool
    backend: Backend | None
    replicas: int
    device: str
    threads: int | None
    size: tuple[int, int, int]
    filters: int
    depth: int
    dropout: float
    volumes: int
    held_out: int
    batch: int
    augment: bool
    steps: int
    learning_rate: float
    seed: int
    dtype: Literal["float32", "float64"]
    amp: Amp
    checkpoint_activations: bool
    output: Path
    evaluate_every: int
    checkpoint_every: int
    resume: bool
    json: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Extents of one batch: (batch, 1, depth, height, width)."""
        return (self.batch, 1, *self.size)

    @property
    def checkpoint(self) -> Path:
        """The folder of the checkpoint."""
        return self.output / "checkpoint"

    @property
    def curves(self) -> Path:
        """The table of the curves."""
        return self.output / "curves.csv"

    @property
    def picture(self) -> Path:
        """The picture of the curves."""
        return self.output / "curves.png"

    @property
    def model(self) -> Path:
        """The trained network."""
        return self.output / "trained.onnx"

    @property
    def data(self) -> Path:
        """The folder of the volumes; those of other extents go to another one."""
        return self.output / f"volumes-{'x'.join(map(str, self.size))}"

    def decisive(self) -> dict[str, object]:
        """What must stay the same for a run to go on where it was."""
        return {"--filters": self.filters, "--depth": self.depth, "--dropout": self.dropout,
                "--size": "x".join(map(str, self.size)), "--volumes": self.volumes, "--batch": self.batch,
                "--replicas": self.replicas, "--seed": self.seed, "--dtype": self.dtype}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    where = parser.add_argument_group("where it is computed")
    where.add_argument("--mesh", metavar="MESH", help="how each volume is split: depth=2 or depth=2,height=2 "
                       "(default: not at all)")
    where.add_argument("--processes", action="store_true", help="one process per shard on this host (the default when "
                       "there are several shards or copies, unless torchrun has started us)")
    where.add_argument("--backend", choices=("lockstep", "gloo", "nccl"), help="lockstep: all shards in one process "
                       "(default: nccl when every process has a GPU of its own, else gloo)")
    where.add_argument("--replicas", type=int, default=1, metavar="N", help="copies of the network beside the mesh, "
                       "each with volumes of its own (data parallel)")
    where.add_argument("--device", default="cpu", help="cpu, cuda, or a list for the processes in turn")
    where.add_argument("--threads", type=int, metavar="N", help="per process (default: the cores shared out evenly)")
    net = parser.add_argument_group("the network; the paper's is --filters 32 --size 512 with a mesh of many GPUs")
    net.add_argument("--size", default="48", help="voxels of a volume: 48, or DEPTHxHEIGHTxWIDTH")
    net.add_argument("--filters", type=int, default=8, metavar="N", help="at the finest resolution")
    net.add_argument("--depth", type=int, default=4, metavar="N", help="resolutions")
    net.add_argument("--dropout", type=float, default=0.1, metavar="SHARE", help="the paper's, for many filters: 0.5")
    fit = parser.add_argument_group("training")
    fit.add_argument("--steps", type=int, default=400, metavar="N")
    fit.add_argument("--learning-rate", type=float, default=1e-2, metavar="RATE", help="of Adam; rises in the first "
                     "tenth of the steps, then falls along a cosine")
    fit.add_argument("--volumes", type=int, default=12, metavar="N", help="to train on")
    fit.add_argument("--held-out", type=int, default=4, metavar="N", help="volumes for the Dice curves")
    fit.add_argument("--batch", type=int, default=2, metavar="N", help="volumes per step and copy")
    fit.add_argument("--no-augmentation", dest="augment", action="store_false", help="volumes as they are")
    fit.add_argument("--seed", type=int, default=0, metavar="N", help="of weights, dropout, order and augmentation")
    fit.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    fit.add_argument("--amp", choices=("none", "bfloat16"), default="none", help="automatic mixed precision")
    fit.add_argument("--checkpoint-activations", action="store_true", help="keep few activations, compute the others "
                     "again in the backward pass")
    files = parser.add_argument_group("files")
    files.add_argument("--output", type=Path, default=Path("train-output"), metavar="DIR", help="for volumes, curves, "
                       "checkpoint and the trained network (default: train-output)")
    files.add_argument("--evaluate-every", type=int, default=40, metavar="STEPS", help="Dice on held-out volumes; "
                       "0: at the end")
    files.add_argument("--checkpoint-every", type=int, default=100, metavar="STEPS", help="0: at the end")
    files.add_argument("--resume", action="store_true", help="go on from the checkpoint in DIR, on any mesh")
    files.add_argument("--json", action="store_true", help="print the final figures as JSON; all else on stderr")


def from_arguments(found: argparse.Namespace) -> TrainOptions:
    """The options, checked.

    Raises:
        UsageError: for the first one that makes no sense.
    """
    fields = {name: getattr(found, name) for name in TrainOptions.__dataclass_fields__ if name != "size"}
    options = TrainOptions(size=_parse_size(found.size), **fields)
    for name, least in (("replicas", 1), ("filters", 1), ("depth", 1), ("steps", 1), ("volumes", 1), ("held_out", 1),
                        ("batch", 1), ("seed", 0), ("evaluate_every", 0), ("checkpoint_every", 0)):
        value = getattr(options, name)
        _require(value >= least, f"--{name.replace('_', '-')} {value}: at least {least} is needed")
    _require(options.threads is None or options.threads >= 1, f"--threads {options.threads}: at least 1 is needed")
    _require(0 <= options.dropout < 1, f"--dropout {options.dropout:g}: give a share from 0 to below 1")
    _require(0 < options.learning_rate < float("inf"), f"--learning-rate {options.learning_rate:g}: give a number "
             "above 0")
    _check_fit(options)
    _check_combinations(options)
    _check_files(options)
    return options


def _check_fit(options: TrainOptions) -> None:
    smallest = 1 << options.depth
    text = "x".join(map(str, options.size))
    for extent in options.size:
        _require(smallest <= extent <= _LARGEST_AXIS, f"--size {text}: with --depth {options.depth} each extent must "
                 f"lie between {smallest} and {_LARGEST_AXIS}")


def _check_combinations(options: TrainOptions) -> None:
    import partitioner as pt

    lockstep = options.backend == "lockstep"
    _require(not (lockstep and options.replicas > 1), "--backend lockstep computes one copy of the network; leave out "
             "--replicas or --backend")
    _require(not (lockstep and options.processes), "--backend lockstep is one process; leave out --processes or "
             "--backend")
    _require(options.amp == "none" or options.dtype == "float32", f"--amp {options.amp} goes with --dtype float32")
    try:
        pt.Mesh.parse(options.mesh)
    except pt.PartitionError as error:
        raise UsageError(f"--mesh: {error}") from None


def _check_files(options: TrainOptions) -> None:
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=options.output):
            pass
    except OSError as error:
        raise UsageError(f"--output {options.output}: {error.strerror}; choose another folder") from None
    if options.resume:
        _require(options.checkpoint.is_dir(), f"--resume: there is no checkpoint in {options.output}; leave out "
                 "--resume, or give the --output of the run that is to go on")


def _parse_size(text: str) -> tuple[int, int, int]:
    try:
        numbers = [int(word) for word in str(text).lower().split("x")]
        depth, height, width = numbers * 3 if len(numbers) == 1 else numbers
    except ValueError:
        raise UsageError(f"--size '{text}' is not understood; write 48 or 48x64x64") from None
    return depth, height, width


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UsageError(message)
