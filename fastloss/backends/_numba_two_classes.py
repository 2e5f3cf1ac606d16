"""The two passes for a softmax over two channels and a label map, in Numba.

One exponential a voxel is enough: with z, the other class's logit less the label's, the
probabilities are 1/(1+e^z) and e^z/(1+e^z), and the gradient by x₀ is the negative of that by x₁.
"""

# mypy: ignore-errors
# What Numba compiles has no types that mypy could check.

from __future__ import annotations

import numpy as np

from fastloss.backends._numba_math import exp, log1p_small
from fastloss.backends._numba_pointers import (
    LINE,
    address,
    bytes_at,
    data,
    item_size,
    like,
    select,
    shift,
    stream_line,
    stream_negated,
    take,
)
from fastloss.backends._numba_tile import (
    ADDRESS,
    BATCH,
    BLOCK,
    BLOCKS,
    CROSS_ENTROPY,
    DIRECT,
    IGNORE,
    LOGITS,
    OUT,
    OVERLAP,
    PREDICTED,
    REFERENCE,
    TARGET,
    TILE,
    UNDEFINED,
    VOXELS,
    WEIGHT,
    WEIGHT_SUM,
    WIDTH,
    adding,
    blank,
    fetch_part,
    inner,
    kernel,
    load,
    load_labels,
    load_weights,
    rows_of,
    source,
    store,
    voxels_to_line,
)

# Rows of numbers per voxel, in units of elements.
_M = 0 * WIDTH  # the weight m
_X0 = 1 * WIDTH  # the logits
_X1 = 2 * WIDTH
_G0 = 3 * WIDTH  # the gradient
_G1 = 4 * WIDTH
ROWS = 5
_PART = 256  # voxels that are computed with at a time, where those ahead are fetched

_LARGEST = 87.0
"""exp takes numbers up to so much, also those of 32 bits."""


@inner
def _load_voxels(plan, operands, ignore, sample, first, count, voxel, labels, wide, counts):
    """Labels and weights. Returns whether any voxel counts for nothing."""
    weights = shift(voxel, _M)
    zeros = load_weights(plan, operands, sample, first, count, weights, wide, counts)
    zeros |= load_labels(
        plan, operands, ignore, sample, first, count, labels, weights, wide, counts
    )
    return zeros


@inner
def _alike(plan, operands):
    """Whether every voxel counts alike."""
    return (operands[WEIGHT][ADDRESS] == 0) & (plan[IGNORE] == 0)


@inner
def _label_bytes(plan, operands, sample, first, count, voxel, labels, wide, counts):
    """The pointer to the labels as bytes: where they lie, or made of others, which are counted."""
    if operands[TARGET][DIRECT] == 1:
        return source(plan, operands[TARGET], sample, 0, first, bytes_at(0))
    load_labels(plan, operands, 0.0, sample, first, count, labels, shift(voxel, _M), wide, counts)
    y = bytes_at(address(shift(wide, WIDTH)))
    for i in range(count):
        y[i] = np.uint8(labels[i])
    return y


@inner
def _logits(plan, operand, sample, channel, first, count, voxel):
    """The pointer to a row of logits, where it lies or loaded."""
    if operand[DIRECT] == 1:
        return source(plan, operand, sample, channel, first, voxel)
    x = shift(voxel, _X0 + channel * WIDTH)
    load(plan, operand, sample, channel, first, count, x)
    return x


@inner
def _load_logits(plan, operands, sample, first, count, voxel, zeros):
    for c in range(2):
        x = shift(voxel, _X0 + c * WIDTH)
        load(plan, operands[LOGITS], sample, c, first, count, x)
        if zeros:
            blank(x, shift(voxel, _M), count)


# In one loop each, where nothing need be stored in between.


@inner
def _ones(labels, count):
    """How many labels are 1."""
    ones = np.int32(0)
    for i in range(count):
        ones = np.int32(ones + labels[i])
    return ones


@inner
def _two_labels(labels, count):
    """Whether all labels are 0 or 1."""
    found = np.uint8(0)
    for i in range(count):
        found |= labels[i]
    return found <= 1


