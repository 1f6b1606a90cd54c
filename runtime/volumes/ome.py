"""The axes and voxel sizes of OME-Zarr images (versions up to 0.5): read from a group's attributes, written into them.

    axes of the array      presented as
    z y x                  1 1 z y x
    c y x                  1 c y x
    t c z y x              t c z y x
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from partitioner.errors import PartitionError
from runtime.volumes.base import ArraySpec, Meta

_MILLIMETRES = {
    "angstrom": 1e-7, "nanometer": 1e-6, "micrometer": 1e-3, "millimeter": 1.0, "centimeter": 10.0, "meter": 1e3,
}
_WORLD = "xyz"
_VERSIONS = {2: "0.4", 3: "0.5"}
_OWN = "partitioner"
_LEADING = ("t", "c")
_KINDS = {"t": "time", "c": "channel"}


@dataclass(frozen=True)
class OmeAxes:
    """The axes of an image as its array has them.

    Args:
        names: one letter each, of t, c, z, y, x, in this order.
        units: per axis; None where there is none.
        scale: extent of a voxel along each axis, in its unit.
        translation: position of the first voxel.
        affine: from the indices of the spatial axes to millimetres where scale and translation do not say it.
    """

    names: tuple[str, ...]
    units: tuple[str | None, ...]
    scale: tuple[float, ...]
    translation: tuple[float, ...]
    affine: tuple[tuple[float, ...], ...] | None = None

    @property
    def spatial(self) -> tuple[int, ...]:
        """The axes of space."""
        return tuple(i for i, name in enumerate(self.names) if name not in _LEADING)

    @property
    def kept(self) -> tuple[int, ...]:
        """Where the array's axes are among those presented: batch, channels, space."""
        return tuple(_LEADING.index(n) if n in _LEADING else i + len(_LEADING) - self.spatial[0]
                     for i, n in enumerate(self.names))

    def presented(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The array's extents as a model sees them."""
        found = [1] * (len(_LEADING) + len(self.spatial))
        for axis, extent in zip(self.kept, shape, strict=True):
            found[axis] = extent
        return tuple(found)

    @property
    def meta(self) -> Meta:
        """Affine in millimetres, with these axes as header."""
        return Meta(np.array(self.affine) if self.affine is not None else self._placed(), self)

    def _placed(self) -> NDArray[np.float64]:
        affine = np.eye(4)
        for column, axis in enumerate(self.spatial):
            row, unit = _WORLD.index(self.names[axis]), _MILLIMETRES.get(self.units[axis] or "", 1.0)
            affine[:3, column] = 0.0
            affine[row, column] = self.scale[axis] * unit
            affine[row, 3] = self.translation[axis] * unit
        for column in range(len(self.spatial), 3):  # an image of two axes lies in a plane
            affine[:3, column] = np.eye(3)[_free_row(self.names)]
        return affine


def _free_row(names: Sequence[str]) -> int:
    return next(row for row, name in enumerate(_WORLD) if name not in names)


# --- reading ---------------------------------------------------------------------------------------


def multiscales(attributes: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The first image that a group's attributes describe; None where they describe none."""
    described = attributes.get("ome", attributes)
    found = described.get("multiscales") if isinstance(described, Mapping) else None
    image = found[0] if isinstance(found, list) and found else None
    return image if isinstance(image, Mapping) and image.get("datasets") else None


def level_paths(where: Path, image: Mapping[str, Any]) -> tuple[str, ...]:
    """Paths of an image's arrays, the one of full resolution first.

    Raises:
        PartitionError: the description is damaged.
    """
    try:
        return tuple(str(level["path"]).strip("/") for level in image["datasets"])
    except (KeyError, TypeError) as error:
        raise _damaged(where, "its levels have no paths") from error


def read_axes(where: Path, image: Mapping[str, Any], level: str, rank: int, own: Any) -> OmeAxes:
    """The axes of one level of an image.

    Args:
        where: for messages.
        level: path of its array.
        rank: how many axes the array has.
        own: what `attributes_of` adds for itself, if it did.

    Raises:
        PartitionError: the description is damaged, or its axes are not those of an image.
    """
    try:
        given = image.get("axes") or list("tczyx"[-rank:])
        axes = [a if isinstance(a, Mapping) else {"name": a} for a in given]
        names = tuple(str(axis["name"]).lower() for axis in axes)
        if len(names) != rank:
            raise _damaged(where, f"it tells of {len(names)} axes, the array has {rank}")
        units = tuple(axis.get("unit") for axis in axes)
        dataset = next(d for d in image["datasets"] if str(d["path"]).strip("/") == level)
        scale, translation = np.ones(len(axes)), np.zeros(len(axes))
        steps = (*dataset.get("coordinateTransformations", ()), *image.get("coordinateTransformations", ()))
        for step in steps:
            if "scale" in step:
                scale, translation = scale * np.array(step["scale"]), translation * np.array(step["scale"])
            if "translation" in step:
                translation = translation + np.array(step["translation"])
        affine = _own_affine(own)
    except (AttributeError, KeyError, TypeError, ValueError, StopIteration) as error:
        raise _damaged(where, type(error).__name__) from error
    space = [n for n in names if n not in _LEADING]
    if names != (*(n for n in _LEADING if n in names), *space) or not _is_space(space):
        raise PartitionError(f"{where}: has axes {', '.join(names)}; t, c, z, y, x in this order are needed, of which "
                             "t, c and z may be missing")
    return OmeAxes(names, units, tuple(map(float, scale)), tuple(map(float, translation)), affine)


def _is_space(names: Sequence[str]) -> bool:
    return len(names) >= len("yx") and len(set(names)) == len(names) and set(names) <= set(_WORLD)


def _own_affine(own: Any) -> tuple[tuple[float, ...], ...] | None:
    if not isinstance(own, Mapping) or "affine" not in own:
        return None
    affine = np.array(own["affine"], np.float64)
    if affine.shape != (4, 4):
        raise ValueError(affine.shape)
    return tuple(tuple(map(float, row)) for row in affine)


def _damaged(where: Path, reason: str) -> PartitionError:
    return PartitionError(f"{where}: its OME-Zarr description is damaged ({reason}); copy or write it again, or name "
                          "an array in it")


# --- writing ---------------------------------------------------------------------------------------


def plan_axes(path: Path, spec: ArraySpec, meta: Meta | None) -> OmeAxes:
    """The axes of an image to be written; what lies in the world as `meta` says takes its voxel sizes.

    Raises:
        PartitionError: the array is no image.
    """
    rank = len(spec.shape) - len(_LEADING)
    if not len("yx") <= rank <= len(_WORLD):
        raise PartitionError(f"{path}: OME-Zarr holds images of shape (t, c, y, x) or (t, c, z, y, x), not "
                             f"'{spec.name}' of shape {spec.shape}; write .zarr")
    known = meta.header if meta is not None and isinstance(meta.header, OmeAxes) else None
    if known is not None and len(known.spatial) != rank:
        known = None
    elif known is None and meta is not None and rank == len(_WORLD):
        known = _axes_of_affine(meta.affine)
    space = known or OmeAxes(tuple("zyx"[-rank:]), (None,) * rank, (1.0,) * rank, (0.0,) * rank)
    leading = tuple(n for n, extent in zip(_LEADING, spec.shape, strict=False) if extent > 1 or n in space.names)
    names = (*leading, *(space.names[i] for i in space.spatial))
    at = [space.names.index(n) if n in space.names else None for n in names]

    def of(values: Sequence[Any], default: Any) -> tuple[Any, ...]:
        return tuple(default if i is None else values[i] for i in at)

    return OmeAxes(names, of(space.units, None), of(space.scale, 1.0), of(space.translation, 0.0), space.affine)


def _axes_of_affine(affine: NDArray[np.float64]) -> OmeAxes:
    """Three axes of space, each named after the axis of the world along which it goes, more or less."""
    columns = affine[:3, :3]
    rows = [int(np.argmax(np.abs(columns[:, axis]))) for axis in range(3)]
    names = tuple(_WORLD[row] for row in rows) if len(set(rows)) == len(rows) else tuple("zyx")
    scale = tuple(float(math.hypot(*columns[:, axis])) or 1.0 for axis in range(3))
    plain = OmeAxes(names, ("millimeter",) * 3, scale, tuple(float(affine[_WORLD.index(n), 3]) for n in names))
    if np.array_equal(plain.meta.affine, affine):
        return plain
    exact = tuple(tuple(map(float, row)) for row in affine)
    return OmeAxes(names, plain.units, scale, (0.0,) * 3, exact)


def attributes_of(axes: OmeAxes, name: str, level: str, zarr_format: int) -> dict[str, Any]:
    """The attributes of the group of an image that has one level."""
    steps: list[dict[str, Any]] = [{"type": "scale", "scale": list(axes.scale)}]
    if any(axes.translation):
        steps.append({"type": "translation", "translation": list(axes.translation)})
    described = [
        {"name": n, "type": _KINDS.get(n, "space"), **({} if unit is None else {"unit": unit})}
        for n, unit in zip(axes.names, axes.units, strict=True)
    ]
    image = {"name": name, "axes": described, "datasets": [{"path": level, "coordinateTransformations": steps}]}
    version = _VERSIONS[zarr_format]
    own = {} if axes.affine is None else {_OWN: {"affine": [list(row) for row in axes.affine]}}
    if zarr_format == 2:
        return {"multiscales": [{"version": version, **image}], **own}
    return {"ome": {"version": version, "multiscales": [image]}, **own}


def own_attributes(attributes: Mapping[str, Any]) -> Any:
    """What `attributes_of` has added for itself."""
    return attributes.get(_OWN)
