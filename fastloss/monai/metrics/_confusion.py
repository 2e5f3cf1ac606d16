"""Confusion matrices of masks, and the metrics made of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastloss.monai.metrics._cumulative import CumulativeIterationMetric
from fastloss.monai.metrics._iou import counted
from fastloss.monai.metrics._options import check_axes, nan_like
from fastloss.monai.metrics._reduction import do_metric_reduction


class ConfusionMatrixMetric(CumulativeIterationMetric):
    """Metrics of true and false positives and negatives, as MONAI's class of this name.

    Args:
        include_background: whether channel 0 counts.
        metric_name: a name of `compute_confusion_matrix_metric`, or several.
        compute_sample: whether a metric is computed of each sample and then reduced, rather than of
            reduced counts.
        reduction: see `do_metric_reduction`.
        get_not_nans: whether ``aggregate`` also returns how many numbers are not NaN.
        ignore_index: see `fastloss.monai.metrics`.

    Raises:
        ValueError: when it is called, fewer than two axes, or shapes that differ.
    """

    def __init__(
        self,
        include_background: bool = True,
        metric_name: Sequence[str] | str = "hit_rate",
        compute_sample: bool = False,
        reduction: str = "mean",
        get_not_nans: bool = False,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__()
        self.include_background = include_background
        self.metric_name = (metric_name,) if isinstance(metric_name, str) else tuple(metric_name)
        self.compute_sample = compute_sample
        self.reduction = reduction
        self.get_not_nans = get_not_nans
        self.ignore_index = ignore_index

    def _compute_tensor(self, y_pred: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        check_axes(y_pred, 2)
        classified = y_pred.ndim == 2 or (y_pred.ndim == 3 and y_pred.shape[-1] == 1)
        if classified and self.compute_sample:
            warnings.warn(
                "compute_sample: one decision has no metric of its own; taken as False",
                stacklevel=4,
            )
            self.compute_sample = False
        return get_confusion_matrix(y_pred, y, self.include_background, self.ignore_index)

    def aggregate(self, compute_sample: bool = False, reduction: str | None = None) -> list[Any]:
        """For each metric its number, with ``get_not_nans`` and how many counts are not NaN.

        Args:
            compute_sample, reduction: as the class; that of the metric, if False and None.

        Raises:
            ValueError: an unknown reduction, or nothing was measured yet. NotImplementedError: an
                unknown name.
        """
        rows, found = self._rows(), []
        for name in self.metric_name:
            data = rows
            each = bool(compute_sample or self.compute_sample)
            if each:
                data = compute_confusion_matrix_metric(name, data)
            value, count = do_metric_reduction(data, reduction or self.reduction)
            if not each:
                value = compute_confusion_matrix_metric(name, value)
            found.append((value, count) if self.get_not_nans else value)
        return found


def get_confusion_matrix(
    y_pred: Tensor, y: Tensor, include_background: bool = True, ignore_index: int | None = None
) -> Tensor:
    """Counts of each sample and channel, (B, C, 4), as ``monai.metrics.get_confusion_matrix``.

    They are true positives, false positives, true negatives and false negatives, in float32.

    Args:
        y_pred, y: masks, (B, C, *spatial), or decisions, (B, C).
        include_background, ignore_index: see `ConfusionMatrixMetric`.

    Raises:
        ValueError: shapes that differ.
    """
    sums, voxels = counted(y_pred, y, include_background, ignore_index)
    both, predicted, reference = sums
    outside = voxels - reference - predicted + both
    return torch.stack([both, predicted - both, outside, reference - both], dim=-1).float()


def compute_confusion_matrix_metric(metric_name: str, confusion_matrix: Tensor) -> Tensor:
    """A metric of counts, as ``monai.metrics.compute_confusion_matrix_metric``.

    Args:
        metric_name: sensitivity, specificity, precision, negative predictive value, miss rate, fall
            out, false discovery rate, false omission rate, prevalence threshold, threat score,
            accuracy, balanced accuracy, f1 score, matthews correlation coefficient, fowlkes mallows
            index, informedness, markedness; or another of their names, see `NAMES`. Blanks may be
            underscores, and capitals do not matter.
        confusion_matrix: (…, 4) as of `get_confusion_matrix`.

    Returns:
        (…); (1,) for a single row. NaN where the denominator is 0.

    Raises:
        NotImplementedError: an unknown name.
        ValueError: the last axis is not of 4.
    """
    formula = FORMULAS[check_name(metric_name)]
    if confusion_matrix.shape[-1:] != (4,):
        shape = tuple(confusion_matrix.shape)
        raise ValueError(f"confusion_matrix: expected shape (…, 4), got {shape}")
    if confusion_matrix.ndim == 1:
        confusion_matrix = confusion_matrix.unsqueeze(0)
    return formula(*confusion_matrix.unbind(-1))


def check_name(metric_name: str) -> str:
    """The short name. NotImplementedError: an unknown one."""
    asked = metric_name.replace(" ", "_").lower()
    for short, others in NAMES.items():
        if asked == short or asked in others:
            return short
    raise NotImplementedError(  # as MONAI, whose callers may catch it
        f"metric_name: expected one of {', '.join(map(repr, NAMES))}, or another of their names, "
        f"got {metric_name!r}"
    )


NAMES = {
    "tpr": ("sensitivity", "recall", "hit_rate", "true_positive_rate"),
    "tnr": ("specificity", "selectivity", "true_negative_rate"),
    "ppv": ("precision", "positive_predictive_value"),
    "npv": ("negative_predictive_value",),
    "fnr": ("miss_rate", "false_negative_rate"),
    "fpr": ("fall_out", "false_positive_rate"),
    "fdr": ("false_discovery_rate",),
    "for": ("false_omission_rate",),
    "pt": ("prevalence_threshold",),
    "ts": ("threat_score", "critical_success_index", "csi"),
    "acc": ("accuracy",),
    "ba": ("balanced_accuracy",),
    "f1": ("f1_score",),
    "mcc": ("matthews_correlation_coefficient",),
    "fm": ("fowlkes_mallows_index",),
    "bm": ("informedness", "bookmaker_informedness", "youden_index", "youden"),
    "mk": ("markedness", "deltap"),
}
"""The metrics by their short names, and their other names."""


def _share(part: Tensor, whole: Tensor) -> Tensor:
    ratio = part / whole
    return torch.where(whole != 0, ratio, nan_like(ratio))


def _rates(tp: Tensor, fp: Tensor, tn: Tensor, fn: Tensor) -> tuple[Tensor, Tensor]:
    """Sensitivity and specificity."""
    return _share(tp, tp + fn), _share(tn, tn + fp)


def _informedness(tp: Tensor, fp: Tensor, tn: Tensor, fn: Tensor) -> Tensor:
    sensitivity, specificity = _rates(tp, fp, tn, fn)
    return sensitivity + specificity - 1


def _prevalence_threshold(tp: Tensor, fp: Tensor, tn: Tensor, fn: Tensor) -> Tensor:
    sensitivity, specificity = _rates(tp, fp, tn, fn)
    root = torch.sqrt(sensitivity * (1 - specificity))
    return _share(root + specificity - 1, sensitivity + specificity - 1)


def _correlation(tp: Tensor, fp: Tensor, tn: Tensor, fn: Tensor) -> Tensor:
    # In float64: the product of four counts leaves float32's range at 10⁹ voxels.
    tp, fp, tn, fn = (t.double() for t in (tp, fp, tn, fn))
    margins = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    return _share(tp * tn - fp * fn, torch.sqrt(margins)).float()


FORMULAS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "tpr": lambda tp, fp, tn, fn: _share(tp, tp + fn),
    "tnr": lambda tp, fp, tn, fn: _share(tn, tn + fp),
    "ppv": lambda tp, fp, tn, fn: _share(tp, tp + fp),
    "npv": lambda tp, fp, tn, fn: _share(tn, tn + fn),
    "fnr": lambda tp, fp, tn, fn: _share(fn, tp + fn),
    "fpr": lambda tp, fp, tn, fn: _share(fp, tn + fp),
    "fdr": lambda tp, fp, tn, fn: _share(fp, tp + fp),
    "for": lambda tp, fp, tn, fn: _share(fn, tn + fn),
    "pt": _prevalence_threshold,
    "ts": lambda tp, fp, tn, fn: _share(tp, tp + fn + fp),
    "acc": lambda tp, fp, tn, fn: _share(tp + tn, tp + fn + tn + fp),
    "ba": lambda tp, fp, tn, fn: _informedness(tp, fp, tn, fn) / 2 + 0.5,
    "f1": lambda tp, fp, tn, fn: _share(2 * tp, 2 * tp + fn + fp),
    "mcc": _correlation,
    "fm": lambda tp, fp, tn, fn: torch.sqrt(_share(tp, tp + fp) * _share(tp, tp + fn)),
    "bm": _informedness,
    "mk": lambda tp, fp, tn, fn: _share(tp, tp + fp) + _share(tn, tn + fn) - 1,
}