@adding
def _sums_of_one(x, x2, count):
    """Where all labels are the class of x: Σ p of it, Σ p of the other class, and Σ −log p."""
    zero, one = like(x, 0), like(x, 1)
    owns, others, losses = zero, zero, zero
    for i in range(count):
        z = x2[i] - x[i]
        e = exp(-abs(z))
        big = one / (one + e)
        little = e * big
        owns += select(z < zero, big, little)
        others += select(z < zero, little, big)
        losses += log1p_small(e) + select(z > zero, z, zero)
    return owns, others, losses


@adding
def _sums_of_both(x0, x1, labels, count):
    """By label: Σ p of the label's class, Σ p of the other class, and Σ −log p of the label's."""
    label0 = np.int32(0)  # 64 bits would halve the vectors
    zero, one = like(x0, 0), like(x0, 1)
    own0, own1, other0, other1, loss0, loss1 = zero, zero, zero, zero, zero, zero
    for i in range(count):
        a, b = x0[i], x1[i]
        first = labels[i] == label0
        z = select(first, b - a, a - b)  # the other logit less the label's
        e = exp(-abs(z))
        big = one / (one + e)
        little = e * big
        own, other = select(z < zero, big, little), select(z < zero, little, big)
        loss = log1p_small(e) + select(z > zero, z, zero)
        own0 += select(first, own, zero)
        own1 += select(first, zero, own)
        other0 += select(first, other, zero)
        other1 += select(first, zero, other)
        loss0 += select(first, loss, zero)
        loss1 += select(first, zero, loss)
    return own0, own1, other0, other1, loss0, loss1


@inner
def _plain_sums(plan, operand, sample, first, x0, x1, labels, count):
    """The same of a whole tile, and before it the voxels of either label.

    NaN if a logit is, or both of a voxel are the same infinity.
    """
    m1 = own0 = own1 = other0 = other1 = loss0 = loss1 = like(x0, 0)
    for i in range(0, count, _PART):
        n = min(_PART, count - i)
        fetch_part(plan, operand, sample, first, count, i, n)
        a, b, y = shift(x0, i), shift(x1, i), shift(labels, i)
        ones = _ones(y, n)
        m1 += like(x0, ones)
        if ones == 0:
            own, other, loss = _sums_of_one(a, b, n)
            own0 += own
            other0 += other
            loss0 += loss
        elif ones == n:
            own, other, loss = _sums_of_one(b, a, n)
            own1 += own
            other1 += other
            loss1 += loss
        else:
            o0, o1, r0, r1, l0, l1 = _sums_of_both(a, b, y, n)
            own0 += o0
            own1 += o1
            other0 += r0
            other1 += r1
            loss0 += l0
            loss1 += l1
    return like(x0, count) - m1, m1, own0, own1, other0, other1, loss0, loss1


@adding
def _sums(voxel, labels, count):
    """The same with weights, and equal infinities share."""
    label0 = np.int32(0)
    zero, one = like(voxel, 0), like(voxel, 1)
    m0, m1, own0, own1, other0, other1 = zero, zero, zero, zero, zero, zero
    loss0, loss1 = zero, zero
    for i in range(count):
        a, b, m = voxel[_X0 + i], voxel[_X1 + i], voxel[_M + i]
        first = labels[i] == label0
        z = select(first, b - a, a - b)
        z = select(a == b, zero, z)
        e = exp(-abs(z))
        big = one / (one + e)
        little = e * big
        own, other = m * select(z < zero, big, little), m * select(z < zero, little, big)
        # A voxel without weight has finite logits, so that this is never 0 times infinity.
        loss = m * (log1p_small(e) + select(z > zero, z, zero))
        m0 += select(first, m, zero)
        m1 += select(first, zero, m)
        own0 += select(first, own, zero)
        own1 += select(first, zero, own)
        other0 += select(first, other, zero)
        other1 += select(first, zero, other)
        loss0 += select(first, loss, zero)
        loss1 += select(first, zero, loss)
    return m0, m1, own0, own1, other0, other1, loss0, loss1


