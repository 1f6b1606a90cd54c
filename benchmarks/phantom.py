"""A CT-like phantom: a body with liver, lesions, spine and lungs in Hounsfield units, for any extents.

Axes are depth (towards the head), height (towards the back) and width; the same seed gives the same voxels.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

DEFAULT_SHAPE = (121, 160, 143)
CLASS_NAMES = ("air", "body", "liver", "lesion", "spine")

_AIR, _BODY, _LIVER, _LESION, _SPINE = range(len(CLASS_NAMES))
_HOUNSFIELD = np.array([-1000, -80, 120, 20, 480], dtype=np.float32)
_NOISE_DEVIATION = 18.0
_EXTENT_MM = (300.0, 300.0, 390.0)


@dataclass(frozen=True)
class Phantom:
    """Voxels in Hounsfield units (int16) and their class (uint8), both of shape (depth, height, width)."""

    hounsfield: NDArray[np.int16]
    classes: NDArray[np.uint8]

    @property
    def affine(self) -> NDArray[np.float64]:
        """Voxel index (depth, height, width) -> millimetres (right, anterior, superior), shape (4, 4).

        Uneven spacing, an origin far from zero and a slightly tilted gantry, as a scanner writes them.
        """
        depth, height, width = (mm / n for mm, n in zip(_EXTENT_MM, self.hounsfield.shape, strict=True))
        cos, sin = np.cos(np.deg2rad(3.0)), np.sin(np.deg2rad(3.0))
        affine = np.eye(4)
        affine[:3, 0] = (0, -sin * depth, cos * depth)
        affine[:3, 1] = (0, -cos * height, -sin * height)
        affine[:3, 2] = (-width, 0, 0)
        affine[:3, 3] = (195.5, 152.25, -880.0)
        return affine


@dataclass(frozen=True)
class _Ellipsoid:
    """Centre and radii as fractions of the extents, each running from -1 to 1 across the volume."""

    kind: int
    centre: tuple[float, float, float]
    radii: tuple[float, float, float]


_ORGANS = (
    _Ellipsoid(_BODY, (0.0, 0.0, 0.0), (1.6, 0.78, 0.88)),
    _Ellipsoid(_AIR, (0.85, -0.1, -0.40), (0.55, 0.45, 0.28)),
    _Ellipsoid(_AIR, (0.85, -0.1, 0.40), (0.55, 0.45, 0.28)),
    _Ellipsoid(_LIVER, (-0.05, -0.12, -0.36), (0.50, 0.42, 0.40)),
)


def phantom(shape: Sequence[int] = DEFAULT_SHAPE, seed: int = 0, variety: float = 0) -> Phantom:
    """A phantom of the given extents (depth, height, width), each at least 1; seconds for 10^8 voxels.

    Lesions lie inside the liver at places drawn from the seed; the noise is smooth, as a scanner's is.

    Args:
        variety: how much organs differ between seeds: their centres move by up to this much of half the extents, and
            their radii change by up to this share.
    """
    depth, height, width = (np.linspace(-1, 1, n, dtype=np.float32) for n in shape)
    grid = (depth[:, None, None], height[None, :, None], width[None, None, :])
    random = np.random.default_rng(seed)
    classes = np.zeros(tuple(shape), dtype=np.uint8)
    organs = _varied(random, variety) if variety else _ORGANS
    for organ in organs:
        classes[_inside(organ, grid)] = organ.kind
    for lesion in _lesions(random, organs[-1]):
        classes[_inside(lesion, grid) & (classes == _LIVER)] = _LESION
    # Vertebrae: a column behind the organs, its radius swelling and shrinking along the body's axis.
    radius = 0.14 + 0.02 * np.cos(depth * 20)
    column = (grid[1] - 0.48) ** 2 + grid[2] ** 2 < (radius**2)[:, None, None]
    classes[column] = _SPINE
    values = _HOUNSFIELD[classes] + _smooth_noise(random, shape)
    np.clip(values, -1024, 3071, out=values)
    return Phantom(np.rint(values, out=values).astype(np.int16), classes)


def write_nifti(voxels: NDArray[np.generic], affine: NDArray[np.float64], path: str | os.PathLike[str]) -> Path:
    """Write voxels (depth, height, width) as .nii or .nii.gz, and leave no half-written file behind.

    Raises:
        ImportError: without nibabel.
        ValueError: for another suffix.
        OSError: when the path cannot be written.
    """
    import nibabel

    target = Path(path)
    suffix = next((s for s in (".nii.gz", ".nii") if target.name.endswith(s)), None)
    if suffix is None:
        raise ValueError(f"{target}: a NIfTI file ends in .nii or .nii.gz")
    target.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(voxels, affine)  # pyright: ignore[reportPrivateImportUsage]
    image.header.set_xyzt_units("mm")
    beside = target.with_name(f".{uuid.uuid4().hex}{suffix}")
    try:
        image.to_filename(beside)
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)
    return target


def _inside(organ: _Ellipsoid, grid: tuple[NDArray[np.float32], ...]) -> NDArray[np.bool_]:
    terms = [((g - c) / r) ** 2 for g, c, r in zip(grid, organ.centre, organ.radii, strict=True)]
    return terms[0] + terms[1] + terms[2] < 1


def _varied(random: np.random.Generator, variety: float) -> tuple[_Ellipsoid, ...]:
    """The organs of another patient: the body keeps its place, what is in it moves and changes its size."""
    found: list[_Ellipsoid] = []
    for organ in _ORGANS:
        moves = organ.kind != _BODY
        d, h, w = (c + moves * random.uniform(-variety, variety) for c in organ.centre)
        rd, rh, rw = (r * (1 + random.uniform(-variety, variety)) for r in organ.radii)
        found.append(_Ellipsoid(organ.kind, (d, h, w), (rd, rh, rw)))
    return tuple(found)


def _lesions(random: np.random.Generator, liver: _Ellipsoid) -> list[_Ellipsoid]:
    found: list[_Ellipsoid] = []
    for _ in range(9):
        offset = random.uniform(-0.6, 0.6, 3)
        d, h, w = (c + r * o for c, r, o in zip(liver.centre, liver.radii, offset, strict=True))
        radius = random.uniform(0.08, 0.17)
        found.append(_Ellipsoid(_LESION, (d, h, w), (radius, radius, radius * 0.77)))
    return found


def _smooth_noise(random: np.random.Generator, shape: Sequence[int]) -> NDArray[np.float32]:
    """White noise summed over two neighbours along each axis, in Hounsfield units."""
    noise = random.standard_normal([n + 1 for n in shape], dtype=np.float32)
    for axis in range(3):
        low = [slice(None)] * 3
        high = [slice(None)] * 3
        low[axis], high[axis] = slice(None, -1), slice(1, None)
        noise = noise[tuple(low)] + noise[tuple(high)]
    noise *= _NOISE_DEVIATION / 8**0.5
    return noise
