"""How well a tissue is found: overlap, and distance between boundaries."""

from __future__ import annotations

import numpy as np

import fastloss as fl


def dice(predicted: np.ndarray, truth: np.ndarray) -> float:
    """The Dice coefficient of two masks."""
    return 2 * float((predicted & truth).sum()) / float(predicted.sum() + truth.sum())


def hd95(predicted: np.ndarray, truth: np.ndarray, spacing: tuple[float, ...]) -> float:
    """The 95th percentile Hausdorff distance of two masks, in the unit of ``spacing``.

    It is the larger of two 95th percentiles: that of the distances from the boundary voxels of one
    mask to the nearest boundary voxel of the other, and that of those the other way round. A voxel
    of a mask is a boundary voxel if a voxel that shares a face with it is not of the mask, or is
    outside the array. MONAI's ``compute_hausdorff_distance(percentile=95)`` has the same
    definition. NaN if a mask is empty.
    """
    if not (predicted.any() and truth.any()):
        return float("nan")
    edges = [_boundary(mask) for mask in (predicted, truth)]
    # The distance to the nearest voxel that is 0.
    ours, theirs = (fl.distance_transform(~edge, spacing=spacing) for edge in edges)
    directed = (theirs[edges[0]], ours[edges[1]])
    return max(float(np.percentile(distances, 95)) for distances in directed)


def _boundary(mask: np.ndarray) -> np.ndarray:
    padded = np.pad(mask, 1)
    inside = mask.copy()
    for axis in range(mask.ndim):
        for shift in (-1, 1):
            inside &= np.roll(padded, shift, axis)[(slice(1, -1),) * mask.ndim]
    return mask & ~inside
