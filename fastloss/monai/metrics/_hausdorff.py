"""Hausdorff distance."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastloss.monai._inputs import ignore_mask
from fastloss.monai.metrics._options import check_axes, check_same_shape, without_background
from fastloss.monai.metrics._reduction import ReducedMetric
from fastloss.monai.metrics._surfaces import (
    Between,
    as_tensors,
    check_distance_metric,
    surfaces_between,
)


class HausdorffDistanceMetric(ReducedMetric):
    """Hausdorff distance of masks, as ``monai.metrics.HausdorffDistanceMetric``.

    Call it with ``spacing=``, one number or one for each spatial axis, or such for each sample.

    Args:
        include_background: whether channel 0 counts.
        distance_metric: "euclidean"; "chessboard" or "taxicab", which know no spacing and need
            SciPy.
        percentile: of the distances in each direction, in [0, 100]; None or 0: the largest.
        directed: only from the prediction to the reference, in place of the larger of both ways.
        reduction: see `do_metric_reduction`.
        get_not_nans: whether ``aggregate`` also returns how many numbers are not NaN.
        ignore_index: see `fastloss.monai.metrics`.

    Raises:
        ValueError: when it is called, other than one to three spatial axes, shapes that differ, or
            an unknown option. ImportError: another distance than "euclidean" without SciPy.

    Without a voxel in both masks the result is NaN. With one in a single mask, it is infinite, or
    of a percentile NaN, and a mean then knows nothing of this miss.
    """

    def __init__(
        self,
        include_background: bool = False,
        distance_metric: str = "euclidean",
        percentile: float | None = None,
        directed: bool = False,
        reduction: str = "mean",
        get_not_nans: bool = False,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__()
        self.include_background = include_background
        self.distance_metric = distance_metric
        self.percentile = percentile
        self.directed = directed
        self.reduction = reduction
        self.get_not_nans = get_not_nans
        self.ignore_index = ignore_index

    def _compute_tensor(self, y_pred: Tensor, y: Tensor, **kwargs: Any) -> Tensor:  # type: ignore[override]
        check_axes(y_pred, 3)
        return _hausdorff(
            y_pred,
            y,
            self.include_background,
            self.distance_metric,
            self.percentile,
            self.directed,
            kwargs.get("spacing"),
            self.ignore_index,
            ignore_mask(y, self.ignore_index),
        )


def compute_hausdorff_distance(
    y_pred: np.ndarray | Tensor,
    y: np.ndarray | Tensor,
    include_background: bool = False,
    distance_metric: str = "euclidean",
    percentile: float | None = None,
    directed: bool = False,
    spacing: Any = None,
    ignore_index: int | None = None,
) -> Tensor:
    """Hausdorff distance of each sample and channel, (B, C) of float32, as MONAI's function.

    Args:
        y_pred, y: masks, (B, C, *spatial), of tensors or NumPy arrays.
        spacing: one number, one for each spatial axis, or such a sequence for each sample.
        ignore_index: this channel gives NaN; the voxels of it count all the same. (The class leaves
            them out.)
        include_background, distance_metric, percentile, directed: see `HausdorffDistanceMetric`.

    Raises:
        ValueError, ImportError: as `HausdorffDistanceMetric`. TypeError: neither tensors nor
            arrays.
    """
    return _hausdorff(
        y_pred,
        y,
        include_background,
        distance_metric,
        percentile,
        directed,
        spacing,
        ignore_index,
        None,
    )


def _hausdorff(
    y_pred: Any,
    y: Any,
    include_background: bool,
    distance_metric: str,
    percentile: float | None,
    directed: bool,
    spacing: Any,
    ignore_index: int | None,
    mask: Tensor | None,
) -> Tensor:
    y_pred, y = without_background(*as_tensors(y_pred, y), include_background)
    check_same_shape(y_pred, y)
    metric = check_distance_metric(distance_metric)
    if percentile and not 0 <= percentile <= 100:
        raise ValueError(f"percentile: expected a number in [0, 100], got {percentile}")
    first = int(not include_background)
    ignored = () if ignore_index is None else (ignore_index - first,)
    found = torch.full(y_pred.shape[:2], math.nan)
    for b, c, between in surfaces_between(
        y_pred,
        y,
        spacing=spacing,
        distance_metric=metric,
        mask=mask,
        skipped=ignored,
        first=first,
    ):
        found[b, c] = _value(between, percentile, directed)
    return found.to(y_pred.device)


def _value(between: Between, percentile: float | None, directed: bool) -> float:
    if not (between.predicted and between.reference):
        infinite = (between.predicted or between.reference) and not percentile
        return math.inf if infinite else math.nan
    ways = [between.to_reference, *([] if directed else [between.to_prediction])]
    return max(_quantile(distances, percentile) for distances in ways)


def _quantile(distances: np.ndarray, percentile: float | None) -> float:
    """Of distances in ascending order, in float32 as ``torch.quantile`` does it."""
    if not percentile:
        return float(distances[-1])
    rank = np.float32(percentile / 100) * np.float32(len(distances) - 1)
    place = int(rank)
    part = np.float32(rank - np.float32(place))
    low, high = distances[place], distances[min(place + 1, len(distances) - 1)]
    if part < 0.5:
        return float(low + part * (high - low))
    return float(high - (high - low) * (1 - part))
