"""Results as values, as JSON, and as a table."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from benchmarks.measure import Sample
from benchmarks.suite import Case, Side, Suite

FORMAT = 1
_PACKAGES = ("partitioner", "torch", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "numpy")


@dataclass
class SideResult:
    """A side's samples; its error against the case's first side, or against float64: max|a-b| / max|b|.

    Attributes:
        budget: bytes that the side's processes may hold, for a side with a share.
        refusal: why the side cannot run, by its own account; unlike a failure, a result.
    """

    side: Side
    samples: list[Sample] = field(default_factory=list)
    difference: float | None = None
    failure: str | None = None
    budget: int | None = None
    refusal: str | None = None


@dataclass
class CaseResult:
    """A case with its sides in order, and what else is to be said of it."""

    case: Case
    sides: list[SideResult]
    notes: list[str] = field(default_factory=list)


@dataclass
class Results:
    """All that a run of a suite found; grows while it runs."""

    suite: Suite
    threads: int
    repeats: int
    cases: list[CaseResult]
    environment: dict[str, Any]
    interrupted: bool = False

    @classmethod
    def empty(cls, suite: Suite, threads: int, repeats: int) -> Results:
        """The results before anything ran."""
        cases = [CaseResult(case, [SideResult(side) for side in case.sides]) for case in suite.cases]
        return cls(suite, threads, repeats, cases, environment())

    @property
    def failed(self) -> bool:
        """Whether any side failed."""
        return any(side.failure for case in self.cases for side in case.sides)

    def to_dict(self) -> dict[str, Any]:
        """The JSON document: times in seconds, memory in bytes."""
        return {
            "format": FORMAT,
            "suite": self.suite.name,
            "interrupted": self.interrupted,
            "settings": {"threads": self.threads, "repeats": self.repeats},
            **self.environment,
            "cases": [_case_dict(case) for case in self.cases],
        }

    def save(self, path: Path) -> None:
        """Write the JSON document beside and rename it, so that a reader never sees half of it.

        Raises:
            OSError: when the path cannot be written.
        """
        beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            beside.write_text(json.dumps(self.to_dict(), indent=2) + "\n")
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)


_COLUMNS = ("time s", "memory\nMB", "process\nMB", "forecast\nMB", "sent\nMB", "mes-\nsages", "differ-\nence")
_LEGEND = (
    "memory: rise over the idle processes, all of them together; process: the largest single one, and what the "
    "plan forecasts for it; difference: max|a-b| / max|b| from {first}"
)


def table(result: CaseResult) -> Table:
    """The case as a table: medians, below them the lowest and the highest; failures in the caption."""
    notes = [_LEGEND.format(first=result.case.sides[0].name)]
    notes += [f"{side.side.name}: {side.failure}" for side in result.sides if side.failure]
    return table_of(result, _COLUMNS, [_cells(side) for side in result.sides], notes)


def table_of(result: CaseResult, columns: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str]) -> Table:
    """A table with a row of cells for each side of a case, and notes below it."""
    case = result.case
    found = Table(
        title=f"{case.name}: {case.what}",
        title_justify="left",
        caption=escape("\n".join(notes)),
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    found.add_column("", no_wrap=True)
    for column in columns:
        found.add_column(column, justify="right", no_wrap=True)
    for side, cells in zip(result.sides, rows, strict=True):
        found.add_row(side.side.name, *cells)
    return found


def _cells(result: SideResult) -> Sequence[str]:
    if not result.samples:
        return ("failed" if result.failure else "not run",)
    samples = result.samples
    counted, forecast = samples[-1].counted, samples[-1].forecast
    return (
        spread([s.seconds for s in samples], 1, 2),
        spread([s.rise_bytes for s in samples], 1e6, 0),
        spread([s.process_bytes for s in samples], 1e6, 0),
        "" if forecast is None else f"{forecast.rank_bytes / 1e6:.0f}",
        "" if counted is None else f"{counted.sent_bytes / 1e6:.2f}",
        "" if counted is None else str(counted.messages),
        "" if result.difference is None else f"{result.difference:.1e}",
    )


def spread(values: Sequence[float], unit: float, digits: int) -> str:
    """The median, and below it the lowest and the highest."""
    low, middle, high = (
        f"{value / unit:.{digits}f}" for value in (min(values), statistics.median(values), max(values))
    )
    return middle if low == high else f"{middle}\n[dim]{low}-{high}[/dim]"


def _case_dict(result: CaseResult) -> dict[str, Any]:
    case = result.case
    return {
        "name": case.name,
        "what": case.what,
        "task": case.task,
        "network": {"kind": type(case.network).__name__, **asdict(case.network)},
        "shape": case.shape,
        "notes": result.notes,
        "sides": [_side_dict(side) for side in result.sides],
    }


def _side_dict(result: SideResult) -> dict[str, Any]:
    numbers = (
        "setup_seconds",
        "first_seconds",
        "seconds",
        "idle_bytes",
        "peak_bytes",
        "rise_bytes",
        "process_bytes",
        "opening_bytes",
    )
    return {
        **asdict(result.side),
        "difference": result.difference,
        "failure": result.failure,
        "budget_bytes": result.budget,
        "refusal": result.refusal,
        "summary": {name: _summary([getattr(s, name) for s in result.samples]) for name in numbers},
        "samples": [asdict(sample) for sample in result.samples],
    }


def _summary(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def environment() -> dict[str, Any]:
    """When, where and with what the figures are made, as it is before the first of them."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
    }


def machine() -> dict[str, Any]:
    """The processor, its cores, the memory, the system and the load that others put on it."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def versions() -> dict[str, str]:
    """The packages that the figures depend on."""
    found: dict[str, str] = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "from the source tree" if name == "partitioner" else "missing"
    return found


def commit() -> str | None:
    """The checkout's commit, `+changes` where files differ from it; None outside a checkout."""
    head = _git("rev-parse", "HEAD")
    if head is None:
        return None
    return f"{head}+changes" if _git("status", "--porcelain") else head


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
