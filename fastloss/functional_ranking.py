"""The losses that rank voxels, each as one function call.

As in `fastloss.functional`, which says what their arguments mean. Of Lovász losses there are no
regions: voxels are ranked in whole samples. Exact ones take arrays in CPU memory alone.
"""

from __future__ import annotations

from typing import Any

from fastloss.functional import value_of
from fastloss.terms import LovaszHinge, LovaszSoftmax, OHEMCrossEntropy

_NAMES = ("classes", "per_sample", "method")


def lovasz_softmax_loss(
    logits: Any, target: Any, voxel_weight: Any = None, *,
    classes: Any = "present", per_sample: bool = False, method: str = "histogram",
    activation: str | None = None, ignore_index: int | None = None,
    channel_axis: int | None = None, validate: bool | None = None,
) -> Any:  # fmt: skip
    """Lovász-Softmax, the mean over classes of Σ e ΔJ; `fastloss.LovaszSoftmax`.

    e = |g − p| is sorted downwards, and ΔJ are the steps of the Jaccard loss over that list.

    Args:
        classes: "present", those that occur; "all"; or a list of classes.
        per_sample: rank the voxels of every sample apart, in place of those of the batch.
        method: "histogram", or "exact", which sorts.

    Source: Berman et al. 2018, "The Lovász-Softmax loss: a tractable surrogate for the optimization
    of the intersection-over-union measure in neural networks".

    >>> import numpy as np, fastloss as fl
    >>> p, labels = np.array([[[0.9, 0.4], [0.1, 0.6]]]), np.array([[0, 0]])
    >>> print(round(float(fl.lovasz_softmax_loss(p, labels, activation="none")), 3))
    0.35
    """
    own = _NAMES, (_hashable(classes), per_sample, method)
    whole = (activation, ignore_index, channel_axis, validate)
    arrays = (logits, target, voxel_weight)
    return value_of(arrays, whole, (None, None), (1.0, LovaszSoftmax, *own))


def lovasz_hinge_loss(
    logits: Any, target: Any, voxel_weight: Any = None, *,
    classes: Any = "all", per_sample: bool = False, method: str = "histogram",
    activation: str | None = "sigmoid", ignore_index: int | None = None,
    channel_axis: int | None = None, validate: bool | None = None,
) -> Any:  # fmt: skip
    """Lovász hinge, the mean over channels of Σ h ΔJ; `fastloss.LovaszHinge`.

    h = max(0, 1 − x) of the foreground and max(0, 1 + x) of the background, sorted; x: the logits.

    Args:
        classes, per_sample, method: as in `lovasz_softmax_loss`.
        activation: "sigmoid".

    Source: Berman et al. 2018, as above.

    >>> import numpy as np, fastloss as fl
    >>> logits, mask = np.array([[[2.0, 0.5, -3.0]]]), np.array([[1, 1, 0]])
    >>> print(round(float(fl.lovasz_hinge_loss(logits, mask)), 3))
    0.25
    """
    own = _NAMES, (_hashable(classes), per_sample, method)
    whole = (activation, ignore_index, channel_axis, validate)
    arrays = (logits, target, voxel_weight)
    return value_of(arrays, whole, (None, None), (1.0, LovaszHinge, *own))


def ohem_cross_entropy_loss(
    logits: Any, target: Any, voxel_weight: Any = None, *,
    threshold: float = 0.7, min_kept: int = 100_000, weight: Any = None,
    activation: str | None = None, ignore_index: int | None = None,
    channel_axis: int | None = None, validate: bool | None = None,
    regions: Any = None, region_count: int | None = None,
) -> Any:  # fmt: skip
    """The cross-entropy of the voxels whose label is least likely; `fastloss.OHEMCrossEntropy`.

    Args:
        threshold: voxels whose label has a smaller probability are kept; above 0 and at most 1.
        min_kept: the least number of voxels, those of the lowest probability.

    Source: Shrivastava et al. 2016, "Training region-based object detectors with online hard
    example mining", in the form for segmentation.

    >>> import numpy as np, fastloss as fl
    >>> logits, labels = np.log([[[0.9, 0.5, 0.8], [0.1, 0.5, 0.2]]]), np.array([[0, 0, 1]])
    >>> value = fl.ohem_cross_entropy_loss(logits, labels, min_kept=1)
    >>> print(round(float(value), 3))  # (−log 0.5 − log 0.2)/2
    1.151
    """
    own = ("threshold", "min_kept", "weight"), (threshold, min_kept, weight)
    whole = (activation, ignore_index, channel_axis, validate)
    arrays = (logits, target, voxel_weight)
    return value_of(arrays, whole, (regions, region_count), (1.0, OHEMCrossEntropy, *own))


def _hashable(classes: Any) -> Any:
    return classes if isinstance(classes, str) or not hasattr(classes, "__iter__") else (*classes,)
