"""Normalised surface Dice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastloss.monai._inputs import ignore_mask
from fastloss.monai.metrics._options import (
    check_same_shape,
    check_tensors,
    plain,
    without_background,
)
from fastloss.monai.metrics._reduction import ReducedMetric
from fastloss.monai.metrics._surfaces import Between, check_distance_metric, surfaces_between


class SurfaceDiceMetric(ReducedMetric):
    """Normalised surface Dice of masks, as ``monai.metrics.SurfaceDiceMetric``.

    Call it with ``spacing=``, one number or one for each spatial axis, or such for each sample.

    Args:
        class_thresholds: for each class that counts, the distance that is tolerated, ≥ 0.
        include_background: whether channel 0 counts.
        distance_metric: "euclidean"; "chessboard" or "taxicab", which know no spacing and need
            SciPy.
        reduction: see `do_metric_reduction`.
        get_not_nans: whether ``aggregate`` also returns how many numbers are not NaN.
        use_subvoxels: the surface lies between voxels, and its area counts; if False, voxels at the
            surface count, each 1.
        ignore_index: see `fastloss.monai.metrics`.

    Raises:
        ValueError: when it is called, other than two or three spatial axes, shapes that differ,
            thresholds that are not as many as the classes, negative or not finite, or an unknown
            option. ImportError: another distance than "euclidean" without SciPy.

    Two empty masks give NaN, a single one 0.

    Source: Nikolov et al. 2021, "Clinically Applicable Segmentation of Head and Neck Anatomy for
    Radiotherapy"; Seidlitz et al. 2022, "Robust deep learning-based semantic organ segmentation in
    hyperspectral images" (voxels in place of areas).
    """

    def __init__(
        self,
        class_thresholds: list[float],
        include_background: bool = False,
        distance_metric: str = "euclidean",
        reduction: str = "mean",
        get_not_nans: bool = False,
        use_subvoxels: bool = False,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__()
        self.class_thresholds = class_thresholds
        self.include_background = include_background
        self.distance_metric = distance_metric
        self.reduction = reduction
        self.get_not_nans = get_not_nans
        self.use_subvoxels = use_subvoxels
        self.ignore_index = ignore_index

    def _compute_tensor(self, y_pred: Tensor, y: Tensor, **kwargs: Any) -> Tensor:  # type: ignore[override]
        return compute_surface_dice(
            y_pred,
            y,
            self.class_thresholds,
            self.include_background,
            self.distance_metric,
            kwargs.get("spacing"),
            self.use_subvoxels,
            self.ignore_index,
        )


def compute_surface_dice(
    y_pred: Tensor,
    y: Tensor,
    class_thresholds: list[float],
    include_background: bool = False,
    distance_metric: str = "euclidean",
    spacing: Any = None,
    use_subvoxels: bool = False,
    ignore_index: int | None = None,
) -> Tensor:
    """Normalised surface Dice of each sample and channel, (B, C) of float32, as MONAI's function.

    Args:
        y_pred, y: masks, (B, C, *spatial), with two or three spatial axes.
        spacing: one number, one for each spatial axis, or such a sequence for each sample.
        class_thresholds, include_background, distance_metric, use_subvoxels, ignore_index: see
            `SurfaceDiceMetric`.

    Raises:
        ValueError, ImportError: as `SurfaceDiceMetric`.
    """
    check_tensors(y_pred, y)
    y_pred, y = plain(y_pred), plain(y)
    if y_pred.ndim not in (4, 5):
        raise ValueError(
            "y_pred: expected (batch, channels, *spatial) with two or three spatial axes, got "
            f"shape {tuple(y_pred.shape)}"
        )
    mask = ignore_mask(y, ignore_index)
    y_pred, y = without_background(y_pred, y, include_background)
    check_same_shape(y_pred, y)
    _check_thresholds(class_thresholds, y_pred.shape[1])
    metric = check_distance_metric(distance_metric)
    first = int(not include_background)
    found = torch.full(y_pred.shape[:2], math.nan)
    for b, c, between in surfaces_between(
        y_pred,
        y,
        spacing=spacing,
        distance_metric=metric,
        subvoxels=use_subvoxels,
        mask=mask,
        silent=() if ignore_index is None else (ignore_index - first,),
        first=first,
    ):
        found[b, c] = _value(between, float(class_thresholds[c]))
    return found.to(y_pred.device)


def _value(between: Between, tolerance: float) -> float:
    if not (between.predicted and between.reference):
        return 0.0 if between.predicted or between.reference else math.nan
    within = whole = 0.0
    for i, distances in enumerate((between.to_reference, between.to_prediction)):
        near = int(np.searchsorted(distances, np.float32(tolerance), side="right"))
        if between.areas is None:
            within, whole = within + near, whole + len(distances)
        else:
            areas = between.areas[i]
            within, whole = within + float(areas[:near].sum()), whole + float(areas.sum())
    return within / whole


def _check_thresholds(class_thresholds: Sequence[float], classes: int) -> None:
    if len(class_thresholds) != classes:
        raise ValueError(
            f"class_thresholds: expected {classes}, one for each class that counts, got "
            f"{len(class_thresholds)}"
        )
    if not all(0 <= float(threshold) < math.inf for threshold in class_thresholds):
        raise ValueError(
            f"class_thresholds: expected finite numbers of at least 0, got {class_thresholds}"
        )
