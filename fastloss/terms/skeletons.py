"""Skeletons of thin structures, by scikit-image."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastloss.frameworks import adapter_of
from fastloss.options import check_dilations


def skeleton(labels: Any, *, dilations: int = 2) -> Any:
    """The labels near the skeleton of what is not 0, and 0 elsewhere.

    `fastloss.SkeletonRecall` reads them, so that a data loader can make them: ``fields={"skeleton":
    fl.skeleton(labels)}``. Each sample has one skeleton, of all labels but 0 together.

    Args:
        labels: (B, *spatial) of integers or bool, of 2 or 3 spatial axes; NumPy, or anything with
            ``__dlpack__`` in CPU memory. Negative labels count as 0.
        dilations: how often the skeleton is dilated, by the voxels that share a face, at least 0.

    Returns:
        An array of the same shape, dtype and framework (of one that allocates none, NumPy's).

    Raises:
        ImportError: scikit-image is not installed.
        TypeError, ValueError: an argument of the wrong dtype, rank or range.

    Source: Kirchhoff et al. 2024, "Skeleton recall loss for connectivity conserving and resource
    efficient segmentation of thin tubular structures".
    """
    dilations = check_dilations(dilations)
    adapter = adapter_of(labels, "labels")
    array, dtype, place = adapter.borrow(labels, "labels")
    if place is not None:
        raise TypeError("labels: expected an array in CPU memory, got one on a GPU")
    if array.dtype.kind not in "biu" or dtype == "bfloat16":
        raise TypeError(f"labels: expected integers or bool, got {dtype}")
    if array.ndim not in (3, 4):
        raise ValueError(
            f"labels: expected (batch, *spatial) of 2 or 3 spatial axes, got shape {array.shape}"
        )
    found = np.zeros(array.shape, array.dtype)
    for one, to in zip(array, found, strict=True):
        there = tube(one > 0, dilations)
        to[there] = one[there]
    result: Any = adapter.result(found)
    return result


def tube(mask: np.ndarray, dilations: int) -> np.ndarray:
    """The skeleton of one mask, (*spatial) bool, dilated, within the mask.

    Raises:
        ImportError: scikit-image is not installed.
        ValueError: not 2 or 3 spatial axes.
    """
    if mask.ndim not in (2, 3):
        raise ValueError(
            f"target: a skeleton is defined for 2 or 3 spatial axes, got {mask.ndim}; pass fields="
        )
    try:
        from skimage.morphology import skeletonize
    except ImportError:
        raise ImportError(
            "skeletons are made by scikit-image, which is not installed: "
            "pip install 'fastloss[skeleton]'"
        ) from None
    if not mask.any():
        return np.zeros(mask.shape, bool)
    found: np.ndarray = np.asarray(skeletonize(np.ascontiguousarray(mask))) > 0
    for _ in range(dilations):
        wider = found.copy()
        for axis in range(found.ndim):
            to, near = np.moveaxis(wider, axis, 0), np.moveaxis(found, axis, 0)
            to[1:] |= near[:-1]
            to[:-1] |= near[1:]
        found = wider
    found &= mask
    return found
