"""Loops along rows of voxels, and what both paths compute with them: a softmax and its gradient.

A tile is some hundred voxels, whose rows stay in the first caches: the scratch memory ``tiles, r,
wide, ints``. Of every class there is ``tiles[c, …]``, of all together ``r[…]``, ``wide[…]`` in
float64 and ``ints[0]``.

Loops are functions of their own, that write one or two rows and read few: LLVM must be able to see
that they do not overlap.
"""

# mypy: ignore-errors
# What Numba compiles has no types that mypy could check.

from __future__ import annotations

import numpy as np

from fastloss.backends.numba.kernels import inner, summing
from fastloss.backends.numba.maths import exp, log_sum

# Rows of every class: e^(x − largest) and then p; the logits until their place is needed.
P, LOGITS = range(2)
# Rows of all together: REST is the sum of e^(x − largest) without the largest's.
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
    """A voxel that counts for nothing does so even if it holds NaN."""
    for i in range(len(x)):
        out[i] = 0.0 if w[i] == 0 else x[i]


@inner
def voxel_weights(weight, codes, regions, start, w):
    """The weights of a tile's voxels into ``w``; how many of those given are no weights.

    ``weight``, ``codes`` and ``regions`` are empty where there are none. A voxel whose code or
    region is below 0 counts for nothing.
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
    """Without the division: e^(x − largest), the largest and its class, and the sum of the others.

    ``r[INVERSE]`` is one over the sum of all. Beside the 1 of the largest a small sum of the
    others would be lost, and with it 1 − p.
    """
    tiles, r, wide, ints = scratch
    classes = np.int32(len(tiles))
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
    """The largest logits so far, and their first class."""
    if c == 0:
        for i in range(size):
            r[LARGEST, i] = t[LOGITS, i]
            ints[0, i] = 0
    else:
        for i in range(size):
            more = t[LOGITS, i] > r[LARGEST, i]
            r[LARGEST, i] = t[LOGITS, i] if more else r[LARGEST, i]
            ints[0, i] = c if more else ints[0, i]


@inner
def difference(x, largest, zero):
    """Classes that share an infinite maximum share the probability."""
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
    """The logarithm of the sum of e^(x − largest)."""
    for i in range(size):
        r[to, i] = log_sum(r[REST, i], r[INVERSE, i])


@inner
def largest_row(r, size):
    """At REST 1 − p of the largest class."""
    for i in range(size):
        r[REST, i] *= r[INVERSE, i]


@inner
def _group(c, classes, r, row, wide, size):
    """Take the sum over classes in a row from c on anew every 16 classes, and in float64.

    Over hundreds of classes alike, roundings in float32 would go the same way.
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
    """Sum the derivatives by log p, in the rows ``slopes``, as the gradient takes them.

    Those over all classes, and over all but the one of the largest logit: at OF_ALL, OF_OTHERS.
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
    """slope − p · Σ slopes; where p is near 1 this cancels, so (1−p) · slope − p · Σ of the others.

    1 − p of the largest class is at REST.
    """
    for i in range(len(out)):
        slope, p, all_, others = t[slopes, i], t[P, i], r[OF_ALL, i], r[OF_OTHERS, i]
        near_one = r[REST, i] * slope - p * others
        out[i] = near_one if ints[0, i] == c else slope - p * all_
