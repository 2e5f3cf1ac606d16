"""The losses of every lesion, each as one function call.

As in `fastloss.functional`, which says what their arguments mean, and `fastloss.PerRegion`, which
says what a lesion and its region are. They also take

- fields: ``{"regions": …}``, as `fastloss.Loss.fields` makes it ahead; or the same as regions.
  None: the regions are made of the target in every call.
- dice_factor, ce_factor: of Dice and of the cross-entropy of each lesion, at least 0.
- weight: how lesions are weighed: "equal", "inverse_volume" or "inverse_sqrt_volume".
- without: what a sample without lesions adds: "whole", the terms of the whole sample, or "skip".
- per_class: whether the lesions of each class are apart from those of the others.
- connectivity: 26, 18 or 6 in 3D, 8 or 4 in 2D; None: the most.
"""

from __future__ import annotations

from typing import Any

from fastloss.functional import value_of
from fastloss.options import factor_of
from fastloss.terms import BlobDiceCE, CCDiceCE, CrossEntropy, Dice

_NAMES = (
    "dice_factor", "ce_factor", "smooth_nr", "smooth_dr", "weight", "without", "per_class",
    "connectivity",
)  # fmt: skip


def cc_dice_ce_loss(
    logits: Any, target: Any, voxel_weight: Any = None, *,
    dice_factor: float = 1.0, ce_factor: float = 1.0,
    smooth_nr: float = 1e-5, smooth_dr: float = 1e-5,
    weight: str = "equal", without: str = "whole", per_class: bool = False,
    connectivity: int | None = None, spacing: Any = None, reduction: str = "mean",
    activation: str | None = None, ignore_index: int | None = None,
    channel_axis: int | None = None, validate: bool | None = None,
    fields: Any = None, regions: Any = None, region_count: int | None = None,
) -> Any:  # fmt: skip
    """Connected-component Dice + cross-entropy, the mean over lesions; `fastloss.CCDiceCE`.

    Each voxel belongs to the lesion that is nearest to it.

    Args:
        spacing: the size of a voxel, one number or one per spatial axis; None: 1.
        reduction: "mean" over the samples, "sum", or "none": (B, 1).

    Source: Bouteille et al. 2025, "Learning to Look Closer: a new instance-wise loss for small
    cerebral lesion segmentation".

    >>> import numpy as np, fastloss as fl
    >>> logits, labels = np.zeros((1, 2, 8)), np.array([[1, 0, 0, 0, 0, 0, 1, 1]])
    >>> value = fl.cc_dice_ce_loss(logits, labels)  # (1 − 1/3 + 1 − 2/4)/2 + log 2
    >>> print(round(float(value), 3))
    1.276
    """
    smooth = (smooth_nr, smooth_dr)
    values = (dice_factor, ce_factor, *smooth, weight, without, per_class, connectivity)
    part = ((*_NAMES, "spacing", "reduction"), (*values, spacing, reduction))
    whole = (activation, ignore_index, channel_axis, validate)
    arrays = (logits, target, voxel_weight)
    return value_of(arrays, whole, (regions, region_count), (1.0, CCDiceCE, *part), fields=fields)


def blob_loss(
    logits: Any, target: Any, voxel_weight: Any = None, *,
    alpha: float = 2.0, beta: float = 1.0,
    dice_factor: float = 1.0, ce_factor: float = 1.0,
    include_background: bool = False,
    smooth_nr: float = 1e-5, smooth_dr: float = 1e-5,
    weight: str = "equal", without: str = "skip", per_class: bool = False,
    connectivity: int | None = None,
    activation: str | None = None, ignore_index: int | None = None,
    channel_axis: int | None = None, validate: bool | None = None,
    fields: Any = None, regions: Any = None, region_count: int | None = None,
) -> Any:  # fmt: skip
    """Blob loss, α (Dice + cross-entropy) + β · its mean over the lesions; `fastloss.BlobLoss`.

    For a lesion the other lesions are left out, and the background counts.

    Args:
        alpha, beta: α and β.
        include_background: whether class 0 counts in the Dice of the whole sample.

    Source: Kofler et al. 2023, "blob loss: instance imbalance aware loss functions for semantic
    segmentation".

    >>> import numpy as np, fastloss as fl
    >>> logits, labels = np.zeros((1, 2, 8)), np.array([[1, 0, 0, 0, 0, 0, 1, 1]])
    >>> value = fl.blob_loss(logits, labels)  # 2 (1 − 3/7) + (1 − 1/4 + 1 − 4/11)/2 + 3 log 2
    >>> print(round(float(value), 3))
    3.915
    """
    smooth = (smooth_nr, smooth_dr)
    names = ("include_background", "smooth_nr", "smooth_dr")
    dice = _product("alpha", alpha, "dice_factor", dice_factor)
    entropy = _product("alpha", alpha, "ce_factor", ce_factor)
    values = (dice_factor, ce_factor, *smooth, weight, without, per_class, connectivity)
    return value_of(
        (logits, target, voxel_weight),
        (activation, ignore_index, channel_axis, validate),
        (regions, region_count),
        (dice, Dice, names, (include_background, *smooth)),
        (entropy, CrossEntropy, (), ()),
        (beta, BlobDiceCE, _NAMES, values),
        fields=fields,
    )


def _product(name: str, value: Any, other_name: str, other: Any) -> float:
    numbers = [factor_of(n, v) for n, v in ((name, value), (other_name, other))]
    for n, v, number in zip((name, other_name), (value, other), numbers, strict=True):
        if number is None:
            raise TypeError(f"{n}: expected a number, got {v!r}")
    return float(numbers[0] * numbers[1])  # type: ignore[operator]
