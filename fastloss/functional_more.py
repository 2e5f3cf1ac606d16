"""More losses, each as one function call; arguments as `fastloss.functional` says."""

from __future__ import annotations

from typing import Any

from fastloss.functional import value_of
from fastloss.options import check_number
from fastloss.terms import (
    BalancedCrossEntropy,
    Dice,
    DiceSemimetric,
    GeneralizedWassersteinDice,
    KLDivergence,
    LogarithmicCrossEntropy,
    LogarithmicDice,
    LogCoshDice,
    SensitivitySpecificity,
    SymmetricCrossEntropy,
    UnbalancedFocal,
    UnbalancedTversky,
)


def log_cosh_dice_loss(
    logits: Any, target: Any, voxel_weight: Any = None, *,
    include_background: bool = True, batch: bool = False,
    smooth_nr: float = 1e-5, smooth_dr: float = 1e-5,
    weight: Any = None, reduction: str = "mean", squared: bool = False,
    activation: str | None = None, ignore_index: int | None = None,
    channel_axis: int | None = None, validate: bool | None = None,
    regions: Any = None, region_count: int | None = None,
) -> Any:  # fmt: skip
    """log cosh(1 − (2 O + s_nr) / (P + G + s_dr)), times w; `fastloss.LogCoshDice`.

    Args:
        reduction: "mean" over samples and classes, "sum", or "none": (B, C).

    Source: Jadon 2020, "A survey of loss functions for semantic segmentation".

    >>> import numpy as np, fastloss as fl
    >>> p, g = np.array([[[1.0, 1, 0, 0]]]), np.array([[[1.0, 0, 1, 0]]])
    >>> print(round(float(fl.log_cosh_dice_loss(p, g, activation="none")), 3))  # log cosh ½
    0.12
    """
    own = (
        (
            "include_background",
            "batch",
            "smooth_nr",
            "smooth_dr",
            "weight",
            "reduction",
            "squared",
        ),
        (
            include_background,
            batch,
            smooth_nr,
            smooth_dr,
            weight,
            reduction,
            squared,
        ),
    )
    whole = (activation, ignore_index, channel_axis, validate)
    arrays = (logits, target, voxel_weight)
    return value_of(arrays, whole, (regions, region_count), (1.0, LogCoshDice, *own))


def exponential_logarithmic_loss(
    logits: Any, target: Any, voxel_weight: Any = None, *,
    dice_factor: float = 0.8, ce_factor: float = 0.2,
    gamma_dice: float = 0.3, gamma_ce: float = 0.3, ce_weight: Any = None,
    include_background: bool = True, batch: bool = False,
    smooth_nr: float = 1e-5, smooth_dr: float = 1e-5,
    weight: Any = None, reduction: str = "mean",
    activation: str | None = None, ignore_index: int | None = None,
    channel_axis: int | None = None, validate: bool | None = None,
    regions: Any = None, region_count: int | None = None,
) -> Any:  # fmt: skip
    """a (−log D)^γ_d + b Σ_c w_c g_c (−log p_c)^γ_c; `fastloss.ExponentialLogarithmic`.

    D = (2 O + s_nr) / (P + G + s_dr); w is ``ce_weight``, and ``weight`` multiplies the first part.

    Args:
        dice_factor, ce_factor: a and b.
        gamma_dice, gamma_ce: γ_d and γ_c, above 0.
        ce_weight: a weight per class, (C,), or one number; non-negative.
        reduction: "mean" or "sum" of both; "none": the first of each sample and class, (B, C), to
            which the second of the sample is added.

    Source: Wong et al. 2018, "3D segmentation with exponential logarithmic loss for highly
    unbalanced object sizes".

    >>> import numpy as np, fastloss as fl
    >>> p, g = np.full((1, 1, 2), 0.5), np.array([[[1.0, 0]]])
    >>> value = fl.exponential_logarithmic_loss(p, g, gamma_dice=1, gamma_ce=1, activation="none")
    >>> print(round(float(value), 3))  # 0.9 log 2
    0.624
    """
    first = (
        (
            "gamma",
            "include_background",
            "batch",
            "smooth_nr",
            "smooth_dr",
            "weight",
            "reduction",
        ),
        (
            gamma_dice,
            include_background,
            batch,
            smooth_nr,
            smooth_dr,
            weight,
            reduction,
        ),
    )
    second = (
        (
            "gamma",
            "weight",
            "reduction",
        ),
        (
            gamma_ce,
            ce_weight,
            reduction,
        ),
    )
    whole = (activation, ignore_index, channel_axis, validate)
    arrays = (logits, target, voxel_weight)
    return value_of(
        arrays,
        whole,
        (regions, region_count),
        (dice_factor, LogarithmicDice, *first),
        (ce_factor, LogarithmicCrossEntropy, *second),
    )


