"""The two passes for a softmax over the channels and a label map, in Numba.

Each voxel's own class y is taken out of the rows: the others' exponentials are summed without it,
so that 1 − p_y keeps its precision where p_y is nearly 1, and so does the gradient there.
"""

# mypy: ignore-errors
# What Numba compiles has no types that mypy could check.

from __future__ import annotations

import numpy as np

from fastloss.backends._numba_math import exp, exp_near, log_sum
from fastloss.backends._numba_pointers import data, like, select, shift, take
from fastloss.backends._numba_softmax_few import (
    NEAR,
    gradients_of_few,
    losses_of_few,
    sums_of_few,
)
from fastloss.backends._numba_tile import (
    ADDRESS,
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
    TILE,
    TOP_K,
    UNDEFINED,
    UNIFORM,
    VOXELS,
    WEIGHT,
    WEIGHT_SUM,
    WIDTH,
    add_by_label,
    add_three_by_label,
    adding,
    any_infinite,
    below_largest,
    blank,
    by_label,
    carry,
    dot,
    dot3,
    fill,
    find_present,
    inner,
    kernel,
    load,
    load_labels,
    load_weights,
    power,
    product,
    raise_to,
    rows_of,
    store,
    summing,
    total,
    two_by_label,
)

# Rows of numbers per voxel, in units of elements.
_M = 0 * WIDTH  # the weight m
_MAX = 1 * WIDTH  # the largest logit
_D = 2 * WIDTH  # x_y less the largest
_E = 3 * WIDTH  # its exponential
_REST = 4 * WIDTH  # the sum of the other exponentials
_LOG = 5 * WIDTH  # log of the sum of all
_INVERSE = 6 * WIDTH  # 1 / sum
_MI = 7 * WIDTH  # m / sum
_P = 8 * WIDTH  # p_y
_Q = 9 * WIDTH  # 1 − p_y
_NLL = 10 * WIDTH  # −log p_y
_V = 11 * WIDTH  # a summand; the derivative by −log p_y
_A = 12 * WIDTH  # Σ of the others' exponentials times their derivatives by p
_H = 13 * WIDTH  # the derivative by p_y
_U = 14 * WIDTH  # the coefficient of uniform
_SHARED = 15 * WIDTH  # what the gradient of the other classes has in common
_OWN = 16 * WIDTH  # the gradient of the own class
_W1 = 17 * WIDTH
_W2 = 18 * WIDTH
_A_TOTAL = 19 * WIDTH  # what is summed up of A so far
_U_HIGH = 20 * WIDTH  # m / sum times the sum of the coefficients of uniform, and its rounding
_U_LOW = 21 * WIDTH
_G = _SHARED  # and the rows that follow: the gradient, where nothing else is made before it
ROWS = 22


@summing
def _uniform_row(x, voxel, count):
    """Σ m (largest − x)."""
    s = like(x, 0)
    for i in range(count):
        s += voxel[_M + i] * (voxel[_MAX + i] - x[i])
    return np.float64(s)


# Each row looks for the voxels of its class, and leaves 0 there.


@adding
def _near_row(x, voxel, labels, c, count):
    """Return how many logits are not near 0."""
    zero, one, near = like(x, 0), like(x, 1), like(x, NEAR)
    label = np.int32(c)  # 64 bits would halve the vectors
    far = zero
    for i in range(count):
        here = labels[i] == label
        d = x[i]
        e = exp_near(d)
        other = select(here, zero, e)
        x[i] = other
        voxel[_REST + i] += other
        voxel[_E + i] += select(here, e, zero)
        far += select(abs(d) > near, one, zero)
    return far


@adding
def _near_row_weighted(x, voxel, labels, c, weight, count):
    zero, one, near = like(x, 0), like(x, 1), like(x, NEAR)
    label = np.int32(c)
    far = zero
    for i in range(count):
        here = labels[i] == label
        d = x[i]
        e = exp_near(d)
        other = select(here, zero, e)
        x[i] = other
        voxel[_REST + i] += other
        voxel[_E + i] += select(here, e, zero)
        voxel[_A + i] += other * weight
        far += select(abs(d) > near, one, zero)
    return far


