"""Intersection over union."""

from __future__ import annotations

import torch
from torch import Tensor

from fastloss.monai._inputs import ignore_mask
from fastloss.monai.metrics._options import (
    check_axes,
    check_same_shape,
    check_tensors,
    nan_like,
    plain,
    without_background,
)
from fastloss.monai.metrics._reduction import ReducedMetric
from fastloss.monai.metrics._sums import Overlap, Side, overlap, value_dtype


class MeanIoU(ReducedMetric):
    """Intersection over union of masks, as ``monai.metrics.MeanIoU``.

    Args:
        include_background: whether channel 0 counts.
        reduction: see `do_metric_reduction`.
        get_not_nans: whether ``aggregate`` also returns how many numbers are not NaN.
        ignore_empty: an empty reference gives NaN; if False, 1 if the prediction is empty too.
        ignore_index: see `fastloss.monai.metrics`.

    Raises:
        ValueError: when it is called, fewer than three axes, or shapes that differ.
    """

    def __init__(
        self,
        include_background: bool = True,
        reduction: str = "mean",
        get_not_nans: bool = False,
        ignore_empty: bool = True,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__()
        self.include_background = include_background
        self.reduction = reduction
        self.get_not_nans = get_not_nans
        self.ignore_empty = ignore_empty
        self.ignore_index = ignore_index

    def _compute_tensor(self, y_pred: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        check_axes(y_pred, 3)
        return compute_iou(y_pred, y, self.include_background, self.ignore_empty, self.ignore_index)


def compute_iou(
    y_pred: Tensor,
    y: Tensor,
    include_background: bool = True,
    ignore_empty: bool = True,
    ignore_index: int | None = None,
) -> Tensor:
    """Intersection over union of each sample and channel, (B, C), as ``monai.metrics.compute_iou``.

    Args:
        y_pred, y: masks, (B, C, *spatial).
        include_background, ignore_empty, ignore_index: see `MeanIoU`.

    Raises:
        ValueError: shapes that differ.
    """
    sums, _ = counted(y_pred, y, include_background, ignore_index)
    union = sums.reference + sums.predicted - sums.both
    share = sums.both / union
    if ignore_empty:
        found = torch.where(sums.reference > 0, share, nan_like(share))
    else:
        found = torch.where(union > 0, share, torch.ones_like(share))
    return found.to(value_dtype(y_pred, y))


def counted(
    y_pred: Tensor, y: Tensor, include_background: bool, ignore_index: int | None
) -> tuple[Overlap, Tensor]:
    """The sums of the channels that are looked at, and the voxels that count, (B, 1) of float64.

    An ``ignore_index`` that is a channel empties that channel; another one is that of voxels which
    do not count.
    """
    check_tensors(y_pred, y)
    whole = plain(y)
    y_pred, y = without_background(plain(y_pred), whole, include_background)
    check_same_shape(y_pred, y)
    batch, channels = y_pred.shape[:2]
    first = 0 if include_background else 1
    emptied, mask = None, None
    if ignore_index is not None:
        if 0 <= ignore_index < channels + first:
            emptied = ignore_index - first
        else:
            mask = ignore_mask(whole, ignore_index)
    sums = overlap(Side(y_pred), Side(y), range(channels), mask)
    if emptied is not None and emptied >= 0:
        for total in sums:
            total[:, emptied] = 0
    if mask is not None:
        voxels = mask.reshape(batch, -1).sum(1, keepdim=True, dtype=torch.float64)
    else:
        number = y[:1, :1].numel() if batch else 0
        voxels = sums.both.new_full((batch, 1), number)
    return sums, voxels
