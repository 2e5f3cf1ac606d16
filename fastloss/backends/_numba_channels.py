"""The two passes for sigmoid and for probabilities, channel by channel, in Numba."""

# mypy: ignore-errors
# What Numba compiles has no types that mypy could check.

from __future__ import annotations

import numpy as np

from fastloss.backends._numba_math import exp, log, log1p
from fastloss.backends._numba_pointers import data, like, shift, take
from fastloss.backends._numba_tile import (
    BATCH,
    BLOCK,
    BLOCKS,
    CHANNELS,
    CROSS_ENTROPY,
    CROSS_ENTROPY_REST,
    FOCAL,
    LOGITS,
    OUT,
    OVERLAP,
    PREDICTED,
    PREDICTED_SQUARED,
    REFERENCE,
    REFERENCE_SQUARED,
    TARGET,
    TILE,
    UNIFORM,
    VOXELS,
    WEIGHT_SUM,
    WIDTH,
    blank,
    dot,
    dot3,
    dot_log,
    dot_square,
    fill,
    ignore_dense,
    inner,
    kernel,
    load,
    load_labels,
    load_weights,
    power,
    product,
    rows_of,
    store,
    total,
)

# Rows of numbers per voxel, in units of elements.
_M = 0 * WIDTH  # the weight m
_X = 1 * WIDTH  # the logit, and then the gradient
_G = 2 * WIDTH  # the target
_P = 3 * WIDTH
_Q = 4 * WIDTH  # 1 − p
_NLP = 5 * WIDTH  # −log p
_NLQ = 6 * WIDTH  # −log(1 − p)
_MG = 7 * WIDTH
_MR = 8 * WIDTH  # m (1 − g)
_BY_P = 9 * WIDTH
_BY_LOG_P = 10 * WIDTH  # without m
_BY_LOG_Q = 11 * WIDTH
_W1 = 12 * WIDTH
_W2 = 13 * WIDTH
ROWS = 14


@inner
def _load_voxels(plan, operands, ignore, dense, sample, first, count, voxel, labels, wide, counts):
    weights = shift(voxel, _M)
    zeros = load_weights(plan, operands, sample, first, count, weights, wide, counts)
    if dense:
        zeros |= ignore_dense(plan, operands, ignore, sample, first, count, weights, wide)
    else:
        zeros |= load_labels(
            plan, operands, ignore, sample, first, count, labels, weights, wide, counts
        )
    return zeros


@inner
def _load_channel(
    plan, operands, dense, sigmoid, logs, zeros, sample, c, first, count, voxel, labels
):
    """The rows of one channel, from the logit to m (1 − g)."""
    x, g, weights = shift(voxel, _X), shift(voxel, _G), shift(voxel, _M)
    zero, one = like(voxel, 0), like(voxel, 1)
    load(plan, operands[LOGITS], sample, c, first, count, x)
    if dense:
        load(plan, operands[TARGET], sample, c, first, count, g)
    else:
        label = np.int32(c)
        for i in range(count):
            g[i] = one if labels[i] == label else zero
    if zeros:
        blank(x, weights, count)
        blank(g, weights, count)
    for i in range(count):
        voxel[_MG + i] = voxel[_M + i] * voxel[_G + i]
        voxel[_MR + i] = voxel[_M + i] * (one - voxel[_G + i])
    if sigmoid:
        for i in range(count):
            value = voxel[_X + i]
            e = exp(-abs(value))
            large = one / (one + e)
            small = e * large
            voxel[_P + i] = small if value < zero else large
            voxel[_Q + i] = large if value < zero else small
        if logs:
            for i in range(count):
                value = voxel[_X + i]
                rest = log1p(exp(-abs(value)))
                voxel[_NLP + i] = rest - (value if value < zero else zero)
                voxel[_NLQ + i] = rest + (zero if value < zero else value)
    else:
        for i in range(count):
            voxel[_P + i] = voxel[_X + i]
            voxel[_Q + i] = one - voxel[_X + i]
        if logs:
            for i in range(count):
                voxel[_NLP + i] = -log(voxel[_X + i])


