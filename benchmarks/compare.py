"""Two files of results side by side: what became faster, slower, larger, smaller, beyond the spread of the samples."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.errors import UsageError
from benchmarks.results import CaseResult, Results, SideResult, load

Verdict: TypeAlias = Literal["same", "less", "more"]

_ALIKE = 0.02
_WIDTH = 110


@dataclass(frozen=True)
class Change:
    """One figure of one side in both files; values of single samples."""

    case: str
    side: str
    own: bool
    measure: Literal["time", "memory"]
    old: tuple[float, ...]
    new: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """New over old, of medians."""
        return statistics.median(self.new) / (statistics.median(self.old) or 1)

    @property
    def verdict(self) -> Verdict:
        """Whether the samples of one lie beyond all of the other's; within 2 % nothing has changed."""
        apart = max(self.new) < min(self.old) or min(self.new) > max(self.old)
        if not apart or abs(self.ratio - 1) < _ALIKE:
            return "same"
        return "less" if self.ratio < 1 else "more"


def run_compare(old: Path, new: Path, fail_above: float | None, console: Console) -> int:
    """Print the table; returns 1 where an own side's time or memory rose above `fail_above` times the old one.

    Raises:
        UsageError: for files that cannot be read, or have no side in common.
    """
    before, after = load(old), load(new)
    found = changes(before, after)
    if not found:
        raise UsageError(f"{old} and {new} have no measured side in common")
    wide = Console(file=console.file, width=max(console.width, _WIDTH))
    wide.print(table(found))
    for text in (*notes(before, after), *_alone(before, after, old.name), *_alone(after, before, new.name)):
        wide.print(text, markup=False, highlight=False, soft_wrap=True)
    if fail_above is None:
        return 0
    worse = [c for c in found if c.own and c.verdict == "more" and c.ratio > fail_above]
    for change in worse:
        wide.print(f"{change.case}, {change.side}: {change.measure} is {change.ratio:.2f} of what it was, "
                   f"above {fail_above:g}", markup=False, highlight=False)
    return 1 if worse else 0


def changes(old: Results, new: Results) -> list[Change]:
    """Time and memory of all sides that both have samples of, in the order of the new file."""
    found: list[Change] = []
    for case in new.cases:
        before = _case(old, case)
        for side in case.sides if before else ():
            was = before.side(side.side.name) if before else None
            if was is None or not was.samples or not side.samples:
                continue
            names = case.case.name, side.side.name, side.side.own
            found.append(Change(*names, "time", _times(was), _times(side)))
            found.append(Change(*names, "memory", _memory(was), _memory(side)))
    return found


def _case(results: Results, like: CaseResult) -> CaseResult | None:
    """The same case: a name stands for one network and shape, in both files."""
    same = (like.case.name, like.case.network, like.case.shape, like.case.task, like.case.dtype)
    for found in results.cases:
        case = found.case
        if (case.name, case.network, case.shape, case.task, case.dtype) == same:
            return found
    return None


def _times(result: SideResult) -> tuple[float, ...]:
    """Of every process; of its single runs where there is one process."""
    samples = result.samples
    return tuple(s.seconds for s in samples) if len(samples) > 1 else samples[0].runs or (samples[0].seconds,)


def _memory(result: SideResult) -> tuple[float, ...]:
    return tuple(float(s.rise_bytes) for s in result.samples)


def table(found: Sequence[Change]) -> Table:
    """A row for each figure of each side."""
    told = "medians; same: the ranges of the samples overlap, or the medians differ by less than 2 %"
    shown = Table(box=SIMPLE_HEAD, caption=told, caption_justify="left")
    for name in ("case", "side", "", "old", "new", "new / old", "verdict"):
        shown.add_column(name, justify="right" if name in ("old", "new", "new / old") else "left", no_wrap=True)
    for change in found:
        unit, digits = (1.0, 3) if change.measure == "time" else (1e6, 0)
        label = "time s" if change.measure == "time" else "memory MB"
        old, new = (f"{statistics.median(v) / unit:.{digits}f}" for v in (change.old, change.new))
        colour = {"same": "dim", "less": "green", "more": "red"}[change.verdict]
        shown.add_row(change.case, escape(change.side), label, old, new, f"{change.ratio:.2f}",
                      f"[{colour}]{change.verdict}[/{colour}]")
    return shown


def notes(old: Results, new: Results) -> list[str]:
    """What makes the files hard to compare."""
    found = [f"{which} was interrupted" for which, r in (("OLD", old), ("NEW", new)) if r.interrupted]
    for name in ("processor", "cores", "accelerator"):
        was, now = (r.environment["machine"].get(name) for r in (old, new))
        if was != now:
            found.append(f"another machine: {name} was {was}, is {now}")
    if old.threads != new.threads:
        found.append(f"threads were {old.threads}, are {new.threads}")
    for name, version in new.environment["versions"].items():
        if (was := old.environment["versions"].get(name)) != version:
            found.append(f"{name} was {was}, is {version}")
    for case in new.cases:
        before = _case(old, case)
        limits = [max((one.flops for one in c.limits), default=0.0) for c in (before, case) if c]
        if len(limits) == 2 and all(limits) and abs(limits[1] / limits[0] - 1) > 0.1:
            found.append(f"{case.case.name}: the machine did {limits[1] / limits[0]:.2f} of the arithmetic that it did")
    return found


def _alone(one: Results, other: Results, name: str) -> list[str]:
    found: list[str] = []
    for case in one.cases:
        same = _case(other, case)
        missing = [s.side.name for s in case.sides if s.samples and not _measured(same, s.side.name)]
        if missing:
            found.append(f"only in {name}: {case.case.name}: {', '.join(missing)}")
    return found


def _measured(case: CaseResult | None, side: str) -> bool:
    found = case.side(side) if case else None
    return found is not None and bool(found.samples)
