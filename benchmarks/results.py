"""Results as values, and as JSON that is written after every sample and read again by `report` and `compare`."""

from __future__ import annotations

import json
import os
import statistics
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.environment import environment
from benchmarks.errors import UsageError
from benchmarks.limits import Limits, Work
from benchmarks.models import ResNetConfig, UNetConfig
from benchmarks.runner import Traffic
from benchmarks.suite import Bar, Case, Side, Suite, Window

FORMAT = 2
_NETWORKS = {"UNetConfig": UNetConfig, "ResNetConfig": ResNetConfig}


@dataclass(frozen=True)
class Sample:
    """One process's measurements; memory in bytes over the whole process tree.

    `first_seconds` is the first run (it allocates, and chooses kernels), `seconds` the median of `runs` after it; the
    peak is the highest of all.  `process_bytes` is the highest rise of any single process, `processes_bytes` that of
    each, highest first.  `counted` is what the transport sent, `forecast` what the plan said; None for a side that has
    no shards.  `opening_bytes` is the peak while the network is loaded and planned, `schedule` the way in which a plan
    goes through the volume depth-first.  `device_bytes` is what an accelerator held beyond the idle process.
    """

    setup_seconds: float
    first_seconds: float
    seconds: float
    idle_bytes: int
    peak_bytes: int
    process_bytes: int
    counted: Traffic | None = None
    forecast: Traffic | None = None
    opening_bytes: int = 0
    schedule: str | None = None
    runs: tuple[float, ...] = ()
    processes_bytes: tuple[int, ...] = ()
    device_bytes: int | None = None

    @property
    def rise_bytes(self) -> int:
        """Peak memory over the idle level; the accelerator's where there is one."""
        return self.peak_bytes - self.idle_bytes if self.device_bytes is None else self.device_bytes


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

    @property
    def state(self) -> str:
        """Why there are no samples, in a word or in full."""
        if self.failure:
            return f"failed: {self.failure}"
        return f"not here: {self.refusal}" if self.refusal else "not run"


@dataclass
class CaseResult:
    """A case with its sides in order, the machine's limits as found beside them, and what else is to be said of it."""

    case: Case
    sides: list[SideResult]
    notes: list[str] = field(default_factory=list)
    limits: list[Limits] = field(default_factory=list)
    work: Work | None = None

    def side(self, name: str) -> SideResult | None:
        """The side of this name."""
        return next((found for found in self.sides if found.side.name == name), None)


@dataclass
class Results:
    """All that a run of a suite found; grows while it runs."""

    suite: str
    threads: int
    repeats: int
    cases: list[CaseResult]
    environment: dict[str, Any]
    interrupted: bool = False

    @classmethod
    def empty(cls, suite: Suite, threads: int, repeats: int) -> Results:
        """The results before anything ran."""
        cases = [CaseResult(case, [SideResult(side) for side in case.sides]) for case in suite.cases]
        return cls(suite.name, threads, repeats, cases, environment())

    @property
    def failed(self) -> bool:
        """Whether any side failed."""
        return any(side.failure for case in self.cases for side in case.sides)

    def to_dict(self) -> dict[str, Any]:
        """The JSON document: times in seconds, memory in bytes."""
        return {
            "format": FORMAT,
            "suite": self.suite,
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
        beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
        try:
            beside.write_text(json.dumps(self.to_dict(), indent=1) + "\n")
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)


def load(path: Path) -> Results:
    """The results in a file.

    Raises:
        UsageError: when it cannot be read, is no file of results, or is one of another version.
    """
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from None
    except ValueError:
        raise UsageError(f"{path}: is not JSON; give a file that `python -m benchmarks run` wrote") from None
    if not isinstance(found, dict) or not {"format", "suite", "cases"} <= found.keys():
        raise UsageError(f"{path}: is no result of `python -m benchmarks run`")
    if found["format"] != FORMAT:
        raise UsageError(f"{path}: has version {found['format']}, this program reads {FORMAT}; measure again, or use "
                         f"the commit that wrote it ({str(found.get('commit'))[:12]})")
    try:
        return _restored(found)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{path}: is damaged ({type(error).__name__}: {error}); measure again") from None


def spread(values: Sequence[float], unit: float = 1, digits: int = 2) -> tuple[str, str]:
    """The median, and the lowest to the highest (nothing where they are the same)."""
    low, middle, high = (f"{v / unit:.{digits}f}" for v in (min(values), statistics.median(values), max(values)))
    return middle, "" if low == high else f"{low}-{high}"


# --- to JSON ------------------------------------------------------------------------------------------


def _case_dict(result: CaseResult) -> dict[str, Any]:
    case = asdict(result.case)
    network = {"kind": type(result.case.network).__name__, **case.pop("network")}
    return {
        **case,
        "network": network,
        "notes": result.notes,
        "limits_found": [asdict(limits) for limits in result.limits],
        "work": None if result.work is None else asdict(result.work),
        "sides": [_side_dict(side) for side in result.sides],
    }


def _side_dict(result: SideResult) -> dict[str, Any]:
    numbers = ("setup_seconds", "first_seconds", "seconds", "idle_bytes", "peak_bytes", "rise_bytes", "process_bytes",
               "opening_bytes")
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


# --- from JSON ----------------------------------------------------------------------------------------


def _restored(found: dict[str, Any]) -> Results:
    kept = {name: found[name] for name in ("started", "machine", "versions", "commit")}
    cases = [_restored_case(case) for case in found["cases"]]
    settings = found["settings"]
    return Results(found["suite"], settings["threads"], settings["repeats"], cases, kept, found["interrupted"])


def _restored_case(found: dict[str, Any]) -> CaseResult:
    found = dict(found)
    network = dict(found.pop("network"))
    sides = [_restored_side(side) for side in found.pop("sides")]
    notes, limits, work = found.pop("notes"), found.pop("limits_found"), found.pop("work")
    found["network"] = _NETWORKS[network.pop("kind")](**_tuples(network))
    found["bars"] = tuple(Bar(**bar) for bar in found["bars"])
    case = Case(**_tuples(found), sides=tuple(side.side for side in sides))
    return CaseResult(case, sides, notes, [Limits(**one) for one in limits], None if work is None else Work(**work))


def _restored_side(found: dict[str, Any]) -> SideResult:
    found = dict(found)
    found.pop("summary")
    samples = [_restored_sample(sample) for sample in found.pop("samples")]
    outcome = [found.pop(name) for name in ("difference", "failure", "budget_bytes", "refusal")]
    window = found.pop("window")
    side = Side(**found, window=None if window is None else Window(**window))
    return SideResult(side, samples, *outcome)


def _restored_sample(found: dict[str, Any]) -> Sample:
    traffic = {name: None if found[name] is None else Traffic(**found[name]) for name in ("counted", "forecast")}
    return Sample(**_tuples(found | traffic))


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