@kernel
def reduce(
    turn, plan, operands, numbers, slots, scratch, label_scratch, wide_scratch, sums, counts
):
    """The sums of one block after the other, whose ``turn`` it is."""
    plan, operands, slots = data(plan), rows_of(operands), data(slots)
    width = plan[TILE]
    voxel = data(scratch)
    labels = data(label_scratch)
    wide = data(wide_scratch)
    unused = shift(wide, 2 * WIDTH)
    alike = _alike(plan, operands)
    while True:
        block = take(turn)
        if block >= plan[BATCH] * plan[BLOCKS]:
            break
        sample = block // plan[BLOCKS]
        start = (block - sample * plan[BLOCKS]) * plan[BLOCK]
        stop = min(start + plan[BLOCK], plan[VOXELS])
        out = shift(data(sums), block * sums.shape[1] * 2)
        count_of = shift(data(counts), block * counts.shape[1])
        for first in range(start, stop, width):
            n = min(width, stop - first)
            m0 = m1 = own0 = own1 = other0 = other1 = loss0 = loss1 = like(voxel, 0)
            known = False
            if alike:
                y = _label_bytes(plan, operands, sample, first, n, voxel, labels, wide, count_of)
                if _two_labels(y, n):
                    x0 = _logits(plan, operands[LOGITS], sample, 0, first, n, voxel)
                    x1 = _logits(plan, operands[LOGITS], sample, 1, first, n, voxel)
                    m0, m1, own0, own1, other0, other1, loss0, loss1 = _plain_sums(
                        plan, operands[LOGITS], sample, first, x0, x1, y, n
                    )
                    known = own0 + own1 == own0 + own1
            if not known:
                counted = alike & (operands[TARGET][DIRECT] == 0)
                to = unused if counted else count_of
                zeros = _load_voxels(
                    plan, operands, numbers[0], sample, first, n, voxel, labels, wide, to
                )
                _load_logits(plan, operands, sample, first, n, voxel, zeros)
                m0, m1, own0, own1, other0, other1, loss0, loss1 = _sums(voxel, labels, n)
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
                out[slots[CROSS_ENTROPY] * 2] += loss0
                out[slots[CROSS_ENTROPY] * 2 + 1] += loss1


@inner
def _gradient_of_one(x, x2, voxel, k, loss, count):
    """Where all labels are the class of x. Returns of how many voxels a logit is NaN, or both are
    the same infinity. To reassociate would make other bits of a tile than `_gradient` does."""
    one, largest = like(voxel, 1), like(voxel, _LARGEST)
    none, some, undefined = np.int32(0), np.int32(1), np.int32(0)
    for i in range(count):
        z = x2[i] - x[i]
        e = exp(select(z > largest, largest, z))
        own = one / (one + e)
        undefined = np.int32(undefined + select(own == own, none, some))
        g = e * own * (own * k + loss)
        voxel[_G1 + i] = g
    return undefined


@inner
def _gradient_of_both(x0, x1, voxel, labels, if0, if1, loss0, loss1, count):
    label0 = np.int32(0)
    one, largest = like(voxel, 1), like(voxel, _LARGEST)
    none, some, undefined = np.int32(0), np.int32(1), np.int32(0)
    for i in range(count):
        a, b = x0[i], x1[i]
        first = labels[i] == label0
        z = select(first, b - a, a - b)
        e = exp(select(z > largest, largest, z))
        own = one / (one + e)
        undefined = np.int32(undefined + select(own == own, none, some))
        # By x₁, label 1: p₀ (p₁ k − loss₁); label 0: p₁ (p₀ k + loss₀).
        g = e * own * (own * select(first, if0, if1) + select(first, loss0, loss1))
        voxel[_G1 + i] = g
    return undefined


@inner
def _plain_gradient(
    plan, operand, sample, first, x0, x1, voxel, labels, if0, if1, loss0, loss1, count
):
    undefined = 0
    for i in range(0, count, _PART):
        n = min(_PART, count - i)
        fetch_part(plan, operand, sample, first, count, i, n)
        a, b, y, to = shift(x0, i), shift(x1, i), shift(labels, i), shift(voxel, i)
        ones = _ones(y, n)
        if ones == 0:
            undefined += _gradient_of_one(a, b, to, if0, loss0, n)
        elif ones == n:
            undefined += _gradient_of_one(b, a, to, if1, loss1, n)
        else:
            undefined += _gradient_of_both(a, b, to, y, if0, if1, loss0, loss1, n)
    return undefined


