"""Loops along rows of voxels, and the softmax and its gradient that both paths share.

A tile is some hundred voxels, whose rows stay in the L1 and L2 caches: the scratch memory ``tiles,
r, wide, ints``. ``tiles[c, …]`` is per class; ``r[…]``, ``wide[…]`` in float64 and ``ints[0]`` are
for all classes together.

Each loop is a separate function that writes one or two rows and reads few, so that LLVM can prove
that they do not alias.
"""

import numpy as np

from fastloss.backends.numba.kernels import inner, summing
from fastloss.backends.numba.maths import exp, log_sum

# Rows per class: e^(x − largest) and then p; the logits until their row is reused.
P, LOGITS = range(2)
# Rows for all classes: REST is the sum of e^(x − largest) without the largest's.
WEIGHT, LARGEST, REST, INVERSE, OF_ALL, OF_OTHERS = range(6)


@summing
def total(row):
    """Σ over a row, in float64."""
    result = 0.0
    for i in range(len(row)):
        result += row[i]
    return result


@inner
def masked(x, w, out):
    """Copy a row, with 0 for voxels of weight 0, which may hold NaN."""
    for i in range(len(x)):
        out[i] = 0.0 if w[i] == 0 else x[i]


@inner
def voxel_weights(weight, codes, regions, start, w):
    """Write the weights of a tile's voxels to ``w``; return the number of bad ones.

    ``weight``, ``codes`` and ``regions`` are empty if not given. A voxel whose code or region is
    below 0 gets weight 0.
    """
    bad = 0
    if len(weight):
        given = weight[start : start + len(w)]
        for i in range(len(w)):
            bad += not ((given[i] >= 0) & (given[i] < np.inf))
            w[i] = given[i]
    else:
        for i in range(len(w)):
            w[i] = 1
    for numbers in (codes, regions):
        if len(numbers):
            number = numbers[start : start + len(w)]
            for i in range(len(w)):
                w[i] = 0.0 if number[i] < 0 else w[i]
    return bad


# ------------------------------------------------------------------ softmax


@inner
def softmax(x, first, size, scratch):
    """Compute e^(x − largest), the largest logit and its class, and the sum of the others.

    ``r[INVERSE]`` is one over the sum of all. With rest = ``r[REST]``, the sum without the 1 of the
    largest, 1 − p = rest / (1 + rest) and −log p = log(1 + rest) are exact at the largest.
    """
    tiles, r, wide, ints = scratch
    classes = np.int32(len(tiles))
    r[LARGEST, :size] = -np.inf
    ints[0, :size] = 0
    for c in range(classes):
        masked(x[c, first : first + size], r[WEIGHT], tiles[c, LOGITS])
        _larger(tiles[c], c, r, ints, size)
    r[REST, :size] = 0
    for c in range(classes):
        _exp(tiles[c], c, r, ints, size)
        _group(c, classes, r, REST, wide[0], size)
    _invert(r, size)


@inner
def _larger(t, c, r, ints, size):
    """Update the largest logits and their first class."""
    for i in range(size):
        more = t[LOGITS, i] > r[LARGEST, i]
        r[LARGEST, i] = t[LOGITS, i] if more else r[LARGEST, i]
        ints[0, i] = c if more else ints[0, i]


@inner
def difference(x, largest, zero):
    """x − largest, but 0 for equal infinities: such classes share the probability."""
    return zero if x == largest else x - largest


@inner
def _exp(t, c, r, ints, size):
    zero = t.dtype.type(0)
    for i in range(size):
        power = exp(difference(t[LOGITS, i], r[LARGEST, i], zero))
        t[P, i] = power
        r[REST, i] += zero if ints[0, i] == c else power


@inner
def _invert(r, size):
    one = r.dtype.type(1)
    for i in range(size):
        r[INVERSE, i] = one / (one + r[REST, i])


@inner
def log_sum_row(r, to, size):
    """Write log Σ e^(x − largest) = log(1 + rest)."""
    for i in range(size):
        r[to, i] = log_sum(r[REST, i], r[INVERSE, i])


@inner
def largest_row(r, size):
    """Replace REST by 1 − p of the largest class."""
    for i in range(size):
        r[REST, i] *= r[INVERSE, i]


@inner
def _group(c, classes, r, row, wide, size):
    """Move a running sum over classes to float64 every 16 classes.

    Over hundreds of similar classes, rounding errors in float32 would accumulate.
    """
    if classes <= 16:
        return
    if c == 0:
        for i in range(size):
            wide[i] = 0
    if c % 16 == 15:
        for i in range(size):
            wide[i] += r[row, i]
            r[row, i] = 0
    if c == classes - 1:
        for i in range(size):
            r[row, i] += wide[i]


@inner
def add_slopes(slopes, size, scratch):
    """Sum the derivatives by log p, in the rows ``slopes``, for the gradient.

    OF_ALL gets the sum over all classes, OF_OTHERS that over all but the largest.
    """
    tiles, r, wide, ints = scratch
    r[OF_ALL, :size] = 0
    r[OF_OTHERS, :size] = 0
    for c in range(np.int32(len(tiles))):
        _add(tiles[c], slopes, c, r, ints, size)
        _group(c, len(tiles), r, OF_ALL, wide[0], size)
        _group(c, len(tiles), r, OF_OTHERS, wide[1], size)


@inner
def _add(t, slopes, c, r, ints, size):
    zero = t.dtype.type(0)
    for i in range(size):
        r[OF_ALL, i] += t[slopes, i]
        r[OF_OTHERS, i] += zero if ints[0, i] == c else t[slopes, i]


@inner
def gradient(t, slopes, c, r, ints, out):
    """∂L/∂x_c = t_c − p_c Σ_j t_j, with t_c, the derivative by log p_c, in ``slopes``.

    Where p_c is near 1 this cancels, so the largest class takes (1 − p_c) t_c − p_c Σ_{j≠c} t_j,
    with 1 − p_c in REST.
    """
    for i in range(len(out)):
        slope, p, all_, others = t[slopes, i], t[P, i], r[OF_ALL, i], r[OF_OTHERS, i]
        near_one = r[REST, i] * slope - p * others
        out[i] = near_one if ints[0, i] == c else slope - p * all_
