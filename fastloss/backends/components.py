"""Connected components, and each voxel's nearest one, in NumPy: the definition and the fallback."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, Protocol

import numpy as np

CLASS, SIZE = 0, 1
LOW, HIGH, SUMS = slice(2, 5), slice(5, 8), slice(8, 11)
"""Columns of `Labelled.rows`: of the box that a component fills, and of sums of coordinates."""
COLUMNS = 11


class Labelled(Protocol):
    """The connected components of a volume (z, y, x), numbered from 1 by their first voxels."""

    @property
    def rows(self) -> np.ndarray:
        """For every component its class, size, the first z, y and x, the ends behind the last ones,
        and the sums of z, y and x over its voxels, (components, 11) of int64."""

    def write(self, out: np.ndarray, z: int, y: int, x: int, /) -> None:
        """Write the numbers of a box that starts there, 0 for the background; int32, in C order."""

    def overlaps(self, other: Any, /) -> np.ndarray:
        """How many voxels components share with those of another volume of the same backend.

        Returns:
            Rows (own number, other number, voxels) in ascending order, (pairs, 3) of int64.
        """

    def dilated(self, times: int, connectivity: int, /) -> Any:
        """The components of all that is in components, as often grown to neighbours over faces and
        edges; their class is 1."""


class NumpyLabelled:
    """Voxels of one class are connected where they share a face (6), an edge too (18), or a corner
    too (26)."""

    def __init__(self, classes: np.ndarray, table: np.ndarray, connectivity: int) -> None:
        """
        Args:
            classes: class indices, (z, y, x) of uint8 or uint16, in C order.
            table: the class of every index, (256,) or (65536,) of uint16; 0 is the background.
            connectivity: 6, 18 or 26.
        """
        self._numbers, self.rows = _components(table[classes], connectivity)

    def write(self, out: np.ndarray, z: int, y: int, x: int, /) -> None:
        depth, height, width = out.shape
        out[...] = self._numbers[z : z + depth, y : y + height, x : x + width]

    def overlaps(self, other: NumpyLabelled, /) -> np.ndarray:
        both = (self._numbers > 0) & (other._numbers > 0)
        pairs = np.stack([self._numbers[both], other._numbers[both]], axis=1)
        found, voxels = np.unique(pairs, axis=0, return_counts=True)
        rows: np.ndarray = np.concatenate([found.reshape(-1, 2), voxels[:, None]], axis=1)
        return rows

    def dilated(self, times: int, connectivity: int, /) -> NumpyLabelled:
        mask = self._numbers > 0
        for _ in range(times):
            # Neighbours over faces and edges differ along two axes at most.
            along_x, along_y = _spread(mask, 2), _spread(mask, 1)
            mask = _spread(along_x, 1) | _spread(along_x, 0) | _spread(along_y, 0)
        return NumpyLabelled(mask.view(np.uint8), np.arange(2, dtype=np.uint16), connectivity)


def _spread(mask: np.ndarray, axis: int) -> np.ndarray:
    """With the neighbours along one axis."""
    found: np.ndarray = mask.copy()
    to, source = np.moveaxis(found, axis, 0), np.moveaxis(mask, axis, 0)
    to[1:] |= source[:-1]
    to[:-1] |= source[1:]
    return found


def _components(labels: np.ndarray, connectivity: int) -> tuple[np.ndarray, np.ndarray]:
    """The number of every voxel, and the rows."""
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
    numbers = np.zeros(labels.shape, np.int64)
    numbers.ravel()[inside] = found + 1
    rows = np.zeros((len(roots), COLUMNS), np.int64)
    rows[:, CLASS] = labels.ravel()[roots]
    rows[:, SIZE] = np.bincount(found, minlength=len(roots))
    rows[:, LOW] = np.iinfo(np.int64).max
    for axis, place in enumerate(np.unravel_index(inside, labels.shape)):
        np.minimum.at(rows[:, LOW][:, axis], found, place)
        np.maximum.at(rows[:, HIGH][:, axis], found, place + 1)
        np.add.at(rows[:, SUMS][:, axis], found, place)
    return numbers, rows


def _neighbours(connectivity: int) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """Of every pair of directions that are opposite one: where to take voxels and neighbours."""
    axes = {6: 1, 18: 2, 26: 3}[connectivity]
    for step in product((-1, 0, 1), repeat=3):
        if step > (0, 0, 0) and sum(map(abs, step)) <= axes:
            here = tuple(slice(max(-s, 0), -s if s > 0 else None) for s in step)
            yield here, tuple(slice(max(s, 0), s if s < 0 else None) for s in step)


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
