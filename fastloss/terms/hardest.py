"""Cross-entropy of the voxels whose label is least likely."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastloss.loss import Derivatives, Pullback, Term
from fastloss.options import check_class_count, check_class_weight, check_count, check_number
from fastloss.request import Request
from fastloss.statistics import Statistics
from fastloss.sums import CROSS_ENTROPY, Sum
from fastloss.terms.distribution import inverse


class OHEMCrossEntropy(Term):
    """Cross-entropy of the hardest voxels, chosen by probability: online hard example mining.

    The voxels whose label has a probability below ``threshold`` are kept, over the whole batch; if
    these are fewer than ``min_kept``, the ``min_kept`` voxels of the lowest probability, with all
    that tie for the last place. The loss is their Σ w_y (−log p_y) / Σ w_y, times voxel weights in
    both sums: 0 if none is kept. Which voxels are kept depends on no weight; ignored voxels and
    those of weight 0 never are. Softmax of a label map only.

    As `fastloss.TopKCrossEntropy` it is no function of sums over voxels: parts of the data cannot
    be joined, and there may be one such term in a loss. It holds one number per voxel, and takes
    two passes over the logits more than other losses do, on a GPU one.

    Args:
        threshold: a probability, above 0 and at most 1; 1 keeps all voxels.
        min_kept: the least number of voxels, at least 0.
        weight: a weight per class, (C,), or one number; non-negative.

    Raises:
        ValueError, TypeError: an option out of its range.

    Source: Shrivastava et al. 2016, "Training region-based object detectors with online hard
    example mining", in the form for segmentation that chooses by probability.

    >>> import numpy as np, fastloss as fl
    >>> p = np.array([[[0.9, 0.5, 0.8], [0.1, 0.5, 0.2]]])
    >>> loss, labels = fl.OHEMCrossEntropy(min_kept=1), np.array([[0, 0, 1]])
    >>> print(round(float(loss(np.log(p), labels)), 3))  # (−log 0.5 − log 0.2)/2
    1.151
    """

    ranking = Sum("target", "log", field="ohem")
    ranks_weighted = False
    sums_chosen = True
    number_options = ("weight",)
    _KEPT = Sum("target", field="ohem")
    requires = frozenset({"cross_entropy", ranking, _KEPT})

    def __init__(
        self, *, threshold: float = 0.7, min_kept: int = 100_000, weight: Any = None
    ) -> None:
        self.threshold = check_number("threshold", threshold, 0.0, 1.0)
        if self.threshold == 0:
            raise ValueError("threshold: expected a number above 0, got 0")
        self.min_kept = 0 if min_kept == 0 else check_count("min_kept", min_kept)
        self.weight = check_class_weight("weight", weight)

    def check(self, activation: str, classes: int) -> None:
        if activation != "softmax":
            raise ValueError(
                f"activation: OHEM cross-entropy is defined for 'softmax', got {activation!r}"
            )
        check_class_count("weight", self.weight, classes)

    def combine(self, statistics: Statistics) -> tuple[np.ndarray, Pullback]:
        weight = np.ones(statistics.classes) * (1.0 if self.weight is None else self.weight)
        scale = inverse((weight * statistics[self._KEPT]).sum())
        # A class of weight 0 counts for nothing, even where its sum is infinite.
        losses = np.where(weight == 0, 0.0, statistics[self.ranking]) * weight

        def pullback(upstream: np.ndarray) -> Derivatives:
            return {self.ranking: upstream * (weight * scale)}

        return losses.sum() * scale, pullback

    def ranks_by(self, request: Request, classes: int) -> np.ndarray:
        coefficients = np.zeros((len(request.sums), classes))
        coefficients[request.index[CROSS_ENTROPY]] = 1.0
        return coefficients

    @property
    def kept_above(self) -> tuple[float, int]:  # type: ignore[override]
        """The least loss, −log p, of which a voxel is kept in any case; all are above −1."""
        return (-1.0 if self.threshold == 1 else -np.log(self.threshold)), self.min_kept

    def rank(self, numbers: np.ndarray, targets: list[tuple[np.ndarray, np.ndarray]]) -> float:
        """Turn −log p_y, (B, voxels), into 1 where a voxel is kept, else 0."""
        counted = np.array([weight > 0 for _, weight in targets]).reshape(numbers.shape)
        least = -np.log(numbers.dtype.type(self.threshold))
        kept = counted & ((self.threshold == 1) | ~(numbers <= least))  # NaN is above all
        losses = numbers[counted]
        if self.min_kept and np.count_nonzero(kept) < min(self.min_kept, losses.size):
            place = losses.size - min(self.min_kept, losses.size)
            kept = counted & ~(numbers < np.partition(losses, place)[place])
        numbers[...] = kept
        return 0.0
