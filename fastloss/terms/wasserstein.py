"""The loss that knows how far classes are from each other."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from fastloss.fields import Spacing, Target
from fastloss.loss import Derivatives, Pullback, Term
from fastloss.options import REDUCTIONS, check_choice, check_number, readable
from fastloss.statistics import Statistics
from fastloss.sums import PREDICTED

WEIGHTINGS = ("default", "GDL")


class GeneralizedWassersteinDice(Term):
    """Generalised Wasserstein Dice loss, 1 − (2 T + s_nr) / (2 T + W + s_dr).

    W(x) = Σ_c M[y(x), c] p_c(x) is the distance of the prediction from the label y of a voxel, W
    its sum, and T = Σ α_y (1 − W(x)) with α = 0 for the background and 1 for other classes. With
    ``weighting="GDL"`` α is 1/(n_c + 1), n_c being the voxels of a class, and the denominator is
    Σ α_y (2 − W(x)) + s_dr. The value is one per sample.

    It needs Σ p_c over the voxels of every label, for which the labels are taken as regions: a
    loss that has this term takes no others, by a caller or by `PerRegion`. Label maps, and one-hot
    targets, whose classes are where they are above ½.

    Args:
        distances: M, (C, C), of numbers of at least 0; they are divided by the largest.
        weighting: "default" or "GDL".
        smooth_nr, smooth_dr: at least 0.
        reduction: "mean" over the samples, "sum", or "none": (B, 1).

    Raises:
        ValueError, TypeError: an option out of its range. In a call: another number of classes, or
            sigmoid; other regions than the labels.

    Sources: Fidon et al. 2017, "Generalised Wasserstein Dice score for imbalanced multi-class
    segmentation using holistic convolutional networks"; Tilborghs et al. 2020, "Comparative study
    of deep learning methods for the automatic segmentation of lung, lesion and lesion type in CT
    scans of COVID-19 patients" (GDL).

    >>> import numpy as np, fastloss as fl
    >>> near = [[0, 1, 1], [1, 0, 0.5], [1, 0.5, 0]]  # classes 1 and 2 are alike
    >>> loss = fl.Loss(fl.GeneralizedWassersteinDice(distances=near), activation="none")
    >>> p = np.eye(3)[[0, 1, 1]].T[None]  # the last voxel, of class 2, is taken for class 1
    >>> print(round(float(loss(p, np.array([[0, 1, 2]]))), 3))  # 1 − 2 · 1.5 / (2 · 1.5 + 0.5)
    0.143
    """

    requires = frozenset({PREDICTED})
    regional: ClassVar[bool] = True
    local: ClassVar[bool] = True

    def __init__(
        self,
        *,
        distances: Any,
        weighting: str = "default",
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        reduction: str = "mean",
    ) -> None:
        self.distances = _checked(distances)
        self.weighting = check_choice("weighting", weighting, WEIGHTINGS)
        self.smooth_nr = check_number("smooth_nr", smooth_nr)
        self.smooth_dr = check_number("smooth_dr", smooth_dr)
        self.reduction = check_choice("reduction", reduction, REDUCTIONS)

    def check(self, activation: str, classes: int) -> None:
        if classes != len(self.distances):
            raise ValueError(
                f"distances: expected ({classes}, {classes}), as there are {classes} classes, got "
                f"{(len(self.distances),) * 2}"
            )
        if activation == "sigmoid":
            raise ValueError(
                "activation: distances between classes are for 'softmax' or 'none', got 'sigmoid'"
            )

    @property
    def making_regions(self) -> tuple[Any, ...]:
        return ("labels",)

    def make_regions(self, target: Target, spacing: Spacing) -> tuple[np.ndarray, int]:
        kind = np.int16 if target.classes <= 1 << 15 else np.int32
        if target.masks is not None:
            masks = target.masks
            found = np.where(masks.any(axis=1), masks.argmax(axis=1), -1)
            return found.astype(kind), target.classes
        labels = target.labels
        if labels.size and not (labels.min() >= 0 and labels.max() < target.classes):
            labels = np.where((labels >= 0) & (labels < target.classes), labels, -1)
        return labels.astype(kind), target.classes

    def value_shape(self, batch: int, classes: int, regions: int = 0) -> tuple[int, ...]:
        return (batch, 1) if self.reduction == "none" else ()

    def combine(self, statistics: Statistics) -> tuple[np.ndarray, Pullback]:
        regions, classes = statistics.regions, statistics.classes
        if regions < classes:
            raise ValueError(
                f"regions: expected the labels, of {classes} classes, as regions, got {regions}"
            )
        batch = statistics.batch_size // regions
        self._check_labels(statistics, batch)
        # On a GPU there are more rows than classes, all of them empty.
        distance = np.zeros((regions, classes))
        distance[:classes] = self.distances
        sums = statistics[PREDICTED].reshape(batch, regions, classes)
        voxels = statistics.voxels.reshape(batch, regions)
        error = (sums * distance).sum(axis=2)  # of every label, (B, R)
        ours = voxels - error
        if self.weighting == "GDL":
            alpha: Any = 1.0 / (voxels + 1.0)
            right = (alpha * ours).sum(axis=1, keepdims=True)
            whole = (alpha * (voxels + ours)).sum(axis=1, keepdims=True)
            by_whole = -alpha
        else:
            alpha = np.where(np.arange(regions) == 0, 0.0, 1.0)
            right = (alpha * ours).sum(axis=1, keepdims=True)
            whole = 2.0 * right + error.sum(axis=1, keepdims=True)
            by_whole = 1.0 - 2.0 * alpha
        inverse = 1.0 / (whole + self.smooth_dr)
        index = (2.0 * right + self.smooth_nr) * inverse
        value = 1.0 - index
        by_error = inverse * (2.0 * alpha + index * by_whole)  # (B, R)
        scale = 1.0 / max(batch, 1) if self.reduction == "mean" else 1.0
        if self.reduction != "none":
            value = value.sum() * scale

        def pullback(upstream: np.ndarray) -> Derivatives:
            each = (upstream * scale * by_error).reshape(batch, regions, 1)
            return {PREDICTED: (each * distance).reshape(batch * regions, classes)}

        return value, pullback

    def _check_labels(self, statistics: Statistics, batch: int) -> None:
        """Raise ValueError if the regions are not the labels."""
        reference = statistics["reference"]
        if not isinstance(reference, np.ndarray) or statistics.request.dense:
            return
        each = reference.reshape(batch, statistics.regions, statistics.classes)
        label = np.arange(statistics.regions)[:, None] == np.arange(statistics.classes)
        if (each[:, ~label] != 0).any():
            raise ValueError("regions: expected the labels as regions, got others")


def _checked(distances: Any) -> tuple[tuple[float, ...], ...]:
    """The matrix divided by its largest number, as what is hashable."""
    try:
        matrix = np.array(readable("distances", distances), np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"distances: expected numbers, (C, C), got {distances!r}") from None
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.size:
        raise ValueError(f"distances: expected (C, C), got shape {matrix.shape}")
    if not (np.isfinite(matrix).all() and matrix.min() >= 0 and matrix.max() > 0):
        raise ValueError(
            f"distances: expected finite numbers of at least 0, not all 0, got {distances!r}"
        )
    return tuple(tuple(row) for row in (matrix / matrix.max()).tolist())