@adding
def _near_pair(x, x2, voxel, labels, c, count):
    """As `_near_row` for two classes, between which the sums stay in registers."""
    zero, one, near = like(x, 0), like(x, 1), like(x, NEAR)
    label, label2 = np.int32(c), np.int32(c + 1)
    far = zero
    for i in range(count):
        y = labels[i]
        d, d2 = x[i], x2[i]
        e, e2 = exp_near(d), exp_near(d2)
        other, other2 = select(y == label, zero, e), select(y == label2, zero, e2)
        x[i] = other
        x2[i] = other2
        voxel[_REST + i] += other + other2
        voxel[_E + i] += select(y == label, e, zero) + select(y == label2, e2, zero)
        largest = select(abs(d) > abs(d2), abs(d), abs(d2))
        far += select(largest > near, one, zero)
    return far


@adding
def _near_pair_weighted(x, x2, voxel, labels, c, weight, weight2, count):
    zero, one, near = like(x, 0), like(x, 1), like(x, NEAR)
    label, label2 = np.int32(c), np.int32(c + 1)
    far = zero
    for i in range(count):
        y = labels[i]
        d, d2 = x[i], x2[i]
        e, e2 = exp_near(d), exp_near(d2)
        other, other2 = select(y == label, zero, e), select(y == label2, zero, e2)
        x[i] = other
        x2[i] = other2
        voxel[_REST + i] += other + other2
        voxel[_E + i] += select(y == label, e, zero) + select(y == label2, e2, zero)
        voxel[_A + i] += other * weight + other2 * weight2
        largest = select(abs(d) > abs(d2), abs(d), abs(d2))
        far += select(largest > near, one, zero)
    return far


# Where no label names either class.


@adding
def _near_others(x, x2, voxel, count):
    zero, one, near = like(x, 0), like(x, 1), like(x, NEAR)
    far = zero
    for i in range(count):
        d, d2 = x[i], x2[i]
        e, e2 = exp_near(d), exp_near(d2)
        x[i] = e
        x2[i] = e2
        voxel[_REST + i] += e + e2
        largest = select(abs(d) > abs(d2), abs(d), abs(d2))
        far += select(largest > near, one, zero)
    return far


@adding
def _near_others_weighted(x, x2, voxel, weight, weight2, count):
    zero, one, near = like(x, 0), like(x, 1), like(x, NEAR)
    far = zero
    for i in range(count):
        d, d2 = x[i], x2[i]
        e, e2 = exp_near(d), exp_near(d2)
        x[i] = e
        x2[i] = e2
        voxel[_REST + i] += e + e2
        voxel[_A + i] += e * weight + e2 * weight2
        largest = select(abs(d) > abs(d2), abs(d), abs(d2))
        far += select(largest > near, one, zero)
    return far


@inner
def _far_row(x, voxel, labels, c, count):
    zero, label = like(x, 0), np.int32(c)
    for i in range(count):
        here = labels[i] == label
        d = x[i] - voxel[_MAX + i]
        e = exp(d)
        other = select(here, zero, e)
        x[i] = other
        voxel[_REST + i] += other
        voxel[_E + i] += select(here, e, zero)
        voxel[_D + i] += select(here, d, zero)


@inner
def _far_row_weighted(x, voxel, labels, c, weight, count):
    zero, label = like(x, 0), np.int32(c)
    for i in range(count):
        here = labels[i] == label
        d = x[i] - voxel[_MAX + i]
        e = exp(d)
        other = select(here, zero, e)
        x[i] = other
        voxel[_REST + i] += other
        voxel[_E + i] += select(here, e, zero)
        voxel[_D + i] += select(here, d, zero)
        voxel[_A + i] += other * weight


@inner
def _load_voxels(
    plan, operands, ignore, sample, first, count, voxel, labels, present, wide, counts
):
    """Labels, the classes they name, and weights. Returns whether any weight is 0."""
    weights = shift(voxel, _M)
    zeros = load_weights(plan, operands, sample, first, count, weights, wide, counts)
    zeros |= load_labels(
        plan, operands, ignore, sample, first, count, labels, weights, wide, counts
    )
    find_present(labels, count, plan[CHANNELS], present)
    return zeros


