"""A softmax over three or four channels and a label map, in Numba, where every voxel counts alike:
one loop makes all that is a voxel's, and nothing of it goes through memory.

The logits are read where they lie, if that can be; those of the next tile are fetched a part of the
tile at a time, as a processor drops what it is asked for while it has some 20 lines under way. For
tiles with logits far from 0 there are the loops of `_numba_softmax_labels`.
"""

# mypy: ignore-errors
# What Numba compiles has no types that mypy could check.

from __future__ import annotations

from typing import Any

import numpy as np

from fastloss.backends._numba_math import exp_near, log_sum
from fastloss.backends._numba_pointers import like, select, shift
from fastloss.backends._numba_tile import (
    CHANNELS,
    DIRECT,
    PART,
    TILE,
    WIDTH,
    adding,
    fetch_part,
    inner,
    load,
    source,
)


@inner
def few_rows(plan, operand, sample, first, count, tile):
    """The pointers to the rows of logits; the last two are the same where there are three."""
    last = plan[CHANNELS] - 1
    x0, x1 = tile, shift(tile, plan[TILE])
    x2, x3 = shift(tile, 2 * plan[TILE]), shift(tile, last * plan[TILE])
    if operand[DIRECT] == 1:
        x0 = source(plan, operand, sample, 0, first, tile)
        x1 = source(plan, operand, sample, 1, first, tile)
        x2 = source(plan, operand, sample, 2, first, tile)
        x3 = source(plan, operand, sample, last, first, tile)
    else:
        for c in range(last + 1):
            load(plan, operand, sample, c, first, count, shift(tile, c * plan[TILE]))
    return x0, x1, x2, x3


def _sums(four: bool) -> Any:
    """To a row p of the label's class, and to another the odds against it. Returns how many voxels
    have logits that are not near 0, and Σ p of each class over the voxels of others."""

    @adding
    def sums(x0, x1, x2, x3, labels, row, count):
        zero, one, near = like(row, 0), like(row, 1), like(row, NEAR)
        label0, label1, label2 = np.int32(0), np.int32(1), np.int32(2)
        far, s0, s1, s2, s3 = zero, zero, zero, zero, zero
        for i in range(count):
            y, d0, d1, d2 = labels[i], x0[i], x1[i], x2[i]
            largest = select(abs(d0) > abs(d1), abs(d0), abs(d1))
            largest = select(largest > abs(d2), largest, abs(d2))
            e0, e1, e2 = exp_near(d0), exp_near(d1), exp_near(d2)
            is0, is1, is2 = y == label0, y == label1, y == label2
            o0, o1, o2 = select(is0, zero, e0), select(is1, zero, e1), select(is2, zero, e2)
            if four:
                d3 = x3[i]
                largest = select(largest > abs(d3), largest, abs(d3))
                e3 = exp_near(d3)
                own = select(is0, e0, select(is1, e1, select(is2, e2, e3)))
                o3 = select(y > label2, zero, e3)
                rest = (o0 + o1) + (o2 + o3)
            else:
                own = select(is0, e0, select(is1, e1, e2))
                rest = o0 + o1 + o2
            # One division for 1 / total and rest / own.
            total = own + rest
            both = one / (total * own)
            inverse = both * own
            s0 += o0 * inverse
            s1 += o1 * inverse
            s2 += o2 * inverse
            if four:
                s3 += o3 * inverse
            row[i] = own * inverse
            row[WIDTH + i] = rest * (total * both)
            far += select(largest > near, one, zero)
        return far, s0, s1, s2, s3

    return sums


