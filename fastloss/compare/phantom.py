"""Procedural patients: a torso with organs, and lesions of many sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from fastloss.compare.data import Volume, normalised

CLASSES = ("background", "lung", "liver", "kidney", "aorta", "lesion")
LUNG, LIVER, KIDNEY, AORTA, LESION = range(1, 6)
SHAPE = (40, 56, 64)
"""From bottom to top, back to front, right to left."""
IN_PLANE = 5.0
"""mm between voxels; between slices it is more, and other in each case."""
DIAMETERS = (9.0, 55.0)
"""Of lesions in mm, evenly spread on a logarithmic scale."""
LESIONS = (6, 16)
"""How many there are in a case."""
NOISE = 0.06
# Grey values: air, other tissue, and the classes from the lung on; lesions by where they lie.
AIR, TISSUE = 0.0, 0.50
GREY = {LUNG: 0.12, LIVER: 0.66, KIDNEY: 0.86, AORTA: 1.0}
IN_LUNG, IN_LIVER, VESSEL = 0.46, 0.40, 0.40

# Centres and radii (z, y, x) in units of the body's half height, depth and width.
_ELLIPSOIDS: tuple[tuple[int, tuple[float, ...], tuple[float, ...]], ...] = (
    (LUNG, (0.42, 0.02, 0.42), (0.46, 0.58, 0.33)),
    (LUNG, (0.42, 0.02, -0.42), (0.46, 0.58, 0.33)),
    (LIVER, (-0.22, 0.12, -0.34), (0.28, 0.52, 0.42)),
    (KIDNEY, (-0.52, -0.40, 0.42), (0.28, 0.27, 0.21)),
    (KIDNEY, (-0.60, -0.40, -0.42), (0.28, 0.27, 0.21)),
)
_AORTA = ((-1.0, -0.38, 0.04), (0.55, -0.40, 0.10), (0.72, -0.05, 0.05))
_BODY = (1.25, 0.95, 0.95)


@dataclass(frozen=True)
class Phantom:
    """Cases that are made when they are loaded, each from its own seed."""

    cases: int = 12
    seed: int = 0
    shape: tuple[int, int, int] = SHAPE
    channels: int = 1
    classes: tuple[str, ...] = CLASSES
    problems: tuple[tuple[str, str], ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"patient{i:03d}" for i in range(self.cases))

    def load(self, name: str) -> Volume:
        image, labels, spacing = patient([self.seed, self.names.index(name)], self.shape)
        return Volume(name, normalised(image)[None], labels, spacing)

    def describe(self) -> dict[str, Any]:
        return {"kind": "phantom", "cases": self.cases, "seed": self.seed, "shape": self.shape}


def patient(
    seed: Sequence[int], shape: tuple[int, int, int] = SHAPE
) -> tuple[np.ndarray, np.ndarray, tuple[float, float, float]]:
    """An image (D, H, W) of float32, its label map of uint8, and the spacing.

    Body, organs and their places vary, bent by a smooth deformation; lesions lie in lungs and
    liver. In the lungs there are vessels, as bright as lesions and no class. The image is blurred
    by a voxel, multiplied by a bias field, and noisy.
    """
    rng = np.random.default_rng(seed)
    spacing = (float(np.round(rng.uniform(6, 8), 1)), IN_PLANE, IN_PLANE)
    half = [n * step / 2 for n, step in zip(shape, spacing, strict=True)]
    # Millimetres from the centre, then in units of the body.
    axes = [
        (np.arange(n) + 0.5) * step - h for n, step, h in zip(shape, spacing, half, strict=True)
    ]
    mm = np.stack(np.meshgrid(*axes, indexing="ij")).astype(np.float32)
    body = np.array([150.0, 128.0, 158.0]) * rng.uniform(0.9, 1.08, 3)
    bent = mm + 9 * np.stack([waves(rng, mm, 140.0) for _ in range(3)])
    angle = rng.normal(0, 0.06)
    z, y, x = bent
    y, x = y * np.cos(angle) - x * np.sin(angle), y * np.sin(angle) + x * np.cos(angle)
    place = np.stack([z, y, x]) / body.reshape(3, 1, 1, 1).astype(np.float32)

    labels = np.zeros(shape, np.uint8)
    inside = _ellipsoid(place, (0, 0, 0), _BODY)
    grey = np.where(inside, np.float32(TISSUE), np.float32(AIR))
    jitter = rng.normal(0, 0.02, len(GREY))
    for label, centre, radii in _ELLIPSOIDS:
        moved = np.array(centre) + rng.normal(0, 0.035, 3)
        where = _ellipsoid(place, moved, np.array(radii) * rng.uniform(0.85, 1.12, 3)) & inside
        labels[where] = label
        grey[where] = GREY[label] + jitter[label - 1]
    where = _tube(place, np.array(_AORTA) + rng.normal(0, 0.03, (3, 3)), 18.0 / body) & inside
    labels[where], grey[where] = AORTA, GREY[AORTA] + jitter[AORTA - 1]
    _add_vessels(rng, place, body, labels, grey)
    _add_lesions(rng, mm, labels, grey)

    image = _blurred(grey) * (1 + 0.12 * waves(rng, mm, 260.0))
    image += rng.normal(0, NOISE, shape).astype(np.float32)
    return image.astype(np.float32), labels, spacing


def waves(rng: np.random.Generator, mm: np.ndarray, length: float) -> np.ndarray:
    """A smooth random field with values about 1: waves of this length in mm, or longer."""
    field = np.zeros(mm.shape[1:], np.float32)
    for _ in range(4):
        direction = rng.normal(size=3)
        direction *= 2 * np.pi / (length * rng.uniform(1, 2) * np.linalg.norm(direction))
        phase = np.tensordot(direction.astype(np.float32), mm, 1) + np.float32(rng.uniform(0, 6.3))
        field += np.cos(phase) * np.float32(0.7)
    return field


def _ellipsoid(place: np.ndarray, centre: Any, radii: Any) -> np.ndarray:
    total = np.zeros(place.shape[1:], np.float32)
    for axis in range(3):
        total += ((place[axis] - np.float32(centre[axis])) / np.float32(radii[axis])) ** 2
    found: np.ndarray = total < 1
    return found


def _tube(place: np.ndarray, points: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """The voxels near a line through the points."""
    scale = (1 / np.asarray(radii)).astype(np.float32)
    scaled = place * scale.reshape(3, 1, 1, 1)
    found = np.zeros(place.shape[1:], bool)
    ends = (points * scale).astype(np.float32)
    for start, end in pairwise(ends):
        along = end - start
        offset = scaled - start.reshape(3, 1, 1, 1)
        t = np.clip(np.tensordot(along, offset, 1) / (along @ along), 0, 1)
        offset -= t * along.reshape(3, 1, 1, 1)
        found |= (offset**2).sum(axis=0) < 1
    return found


def _add_vessels(
    rng: np.random.Generator,
    place: np.ndarray,
    body: np.ndarray,
    labels: np.ndarray,
    grey: np.ndarray,
) -> None:
    for side in (1, -1):
        for _ in range(5):
            root = np.array([0.4, 0.0, 0.15 * side])
            tip = np.array(
                [rng.uniform(0, 0.8), rng.uniform(-0.5, 0.5), rng.uniform(0.4, 0.7) * side]
            )
            tube = _tube(place, np.stack([root, tip]), rng.uniform(3.5, 6) / body)
            grey[tube & (labels == LUNG)] = VESSEL


def _add_lesions(
    rng: np.random.Generator, mm: np.ndarray, labels: np.ndarray, grey: np.ndarray
) -> None:
    organs = np.argwhere((labels == LUNG) | (labels == LIVER))
    for _ in range(rng.integers(LESIONS[0], LESIONS[1] + 1) if len(organs) else 0):
        at = tuple(organs[rng.integers(len(organs))])
        diameter = float(np.exp(rng.uniform(*np.log(DIAMETERS))))
        radii = diameter / 2 * rng.uniform(0.8, 1.25, 3)
        where = _ellipsoid(mm, mm[:, at[0], at[1], at[2]] + rng.uniform(-1, 1, 3), radii)
        where[at] = True
        for organ, value in ((LUNG, IN_LUNG), (LIVER, IN_LIVER)):
            part = where & (labels == organ)
            labels[part], grey[part] = LESION, value + rng.normal(0, 0.02)


def _blurred(image: np.ndarray) -> np.ndarray:
    """A binomial filter of three voxels along each axis: part of a voxel is its neighbours'."""
    for axis in range(3):
        padded = np.pad(image, [(1, 1) if a == axis else (0, 0) for a in range(3)], mode="edge")
        n = image.shape[axis]
        first, middle, last = (padded.take(range(i, i + n), axis) for i in range(3))
        image = 0.25 * first + 0.5 * middle + 0.25 * last
    return image