@kernel
def reduce(
    turn,
    plan,
    operands,
    numbers,
    slots,
    scratch,
    label_scratch,
    wide_scratch,
    sums,
    counts,
    dense,
    sigmoid,
):
    """The sums of one block after the other, whose ``turn`` it is."""
    plan, operands, slots = data(plan), rows_of(operands), data(slots)
    channels = plan[CHANNELS]
    width = plan[TILE]
    voxel = data(scratch)
    labels = data(label_scratch)
    wide = data(wide_scratch)
    gammas = numbers.size - 1
    m, g, p, q = shift(voxel, _M), shift(voxel, _G), shift(voxel, _P), shift(voxel, _Q)
    mg, mr, nlp, nlq = (
        shift(voxel, _MG),
        shift(voxel, _MR),
        shift(voxel, _NLP),
        shift(voxel, _NLQ),
    )
    w1 = shift(voxel, _W1)
    logs = (slots[CROSS_ENTROPY] >= 0) | (slots[UNIFORM] >= 0) | (gammas > 0)
    while True:
        block = take(turn)
        if block >= plan[BATCH] * plan[BLOCKS]:
            break
        sample = block // plan[BLOCKS]
        start = (block - sample * plan[BLOCKS]) * plan[BLOCK]
        stop = min(start + plan[BLOCK], plan[VOXELS])
        out = shift(data(sums), block * sums.shape[1] * channels)
        count_of = shift(data(counts), block * counts.shape[1])
        for first in range(start, stop, width):
            n = min(width, stop - first)
            zeros = _load_voxels(
                plan, operands, numbers[0], dense, sample, first, n, voxel, labels, wide, count_of
            )
            count_of[WEIGHT_SUM] += total(m, n)
            for c in range(channels):
                _load_channel(
                    plan, operands, dense, sigmoid, logs, zeros, sample, c, first, n, voxel, labels
                )
                out[slots[REFERENCE] * channels + c] += total(mg, n)
                if slots[OVERLAP] >= 0:
                    out[slots[OVERLAP] * channels + c] += dot3(m, p, g, n)
                if slots[PREDICTED] >= 0:
                    out[slots[PREDICTED] * channels + c] += dot(m, p, n)
                if slots[PREDICTED_SQUARED] >= 0:
                    out[slots[PREDICTED_SQUARED] * channels + c] += dot_square(m, p, n)
                    out[slots[REFERENCE_SQUARED] * channels + c] += dot_square(m, g, n)
                if slots[CROSS_ENTROPY] >= 0:
                    out[slots[CROSS_ENTROPY] * channels + c] += dot_log(mg, nlp, n)
                if slots[CROSS_ENTROPY_REST] >= 0:
                    out[slots[CROSS_ENTROPY_REST] * channels + c] += dot_log(mr, nlq, n)
                if slots[UNIFORM] >= 0:
                    if sigmoid:
                        for i in range(n):
                            voxel[_W1 + i] = voxel[_NLP + i] + voxel[_NLQ + i]
                        out[slots[UNIFORM] * channels + c] += dot_log(m, w1, n)
                    else:
                        out[slots[UNIFORM] * channels + c] += dot_log(m, nlp, n)
                for j in range(gammas):
                    power(q, numbers[1 + j], n, w1)
                    for i in range(n):
                        voxel[_W1 + i] *= voxel[_MG + i]
                    out[slots[FOCAL + 2 * j] * channels + c] += dot_log(w1, nlp, n)
                    if sigmoid:
                        power(p, numbers[1 + j], n, w1)
                        for i in range(n):
                            voxel[_W1 + i] *= voxel[_MR + i]
                        out[slots[FOCAL + 2 * j + 1] * channels + c] += dot_log(w1, nlq, n)


