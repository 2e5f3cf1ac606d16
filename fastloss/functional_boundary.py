"""The losses that compare boundaries, each as one function call.

As in `fastloss.functional`, which says what their arguments mean. They also take

- fields: the field that the loss reads, by its name, as `fastloss.Loss.fields` makes it ahead.
  None: it is made of the target in every call, which takes longer than the loss.
- spacing, where distances are measured: the size of a voxel, one number or one per spatial axis,
  above 0; None: 1.

A class is where the target is above ½. Ignored voxels are of no class.
"""

from __future__ import annotations

from typing import Any

from fastloss.functional import value_of
from fastloss.terms import (
    Boundary,
    BoundaryDoU,
    GeneralizedSurface,
    HausdorffDT,
    SkeletonRecall,
)


def boundary_loss(
    logits: Any, target: Any, voxel_weight: Any = None, *,
    spacing: Any = None,
    include_background: bool = True, batch: bool = False,
    weight: Any = None, reduction: str = "mean",
    activation: str | None = None, ignore_index: int | None = None,
    channel_axis: int | None = None, validate: bool | None = None,
    fields: Any = None, regions: Any = None, region_count: int | None = None,
) -> Any:  # fmt: skip
    """Boundary loss, the mean over the voxels of p φ, times w; `fastloss.Boundary`.

    φ is the signed distance to the boundary of the class: 1 − d within, d being the distance to the
    nearest voxel outside, and the distance to the class elsewhere; 0 where a sample has no voxel of
    the class, or no other. The field is called "boundary".

    Args:
        reduction: "mean" over samples and classes, "sum", or "none": (B, C).

    Source: Kervadec et al. 2019, "Boundary loss for highly unbalanced segmentation".

    >>> import numpy as np, fastloss as fl
    >>> p, labels = np.array([[[1.0, 1, 1, 0], [0, 0, 0, 1]]]), np.array([[0, 0, 1, 1]])
    >>> print(fl.boundary_loss(p, labels, activation="none"))
    -0.125
    """
    own = (
        ("spacing", "include_background", "batch", "weight", "reduction"),
        (spacing, include_background, batch, weight, reduction),
    )
    whole = (activation, ignore_index, channel_axis, validate)
    arrays = (logits, target, voxel_weight)
    part = (1.0, Boundary, *own)
    return value_of(arrays, whole, (regions, region_count), part, fields=fields)


def hausdorff_dt_loss(
    logits: Any, target: Any, voxel_weight: Any = None, *,
    alpha: float = 2.0, log: bool = False, spacing: Any = None,
    include_background: bool = True, batch: bool = False,
    weight: Any = None, reduction: str = "mean",
    activation: str | None = None, ignore_index: int | None = None,
    channel_axis: int | None = None, validate: bool | None = None,
    fields: Any = None, regions: Any = None, region_count: int | None = None,
) -> Any:  # fmt: skip
    """Hausdorff loss, the mean over the voxels of (p − g)² (D_p^α + D_g^α), times w.

    D_g and D_p are the distances to the boundary of the target, and of the voxels where p > ½, 0
    where there is no boundary; they have no gradient. `fastloss.HausdorffDT`. The field is called
    "distance", and is D_g.

    Args:
        alpha: α, above 0.
        log: log(1 + the loss), taken of what the reduction leaves.
        reduction: "mean" over samples and classes, "sum", or "none": (B, C).

    Source: Karimi & Salcudean 2019, "Reducing the Hausdorff distance in medical image segmentation
    with convolutional neural networks".

    >>> import numpy as np, fastloss as fl
    >>> p, labels = np.array([[[1.0, 1, 0, 0], [0, 0, 1, 1]]]), np.array([[0, 0, 0, 1]])
    >>> print(fl.hausdorff_dt_loss(p, labels, activation="none"))
    0.5
    """
    own = (
        ("alpha", "log", "spacing", "include_background", "batch", "weight", "reduction"),
        (alpha, log, spacing, include_background, batch, weight, reduction),
    )
    whole = (activation, ignore_index, channel_axis, validate)
    arrays = (logits, target, voxel_weight)
    part = (1.0, HausdorffDT, *own)
    return value_of(arrays, whole, (regions, region_count), part, fields=fields)