def sensitivity_specificity_loss(
    logits: Any, target: Any, voxel_weight: Any = None, *,
    r: float = 0.05, smooth_dr: float = 1e-5,
    include_background: bool = True, batch: bool = False,
    weight: Any = None, reduction: str = "mean",
    activation: str | None = None, ignore_index: int | None = None,
    channel_axis: int | None = None, validate: bool | None = None,
    regions: Any = None, region_count: int | None = None,
) -> Any:  # fmt: skip
    """r Σ g (1−p)² / (G + s) + (1−r) Σ (1−g) p² / (n − G + s), times w.

    n is the sum of the voxel weights; `fastloss.SensitivitySpecificity`.

    Args:
        r: in [0, 1], the share of the first part.
        smooth_dr: s, at least 0.
        reduction: "mean" over samples and classes, "sum", or "none": (B, C).

    Source: Brosch et al. 2015, "Deep convolutional encoder networks for multiple sclerosis lesion
    segmentation".

    >>> import numpy as np, fastloss as fl
    >>> p, g = np.array([[[0.5, 1, 0.5, 0]]]), np.array([[[1.0, 1, 0, 0]]])
    >>> print(fl.sensitivity_specificity_loss(p, g, r=0.5, smooth_dr=0, activation="none"))
    0.125
    """
    own = (
        (
            "r",
            "smooth_dr",
            "include_background",
            "batch",
            "weight",
            "reduction",
        ),
        (
            r,
            smooth_dr,
            include_background,
            batch,
            weight,
            reduction,
        ),
    )
    whole = (activation, ignore_index, channel_axis, validate)
    arrays = (logits, target, voxel_weight)
    return value_of(arrays, whole, (regions, region_count), (1.0, SensitivitySpecificity, *own))


def combo_loss(
    logits: Any, target: Any, voxel_weight: Any = None, *,
    alpha: float = 0.5, beta: float = 0.5,
    include_background: bool = True, batch: bool = False,
    smooth_nr: float = 1e-5, smooth_dr: float = 1e-5,
    weight: Any = None, reduction: str = "mean",
    activation: str | None = None, ignore_index: int | None = None,
    channel_axis: int | None = None, validate: bool | None = None,
    regions: Any = None, region_count: int | None = None,
) -> Any:  # fmt: skip
    """α · cross-entropy of both outcomes, weighed by β, + (1−α) · Dice loss; `fastloss.Combo`.

    The first is −Σ_c [β g_c log p_c + (1−β) (1−g_c) log(1−p_c)], the mean over voxels and classes;
    ``weight`` is that of Dice.

    Args:
        alpha, beta: α and β, in [0, 1].
        reduction: "mean" or "sum" of both; "none": Dice of each sample and class, (B, C), to which
            the cross-entropy of the sample is added.

    Source: Taghanaki et al. 2019, "Combo loss: handling input and output imbalance in multi-organ
    segmentation".

    >>> import numpy as np, fastloss as fl
    >>> p, g = np.full((1, 1, 2), 0.5), np.array([[[1.0, 0]]])
    >>> print(round(float(fl.combo_loss(p, g, activation="none")), 3))  # (log 2)/4 + 1/4
    0.423
    """
    share = check_number("alpha", alpha, 0.0, 1.0)
    first = (
        (
            "beta",
            "reduction",
        ),
        (
            beta,
            reduction,
        ),
    )
    second = (
        (
            "include_background",
            "batch",
            "smooth_nr",
            "smooth_dr",
            "weight",
            "reduction",
        ),
        (
            include_background,
            batch,
            smooth_nr,
            smooth_dr,
            weight,
            reduction,
        ),
    )
    whole = (activation, ignore_index, channel_axis, validate)
    arrays = (logits, target, voxel_weight)
    return value_of(
        arrays,
        whole,
        (regions, region_count),
        (share, BalancedCrossEntropy, *first),
        (1.0 - share, Dice, *second),
    )


