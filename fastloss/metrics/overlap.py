"""Metrics of counted voxels: how far prediction and reference agree, class by class."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from math import nan, prod, sqrt
from typing import Any, NamedTuple

import numpy as np

from fastloss.backends import current_backend
from fastloss.metrics.empty import Empty
from fastloss.metrics.inputs import Group, Pair
from fastloss.metrics.metric import Metric, Pattern


class Counts(NamedTuple):
    """Voxels of one class: right, wrong and missed, and those rightly of another class."""

    tp: int
    fp: int
    fn: int
    tn: int


class Joint(NamedTuple):
    """Which class indices meet in the voxels of one sample, and in how many of them."""

    reference: np.ndarray
    """(pairs,) of integers."""
    prediction: np.ndarray
    voxels: np.ndarray

    @classmethod
    def of_matrix(cls, matrix: np.ndarray) -> Joint:
        """From the voxels of all indices, (reference, prediction)."""
        reference, prediction = np.nonzero(matrix)
        return cls(reference, prediction, matrix[reference, prediction])

    @classmethod
    def of_volumes(cls, reference: np.ndarray, prediction: np.ndarray, indices: int) -> Joint:
        """By sorting, where a matrix would be large."""
        pairs = reference.ravel().astype(np.int64) * indices + prediction.ravel()
        found, voxels = np.unique(pairs, return_counts=True)
        return cls(*np.divmod(found, indices), voxels)

    def counts(self, labels: Iterable[Iterable[int]], indices: int) -> list[Counts]:
        """For classes that each unite some of the indices."""

        def voxels_of(index: np.ndarray, where: Any = slice(None)) -> np.ndarray:
            # Sums of float64 are exact up to 2⁵³ voxels.
            return np.bincount(index[where], self.voxels[where], indices)

        total = int(self.voxels.sum())
        predicted, true = voxels_of(self.prediction), voxels_of(self.reference)
        right = voxels_of(self.reference, self.reference == self.prediction)
        found = []
        for each in map(list, labels):
            tp = right[each].sum()
            if len(each) > 1:
                inside = np.zeros(indices, bool)
                inside[each] = True
                tp = self.voxels[inside[self.reference] & inside[self.prediction]].sum()
            p, r = predicted[each].sum(), true[each].sum()
            found.append(Counts(int(tp), int(p - tp), int(r - tp), int(total - p - r + tp)))
        return found


MOST_IN_MATRIX = 1024
"""Indices up to which voxels are counted in a matrix."""
_AT_ONCE = 2**21
"""Numbers of all matrices of a call, unless a single sample has more."""


def count(pair: Pair) -> list[list[Counts]]:
    """For every sample a list with the counts of every class."""
    found: list[list[Counts]] = [[] for _ in range(pair.batch)]
    for group in pair.groups:
        labels = [np.flatnonzero(row) for row in group.members]
        joints = _joints(group, pair.counted)
        for joint, of_sample in zip(joints, found, strict=True):
            of_sample += joint.counts(labels, group.members.shape[1])
    return found


def _joints(group: Group, counted: np.ndarray | None) -> Iterator[Joint]:
    """That of every sample."""
    indices = group.members.shape[1]
    step = max(1, _AT_ONCE // indices**2) if indices <= MOST_IN_MATRIX else 1
    for first in range(0, len(group.prediction), step):
        some = slice(first, first + step)
        part = Group(group.prediction[some], group.reference[some], group.members)
        where = None if counted is None else counted[some]
        if indices <= MOST_IN_MATRIX:
            yield from map(Joint.of_matrix, matrices(part, where))
        else:
            voxels = () if where is None else where
            yield Joint.of_volumes(part.reference[voxels], part.prediction[voxels], indices)


def matrices(group: Group, counted: np.ndarray | None, pooled: bool = False) -> np.ndarray:
    """For every sample, or all of them ``pooled``, the voxels of each index of the reference that
    are predicted as each, (samples, indices, indices) of int64, less the index of no class."""
    # A voxel that does not count has the last index in the reference, which is of no class.
    last = group.members.shape[1] - 1
    prediction, reference = group.prediction, group.reference
    if counted is not None:
        reference = np.where(counted, reference, reference.dtype.type(last))
    if pooled:
        shape = (1, prediction.shape[0] * prediction.shape[1], *prediction.shape[2:])
        prediction, reference = prediction.reshape(shape), reference.reshape(shape)
    found = np.empty((len(prediction), last + 1, last + 1), np.int64)
    current_backend().confusion(prediction, reference, found)
    return found[:, :last, :last]


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