@inner
def _begin_sums(voxel, wide, count):
    fill(shift(voxel, _REST), 0, count)
    fill(shift(voxel, _E), 0, count)
    fill(shift(voxel, _A), 0, count)
    fill(shift(voxel, _A_TOTAL), 0, count)
    fill(wide, 0, count)


@inner
def _carry_sums(voxel, wide, c, count):
    if c % GROUP == GROUP - 1:
        carry(shift(voxel, _REST), wide, count)
        carry(shift(voxel, _A), shift(voxel, _A_TOTAL), count)


@inner
def _activate_near(
    plan,
    operand,
    sample,
    first,
    count,
    zeros,
    voxel,
    tile,
    labels,
    present,
    wide,
    weights,
    weighted,
):
    """Exponentials of the other classes and of the own one, if all logits are near 0.

    Otherwise False is returned, and nothing that was computed is of use.
    """
    _begin_sums(voxel, wide, count)
    channels = plan[CHANNELS]
    for c in range(0, channels, 2):
        x = shift(tile, c * plan[TILE])
        x2 = shift(x, plan[TILE])
        pair = c + 1 < channels
        load(plan, operand, sample, c, first, count, x)
        if pair:
            load(plan, operand, sample, c + 1, first, count, x2)
        if zeros:
            blank(x, shift(voxel, _M), count)
            if pair:
                blank(x2, shift(voxel, _M), count)
        others = pair and present[c] + present[c + 1] == 0
        if others & weighted:
            far = _near_others_weighted(x, x2, voxel, weights[c], weights[c + 1], count)
        elif others:
            far = _near_others(x, x2, voxel, count)
        elif pair & weighted:
            far = _near_pair_weighted(x, x2, voxel, labels, c, weights[c], weights[c + 1], count)
        elif pair:
            far = _near_pair(x, x2, voxel, labels, c, count)
        elif weighted:
            far = _near_row_weighted(x, voxel, labels, c, weights[c], count)
        else:
            far = _near_row(x, voxel, labels, c, count)
        if far > 0:
            return False
        _carry_sums(voxel, wide, c + 1 if pair else c, count)  # GROUP is even
    return True


@inner
def _load_tile(plan, operand, sample, first, count, zeros, voxel, tile):
    """All logits and the largest. An infinite one is taken out at once."""
    channels = plan[CHANNELS]
    width = plan[TILE]
    largest = shift(voxel, _MAX)
    for c in range(channels):
        x = shift(tile, c * width)
        load(plan, operand, sample, c, first, count, x)
        if zeros:
            blank(x, shift(voxel, _M), count)
        if c == 0:
            for i in range(count):
                largest[i] = x[i]
        else:
            raise_to(largest, x, count)
    if any_infinite(largest, count):
        for c in range(channels):
            below_largest(shift(tile, c * width), largest, count)
        fill(largest, 0, count)


@inner
def _activate_far(plan, voxel, tile, labels, wide, count, weights, weighted):
    """The same with the largest logit taken off."""
    _begin_sums(voxel, wide, count)
    fill(shift(voxel, _D), 0, count)
    for c in range(plan[CHANNELS]):
        x = shift(tile, c * plan[TILE])
        if weighted:
            _far_row_weighted(x, voxel, labels, c, weights[c], count)
        else:
            _far_row(x, voxel, labels, c, count)
        _carry_sums(voxel, wide, c, count)


@inner
def _normalise(plan, voxel, wide, count):
    """All that is known of the own class, once the exponentials are."""
    if plan[CHANNELS] >= GROUP:
        carry(shift(voxel, _REST), wide, count)
        for i in range(count):
            voxel[_REST + i] = wide[i]
            voxel[_A + i] += voxel[_A_TOTAL + i]
    one = like(voxel, 1)
    for i in range(count):
        e = voxel[_E + i]
        rest = voxel[_REST + i]
        inverse = one / (rest + e)
        voxel[_INVERSE + i] = inverse
        voxel[_MI + i] = inverse * voxel[_M + i]
        voxel[_P + i] = e / (rest + e)  # exactly 1 where the others vanish
        voxel[_Q + i] = rest * inverse


