"""Whether a case reached its bars, and by how much it missed them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.results import CaseResult, Sample, SideResult
from benchmarks.suite import Bar, Measure


@dataclass(frozen=True)
class Outcome:
    """A bar and what was found: a ratio of medians, or a median where the bar is of one side alone.

    Args:
        low, high: over the pairs of samples that were measured one after the other.
        reason: why there is no value.
    """

    bar: Bar
    value: float | None = None
    low: float | None = None
    high: float | None = None
    reason: str | None = None

    @property
    def reached(self) -> bool | None:
        """None where it was not measured."""
        return None if self.value is None else self.value <= self.bar.most

    @property
    def verdict(self) -> str:
        """In words, with how much it is off."""
        if self.value is None:
            return f"not measured: {self.reason}"
        return "reached" if self.reached else f"missed by {100 * (self.value / self.bar.most - 1):.0f} %"

    def text(self, value: float) -> str:
        """A value of this bar: a ratio, a number of messages, or MiB."""
        if self.bar.of is not None:
            return f"{value:.3f}"
        if self.bar.measure == "time":
            return f"{value:.3f} s"
        return f"{value:.0f}" if self.bar.measure == "messages per rank" else f"{value / 2**20:.3f} MiB"

    @property
    def found(self) -> str:
        """The value and, where they differ, the lowest to the highest."""
        if self.value is None or self.low is None or self.high is None:
            return ""
        middle, low, high = (self.text(v) for v in (self.value, self.low, self.high))
        return middle if low == high else f"{middle} ({low}-{high})"

    @property
    def line(self) -> str:
        """All of it."""
        found = f"{self.found}, " if self.found else ""
        return f"{self.bar.name}: {found}at most {self.text(self.bar.most)}: {self.verdict}"


def outcomes(result: CaseResult) -> list[Outcome]:
    """Of all the case's bars."""
    return [_outcome(result, bar) for bar in result.case.bars]


def values(samples: Sequence[Sample], measure: Measure) -> list[float]:
    """What a bar holds against its limit, for each sample that has it."""
    return [value for sample in samples if (value := _value(sample, measure)) is not None]


def _outcome(result: CaseResult, bar: Bar) -> Outcome:
    found: list[list[float]] = []
    for name in (bar.side, bar.of):
        if name is None:
            continue
        side = result.side(name)
        measured = values(side.samples, bar.measure) if side else []
        if not measured:
            return Outcome(bar, reason=_reason(name, side))
        found.append(measured)
    own = found[0]
    if len(found) == 1:
        return Outcome(bar, statistics.median(own), min(own), max(own))
    others = found[1]
    pairs = [a / b for a, b in zip(own, others, strict=False)]
    return Outcome(bar, statistics.median(own) / statistics.median(others), min(pairs), max(pairs))


def _reason(name: str, side: SideResult | None) -> str:
    if side is None:
        return f"{name} was left out"
    return f"{name} sends nothing" if side.samples else f"{name} {side.state}"


def _value(sample: Sample, measure: Measure) -> float | None:
    if measure == "time":
        return sample.seconds
    if measure == "memory":
        return sample.rise_bytes
    if measure == "process":
        return sample.process_bytes
    if sample.counted is None:
        return None
    return sample.counted.rank_sent_bytes if measure == "sent per rank" else sample.counted.rank_messages
