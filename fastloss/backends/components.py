"""Connected components, and each voxel's nearest one, in NumPy: the definition and the fallback."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np

CLASS, SIZE = 0, 1
LOW, HIGH, SUMS = slice(2, 5), slice(5, 8), slice(8, 11)
"""Columns of what `components` returns: of the box that a component fills, and of coordinates."""
COLUMNS = 11


def components(
    classes: np.ndarray, table: np.ndarray, connectivity: int, out: np.ndarray
) -> np.ndarray:
    """Write the connected component of every voxel, from 1 in the order of their first voxels.

    Voxels of one class are connected where they share a face (6), an edge too (18), or a corner
    too (26).

    Args:
        classes: class indices, (z, y, x) of uint8 or uint16, in C order.
        table: the class of every index, (256,) or (65536,) of uint16; 0 is the background.
        connectivity: 6, 18 or 26.
        out: (z, y, x) of int32, in C order; 0 for the background.

    Returns:
        For every component its class, size, the first z, y and x, the ends behind the last ones,
        and the sums of z, y and x over its voxels, (components, 11) of int64.
    """
    labels = table[classes]
    number = np.arange(labels.size).reshape(labels.shape)
    pairs = []
    for here, there in _neighbours(connectivity):
        same = (labels[here] == labels[there]) & (labels[here] > 0)
        pairs.append((number[here][same], number[there][same]))
    first, second = (np.concatenate(several) for several in zip(*pairs, strict=True))
    root = np.arange(labels.size)
    while True:
        a, b = root[first], root[second]
        if np.array_equal(a, b):
            break
        np.minimum.at(root, np.maximum(a, b), np.minimum(a, b))
        while not np.array_equal(root[root], root):
            root = root[root]
    inside = np.flatnonzero(labels)
    roots, found = np.unique(root[inside], return_inverse=True)
    out[...] = 0
    out.ravel()[inside] = found + 1
    rows = np.zeros((len(roots), COLUMNS), np.int64)
    rows[:, CLASS] = labels.ravel()[roots]
    rows[:, SIZE] = np.bincount(found, minlength=len(roots))
    rows[:, LOW] = np.iinfo(np.int64).max
    for axis, place in enumerate(np.unravel_index(inside, labels.shape)):
        np.minimum.at(rows[:, LOW][:, axis], found, place)
        np.maximum.at(rows[:, HIGH][:, axis], found, place + 1)
        np.add.at(rows[:, SUMS][:, axis], found, place)
    return rows


def _neighbours(connectivity: int) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """Of every pair of directions that are opposite one: where to take voxels and neighbours."""
    axes = {6: 1, 18: 2, 26: 3}[connectivity]
    for step in product((-1, 0, 1), repeat=3):
        if step > (0, 0, 0) and sum(map(abs, step)) <= axes:
            here = tuple(slice(max(-s, 0), -s if s > 0 else None) for s in step)
            yield here, tuple(slice(max(s, 0), s if s < 0 else None) for s in step)


def overlaps(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """How many voxels each component of one map shares with those of another.

    Args:
        first, second: (rows, voxels) of int32, in C order; numbers below 1 are of no component.

    Returns:
        Rows (of the first, of the second, voxels) in ascending order, (pairs, 3) of int64.
    """
    both = (first > 0) & (second > 0)
    pairs = np.stack([first[both], second[both]], axis=1).astype(np.int64)
    found, voxels = np.unique(pairs, axis=0, return_counts=True)
    return np.concatenate([found.reshape(-1, 2), voxels[:, None]], axis=1)


def voronoi(numbers: np.ndarray, spacing: Sequence[float], out: np.ndarray) -> None:
    """Write the nearest component of every voxel, of those that are equally far the lowest.

    Squared distances are added up along x, then y, then z in float64, and compared after each.

    Args:
        numbers: components, (z, y, x) of int32; those below 1 are none.
        spacing: of z, y and x.
        out: (z, y, x) of int32; 0 in a volume without a component.
    """
    nearest = np.where(numbers > 0, numbers, np.iinfo(np.int32).max)
    squared = np.where(numbers > 0, 0.0, np.inf)
    for axis in (2, 1, 0):
        # Views, along whose first axis is searched.
        near, far = np.moveaxis(nearest, axis, 0), np.moveaxis(squared, axis, 0)
        of_seed, to_seed = near.copy(), far.copy()
        for step in range(1, len(far)):
            square = (spacing[axis] * step) ** 2
            if not (far >= square).any():
                break
            for to, seed in ((slice(step, None), slice(None, -step)),
                             (slice(None, -step), slice(step, None))):  # fmt: skip
                at, other = to_seed[seed] + square, of_seed[seed]
                better = (at < far[to]) | ((at == far[to]) & (other < near[to]))
                far[to] = np.where(better, at, far[to])
                near[to] = np.where(better, other, near[to])
    out[...] = np.where(np.isinf(squared), 0, nearest)
