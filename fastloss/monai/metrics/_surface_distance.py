"""Average surface distance."""

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


class SurfaceDistanceMetric(ReducedMetric):
    """Average surface distance of masks, as ``monai.metrics.SurfaceDistanceMetric``.

    Call it with ``spacing=``, one number or one for each spatial axis, or such for each sample.

    Args:
        include_background: whether channel 0 counts.
        symmetric: the average over both surfaces, in place of that from the prediction's to the
            reference's.
        distance_metric: "euclidean"; "chessboard" or "taxicab", which know no spacing and need
            SciPy.
        reduction: see `do_metric_reduction`.
        get_not_nans: whether ``aggregate`` also returns how many numbers are not NaN.
        ignore_index: see `fastloss.monai.metrics`.

    Raises:
        ValueError: when it is called, other than one to three spatial axes, shapes that differ, or
            an unknown option. ImportError: another distance than "euclidean" without SciPy.

    Two empty masks give NaN, a single one infinity.
    """

    def __init__(
        self,
        include_background: bool = False,
        symmetric: bool = False,
        distance_metric: str = "euclidean",
        reduction: str = "mean",
        get_not_nans: bool = False,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__()
        self.include_background = include_background
        self.symmetric = symmetric
        self.distance_metric = distance_metric
        self.reduction = reduction
        self.get_not_nans = get_not_nans
        self.ignore_index = ignore_index

    def _compute_tensor(self, y_pred: Tensor, y: Tensor, **kwargs: Any) -> Tensor:  # type: ignore[override]
        check_axes(y_pred, 3)
        return _average(
            y_pred,
            y,
            self.include_background,
            self.symmetric,
            self.distance_metric,
            kwargs.get("spacing"),
            self.ignore_index,
            ignore_mask(y, self.ignore_index),
        )


def compute_average_surface_distance(
    y_pred: np.ndarray | Tensor,
    y: np.ndarray | Tensor,
    include_background: bool = False,
    symmetric: bool = False,
    distance_metric: str = "euclidean",
    spacing: Any = None,
    ignore_index: int | None = None,
) -> Tensor:
    """Average surface distance of each sample and channel, (B, C) of float32, as MONAI's function.

    Args:
        y_pred, y: masks, (B, C, *spatial), of tensors or NumPy arrays.
        spacing: one number, one for each spatial axis, or such a sequence for each sample.
        ignore_index: of this channel no empty mask is warned of. (The class leaves voxels out.)
        include_background, symmetric, distance_metric: see `SurfaceDistanceMetric`.

    Raises:
        ValueError, ImportError: as `SurfaceDistanceMetric`. TypeError: neither tensors nor arrays.
    """
    return _average(
        y_pred, y, include_background, symmetric, distance_metric, spacing, ignore_index, None
    )


def _average(
    y_pred: Any,
    y: Any,
    include_background: bool,
    symmetric: bool,
    distance_metric: str,
    spacing: Any,
    ignore_index: int | None,
    mask: Tensor | None,
) -> Tensor:
    y_pred, y = without_background(*as_tensors(y_pred, y), include_background)
    check_same_shape(y_pred, y)
    metric = check_distance_metric(distance_metric)
    silent = () if ignore_index is None else (ignore_index - int(not include_background),)
    found = torch.full(y_pred.shape[:2], math.nan)
    for b, c, between in surfaces_between(
        y_pred, y, spacing=spacing, distance_metric=metric, mask=mask, silent=silent
    ):
        found[b, c] = _value(between, symmetric)
    return found.to(y_pred.device)


def _value(between: Between, symmetric: bool) -> float:
    if not (between.predicted and between.reference):
        return math.inf if between.predicted or between.reference else math.nan
    ways = [between.to_reference, *([between.to_prediction] if symmetric else [])]
    total = sum(float(way.sum(dtype=np.float64)) for way in ways)
    return total / sum(map(len, ways))
