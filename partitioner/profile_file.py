"""A profile as plain data, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from partitioner.curves import Curve, Grid

if TYPE_CHECKING:
    from partitioner.profile import Kernels, Link, Profile


def to_dict(profile: Profile) -> dict[str, Any]:
    """The fields of a profile as JSON has them."""
    return {
        "name": profile.name,
        "source": profile.source,
        "device": profile.device,
        "measured": profile.measured,
        "versions": dict(profile.versions),
        "kernels": [_kernels_dict(k) for k in profile.kernels],
        "links": {name: _link_dict(link) for name, link in profile.links.items()},
        "files": {"read": profile.read, "write": profile.write},
    }


def fields_of(data: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a `Profile`.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: when something is missing or is of the wrong kind.
    """
    kernels = tuple(sorted((_kernels(k) for k in data["kernels"]), key=lambda k: k.threads))
    if not kernels:
        raise ValueError("it knows no kernels")
    if not isinstance(data["measured"], bool):
        raise TypeError("measured must be true or false")
    return {
        **{name: _text(data, name) for name in ("name", "source", "device")},
        "measured": data["measured"],
        "versions": {str(k): str(v) for k, v in data["versions"].items()},
        "kernels": kernels,
        "links": {str(name): _link(link) for name, link in data["links"].items()},
        "read": _positive(data["files"], "read"),
        "write": _positive(data["files"], "write"),
    }


def _kernels_dict(kernels: Kernels) -> dict[str, Any]:
    return {
        "threads": kernels.threads,
        "launch": kernels.launch,
        "step": kernels.step,
        "flops": dict(kernels.flops),
        "bandwidth": kernels.bandwidth,
        "lanes": kernels.lanes,
        "curves": {name: curve.to_dict() for name, curve in kernels.curves.items()},
        "grids": {name: grid.to_dict() for name, grid in kernels.grids.items()},
    }


def _kernels(data: Mapping[str, Any]) -> Kernels:
    from partitioner.profile import Kernels

    flops = {str(name): _positive(data["flops"], name) for name in data["flops"]}
    if "float32" not in flops:
        raise KeyError("flops of float32")
    return Kernels(
        threads=_count(data, "threads"),
        launch=_positive(data, "launch"),
        step=_positive(data, "step"),
        flops=flops,
        bandwidth=_positive(data, "bandwidth"),
        lanes=_count(data, "lanes"),
        curves={str(name): Curve.from_dict(c) for name, c in data.get("curves", {}).items()},
        grids={str(name): Grid.from_dict(g) for name, g in data.get("grids", {}).items()},
    )


def _link_dict(link: Link) -> dict[str, Any]:
    found: dict[str, Any] = {"latency": link.latency, "bandwidth": link.bandwidth}
    return found if link.curve is None else {**found, "curve": link.curve.to_dict()}


def _link(data: Mapping[str, Any]) -> Link:
    from partitioner.profile import Link

    curve = Curve.from_dict(data["curve"]) if "curve" in data else None
    return Link(_positive(data, "latency"), _positive(data, "bandwidth"), curve)


def _positive(data: Mapping[str, Any], name: str) -> float:
    value = data[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive number")
    return float(value)


def _count(data: Mapping[str, Any], name: str) -> int:
    value = data[name]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number from 1")
    return value


def _text(data: Mapping[str, Any], name: str) -> str:
    value = data[name]
    if not isinstance(value, str):
        raise TypeError(f"{name} must be text")
    return value
