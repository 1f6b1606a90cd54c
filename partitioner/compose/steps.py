"""The steps of `--preprocess`, each as ONNX nodes on one input."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from partitioner.compose.graph import Writer
from partitioner.errors import PartitionError

DTYPES = {d.numpy().name: d for d in (
    ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT16, ir.DataType.UINT16, ir.DataType.INT32, ir.DataType.UINT32,
    ir.DataType.INT64, ir.DataType.FLOAT16, ir.DataType.FLOAT, ir.DataType.DOUBLE)}
"""Element types that a file may hold, by numpy's names."""

SMALLEST = 1e-8
"""The standard deviation from which values are divided by it: those of a constant volume become 0, not NaN."""


@dataclass(frozen=True)
class Place:
    """Where a step stands.

    Args:
        input: name of the input.
        dtype: the type that it computes in.
        shape: of the input as the network takes it.
        channels: the axis of the channels; the batch is axis 0, all others are spatial.
    """

    input: str
    dtype: ir.DataType
    shape: ir.Shape
    channels: int

    @property
    def spatial(self) -> tuple[int, ...]:
        """The spatial axes."""
        return tuple(a for a in range(1, len(self.shape)) if a != self.channels)

    @property
    def count(self) -> int | None:
        """Channels where the file tells."""
        found = self.shape[self.channels]
        return found if isinstance(found, int) else None

    def array(self, values: Sequence[float]) -> NDArray[np.generic]:
        """Numbers in the type computed in, one for all channels or one for each."""
        found = np.array(values, np.float64).astype(self.dtype.numpy())
        if found.size == 1:
            return found.reshape(())
        return found.reshape([-1 if a == self.channels else 1 for a in range(len(self.shape))])


class Step(Protocol):
    """One step; `order` and `file_type` are what it says of the file and not of the values."""

    def problem(self, place: Place) -> str | None:
        """Why it cannot be done there."""
        ...

    def write(self, writer: Writer, x: ir.Value, place: Place) -> ir.Value:
        """The values after it."""
        ...


@dataclass(frozen=True)
class Clip:
    """Values brought into [low, high]; as a window then scaled to [0, 1]."""

    low: float
    high: float
    scaled: bool

    def problem(self, place: Place) -> str | None:
        """See `Step`."""
        return None

    def write(self, writer: Writer, x: ir.Value, place: Place) -> ir.Value:
        """See `Step`."""
        low, high = place.array([self.low]), place.array([self.high])
        clipped = writer.clip(x, low, high)
        if not self.scaled:
            return clipped
        width = place.array([self.high - self.low])
        return writer.op("Div", writer.op("Sub", clipped, writer.constant(low)), writer.constant(width))


@dataclass(frozen=True)
class Normalize:
    """(x - mean) / deviation with numbers that are given, for all channels or for each."""

    means: tuple[float, ...]
    deviations: tuple[float, ...]

    def problem(self, place: Place) -> str | None:
        """See `Step`."""
        wrong = next((len(n) for n in (self.means, self.deviations) if len(n) not in (1, place.count)), None)
        if wrong is None or place.count is None:
            return None
        return f"{wrong} numbers for {place.count} channels; give one number, or one for each channel"

    def write(self, writer: Writer, x: ir.Value, place: Place) -> ir.Value:
        """See `Step`."""
        centred = writer.op("Sub", x, writer.constant(place.array(self.means)))
        return writer.op("Div", centred, writer.constant(place.array(self.deviations)))


@dataclass(frozen=True)
class ZScore:
    """(x - mean) / standard deviation over the volume, per case and channel; of all voxels or of those that are not 0.

    Voxels of 0 stay 0 in the latter.
    """

    nonzero: bool

    def problem(self, place: Place) -> str | None:
        """See `Step`."""
        if not place.spatial:
            return f"the input has no spatial axes ({len(place.shape)} axes); leave it out"
        if not self.nonzero and place.count is None:
            return "the file leaves the number of channels open; export it with fixed channels"
        return None

    def write(self, writer: Writer, x: ir.Value, place: Place) -> ir.Value:
        """See `Step`."""
        return self._of_nonzero(writer, x, place) if self.nonzero else self._of_all(writer, x, place)

    def _of_all(self, writer: Writer, x: ir.Value, place: Place) -> ir.Value:
        assert place.count is not None
        scale, bias = (writer.constant(np.full(place.count, n, place.dtype.numpy())) for n in (1, 0))
        first = [0, place.channels, *place.spatial]  # channels before the spatial axes
        there = x if place.channels == 1 else writer.op("Transpose", x, perm=first)
        made = writer.op("InstanceNormalization", there, scale, bias, epsilon=SMALLEST**2)
        return made if place.channels == 1 else writer.op("Transpose", made, perm=[first.index(a) for a in range(
            len(first))])

    def _of_nonzero(self, writer: Writer, x: ir.Value, place: Place) -> ir.Value:
        axes = place.spatial
        inside = writer.cast(writer.cast(x, ir.DataType.BOOL), place.dtype)
        one, smallest = (writer.constant(place.array([n])) for n in (1.0, SMALLEST))
        count = writer.op("Max", writer.reduce("ReduceSum", inside, axes), one)
        mean = writer.op("Div", writer.reduce("ReduceSum", x, axes), count)
        nearly = writer.op("Mul", writer.op("Sub", x, mean), inside)
        rest = writer.op("Div", writer.reduce("ReduceSum", nearly, axes), count)  # what rounding left of the mean
        centred = writer.op("Mul", writer.op("Sub", nearly, rest), inside)
        squares = writer.reduce("ReduceSum", writer.op("Mul", centred, centred), axes)
        deviation = writer.op("Sqrt", writer.op("Div", squares, count))
        return writer.op("Div", centred, writer.op("Max", deviation, smallest))


