"""Losses that compare regions: functions of overlap and sizes, class by class."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastloss.options import (
    REDUCTIONS,
    check_choice,
    check_class_weight,
    check_number,
    check_switch,
)
from fastloss.terms.per_class import ClassTerm

_SIZES = ("overlap", "predicted", "reference")
_SQUARED = ("overlap", "predicted_squared", "reference_squared")
_EXPONENTS = {"square": -2.0, "simple": -1.0, "uniform": 0.0}


class RegionTerm(ClassTerm):
    """A loss on overlap O = Σ p g, predicted size P = Σ p^k and reference size G = Σ g^k.

    Subclass it and define `formula`; the term then fuses, adds and scales like the built-in ones
    on every backend. k is 1, or 2 where ``squared`` is true.

    Args:
        include_background: whether class 0 counts.
        batch: sum over the samples before the formula, so that the batch is one volume.
        smooth_nr: added to the numerator, at least 0.
        smooth_dr: added to the denominator, at least 0.
        weight: a weight per class that counts, (C,) or (C−1,) without background, or one
            number; it multiplies the value of each class.
        reduction: "mean" over samples and classes, "sum", or "none": (B, C), (B, C−1) without
            background, and 1 in place of B with ``batch``.
        squared: use p² and g² in the sizes (the V-Net form).

    Where a call names regions, every region of a sample takes the place of a sample: (B · R, C), R
    being the number of regions. ``batch`` then joins the regions of one number over the samples.
    A region none of whose voxels counts is left out of means, and has the value 0.

    Raises:
        ValueError, TypeError: an option out of its range.
    """

    def __init__(
        self,
        *,
        include_background: bool = True,
        batch: bool = False,
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        weight: Any = None,
        reduction: str = "mean",
        squared: bool = False,
    ) -> None:
        self.include_background = check_switch("include_background", include_background)
        self.batch = check_switch("batch", batch)
        self.smooth_nr = check_number("smooth_nr", smooth_nr)
        self.smooth_dr = check_number("smooth_dr", smooth_dr)
        self.weight = check_class_weight("weight", weight)
        self.reduction = check_choice("reduction", reduction, REDUCTIONS)
        self.squared = check_switch("squared", squared)
        self.requires = frozenset({"squared" if self.squared else "region"})

    def formula(
        self, overlap: np.ndarray, predicted: np.ndarray, reference: np.ndarray
    ) -> tuple[np.ndarray, ...]:
        """The value per class, its derivative by the overlap, and by the predicted size.

        And by the reference size, if there is to be a gradient by the target.

        All arrays are (B, C), with 1 in place of B where ``batch`` and without class 0 where the
        background does not count. Where ``couples_classes``, the value is (B, 1).

        For a GPU the formula is run once per shape, with arrays that record what NumPy is asked
        to do: choose with np.where, as ``if`` on the sums raises TypeError there.
        """
        raise NotImplementedError(f"{type(self).__name__} must define formula")

    @classmethod
    def recordable(cls) -> tuple[str, ...]:
        known = super().recordable()
        if known or cls.couples_classes or cls.combine is not RegionTerm.combine:
            return known
        return ("weight",)  # of which a formula from elsewhere sees nothing

    @property
    def reads(self) -> tuple[str, ...]:
        return _SQUARED if self.squared else _SIZES

    def of_sums(self, *sums: np.ndarray) -> Any:
        value, by_overlap, by_predicted, *_ = self.formula(*sums)
        _, size, _ = self.reads
        return value, (("overlap", by_overlap), (size, by_predicted))

    def of_target(self, *sums: np.ndarray) -> Any:
        found = self.formula(*sums)
        if len(found) < 4:
            raise TypeError(
                f"target: the formula of {type(self).__name__} has no derivative by the reference "
                "size, which the gradient by the target needs"
            )
        return ((self.reads[2], found[3]),)


def ratio(
    numerator: np.ndarray, denominator: np.ndarray, smooth_dr: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """numerator / denominator and 1 / denominator, of which ``smooth_dr`` is a part.

    Where the denominator is 0 nothing was predicted and nothing is there: the ratio is 1, a
    perfect agreement, and the derivative 0.
    """
    if smooth_dr > 0:
        # Divided rather than multiplied by the inverse: equal numbers then give exactly 1.
        return numerator / denominator, 1.0 / denominator
    there = denominator != 0
    inverse = np.divide(1.0, denominator, out=np.zeros_like(denominator), where=there)
    quotient = np.divide(numerator, denominator, out=np.ones_like(denominator), where=there)
    return quotient, inverse


class Dice(RegionTerm):
    """Soft Dice loss, 1 − (2 O + s_nr) / (P + G + s_dr).

    ``squared=True`` is the form of V-Net with p² and g² in the denominator. Options as in
    `RegionTerm`. With both smoothing numbers 0, a class that is neither predicted nor there
    costs 0.

    Source: Milletari et al. 2016, "V-Net".

    >>> import numpy as np, fastloss as fl
    >>> dice = fl.Loss(fl.Dice(squared=True, smooth_nr=0, smooth_dr=0), activation="none")
    >>> print(dice(np.array([[[1.0, 1, 0, 0]]]), np.array([[[1.0, 0, 1, 0]]])))
    0.5
    """

    def formula(
        self, overlap: np.ndarray, predicted: np.ndarray, reference: np.ndarray
    ) -> tuple[np.ndarray, ...]:
        dice, inverse = ratio(
            2.0 * overlap + self.smooth_nr,
            predicted + reference + self.smooth_dr,
            self.smooth_dr,
        )
        by_size = dice * inverse
        return 1.0 - dice, -2.0 * inverse, by_size, by_size


class Jaccard(RegionTerm):
    """Soft Jaccard (intersection over union) loss, 1 − (O + s_nr) / (P + G − O + s_dr).

    Options as in `RegionTerm`.

    Source: Rahman & Wang 2016, "Optimizing Intersection-Over-Union in Deep Neural Networks".
    """

    def formula(
        self, overlap: np.ndarray, predicted: np.ndarray, reference: np.ndarray
    ) -> tuple[np.ndarray, ...]:
        jaccard, inverse = ratio(
            overlap + self.smooth_nr,
            predicted + reference - overlap + self.smooth_dr,
            self.smooth_dr,
        )
        by_size = jaccard * inverse
        return 1.0 - jaccard, -(1.0 + jaccard) * inverse, by_size, by_size


class Tversky(RegionTerm):
    """Tversky loss, (1 − TI)^γ with TI = (O + s_nr) / (O + α (P−O) + β (G−O) + s_dr).

    α weighs false positives, β false negatives; α = β = ½ is Dice. γ ≠ 1 is the focal Tversky
    loss. Other options as in `RegionTerm`.

    Args:
        alpha: at least 0.
        beta: at least 0.
        gamma: the focal exponent, above 0. Below 1 its slope is infinite at TI = 1, where the
            gradient is taken as 0.

    Sources: Salehi et al. 2017, "Tversky loss function for image segmentation"; Abraham & Khan
    2018, "A Novel Focal Tversky loss function" (whose exponent 1/γ is γ here).
    """

    number_options = ("weight", "alpha", "beta")

    def __init__(
        self, *, alpha: float = 0.5, beta: float = 0.5, gamma: float = 1.0, **options: Any
    ) -> None:
        super().__init__(**options)
        self.alpha = check_number("alpha", alpha)
        self.beta = check_number("beta", beta)
        self.gamma = check_number("gamma", gamma)
        if self.gamma == 0:
            raise ValueError("gamma: expected a number above 0, got 0")

    def formula(
        self, overlap: np.ndarray, predicted: np.ndarray, reference: np.ndarray
    ) -> tuple[np.ndarray, ...]:
        alpha, beta = self.alpha, self.beta
        shared = 1.0 - alpha - beta
        index, inverse = ratio(
            overlap + self.smooth_nr,
            shared * overlap + alpha * predicted + beta * reference + self.smooth_dr,
            self.smooth_dr,
        )
        by_size = index * inverse
        value, by_overlap = 1.0 - index, (shared * index - 1.0) * inverse
        if self.gamma != 1.0:
            # Rounding can leave 1 − TI a little below 0, where a power has no value.
            base = np.maximum(value, 0.0)
            slope = np.zeros_like(base)
            np.power(base, self.gamma - 1.0, out=slope, where=base > 0)
            slope *= self.gamma
            value = np.power(base, self.gamma)
            by_overlap, by_size = slope * by_overlap, slope * by_size
        return value, by_overlap, alpha * by_size, beta * by_size


class GeneralizedDice(RegionTerm):
    """Generalised Dice loss, 1 − (2 Σ_c w_c O_c + s_nr) / (Σ_c w_c (P_c + G_c) + s_dr).

    The classes are weighed by the size of their reference: w = 1/G² ("square"), 1/G ("simple")
    or 1 ("uniform"). An absent class would weigh infinitely; it gets the largest finite weight
    of its sample (1 if all are absent). ``weight`` multiplies w. The value is one per sample,
    (B, 1) with ``reduction="none"``. Other options as in `RegionTerm`.

    Source: Sudre et al. 2017, "Generalised Dice overlap as a deep learning loss function".
    """

    couples_classes = True

    def __init__(self, *, weighting: str = "square", **options: Any) -> None:
        super().__init__(**options)
        self.weighting = check_choice("weighting", weighting, ("square", "simple", "uniform"))

    def formula(
        self, overlap: np.ndarray, predicted: np.ndarray, reference: np.ndarray
    ) -> tuple[np.ndarray, ...]:
        weight = self.class_weights(reference)
        dice, inverse = ratio(
            2.0 * (weight * overlap).sum(axis=1, keepdims=True) + self.smooth_nr,
            (weight * (predicted + reference)).sum(axis=1, keepdims=True) + self.smooth_dr,
            self.smooth_dr,
        )
        by_size = weight * dice * inverse
        return 1.0 - dice, -2.0 * weight * inverse, by_size

    def of_target(self, *sums: np.ndarray) -> Any:
        overlap, predicted, reference = sums
        weight = self.class_weights(reference)
        dice, inverse = ratio(
            2.0 * (weight * overlap).sum(axis=1, keepdims=True) + self.smooth_nr,
            (weight * (predicted + reference)).sum(axis=1, keepdims=True) + self.smooth_dr,
            self.smooth_dr,
        )
        by_weight = inverse * (dice * (predicted + reference) - 2.0 * overlap)
        # An absent class has the weight of the smallest that is there.
        there = reference > 0
        smallest = reference == np.where(there, reference, np.inf).min(axis=1, keepdims=True)
        moved = by_weight if self.weight is None else by_weight * self.weight
        absent = np.where(there, 0.0, moved).sum(axis=1, keepdims=True)
        moved = np.where(there, moved + absent * smallest, 0.0)
        exponent = _EXPONENTS[self.weighting]
        slope = np.zeros_like(reference)
        np.power(reference, exponent - 1.0, out=slope, where=there)
        return ((self.reads[2], weight * dice * inverse + exponent * slope * moved),)

    def class_weights(self, reference: np.ndarray) -> np.ndarray:
        exponent = _EXPONENTS[self.weighting]
        there = reference > 0
        weight = np.zeros_like(reference)
        np.power(reference, exponent, out=weight, where=there)
        largest = weight.max(axis=1, keepdims=True, initial=0.0)
        weight = np.where(there, weight, np.where(largest > 0, largest, 1.0))
        return weight if self.weight is None else weight * self.weight