def symmetric_cross_entropy_loss(
    logits: Any, target: Any, voxel_weight: Any = None, *,
    alpha: float = 0.1, beta: float = 1.0, log_zero: float = -4.0,
    weight: Any = None, reduction: str = "mean",
    activation: str | None = None, ignore_index: int | None = None,
    channel_axis: int | None = None, validate: bool | None = None,
    regions: Any = None, region_count: int | None = None,
) -> Any:  # fmt: skip
    """−α Σ_c w_c g_c log p_c − β Σ_c w_c p_c log g_c, with log 0 := A.

    `fastloss.SymmetricCrossEntropy`.

    Args:
        alpha, beta: α and β, at least 0.
        log_zero: A, at most 0.
        reduction: "mean" over voxels, with sigmoid over voxels and channels; "sum", "none" or
            "voxel".

    Source: Wang et al. 2019, "Symmetric cross entropy for robust learning with noisy labels".

    >>> import numpy as np, fastloss as fl
    >>> p, labels = np.array([[0.8, 0.2]]), np.array([0])
    >>> value = fl.symmetric_cross_entropy_loss(p, labels, alpha=1, activation="none")
    >>> print(round(float(value), 3))  # −log 0.8 + 4 · 0.2
    1.023
    """
    own = (
        (
            "alpha",
            "beta",
            "log_zero",
            "weight",
            "reduction",
        ),
        (
            alpha,
            beta,
            log_zero,
            weight,
            reduction,
        ),
    )
    whole = (activation, ignore_index, channel_axis, validate)
    arrays = (logits, target, voxel_weight)
    return value_of(arrays, whole, (regions, region_count), (1.0, SymmetricCrossEntropy, *own))


def dice_semimetric_loss(
    logits: Any, target: Any, voxel_weight: Any = None, *,
    jaccard: bool = False,
    include_background: bool = True, batch: bool = False,
    smooth_nr: float = 1e-5, smooth_dr: float = 1e-5,
    weight: Any = None, reduction: str = "mean",
    activation: str | None = None, ignore_index: int | None = None,
    channel_axis: int | None = None, validate: bool | None = None,
    regions: Any = None, region_count: int | None = None,
) -> Any:  # fmt: skip
    """1 − (P + G − E + s_nr) / (P + G + s_dr) with E = Σ |p − g|, times w.

    `fastloss.DiceSemimetric`. It is 0 where p = g, for soft targets too.

    Args:
        jaccard: P + G + E in the denominator: the Jaccard metric loss.
        reduction: "mean" over samples and classes, "sum", or "none": (B, C).

    Source: Wang et al. 2023, "Dice semimetric losses: optimizing the Dice score with soft labels".

    >>> import numpy as np, fastloss as fl
    >>> g = np.array([[[0.5, 0.25, 0, 0]]])
    >>> print(fl.dice_semimetric_loss(g, g, activation="none"))
    0.0
    """
    own = (
        (
            "jaccard",
            "include_background",
            "batch",
            "smooth_nr",
            "smooth_dr",
            "weight",
            "reduction",
        ),
        (
            jaccard,
            include_background,
            batch,
            smooth_nr,
            smooth_dr,
            weight,
            reduction,
        ),
    )
    whole = (activation, ignore_index, channel_axis, validate)
    arrays = (logits, target, voxel_weight)
    return value_of(arrays, whole, (regions, region_count), (1.0, DiceSemimetric, *own))


def unified_focal_loss(
    logits: Any, target: Any, voxel_weight: Any = None, *,
    focal_share: float = 0.5, delta: float = 0.6, gamma: float = 0.5, symmetric: bool = False,
    include_background: bool = True, batch: bool = False,
    smooth_nr: float = 1e-5, smooth_dr: float = 1e-5,
    weight: Any = None, reduction: str = "mean",
    activation: str | None = None, ignore_index: int | None = None,
    channel_axis: int | None = None, validate: bool | None = None,
    regions: Any = None, region_count: int | None = None,
) -> Any:  # fmt: skip
    """Unified focal loss, λ · a focal loss + (1−λ) · a focal Tversky loss; `fastloss.UnifiedFocal`.

    The first is −δ log p of the rare classes and −(1−δ) (1−p)^γ log p of class 0, the background;
    the second (1 − TI)^(1−γ) of the rare classes and 1 − TI of class 0, times w. With sigmoid every
    channel is rare.

    Args:
        focal_share: λ in [0, 1].
        delta: δ in [0, 1].
        gamma: γ in [0, 1).
        symmetric: both exponents hold for all classes.
        reduction: "mean" or "sum" of both; "none": the second of each sample and class, (B, C), to
            which the first of the sample is added.

    Source: Yeung et al. 2022, "Unified focal loss: generalising Dice and cross entropy-based losses
    to handle class imbalanced medical image segmentation".

    >>> import numpy as np, fastloss as fl
    >>> p, labels = np.array([[[0.5, 1, 1, 0.5], [0.5, 0, 0, 0.5]]]), np.array([[0, 0, 0, 1]])
    >>> print(round(float(fl.unified_focal_loss(p, labels, activation="none")), 3))
    0.295
    """
    share = check_number("focal_share", focal_share, 0.0, 1.0)
    first = (
        (
            "delta",
            "gamma",
            "symmetric",
            "reduction",
        ),
        (
            delta,
            gamma,
            symmetric,
            reduction,
        ),
    )
    second = (
        (
            "delta",
            "gamma",
            "symmetric",
            "include_background",
            "batch",
            "smooth_nr",
            "smooth_dr",
            "weight",
            "reduction",
        ),
        (
            delta,
            gamma,
            symmetric,
            include_background,
            batch,
            smooth_nr,
            smooth_dr,
            weight,
            reduction,
        ),
    )
    whole = (activation, ignore_index, channel_axis, validate)
    arrays = (logits, target, voxel_weight)
    return value_of(
        arrays,
        whole,
        (regions, region_count),
        (share, UnbalancedFocal, *first),
        (1.0 - share, UnbalancedTversky, *second),
    )


