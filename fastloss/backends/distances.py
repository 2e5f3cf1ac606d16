"""Exact Euclidean distance transforms in NumPy: the definition, and the fallback without C++."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

CONVENTIONS = ("kervadec", "exact", "unsigned")
"""Inside a class and outside it: 1 − d and d, −d and d, d and d."""


def distance_transform(
    mask: np.ndarray, spacing: Sequence[float], limit: float, out: np.ndarray
) -> None:
    """Write the distance of every voxel to the nearest 0 of its volume.

    Args:
        mask: 0 and 1, (V, z, y, x) uint8.
        spacing: of z, y and x.
        limit: what distances are clamped to; may be infinite.
        out: (V, z, y, x) float32.
    """
    for volume, to in zip(mask, out, strict=True):
        to[...] = np.minimum(to_seeds(volume == 0, spacing), limit)


def signed_distance(
    classes: np.ndarray,
    first: int,
    spacing: Sequence[float],
    convention: str,
    limit: float,
    out: np.ndarray,
) -> None:
    """Write distances to the boundary of classes, with a sign.

    Args:
        classes: class indices, (V, z, y, x) of uint8 or uint16.
        first: the class of ``out[:, 0]``; the others follow it.
        spacing, limit: as in `distance_transform`.
        convention: one of `CONVENTIONS`.
        out: (V, C, z, y, x) of float32 or float16.
    """
    for volume, maps in zip(classes, out, strict=True):
        for c, to in enumerate(maps, first):
            mask = volume == c
            outside = np.minimum(to_seeds(mask, spacing), limit)
            inside = np.minimum(to_seeds(~mask, spacing), limit)
            if convention != "exact" and (mask.all() or not mask.any()):
                to[...] = 0
            elif convention == "unsigned":
                to[...] = np.where(mask, inside, outside)
            else:
                to[...] = np.where(mask, (convention == "kervadec") - inside, outside)


def class_indices(labels: np.ndarray, classes: int, out: np.ndarray) -> int:
    """Write labels as class indices, ``classes`` for those that are none.

    Returns:
        How many labels in [0, classes) have a fraction, or are NaN.
    """
    known = (labels >= 0) & (labels < classes)
    found = np.where(known, labels, classes)
    out[...] = found
    return int(((out != found) | (labels != labels)).sum())


def to_seeds(seeds: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """Distances to the nearest seed, float64; infinite where there is none."""
    squared = np.where(seeds, 0.0, np.inf)
    for axis, size in enumerate(spacing):
        known = np.moveaxis(squared, axis, 0)
        nearest = known.copy()
        for step in range(1, len(known)):
            square = (size * step) ** 2
            if not (nearest > square).any():
                break
            np.minimum(nearest[step:], known[:-step] + square, out=nearest[step:])
            np.minimum(nearest[:-step], known[step:] + square, out=nearest[:-step])
        known[...] = nearest
    distance: np.ndarray = np.sqrt(squared)
    return distance
