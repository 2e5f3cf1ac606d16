"""The two passes for a softmax over two channels and a label map, in Numba.

One exponential a voxel is enough: with d = x₁ − x₀ the probabilities are 1/(1+e^−|d|) and
e^−|d|/(1+e^−|d|), and the gradient by x₀ is the negative of that by x₁.
"""

# mypy: ignore-errors
# What Numba compiles has no types that mypy could check.

from __future__ import annotations

import numpy as np

from fastloss.backends._numba_math import exp, log1p_small
from fastloss.backends._numba_pointers import data, like, select, shift
from fastloss.backends._numba_tile import (
    BATCH,
    BLOCK,
    BLOCKS,
    COUNTS,
    CROSS_ENTROPY,
    LOGITS,
    OUT,
    OVERLAP,
    PREDICTED,
    REFERENCE,
    TILE,
    UNDEFINED,
    VOXELS,
    WEIGHT_SUM,
    WIDTH,
    adding,
    blank,
    inner,
    kernel,
    load,
    load_labels,
    load_weights,
    store,
)

# Rows of numbers per voxel, in units of elements.
_M = 0 * WIDTH  # the weight m
_X0 = 1 * WIDTH  # the logits, and then the gradient
_X1 = 2 * WIDTH
_E = 3 * WIDTH  # e^−|d|
_LOSS = 4 * WIDTH  # −log p of the label's class, less log(1 + e^−|d|)
_OWN = 5 * WIDTH  # p of the label's class, and of the other
_OTHER = 6 * WIDTH
ROWS = 7


@inner
def _load_tile(plan, operands, ignore, sample, first, count, voxel, labels, wide, counts):
    weights = shift(voxel, _M)
    zeros = load_weights(plan, operands, sample, first, count, weights, wide, counts)
    zeros |= load_labels(
        plan, operands, ignore, sample, first, count, labels, weights, wide, counts
    )
    for c in range(2):
        x = shift(voxel, _X0 + c * WIDTH)
        load(plan, operands[LOGITS], sample, c, first, count, x)
        if zeros:
            blank(x, weights, count)


@inner
def _probabilities(voxel, labels, count):
    """Without the weights; and E and LOSS."""
    label0 = np.int32(0)  # 64 bits would halve the vectors
    zero, one = like(voxel, 0), like(voxel, 1)
    for i in range(count):
        a, b = voxel[_X0 + i], voxel[_X1 + i]
        d = select(a == b, zero, b - a)  # equal infinities share
        e = exp(-abs(d))
        big = one / (one + e)
        little = e * big
        margin = select(labels[i] == label0, -d, d)
        voxel[_E + i] = e
        voxel[_LOSS + i] = select(margin < zero, -margin, zero)
        voxel[_OWN + i] = select(margin < zero, little, big)
        voxel[_OTHER + i] = select(margin < zero, big, little)


@adding
def _sums(voxel, labels, count):
    """By label: Σ m, Σ m p of the label's class, and Σ m p of the other class."""
    label0 = np.int32(0)
    zero = like(voxel, 0)
    m0, m1, own0, own1, other0, other1 = zero, zero, zero, zero, zero, zero
    for i in range(count):
        m = voxel[_M + i]
        first = labels[i] == label0
        own, other = m * voxel[_OWN + i], m * voxel[_OTHER + i]
        m0 += select(first, m, zero)
        m1 += select(first, zero, m)
        own0 += select(first, own, zero)
        own1 += select(first, zero, own)
        other0 += select(first, other, zero)
        other1 += select(first, zero, other)
    return m0, m1, own0, own1, other0, other1


@adding
def _losses(voxel, labels, count):
    """By label: Σ m (−log p) of the label's class."""
    zero = like(voxel, 0)
    label0 = np.int32(0)
    loss0, loss1 = zero, zero
    for i in range(count):
        # A voxel without weight has finite logits, so that this is never 0 times infinity.
        loss = voxel[_M + i] * (voxel[_LOSS + i] + log1p_small(voxel[_E + i]))
        first = labels[i] == label0
        loss0 += select(first, loss, zero)
        loss1 += select(first, zero, loss)
    return loss0, loss1


