"""Labels compared and counted, in NumPy: the definition, and the fallback without C++."""

from __future__ import annotations

import numpy as np


def likeliest(scores: np.ndarray, dtype: str, out: np.ndarray) -> None:
    """Write the class of the largest score, the first of those that are equal; NaN is larger.

    Args:
        scores: (B, C, z, y, x) of floating numbers, in any strides; bfloat16 as uint16.
        dtype: that of the scores.
        out: (B, z, y, x) of uint8 or uint16, in C order.
    """
    for sample, labels in zip(scores, out, strict=True):
        if dtype == "bfloat16":
            sample = (sample.astype(np.uint32) << 16).view(np.float32)
        labels[...] = sample.argmax(axis=0)


def confusion(prediction: np.ndarray, reference: np.ndarray, counts: np.ndarray) -> None:
    """Write how many voxels of each class index of the reference are predicted as each.

    Args:
        prediction, reference: class indices, (B, z, y, x) of uint8 or uint16, in C order.
        counts: (B, indices, indices) of int64: ``counts[b, r, p]``. All indices are below that.
    """
    indices = counts.shape[1]
    for predicted, true, to in zip(prediction, reference, counts, strict=True):
        pairs = true.ravel().astype(np.int64) * indices + predicted.ravel()
        to[...] = np.bincount(pairs, minlength=indices**2).reshape(indices, indices)