@inner
def _logarithms(near, voxel, count):
    """Their values mean nothing where a logit is NaN; all that they enter is NaN for it anyway."""
    if near:
        for i in range(count):
            odds = voxel[_REST + i] / voxel[_E + i]
            voxel[_NLL + i] = log_sum(odds, voxel[_P + i])
        return
    one = like(voxel, 1)
    for i in range(count):
        # The exponential of the largest logit is exactly 1, so nothing small is lost here.
        log = log_sum(voxel[_REST + i] + (voxel[_E + i] - one), voxel[_INVERSE + i])
        voxel[_LOG + i] = log
        voxel[_NLL + i] = log - voxel[_D + i]


@inner
def _suits_few(operands, slots, channels, gammas):
    more = (slots[PREDICTED_SQUARED] >= 0) | (slots[UNIFORM] >= 0) | (slots[TOP_K] >= 0)
    alike = operands[WEIGHT][ADDRESS] == 0
    return (channels == 3) | (channels == 4) and alike and not (more or gammas > 0)


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
    losses,
    loss_weights,
):
    """The sums of one block after the other, whose ``turn`` it is."""
    plan, operands, slots = data(plan), rows_of(operands), data(slots)
    channels = plan[CHANNELS]
    width = plan[TILE]
    voxel = data(scratch)
    tile = shift(voxel, ROWS * WIDTH)
    labels = data(label_scratch)
    wide = data(wide_scratch)
    gammas = numbers.size - 1
    predicted = slots[PREDICTED]
    squared = slots[PREDICTED_SQUARED]
    top_k = slots[TOP_K] >= 0
    logs = (slots[CROSS_ENTROPY] >= 0) | (slots[UNIFORM] >= 0) | (gammas > 0) | top_k
    few = _suits_few(operands, slots, channels, gammas)
    m, v, w2 = shift(voxel, _M), shift(voxel, _V), shift(voxel, _W2)
    unused, present = shift(wide, 2 * WIDTH), shift(labels, WIDTH)
    operand = operands[LOGITS]
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
                plan, operands, numbers[0], sample, first, n, voxel, labels, present, wide, count_of
            )
            if few & (not zeros):
                row = shift(voxel, _P)
                far, s0, s1, s2, s3 = sums_of_few(
                    plan, operand, sample, first, n, tile, labels, row
                )
                if far == 0:
                    if logs:
                        losses_of_few(row, n)
                    count_of[WEIGHT_SUM] += n
                    undefined = s0 + s1
                    count_of[UNDEFINED] += 0 if undefined == undefined else 1
                    add_three_by_label(
                        m,
                        row,
                        shift(voxel, _NLL) if logs else m,
                        labels,
                        n,
                        channels,
                        present,
                        shift(out, slots[REFERENCE] * channels),
                        shift(out, slots[OVERLAP] * channels) if slots[OVERLAP] >= 0 else unused,
                        shift(out, slots[CROSS_ENTROPY] * channels) if logs else unused,
                    )
                    if predicted >= 0:
                        to = shift(out, predicted * channels)
                        to[0] += s0
                        to[1] += s1
                        to[2] += s2
                        if channels == 4:
                            to[3] += s3
                    continue
            near = False
            if slots[UNIFORM] < 0:  # which needs the logits themselves
                near = _activate_near(
                    plan,
                    operand,
                    sample,
                    first,
                    n,
                    zeros,
                    voxel,
                    tile,
                    labels,
                    present,
                    wide,
                    tile,
                    False,
                )
            if not near:
                _load_tile(plan, operand, sample, first, n, zeros, voxel, tile)
                if slots[UNIFORM] >= 0:
                    row = shift(out, slots[UNIFORM] * channels)
                    for c in range(channels):
                        row[c] += _uniform_row(shift(tile, c * width), voxel, n)
                _activate_far(plan, voxel, tile, labels, wide, n, tile, False)
            _normalise(plan, voxel, wide, n)
            count_of[WEIGHT_SUM] += total(m, n)
            # Finite for every voxel, unless a logit was NaN.
            undefined = total(shift(voxel, _INVERSE), n)
            count_of[UNDEFINED] += 0 if undefined == undefined else 1
            if logs:
                _logarithms(near, voxel, n)
                for i in range(n):
                    voxel[_W2 + i] = product(voxel, voxel[_M + i], voxel[_NLL + i])
            if top_k:
                by_label(data(loss_weights), labels, n, channels, shift(voxel, _W1))
                loss = shift(data(losses), sample * plan[VOXELS] + first)
                for i in range(n):
                    loss[i] = product(voxel, voxel[_W1 + i], voxel[_W2 + i])
            for i in range(n):
                voxel[_V + i] = voxel[_M + i] * voxel[_P + i]
            add_three_by_label(
                m,
                v,
                w2 if slots[CROSS_ENTROPY] >= 0 else m,
                labels,
                n,
                channels,
                present,
                shift(out, slots[REFERENCE] * channels),
                shift(out, slots[OVERLAP] * channels) if slots[OVERLAP] >= 0 else unused,
                shift(out, slots[CROSS_ENTROPY] * channels)
                if slots[CROSS_ENTROPY] >= 0
                else unused,
            )
            if predicted >= 0:
                # The own class is the overlap, which is added at the end.
                row = shift(out, predicted * channels)
                for c in range(channels):
                    row[c] += dot(shift(tile, c * width), shift(voxel, _MI), n)
            if squared >= 0:
                row = shift(out, squared * channels)
                for i in range(n):
                    voxel[_V + i] = voxel[_MI + i] * voxel[_INVERSE + i]
                for c in range(channels):
                    x = shift(tile, c * width)
                    row[c] += dot3(x, x, v, n)
                for i in range(n):
                    voxel[_V + i] = voxel[_M + i] * (voxel[_P + i] * voxel[_P + i])
                add_by_label(v, labels, n, channels, row)
            if slots[UNIFORM] >= 0:
                row = shift(out, slots[UNIFORM] * channels)
                shared = dot(m, shift(voxel, _LOG), n)
                for c in range(channels):
                    row[c] += shared
            for j in range(gammas):
                power(shift(voxel, _Q), numbers[1 + j], n, shift(voxel, _W1))
                for i in range(n):
                    factor = voxel[_M + i] * voxel[_W1 + i]
                    voxel[_V + i] = product(voxel, factor, voxel[_NLL + i])
                add_by_label(v, labels, n, channels, shift(out, slots[FOCAL + 2 * j] * channels))
        if predicted >= 0:
            for c in range(channels):
                out[predicted * channels + c] += out[slots[OVERLAP] * channels + c]
        if slots[REFERENCE_SQUARED] >= 0:
            for c in range(channels):
                out[slots[REFERENCE_SQUARED] * channels + c] = out[slots[REFERENCE] * channels + c]


