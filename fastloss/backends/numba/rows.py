"""Loops along rows of voxels that all kernels share.

A loop writes two rows at most and reads few, as LLVM must be able to see that they do not overlap.
"""

# mypy: ignore-errors
# What Numba compiles has no types that mypy could check.

from __future__ import annotations

import numpy as np
from numba import njit

from fastloss.backends.numba.kernels import OPTIONS, inner
from fastloss.backends.numba.maths import exp

# Sums may be taken in any order that depends on the number of summands alone.
summing = njit(**{**OPTIONS, "fastmath": {"contract", "reassoc"}})


@inner
def voxel_weights(weight, codes, rows, first, w):
    """The weights of a tile's voxels into ``w``; how many of those given are no weights.

    ``weight`` is empty where there are none, ``rows`` without regions. Codes and rows below 0
    count for nothing.
    """
    bad = 0
    if len(weight):
        given = weight[first : first + len(w)]
        for i in range(len(w)):
            bad += not ((given[i] >= 0) & (given[i] < np.inf))
            w[i] = given[i]
    else:
        w[:] = 1
    for some in (codes, rows):
        if len(some):
            code = some[first : first + len(w)]
            for i in range(len(w)):
                w[i] = 0.0 if code[i] < 0 else w[i]
    return bad


@inner
def masked_row(x, w, out):
    """A voxel that counts for nothing does so even if it holds NaN."""
    for i in range(len(out)):
        out[i] = 0.0 if w[i] == 0 else x[i]


@inner
def largest_row(x, c, largest, at):
    """The largest logits so far, and their first class."""
    if c == 0:
        for i in range(len(x)):
            largest[i] = x[i]
            at[i] = 0
    else:
        for i in range(len(x)):
            more = x[i] > largest[i]
            largest[i] = x[i] if more else largest[i]
            at[i] = c if more else at[i]


@inner
def exp_row(x, largest, at, c, e, rest):
    """e^(x − largest), and its sum over all classes but the one of the largest."""
    zero = e.dtype.type(0)
    for i in range(len(e)):
        power = exp(zero if x[i] == largest[i] else x[i] - largest[i])
        e[i] = power
        rest[i] += zero if at[i] == c else power


@summing
def total(row):
    """Σ over a row, in float64."""
    result = 0.0
    for i in range(len(row)):
        result += row[i]
    return result
