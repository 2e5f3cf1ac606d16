"""A procedural torso: a deterministic label map of any size with any number of classes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fastloss.bench.errors import BadArgument

Point = tuple[float, float, float]

# Coordinates run from -1 to 1: x from right to left, y from back to front, z from bottom to top.
# Each organ is an ellipsoid of these radii, swept along its points. Later ones overwrite earlier
# ones where they overlap, as large organs come first.
_ORGANS: tuple[tuple[tuple[Point, ...], Point], ...] = (
    (((0, 0, 0),), (0.92, 0.7, 1.7)),  # body
    (((0.42, 0.02, 0.5),), (0.33, 0.44, 0.48)),  # left lung
    (((-0.42, 0.02, 0.5),), (0.33, 0.44, 0.48)),  # right lung
    (((-0.32, 0.1, -0.12), (-0.02, 0.18, -0.05)), (0.36, 0.32, 0.2)),  # liver
    (((0.12, 0.2, 0.35),), (0.22, 0.22, 0.2)),  # heart
    (((0.36, 0.25, -0.05), (0.16, 0.3, -0.2)), (0.15, 0.14, 0.13)),  # stomach
    (((0.5, -0.2, -0.1),), (0.13, 0.16, 0.16)),  # spleen
    (((0.32, -0.28, -0.3),), (0.1, 0.1, 0.17)),  # left kidney
    (((-0.32, -0.28, -0.34),), (0.1, 0.1, 0.17)),  # right kidney
    (((0, 0.2, -0.85),), (0.16, 0.14, 0.11)),  # bladder
    (((0.03, -0.14, -1), (0.03, -0.14, 0.6), (0.06, 0.1, 0.66)), (0.06, 0.06, 0.06)),  # aorta
    (((-0.1, -0.12, -1), (-0.1, -0.08, 0.3)), (0.06, 0.06, 0.06)),  # inferior vena cava
    (
        ((-0.45, 0.2, -0.7), (-0.45, 0.25, -0.3), (0.45, 0.35, -0.32), (0.48, 0.1, -0.75)),
        (0.08, 0.08, 0.08),
    ),  # colon
    (((-0.15, 0.3, -0.5), (0.15, 0.25, -0.6), (-0.1, 0.2, -0.7)), (0.11, 0.11, 0.09)),  # bowel
    (((0.35, -0.2, -0.75), (0.45, -0.05, -0.95)), (0.14, 0.12, 0.16)),  # left hip
    (((-0.35, -0.2, -0.75), (-0.45, -0.05, -0.95)), (0.14, 0.12, 0.16)),  # right hip
    (((0, -0.42, -0.82),), (0.15, 0.1, 0.16)),  # sacrum
    (((0.12, -0.52, -0.6), (0.12, -0.52, 0.95)), (0.08, 0.08, 0.08)),  # left back muscle
    (((-0.12, -0.52, -0.6), (-0.12, -0.52, 0.95)), (0.08, 0.08, 0.08)),  # right back muscle
    (((0, -0.02, 0.6), (0, 0.02, 1)), (0.05, 0.05, 0.05)),  # trachea
    (((0.02, -0.2, -0.05), (0.0, -0.2, 1)), (0.04, 0.04, 0.04)),  # oesophagus
    (((0.25, 0, -0.2), (-0.1, 0.05, -0.28)), (0.06, 0.06, 0.05)),  # pancreas
    (((-0.25, 0.3, -0.25),), (0.05, 0.06, 0.07)),  # gallbladder
    (((-0.3, 0.05, -0.1), (0, 0, -0.2)), (0.03, 0.03, 0.03)),  # portal vein
    (((0.24, -0.25, -0.12),), (0.05, 0.03, 0.04)),  # left adrenal gland
    (((-0.24, -0.25, -0.14),), (0.05, 0.03, 0.04)),  # right adrenal gland
)


def phantom(size: tuple[int, ...], classes: int) -> np.ndarray:
    """A label map of this size in which each of the labels 0 … classes−1 occurs.

    Label 0 is the air around the body. The organs are followed by vertebrae, ribs, and as many
    nodules as needed.

    Args:
        size: three voxel counts.
        classes: at least 2 and at most the number of voxels.
    """
    if classes > np.prod(size):
        raise BadArgument("--classes", f"{classes} classes do not fit into {size} voxels")
    labels = np.zeros(size, np.int32)
    shapes = _shapes(classes)
    for label in range(1, classes):
        points, radii = next(shapes)
        _paint(labels, label, points, radii)
    _complete(labels, classes)
    return labels


def _shapes(classes: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for points, radii in _ORGANS:
        yield np.array(points, float), np.array(radii, float)
    heights = np.linspace(-0.62, 0.97, 24)
    for z in heights:
        yield np.array([(0.0, -0.36, z)]), np.array([0.1, 0.12, 0.026])
    angles = np.linspace(0.15, 0.85, 12) * np.pi
    for z in np.linspace(0.0, 0.97, 12):
        for side in (1, -1):
            x, y = 0.75 * side * np.sin(angles), -0.56 * np.cos(angles)
            yield np.stack([x, y, z - 0.3 * angles / np.pi], axis=1), np.full(3, 0.04)
    rng = np.random.default_rng(0)
    spread = 0.6 * classes ** (-1 / 3)
    while True:
        angle, distance = rng.uniform(0, 2 * np.pi), np.sqrt(rng.uniform())
        centre = (0.85 * distance * np.cos(angle), 0.62 * distance * np.sin(angle))
        yield np.array([(*centre, rng.uniform(-0.95, 0.95))]), spread * rng.uniform(0.5, 1, 3)


def _paint(labels: np.ndarray, label: int, points: np.ndarray, radii: np.ndarray) -> None:
    """Give this label to the voxels within the radii of the line through the points."""
    shape = np.array(labels.shape)
    ends = points[1:] if len(points) > 1 else points
    for start, end in zip(points, ends, strict=False):
        low = (np.minimum(start, end) - radii + 1) / 2 * shape
        high = (np.maximum(start, end) + radii + 1) / 2 * shape
        box = tuple(
            slice(int(a), int(b))
            for a, b in zip(np.clip(low, 0, shape), np.clip(high + 1, 0, shape), strict=True)
        )
        axes = [
            ((np.arange(s.start, s.stop) + 0.5) / n * 2 - 1 - a) / r
            for s, n, a, r in zip(box, shape, start, radii, strict=True)
        ]
        along = (end - start) / radii
        x, y, z = np.ix_(*axes)
        length = along @ along
        t = np.clip((x * along[0] + y * along[1] + z * along[2]) / (length or 1.0), 0, 1)
        distance = (x - t * along[0]) ** 2 + (y - t * along[1]) ** 2 + (z - t * along[2]) ** 2
        labels[box][distance < 1] = label


def _complete(labels: np.ndarray, classes: int) -> None:
    """Give one voxel to each label that fell between the voxels or was painted over."""
    flat = labels.reshape(-1)
    while True:
        counts = np.bincount(flat, minlength=classes)
        missing = np.flatnonzero(counts == 0)
        if not missing.size:
            return
        spare = np.flatnonzero(flat == counts.argmax())
        missing = missing[: spare.size - 1]
        flat[spare[np.linspace(0, spare.size - 1, missing.size, dtype=np.int64)]] = missing