@inner
def _uniform_gradient_row(x, voxel, u, count):
    """Into W1."""
    for i in range(count):
        e = x[i]
        difference = e * voxel[_U_HIGH + i] - voxel[_M + i] * u
        voxel[_W1 + i] = difference + e * voxel[_U_LOW + i]


@inner
def _gradient_row(x, voxel, labels, c, a, count):
    label = np.int32(c)
    for i in range(count):
        own = voxel[_OWN + i]
        other = x[i] * (voxel[_MI + i] * a + voxel[_SHARED + i])
        x[i] = select(labels[i] == label, own, other)


@inner
def _gradient_pair(x, x2, voxel, labels, c, a, a2, count):
    """As `_gradient_row` for two classes, between which what is a voxel's stays in registers."""
    label, label2 = np.int32(c), np.int32(c + 1)
    for i in range(count):
        y, own, slope, shared = labels[i], voxel[_OWN + i], voxel[_MI + i], voxel[_SHARED + i]
        other, other2 = x[i] * (slope * a + shared), x2[i] * (slope * a2 + shared)
        x[i] = select(y == label, own, other)
        x2[i] = select(y == label2, own, other2)


@inner
def _gradient_others(x, x2, voxel, a, a2, count):
    """The same where no label names either class."""
    for i in range(count):
        slope, shared = voxel[_MI + i], voxel[_SHARED + i]
        x[i] = x[i] * (slope * a + shared)
        x2[i] = x2[i] * (slope * a2 + shared)


