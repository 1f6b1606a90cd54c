"""What a machine can do, as figures: operations and bytes per second of kernels, messages and files.

A profile is measured by `partition calibrate`, or is one of those shipped (`partitioner/profiles`), which are estimates
from public data sheets and name their source.  It is a small JSON file; loading one needs neither torch nor onnx.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Self

import numpy as np

from partitioner.curves import Curve, FloatArray, Grid, Number
from partitioner.errors import PartitionError

FORMAT = "partitioner profile"
VERSION = 1

VARIABLE = "PARTITIONER_PROFILE"
"""Environment variable that names the profile file that is taken by default."""


@dataclass(frozen=True)
class Link:
    """How messages travel.

    Args:
        latency: seconds of a message of no bytes.
        bandwidth: bytes per second of a long one.
        curve: measured seconds of one message over its bytes; latency and bandwidth are then not used.
    """

    latency: float
    bandwidth: float
    curve: Curve | None = None

    def seconds(self, nbytes: Number, messages: Number) -> FloatArray:
        """Time of messages of `nbytes` in all, one after the other."""
        count, total = np.asarray(messages, np.float64), np.asarray(nbytes, np.float64)
        if self.curve is None:
            return count * self.latency + total / self.bandwidth
        return count * self.curve.at(total / np.maximum(count, 1.0))


@dataclass(frozen=True)
class Kernels:
    """What one process computes with a number of threads.

    Args:
        launch: seconds that a call takes whatever it does.
        step: seconds that the executor takes around a call.
        flops: operations per second by element type (`float32`, ...) that kernels reach.
        bandwidth: bytes per second, read and written, that kernels reach in memory.
        lanes: output channels that a convolution computes at once; others are filled up.
        curves: by kind of kernel seconds over bytes read and written.
        grids: by family (`conv`, `transposed`, `depthwise`) operations per second of convolutions.
    """

    threads: int
    launch: float
    step: float
    flops: Mapping[str, float]
    bandwidth: float
    lanes: int = 1
    curves: Mapping[str, Curve] = field(default_factory=dict[str, Curve])
    grids: Mapping[str, Grid] = field(default_factory=dict[str, Grid])

    def seconds(self, kind: str, flops: Number, nbytes: Number, dtype: str = "float32") -> FloatArray:
        """Time of one call: of its kind as measured, else by the roofline.

            launch + max(flops / peak, bytes / bandwidth)
        """
        if kind in self.curves:
            return self.curves[kind].at(nbytes)
        peak = self.flops.get(dtype, self.flops["float32"])
        found = self.launch + np.maximum(np.asarray(flops) / peak, np.asarray(nbytes) / self.bandwidth)
        return np.where(np.asarray(nbytes) > 0, found, 0.0)

    def page_seconds(self, nbytes: Number) -> FloatArray:
        """What the system takes to give pages to so much memory, where that was measured."""
        return self.seconds("pages", 0.0, nbytes) if "pages" in self.curves else np.zeros(np.shape(nbytes))

    def convolution_seconds(self, family: str, flops: Number, features: Sequence[float], amount: Number,
                            nbytes: Number, dtype: str = "float32") -> FloatArray:
        """Time of one convolution: as measured for float32, else by the roofline.

        Args:
            features: channels in, channels out and cells of the window, as far as the family has them.
            amount: output cells of one channel; of all channels for `depthwise`.
        """
        grid = self.grids.get(family)
        if grid is None or dtype != "float32":
            return self.seconds("convolution", flops, nbytes, dtype)
        if family == "depthwise":
            return grid.seconds(flops, features, amount)
        inputs, outputs, *rest = features
        full = outputs if outputs < self.lanes else math.ceil(outputs / self.lanes) * self.lanes
        return grid.seconds(np.asarray(flops) * (full / outputs), (inputs, full, *rest), amount)


@dataclass(frozen=True)
class Profile:
    """What a machine can do.

    Args:
        name: short, as `this machine` or `h100-nvlink`.
        source: how the figures were found, or where they are from.
        device: cpu, or the name of a GPU.
        measured: whether `partition calibrate` measured them; else they are estimates.
        versions: of the libraries that were measured.
        kernels: ascending by threads.
        links: by transport: `lockstep` (copies in one process), `gloo`, `nccl` (within a node), `network`.
        read, write: bytes per second from and to files.
    """

    name: str
    source: str
    device: str
    measured: bool
    versions: Mapping[str, str]
    kernels: tuple[Kernels, ...]
    links: Mapping[str, Link]
    read: float
    write: float

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a profile from a file.

        Raises:
            PartitionError: when it cannot be read, is damaged, is something else, or is of another version.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else "not text"
            raise PartitionError(f"profile {path}: cannot be read ({reason}); make one with `partition calibrate`"
                                 ) from None
        return cls._from_text(text, str(path))

    @classmethod
    def shipped(cls, name: str) -> Self:
        """One of the profiles that come with the package; see `shipped_names`.

        Raises:
            PartitionError: for an unknown name.
        """
        if name not in shipped_names():
            raise PartitionError(f"profile '{name}' is unknown; use {', '.join(shipped_names())} or a file")
        text = (resources.files("partitioner") / "profiles" / f"{name}.json").read_text(encoding="utf-8")
        return cls._from_text(text, name)

    @classmethod
    def find(cls, given: str | Path | None = None) -> Self:
        """The profile that a user means: a shipped one by name, a file, or by default that of this machine.

        By default: the file that PARTITIONER_PROFILE names, else the one that `partition calibrate` wrote, else the
        shipped `default`.

        Raises:
            PartitionError: as `load`.
        """
        if given is not None:
            return cls.shipped(str(given)) if str(given) in shipped_names() else cls.load(given)
        path = default_path()
        return cls.load(path) if path.exists() or os.environ.get(VARIABLE) else cls.shipped("default")

    def save(self, path: str | Path) -> None:
        """Write the profile beside its place and rename it.

        Raises:
            PartitionError: when the path cannot be written.
        """
        target = Path(path)
        beside: str | None = None
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=target.parent, prefix=f".{target.name}.",
                                             suffix=".tmp", delete=False) as file:
                beside = file.name
                file.write(json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")
            os.chmod(beside, 0o644)
            os.replace(beside, target)
            beside = None
        except OSError as error:
            raise PartitionError(f"profile {path}: cannot be written ({error.strerror or error}); choose another "
                                 "place with -o FILE") from None
        finally:
            if beside is not None:
                Path(beside).unlink(missing_ok=True)

    def for_threads(self, threads: int | None = None) -> Kernels:
        """The kernels with a number of threads: those of the nearest that is known (None: of the most)."""
        if threads is None:
            return self.kernels[-1]
        return min(self.kernels, key=lambda k: abs(math.log(k.threads / threads)))

    def kernel_seconds(self, kind: str, flops: Number, bytes_read: Number, bytes_written: Number,
                       threads: int | None = None, dtype: str = "float32") -> FloatArray:
        """Seconds of one call of a kernel, elementwise: the roofline with what a call takes, or as measured.

        Args:
            kind: `pointwise`, `function`, `moments`, `affine`, `pool`, `resize`, `copy`, `move`, `matmul`, ...
            bytes_read, bytes_written: in this call.
        """
        total = np.asarray(bytes_read, np.float64) + np.asarray(bytes_written, np.float64)
        return self.for_threads(threads).seconds(kind, flops, total, dtype)

    def message_seconds(self, nbytes: Number, messages: Number, transport: str = "gloo") -> FloatArray:
        """Seconds of `messages` of `nbytes` in all, elementwise.

        Raises:
            PartitionError: for a transport of which the profile knows nothing.
        """
        if transport not in self.links:
            raise PartitionError(f"profile {self.name} knows nothing of transport '{transport}'; it has "
                                 f"{', '.join(self.links)}")
        return self.links[transport].seconds(nbytes, messages)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        from partitioner.profile_file import to_dict

        return {"format": FORMAT, "version": VERSION, **to_dict(self)}

    @classmethod
    def _from_text(cls, text: str, where: str) -> Self:
        from partitioner.profile_file import fields_of

        try:
            data = json.loads(text)
        except (ValueError, RecursionError):
            raise PartitionError(f"profile {where}: damaged, or no JSON; make one with `partition calibrate`") from None
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise PartitionError(f"profile {where}: this is no profile; make one with `partition calibrate`")
        if data.get("version") != VERSION:
            raise PartitionError(f"profile {where}: of version {data.get('version')}, this program reads {VERSION}; "
                                 "make it anew with `partition calibrate`")
        try:
            return cls(**fields_of(data))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
            raise PartitionError(f"profile {where}: damaged ({reason[:120]}); make it anew with `partition calibrate`"
                                 ) from None


def shipped_names() -> tuple[str, ...]:
    """Names of the profiles that come with the package."""
    folder = resources.files("partitioner") / "profiles"
    return tuple(sorted(item.name.removesuffix(".json") for item in folder.iterdir() if item.name.endswith(".json")))


def default_path() -> Path:
    """Where `partition calibrate` writes by default, and commands look: PARTITIONER_PROFILE, or the cache folder."""
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named)
    cache = os.environ.get("XDG_CACHE_HOME")
    folder = Path(cache) if cache and os.path.isabs(cache) else Path.home() / ".cache"
    return folder / "partitioner" / "profile.json"