@dataclass(frozen=True)
class FileType:
    """The element type in which the values come."""

    dtype: ir.DataType

    def problem(self, place: Place) -> str | None:
        """See `Step`."""
        return None

    def write(self, writer: Writer, x: ir.Value, place: Place) -> ir.Value:
        """See `Step`: the input is cast before its first step."""
        return x


@dataclass(frozen=True)
class AxisOrder:
    """Which of the file's spatial axes is the network's first, second, third."""

    order: tuple[int, ...]

    def problem(self, place: Place) -> str | None:
        """See `Step`."""
        if sorted(self.order) == list(range(len(place.spatial))):
            return None
        letters = "xyz"[: len(place.spatial)][::-1]
        return (f"the input has {len(place.spatial)} spatial axes; name each once, as axes={letters} or "
                f"axes={','.join(str(n) for n in range(len(place.spatial)))[::-1]}")

    def write(self, writer: Writer, x: ir.Value, place: Place) -> ir.Value:
        """See `Step`: the input is transposed before its first step."""
        return x

    def permutation(self, place: Place) -> list[int]:
        """The order for a Transpose from the file's axes to the network's."""
        found = list(range(len(place.shape)))
        for axis, source in zip(place.spatial, self.order, strict=True):
            found[axis] = place.spatial[source]
        return found


# --- from words to steps -----------------------------------------------------------------------------


def parse_step(text: str, word: str) -> Step:
    """A step from its word and numbers.

    Args:
        text: all that the user wrote, for messages.

    Raises:
        PartitionError: when the numbers are none, or not those that the word needs.
    """
    kind, equals, given = word.partition("=")
    try:
        return _KINDS[kind][0](given if equals else None)
    except (ValueError, KeyError):
        raise PartitionError(f"--preprocess {text}: is not understood; write {_KINDS[kind][1]}") from None


def _window(given: str | None, scaled: bool) -> Clip:
    low, high = _pair(given)
    if len(low) != 1 or len(high) != 1 or low >= high:
        raise ValueError(given)
    return Clip(low[0], high[0], scaled)


def _normalize(given: str | None) -> Normalize:
    means, deviations = _pair(given)
    if min(deviations) <= 0:
        raise ValueError(given)
    return Normalize(means, deviations)


def _pair(given: str | None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    first, _, second = (given or "").partition(":")
    found = tuple(tuple(float(n) for n in part.split(",")) for part in (first, second))
    if not all(math.isfinite(n) for part in found for n in part):
        raise ValueError(given)
    return found[0], found[1]


def _zscore(given: str | None) -> ZScore:
    if given not in (None, "nonzero"):
        raise ValueError(given)
    return ZScore(given is not None)


def _axes(given: str | None) -> AxisOrder:
    text = (given or "").lower()
    order = [int(n) for n in text.split(",")] if "," in text else ["xyz".index(letter) for letter in text]
    if not order:
        raise ValueError(given)
    return AxisOrder(tuple(order))


_KINDS: dict[str, tuple[Callable[[str | None], Step], str]] = {
    "window": (lambda given: _window(given, True), "window=LOW:HIGH, as window=-160:240"),
    "clip": (lambda given: _window(given, False), "clip=LOW:HIGH, as clip=-1000:1000"),
    "normalize": (_normalize, "normalize=MEAN:DEVIATION, as normalize=77.9:176.6"),
    "zscore": (_zscore, "zscore or zscore=nonzero"),
    "dtype": (lambda given: FileType(DTYPES[given or ""]), f"dtype=TYPE with one of {', '.join(DTYPES)}"),
    "axes": (_axes, "axes=ORDER, as axes=zyx or axes=2,1,0"),
}

KNOWN_STEPS = tuple(_KINDS)
