"""The unified focal loss: a focal and a focal Tversky part, in which rare classes count more."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastloss.loss import Loss
from fastloss.options import check_choice, check_number, check_switch
from fastloss.statistics import Statistics
from fastloss.terms.distribution import VOXEL_REDUCTIONS, VoxelwiseTerm
from fastloss.terms.region import RegionTerm, ratio


class UnbalancedFocal(VoxelwiseTerm):
    """The focal part of `UnifiedFocal`: −δ log p_c of the rare classes, −(1−δ) (1−p_0)^γ log p_0 of
    the background.

    Class 0 is the background, the others are rare. ``symmetric``: (1−p_c)^γ multiplies the rare
    ones too. With sigmoid every channel is a rare class, and its rest the background.

    Args:
        delta: δ in [0, 1].
        gamma: γ, at least 0.
        symmetric: see above.
        reduction: "mean" over voxels, with sigmoid over voxels and channels; "sum", "none" or
            "voxel".

    Raises:
        ValueError, TypeError: an option out of its range.

    Source: Yeung et al. 2022, "Unified focal loss: generalising Dice and cross entropy-based losses
    to handle class imbalanced medical image segmentation".
    """

    def __init__(
        self,
        *,
        delta: float = 0.6,
        gamma: float = 0.5,
        symmetric: bool = False,
        reduction: str = "mean",
    ) -> None:
        self.delta = check_number("delta", delta, 0.0, 1.0)
        self.gamma = check_number("gamma", gamma)
        self.symmetric = check_switch("symmetric", symmetric)
        self.reduction = check_choice("reduction", reduction, VOXEL_REDUCTIONS)
        focal = f"focal:{self.gamma!r}"
        self.requires = frozenset({focal} if symmetric else {focal, "cross_entropy"})

    def linear(self, statistics: Statistics) -> tuple[dict[str, Any], np.ndarray]:
        focal, delta = f"focal:{self.gamma!r}", self.delta
        rare = focal if self.symmetric else "cross_entropy"
        if statistics.request.activation == "sigmoid":
            each: dict[str, Any] = {rare: delta, f"focal_rest:{self.gamma!r}": 1.0 - delta}
            return each, statistics.voxels * statistics.classes
        background = np.arange(statistics.classes) == 0
        if self.symmetric:
            return {focal: np.where(background, 1.0 - delta, delta)}, statistics.voxels
        each = {focal: np.where(background, 1.0 - delta, 0.0)}
        each[rare] = np.where(background, 0.0, delta)
        return each, statistics.voxels


class UnbalancedTversky(RegionTerm):
    """The Tversky part of `UnifiedFocal`: (1 − TI)^(1−γ) of the rare classes, 1 − TI of the
    background.

    TI = (O + s_nr) / (O + δ (G−O) + (1−δ) (P−O) + s_dr). Class 0 is the background, the others are
    rare; with sigmoid all are. ``symmetric``: the background has the exponent 1−γ too.

    Args:
        delta: δ in [0, 1].
        gamma: γ in [0, 1). The slope of the power is infinite at TI = 1, where the gradient is
            taken as 0.
        symmetric: see above.
        others: as in `RegionTerm`.

    Raises:
        ValueError, TypeError: an option out of its range.

    Source: Yeung et al. 2022, "Unified focal loss: generalising Dice and cross entropy-based losses
    to handle class imbalanced medical image segmentation".
    """

    def __init__(
        self, *, delta: float = 0.6, gamma: float = 0.5, symmetric: bool = False, **options: Any
    ) -> None:
        super().__init__(**options)
        self.delta = check_number("delta", delta, 0.0, 1.0)
        self.gamma = check_number("gamma", gamma, 0.0, 1.0)
        if self.gamma == 1:
            raise ValueError("gamma: expected a number below 1, got 1")
        self.symmetric = check_switch("symmetric", symmetric)

    def _of_rows(self, statistics: Statistics) -> Any:
        if statistics.request.activation == "sigmoid" and not self.symmetric:
            symmetric: Any = self.with_options({"symmetric": True})
            return symmetric._of_rows(statistics)
        return super()._of_rows(statistics)

    def formula(
        self, overlap: np.ndarray, predicted: np.ndarray, reference: np.ndarray
    ) -> tuple[np.ndarray, ...]:
        delta = self.delta
        index, inverse = ratio(
            overlap + self.smooth_nr,
            delta * reference + (1.0 - delta) * predicted + self.smooth_dr,
            self.smooth_dr,
        )
        # Rounding can leave 1 − TI a little below 0, where a power has no value.
        base = np.maximum(1.0 - index, 0.0)
        slope = np.zeros_like(base)
        np.power(base, -self.gamma, out=slope, where=base > 0)
        slope, value = (1.0 - self.gamma) * slope, np.power(base, 1.0 - self.gamma)
        if not self.symmetric and self.include_background:
            background = np.arange(index.shape[1]) == 0
            value = np.where(background, 1.0 - index, value)
            slope = np.where(background, 1.0, slope)
        through = slope * index * inverse
        return value, -slope * inverse, (1.0 - delta) * through, delta * through


class UnifiedFocal(Loss):
    """Unified focal loss, λ · `UnbalancedFocal` + (1−λ) · `UnbalancedTversky`.

    Args:
        focal_share: λ in [0, 1].
        delta: δ in [0, 1], the weight of rare classes, and of what is missed of a class.
        gamma: γ in [0, 1): it lowers the loss of the background, and raises that of rare classes.
        symmetric: the symmetric form, which treats all classes alike but for their weights.
        include_background, batch, smooth_nr, smooth_dr, weight: of the second, as in `RegionTerm`.
        reduction: of both, "mean", "sum" or "none".
        **options: activation, ignore_index, channel_axis and validate of `Loss`.

    The exponents are those of the authors' code, in which γ of the focal part is not 1−γ in the
    symmetric form; at the default they are the same.

    Raises:
        ValueError, TypeError: an option out of its range.

    Source: Yeung et al. 2022, "Unified focal loss: generalising Dice and cross entropy-based losses
    to handle class imbalanced medical image segmentation".

    >>> import numpy as np, fastloss as fl
    >>> p, labels = np.array([[[0.5, 1, 1, 0.5], [0.5, 0, 0, 0.5]]]), np.array([[0, 0, 0, 1]])
    >>> print(round(float(fl.UnifiedFocal(activation="none")(p, labels)), 3))
    0.295
    """

    def __init__(
        self,
        *,
        focal_share: float = 0.5,
        delta: float = 0.6,
        gamma: float = 0.5,
        symmetric: bool = False,
        include_background: bool = True,
        batch: bool = False,
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        weight: Any = None,
        reduction: str = "mean",
        **options: Any,
    ) -> None:
        share = check_number("focal_share", focal_share, 0.0, 1.0)
        own: dict[str, Any] = {"delta": delta, "gamma": gamma, "symmetric": symmetric}
        tversky = UnbalancedTversky(
            include_background=include_background,
            batch=batch,
            smooth_nr=smooth_nr,
            smooth_dr=smooth_dr,
            weight=weight,
            reduction=reduction,
            **own,
        )
        focal = UnbalancedFocal(reduction=reduction, **own)
        super().__init__(share * focal, (1.0 - share) * tversky, **options)
