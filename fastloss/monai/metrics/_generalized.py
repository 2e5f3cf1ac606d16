"""The generalised Dice score."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastloss.monai._inputs import check_option, ignore_mask
from fastloss.monai.metrics._cumulative import CumulativeIterationMetric
from fastloss.monai.metrics._options import (
    check_axes,
    check_same_shape,
    check_tensors,
    deprecated,
    plain,
)
from fastloss.monai.metrics._reduction import check_reduction, do_metric_reduction
from fastloss.monai.metrics._sums import Side, overlap, value_dtype

WEIGHTS = ("square", "simple", "uniform")


class GeneralizedDiceScore(CumulativeIterationMetric):
    """The generalised Dice score, as ``monai.metrics.GeneralizedDiceScore``.

    Args:
        include_background: whether channel 0 counts.
        reduction: see `do_metric_reduction`; classes are united, each by its weight, but where the
            reduction is over the batch alone, or "none".
        weight_type: the weight of a class whose reference has volume V: "square": 1/V²; "simple":
            1/V; "uniform": 1. Of classes that a sample lacks: the largest of the others.
        ignore_index: see `fastloss.monai.metrics`. A channel of this index is left out.
        epsilon: without effect, as in MONAI.

    Raises:
        ValueError: an unknown reduction or type of weights; when it is called, fewer than three
            axes, or shapes that differ.

    Source: Sudre et al. 2017, "Generalised Dice overlap as a deep learning loss function for highly
    unbalanced segmentations".
    """

    def __init__(
        self,
        include_background: bool = True,
        reduction: str = "mean",
        weight_type: str = "square",
        ignore_index: int | None = None,
        epsilon: float = 1e-8,
    ) -> None:
        super().__init__()
        self.include_background = include_background
        self.reduction = check_reduction(reduction)
        self.weight_type = _check_weight_type(weight_type)
        self.ignore_index = ignore_index
        self.epsilon = float(epsilon)
        self.sum_over_classes = self.reduction in ("sum", "mean", "mean_channel", "sum_channel")

    def _compute_tensor(self, y_pred: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return compute_generalized_dice(
            y_pred,
            y,
            self.include_background,
            self.weight_type,
            self.sum_over_classes,
            self.ignore_index,
            self.epsilon,
        )

    def aggregate(self, reduction: str | None = None) -> Tensor:
        """The scores reduced, as the metric was told when it was made.

        Args:
            reduction: without effect, and deprecated.

        Raises:
            ValueError: nothing was measured yet.
        """
        if reduction is not None:
            deprecated("reduction", "the one that the metric was made with is taken")
        return do_metric_reduction(self._rows(), self.reduction)[0]


def compute_generalized_dice(
    y_pred: Tensor,
    y: Tensor,
    include_background: bool = True,
    weight_type: str = "square",
    sum_over_classes: bool = False,
    ignore_index: int | None = None,
    epsilon: float = 1e-8,
) -> Tensor:
    """The generalised Dice score of each sample and channel, as MONAI's function of this name.

    Args:
        y_pred, y: masks, (B, C, *spatial).
        sum_over_classes: unite the classes: (B, 1).
        include_background, weight_type, ignore_index, epsilon: see `GeneralizedDiceScore`.

    Returns:
        (B, C) without the channels that are left out; zeros, (B, 1), if there are no others.

    Raises:
        ValueError: fewer than three axes, shapes that differ, or an unknown type of weights.
    """
    check_tensors(y_pred, y)
    check_axes(y_pred, 3)
    check_same_shape(y_pred, y)
    weight_type = _check_weight_type(weight_type)
    dtype = value_dtype(y_pred, y)
    y_pred, y = plain(y_pred), plain(y)
    channels = [c for c in range(int(not include_background), y.shape[1]) if c != ignore_index]
    if not channels:
        return torch.zeros(len(y_pred), 1, device=y_pred.device)
    mask = ignore_mask(y, ignore_index)
    both, predicted, reference = overlap(Side(y_pred), Side(y), channels, mask)
    weight = _weights(reference, weight_type)
    numerator, denominator = 2 * both * weight, (reference + predicted) * weight
    if sum_over_classes:
        numerator, denominator = (t.sum(1, keepdim=True) for t in (numerator, denominator))
    score = numerator / denominator
    return torch.where(denominator == 0, torch.ones_like(score), score).to(dtype)


def _weights(volume: Tensor, weight_type: str) -> Tensor:
    if weight_type == "uniform":
        return torch.ones_like(volume)
    weight = 1 / (volume if weight_type == "simple" else volume * volume)
    absent = weight.isinf()
    largest = weight.masked_fill(absent, 0).amax(1, keepdim=True)
    return torch.where(absent, torch.where(largest > 0, largest, torch.ones_like(largest)), weight)


def _check_weight_type(weight_type: Any) -> str:
    stripped = weight_type.strip() if isinstance(weight_type, str) else weight_type
    return check_option("weight_type", stripped, WEIGHTS)