@kernel
def reduce(
    begin, end, plan, operands, numbers, slots, scratch, label_scratch, wide_scratch, sums, counts
):
    """The sums of the blocks from ``begin`` to ``end``."""
    width = plan[TILE]
    voxel = data(scratch)
    labels = data(label_scratch)
    wide = data(wide_scratch)
    for block in range(begin, end):
        sample = block // plan[BLOCKS]
        start = (block - sample * plan[BLOCKS]) * plan[BLOCK]
        stop = min(start + plan[BLOCK], plan[VOXELS])
        out = shift(data(sums), block * sums.shape[1] * 2)
        count_of = shift(data(counts), block * COUNTS)
        for first in range(start, stop, width):
            n = min(width, stop - first)
            _load_tile(plan, operands, numbers[0], sample, first, n, voxel, labels, wide, count_of)
            _probabilities(voxel, labels, n)
            m0, m1, own0, own1, other0, other1 = _sums(voxel, labels, n)
            count_of[WEIGHT_SUM] += np.float64(m0) + np.float64(m1)
            # Every p is finite, unless a logit was NaN.
            undefined = own0 + own1
            count_of[UNDEFINED] += 0 if undefined == undefined else 1
            out[slots[REFERENCE] * 2] += m0
            out[slots[REFERENCE] * 2 + 1] += m1
            if slots[OVERLAP] >= 0:
                out[slots[OVERLAP] * 2] += own0
                out[slots[OVERLAP] * 2 + 1] += own1
            if slots[PREDICTED] >= 0:
                out[slots[PREDICTED] * 2] += np.float64(own0) + np.float64(other1)
                out[slots[PREDICTED] * 2 + 1] += np.float64(own1) + np.float64(other0)
            if slots[CROSS_ENTROPY] >= 0:
                loss0, loss1 = _losses(voxel, labels, n)
                out[slots[CROSS_ENTROPY] * 2] += loss0
                out[slots[CROSS_ENTROPY] * 2 + 1] += loss1


@inner
def _gradient(voxel, labels, if0, if1, loss0, loss1, count):
    """In place of the logits, in one loop: the probabilities are of no use afterwards."""
    label0 = np.int32(0)
    zero, one = like(voxel, 0), like(voxel, 1)
    for i in range(count):
        a, b = voxel[_X0 + i], voxel[_X1 + i]
        first = labels[i] == label0
        d = select(a == b, zero, b - a)
        e = exp(-abs(d))
        big = one / (one + e)
        little = e * big
        margin = select(first, -d, d)
        own = select(margin < zero, little, big)
        other = select(margin < zero, big, little)
        # By x₁, label 1: p₀ (p₁ k − loss₁); label 0: p₁ (p₀ k + loss₀).
        slope = own * select(first, if0, if1) + select(first, loss0, -loss1)
        g = voxel[_M + i] * (other * slope)
        voxel[_X0 + i] = -g
        voxel[_X1 + i] = g


@kernel
def apply(
    begin, end, plan, operands, numbers, slots, scratch, label_scratch, wide_scratch, coefficients
):
    """The gradient of the blocks from ``begin`` to ``end``."""
    width = plan[TILE]
    voxel = data(scratch)
    labels = data(label_scratch)
    wide = data(wide_scratch)
    unused = shift(wide, 2 * WIDTH)
    for block in range(begin, end):
        sample = block // plan[BLOCKS]
        start = (block - sample * plan[BLOCKS]) * plan[BLOCK]
        stop = min(start + plan[BLOCK], plan[VOXELS])
        here = shift(data(coefficients), sample * 2)
        step = plan[BATCH] * 2
        if0 = if1 = loss0 = loss1 = like(voxel, 0)
        if slots[PREDICTED] >= 0:
            if0 = here[slots[PREDICTED] * step + 1] - here[slots[PREDICTED] * step]
            if1 = if0
        if slots[OVERLAP] >= 0:
            if0 -= here[slots[OVERLAP] * step]
            if1 += here[slots[OVERLAP] * step + 1]
        if slots[CROSS_ENTROPY] >= 0:
            loss0 = here[slots[CROSS_ENTROPY] * step]
            loss1 = here[slots[CROSS_ENTROPY] * step + 1]
        for first in range(start, stop, width):
            n = min(width, stop - first)
            _load_tile(plan, operands, numbers[0], sample, first, n, voxel, labels, wide, unused)
            _gradient(voxel, labels, if0, if1, loss0, loss1, n)
            store(plan, operands[OUT], sample, 0, first, n, shift(voxel, _X0))
            store(plan, operands[OUT], sample, 1, first, n, shift(voxel, _X1))
