"""The fast path: softmax of a label map, and the common sums."""

# mypy: ignore-errors
# mypy cannot check functions that Numba compiles.

from __future__ import annotations

import numpy as np

from fastloss.backends.numba.kernels import inner, kernel, summing
from fastloss.backends.numba.rows import (
    INVERSE,
    LARGEST,
    LOGITS,
    OF_ALL,
    WEIGHT,
    P,
    add_slopes,
    difference,
    gradient,
    largest_row,
    log_sum_row,
    softmax,
    total,
    voxel_weights,
)
from fastloss.sums import NAMED

_NAMES = "reference overlap predicted cross_entropy predicted_squared reference_squared"
SUMS = tuple(NAMED[name] for name in _NAMES.split())
"""The sums that this path computes, in the order of its results."""

TILES, ROWS, WIDTH, LOGITS_OF_TILE = 2, 6, 2048, 1 << 17  # of scratch memory
_LOG_SUM = OF_ALL
_SLOPES = LOGITS


@kernel
def reduce(
    n, activation, logits, codes, target, ignore, weight, regions, fields, slots, gammas,
    scratch, map_kind, map_k, map_out, sums, voxels,
):  # fmt: skip
    """As `general.reduce`; some arguments are unused.

    ``slots`` has the index in ``sums`` of each of `SUMS`; −1: none.
    """
    tiles, r, _, _ = scratch
    bad, (x, first) = 0, logits
    skipped = codes if ignore[0] == ignore[0] else codes[:0]
    for start in range(0, n, r.shape[1]):
        size = min(r.shape[1], n - start)
        y, w = codes[start : start + size], r[WEIGHT, :size]
        bad += voxel_weights(weight, skipped, codes[:0], start, w)
        softmax(x, first + start, size, scratch)
        log_sum_row(r, _LOG_SUM, size)
        voxels[0] += total(w)
        for c in range(np.int32(len(tiles))):
            reference, overlap, predicted, entropy = _sums(tiles[c], y, c, r)
            # A NaN logit makes the cross-entropies of all classes NaN, not only that of its label.
            entropy = entropy if predicted == predicted else predicted
            squared = _squared_sum(tiles[c], r, size) if slots[4] >= 0 else entropy
            found = (reference, overlap, predicted, entropy, squared, reference)
            for j in range(len(slots)):
                if slots[j] >= 0:
                    sums[slots[j], 0, c] += found[j]
    return bad


@kernel
def apply(
    n, activation, logits, codes, target, ignore, weight, regions, fields, slots, gammas,
    scratch, coefficients, gradient_out,
):  # fmt: skip
    """As `general.apply`; some arguments are unused."""
    tiles, r, _, ints = scratch
    (x, first), (out, first_out), k = logits, gradient_out, coefficients
    skipped = codes if ignore[0] == ignore[0] else codes[:0]
    for start in range(0, n, r.shape[1]):
        size = min(r.shape[1], n - start)
        y = codes[start : start + size]
        voxel_weights(weight, skipped, codes[:0], start, r[WEIGHT, :size])
        softmax(x, first + start, size, scratch)
        largest_row(r, size)
        for c in range(np.int32(len(tiles))):
            of_p, of_squared = _of(k, slots[2], c), _of(k, slots[4], c)
            of_own, of_log = _of(k, slots[1], c), _of(k, slots[3], c)
            _slopes(tiles[c], y, c, of_p, of_squared + of_squared, of_own, of_log, r)
        add_slopes(_SLOPES, size, scratch)
        for c in range(np.int32(len(tiles))):
            to = out[c, first_out + start : first_out + start + size]
            gradient(tiles[c], _SLOPES, c, r, ints, to)


@inner
def _of(coefficients, slot, c):
    return coefficients[slot, 0, c] if slot >= 0 else coefficients.dtype.type(0)


@inner
def _cross_entropy(x, largest, log_sum, zero):
    return log_sum - difference(x, largest, zero)


@summing
def _sums(t, y, c, r):
    zero = t.dtype.type(0)
    reference = overlap = predicted = entropy = zero
    for i in range(len(y)):
        p, w = t[P, i] * r[INVERSE, i], r[WEIGHT, i]
        own = w if y[i] == c else zero
        reference += own
        overlap += own * p
        predicted += w * p
        # Selected, as 0 · ∞ is NaN.
        each = _cross_entropy(t[LOGITS, i], r[LARGEST, i], r[_LOG_SUM, i], zero)
        entropy += own * each if y[i] == c else zero
    return reference, overlap, predicted, entropy


@summing
def _squared_sum(t, r, size):
    result = t.dtype.type(0)
    for i in range(size):
        p = t[P, i] * r[INVERSE, i]
        result += r[WEIGHT, i] * p * p
    return result


@inner
def _slopes(t, y, c, of_p, of_squared, of_own, of_log, r):
    """Write p_c, and t_c = m (p_c (k_c + 2 s_c p_c) + [y = c] (o_c p_c − l_c)) to the slopes.

    t_c is the derivative by log p_c; k, s, o and l are the derivatives by predicted, predicted
    squared (``of_squared`` = 2 s), overlap and cross-entropy.
    """
    for i in range(len(y)):
        p = t[P, i] * r[INVERSE, i]
        t[P, i] = p
        slope = (of_p + of_squared * p) * p
        slope += of_own * p - of_log if y[i] == c else t.dtype.type(0)
        t[_SLOPES, i] = r[WEIGHT, i] * slope
