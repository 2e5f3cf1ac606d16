"""Each loss as one function call.

``fl.dice_loss(logits, target, w, batch=True)`` is ``fl.Loss(fl.Dice(batch=True))(logits, target,
w)``, which is made once for equal options. Like a loss, a function is differentiated by autograd
and taken into the graph by `torch.compile`; class weights, factors and ``alpha`` may there be
others in every call.

Every function takes

- logits, target, voxel_weight, regions, region_count: as `fastloss.Loss` does.
- activation, ignore_index, channel_axis, validate: options of `fastloss.Loss`, None for its
  defaults.
- weight: a weight per class, (C,), or one number; non-negative. None: all are 1.
- reduction: what the value is, see below.

Functions of regions, those whose formulas have O, P and G, take as well

- include_background: whether class 0 counts. Without it ``weight`` is (C−1,).
- batch: sum over the samples before the formula, so that the batch is one volume.
- smooth_nr, smooth_dr: s_nr and s_dr of the formula, at least 0.
- squared: P = Σ p² and G = Σ g² (the V-Net form).

In the formulas p is the probability of a class, g the target (1 for the label y, else 0, or what a
dense target holds) and w the class weight. Σ_c goes over the classes of a voxel; O = Σ p g, P = Σ p
and G = Σ g go over the voxels of a class. Voxel weights multiply what each voxel adds to a sum.

A reduction gives

- "mean": of regions, over samples and classes; of voxels, over their weights.
- "sum": of the same values.
- "none": of regions, the value of each sample and class, (B, C), or (B, C−1) without background,
  with 1 in place of B where ``batch``; of voxels, the mean of each sample, (B, 1).
- "voxel": the loss of every voxel, (B, *spatial), with sigmoid (B, C, *spatial). Not of regions.

Where a call names ``regions``, each of them takes the place of a sample.

Functions of boundaries are in `fastloss.functional_boundary`, those of lesions in
`fastloss.functional_lesions`, and those that rank voxels in `fastloss.functional_ranking`.

Every function raises TypeError or ValueError, naming the argument, for an option out of its range,
and for arrays as `fastloss.Loss` does.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from fastloss.borrowed import Extras
from fastloss.frameworks import Adapter, adapter_of
from fastloss.loss import Loss, Term
from fastloss.options import factor_of, readable, refuse_gradient
from fastloss.structure import recipe
from fastloss.terms import (
    MCC,
    Brier,
    CrossEntropy,
    Dice,
    Focal,
    GeneralizedCrossEntropy,
    GeneralizedDice,
    Jaccard,
    MeanAbsoluteError,
    PolyCrossEntropy,
    TopKCrossEntropy,
    Tversky,
)


def cross_entropy_loss(
    logits: Any, target: Any, voxel_weight: Any = None, *,
    weight: Any = None, label_smoothing: float = 0.0, reduction: str = "mean",
    activation: str | None = None, ignore_index: int | None = None,
    channel_axis: int | None = None, validate: bool | None = None,
    regions: Any = None, region_count: int | None = None,
) -> Any:  # fmt: skip
    """Cross-entropy, −Σ_c w_c g_c log p_c of every voxel; `fastloss.CrossEntropy`.

    With sigmoid it is binary cross-entropy of every channel, −[g log p + (1−g) log(1−p)].

    Args:
        label_smoothing: ε in [0, 1]: g becomes (1−ε) g + ε/C, with sigmoid (1−ε) g + ε/2 (Szegedy
            et al. 2016, "Rethinking the Inception Architecture").
        reduction: "mean" over the weights w_y of labels as in ``torch.nn.CrossEntropyLoss``, of a
            dense target over voxels, with sigmoid over voxels and channels; "sum", "none" or
            "voxel".

    >>> import numpy as np, fastloss as fl
    >>> p, g = np.array([[0.8, 0.2]]), np.array([[1.0, 0.0]])  # one voxel, two classes
    >>> print(round(float(fl.cross_entropy_loss(p, g, activation="none")), 3))
    0.223
    """
    own = ("weight", "label_smoothing", "reduction"), (weight, label_smoothing, reduction)
    whole = (activation, ignore_index, channel_axis, validate)
    arrays = (logits, target, voxel_weight)
    return value_of(arrays, whole, (regions, region_count), (1.0, CrossEntropy, *own))


def focal_loss(
    logits: Any, target: Any, voxel_weight: Any = None, *,
    gamma: float = 2.0, alpha: Any = None, reduction: str = "mean",
    activation: str | None = None, ignore_index: int | None = None,
    channel_axis: int | None = None, validate: bool | None = None,
    regions: Any = None, region_count: int | None = None,
) -> Any:  # fmt: skip
    """Focal loss, −α_y (1−p_y)^γ log p_y of every voxel; `fastloss.Focal`.

    With sigmoid it is −[α g (1−p)^γ log p + (1−α) (1−g) p^γ log(1−p)] of every channel.

    Args:
        gamma: γ, at least 0; 0 is cross-entropy.
        alpha: α, one number or one per class, with sigmoid in [0, 1]. None: α and 1−α are 1.
        reduction: "mean" over voxels, with sigmoid over voxels and channels; "sum", "none" or
            "voxel".

    Source: Lin et al. 2017, "Focal Loss for Dense Object Detection".

    >>> import numpy as np, fastloss as fl
    >>> p, g = np.array([[0.8, 0.2]]), np.array([[1.0, 0.0]])
    >>> print(round(float(fl.focal_loss(p, g, activation="none", gamma=1)), 3))
    0.045
    """
    own = ("gamma", "alpha", "reduction"), (gamma, alpha, reduction)
    whole = (activation, ignore_index, channel_axis, validate)
    arrays = (logits, target, voxel_weight)
    return value_of(arrays, whole, (regions, region_count), (1.0, Focal, *own))


def brier_loss(
    logits: Any, target: Any, voxel_weight: Any = None, *,
    weight: Any = None, reduction: str = "mean",
    activation: str | None = None, ignore_index: int | None = None,
    channel_axis: int | None = None, validate: bool | None = None,
    regions: Any = None, region_count: int | None = None,
) -> Any:  # fmt: skip
    """Brier score, Σ_c w_c (p_c − g_c)² of every voxel; `fastloss.Brier`.

    Args:
        reduction: "mean" over voxels, with sigmoid over voxels and channels; "sum", "none" or
            "voxel".

    Source: Brier 1950, "Verification of forecasts expressed in terms of probability".

    >>> import numpy as np, fastloss as fl
    >>> p, g = np.array([[0.8, 0.2]]), np.array([[1.0, 0.0]])
    >>> print(round(float(fl.brier_loss(p, g, activation="none")), 3))
    0.08
    """
    own = ("weight", "reduction"), (weight, reduction)
    whole = (activation, ignore_index, channel_axis, validate)
    arrays = (logits, target, voxel_weight)
    return value_of(arrays, whole, (regions, region_count), (1.0, Brier, *own))


def mean_absolute_error_loss(
    logits: Any, target: Any, voxel_weight: Any = None, *,
    weight: Any = None, reduction: str = "mean",
    activation: str | None = None, ignore_index: int | None = None,
    channel_axis: int | None = None, validate: bool | None = None,
    regions: Any = None, region_count: int | None = None,
) -> Any:  # fmt: skip
    """Mean absolute error, Σ_c w_c |p_c − g_c| of every voxel; `fastloss.MeanAbsoluteError`.

    Of a soft target it is g (1−p) + (1−g) p.

    Args:
        reduction: "mean" over voxels, with sigmoid over voxels and channels; "sum", "none" or
            "voxel".

    Source: Ghosh et al. 2017, "Robust loss functions under label noise for deep neural networks".

    >>> import numpy as np, fastloss as fl
    >>> p, g = np.array([[0.8, 0.2]]), np.array([[1.0, 0.0]])
    >>> print(round(float(fl.mean_absolute_error_loss(p, g, activation="none")), 3))
    0.4
    """
    own = ("weight", "reduction"), (weight, reduction)
    whole = (activation, ignore_index, channel_axis, validate)
    arrays = (logits, target, voxel_weight)
    return value_of(arrays, whole, (regions, region_count), (1.0, MeanAbsoluteError, *own))


def poly_cross_entropy_loss(
    logits: Any, target: Any, voxel_weight: Any = None, *,
    epsilon: float = 1.0, weight: Any = None, reduction: str = "mean",
    activation: str | None = None, ignore_index: int | None = None,
    channel_axis: int | None = None, validate: bool | None = None,
    regions: Any = None, region_count: int | None = None,
) -> Any:  # fmt: skip
    """Poly-1 loss, Σ_c w_c g_c (−log p_c + ε (1−p_c)) of every voxel; `fastloss.PolyCrossEntropy`.

    With sigmoid the same is added for the other outcome, with 1−g and 1−p.

    Args:
        epsilon: ε, at least −1; 0 is cross-entropy.
        reduction: "mean" over voxels, with sigmoid over voxels and channels; "sum", "none" or
            "voxel".

    Source: Leng et al. 2022, "PolyLoss: a polynomial expansion perspective of classification loss
    functions".

    >>> import numpy as np, fastloss as fl
    >>> p, g = np.array([[0.8, 0.2]]), np.array([[1.0, 0.0]])
    >>> print(round(float(fl.poly_cross_entropy_loss(p, g, activation="none", epsilon=2)), 3))
    0.623
    """
    own = ("epsilon", "weight", "reduction"), (epsilon, weight, reduction)
    whole = (activation, ignore_index, channel_axis, validate)
    arrays = (logits, target, voxel_weight)
    return value_of(arrays, whole, (regions, region_count), (1.0, PolyCrossEntropy, *own))


def generalized_cross_entropy_loss(
    logits: Any, target: Any, voxel_weight: Any = None, *,
    q: float = 0.7, weight: Any = None, reduction: str = "mean",
    activation: str | None = None, ignore_index: int | None = None,
    channel_axis: int | None = None, validate: bool | None = None,
    regions: Any = None, region_count: int | None = None,
) -> Any:  # fmt: skip
    """Generalised cross-entropy, Σ_c w_c g_c (1 − p_c^q) / q of every voxel.

    For targets with some wrong labels; `fastloss.GeneralizedCrossEntropy`.

    Args:
        q: in (0, 1]; towards 0 it is cross-entropy, and at 1 half the mean absolute error.
        reduction: "mean" over voxels, with sigmoid over voxels and channels; "sum", "none" or
            "voxel".

    Source: Zhang & Sabuncu 2018, "Generalized cross entropy loss for training deep neural networks
    with noisy labels".

    >>> import numpy as np, fastloss as fl
    >>> p, g = np.array([[0.8, 0.2]]), np.array([[1.0, 0.0]])
    >>> print(round(float(fl.generalized_cross_entropy_loss(p, g, activation="none", q=1)), 3))
    0.2
    """
    own = ("q", "weight", "reduction"), (q, weight, reduction)
    whole = (activation, ignore_index, channel_axis, validate)
    arrays = (logits, target, voxel_weight)
    return value_of(arrays, whole, (regions, region_count), (1.0, GeneralizedCrossEntropy, *own))


def top_k_cross_entropy_loss(
    logits: Any, target: Any, voxel_weight: Any = None, *,
    k: float = 10.0, weight: Any = None,
    activation: str | None = None, ignore_index: int | None = None,
    channel_axis: int | None = None, validate: bool | None = None,
    regions: Any = None, region_count: int | None = None,
) -> Any:  # fmt: skip
    """The mean of the largest k percent of the voxels' −w_y log p_y; `fastloss.TopKCrossEntropy`.

    Softmax of a label map only. The largest are taken over the whole batch, of whose voxels all
    count, ignored ones as 0. There is no other reduction: the value is one number.

    Args:
        k: percent of the voxels, above 0 and at most 100.

    Source: Wu et al. 2016, "Bridging Category-level and Instance-level Semantic Image
    Segmentation", in the form that nnU-Net uses.

    >>> import numpy as np, fastloss as fl
    >>> logits = np.array([[[0.0, 3.0, 1.0, 5.0], [0.0, 0.0, 0.0, 0.0]]])
    >>> print(round(float(fl.top_k_cross_entropy_loss(logits, np.zeros((1, 4), int), k=25)), 3))
    0.693
    """
    own = ("k", "weight"), (k, weight)
    whole = (activation, ignore_index, channel_axis, validate)
    arrays = (logits, target, voxel_weight)
    return value_of(arrays, whole, (regions, region_count), (1.0, TopKCrossEntropy, *own))


def dice_loss(
    logits: Any, target: Any, voxel_weight: Any = None, *,
    include_background: bool = True, batch: bool = False,
    smooth_nr: float = 1e-5, smooth_dr: float = 1e-5,
    weight: Any = None, reduction: str = "mean", squared: bool = False,
    activation: str | None = None, ignore_index: int | None = None,
    channel_axis: int | None = None, validate: bool | None = None,
    regions: Any = None, region_count: int | None = None,
) -> Any:  # fmt: skip
    """Soft Dice loss, 1 − (2 O + s_nr) / (P + G + s_dr) of every class, times w; `fastloss.Dice`.

    Args:
        reduction: "mean" over samples and classes, "sum", or "none": (B, C).

    Source: Milletari et al. 2016, "V-Net".

    >>> import numpy as np, fastloss as fl
    >>> p, g = np.array([[[1.0, 1, 0, 0]]]), np.array([[[1.0, 0, 1, 0]]])  # four voxels, one class
    >>> print(round(float(fl.dice_loss(p, g, activation="none")), 3))
    0.5
    """
    own = _region(include_background, batch, smooth_nr, smooth_dr, weight, reduction, squared)
    whole = (activation, ignore_index, channel_axis, validate)
    arrays = (logits, target, voxel_weight)
    return value_of(arrays, whole, (regions, region_count), (1.0, Dice, *own))


def jaccard_loss(
    logits: Any, target: Any, voxel_weight: Any = None, *,
    include_background: bool = True, batch: bool = False,
    smooth_nr: float = 1e-5, smooth_dr: float = 1e-5,
    weight: Any = None, reduction: str = "mean", squared: bool = False,
    activation: str | None = None, ignore_index: int | None = None,
    channel_axis: int | None = None, validate: bool | None = None,
    regions: Any = None, region_count: int | None = None,
) -> Any:  # fmt: skip
    """Soft Jaccard loss, 1 − (O + s_nr) / (P + G − O + s_dr) of every class, times w.

    One minus intersection over union; `fastloss.Jaccard`.

    Args:
        reduction: "mean" over samples and classes, "sum", or "none": (B, C).

    Source: Rahman & Wang 2016, "Optimizing Intersection-Over-Union in Deep Neural Networks".

    >>> import numpy as np, fastloss as fl
    >>> p, g = np.array([[[1.0, 1, 0, 0]]]), np.array([[[1.0, 0, 1, 0]]])
    >>> print(round(float(fl.jaccard_loss(p, g, activation="none")), 3))
    0.667
    """
    own = _region(include_background, batch, smooth_nr, smooth_dr, weight, reduction, squared)
    whole = (activation, ignore_index, channel_axis, validate)
    arrays = (logits, target, voxel_weight)
    return value_of(arrays, whole, (regions, region_count), (1.0, Jaccard, *own))


def tversky_loss(
    logits: Any, target: Any, voxel_weight: Any = None, *,
    alpha: float = 0.5, beta: float = 0.5, gamma: float = 1.0,
    include_background: bool = True, batch: bool = False,
    smooth_nr: float = 1e-5, smooth_dr: float = 1e-5,
    weight: Any = None, reduction: str = "mean", squared: bool = False,
    activation: str | None = None, ignore_index: int | None = None,
    channel_axis: int | None = None, validate: bool | None = None,
    regions: Any = None, region_count: int | None = None,
) -> Any:  # fmt: skip
    """Tversky loss, (1 − TI)^γ of every class, times w; `fastloss.Tversky`.

    TI = (O + s_nr) / (O + α (P−O) + β (G−O) + s_dr).

    Args:
        alpha: α, at least 0: what false positives weigh.
        beta: β, at least 0: what false negatives weigh. α = β = ½ is Dice.
        gamma: γ, above 0; another than 1 makes it the focal Tversky loss.
        reduction: "mean" over samples and classes, "sum", or "none": (B, C).

    Sources: Salehi et al. 2017, "Tversky loss function for image segmentation"; Abraham & Khan
    2018, "A Novel Focal Tversky loss function" (whose exponent 1/γ is γ here).

    >>> import numpy as np, fastloss as fl
    >>> p, g = np.array([[[1.0, 1, 0, 0]]]), np.array([[[1.0, 0, 1, 1]]])
    >>> print(round(float(fl.tversky_loss(p, g, activation="none", alpha=0.3, beta=0.7)), 3))
    0.63
    """
    region = _region(include_background, batch, smooth_nr, smooth_dr, weight, reduction, squared)
    own = (*region[0], "alpha", "beta", "gamma"), (*region[1], alpha, beta, gamma)
    whole = (activation, ignore_index, channel_axis, validate)
    arrays = (logits, target, voxel_weight)
    return value_of(arrays, whole, (regions, region_count), (1.0, Tversky, *own))


def generalized_dice_loss(
    logits: Any, target: Any, voxel_weight: Any = None, *,
    weighting: str = "square",
    include_background: bool = True, batch: bool = False,
    smooth_nr: float = 1e-5, smooth_dr: float = 1e-5,
    weight: Any = None, reduction: str = "mean", squared: bool = False,
    activation: str | None = None, ignore_index: int | None = None,
    channel_axis: int | None = None, validate: bool | None = None,
    regions: Any = None, region_count: int | None = None,
) -> Any:  # fmt: skip
    """Generalised Dice loss, 1 − (2 Σ_c v_c O_c + s_nr) / (Σ_c v_c (P_c + G_c) + s_dr).

    One value for all classes; `fastloss.GeneralizedDice`.

    Args:
        weighting: v_c: w_c/G² ("square"), w_c/G ("simple") or w_c ("uniform"). An absent class gets
            the largest finite one of its sample, 1 if all are absent.
        reduction: "mean" over samples, "sum", or "none": (B, 1).

    Source: Sudre et al. 2017, "Generalised Dice overlap as a deep learning loss function".

    >>> import numpy as np, fastloss as fl
    >>> p, labels = np.array([[[1.0, 1, 0, 0], [0, 0, 1, 1]]]), np.array([[0, 1, 1, 1]])
    >>> print(round(float(fl.generalized_dice_loss(p, labels, activation="none")), 3))
    0.312
    """
    region = _region(include_background, batch, smooth_nr, smooth_dr, weight, reduction, squared)
    own = (*region[0], "weighting"), (*region[1], weighting)
    whole = (activation, ignore_index, channel_axis, validate)
    arrays = (logits, target, voxel_weight)
    return value_of(arrays, whole, (regions, region_count), (1.0, GeneralizedDice, *own))


def mcc_loss(
    logits: Any, target: Any, voxel_weight: Any = None, *,
    include_background: bool = True, batch: bool = False,
    smooth_nr: float = 0.0, smooth_dr: float = 1e-5,
    weight: Any = None, reduction: str = "mean",
    activation: str | None = None, ignore_index: int | None = None,
    channel_axis: int | None = None, validate: bool | None = None,
    regions: Any = None, region_count: int | None = None,
) -> Any:  # fmt: skip
    """1 − the Matthews correlation coefficient of every class, times w; `fastloss.MCC`.

    It is (n O − P G + s_nr) / √(P G (n−P) (n−G) + s_dr), n being the sum of the voxel weights.

    Args:
        reduction: "mean" over samples and classes, "sum", or "none": (B, C).

    Source: Abhishek & Hamarneh 2021, "Matthews correlation coefficient loss for deep convolutional
    networks: application to skin lesion segmentation".

    >>> import numpy as np, fastloss as fl
    >>> p, g = np.array([[[1.0, 0, 0, 0]]]), np.array([[[1.0, 1, 0, 0]]])
    >>> print(round(float(fl.mcc_loss(p, g, activation="none")), 3))  # 1 − 2/√12
    0.423
    """
    own = (
        ("include_background", "batch", "smooth_nr", "smooth_dr", "weight", "reduction"),
        (include_background, batch, smooth_nr, smooth_dr, weight, reduction),
    )
    whole = (activation, ignore_index, channel_axis, validate)
    arrays = (logits, target, voxel_weight)
    return value_of(arrays, whole, (regions, region_count), (1.0, MCC, *own))


def dice_ce_loss(
    logits: Any, target: Any, voxel_weight: Any = None, *,
    include_background: bool = True, batch: bool = False,
    smooth_nr: float = 1e-5, smooth_dr: float = 1e-5,
    weight: Any = None, reduction: str = "mean", squared: bool = False,
    label_smoothing: float = 0.0, ce_weight: Any = None,
    dice_factor: Any = 1.0, ce_factor: Any = 1.0,
    activation: str | None = None, ignore_index: int | None = None,
    channel_axis: int | None = None, validate: bool | None = None,
    regions: Any = None, region_count: int | None = None,
) -> Any:  # fmt: skip
    """``dice_factor`` · `dice_loss` + ``ce_factor`` · `cross_entropy_loss`, in the same two passes.

    Args:
        label_smoothing: of the cross-entropy.
        ce_weight: ``weight`` of the cross-entropy; ``weight`` is that of Dice.
        reduction: "mean" or "sum" of both; "none": Dice of each sample and class, (B, C), to which
            the mean cross-entropy of the sample is added.
        others: as of `dice_loss`.

    Source: Isensee et al. 2021, "nnU-Net: a self-configuring method for deep learning-based
    biomedical image segmentation".

    >>> import numpy as np, fastloss as fl
    >>> logits, labels = np.zeros((1, 2, 4)), np.array([[0, 0, 1, 1]])
    >>> print(round(float(fl.dice_ce_loss(logits, labels, ce_factor=2)), 3))  # 0.5 + 2 log 2
    1.886
    """
    _refuse_gradient("ce_weight", ce_weight)
    dice = _region(include_background, batch, smooth_nr, smooth_dr, weight, reduction, squared)
    other = ("weight", "label_smoothing", "reduction"), (ce_weight, label_smoothing, reduction)
    whole = (activation, ignore_index, channel_axis, validate)
    arrays = (logits, target, voxel_weight)
    return value_of(
        arrays,
        whole,
        (regions, region_count),
        (dice_factor, Dice, *dice),
        (ce_factor, CrossEntropy, *other),
    )


def dice_focal_loss(
    logits: Any, target: Any, voxel_weight: Any = None, *,
    include_background: bool = True, batch: bool = False,
    smooth_nr: float = 1e-5, smooth_dr: float = 1e-5,
    weight: Any = None, reduction: str = "mean", squared: bool = False,
    gamma: float = 2.0, alpha: Any = None,
    dice_factor: Any = 1.0, focal_factor: Any = 1.0,
    activation: str | None = None, ignore_index: int | None = None,
    channel_axis: int | None = None, validate: bool | None = None,
    regions: Any = None, region_count: int | None = None,
) -> Any:  # fmt: skip
    """``dice_factor`` · `dice_loss` + ``focal_factor`` · `focal_loss`, in the same two passes.

    Args:
        gamma: γ of the focal loss.
        alpha: α of the focal loss; ``weight`` is that of Dice.
        reduction: "mean" or "sum" of both; "none": Dice of each sample and class, (B, C), to which
            the mean focal loss of the sample is added.
        others: as of `dice_loss`.

    Source: Zhu et al. 2019, "AnatomyNet: deep learning for fast and fully automated whole-volume
    segmentation of head and neck anatomy".

    >>> import numpy as np, fastloss as fl
    >>> logits, labels = np.zeros((1, 2, 4)), np.array([[0, 0, 1, 1]])
    >>> print(round(float(fl.dice_focal_loss(logits, labels, gamma=1)), 3))  # 0.5 + 0.5 log 2
    0.847
    """
    dice = _region(include_background, batch, smooth_nr, smooth_dr, weight, reduction, squared)
    other = ("gamma", "alpha", "reduction"), (gamma, alpha, reduction)
    whole = (activation, ignore_index, channel_axis, validate)
    arrays = (logits, target, voxel_weight)
    return value_of(
        arrays,
        whole,
        (regions, region_count),
        (dice_factor, Dice, *dice),
        (focal_factor, Focal, *other),
    )


def dice_ce(
    *,
    dice_factor: Any = 1.0,
    ce_factor: Any = 1.0,
    label_smoothing: float = 0.0,
    ce_weight: Any = None,
    reduction: str = "mean",
    **options: Any,
) -> Loss:
    """The loss of `dice_ce_loss`; the other options are those of `fastloss.Dice`."""
    _refuse_gradient("ce_weight", ce_weight)
    entropy = CrossEntropy(weight=ce_weight, label_smoothing=label_smoothing, reduction=reduction)
    dice = Dice(reduction=reduction, **options)
    return Loss(_times("dice_factor", dice_factor, dice), _times("ce_factor", ce_factor, entropy))


def dice_focal(
    *,
    dice_factor: Any = 1.0,
    focal_factor: Any = 1.0,
    gamma: float = 2.0,
    alpha: Any = None,
    reduction: str = "mean",
    **options: Any,
) -> Loss:
    """The loss of `dice_focal_loss`; the other options are those of `fastloss.Dice`."""
    focal = Focal(gamma=gamma, alpha=alpha, reduction=reduction)
    dice = Dice(reduction=reduction, **options)
    return Loss(
        _times("dice_factor", dice_factor, dice), _times("focal_factor", focal_factor, focal)
    )


_LOSS_OPTIONS = ("activation", "ignore_index", "channel_axis", "validate")
_PLAIN = frozenset({str, int, float, bool, type(None)})
_Part = tuple[Any, type[Term], tuple[str, ...], tuple[Any, ...]]
"""The factor of a term, its class, and names and values of its options."""
_FACTORS: dict[Any, str] = {Dice: "dice_factor", CrossEntropy: "ce_factor", Focal: "focal_factor"}
_REGION = (
    "include_background", "batch", "smooth_nr", "smooth_dr", "weight", "reduction", "squared",
)  # fmt: skip


def _region(*values: Any) -> tuple[tuple[str, ...], tuple[Any, ...]]:
    """The options of `fastloss.RegionTerm`."""
    return _REGION, values


def value_of(
    arrays: tuple[Any, Any, Any],
    whole: tuple[Any, ...],
    regions: tuple[Any, int | None],
    *parts: _Part,
    fields: Any = None,
) -> Any:
    """The value of a loss of these terms.

    Args:
        arrays: logits, target and voxel weight.
        whole: activation, ignore index, channel axis and whether to validate.
        regions: they, and their number.
        parts: of every term its factor, class, and names and values of its options.
    """
    adapter = adapter_of(arrays[0], "logits")
    extras = Extras.of(fields, *regions)
    if adapter.takes_numbers(arrays[0], ()):
        return _evaluated(adapter, arrays, whole, extras, parts)
    plain = _PLAIN.issuperset(map(type, whole))
    for factor, kind, _, values in parts:
        if isinstance(factor, bool):  # or it would be 1 of an earlier call
            raise TypeError(f"{_FACTORS[kind]}: expected a number, got {factor!r}")
        if not _PLAIN.issuperset(map(type, values)):
            plain = False
            if adapter.takes_numbers(arrays[0], values):
                return _evaluated(adapter, arrays, whole, extras, parts)
        plain = plain and type(factor) in _PLAIN
    if not plain:
        whole = _all_hashable(_LOSS_OPTIONS, whole)
        parts = tuple(
            (_hashable(_FACTORS.get(kind, ""), factor), kind, names, _all_hashable(names, values))
            for factor, kind, names, values in parts
        )
    return adapter.value(_made(whole, parts, *[part[0] for part in parts]), *arrays, extras=extras)


def _evaluated(
    adapter: Adapter,
    arrays: tuple[Any, Any, Any],
    whole: tuple[Any, ...],
    extras: Extras | None,
    parts: tuple[_Part, ...],
) -> Any:
    """The value, where the adapter takes numbers for operands."""
    recipes = []
    for factor, kind, names, values in parts:
        for name, value in zip(names, values, strict=True):
            _refuse_gradient(name, value)
        recipes.append(recipe(kind, dict(zip(names, values, strict=True)), factor))
    options = tuple(zip(_LOSS_OPTIONS, whole, strict=True))
    return adapter.evaluate(options, recipes, *arrays, extras)


def _times(name: str, factor: Any, term: Term) -> Loss:
    number = factor_of(name, factor)
    if number is None:
        raise TypeError(f"{name}: expected a number, got {factor!r}")
    return number * term


def _refuse_gradient(name: str, value: Any) -> None:
    if value is not None and not isinstance(value, (bool, int, float, str, list, tuple)):
        refuse_gradient(name, value)


def _all_hashable(names: tuple[str, ...], values: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(_hashable(name, value) for name, value in zip(names, values, strict=True))


def _hashable(name: str, value: Any) -> Any:
    if value is None or isinstance(value, (str, int, float)):
        return value
    refuse_gradient(name, value)
    if isinstance(value, (tuple, frozenset)):
        return value
    array = np.asarray(readable(name, value))
    if not isinstance(value, (list, np.ndarray)):
        array = array.reshape(-1) if array.ndim else array
    if array.dtype == object:
        raise TypeError(f"{name}: expected a number, or one per class, got {value!r}")
    if array.ndim == 0:
        return array.item()
    return tuple(array.tolist() if array.ndim == 1 else map(tuple, array.tolist()))


@lru_cache(maxsize=256, typed=True)
def _made(whole: tuple[Any, ...], parts: tuple[_Part, ...], *_factors: Any) -> Loss:
    """The loss of these terms and options, made once.

    The factors of the parts are passed again for their types: True is equal to 1.0, and no factor.
    """
    terms = [
        _times(_FACTORS.get(kind, ""), factor, kind(**dict(zip(names, values, strict=True))))
        for factor, kind, names, values in parts
    ]
    return Loss(*terms, **dict(zip(_LOSS_OPTIONS, whole, strict=True)))