def generalized_surface_loss(
    logits: Any, target: Any, voxel_weight: Any = None, *,
    smooth_dr: float = 1e-5, spacing: Any = None,
    include_background: bool = False, batch: bool = False,
    weight: Any = None, reduction: str = "mean",
    activation: str | None = None, ignore_index: int | None = None,
    channel_axis: int | None = None, validate: bool | None = None,
    fields: Any = None, regions: Any = None, region_count: int | None = None,
) -> Any:  # fmt: skip
    """Generalised surface loss, 1 − Σ (D (1 − (g + p)))² / (Σ D² + s_dr), times w.

    D is the distance to the boundary of the target, the field "distance".
    `fastloss.GeneralizedSurface`.

    Args:
        reduction: "mean" over samples and classes, "sum", or "none": (B, C).

    Source: Celaya et al. 2023, "A generalized surface loss for reducing the Hausdorff distance in
    medical imaging segmentation".

    >>> import numpy as np, fastloss as fl
    >>> p, labels = np.array([[[1.0, 0, 0, 0], [0, 1, 1, 1]]]), np.array([[0, 0, 1, 1]])
    >>> print(round(float(fl.generalized_surface_loss(p, labels, activation="none")), 3))
    0.1
    """
    own = (
        ("smooth_dr", "spacing", "include_background", "batch", "weight", "reduction"),
        (smooth_dr, spacing, include_background, batch, weight, reduction),
    )
    whole = (activation, ignore_index, channel_axis, validate)
    arrays = (logits, target, voxel_weight)
    part = (1.0, GeneralizedSurface, *own)
    return value_of(arrays, whole, (regions, region_count), part, fields=fields)


def boundary_dou_loss(
    logits: Any, target: Any, voxel_weight: Any = None, *,
    smooth: float = 1e-5,
    include_background: bool = True, batch: bool = False,
    weight: Any = None, reduction: str = "mean",
    activation: str | None = None, ignore_index: int | None = None,
    channel_axis: int | None = None, validate: bool | None = None,
    fields: Any = None, regions: Any = None, region_count: int | None = None,
) -> Any:  # fmt: skip
    """Boundary difference over union, (Z + Y − 2 O + s) / (Z + Y − (1 + α) O + s), times w.

    Z = Σ p², Y = Σ g², and α = min(2 (1 − (K + s)/(S + s)) − 1, 0.8), K and S being the numbers of
    boundary voxels and of all voxels of a class. `fastloss.BoundaryDoU`. The field is called
    "boundary_voxels". The paper sums over the batch first: ``batch=True``.

    Args:
        smooth: s, above 0.
        reduction: "mean" over samples and classes, "sum", or "none": (B, C).

    Source: Sun et al. 2023, "Boundary difference over union loss for medical image segmentation".

    >>> import numpy as np, fastloss as fl
    >>> p, g = np.array([[[0.0, 1, 1, 0, 0]]]), np.array([[[0.0, 1, 1, 1, 0]]])
    >>> print(round(float(fl.boundary_dou_loss(p, g, activation="none")), 3))  # 3/11
    0.273
    """
    own = (
        ("smooth", "include_background", "batch", "weight", "reduction"),
        (smooth, include_background, batch, weight, reduction),
    )
    whole = (activation, ignore_index, channel_axis, validate)
    arrays = (logits, target, voxel_weight)
    part = (1.0, BoundaryDoU, *own)
    return value_of(arrays, whole, (regions, region_count), part, fields=fields)


def skeleton_recall_loss(
    logits: Any, target: Any, voxel_weight: Any = None, *,
    dilations: int = 2, smooth_nr: float = 1e-5, smooth_dr: float = 1e-5,
    include_background: bool = False, batch: bool = False,
    weight: Any = None, reduction: str = "mean",
    activation: str | None = None, ignore_index: int | None = None,
    channel_axis: int | None = None, validate: bool | None = None,
    fields: Any = None, regions: Any = None, region_count: int | None = None,
) -> Any:  # fmt: skip
    """Skeleton recall, 1 − (Σ p s + s_nr) / (Σ s + s_dr), times w; `fastloss.SkeletonRecall`.

    s is the skeleton of the target, dilated, the field "skeleton": of a label map that of all
    classes but 0 together, with sigmoid and a dense target each channel's own.

    Args:
        dilations: how often the skeleton is dilated, by the voxels that share a face, at least 0.
        reduction: "mean" over samples and classes, "sum", or "none": (B, C).

    Raises:
        ImportError: in a call without the field, where scikit-image is not installed.

    Source: Kirchhoff et al. 2024, "Skeleton recall loss for connectivity conserving and resource
    efficient segmentation of thin tubular structures".

    >>> import numpy as np, fastloss as fl
    >>> p, s = np.full((1, 2, 3, 3), 0.5), np.array([[[0, 0, 0], [1, 1, 1], [0, 0, 0]]])
    >>> fields = {"skeleton": s}  # as `fastloss.skeleton` makes it
    >>> print(round(float(fl.skeleton_recall_loss(p, s, activation="none", fields=fields)), 3))
    0.5
    """
    own = (
        (
            "dilations",
            "smooth_nr",
            "smooth_dr",
            "include_background",
            "batch",
            "weight",
            "reduction",
        ),
        (dilations, smooth_nr, smooth_dr, include_background, batch, weight, reduction),
    )
    whole = (activation, ignore_index, channel_axis, validate)
    arrays = (logits, target, voxel_weight)
    part = (1.0, SkeletonRecall, *own)
    return value_of(arrays, whole, (regions, region_count), part, fields=fields)