@kernel
def apply(
    turn,
    plan,
    operands,
    numbers,
    slots,
    scratch,
    label_scratch,
    wide_scratch,
    coefficients,
    dense,
    sigmoid,
):
    """The gradient of one block after the other, whose ``turn`` it is."""
    plan, operands, slots = data(plan), rows_of(operands), data(slots)
    channels = plan[CHANNELS]
    width = plan[TILE]
    voxel = data(scratch)
    labels = data(label_scratch)
    wide = data(wide_scratch)
    gammas = numbers.size - 1
    unused = shift(wide, 2 * WIDTH)
    zero, two = like(voxel, 0), like(voxel, 2)
    while True:
        block = take(turn)
        if block >= plan[BATCH] * plan[BLOCKS]:
            break
        sample = block // plan[BLOCKS]
        start = (block - sample * plan[BLOCKS]) * plan[BLOCK]
        stop = min(start + plan[BLOCK], plan[VOXELS])
        here = shift(data(coefficients), sample * channels)
        step = plan[BATCH] * channels
        for first in range(start, stop, width):
            n = min(width, stop - first)
            zeros = _load_voxels(
                plan,
                operands,
                numbers[0],
                dense,
                sample,
                first,
                n,
                voxel,
                labels,
                wide,
                unused,
            )
            for c in range(channels):
                _load_channel(
                    plan,
                    operands,
                    dense,
                    sigmoid,
                    gammas > 0,
                    zeros,
                    sample,
                    c,
                    first,
                    n,
                    voxel,
                    labels,
                )
                a, a2, o, ce, rest, u = zero, zero, zero, zero, zero, zero
                if slots[PREDICTED] >= 0:
                    a = here[slots[PREDICTED] * step + c]
                if slots[PREDICTED_SQUARED] >= 0:
                    a2 = two * here[slots[PREDICTED_SQUARED] * step + c]
                if slots[OVERLAP] >= 0:
                    o = here[slots[OVERLAP] * step + c]
                if slots[CROSS_ENTROPY] >= 0:
                    ce = here[slots[CROSS_ENTROPY] * step + c]
                if slots[CROSS_ENTROPY_REST] >= 0:
                    rest = here[slots[CROSS_ENTROPY_REST] * step + c]
                if slots[UNIFORM] >= 0:
                    u = here[slots[UNIFORM] * step + c]
                for i in range(n):
                    voxel[_BY_P + i] = voxel[_M + i] * (a + a2 * voxel[_P + i] + o * voxel[_G + i])
                for i in range(n):
                    voxel[_BY_LOG_P + i] = -(u * voxel[_M + i] + ce * voxel[_MG + i])
                    voxel[_BY_LOG_Q + i] = -(u * voxel[_M + i] + rest * voxel[_MR + i])
                for j in range(gammas):
                    coefficient = here[slots[FOCAL + 2 * j] * step + c]
                    _focal_slope(voxel, _P, _Q, _NLP, numbers[1 + j], n)
                    for i in range(n):
                        voxel[_BY_LOG_P + i] -= coefficient * voxel[_MG + i] * voxel[_W1 + i]
                    if sigmoid:
                        coefficient = here[slots[FOCAL + 2 * j + 1] * step + c]
                        _focal_slope(voxel, _Q, _P, _NLQ, numbers[1 + j], n)
                        for i in range(n):
                            voxel[_BY_LOG_Q + i] -= coefficient * voxel[_MR + i] * voxel[_W1 + i]
                if sigmoid:
                    for i in range(n):
                        slope = voxel[_BY_P + i] * voxel[_P + i] + voxel[_BY_LOG_P + i]
                        slope = slope * voxel[_Q + i] - voxel[_BY_LOG_Q + i] * voxel[_P + i]
                        voxel[_X + i] = slope
                else:
                    for i in range(n):
                        slope = voxel[_BY_LOG_P + i]
                        ratio = zero if slope == zero else slope / voxel[_P + i]
                        voxel[_X + i] = voxel[_BY_P + i] + ratio
                store(plan, operands[OUT], sample, c, first, n, shift(voxel, _X))


@inner
def _focal_slope(voxel, p, q, nlp, gamma, count):
    """Into W1: the derivative of q^γ log p by log p, given the rows of p, q and −log p."""
    if gamma == 0:
        fill(shift(voxel, _W1), 1, count)
        return
    power(shift(voxel, q), gamma, count, shift(voxel, _W1))
    power(shift(voxel, q), gamma - 1.0, count, shift(voxel, _W2))
    factor = like(voxel, gamma)
    for i in range(count):
        plogp = product(voxel, voxel[p + i], voxel[nlp + i])
        voxel[_W1 + i] += factor * product(voxel, plogp, voxel[_W2 + i])
