"""Distances between surfaces on a GPU: those of `fastloss.backends.surfaces`, and as exact.

Only the boxes of class indices are copied to CPU memory, and for every element of a surface the
voxels to the nearest one of the other surface.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np

from fastloss.backends.cuda.call import in_c_order
from fastloss.backends.cuda.device import Device
from fastloss.backends.cuda.distance import distance_transform, squares_of
from fastloss.backends.cuda.indices import BLOCKS, THREADS
from fastloss.backends.cuda.source import source
from fastloss.backends.surfaces import Directed
from fastloss.borrowed import Borrowed, Place, device_view

# Mirrors `struct SurfaceCall` in csrc/cuda/surface.cu.
SURFACE_CALL = np.dtype(
    [
        ("classes", np.int64),
        ("counted", np.int64),
        ("structure", np.int64),
        ("boxes", np.int64),
        ("elements", np.int64),
        ("ends", np.int64),
        ("distances", np.int64),
        ("places", np.int64),
        ("found", np.int64),
        ("numbers", np.int64),
        ("count", np.int64),
        ("shape", np.int64, 3),
        ("low", np.int64, 3),
        ("size", np.int64, 3),
        ("axes", np.int32),
        ("points", np.int32),
        ("item", np.int32),
        ("indices", np.int32),
        ("shared", np.int32),
        ("inverse", np.float32),
        ("square", np.float32, 3),
        ("inverse_square", np.float32),
    ],
    align=True,
)
_RECORD = np.dtype(("V", SURFACE_CALL.itemsize))
KERNELS = tuple(f"fastloss_surface_{name}" for name in ("boxes", "elements", "places", "distances"))
_NOWHERE = np.iinfo(np.int32).max
_BITS = 21
MOST_VOXELS = (1 << _BITS) - 2
"""Along an axis: one more, and a minus sign, still fit an element."""
_BLOCKS_EACH = 4
"""Blocks that look for boxes, for every multiprocessor."""


class Volume(NamedTuple):
    """Class indices (z, y, x) in C order: where, and the bytes of each."""

    address: int
    item: int


class Surfaces:
    """The surfaces of two volumes. For the arguments see `fastloss.backends.surfaces`.

    Args:
        counted: the address of the voxels that count, or 0.
    """

    def __init__(
        self,
        place: Place,
        device: Device,
        volumes: Sequence[Volume],
        shape: tuple[int, ...],
        counted: int,
        axes: int,
        spacing: Sequence[float],
        areas: np.ndarray | None,
    ) -> None:
        self._place, self._device, self._volumes, self._shape = place, device, volumes, shape
        self._axes, self._spacing = axes, spacing
        # Rounded as those of the C++ backend, so that ties of shares fall alike.
        self._areas = None if areas is None else areas.astype(np.float32).astype(np.float64)
        self._kernels = device.kernels(source("surface.cu"), KERNELS)
        self._call = np.zeros(1, SURFACE_CALL)
        self._call["counted"], self._call["shape"], self._call["axes"] = counted, shape, axes
        self._call["points"] = areas is not None

    def distances(self, structures: np.ndarray) -> list[tuple[Directed, Directed]]:
        """Of every structure: prediction to reference, and reference to prediction."""
        if not prod(self._shape):
            return [(self._nothing(), self._nothing()) for _ in structures]
        boxes = self._boxes(structures.shape[1])
        own = self._place.array(structures.astype(np.uint8), "uint8")
        found = []
        for k, members in enumerate(structures):
            low, high = boxes[members, :3].min(axis=0), boxes[members, 3:].max(axis=0)
            if (high <= low).any():
                found.append((self._nothing(), self._nothing()))
                continue
            self._call["structure"] = self._place.address(own) + k * structures.shape[1]
            found.append(self._between(low, high))
        return found

    def _nothing(self) -> Directed:
        return Directed(np.empty(0), None if self._areas is None else np.empty(0))

    def _boxes(self, indices: int) -> np.ndarray:
        """The first voxel of each index in either volume, and one beyond the last; (indices, 6)."""
        nothing = np.tile(np.array([_NOWHERE] * 3 + [0] * 3, np.int32), (indices, 1))
        boxes = self._place.array(nothing, "int32")
        call = self._call.copy()
        call["boxes"], call["indices"] = self._place.address(boxes), indices
        shared = 24 * indices
        call["shared"] = shared <= self._device.shared_bytes
        most = _BLOCKS_EACH * self._device.multiprocessors
        for volume in self._volumes:
            call["classes"], call["item"] = volume
            blocks = min(most, -(-prod(self._shape) // THREADS))
            self._launch(0, blocks, call, shared if call["shared"][0] else 0)
        return self._place.numpy(boxes)

    def _between(self, low: np.ndarray, high: np.ndarray) -> tuple[Directed, Directed]:
        """The two surfaces of a structure that lies in a box."""
        used = np.arange(3) >= 3 - self._axes
        size = tuple(map(int, high - low + (used if self._areas is not None else 0)))
        blocks = min(BLOCKS, -(-prod(size) // THREADS))
        elements = self._place.empty((2, *size), "uint8")
        at = self._place.address(elements)
        calls = [self._call.copy() for _ in self._volumes]
        tallies = self._place.array(np.zeros(4, np.int64), "int64")
        for i, (call, volume) in enumerate(zip(calls, self._volumes, strict=True)):
            call["classes"], call["item"] = volume
            call["low"], call["size"] = low, size
            call["elements"], call["ends"] = (at + side * prod(size) for side in (i, 1 - i))
            call["count"] = self._place.address(tallies) + 8 * i
            self._launch(1, blocks, call)
        counts = [int(n) for n in self._place.numpy(tallies)[:2]]
        both = sum(counts)
        if not both:
            return self._nothing(), self._nothing()
        steps = in_c_order((2, *size), 1)
        view = device_view(elements, at, (2, *size), steps, "uint8")
        mask = Borrowed(view, "uint8", self._place)
        distances = distance_transform(mask, 1, self._spacing, np.inf)
        squares, scale = squares_of(size, self._spacing)
        # The voxels to the nearest end, and the numbers of the surroundings behind.
        found = self._place.empty((both * (9 if self._areas is not None else 8),), "uint8")
        places = self._device.empty(8 * both)
        start = 0
        for i, (call, count) in enumerate(zip(calls, counts, strict=True)):
            call["distances"] = self._place.address(distances) + 4 * (1 - i) * prod(size)
            call["places"] = places.address + 8 * start
            call["found"] = self._place.address(found) + 8 * start
            if self._areas is not None:
                call["numbers"] = self._place.address(found) + 8 * both + start
            call["count"] += 16  # tallies of what is listed
            call["inverse"], call["square"] = 1 / scale, squares
            call["inverse_square"] = 1 / squares[2] if squares[2] else 0
            if count:
                self._launch(2, blocks, call)
                self._launch(3, min(BLOCKS, -(-count // THREADS)), call)
            start += count
        raw = np.ascontiguousarray(self._place.numpy(found))
        codes, numbers = raw[: 8 * both].view(np.int64), raw[8 * both :]
        lengths = self._lengths(codes)
        first = counts[0]
        return (
            self._directed(lengths[:first], numbers[:first]),
            self._directed(lengths[first:], numbers[first:]),
        )

    def _lengths(self, codes: np.ndarray) -> np.ndarray:
        """Distances of voxels along z, y and x, in float64; of float32 where a code is one."""
        square = np.zeros(len(codes))
        for axis in range(3):
            steps = codes >> _BITS * (2 - axis) & (1 << _BITS) - 1
            square += (self._spacing[axis] * steps) ** 2
        lengths: np.ndarray = np.sqrt(square)
        others = codes < 0
        if others.any():
            lengths[others] = codes[others].astype(np.uint32).view(np.float32)
        return lengths

    def _directed(self, distances: np.ndarray, numbers: np.ndarray) -> Directed:
        if self._areas is None:
            return Directed(np.sort(distances), None)
        order = np.argsort(distances, kind="stable")
        return Directed(distances[order], self._areas[numbers[order]])

    def _launch(self, which: int, blocks: int, call: np.ndarray, shared: int = 0) -> None:
        record: Any = call.copy().view(_RECORD)
        self._device.launch(self._kernels[which], blocks, (THREADS, 1), shared, record)
