"""Losses with one value for every sample and class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from fastloss.loss import Derivatives, Pullback, Term
from fastloss.options import (
    REDUCTIONS,
    check_choice,
    check_class_count,
    check_class_weight,
    check_switch,
)
from fastloss.statistics import Statistics
from fastloss.sums import Sum

VOXELS = "voxels"
"""Stands among the sums that a term reads for the sum of the voxel weights."""


class ClassTerm(Term):
    """A loss that is, for every sample and class, a function of some sums of that class.

    Args:
        include_background: whether class 0 counts.
        batch: sum over the samples before the formula, so that the batch is one volume.
        weight: a weight per class that counts, (C,) or (C−1,) without background, or one
            number; it multiplies the value of each class.
        reduction: "mean" over samples and classes, "sum", or "none": (B, C), (B, C−1) without
            background, and 1 in place of B with ``batch``.

    Where a call names regions, every region of a sample takes the place of a sample: (B · R, C), R
    being the number of regions. ``batch`` then joins the regions of one number over the samples.
    A region none of whose voxels counts is left out of means, and has the value 0.

    Raises:
        ValueError, TypeError: an option out of its range.
    """

    number_options: ClassVar[tuple[str, ...]] = ("weight",)
    couples_classes = False
    """True if `of_sums` returns one value for all classes and applies ``self.weight`` itself."""

    def __init__(
        self,
        *,
        include_background: bool = True,
        batch: bool = False,
        weight: Any = None,
        reduction: str = "mean",
    ) -> None:
        self.include_background = check_switch("include_background", include_background)
        self.batch = check_switch("batch", batch)
        self.weight = check_class_weight("weight", weight)
        self.reduction = check_choice("reduction", reduction, REDUCTIONS)

    @property
    def reads(self) -> tuple[str | Sum, ...]:
        """The sums that `of_sums` takes, in its order; `VOXELS` may be one."""
        raise NotImplementedError(f"{type(self).__name__} must define reads")

    def of_sums(
        self, *sums: np.ndarray
    ) -> tuple[np.ndarray, Sequence[tuple[str | Sum, np.ndarray]]]:
        """The value per class, and sums that it depends on with the derivative by each.

        All arrays are (B, C), with 1 in place of B where ``batch`` and without class 0 where the
        background does not count; that of `VOXELS` is (B, 1).
        """
        raise NotImplementedError(f"{type(self).__name__} must define of_sums")

    def of_target(self, *sums: np.ndarray) -> Sequence[tuple[str | Sum, np.ndarray]]:
        """Sums of the target alone that the value depends on, with the derivative by each.

        They matter to the gradient by the target, as do those of `of_sums`.
        """
        raise TypeError(
            f"target: {type(self).__name__} does not define of_target, which the gradient by the "
            "target needs"
        )

    def check(self, activation: str, classes: int) -> None:
        counted = classes - int(not self.include_background)
        if counted < 1:
            raise ValueError(
                "include_background: False leaves no class to compare, as there is only one"
            )
        check_class_count("weight", self.weight, counted)

    @property
    def sums_over_batch(self) -> bool:
        return self.batch

    def value_shape(self, batch: int, classes: int, regions: int = 0) -> tuple[int, ...]:
        if self.reduction != "none":
            return ()
        counted = 1 if self.couples_classes else classes - int(not self.include_background)
        return ((1 if self.batch else batch) * max(regions, 1), counted)

    def _of_rows(
        self, statistics: Statistics
    ) -> tuple[np.ndarray, Sequence[tuple[str | Sum, np.ndarray]], Any, Any]:
        """The weighed value of every row and class, the slopes, the weight, and how many values a
        mean is of."""
        first = 0 if self.include_background else 1
        reads = self.reads
        sums = [statistics.voxels[:, None] if key == VOXELS else statistics[key] for key in reads]
        if first:
            each = zip(reads, sums, strict=True)
            sums = [s if key == VOXELS else s[:, first:] for key, s in each]
        regions = statistics.regions
        if self.batch:
            sums = [_over_samples(s, regions) for s in sums]
        value, slopes = self.of_sums(*sums)
        if statistics.for_target:
            slopes = (*slopes, *self.of_target(*sums))
        count: Any = max(value.size, 1)
        if regions:
            voxels = statistics.voxels[:, None]
            there = (_over_samples(voxels, regions) if self.batch else voxels) > 0
            value = np.where(there, value, 0.0)
            slopes = [(key, np.where(there, slope, 0.0)) for key, slope in slopes]
            count = np.maximum(there.sum() * value.shape[1], 1)
        weight: Any = 1.0 if self.weight is None or self.couples_classes else self.weight
        if not (isinstance(weight, float) and weight == 1.0):
            value = value * weight
        return value, slopes, weight, count

    def combine(self, statistics: Statistics) -> tuple[np.ndarray, Pullback]:
        value, slopes, weight, count = self._of_rows(statistics)
        first, regions = 0 if self.include_background else 1, statistics.regions
        rows = (statistics.batch_size, statistics.classes - first)
        scale = weight / count if self.reduction == "mean" else weight
        if self.reduction != "none":
            value = value.sum()
        if self.reduction == "mean":
            value = value / count

        def pullback(upstream: np.ndarray) -> Derivatives:
            factor = upstream * scale
            derivatives = {key: factor * slope for key, slope in slopes}
            if regions and self.batch:
                derivatives = {k: _to_samples(d, regions, rows) for k, d in derivatives.items()}
            if first:
                derivatives = {k: with_background(d) for k, d in derivatives.items()}
            return derivatives

        return value, pullback

    def parts(self, statistics: Statistics) -> np.ndarray:
        value, _, _, count = self._of_rows(statistics)
        if self.reduction == "mean":
            value = value / count
        whole = self.include_background or self.couples_classes
        return value if whole else with_background(value)

    def fall(self, statistics: Statistics, row: int, sums: np.ndarray) -> np.ndarray:
        _, _, _, count = self._of_rows(statistics)
        before, voxels = statistics.sums[:, row], statistics.voxels[row]
        if self.batch:
            step = statistics.regions or 1
            joined = statistics.sums[:, row % step :: step].sum(axis=1)
            sums = sums + (joined - before)[:, None]
            before, voxels = joined, statistics.voxels[row % step :: step].sum()
        by_sample: Any = self.with_options({"batch": False})
        then, now = (
            by_sample._of_rows(alone(statistics, each, voxels))[0]
            for each in (sums, before[:, None])
        )
        fall: np.ndarray = (now - then).sum(axis=1)
        return fall / count if self.reduction == "mean" else fall


def alone(statistics: Statistics, sums: np.ndarray, voxels: float) -> Statistics:
    """These sums, (S, n, C), as those of n samples of as many voxels each."""
    each = np.full(sums.shape[1], voxels)
    return replace(statistics, sums=sums, voxels=each, regions=0, joined=None)


def _over_samples(sums: np.ndarray, regions: int) -> np.ndarray:
    """(rows, C) summed over the samples: (1, C), or one row for every number of a region."""
    joined: np.ndarray
    if regions:
        joined = sums.reshape(-1, regions, sums.shape[1]).sum(axis=0)
    else:
        joined = sums.sum(axis=0, keepdims=True)
    return joined


def _to_samples(derivative: np.ndarray, regions: int, shape: tuple[int, int]) -> np.ndarray:
    """The derivative by the sums over the samples as that by those of each, (rows, C)."""
    rows, classes = shape
    each = np.broadcast_to(derivative, (regions, classes))
    return np.broadcast_to(each[None], (rows // regions, regions, classes)).reshape(shape)


def with_background(derivative: np.ndarray) -> np.ndarray:
    """The derivative with a class 0 in front, on which nothing depends."""
    whole = np.zeros((derivative.shape[0], derivative.shape[1] + 1), like=derivative)
    whole[:, 1:] = derivative
    return whole
