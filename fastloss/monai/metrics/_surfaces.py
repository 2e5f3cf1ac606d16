"""Distances between the surfaces of each channel of two one-hot tensors."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Collection, Iterator, Sequence
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastloss.backends import current_backend
from fastloss.metrics.surface_elements import element_areas
from fastloss.monai.metrics._chamfer import METRICS, chamfer_distances
from fastloss.monai.metrics._options import plain
from fastloss.monai.metrics._parts import in_numpy, on_threads, parts

DISTANCE_METRICS = ("euclidean", *METRICS)
MOST_AXES = 3


class Between(NamedTuple):
    """The distances between the surfaces of one channel of one sample.

    float32, as MONAI has them, so that a distance at a threshold is decided alike; in ascending
    order. Empty where either mask is.
    """

    predicted: bool
    """Whether the prediction has any voxel."""
    reference: bool
    to_reference: np.ndarray
    """From every element of the prediction's surface."""
    to_prediction: np.ndarray
    areas: tuple[np.ndarray, np.ndarray] | None
    """Of these elements; None: each counts 1."""


_NONE = np.zeros(0, np.float32)


def check_distance_metric(distance_metric: Any) -> str:
    if distance_metric not in DISTANCE_METRICS:
        names = ", ".join(map(repr, DISTANCE_METRICS))
        raise ValueError(f"distance_metric: expected one of {names}, got {distance_metric!r}")
    return str(distance_metric)


def as_tensors(y_pred: Any, y: Any) -> tuple[Tensor, Tensor]:
    """Of tensors or NumPy arrays. TypeError: what is neither."""
    found = []
    for name, value in (("y_pred", y_pred), ("y", y)):
        if isinstance(value, np.ndarray):
            value = torch.from_numpy(np.ascontiguousarray(value))
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{name}: expected a PyTorch tensor or a NumPy array, got {type(value).__name__}"
            )
        found.append(plain(value))
    return found[0], found[1]


def surfaces_between(
    y_pred: Tensor,
    y: Tensor,
    *,
    spacing: Any,
    distance_metric: str = "euclidean",
    subvoxels: bool = False,
    mask: Tensor | None = None,
    skipped: Collection[int] = (),
    silent: Collection[int] = (),
    first: int = 0,
) -> Iterator[tuple[int, int, Between]]:
    """Sample, channel, and the distances between the surfaces there.

    Args:
        y_pred, y: (B, C, *spatial) with one to three spatial axes; a mask is where they are 1.
        spacing: see `spacings`.
        distance_metric: "euclidean"; "chessboard" or "taxicab", which know no spacing.
        subvoxels: the surface lies between voxels, and its elements have areas.
        mask: (B, 1, *spatial); outside of where it is 1, no voxel is in a mask.
        skipped: channels that are not looked at.
        silent: channels of which no empty mask is warned of.
        first: the number of the first channel in warnings.

    Raises:
        ValueError: more than three spatial axes, or a spacing that does not fit.
        ImportError: another distance than "euclidean" without SciPy.
    """
    batch, channels = y_pred.shape[:2]
    axes = y_pred.ndim - 2
    if axes > MOST_AXES:
        raise ValueError(
            f"y_pred: expected one to {MOST_AXES} spatial axes, got shape {tuple(y_pred.shape)}"
        )
    for b, sizes in enumerate(spacings(spacing, batch, axes)):
        looked_at = [c for c in range(channels) if c not in skipped]
        counted = None if mask is None else mask[b, 0] == 1
        predicted = _read(y_pred[b], looked_at, counted)
        reference = _read(y[b], looked_at, counted)
        for c, p, g in zip(looked_at, predicted.sizes, reference.sizes, strict=True):
            for name, size in (("ground truth", g), ("prediction", p)):
                if not size and c not in silent:
                    warnings.warn(
                        f"the {name} of class {first + c} is all 0: its distances are infinite or "
                        "NaN",
                        stacklevel=_level(),
                    )
        both = [i for i in range(len(looked_at)) if predicted.sizes[i] and reference.sizes[i]]
        areas = element_areas(sizes) if subvoxels else None
        found = _measured(predicted, reference, both, sizes, areas, distance_metric)
        for i, c in enumerate(looked_at):
            empty = Between(bool(predicted.sizes[i]), bool(reference.sizes[i]), _NONE, _NONE, None)
            yield b, c, found.get(i, empty)


def _level() -> int:
    """The stack level of the caller of this package."""
    frame, level = sys._getframe(2), 2
    while frame.f_back is not None and frame.f_globals["__name__"].startswith(__package__ or ""):
        frame, level = frame.f_back, level + 1
    return level


class _Masks(NamedTuple):
    """The masks of one sample."""

    sizes: list[int]
    """Voxels of each."""
    labels: np.ndarray
    """One more than the place of the mask that a voxel is in, 0 if none, if they are disjoint."""
    rows: list[np.ndarray] | None
    """Each mask, if they are not."""

    def mask(self, i: int) -> np.ndarray:
        found: np.ndarray = self.labels == i + 1 if self.rows is None else self.rows[i]
        return found


def _read(sample: Tensor, channels: Sequence[int], counted: Tensor | None) -> _Masks:
    """The masks of one sample, each channel of which is read once."""
    labels, sizes = (_labels_on_cpu if sample.is_cpu else _labels_on_device)(
        sample, channels, counted
    )
    rows = None
    if sum(sizes) != np.count_nonzero(labels):
        rows = [_one(sample[c], counted).cpu().numpy() for c in channels]
    return _Masks(sizes, labels, rows)


