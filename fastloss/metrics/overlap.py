"""Metrics of counted voxels: how far prediction and reference agree, class by class."""

from __future__ import annotations

import re
from collections.abc import Callable
from math import nan, prod, sqrt
from typing import NamedTuple

import numpy as np

from fastloss.backends import current_backend
from fastloss.metrics.empty import Empty
from fastloss.metrics.inputs import Pair
from fastloss.metrics.metric import Metric, Pattern


class Counts(NamedTuple):
    """Voxels of one class: right, wrong and missed, and those rightly of another class."""

    tp: int
    fp: int
    fn: int
    tn: int


def count(pair: Pair) -> list[list[Counts]]:
    """For every sample a list with the counts of every class."""
    found: list[list[Counts]] = [[] for _ in range(pair.batch)]
    for group in pair.groups:
        prediction, reference, extra = group.prediction, group.reference, 0
        size = group.members.shape[1]
        if pair.counted is not None:
            extra = 1
            prediction = np.where(pair.counted, prediction, prediction.dtype.type(size))
            reference = np.where(pair.counted, reference, reference.dtype.type(size))
        joint = np.empty((pair.batch, size + extra, size + extra), np.int64)
        current_backend().confusion(prediction, reference, joint)
        joint = joint[:, :size, :size]
        for table, of_sample in zip(joint, found, strict=True):
            total, members = int(table.sum()), group.members
            tp = np.einsum("kr,rp,kp->k", members, table, members, optimize=True)
            predicted, true = members @ table.sum(0), members @ table.sum(1)
            of_sample += [
                Counts(int(t), int(p - t), int(r - t), int(total - p - r + t))
                for t, p, r in zip(tp, predicted, true, strict=True)
            ]
    return found


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else nan


def _dice(c: Counts) -> float:
    return _ratio(2 * c.tp, 2 * c.tp + c.fp + c.fn)


def _iou(c: Counts) -> float:
    return _ratio(c.tp, c.tp + c.fp + c.fn)


def _precision(c: Counts) -> float:
    return _ratio(c.tp, c.tp + c.fp)


def _recall(c: Counts) -> float:
    return _ratio(c.tp, c.tp + c.fn)


def _specificity(c: Counts) -> float:
    return _ratio(c.tn, c.tn + c.fp)


def _balanced_accuracy(c: Counts) -> float:
    return (_recall(c) + _specificity(c)) / 2


def _volume_difference(c: Counts) -> float:
    return _ratio(c.fp - c.fn, c.tp + c.fn)


def _volume_similarity(c: Counts) -> float:
    return 1 - _ratio(abs(c.fp - c.fn), 2 * c.tp + c.fp + c.fn)


def _mcc(c: Counts) -> float:
    margins = [c.tp + c.fp, c.tp + c.fn, c.tn + c.fp, c.tn + c.fn]
    if not all(margins):
        return nan
    return (c.tp * c.tn - c.fp * c.fn) / sqrt(prod(margins))


_OVERLAP = Empty(nan, 0.0)
_FORMULA = Empty(nan, None)


def _metric(
    name: str, formula: Callable[[Counts], float], empty: Empty, better: str, summary: str
) -> Metric:
    return Metric(name, "overlap", formula, empty, better, summary)


METRICS = {
    metric.name: metric
    for metric in (
        _metric("dice", _dice, _OVERLAP, "higher", "2 TP / (2 TP + FP + FN)"),
        _metric("iou", _iou, _OVERLAP, "higher", "TP / (TP + FP + FN)"),
        _metric("precision", _precision, _OVERLAP, "higher", "TP / (TP + FP)"),
        _metric("recall", _recall, _OVERLAP, "higher", "sensitivity: TP / (TP + FN)"),
        _metric("specificity", _specificity, Empty(None, None), "higher", "TN / (TN + FP)"),
        _metric("balanced_accuracy", _balanced_accuracy, _FORMULA, "higher",
                "the mean of recall and specificity"),
        _metric("volume_difference", _volume_difference, _FORMULA, "",
                "(predicted − true volume) / true volume"),
        _metric("volume_similarity", _volume_similarity, _FORMULA, "higher",
                "1 − |FP − FN| / (2 TP + FP + FN)"),
        _metric("mcc", _mcc, Empty(nan, 0.0), "higher", "Matthews correlation coefficient"),
    )
}  # fmt: skip


def _f_beta(name: str, beta: float) -> Metric:
    def formula(c: Counts) -> float:
        both = (1 + beta**2) * c.tp
        return _ratio(both, both + beta**2 * c.fn + c.fp)

    return _metric(
        name, formula, _OVERLAP, "higher", f"F-measure: recall counts {beta:g} times precision"
    )


PATTERNS = (Pattern(re.compile(r"f(\d+(?:\.\d+)?)"), _f_beta, "f2"),)
