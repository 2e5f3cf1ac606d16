"""The area of a surface between voxels: marching cubes on 2 × 2 × 2 of them, squares on 2 × 2.

Every voxel centre is a corner of a cell that is inside or outside. The surface cuts each edge of
the cell with one end inside and one outside at its middle. Within a face the cuts are joined around
the corners inside; all faces together close polygons, whose area is that of their triangles.

A polygon that does not lie in a plane has another area for every way to divide it into triangles.
`_DIVISIONS` are those of DeepMind's package surface-distance (Nikolov et al. 2021, "Clinically
Applicable Segmentation of Head and Neck Anatomy"), so that areas agree with it. Swapping inside and
outside changes nothing; cells with more than four corners inside are treated as their complement.

Source: Lorensen & Cline 1987, "Marching cubes".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import product
from math import hypot

import numpy as np

_Edge = tuple[int, int]
_CORNERS = tuple(product((0, 1), repeat=3))
"""Of a cell, in the order of the bits of its number, the highest first."""
_FACES = tuple(
    tuple(i for i, corner in enumerate(_CORNERS) if corner[axis] == side)
    for axis in range(3)
    for side in (0, 1)
)
_EDGES = tuple(
    (i, j)
    for i in range(8)
    for j in range(i)
    if sum(a != b for a, b in zip(_CORNERS[i], _CORNERS[j], strict=True)) == 1
)
_DIVISIONS = {
    19: 3, 21: 1, 27: 2, 29: 2, 35: 3, 39: 2, 42: 1, 46: 2, 49: 2, 57: 2, 59: 2, 69: 3, 71: 2, 76:
    1, 78: 2, 81: 2, 89: 2, 93: 2, 99: 3, 101: 3, 106: 1, 108: 1, 114: 2, 115: 1, 116: 2, 117: 3,
}  # fmt: skip
"""Which division, where it is not the first; of a number above 127 that of its complement."""


@lru_cache(maxsize=64)
def element_areas(spacing: tuple[float, ...]) -> np.ndarray:
    """The area in a cell by its number: 256 of them for three axes, 16 lengths for two."""
    if len(spacing) == 2:
        return _lengths(spacing)
    z, y, x = spacing
    faces = np.array([y * x, z * x, z * y])
    areas = np.zeros(256)
    for number in range(1, 128):
        vectors = np.array(_triangles(number)) * faces
        areas[number] = areas[255 - number] = np.sqrt((vectors**2).sum(1)).sum()
    areas.flags.writeable = False
    return areas


def _lengths(spacing: Sequence[float]) -> np.ndarray:
    """Half a diagonal around every corner that is alone; a side between two and two."""
    y, x = spacing
    lengths = np.zeros(16)
    for number in range(1, 15):
        inside = [number >> bit & 1 for bit in (3, 2, 1, 0)]
        if sum(inside) != 2:
            lengths[number] = hypot(y, x) / 2
        elif inside[0] == inside[3]:
            lengths[number] = hypot(y, x)
        else:
            lengths[number] = x if inside[0] == inside[1] else y
    lengths.flags.writeable = False
    return lengths


@lru_cache(maxsize=256)
def _triangles(number: int) -> list[np.ndarray]:
    """The vector area of each triangle, in voxels."""
    shown = number if number.bit_count() <= 4 else 255 - number
    inside = [bool(shown & (128 >> corner)) for corner in range(8)]
    divisions = product(*(list(_divisions(polygon)) for polygon in _polygons(inside)))
    for _ in range(_DIVISIONS.get(number, 0)):
        next(divisions)
    return [
        np.cross(b - a, c - a) / 2
        for division in next(divisions)
        for a, b, c in ([_middle(edge) for edge in triangle] for triangle in division)
    ]


def _middle(edge: _Edge) -> np.ndarray:
    return np.add(_CORNERS[edge[0]], _CORNERS[edge[1]]) / 2


def _polygons(inside: Sequence[bool]) -> list[list[_Edge]]:
    """The cut edges around each polygon."""
    joined: dict[_Edge, list[_Edge]] = {}
    for face in _FACES:
        cut = [e for e in _EDGES if e[0] in face and e[1] in face and inside[e[0]] != inside[e[1]]]
        pairs = [cut]
        if len(cut) == 4:
            pairs = [[e for e in cut if corner in e] for corner in face if inside[corner]]
        for pair in filter(None, pairs):
            joined.setdefault(pair[0], []).append(pair[1])
            joined.setdefault(pair[1], []).append(pair[0])
    polygons: list[list[_Edge]] = []
    while joined:
        edge: _Edge | None = next(iter(joined))
        polygon = []
        while edge is not None:
            polygon.append(edge)
            edge = next((other for other in joined.pop(edge) if other in joined), None)
        polygons.append(polygon)
    return polygons


def _divisions(polygon: list[_Edge]) -> Iterator[list[tuple[_Edge, ...]]]:
    """All ways to divide a polygon into triangles: by the third corner over its closing edge."""
    if len(polygon) < 3:
        yield []
        return
    for k in range(1, len(polygon) - 1):
        for left, right in product(_divisions(polygon[: k + 1]), list(_divisions(polygon[k:]))):
            yield [*left, *right, (polygon[0], polygon[k], polygon[-1])]
