"""The two passes for a softmax over the channels and a dense target, in Numba."""

# mypy: ignore-errors
# What Numba compiles has no types that mypy could check.

from __future__ import annotations

from fastloss.backends._numba_math import exp, log1p
from fastloss.backends._numba_pointers import data, like, shift, take
from fastloss.backends._numba_tile import (
    BATCH,
    BLOCK,
    BLOCKS,
    CHANNELS,
    CROSS_ENTROPY,
    FOCAL,
    GROUP,
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
    any_infinite,
    below_largest,
    blank,
    carry,
    dot,
    dot3,
    dot_log,
    dot_square,
    fill,
    ignore_dense,
    inner,
    kernel,
    load,
    load_weights,
    power,
    product,
    raise_to,
    rows_of,
    store,
    total,
)

# Rows of numbers per voxel, in units of elements.
_M = 0 * WIDTH  # the weight m
_MAX = 1 * WIDTH  # the largest logit
_REST = 2 * WIDTH  # the sum of the exponentials below 1
_TIES = 3 * WIDTH  # how many are 1
_LOG = 4 * WIDTH  # log of the sum of all
_INVERSE = 5 * WIDTH  # 1 / sum
_MI = 6 * WIDTH  # m / sum
_Q = 7 * WIDTH  # 1 − p of the largest
_SUM_REST = 8 * WIDTH  # Σ of the derivatives by log p, without the largest
_SUM = 9 * WIDTH  # and of all
_NEAR_ONE = 10 * WIDTH  # 1 where the largest p is nearly 1, else 2, which no exponential is
_MG = 11 * WIDTH
_W1 = 12 * WIDTH
_W2 = 13 * WIDTH
_W3 = 14 * WIDTH
_TOTAL_REST = 15 * WIDTH  # what is summed up so far
_HIGH = 16 * WIDTH  # SUM / sum of the exponentials, and its rounding
_LOW = 17 * WIDTH
ROWS = 18


@inner
def _load_tile(
    plan, operands, ignore, sample, first, count, voxel, tile, exponentials, targets, wide, counts
):
    """Logits less the largest, their exponentials, targets and weights.

    The second half of ``wide`` is filled with the sums of the exponentials.
    """
    channels = plan[CHANNELS]
    width = plan[TILE]
    weights = shift(voxel, _M)
    zeros = load_weights(plan, operands, sample, first, count, weights, wide, counts)
    zeros |= ignore_dense(plan, operands, ignore, sample, first, count, weights, wide)
    largest = shift(voxel, _MAX)
    logits, target = operands[LOGITS], operands[TARGET]
    for c in range(channels):
        x, g = shift(tile, c * width), shift(targets, c * width)
        load(plan, logits, sample, c, first, count, x)
        load(plan, target, sample, c, first, count, g)
        if zeros:
            blank(x, weights, count)
            blank(g, weights, count)
        if c == 0:
            for i in range(count):
                largest[i] = x[i]
        else:
            raise_to(largest, x, count)
    if any_infinite(largest, count):
        for c in range(channels):
            below_largest(shift(tile, c * width), largest, count)
        fill(largest, 0, count)
    fill(shift(voxel, _REST), 0, count)
    fill(shift(voxel, _TIES), 0, count)
    sums = shift(wide, WIDTH)
    fill(sums, 0, count)
    for c in range(channels):
        _exp_row(shift(tile, c * width), shift(exponentials, c * width), voxel, count)
        if c % GROUP == GROUP - 1:
            carry(shift(voxel, _REST), sums, count)
    carry(shift(voxel, _REST), sums, count)
    one, two, quarter = like(voxel, 1), like(voxel, 2), like(voxel, 0.25)
    for i in range(count):
        voxel[_REST + i] = sums[i]
        sums[i] += voxel[_TIES + i]
    for i in range(count):
        ties = voxel[_TIES + i]
        rest = voxel[_REST + i]
        inverse = one / (rest + ties)
        voxel[_INVERSE + i] = inverse
        voxel[_MI + i] = inverse * voxel[_M + i]
        complement = (rest + (ties - one)) * inverse
        voxel[_Q + i] = complement
        voxel[_NEAR_ONE + i] = one if complement < quarter else two
    for i in range(count):
        # What is small beside the largest exponential, 1, is not lost in the sum.
        voxel[_LOG + i] = log1p(voxel[_REST + i] + (voxel[_TIES + i] - one))


