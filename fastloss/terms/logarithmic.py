"""Losses that are logarithms of Dice, and the sum of one with a power of cross-entropy."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastloss.loss import Loss
from fastloss.options import check_number
from fastloss.statistics import Statistics
from fastloss.sums import Sum
from fastloss.terms.linear import ClassWeighted
from fastloss.terms.region import RegionTerm, ratio


class LogCoshDice(RegionTerm):
    """Log-cosh Dice loss, log cosh(1 − (2 O + s_nr) / (P + G + s_dr)).

    Near 0 it is half the square of the Dice loss. Options as in `RegionTerm`.

    Source: Jadon 2020, "A survey of loss functions for semantic segmentation".

    >>> import numpy as np, fastloss as fl
    >>> p, g = np.array([[[1.0, 1, 0, 0]]]), np.array([[[1.0, 0, 1, 0]]])
    >>> print(round(float(fl.Loss(fl.LogCoshDice(), activation="none")(p, g)), 3))  # log cosh ½
    0.12
    """

    def formula(
        self, overlap: np.ndarray, predicted: np.ndarray, reference: np.ndarray
    ) -> tuple[np.ndarray, ...]:
        dice, inverse = ratio(
            2.0 * overlap + self.smooth_nr,
            predicted + reference + self.smooth_dr,
            self.smooth_dr,
        )
        loss = 1.0 - dice
        slope = np.tanh(loss)
        by_size = slope * dice * inverse
        # cosh x − 1 = 2 sinh²(x/2), which does not cancel.
        value = np.log1p(2.0 * np.sinh(0.5 * loss) ** 2)
        return value, -2.0 * slope * inverse, by_size, by_size


class LogarithmicDice(RegionTerm):
    """The logarithmic Dice loss, (−log D)^γ with D = (2 O + s_nr) / (P + G + s_dr).

    Args:
        gamma: γ, above 0. Below 1 its slope is infinite at D = 1, where the gradient is taken as 0.
        others: as in `RegionTerm`.

    Source: Wong et al. 2018, "3D segmentation with exponential logarithmic loss for highly
    unbalanced object sizes".
    """

    def __init__(self, *, gamma: float = 0.3, **options: Any) -> None:
        super().__init__(**options)
        self.gamma = _check_gamma(gamma)

    def formula(
        self, overlap: np.ndarray, predicted: np.ndarray, reference: np.ndarray
    ) -> tuple[np.ndarray, ...]:
        dice, inverse = ratio(
            2.0 * overlap + self.smooth_nr,
            predicted + reference + self.smooth_dr,
            self.smooth_dr,
        )
        with np.errstate(divide="ignore", invalid="ignore"):
            # Rounding can leave D a little above 1.
            loss = np.maximum(-np.log(dice), 0.0)
            slope = np.zeros_like(loss)
            np.power(loss, self.gamma - 1.0, out=slope, where=loss > 0)
            by_dice = np.where(loss > 0, -self.gamma * slope / dice, 0.0)
        by_size = -by_dice * dice * inverse
        return np.power(loss, self.gamma), 2.0 * by_dice * inverse, by_size, by_size


class LogarithmicCrossEntropy(ClassWeighted):
    """A power of cross-entropy, Σ_c w_c g_c (−log p_c)^γ.

    Of a sigmoid every channel's g is asked alone.

    Args:
        gamma: γ, above 0; 1 is cross-entropy.
        weight, reduction: as in `ClassWeighted`.

    Source: Wong et al. 2018, "3D segmentation with exponential logarithmic loss for highly
    unbalanced object sizes".

    >>> import numpy as np, fastloss as fl
    >>> loss = fl.Loss(fl.LogarithmicCrossEntropy(gamma=2), activation="none")
    >>> print(round(float(loss(np.array([[0.5, 0.5]]), np.array([0]))), 3))  # (log 2)²
    0.48
    """

    def __init__(self, *, gamma: float = 0.3, **options: Any) -> None:
        super().__init__(**options)
        self.gamma = _check_gamma(gamma)
        self.requires = frozenset({Sum("target", "log_power", self.gamma)})

    def coefficients(self, statistics: Statistics) -> dict[Any, float]:
        return dict.fromkeys(self.requires, 1.0)


class ExponentialLogarithmic(Loss):
    """Exponential logarithmic loss, a (−log D)^γ_d + b Σ_c w_c g_c (−log p_c)^γ_c.

    The sum of `LogarithmicDice` and `LogarithmicCrossEntropy`. The paper's w_c is the root of the
    number of voxels of all classes over that of class c, in the training data:
    ``ce_weight=np.sqrt(counts.sum() / counts)``.

    Args:
        dice_factor, ce_factor: a and b, at least 0.
        gamma_dice, gamma_ce: γ_d and γ_c, above 0.
        ce_weight: w, (C,), or one number; non-negative.
        include_background, batch, smooth_nr, smooth_dr, weight: of the first, as in `RegionTerm`.
        reduction: of both, "mean", "sum" or "none".
        **options: activation, ignore_index, channel_axis and validate of `Loss`.

    Raises:
        ValueError, TypeError: an option out of its range.

    Source: Wong et al. 2018, "3D segmentation with exponential logarithmic loss for highly
    unbalanced object sizes".
    """

    def __init__(
        self,
        *,
        dice_factor: float = 0.8,
        ce_factor: float = 0.2,
        gamma_dice: float = 0.3,
        gamma_ce: float = 0.3,
        ce_weight: Any = None,
        include_background: bool = True,
        batch: bool = False,
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        weight: Any = None,
        reduction: str = "mean",
        **options: Any,
    ) -> None:
        dice = LogarithmicDice(
            gamma=gamma_dice,
            include_background=include_background,
            batch=batch,
            smooth_nr=smooth_nr,
            smooth_dr=smooth_dr,
            weight=weight,
            reduction=reduction,
        )
        entropy = LogarithmicCrossEntropy(gamma=gamma_ce, weight=ce_weight, reduction=reduction)
        factors = (check_number("dice_factor", dice_factor), check_number("ce_factor", ce_factor))
        super().__init__(factors[0] * dice, factors[1] * entropy, **options)


def _check_gamma(gamma: Any) -> float:
    number = check_number("gamma", gamma)
    if number == 0:
        raise ValueError("gamma: expected a number above 0, got 0")
    return number
