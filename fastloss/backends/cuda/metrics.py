"""What metrics compute of arrays on a GPU: class indices, masks, and counts of voxels.

Only tables come to CPU memory: the counts, and the elements of surfaces (see `surfaces`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from fastloss.backends.cuda.backend import CudaBackend
from fastloss.backends.cuda.call import in_c_order
from fastloss.backends.cuda.indices import (
    BLOCKS,
    INDEX_CALL,
    THREADS,
    address_of,
    blocks_for,
    call_of,
    write_indices,
)
from fastloss.backends.cuda.source import source
from fastloss.backends.cuda.surfaces import Surfaces, Volume
from fastloss.backends.surfaces import Directed
from fastloss.borrowed import Borrowed, Place, device_view

# Mirrors `struct ReadCall` in csrc/cuda/metrics.cu.
READ_CALL = np.dtype(
    [
        ("view", INDEX_CALL),
        ("table", np.int64),
        ("found", np.int64),
        ("threshold", np.float64),
        ("combined", np.int32),
    ],
    align=True,
)
_READ_RECORD = np.dtype(("V", READ_CALL.itemsize))
READ_KERNELS = tuple(
    f"fastloss_{name}" for name in ("likeliest", "masks", "members", "counted", "largest_label")
)

# Mirrors `struct ConfusionCall` in csrc/cuda/confusion.cu.
CONFUSION_CALL = np.dtype(
    [
        ("prediction", np.int64),
        ("reference", np.int64),
        ("counts", np.int64),
        ("counted", np.int64),
        ("to", np.int64),
        ("samples", np.int64),
        ("voxels", np.int64),
        ("parts", np.int64),
        ("indices", np.int32),
        ("item", np.int32),
        ("shared", np.int32),
        ("constant", np.int32),
    ],
    align=True,
)
_CONFUSION_RECORD = np.dtype(("V", CONFUSION_CALL.itemsize))
CONFUSION_KERNELS = ("fastloss_confusion_begin", "fastloss_confusion", "fastloss_choose")
_BLOCKS_EACH = 8
"""Blocks of a launch for every multiprocessor."""


@dataclass(frozen=True)
class Volumes:
    """Class indices on a GPU, in C order: where NumPy's volumes are looked at, these may be.

    Attributes:
        metrics: what computes with them.
        item: bytes of each.
        owner: what keeps the memory alive.
    """

    metrics: Metrics
    address: int
    shape: tuple[int, ...]
    item: int
    owner: Any

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, samples: int | slice) -> Volumes:
        """One sample, or some that follow each other."""
        shape = self.shape[1:]
        if isinstance(samples, slice):
            first, end, step = samples.indices(len(self))
            assert step == 1
            shape = (max(end - first, 0), *shape)
        else:
            first = samples
        at = self.address + first * self.item * prod(self.shape[1:])
        return Volumes(self.metrics, at, shape, self.item, self.owner)

    def reshape(self, shape: tuple[int, ...]) -> Volumes:
        return Volumes(self.metrics, self.address, shape, self.item, self.owner)

    def where(self, counted: Volumes, other: Any) -> Volumes:
        """A copy, with ``other``, volumes or one index, where ``counted`` is 0."""
        return self.metrics.choose(self, counted, other)

    def numpy(self) -> np.ndarray:
        """A copy in CPU memory."""
        return self.metrics.numpy(self)


class Metrics:
    """The methods of a `Backend` that metrics use, and what reads arrays, on one GPU and stream.

    Raises:
        ImportError: CuPy is absent, or cannot be used.
    """

    def __init__(self, place: Place) -> None:
        self._place = place
        self._device = CudaBackend(place).device

    # ------------------------------------------------------------------ arrays of any kind

    def upload(self, array: np.ndarray, dtype: str) -> Borrowed:
        """An array in CPU memory as one there."""
        own = np.ascontiguousarray(array)
        there = self._place.array(own.reshape(-1).view(np.uint8), "uint8")
        at = self._place.address(there)
        steps = in_c_order(array.shape, array.itemsize)
        return Borrowed(device_view(there, at, array.shape, steps, dtype), dtype, self._place)

    def largest_label(self, labels: Borrowed, most: int, ignored: int | None) -> int | None:
        """The largest label, at least 0, of those that are not ignored.

        None: one of them is not a whole number in [0, most].
        """
        found = self._place.array(np.zeros(2, np.int32), "int32")
        call = self._read(labels, "labels", 0, most + 1, ignored)
        call["found"] = self._place.address(found)
        self._run(4, call)
        largest, wrong = self._place.numpy(found)
        return None if wrong else int(largest)

    def class_indices(
        self, labels: Borrowed, size: int, ignored: int | None, shape: tuple[int, ...]
    ) -> Volumes:
        """Labels, (B, \\*spatial), as class indices; ``size`` for those that are none or ignored.

        They are the labels themselves where those are class indices already and all below ``size``.
        """
        view, item = labels.array, 1 + (size > 255)
        kept = ("bool", "uint8") if item == 1 else ("uint16",)
        as_they_are = ignored is None and labels.dtype in kept and view.flags.c_contiguous
        if as_they_are and not address_of(view) % item:
            return Volumes(self, address_of(view), shape, item, view)
        made = self._empty(shape, item)
        write_indices(self._device, labels, "labels", size, item, made.address, ignored)
        return made

    def likeliest(self, scores: Borrowed, shape: tuple[int, ...]) -> Volumes:
        """The class of the largest number of (B, C, \\*spatial), as `Backend.likeliest`; integers
        are compared as float32."""
        made = self._empty(shape, 1 + (scores.array.shape[1] > 255))
        call = self._read(scores, "scores", made.item, 0, None, channels=True)
        call["view"]["to"] += made.address
        self._run(0, call)
        return made

    def above(
        self, scores: Borrowed, channels: Sequence[int], threshold: float, shape: tuple[int, ...]
    ) -> Volumes:
        """Where one of some channels of (B, C, \\*spatial) is above a threshold: 1, else 0."""
        made = self._empty(shape, 1)
        table, owner = self._table(channels, scores.array.shape[1])
        call = self._read(scores, "scores", 1, 0, None, channels=True)
        call["view"]["to"] += made.address
        call["table"], call["threshold"] = table, threshold
        self._run(1, call)
        del owner
        return made

    def among(self, indices: Volumes, chosen: Sequence[int], size: int) -> Volumes:
        """Where a class index, at most ``size``, is one of some: 1, else 0."""
        made = self._empty(indices.shape, 1)
        table, owner = self._table(chosen, size + 1)
        call = self._read(_borrowed(indices), "indices", 1, 0, None)
        call["view"]["to"] += made.address
        call["table"] = table
        self._run(2, call)
        del owner
        return made

    def nonzero(self, mask: Borrowed, shape: tuple[int, ...]) -> Volumes:
        """Where an array, (B, \\*spatial), is not 0: 1, else 0."""
        made = self._empty(shape, 1)
        write_indices(self._device, mask, "mask", 0, 1, made.address)
        return made

    def counted(
        self, array: Borrowed | Volumes, ignored: int, shape: tuple[int, ...], before: Any
    ) -> Volumes:
        """Where no channel of an array is ``ignored``: 1, else 0.

        Args:
            array: (B, C, \\*spatial), or volumes of class indices.
            before: volumes that become this, where they are 1, or None.
        """
        made = self._empty(shape, 1) if before is None else before
        channels = not isinstance(array, Volumes)
        seen = _borrowed(array) if isinstance(array, Volumes) else array
        call = self._read(seen, "reference", 1, 0, ignored, channels=channels)
        call["view"]["to"] += made.address
        call["combined"] = before is not None
        if not channels:
            call["view"]["classes"] = 1
        self._run(3, call)
        return made

    def _empty(self, shape: tuple[int, ...], item: int) -> Volumes:
        own = self._place.empty(shape, "uint8" if item == 1 else "uint16")
        return Volumes(self, self._place.address(own), shape, item, own)

    def _table(self, chosen: Sequence[int], size: int) -> tuple[int, Any]:
        table = np.zeros(size, np.uint8)
        table[list(chosen)] = 1
        own = self._place.array(table, "uint8")
        return self._place.address(own), own

    def _read(
        self,
        array: Borrowed,
        name: str,
        item: int,
        classes: int,
        ignored: int | None,
        channels: bool = False,
    ) -> np.ndarray:
        """The record of a launch that writes numbers of ``item`` bytes, one for each voxel."""
        view, step = array.array, 0
        shape, strides = view.shape, view.strides
        if channels:
            step, classes = strides[1], shape[1]
            shape, strides = (shape[0], *shape[2:]), (strides[0], *strides[2:])
        call = np.zeros(1, READ_CALL)
        call["view"] = call_of(array, name, shape, strides, in_c_order(shape, item))
        call["view"]["from"] += address_of(view)
        call["view"]["from_channel"], call["view"]["classes"] = step, classes
        call["view"]["wide"] = item == 2
        if ignored is not None:
            call["view"]["ignored"], call["view"]["ignores"] = ignored, 1
        return call

    def _run(self, which: int, call: np.ndarray) -> None:
        if not call["view"]["count"][0]:
            return
        kernel = self._device.kernels(source("metrics.cu"), READ_KERNELS)[which]
        blocks = blocks_for(call["view"])
        self._device.launch(kernel, blocks, (THREADS, 1), 0, call.view(_READ_RECORD))

    # ------------------------------------------------------------------ of a backend

    def confusion(self, prediction: Volumes, reference: Volumes, counts: np.ndarray) -> None:
        """As `Backend.confusion`."""
        samples, indices, _ = counts.shape
        voxels = prod(prediction.shape[1:])
        own = self._place.empty(counts.shape, "int64")
        call = np.zeros(1, CONFUSION_CALL)
        call["prediction"], call["reference"] = prediction.address, reference.address
        call["counts"], call["item"] = self._place.address(own), prediction.item
        call["samples"], call["voxels"], call["indices"] = samples, voxels, indices
        shared = 4 * indices**2
        call["shared"] = shared <= self._device.shared_bytes
        together = -(-_BLOCKS_EACH * self._device.multiprocessors // max(samples, 1))
        parts = max(1, min(together, -(-voxels * prediction.item // (16 * THREADS))))
        call["parts"] = parts
        begin, run, _ = self._device.kernels(source("confusion.cu"), CONFUSION_KERNELS)
        record = call.view(_CONFUSION_RECORD)
        if counts.size:
            blocks = min(BLOCKS, -(-counts.size // THREADS))
            self._device.launch(begin, blocks, (THREADS, 1), 0, record)
            size = shared if call["shared"][0] else 0
            self._device.launch(run, samples * parts, (THREADS, 1), size, record)
            counts[...] = self._place.numpy(own)

    def surface_distances(
        self,
        prediction: Volumes,
        reference: Volumes,
        structures: np.ndarray,
        axes: int,
        spacing: Sequence[float],
        areas: np.ndarray | None,
        counted: Volumes | None,
    ) -> list[tuple[Directed, Directed]]:
        """As `Backend.surface_distances`.

        The nearest element is found in float32, and its distance computed in float64 where spacings
        do not differ so much that float32 loses it.
        """
        volumes = [Volume(v.address, v.item) for v in (prediction, reference)]
        which = 0 if counted is None else counted.address
        surfaces = Surfaces(
            self._place, self._device, volumes, prediction.shape, which, axes, spacing, areas
        )
        return surfaces.distances(structures)

    # ------------------------------------------------------------------ volumes

    def choose(self, volumes: Volumes, counted: Volumes | None, other: Any) -> Volumes:
        """See `Volumes.where`; with None a copy."""
        made = self._empty(volumes.shape, volumes.item)
        call = np.zeros(1, CONFUSION_CALL)
        call["prediction"], call["to"], call["item"] = volumes.address, made.address, made.item
        call["samples"], call["voxels"] = 1, prod(volumes.shape)
        if counted is not None:
            call["counted"] = counted.address
            if isinstance(other, Volumes):
                call["reference"] = other.address
            else:
                call["constant"] = other
        if call["voxels"][0]:
            kernel = self._device.kernels(source("confusion.cu"), CONFUSION_KERNELS)[2]
            blocks = min(BLOCKS, -(-int(call["voxels"][0]) // THREADS))
            self._device.launch(kernel, blocks, (THREADS, 1), 0, call.view(_CONFUSION_RECORD))
        return made

    def numpy(self, volumes: Volumes) -> np.ndarray:
        """See `Volumes.numpy`."""
        return self._place.numpy(self.choose(volumes, None, 0).owner)


def _borrowed(volumes: Volumes) -> Borrowed:
    dtype = "uint8" if volumes.item == 1 else "uint16"
    steps = in_c_order(volumes.shape, volumes.item)
    view = device_view(volumes.owner, volumes.address, volumes.shape, steps, dtype)
    return Borrowed(view, dtype)
