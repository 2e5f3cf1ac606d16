"""Panoptic quality of instance segmentations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastloss.monai.metrics._cumulative import CumulativeIterationMetric
from fastloss.monai.metrics._options import check_same_shape, plain, scipy
from fastloss.monai.metrics._reduction import do_metric_reduction

_NAMES = {
    "pq": "panoptic_quality",
    "sq": "segmentation_quality",
    "rq": "recognition_quality",
}


class PanopticQualityMetric(CumulativeIterationMetric):
    """Panoptic quality of each class, as ``monai.metrics.PanopticQualityMetric``.

    Args:
        num_classes: how many there are, without the background.
        metric_name: "pq", "sq" (segmentation quality) or "rq" (recognition quality), or several.
        reduction: see `do_metric_reduction`.
        match_iou_threshold: instances match whose intersection over union is above it; below ½,
            where several can be, those pairs do that have the largest sum.
        smooth_numerator: added to the denominators.
        return_confusion_matrix: ``aggregate`` returns the counts of which they are made.

    Raises:
        ValueError: when it is called, shapes that differ, other than two channels, or other than
            two or three spatial axes, or a threshold outside (0, 1].
        ImportError: a threshold below ½ without SciPy.

    Source: Kirillov et al. 2019, "Panoptic Segmentation".
    """

    def __init__(
        self,
        num_classes: int,
        metric_name: Sequence[str] | str = "pq",
        reduction: str = "mean_batch",
        match_iou_threshold: float = 0.5,
        smooth_numerator: float = 1e-6,
        return_confusion_matrix: bool = False,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.reduction = reduction
        self.match_iou_threshold = match_iou_threshold
        self.smooth_numerator = smooth_numerator
        self.metric_name = (metric_name,) if isinstance(metric_name, str) else tuple(metric_name)
        self.return_confusion_matrix = return_confusion_matrix

    def _compute_tensor(self, y_pred: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        check_same_shape(y_pred, y)
        if y_pred.ndim not in (4, 5) or y_pred.shape[1] != 2:
            raise ValueError(
                "y_pred: expected (batch, 2, *spatial) of instances and classes, with two or three "
                f"spatial axes, got shape {tuple(y_pred.shape)}"
            )
        _check_threshold(self.match_iou_threshold)
        found = torch.zeros(len(y_pred), self.num_classes, 4)
        for b, (p, g) in enumerate(zip(plain(y_pred), plain(y), strict=True)):
            for c, pairs in enumerate(_pairs_by_class(p, g, self.num_classes)):
                found[b, c] = torch.tensor(_counts(pairs, self.match_iou_threshold))
        return found.to(y_pred.device)

    def aggregate(self, reduction: str | None = None) -> Any:
        """The metric of the reduced counts; a list, if there are several.

        Args:
            reduction: see `do_metric_reduction`; None: that of the metric.

        Raises:
            ValueError: an unknown reduction or name, or nothing was measured yet.
        """
        counts, _ = do_metric_reduction(self._rows(), reduction or self.reduction)
        if self.return_confusion_matrix:
            return counts
        found = [_quality(name, counts, self.smooth_numerator) for name in self.metric_name]
        return found[0] if len(found) == 1 else found


def compute_panoptic_quality(
    pred: Tensor,
    gt: Tensor,
    metric_name: str = "pq",
    remap: bool = True,
    match_iou_threshold: float = 0.5,
    smooth_numerator: float = 1e-6,
    output_confusion_matrix: bool = False,
) -> Tensor:
    """Panoptic quality of one class, as ``monai.metrics.compute_panoptic_quality``.

    Args:
        pred, gt: numbers of instances, of any shape; 0: none.
        remap: without effect: numbers may have gaps.
        metric_name, match_iou_threshold, smooth_numerator: see `PanopticQualityMetric`.
        output_confusion_matrix: return true positives, false positives, false negatives and the sum
            of intersections over unions, (4,), in place of a scalar.

    Raises:
        ValueError: shapes that differ, a threshold outside (0, 1], or an unknown name.
        ImportError: a threshold below ½ without SciPy.
    """
    if gt.shape != pred.shape:
        raise ValueError(f"gt: expected pred's shape, {tuple(pred.shape)}, got {tuple(gt.shape)}")
    _check_threshold(match_iou_threshold)
    # All instances are of class 1.
    p, g = (torch.stack([t, torch.ones_like(t)]) for t in (plain(pred).int(), plain(gt).int()))
    (pairs,) = _pairs_by_class(p, g, 1)
    counts = torch.tensor(_counts(pairs, match_iou_threshold), dtype=torch.float32)
    counts = counts.to(pred.device)
    return counts if output_confusion_matrix else _quality(metric_name, counts, smooth_numerator)


def compute_mean_iou(confusion_matrix: Tensor, smooth_numerator: float = 1e-6) -> Tensor:
    """The mean intersection over union of matched instances, as MONAI's function of this name.

    Args:
        confusion_matrix: (…, 4) as of `compute_panoptic_quality`.

    Raises:
        ValueError: the last axis is not of 4.
    """
    if confusion_matrix.shape[-1:] != (4,):
        raise ValueError(
            f"confusion_matrix: expected shape (…, 4), got {tuple(confusion_matrix.shape)}"
        )
    return _quality("sq", confusion_matrix, smooth_numerator)


def _check_threshold(threshold: float) -> None:
    if not 0 < threshold <= 1:
        raise ValueError(f"match_iou_threshold: expected a number in (0, 1], got {threshold}")


def _quality(metric_name: str, counts: Tensor, smooth: float) -> Tensor:
    asked = metric_name.replace(" ", "_").lower()
    short = next((s for s, name in _NAMES.items() if asked in (s, name)), None)
    if short is None:
        raise ValueError(f"metric_name: expected 'pq', 'sq' or 'rq', got {metric_name!r}")
    tp, fp, fn, total = counts.unbind(-1)
    denominator = tp + smooth if short == "sq" else tp + 0.5 * fp + 0.5 * fn + smooth
    return (tp if short == "rq" else total) / denominator


class _Pairs(NamedTuple):
    """Instances of one class, and where they overlap, in CPU memory."""

    predicted: Tensor
    """The sizes of the instances of the prediction."""
    reference: Tensor
    pairs: Tensor
    """(2, N): the places in both of instances that overlap, reference first."""
    overlap: Tensor
    """(N,) voxels."""


def _pairs_by_class(p: Tensor, g: Tensor, classes: int) -> list[_Pairs]:
    """Of instances and classes, (2, *spatial): for each class its instances.

    One pass sorts the voxels by the instance of both; the rest is on their number.
    """
    used = [_instances(t, classes) for t in (p, g)]
    somewhere = (used[0][1] > 0) | (used[1][1] > 0)
    tables, codes = [], []
    for instance, label in used:
        key = (label[somewhere].long() << 32) + instance[somewhere]
        kinds, code, sizes = torch.unique(key, return_inverse=True, return_counts=True)
        # An instance's number may be negative: half of 2³² is added to find the class.
        tables.append((((kinds + (1 << 31)) >> 32).cpu(), sizes.cpu()))
        codes.append(code)
    count = len(tables[0][0])
    both, overlap = torch.unique(codes[1] * max(count, 1) + codes[0], return_counts=True)
    both, overlap = both.cpu(), overlap.cpu()
    pair = torch.stack([both // max(count, 1), both % max(count, 1)])
    (kinds_p, sizes_p), (kinds_g, sizes_g) = tables
    found_classes = []
    for c in range(1, classes + 1):
        of_p, of_g = kinds_p == c, kinds_g == c
        here = of_g[pair[0]] & of_p[pair[1]]
        place_g, place_p = of_g.cumsum(0) - 1, of_p.cumsum(0) - 1
        places = torch.stack([place_g[pair[0][here]], place_p[pair[1][here]]])
        found_classes.append(_Pairs(sizes_p[of_p], sizes_g[of_g], places, overlap[here]))
    return found_classes


def _instances(tensor: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Numbers and classes of each voxel; class 0 where there is no instance of one."""
    instance, label = tensor[0].reshape(-1).int(), tensor[1].reshape(-1)
    inside = (instance != 0) & (label >= 1) & (label <= classes) & (label == label.int())
    zero = torch.zeros_like(instance)
    return torch.where(inside, instance, zero), torch.where(inside, label.int(), zero)


def _counts(found: _Pairs, threshold: float) -> list[float]:
    """True positives, false positives, false negatives, and the sum of their IoU."""
    place_g, place_p = found.pairs
    union = found.reference[place_g] + found.predicted[place_p] - found.overlap
    iou = found.overlap / union
    if threshold < 0.5:
        table = torch.zeros(len(found.reference), len(found.predicted))
        table[place_g, place_p] = iou
        assign = scipy("optimize", "match_iou_threshold below 0.5").linear_sum_assignment
        rows, columns = map(torch.from_numpy, assign(-table.numpy()))
        iou = table[rows, columns]
    matched = iou[iou > threshold]
    tp = len(matched)
    return [
        float(tp),
        float(len(found.predicted) - tp),
        float(len(found.reference) - tp),
        float(matched.sum()),
    ]