@inner
def _exp_row(x, e, voxel, count):
    zero, one = like(x, 0), like(x, 1)
    for i in range(count):
        d = x[i] - voxel[_MAX + i]
        y = exp(d)
        x[i] = d
        e[i] = y
        voxel[_REST + i] += zero if y == one else y
        voxel[_TIES + i] += one if y == one else zero


@inner
def _complement_row(e, voxel, count, row):
    """1 − p, precise for the largest p."""
    one = like(e, 1)
    for i in range(count):
        y, top = e[i], voxel[_Q + i]
        other = one - y * voxel[_INVERSE + i]
        row[i] = top if y == one else other


@inner
def _nll_row(x, voxel, count, row):
    for i in range(count):
        row[i] = voxel[_LOG + i] - x[i]


@kernel
def reduce(
    turn, plan, operands, numbers, slots, scratch, label_scratch, wide_scratch, sums, counts
):
    """The sums of one block after the other, whose ``turn`` it is."""
    plan, operands, slots = data(plan), rows_of(operands), data(slots)
    channels = plan[CHANNELS]
    width = plan[TILE]
    voxel = data(scratch)
    tile = shift(voxel, ROWS * WIDTH)
    exponentials = shift(tile, channels * width)
    targets = shift(exponentials, channels * width)
    wide = data(wide_scratch)
    gammas = numbers.size - 1
    m, mi, mg = shift(voxel, _M), shift(voxel, _MI), shift(voxel, _MG)
    w1, w2, w3 = shift(voxel, _W1), shift(voxel, _W2), shift(voxel, _W3)
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
            _load_tile(
                plan,
                operands,
                numbers[0],
                sample,
                first,
                n,
                voxel,
                tile,
                exponentials,
                targets,
                wide,
                count_of,
            )
            count_of[WEIGHT_SUM] += total(m, n)
            for c in range(channels):
                x = shift(tile, c * width)
                e = shift(exponentials, c * width)
                g = shift(targets, c * width)
                for i in range(n):
                    voxel[_MG + i] = voxel[_M + i] * g[i]
                out[slots[REFERENCE] * channels + c] += total(mg, n)
                if slots[OVERLAP] >= 0:
                    out[slots[OVERLAP] * channels + c] += dot3(mi, e, g, n)
                if slots[PREDICTED] >= 0:
                    out[slots[PREDICTED] * channels + c] += dot(mi, e, n)
                if slots[PREDICTED_SQUARED] >= 0:
                    for i in range(n):
                        voxel[_W1 + i] = e[i] * voxel[_INVERSE + i]
                    out[slots[PREDICTED_SQUARED] * channels + c] += dot_square(m, w1, n)
                    out[slots[REFERENCE_SQUARED] * channels + c] += dot_square(m, g, n)
                if logs:
                    _nll_row(x, voxel, n, w3)
                if slots[CROSS_ENTROPY] >= 0:
                    out[slots[CROSS_ENTROPY] * channels + c] += dot_log(mg, w3, n)
                if slots[UNIFORM] >= 0:
                    out[slots[UNIFORM] * channels + c] += dot_log(m, w3, n)
                if gammas > 0:
                    _complement_row(e, voxel, n, w1)
                    for j in range(gammas):
                        power(w1, numbers[1 + j], n, w2)
                        for i in range(n):
                            voxel[_W2 + i] *= voxel[_MG + i]
                        out[slots[FOCAL + 2 * j] * channels + c] += dot_log(w2, w3, n)