def _labels_on_cpu(
    sample: Tensor, channels: Sequence[int], counted: Tensor | None
) -> tuple[np.ndarray, list[int]]:
    """The sum of the masks, each times one more than its place; and their sizes.

    Disjoint masks add up to labels. Others do not, of which their sizes tell.
    """
    labels = np.zeros(sample.shape[1:], np.uint8 if len(channels) < 256 else np.uint16)
    to = labels.reshape(-1)
    rows = [in_numpy(sample[c].reshape(-1)) for c in channels]
    inside = None if counted is None else counted.reshape(-1).numpy()

    def add(at: slice) -> list[int]:
        sizes = []
        for i, row in enumerate(rows):
            mask = row[at] if row.dtype == np.bool_ else row[at] == 1
            if inside is not None:
                mask = mask & inside[at]
            sizes.append(int(np.count_nonzero(mask)))
            to[at] += np.multiply(mask, i + 1, dtype=to.dtype)
        return sizes

    all_sizes = on_threads(add, parts(to.size), to.size * len(rows))
    return labels, [sum(sizes[i] for sizes in all_sizes) for i in range(len(rows))]


def _labels_on_device(
    sample: Tensor, channels: Sequence[int], counted: Tensor | None
) -> tuple[np.ndarray, list[int]]:
    labels = torch.zeros(sample.shape[1:], dtype=torch.int32, device=sample.device)
    sizes = []
    for i, c in enumerate(channels):
        mask = _one(sample[c], counted)
        sizes.append(mask.sum())
        labels += mask * (i + 1)
    found = labels.to(torch.uint8) if len(channels) < 256 else labels
    dtype = np.uint8 if len(channels) < 256 else np.uint16
    return found.cpu().numpy().astype(dtype, copy=False), [int(size) for size in sizes]


def _one(channel: Tensor, counted: Tensor | None) -> Tensor:
    mask = channel if channel.dtype == torch.bool else channel == 1
    return mask if counted is None else mask & counted


def _measured(
    predicted: _Masks,
    reference: _Masks,
    both: Sequence[int],
    sizes: tuple[float, ...],
    areas: np.ndarray | None,
    distance_metric: str,
) -> dict[int, Between]:
    if not both:
        return {}
    if distance_metric != "euclidean":
        return {
            i: _between(
                chamfer_distances(predicted.mask(i), reference.mask(i), distance_metric, areas)
            )
            for i in both
        }
    if predicted.rows is None and reference.rows is None:
        several = predicted.labels, reference.labels
        structures = np.zeros((len(both), len(predicted.sizes) + 1), bool)
        structures[range(len(both)), [i + 1 for i in both]] = True
        found = _euclidean(*several, structures, sizes, areas)
        return dict(zip(both, map(_between, found), strict=True))
    one = np.array([[False, True]])
    return {
        i: _between(
            _euclidean(
                predicted.mask(i).view(np.uint8),
                reference.mask(i).view(np.uint8),
                one,
                sizes,
                areas,
            )[0]
        )
        for i in both
    }


def _euclidean(
    predicted: np.ndarray,
    reference: np.ndarray,
    structures: np.ndarray,
    sizes: tuple[float, ...],
    areas: np.ndarray | None,
) -> list[Any]:
    axes = predicted.ndim
    missing = (1,) * (MOST_AXES - axes)
    grids = [np.ascontiguousarray(a.reshape(*missing, *a.shape)) for a in (predicted, reference)]
    return current_backend().surface_distances(
        grids[0], grids[1], structures, axes, (*(1.0,) * len(missing), *sizes), areas, None
    )


def _between(directed: Any) -> Between:
    there, back = directed
    distances = [each[0].astype(np.float32) for each in (there, back)]
    areas = None if there[1] is None else (there[1], back[1])
    return Between(True, True, distances[0], distances[1], areas)


def spacings(spacing: Any, batch: int, axes: int) -> list[tuple[float, ...]]:
    """The size of a voxel of each sample.

    Args:
        spacing: one number, one for each spatial axis, or for each sample one number for each axis;
            None: 1.

    Raises:
        ValueError: other lengths, or sizes that are not positive and finite numbers.
    """
    if spacing is None:
        return [(1.0,) * axes] * batch
    if _is_number(spacing):
        return [_sizes([spacing] * axes, spacing)] * batch
    if isinstance(spacing, (Sequence, np.ndarray)) and not isinstance(spacing, (str, bytes)):
        several = list(spacing)
        if several and all(map(_is_number, several)):
            if len(several) != axes:
                raise ValueError(
                    f"spacing: expected one number for each of {axes} spatial axes, got {spacing!r}"
                )
            return [_sizes(several, spacing)] * batch
        if several and all(isinstance(each, (Sequence, np.ndarray)) for each in several):
            if len(several) != batch or any(len(each) != axes for each in several):
                raise ValueError(
                    f"spacing: expected {axes} numbers for each of {batch} samples, got {spacing!r}"
                )
            return [_sizes(list(each), spacing) for each in several]
    raise ValueError(
        "spacing: expected a number, one for each spatial axis, or such a sequence for each "
        f"sample, got {spacing!r}"
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, (bool, np.bool_))


def _sizes(numbers: Sequence[Any], given: Any) -> tuple[float, ...]:
    if not all(_is_number(n) and 0 < n < np.inf for n in numbers):
        raise ValueError(f"spacing: expected positive numbers, got {given!r}")
    return tuple(map(float, numbers))
