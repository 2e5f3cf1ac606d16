"""The fast path: softmax of a label map, and the sums that most losses are made of."""

# mypy: ignore-errors
# What Numba compiles has no types that mypy could check.

from __future__ import annotations

import numpy as np

from fastloss.backends.numba.kernels import inner, kernel
from fastloss.backends.numba.maths import log1p
from fastloss.backends.numba.rows import (
    exp_row,
    largest_row,
    masked_row,
    summing,
    total,
    voxel_weights,
)
from fastloss.sums import (
    CROSS_ENTROPY,
    OVERLAP,
    PREDICTED,
    PREDICTED_SQUARED,
    REFERENCE,
    REFERENCE_SQUARED,
)

SUMS = (REFERENCE, OVERLAP, PREDICTED, CROSS_ENTROPY, PREDICTED_SQUARED, REFERENCE_SQUARED)
"""All that this path computes, in the order of its results."""

_LARGEST, _REST, _INVERSE, _WEIGHT, _TOTAL, _LOG = range(6)
ROWS = 6  # of scratch memory beside those of the classes


@kernel
def reduce(x, first, n, codes, weight, squared, tiles, rows, ints, sums, voxels):
    """Add the sums over n voxels from the first on to ``sums`` (6, 1, C) and ``voxels`` (1,).

    Args:
        x: (C, N) logits.
        codes: labels, (n,) int32, below 0 where a voxel counts for nothing.
        weight: (n,), or empty.
        squared: whether the sum of p² is wanted.
        tiles: scratch memory, (2, C, width) of x's dtype; rows: (ROWS, width); ints: (1, width).

    Returns how many of the weights are none.
    """
    bad = 0
    for start in range(0, n, tiles.shape[2]):
        stop = min(start + tiles.shape[2], n)
        bad += _softmax(x, first, start, stop, codes, weight, tiles, rows, ints)
        size = stop - start
        y, w = codes[start:stop], rows[_WEIGHT, :size]
        inverse, log_sum = rows[_INVERSE, :size], rows[_LOG, :size]
        largest = rows[_LARGEST, :size]
        rest = rows[_REST, :size]
        for i in range(size):
            log_sum[i] = log1p(rest[i])
        voxels[0] += total(w)
        # NaN is in no label's cross-entropy but its own; it belongs into those of all classes.
        defined = total(inverse)
        for c in range(np.int32(x.shape[0])):
            logits, e = tiles[0, c, :size], tiles[1, c, :size]
            reference, overlap, predicted, entropy = _class_sums(
                logits, e, y, c, largest, inverse, log_sum, w
            )
            sums[0, 0, c] += reference
            sums[1, 0, c] += overlap
            sums[2, 0, c] += predicted
            sums[3, 0, c] += entropy if defined == defined else np.nan
            sums[5, 0, c] += reference
            if squared:
                sums[4, 0, c] += _squared_sum(e, inverse, w)
    return bad


@kernel
def apply(x, first, n, codes, weight, coefficients, out, first_out, tiles, rows, ints):
    """Write the gradient to n voxels of ``out`` (C, N), from ``first_out`` on.

    ``coefficients``, (6, 1, C), are the derivatives by the sums.
    """
    for start in range(0, n, tiles.shape[2]):
        stop = min(start + tiles.shape[2], n)
        _softmax(x, first, start, stop, codes, weight, tiles, rows, ints)
        size = stop - start
        y, w, at = codes[start:stop], rows[_WEIGHT, :size], ints[0, :size]
        inverse, q = rows[_INVERSE, :size], rows[_REST, :size]
        of_all, of_others = rows[_TOTAL, :size], rows[_LARGEST, :size]
        of_all[:] = 0
        of_others[:] = 0
        for i in range(size):
            q[i] *= inverse[i]  # 1 − p of the class of the largest logit
        for c in range(np.int32(x.shape[0])):
            p = tiles[1, c, :size]
            for i in range(size):
                p[i] *= inverse[i]
            k = _by_p(coefficients, c)
            _add_slopes(p, y, c, k, at, of_all, of_others)
        for c in range(np.int32(x.shape[0])):
            p = tiles[1, c, :size]
            k = _by_p(coefficients, c)
            to = out[c, first_out + start : first_out + stop]
            _gradient_row(p, y, c, k, at, q, of_all, of_others, w, to)


@inner
def _softmax(x, first, start, stop, codes, weight, tiles, rows, ints):
    """Logits, e^(x − largest), the sum of these without the largest, and the inverse of all."""
    size = stop - start
    w, largest, at = rows[_WEIGHT, :size], rows[_LARGEST, :size], ints[0, :size]
    rest, inverse = rows[_REST, :size], rows[_INVERSE, :size]
    bad = voxel_weights(weight, codes, codes[:0], start, w)
    for c in range(np.int32(x.shape[0])):
        logits = tiles[0, c, :size]
        masked_row(x[c, first + start : first + stop], w, logits)
        largest_row(logits, c, largest, at)
    rest[:] = 0
    for c in range(np.int32(x.shape[0])):
        exp_row(tiles[0, c, :size], largest, at, c, tiles[1, c, :size], rest)
    one = x.dtype.type(1)
    for i in range(size):
        inverse[i] = one / (one + rest[i])
    return bad


@inner
def _cross_entropy(x, largest, log_sum, zero):
    return log_sum - (zero if x == largest else x - largest)


@summing
def _class_sums(x, e, y, c, largest, inverse, log_sum, w):
    zero = e.dtype.type(0)
    reference = overlap = predicted = entropy = zero
    for i in range(len(e)):
        p = e[i] * inverse[i]
        own = w[i] if y[i] == c else zero
        reference += own
        overlap += own * p
        predicted += w[i] * p
        # A chosen product, as 0 times an infinite one is none.
        entropy += own * _cross_entropy(x[i], largest[i], log_sum[i], zero) if y[i] == c else zero
    return reference, overlap, predicted, entropy


@summing
def _squared_sum(e, inverse, w):
    result = e.dtype.type(0)
    for i in range(len(e)):
        p = e[i] * inverse[i]
        result += w[i] * p * p
    return result


@inner
def _by_p(coefficients, c):
    """Of class c the coefficients of p, p², g p and −g log p."""
    k = coefficients
    return k[2, 0, c], k[4, 0, c] + k[4, 0, c], k[1, 0, c], k[3, 0, c]


@inner
def _slope(p, own, k):
    """The derivative of the sums by log p, of a voxel of weight 1."""
    result = (k[0] + k[1] * p) * p
    return result + (k[2] * p - k[3]) if own else result


@inner
def _add_slopes(p, y, c, k, at, of_all, of_others):
    zero = p.dtype.type(0)
    for i in range(len(p)):
        slope = _slope(p[i], y[i] == c, k)
        of_all[i] += slope
        of_others[i] += zero if at[i] == c else slope


@inner
def _gradient_row(p, y, c, k, at, q, of_all, of_others, w, out):
    """slope − p · Σ slopes, where p is near 1 from 1 − p and the slopes of the other classes."""
    one = p.dtype.type(1)
    for i in range(len(out)):
        largest, one_less, all_slopes, other_slopes = at[i] == c, q[i], of_all[i], of_others[i]
        slope = _slope(p[i], y[i] == c, k) * (one_less if largest else one)
        out[i] = w[i] * (slope - p[i] * (other_slopes if largest else all_slopes))
