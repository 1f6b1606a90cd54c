"""The command `partition calibrate`: measures this machine and writes what other commands reckon with."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from partitioner.console import ProgressBar, say
from partitioner.errors import PartitionError

if TYPE_CHECKING:
    from partitioner.profile import Profile


def calibrate_machine(options: argparse.Namespace) -> int:
    """The command `calibrate`; returns the exit code.

    Raises:
        PartitionError: when there is no such device, or the file cannot be written.
    """
    from partitioner.profile import default_path

    target = Path(options.output) if options.output else default_path()
    check_target(target)
    from runtime.allocator import keep_memory_tight
    from runtime.calibrate import calibrate

    keep_memory_tight()
    with ProgressBar(options, True) as progress:
        found = calibrate(options.device, options.threads, options.quick, progress)
    found.save(target)
    say(f"wrote {target}: {summary(found)}")
    return 0


def check_target(target: Path) -> None:
    """Make sure that a file can be written before a minute is spent on what goes into it.

    Raises:
        PartitionError: when it cannot be.
    """
    if target.is_dir():
        raise PartitionError(f"calibrate: {target} is a folder; name a file with -o FILE")
    folder = next(p for p in (target.absolute().parent, *target.absolute().parents) if p.exists())
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise PartitionError(f"calibrate: {folder} cannot be written ({error.strerror}); choose another place with "
                             "-o FILE") from None


def threads(text: str) -> int:
    """A number from 1; argparse names it after this function when it is none."""
    found = int(text)
    if found < 1:
        raise ValueError(text)
    return found


def summary(profile: Profile) -> str:
    """The most telling figures in a line."""
    rates = ", ".join(f"{k.flops['float32'] / 1e9:.0f} GFLOP/s on {k.threads} thread{'s' if k.threads > 1 else ''}"
                      for k in profile.kernels)
    gloo, memory = profile.links["gloo"], profile.kernels[-1].bandwidth
    return (f"{rates}; {memory / 1e9:.1f} GB/s copied; gloo {gloo.latency * 1e3:.2f} ms and "
            f"{gloo.bandwidth / 1e9:.1f} GB/s")
