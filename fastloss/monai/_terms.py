"""MONAI's formulas where they are not those of `fastloss.terms`, on sums over voxels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from fastloss.loss import Derivatives, Pullback, Term
from fastloss.options import check_choice, check_class_weight, check_number
from fastloss.statistics import Statistics
from fastloss.sums import NAMED
from fastloss.terms.correlation import MCC
from fastloss.terms.distribution import VoxelwiseTerm, inverse
from fastloss.terms.region import RegionTerm


class Overlap(RegionTerm):
    """1 − (2 O + s_nr) / (2 (O + α (P−O) + β (G−O)) + s_dr).

    α = β = ½ is Dice, α = β = 1 is Jaccard with MONAI's smoothing. Nothing over nothing is NaN.
    Other options as in `fastloss.RegionTerm`.
    """

    number_options = ("weight", "alpha", "beta")

    def __init__(self, *, alpha: float, beta: float, **options: Any) -> None:
        super().__init__(**options)
        self.alpha = check_number("alpha", alpha)
        self.beta = check_number("beta", beta)

    def formula(
        self, overlap: np.ndarray, predicted: np.ndarray, reference: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        shared = 1.0 - self.alpha - self.beta
        sizes = shared * overlap + self.alpha * predicted + self.beta * reference
        size = 2.0 * sizes + self.smooth_dr
        with np.errstate(divide="ignore", invalid="ignore"):
            score = (2.0 * overlap + self.smooth_nr) / size
            return 1.0 - score, 2.0 * (shared * score - 1.0) / size, 2.0 * self.alpha * score / size


class MaskedOverlap(Overlap):
    """`Overlap` where what a mask leaves out is background that is not predicted.

    Args:
        voxels: the number of voxels of a sample, left out or not.
    """

    def __init__(self, *, voxels: int, **options: Any) -> None:
        super().__init__(**options)
        self.voxels = voxels

    def combine(self, statistics: Statistics) -> tuple[np.ndarray, Pullback]:
        sums, index = statistics.sums.copy(), statistics.request.index
        slot = "reference_squared" if self.squared else "reference"
        sums[index[NAMED[slot]], :, 0] += self.voxels - statistics.voxels
        return super().combine(replace(statistics, sums=sums))


class GeneralizedOverlap(RegionTerm):
    """1 − (2 Σ_c w_c O_c + s_nr) / (Σ_c w_c (P_c + G_c) + s_dr), w = 1/G², 1/G or 1.

    An absent class has the largest weight of those present, and 0 where none is present. Other
    options as in `fastloss.RegionTerm`.
    """

    couples_classes = True

    def __init__(self, *, weighting: str, **options: Any) -> None:
        super().__init__(**options)
        self.weighting = check_choice("weighting", weighting, ("square", "simple", "uniform"))

    def formula(
        self, overlap: np.ndarray, predicted: np.ndarray, reference: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        weight = self._class_weights(reference)
        size = (weight * (predicted + reference)).sum(axis=1, keepdims=True) + self.smooth_dr
        with np.errstate(divide="ignore", invalid="ignore"):
            score = 2.0 * (weight * overlap).sum(axis=1, keepdims=True) + self.smooth_nr
            score /= size
            return 1.0 - score, -2.0 * weight / size, weight * score / size

    def _class_weights(self, reference: np.ndarray) -> np.ndarray:
        if self.weighting == "uniform":
            return np.ones_like(reference)
        weight = np.zeros_like(reference)
        there = reference != 0
        np.power(reference, -2.0 if self.weighting == "square" else -1.0, out=weight, where=there)
        return np.where(there, weight, weight.max(axis=1, keepdims=True))


class MatthewsCorrelation(MCC):
    """`fastloss.MCC`, not always defined: where the root is 0 it is NaN or infinite."""

    _always_defined = False


class ChannelFocal(Term):
    """Focal loss with a weight for the positives and one for the negatives of each channel.

    Args:
        gamma: the focusing exponent.
        positive, negative: one number, or one per channel; there are no negatives with softmax.
        channels: how many channels the mean is taken over.
        reduction: "mean" over voxels and channels, or "sum" over samples and channels of the mean
            over voxels.
        voxels: the number of voxels of a sample; those that are not ignored, if None.
        signed: whether the weights may be negative.
    """

    number_options = ("positive", "negative")

    def __init__(
        self,
        *,
        gamma: float,
        positive: Any,
        negative: Any,
        channels: int,
        reduction: str,
        voxels: int | None = None,
        signed: bool = False,
    ) -> None:
        self.gamma = check_number("gamma", gamma)
        self.signed = signed
        self.positive = _weights("positive", positive, signed)
        self.negative = _weights("negative", negative, signed)
        self.channels = channels
        self.reduction = check_choice("reduction", reduction, ("mean", "sum"))
        self.voxels = voxels
        self.requires = frozenset({f"focal:{self.gamma!r}"})

    def combine(self, statistics: Statistics) -> tuple[np.ndarray, Pullback]:
        coefficients = {f"focal:{self.gamma!r}": self.positive}
        if statistics.request.activation == "sigmoid":
            coefficients[f"focal_rest:{self.gamma!r}"] = self.negative
        voxels = statistics.voxels
        if self.voxels is not None:
            voxels = np.full_like(voxels, self.voxels)
        if self.reduction == "mean":
            scale = inverse(voxels.sum() * self.channels)
        else:
            scale = inverse(voxels)[:, None]
        value: Any = 0.0
        for slot, coefficient in coefficients.items():
            # A channel of weight 0 counts for nothing, even where its sum is infinite.
            sums = np.where(coefficient == 0, 0.0, statistics[slot])
            value = value + (sums * coefficient * scale).sum()

        def pullback(upstream: np.ndarray) -> Derivatives:
            return {slot: upstream * scale * c for slot, c in coefficients.items()}

        return value, pullback


def _weights(name: str, value: Any, signed: bool) -> Any:
    return np.array(value, np.float64, ndmin=1) if signed else check_class_weight(name, value)


class BinaryCrossEntropy(VoxelwiseTerm):
    """Binary cross-entropy whose positives have a weight, as torch.nn.BCEWithLogitsLoss."""

    requires = frozenset({"cross_entropy"})
    number_options = ("positive",)

    def __init__(self, *, positive: float, reduction: str) -> None:
        self.positive = check_class_weight("positive", positive)
        self.reduction = check_choice("reduction", reduction, ("mean", "sum"))

    def linear(self, statistics: Statistics) -> tuple[dict[str, Any], np.ndarray]:
        coefficients = {"cross_entropy": self.positive, "cross_entropy_rest": 1.0}
        return coefficients, statistics.voxels * statistics.classes
