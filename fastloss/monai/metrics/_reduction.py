"""Means and sums over samples and channels of numbers of which some may be NaN."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastloss.monai._inputs import check_option
from fastloss.monai.metrics._cumulative import CumulativeIterationMetric

REDUCTIONS = ("none", "mean", "sum", "mean_batch", "sum_batch", "mean_channel", "sum_channel")


def check_reduction(reduction: Any) -> str:
    stripped = reduction.strip() if isinstance(reduction, str) else reduction
    return check_option("reduction", stripped, REDUCTIONS)


def do_metric_reduction(f: Tensor, reduction: str = "mean") -> tuple[Tensor, Tensor]:
    """The numbers that are not NaN, reduced, and how many they are.

    As ``monai.metrics.do_metric_reduction``; ``f`` is left as it is.

    Args:
        f: (B, C, …).
        reduction: "mean": over the channels of each sample, and then over the samples that have
            any number; "sum"; "mean_batch", "sum_batch": for each channel; "mean_channel",
            "sum_channel": for each sample; "none". The mean of no number is 0; "mean" gives one
            number in an axis of its own, (1,).

    Raises:
        ValueError: an unknown reduction.
    """
    reduction = check_reduction(reduction)
    known = ~torch.isnan(f)
    if reduction == "none":
        return f, known.float()
    numbers = torch.where(known, f, torch.zeros_like(f))
    if reduction == "sum":
        return numbers.sum(dim=(0, 1)), known.sum(dim=(0, 1)).float()
    kind, _, along = reduction.partition("_")
    axis = 0 if along == "batch" else 1
    total, count = numbers.sum(dim=axis).float(), known.sum(dim=axis).float()
    if kind == "sum":
        return total, count
    means = _mean(total, count)
    if along:
        return means, count
    samples = (count > 0).sum(dim=0).float()
    return _mean(means.sum(dim=0), samples), samples


def _mean(total: Tensor, count: Tensor) -> Tensor:
    return torch.where(count > 0, total / count, total.new_zeros(1))


class ReducedMetric(CumulativeIterationMetric):
    """A metric whose rows, a number for each channel, are reduced at the end."""

    reduction: str
    get_not_nans: bool

    def aggregate(self, reduction: str | None = None) -> Any:
        """The rows reduced, with ``get_not_nans`` also the number of those that are not NaN.

        Args:
            reduction: see `do_metric_reduction`; None: that of the metric.

        Raises:
            ValueError: an unknown reduction, or nothing was measured yet.
        """
        found, count = do_metric_reduction(self._rows(), reduction or self.reduction)
        return (found, count) if self.get_not_nans else found
