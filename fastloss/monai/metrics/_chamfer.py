"""Chessboard and taxicab distances between surfaces, by SciPy's transform."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np

from fastloss.monai.metrics._options import scipy

METRICS = ("chessboard", "taxicab")

_Directed = tuple[np.ndarray, "np.ndarray | None"]


def chamfer_distances(
    prediction: np.ndarray, reference: np.ndarray, metric: str, areas: np.ndarray | None
) -> tuple[_Directed, _Directed]:
    """From prediction to reference and back: distances in ascending order, and areas.

    Args:
        prediction, reference: masks of one shape, neither empty.
        metric: "chessboard" or "taxicab".
        areas: of the surface at a point between voxels by the number of the voxels around it; None:
            the surface is the voxels with a neighbour outside, and has no areas.

    Raises:
        ImportError: SciPy is not installed.
    """
    ndimage = scipy("ndimage", f"distance_metric={metric!r}")
    box = tuple(
        slice(max(each.min() - 1, 0), each.max() + 2) for each in np.nonzero(prediction | reference)
    )
    starts = [_surface(mask[box], areas, ndimage) for mask in (prediction, reference)]
    found: list[_Directed] = []
    for (start, weights), (end, _) in (starts, starts[::-1]):
        distances = ndimage.distance_transform_cdt(~end, metric=metric)[start]
        order = np.argsort(distances, kind="stable")
        found.append((distances[order], None if weights is None else weights[order]))
    return found[0], found[1]


def _surface(
    mask: np.ndarray, areas: np.ndarray | None, ndimage: Any
) -> tuple[np.ndarray, np.ndarray | None]:
    """Where it is, and the areas there."""
    if areas is None:
        return mask & ~ndimage.binary_erosion(mask), None
    padded = np.pad(mask, 1).astype(np.uint8)
    codes = np.zeros([n + 1 for n in mask.shape], np.uint8)
    for place in product((0, 1), repeat=mask.ndim):
        at = tuple(slice(i, i + n) for i, n in zip(place, codes.shape, strict=True))
        codes = codes * np.uint8(2) + padded[at]
    there = (codes > 0) & (codes < len(areas) - 1)
    return there, areas[codes[there]]
