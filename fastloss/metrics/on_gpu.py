"""Predictions on a GPU, with their references, brought to class indices there."""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

import numpy as np

from fastloss.arrays import FLOATS
from fastloss.backends.cuda.metrics import Metrics, Volumes
from fastloss.backends.cuda.surfaces import MOST_VOXELS
from fastloss.borrowed import Borrowed
from fastloss.metrics.classes import MOST_LABEL, members_of, read_classes, size_of

_EXACT = 1 << 53
"""Integers up to which float64 has them all."""


class Read(NamedTuple):
    """See `fastloss.metrics.inputs`."""

    groups: tuple[tuple[Volumes, Volumes, np.ndarray], ...]
    names: tuple[str, ...]
    counted: Volumes | None


def read(
    predicted: Borrowed,
    true: Borrowed,
    mask: Borrowed | None,
    activation: str,
    classes: Any,
    include_background: bool | None,
    ignored: int | None,
    volumes: tuple[int, ...],
    dense: bool,
) -> Read | None:
    """Read a prediction on a GPU, and what is beside it there or in CPU memory.

    Returns:
        None for what cannot be read there: arrays with a fault, above all, which are to be read in
        CPU memory, to say what it is; and any at all without CuPy.
    """
    if not prod(volumes) or max(volumes[1:]) > MOST_VOXELS:
        return None
    if ignored is not None and abs(ignored) > _EXACT:
        return None
    assert predicted.place is not None
    try:
        metrics = Metrics(predicted.place)
    except ImportError:
        return None
    if true.place is None:
        true = metrics.upload(true.array, true.dtype)
    if mask is not None and mask.place is None:
        mask = metrics.upload(mask.array, mask.dtype)
    counted = None if mask is None else metrics.nonzero(mask, volumes)
    call = _Call(metrics, predicted, true, counted, classes, ignored, volumes, dense)
    if activation in ("sigmoid", "none"):
        threshold = 0.0 if activation == "sigmoid" else 0.5
        return call.masks(threshold, include_background)
    return call.label_maps(activation == "softmax", bool(include_background))


class _Call(NamedTuple):
    metrics: Metrics
    predicted: Borrowed
    true: Borrowed
    counted: Volumes | None
    classes: Any
    ignored: int | None
    volumes: tuple[int, ...]
    dense: bool

    def label_maps(self, scores: bool, include_background: bool) -> Read | None:
        """One class for each voxel."""
        if scores:
            if self.predicted.dtype not in FLOATS:
                return None
            size = self.predicted.array.shape[1]
            names, labels = read_classes(self.classes, size, include_background, channels=size)
            largest = [0 if self.dense else self._largest(self.true, self.ignored)]
        else:
            largest = [self._largest(self.predicted, None), self._largest(self.true, self.ignored)]
            if max(largest) > MOST_LABEL:
                return None
            most = max(*largest, 1)
            names, labels = read_classes(self.classes, 1 + most, include_background)
            size = size_of(self.classes, labels, most)
        if max(largest) >= size or size > MOST_LABEL + 1:
            return None
        metrics, volumes = self.metrics, self.volumes
        if scores:
            indices = metrics.likeliest(self.predicted, volumes)
        else:
            indices = metrics.class_indices(self.predicted, size, None, volumes)
        if self.dense:
            known = metrics.likeliest(self.true, volumes)
            is_class = self.ignored is not None and 0 <= self.ignored < size
            counted = self._less(known if is_class else self.true, self.ignored)
        else:
            known = metrics.class_indices(self.true, size, self.ignored, volumes)
            counted = self._less(known, None if self.ignored is None else size)
        return Read(((indices, known, members_of(labels, size)),), names, counted)

    def masks(self, threshold: float, include_background: bool | None) -> Read | None:
        """Channels that are masks, each for itself."""
        metrics, volumes = self.metrics, self.volumes
        channels = self.predicted.array.shape[1]
        first = include_background is None or include_background or channels == 1
        names, labels = read_classes(self.classes, channels, first, channels=channels)
        known, size = None, max(channels, 2)  # the mask of a single channel is label 1
        if self.dense:
            counted = self._less(self.true, self.ignored)
        else:
            if self._largest(self.true, self.ignored) >= size:
                return None
            known = metrics.class_indices(self.true, size, self.ignored, volumes)
            counted = self._less(known, None if self.ignored is None else size)
        members = np.array([[False, True, False]])
        groups = []
        for each in labels:
            ours = metrics.above(self.predicted, each, threshold, volumes)
            if known is None:
                theirs = metrics.above(self.true, each, 0.5, volumes)
            else:
                theirs = metrics.among(known, (1,) if channels == 1 else each, size)
            groups.append((ours, theirs, members))
        return Read(tuple(groups), names, counted)

    def _largest(self, labels: Borrowed, ignored: int | None) -> int:
        """The largest label; one too large where one is none."""
        found = self.metrics.largest_label(labels, MOST_LABEL, ignored)
        return MOST_LABEL + 1 if found is None else found

    def _less(self, array: Borrowed | Volumes, ignored: int | None) -> Volumes | None:
        """The voxels that count, less those where the array has this number."""
        if ignored is None:
            return self.counted
        return self.metrics.counted(array, ignored, self.volumes, self.counted)