def generalized_wasserstein_dice_loss(
    logits: Any, target: Any, voxel_weight: Any = None, *,
    distances: Any, weighting: str = "default",
    smooth_nr: float = 1e-5, smooth_dr: float = 1e-5, reduction: str = "mean",
    activation: str | None = None, ignore_index: int | None = None,
    channel_axis: int | None = None, validate: bool | None = None,
    regions: Any = None, region_count: int | None = None,
) -> Any:  # fmt: skip
    """1 − (2 T + s_nr) / (2 T + W + s_dr); `fastloss.GeneralizedWassersteinDice`.

    W(x) = Σ_c M[y(x), c] p_c(x) is the distance of the prediction from the label, W its sum and T
    the sum of 1 − W(x) over the foreground.

    Args:
        distances: M, (C, C), of numbers of at least 0; they are divided by the largest.
        weighting: "default", or "GDL": voxels are weighed by the inverse size of their class.
        reduction: "mean" over the samples, "sum", or "none": (B, 1).

    Source: Fidon et al. 2017, "Generalised Wasserstein Dice score for imbalanced multi-class
    segmentation using holistic convolutional networks".

    >>> import numpy as np, fastloss as fl
    >>> near, p = [[0, 1, 1], [1, 0, 0.5], [1, 0.5, 0]], np.eye(3)[[0, 1, 1]].T[None]
    >>> loss = fl.generalized_wasserstein_dice_loss
    >>> print(round(float(loss(p, np.array([[0, 1, 2]]), distances=near, activation="none")), 3))
    0.143
    """
    own = (
        (
            "distances",
            "weighting",
            "smooth_nr",
            "smooth_dr",
            "reduction",
        ),
        (
            distances,
            weighting,
            smooth_nr,
            smooth_dr,
            reduction,
        ),
    )
    whole = (activation, ignore_index, channel_axis, validate)
    arrays = (logits, target, voxel_weight)
    return value_of(arrays, whole, (regions, region_count), (1.0, GeneralizedWassersteinDice, *own))


def kl_divergence_loss(
    logits: Any, target: Any, voxel_weight: Any = None, *,
    weight: Any = None, reduction: str = "mean",
    activation: str | None = None, ignore_index: int | None = None,
    channel_axis: int | None = None, validate: bool | None = None,
    regions: Any = None, region_count: int | None = None,
) -> Any:  # fmt: skip
    """The divergence Σ_c w_c g_c log(g_c / p_c) of every voxel; `fastloss.KLDivergence`.

    Args:
        reduction: "mean" over voxels, with sigmoid over voxels and channels; "sum", "none" or
            "voxel".

    >>> import numpy as np, fastloss as fl
    >>> p, g = np.array([[0.5, 0.5]]), np.array([[0.75, 0.25]])
    >>> print(round(float(fl.kl_divergence_loss(p, g, activation="none")), 3))
    0.131
    """
    own = (
        (
            "weight",
            "reduction",
        ),
        (
            weight,
            reduction,
        ),
    )
    whole = (activation, ignore_index, channel_axis, validate)
    arrays = (logits, target, voxel_weight)
    return value_of(arrays, whole, (regions, region_count), (1.0, KLDivergence, *own))