@inner
def _gradient_row_squared(x, voxel, labels, c, a, a2, count):
    label = np.int32(c)
    for i in range(count):
        own = voxel[_OWN + i]
        p = x[i] * voxel[_INVERSE + i]
        slope = voxel[_M + i] * (a + a2 * p)
        other = p * slope + (x[i] * voxel[_SHARED + i] + voxel[_W1 + i])
        x[i] = select(labels[i] == label, own, other)


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
    losses,
    loss_weights,
):
    """The gradient of one block after the other, whose ``turn`` it is."""
    plan, operands, slots = data(plan), rows_of(operands), data(slots)
    channels = plan[CHANNELS]
    width = plan[TILE]
    voxel = data(scratch)
    tile = shift(voxel, ROWS * WIDTH)
    labels = data(label_scratch)
    wide = data(wide_scratch)
    gammas = numbers.size - 1
    unused, present = shift(wide, 2 * WIDTH), shift(labels, WIDTH)
    operand = operands[LOGITS]
    h, v, w1, w2 = shift(voxel, _H), shift(voxel, _V), shift(voxel, _W1), shift(voxel, _W2)
    zero, two = like(voxel, 0), like(voxel, 2)
    by_own = shift(tile, channels * width)
    by_loss = shift(by_own, channels)
    by_others = shift(by_loss, channels)
    few = _suits_few(operands, slots, channels, gammas)
    while True:
        block = take(turn)
        if block >= plan[BATCH] * plan[BLOCKS]:
            break
        sample = block // plan[BLOCKS]
        start = (block - sample * plan[BLOCKS]) * plan[BLOCK]
        stop = min(start + plan[BLOCK], plan[VOXELS])
        here = shift(data(coefficients), sample * channels)
        step = plan[BATCH] * channels
        by_overlap = shift(here, max(slots[OVERLAP], 0) * step)
        by_predicted = shift(here, max(slots[PREDICTED], 0) * step)
        by_squared = shift(here, max(slots[PREDICTED_SQUARED], 0) * step)
        by_uniform = shift(here, max(slots[UNIFORM], 0) * step)
        predicted = slots[PREDICTED] >= 0
        squared = slots[PREDICTED_SQUARED] >= 0
        uniform = slots[UNIFORM] >= 0
        cross_entropy = slots[CROSS_ENTROPY] >= 0
        for c in range(channels):
            by_others[c] = by_predicted[c] if predicted else zero
            by_own[c] = by_others[c]
            by_own[c] += by_overlap[c] if slots[OVERLAP] >= 0 else zero
            by_loss[c] = here[slots[CROSS_ENTROPY] * step + c] if cross_entropy else zero
        sum_of_uniform = 0.0
        if uniform:
            for c in range(channels):
                sum_of_uniform += by_uniform[c]
        for first in range(start, stop, width):
            n = min(width, stop - first)
            zeros = _load_voxels(
                plan,
                operands,
                numbers[0],
                sample,
                first,
                n,
                voxel,
                labels,
                present,
                wide,
                unused,
            )
            if few & (not zeros):
                g = shift(voxel, _G)
                far = gradients_of_few(
                    plan,
                    operand,
                    sample,
                    first,
                    n,
                    tile,
                    labels,
                    by_others,
                    by_own,
                    by_loss,
                    g,
                )
                if far == 0:
                    for c in range(channels):
                        store(plan, operands[OUT], sample, c, first, n, shift(g, c * WIDTH))
                    continue
            near = _activate_near(
                plan,
                operand,
                sample,
                first,
                n,
                zeros,
                voxel,
                tile,
                labels,
                present,
                wide,
                by_predicted,
                predicted,
            )
            if not near:
                _load_tile(plan, operand, sample, first, n, zeros, voxel, tile)
                _activate_far(plan, voxel, tile, labels, wide, n, by_predicted, predicted)
            _normalise(plan, voxel, wide, n)

            # The derivative by p_y, and with it Σ_c p_c (the derivative by p_c − that by p_y).
            # The derivative by −log p_y, at first without the voxel weight.
            two_by_label(by_own, by_loss, labels, n, channels, present, h, v)
            for i in range(n):
                voxel[_A + i] *= voxel[_INVERSE + i]
            if squared:
                by_label(by_squared, labels, n, channels, w1)
                for i in range(n):
                    voxel[_H + i] += two * voxel[_W1 + i] * voxel[_P + i]
                fill(w2, 0, n)
                for c in range(channels):
                    x = shift(tile, c * width)
                    a2 = two * by_squared[c]
                    for i in range(n):
                        p = x[i] * voxel[_INVERSE + i]
                        voxel[_W2 + i] += p * p * a2
                for i in range(n):
                    voxel[_A + i] += voxel[_W2 + i]

            if slots[TOP_K] >= 0:
                by_label(shift(here, slots[TOP_K] * step), labels, n, channels, w2)
                share = shift(data(losses), sample * plan[VOXELS] + first)
                for i in range(n):
                    voxel[_V + i] += voxel[_W2 + i] * share[i]
            if gammas > 0:
                _logarithms(near, voxel, n)
                for j in range(gammas):
                    _focal_slope(voxel, numbers[1 + j], n)
                    by_label(shift(here, slots[FOCAL + 2 * j] * step), labels, n, channels, w2)
                    for i in range(n):
                        voxel[_V + i] += voxel[_W2 + i] * voxel[_W1 + i]
            fill(shift(voxel, _U), 0, n)
            fill(shift(voxel, _U_HIGH), 0, n)
            fill(shift(voxel, _U_LOW), 0, n)
            fill(w1, 0, n)
            if uniform:
                by_label(by_uniform, labels, n, channels, shift(voxel, _U))
                if channels < GROUP:
                    for i in range(n):
                        wide[i] = voxel[_REST + i]
                # Where the classes are about equally likely, the gradient of uniform is the
                # difference of nearly equal numbers: keep one of them in twice the digits.
                for i in range(n):
                    factor = voxel[_M + i] * sum_of_uniform / (wide[i] + voxel[_E + i])
                    rounded = like(voxel, factor)
                    voxel[_U_HIGH + i] = rounded
                    voxel[_U_LOW + i] = factor - rounded
            for i in range(n):
                weight = voxel[_M + i]
                excess = voxel[_A + i] - voxel[_H + i] * voxel[_Q + i]
                slope = weight * voxel[_V + i]
                shared = slope - weight * (voxel[_H + i] + excess)
                voxel[_SHARED + i] = shared * voxel[_INVERSE + i]
                e = voxel[_E + i]
                own = e * voxel[_U_HIGH + i] - weight * voxel[_U + i] + e * voxel[_U_LOW + i]
                own -= weight * voxel[_P + i] * excess
                voxel[_OWN + i] = own - slope * voxel[_Q + i]
            done = 0
            if not (squared | uniform):
                for c in range(0, channels - 1, 2):
                    x = shift(tile, c * width)
                    a = by_predicted[c] if predicted else zero
                    a2 = by_predicted[c + 1] if predicted else zero
                    x2 = shift(x, width)
                    if present[c] + present[c + 1] == 0:
                        _gradient_others(x, x2, voxel, a, a2, n)
                    else:
                        _gradient_pair(x, x2, voxel, labels, c, a, a2, n)
                    store(plan, operands[OUT], sample, c, first, n, x)
                    store(plan, operands[OUT], sample, c + 1, first, n, x2)
                    done = c + 2
            for c in range(done, channels):
                x = shift(tile, c * width)
                a = by_predicted[c] if predicted else zero
                if uniform:
                    _uniform_gradient_row(x, voxel, by_uniform[c], n)
                if squared | uniform:
                    a2 = two * by_squared[c] if squared else zero
                    _gradient_row_squared(x, voxel, labels, c, a, a2, n)
                else:
                    _gradient_row(x, voxel, labels, c, a, n)
                store(plan, operands[OUT], sample, c, first, n, x)


@inner
def _focal_slope(voxel, gamma, count):
    """Into W1: the derivative of q^γ log p by log p."""
    power(shift(voxel, _Q), gamma, count, shift(voxel, _W1))
    if gamma != 0:
        power(shift(voxel, _Q), gamma - 1.0, count, shift(voxel, _W2))
        factor = like(voxel, gamma)
        for i in range(count):
            plogp = product(voxel, voxel[_P + i], voxel[_NLL + i])
            voxel[_W1 + i] += factor * product(voxel, plogp, voxel[_W2 + i])