def _gradients(four: bool) -> Any:
    """To rows from g on, of the derivatives by p, by p of the label's class, and by its −log p.
    Returns how many voxels have logits that are not near 0."""

    @adding
    def gradients(x0, x1, x2, x3, labels, by_p, by_own, by_loss, g, count):
        zero, one, near = like(g, 0), like(g, 1), like(g, NEAR)
        label0, label1, label2 = np.int32(0), np.int32(1), np.int32(2)
        a0, a1, a2 = by_p[0], by_p[1], by_p[2]
        h0, h1, h2, h3 = by_own[0], by_own[1], by_own[2], zero
        v0, v1, v2, v3 = by_loss[0], by_loss[1], by_loss[2], zero
        a3 = zero
        if four:
            a3, h3, v3 = by_p[3], by_own[3], by_loss[3]
        far = zero
        for i in range(count):
            y, d0, d1, d2 = labels[i], x0[i], x1[i], x2[i]
            largest = select(abs(d0) > abs(d1), abs(d0), abs(d1))
            largest = select(largest > abs(d2), largest, abs(d2))
            e0, e1, e2 = exp_near(d0), exp_near(d1), exp_near(d2)
            is0, is1, is2 = y == label0, y == label1, y == label2
            o0, o1, o2 = select(is0, zero, e0), select(is1, zero, e1), select(is2, zero, e2)
            if four:
                d3 = x3[i]
                largest = select(largest > abs(d3), largest, abs(d3))
                e3 = exp_near(d3)
                own = select(is0, e0, select(is1, e1, select(is2, e2, e3)))
                h = select(is0, h0, select(is1, h1, select(is2, h2, h3)))
                v = select(is0, v0, select(is1, v1, select(is2, v2, v3)))
                o3 = select(y > label2, zero, e3)
                rest = (o0 + o1) + (o2 + o3)
                slopes = (o0 * a0 + o1 * a1) + (o2 * a2 + o3 * a3)
            else:
                own = select(is0, e0, select(is1, e1, e2))
                h = select(is0, h0, select(is1, h1, h2))
                v = select(is0, v0, select(is1, v1, v2))
                rest = o0 + o1 + o2
                slopes = o0 * a0 + o1 * a1 + o2 * a2
            inverse = one / (own + rest)
            q = rest * inverse
            excess = slopes * inverse - h * q
            shared = (v - (h + excess)) * inverse
            at_label = -(own * inverse * excess + v * q)
            g[i] = select(is0, at_label, e0 * (inverse * a0 + shared))
            g[WIDTH + i] = select(is1, at_label, e1 * (inverse * a1 + shared))
            g[2 * WIDTH + i] = select(is2, at_label, e2 * (inverse * a2 + shared))
            if four:
                other = e3 * (inverse * a3 + shared)
                g[3 * WIDTH + i] = select(y > label2, at_label, other)
            far += select(largest > near, one, zero)
        return far

    return gradients


NEAR = 32
"""Exponentials of logits up to so far from 0 need no maximum taken off: neither they nor their
quotients and squares leave the range of float32, however many classes there are."""

sums_of_three, sums_of_four = _sums(False), _sums(True)
gradients_of_three, gradients_of_four = _gradients(False), _gradients(True)


@inner
def losses_of_few(row, count):
    """To a third row."""
    for i in range(count):
        row[2 * WIDTH + i] = log_sum(row[WIDTH + i], row[i])


@inner
def sums_of_few(plan, operand, sample, first, count, tile, labels, row):
    """What `_sums` says, of a whole tile."""
    far = s0 = s1 = s2 = s3 = like(row, 0)
    x0, x1, x2, x3 = few_rows(plan, operand, sample, first, count, tile)
    for i in range(0, count, PART):
        n = min(PART, count - i)
        fetch_part(plan, operand, sample, first, count, i, n)
        a0, a1, a2, a3 = shift(x0, i), shift(x1, i), shift(x2, i), shift(x3, i)
        y, to = shift(labels, i), shift(row, i)
        if plan[CHANNELS] == 4:
            f, t0, t1, t2, t3 = sums_of_four(a0, a1, a2, a3, y, to, n)
        else:
            f, t0, t1, t2, t3 = sums_of_three(a0, a1, a2, a3, y, to, n)
        far += f
        s0 += t0
        s1 += t1
        s2 += t2
        s3 += t3
    return far, s0, s1, s2, s3


@inner
def gradients_of_few(plan, operand, sample, first, count, tile, labels, by_p, by_own, by_loss, g):
    """What `_gradients` says, of a whole tile."""
    far = like(g, 0)
    x0, x1, x2, x3 = few_rows(plan, operand, sample, first, count, tile)
    for i in range(0, count, PART):
        n = min(PART, count - i)
        fetch_part(plan, operand, sample, first, count, i, n)
        a0, a1, a2, a3 = shift(x0, i), shift(x1, i), shift(x2, i), shift(x3, i)
        y, to = shift(labels, i), shift(g, i)
        if plan[CHANNELS] == 4:
            far += gradients_of_four(a0, a1, a2, a3, y, by_p, by_own, by_loss, to, n)
        else:
            far += gradients_of_three(a0, a1, a2, a3, y, by_p, by_own, by_loss, to, n)
    return far