@kernel
def apply(turn, plan, operands, numbers, slots, scratch, label_scratch, wide_scratch, coefficients):
    """The gradient of one block after the other, whose ``turn`` it is."""
    plan, operands, slots = data(plan), rows_of(operands), data(slots)
    channels = plan[CHANNELS]
    width = plan[TILE]
    voxel = data(scratch)
    tile = shift(voxel, ROWS * WIDTH)
    exponentials = shift(tile, channels * width)
    targets = shift(exponentials, channels * width)
    wide = data(wide_scratch)
    gammas = numbers.size - 1
    unused = shift(wide, 2 * WIDTH)
    w1, w3 = shift(voxel, _W1), shift(voxel, _W3)
    zero, one, two = like(voxel, 0), like(voxel, 1), like(voxel, 2)
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
            _load_tile(
                plan,
                operands,
                numbers[0],
                sample,
                first,
                n,
                voxel,
                tile,
                exponentials,
                targets,
                wide,
                unused,
            )
            fill(shift(voxel, _SUM), 0, n)
            fill(shift(voxel, _SUM_REST), 0, n)
            fill(wide, 0, n)
            fill(shift(voxel, _TOTAL_REST), 0, n)
            for c in range(channels):
                x = shift(tile, c * width)
                e = shift(exponentials, c * width)
                g = shift(targets, c * width)
                a, a2, o, ce, u = zero, zero, zero, zero, zero
                if slots[PREDICTED] >= 0:
                    a = here[slots[PREDICTED] * step + c]
                if slots[PREDICTED_SQUARED] >= 0:
                    a2 = two * here[slots[PREDICTED_SQUARED] * step + c]
                if slots[OVERLAP] >= 0:
                    o = here[slots[OVERLAP] * step + c]
                if slots[CROSS_ENTROPY] >= 0:
                    ce = here[slots[CROSS_ENTROPY] * step + c]
                if slots[UNIFORM] >= 0:
                    u = here[slots[UNIFORM] * step + c]
                # The derivative by −log p over the target, in W1.
                fill(w1, ce, n)
                if gammas > 0:
                    _nll_row(x, voxel, n, w3)
                for j in range(gammas):
                    _add_focal_slope(
                        voxel, e, here[slots[FOCAL + 2 * j] * step + c], numbers[1 + j], n
                    )
                # The derivative by log p, in place of the logits.
                for i in range(n):
                    p = e[i] * voxel[_INVERSE + i]
                    region = p * (a + a2 * p + o * g[i])
                    x[i] = voxel[_M + i] * (region - (u + g[i] * voxel[_W1 + i]))
                for i in range(n):
                    t = x[i]
                    voxel[_SUM + i] += t
                    voxel[_SUM_REST + i] += zero if e[i] == one else t
                if c % GROUP == GROUP - 1:
                    carry(shift(voxel, _SUM), wide, n)
                    carry(shift(voxel, _SUM_REST), shift(voxel, _TOTAL_REST), n)
            carry(shift(voxel, _SUM), wide, n)
            carry(shift(voxel, _TOTAL_REST), shift(voxel, _SUM_REST), n)
            for i in range(n):
                # Where several classes are there at once, the gradient can be the difference of
                # nearly equal numbers: keep one of them in twice the digits.
                factor = wide[i] / wide[WIDTH + i]
                rounded = like(voxel, factor)
                voxel[_HIGH + i] = rounded
                voxel[_LOW + i] = factor - rounded
            for c in range(channels):
                x = shift(tile, c * width)
                e = shift(exponentials, c * width)
                for i in range(n):
                    # t − p Σt, where p is nearly 1 as t (1−p) − p (Σt − t).
                    y, t = e[i], x[i]
                    p = y * voxel[_INVERSE + i]
                    top = t * voxel[_Q + i] - p * voxel[_SUM_REST + i]
                    other = (t - y * voxel[_HIGH + i]) - y * voxel[_LOW + i]
                    x[i] = top if y == voxel[_NEAR_ONE + i] else other
                store(plan, operands[OUT], sample, c, first, n, x)


@inner
def _add_focal_slope(voxel, e, coefficient, gamma, count):
    """Add to W1 the coefficient times the derivative of q^γ log p by log p; −log p is in W3."""
    if gamma == 0:
        for i in range(count):
            voxel[_W1 + i] += coefficient
        return
    _complement_row(e, voxel, count, shift(voxel, _MG))
    power(shift(voxel, _MG), gamma, count, shift(voxel, _W2))
    for i in range(count):
        voxel[_W1 + i] += coefficient * voxel[_W2 + i]
    power(shift(voxel, _MG), gamma - 1.0, count, shift(voxel, _W2))
    factor = coefficient * like(voxel, gamma)
    for i in range(count):
        plogp = product(voxel, e[i] * voxel[_INVERSE + i], voxel[_W3 + i])
        voxel[_W1 + i] += factor * product(voxel, plogp, voxel[_W2 + i])
