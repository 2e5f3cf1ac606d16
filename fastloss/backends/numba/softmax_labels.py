"""The fast path: softmax of a label map, and the common sums."""

import numpy as np

from fastloss.backends.numba import two_classes
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
_LOG_SUM, _SLOPES = OF_ALL, LOGITS


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
        y, w, at = codes[start : start + size], r[WEIGHT, :size], first + start
        bad += voxel_weights(weight, skipped, codes[:0], start, w)
        voxels[0] += total(w)
        if len(tiles) == 2:
            of_0, of_1 = two_classes.sums(x[0, at : at + size], x[1, at : at + size], y, w)
            _keep(of_0, slots, sums[:, 0, 0])
            _keep(of_1, slots, sums[:, 0, 1])
            continue
        softmax(x, at, size, scratch)
        log_sum_row(r, _LOG_SUM, size)
        for c in range(np.int32(len(tiles))):
            _keep(_sums(tiles[c], y, c, r), slots, sums[:, 0, c])
    return bad


@kernel
def apply(
    n, activation, logits, codes, target, ignore, weight, regions, fields, slots, gammas,
    scratch, coefficients, gradient_out,
):  # fmt: skip
    """As `general.apply`; some arguments are unused."""
    tiles, r, _, ints = scratch
    (x, first), (out, first_out) = logits, gradient_out
    k = np.zeros((len(slots), len(tiles)), coefficients.dtype)
    for j in range(len(slots)):
        if slots[j] >= 0:
            k[j] = coefficients[slots[j], 0]
    skipped = codes if ignore[0] == ignore[0] else codes[:0]
    for start in range(0, n, r.shape[1]):
        size = min(r.shape[1], n - start)
        y, w, at = codes[start : start + size], r[WEIGHT, :size], first + start
        voxel_weights(weight, skipped, codes[:0], start, w)
        to = first_out + start
        if len(tiles) == 2:
            # By a row of its own, as ``out`` may be the logits.
            row = r[LARGEST, :size]
            two_classes.gradient(x[0, at : at + size], x[1, at : at + size], y, w, k, row)
            out[0, to : to + size] = row
            for i in range(size):
                out[1, to + i] = -row[i]
            continue
        softmax(x, at, size, scratch)
        largest_row(r, size)
        for c in range(np.int32(len(tiles))):
            _slopes(tiles[c], y, c, k[2, c], k[4, c] + k[4, c], k[1, c], k[3, c], r)
        add_slopes(_SLOPES, size, scratch)
        for c in range(np.int32(len(tiles))):
            gradient(tiles[c], _SLOPES, c, r, ints, out[c, to : to + size])


@inner
def _keep(found, slots, sums):
    for j in range(len(slots)):
        if slots[j] >= 0:
            sums[slots[j]] += found[j]


@summing
def _sums(t, y, c, r):
    zero = t.dtype.type(0)
    reference = overlap = predicted = entropy = squared = zero
    for i in range(len(y)):
        p, w = t[P, i] * r[INVERSE, i], r[WEIGHT, i]
        own = w if y[i] == c else zero
        reference += own
        overlap += own * p
        predicted += w * p
        squared += w * p * p
        # Selected, as 0 · ∞ is NaN.
        each = r[_LOG_SUM, i] - difference(t[LOGITS, i], r[LARGEST, i], zero)
        entropy += own * each if y[i] == c else zero
    # A NaN logit makes the cross-entropies of all classes NaN, not only that of its label.
    entropy = entropy if predicted == predicted else predicted
    return reference, overlap, predicted, entropy, squared, reference


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