@inner
def _gradient(voxel, labels, if0, if1, loss0, loss1, count):
    """The same with weights, and equal infinities share."""
    label0 = np.int32(0)
    zero, one, largest = like(voxel, 0), like(voxel, 1), like(voxel, _LARGEST)
    for i in range(count):
        a, b = voxel[_X0 + i], voxel[_X1 + i]
        first = labels[i] == label0
        z = select(first, b - a, a - b)
        z = select(a == b, zero, z)
        e = exp(select(z > largest, largest, z))
        own = one / (one + e)
        g = e * own * (own * select(first, if0, if1) + select(first, loss0, loss1))
        g *= voxel[_M + i]
        voxel[_G1 + i] = g


@inner
def _store(plan, operand, sample, first, count, voxel):
    """The gradient and its negative."""
    g, negative = shift(voxel, _G1), shift(voxel, _G0)
    lanes = LINE // item_size(voxel)
    if (operand[DIRECT] == 1) & (count % lanes == 0):
        out0 = source(plan, operand, sample, 0, first, voxel)
        out1 = source(plan, operand, sample, 1, first, voxel)
        if (address(out0) | address(out1)) & (LINE - 1) == 0:
            for i in range(0, count, lanes):
                stream_negated(shift(out0, i), shift(g, i))
                stream_line(shift(out1, i), shift(g, i))
            return
    for i in range(count):
        voxel[_G0 + i] = -voxel[_G1 + i]
    store(plan, operand, sample, 0, first, count, negative)
    store(plan, operand, sample, 1, first, count, g)


@kernel
def apply(turn, plan, operands, numbers, slots, scratch, label_scratch, wide_scratch, coefficients):
    """The gradient of one block after the other, whose ``turn`` it is."""
    plan, operands, slots = data(plan), rows_of(operands), data(slots)
    width = plan[TILE]
    voxel = data(scratch)
    labels = data(label_scratch)
    wide = data(wide_scratch)
    unused = shift(wide, 2 * WIDTH)
    alike = _alike(plan, operands)
    while True:
        block = take(turn)
        if block >= plan[BATCH] * plan[BLOCKS]:
            break
        sample = block // plan[BLOCKS]
        start = (block - sample * plan[BLOCKS]) * plan[BLOCK]
        stop = min(start + plan[BLOCK], plan[VOXELS])
        # What a voxel's gradient is does not depend on the tile.
        lead = voxels_to_line(plan, operands[OUT], sample)
        if start > 0:
            start = min(start + lead, plan[VOXELS])
        stop = min(stop + lead, plan[VOXELS])
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
            loss1 = -here[slots[CROSS_ENTROPY] * step + 1]
        first = start
        while first < stop:
            n = min(lead if first < lead else width, stop - first)
            known = False
            if alike:
                y = _label_bytes(plan, operands, sample, first, n, voxel, labels, wide, unused)
                if _two_labels(y, n):
                    x0 = _logits(plan, operands[LOGITS], sample, 0, first, n, voxel)
                    x1 = _logits(plan, operands[LOGITS], sample, 1, first, n, voxel)
                    undefined = _plain_gradient(
                        plan,
                        operands[LOGITS],
                        sample,
                        first,
                        x0,
                        x1,
                        voxel,
                        y,
                        if0,
                        if1,
                        loss0,
                        loss1,
                        n,
                    )
                    known = undefined == 0
            if not known:
                zeros = _load_voxels(
                    plan, operands, numbers[0], sample, first, n, voxel, labels, wide, unused
                )
                _load_logits(plan, operands, sample, first, n, voxel, zeros)
                _gradient(voxel, labels, if0, if1, loss0, loss1, n)
            _store(plan, operands[OUT], sample, first, n, voxel)
            first += n
