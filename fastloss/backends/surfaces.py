"""Distances between the surfaces of two label maps in NumPy: the definition, and the fallback."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fastloss.backends.distances import to_seeds


class Directed(NamedTuple):
    """From every element of one surface to the nearest one of another, in ascending order."""

    distances: np.ndarray
    """(N,) float64; infinite where the other surface has no element."""
    areas: np.ndarray | None
    """(N,) float64, of the elements; None: each counts the same."""


def surface_distances(
    prediction: np.ndarray,
    reference: np.ndarray,
    structures: np.ndarray,
    axes: int,
    spacing: Sequence[float],
    areas: np.ndarray | None,
    counted: np.ndarray | None,
) -> list[tuple[Directed, Directed]]:
    """For every structure: prediction to reference, and reference to prediction.

    Without ``areas``, the surface of a structure is its voxels with a neighbour outside along some
    axis; what lies beyond the volume is outside. With them, it is the points between voxels whose
    surroundings are neither all inside nor all outside, and ``areas`` tells the area of the surface
    there: by a number whose bits, from the highest, are the 2 voxels along each axis in C order.

    Args:
        prediction, reference: class indices, (z, y, x) of uint8 or uint16, in C order.
        structures: which indices make up each structure, (structures, indices) of bool.
        axes: how many of z, y, x are axes of the image, the last 1 to 3; along the others there is
            one voxel, and no neighbour.
        spacing: of z, y and x.
        areas: see above.
        counted: (z, y, x) of bool; voxels elsewhere are of no surface, nor are points whose voxels
            are all elsewhere. None: all count.
    """
    grid = np.ones_like(prediction, bool) if counted is None else counted
    where = grid if areas is None else _codes(grid, axes) > 0
    found = []
    for members in structures:
        masks = members[prediction], members[reference]
        if areas is None:
            surfaces = [_edge(mask, axes) & where for mask in masks]
            weights: list[np.ndarray | None] = [None, None]
        else:
            codes = [_codes(mask, axes) for mask in masks]
            surfaces = [(code > 0) & (code < len(areas) - 1) & where for code in codes]
            weights = [areas[code[s]] for code, s in zip(codes, surfaces, strict=True)]
        there = _directed(surfaces[0], surfaces[1], weights[0], spacing)
        found.append((there, _directed(surfaces[1], surfaces[0], weights[1], spacing)))
    return found


def _directed(
    start: np.ndarray, end: np.ndarray, weights: np.ndarray | None, spacing: Sequence[float]
) -> Directed:
    distances = to_seeds(end, spacing)[start]
    if weights is None:
        return Directed(np.sort(distances), None)
    order = np.argsort(distances, kind="stable")
    return Directed(distances[order], weights[order])


def _edge(mask: np.ndarray, axes: int) -> np.ndarray:
    inner = mask.copy()
    for axis in range(3 - axes, 3):
        outside = np.zeros_like(mask.take([0], axis))
        padded = np.concatenate([outside, mask, outside], axis)
        n = mask.shape[axis]
        inner &= padded.take(range(n), axis) & padded.take(range(2, n + 2), axis)
    edge: np.ndarray = mask & ~inner
    return edge


def _codes(mask: np.ndarray, axes: int) -> np.ndarray:
    """The number of every point between voxels, one more along each axis than there are voxels."""
    used = [int(axis >= 3 - axes) for axis in range(3)]
    padded = np.pad(mask, [(i, i) for i in used]).astype(np.uint8)
    shape = [n - i for n, i in zip(padded.shape, used, strict=True)]
    code = np.zeros(shape, np.uint8)
    for place in np.ndindex(*(1 + i for i in used)):
        part = padded[tuple(slice(i, i + n) for i, n in zip(place, shape, strict=True))]
        code = code * np.uint8(2) + part
    return code
