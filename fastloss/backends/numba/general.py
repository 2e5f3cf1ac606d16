"""The general path: any table of sums, any activation and target, with fields, regions and maps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fastloss.backends.numba.functions import (
    FUNCTIONS,
    LOG_P,
    LOG_Q,
    P_GAMMA,
    Q_GAMMA,
    WEIGHTS,
    Voxel,
    product,
)
from fastloss.backends.numba.kernels import inner, kernel, named
from fastloss.backends.numba.maths import exp, log, log_sum
from fastloss.backends.numba.rows import (
    INVERSE,
    LARGEST,
    LOGITS,
    REST,
    WEIGHT,
    P,
    add_slopes,
    difference,
    gradient,
    largest_row,
    log_sum_row,
    masked,
    softmax,
    total,
    voxel_weights,
)

SOFTMAX, SIGMOID, NONE = range(3)
VOXEL, CLASS, ERROR, MASK = 1, 2, 3, 4  # kinds of maps; 0: none
# Columns of the table of sums: per sum, the numbers of its weight and of its function, the inputs
# that the function reads, the row that its derivative is added to, and its field, −1: none.
BY_WEIGHT, BY_FUNCTION, READS, DERIVATIVE, FIELD = range(5)

# Rows of scratch memory, in addition to those of `rows`: per class,
LOG_OF_P, Q, LOG_OF_Q, TARGET, BY_P, BY_LOG_P, BY_LOG_Q = 1, 2, 3, 4, 5, 6, 7
SLOPES = LOG_OF_Q  # overwrites it after its last use
# and for all classes together.
LOG_SUM, WEIGHT_OF_SUM, SUMMAND, POWER_OF_P, POWER_OF_Q = 4, 5, 6, 7, 8
TILES, ROWS, WIDTH, LOGITS_OF_TILE = 8, 9, 512, 1 << 16


def _row_of_weight(name: str, formula: Callable[..., Any]) -> Callable[..., Any]:
    """A function that computes m · weight by a formula."""
    formula = inner(named(formula, f"weight_{name}"))

    def row(t, r, size):
        for i in range(size):
            r[WEIGHT_OF_SUM, i] = formula(r[WEIGHT, i], t[TARGET, i])

    return named(row, f"row_of_weight_{name}")


def _row_of_function(name: str, formula: Callable[..., Any]) -> Callable[..., Any]:
    """A function that adds the weight of a sum times a formula to ``to``."""
    formula = inner(named(formula, name))

    def row(t, r, gamma, to):
        for i in range(len(to)):
            p, q, log_p, log_q = t[P, i], t[Q, i], t[LOG_OF_P, i], t[LOG_OF_Q, i]
            v = Voxel(p, q, log_p, log_q, r[POWER_OF_P, i], r[POWER_OF_Q, i], gamma, t[TARGET, i])
            to[i] += product(r[WEIGHT_OF_SUM, i], formula(v))

    return named(row, f"row_of_{name}")


def _one_of(name: str, rows: Sequence[Callable[..., Any]]) -> Any:
    """A function (number, *arguments) that calls the row of this number."""
    # Generated code, as Numba has no tables of functions.
    known = {f"row_{i}": inner(row) for i, row in enumerate(rows)}
    calls = [f"    if number == {i}: row_{i}(*arguments)" for i in range(len(rows))]
    exec("\n".join(["def pick(number, *arguments):", *calls]), known)
    return inner(named(known["pick"], f"pick_{name}"))


_weight_row = _one_of("weight", [_row_of_weight(name, f) for name, f in WEIGHTS.items()])
_value_row = _one_of(
    "value", [_row_of_function(f"value_{n}", f.value) for n, f in FUNCTIONS.items()]
)
_slope_row = _one_of(
    "slope", [_row_of_function(f"slope_{n}", f.slope) for n, f in FUNCTIONS.items()]
)


@kernel
def reduce(
    n, activation, logits, codes, target, ignore, weight, regions, fields, table, gammas,
    scratch, map_kind, map_k, map_out, sums, voxels,
):  # fmt: skip
    """Add the sums over the n voxels of a block to ``sums`` (S, R, C) and ``voxels`` (R,).

    Args:
        logits: (C, N), and the offset of the block; target and map_out likewise.
        codes: labels, (n,) int32, below 0 for ignored voxels; empty: dense target.
        target: (C, M), empty: labels.
        ignore: for a dense target, the ignored number, NaN: none; and whether it is a class.
        weight: (n,), or empty.
        regions: the row of sums of every voxel, below 0: none, (1, n) int32, or (C, n) where it
            differs by class; or empty: row 0.
        fields, table, gammas: (F, C, n), (S, 5), see above, and (S,).
        scratch: see `rows`.
        map_out: of kind map_kind (C or 1, K), with coefficients map_k (S, C).

    Returns the number of bad weights.
    """
    bad, r = 0, scratch[1]
    out, first_out = map_out
    for start in range(0, n, r.shape[1]):
        size = min(r.shape[1], n - start)
        row = regions[0, start : start + size]
        bad += _load(codes, target, ignore, weight, regions, start, size, scratch)
        _activate(activation, _reads(table), logits, start, size, scratch)
        _add(r[WEIGHT, :size], row, voxels)
        for c in range(np.int32(len(scratch[0]))):
            t = scratch[0][c]
            if len(regions) > 1:
                row = regions[c, start : start + size]
            of_map = out[c if map_kind in (CLASS, ERROR, MASK) else 0]
            of_map = of_map[first_out + start : first_out + start + size]
            if map_kind == CLASS or c == 0:
                of_map[:] = 0
            if map_kind == ERROR:
                for i in range(size):
                    of_map[i] = r[WEIGHT, i] * abs(t[TARGET, i] - t[P, i])
            if map_kind == MASK:
                for i in range(size):
                    of_map[i] = t[P, i] > 0.5 and r[WEIGHT, i] > 0
            for s in range(len(table)):
                _weight_of_sum(table[s], c, start, size, fields, t, r)
                _powers(table[s, READS], gammas[s], size, t, r)
                summands = r[SUMMAND, :size]
                summands[:] = 0
                _value_row(table[s, BY_FUNCTION], t, r, gammas[s], summands)
                _add(summands, row, sums[s, :, c])
                if map_kind in (VOXEL, CLASS):
                    for i in range(size):
                        of_map[i] += product(map_k[s, c], summands[i])
    return bad


@kernel
def apply(
    n, activation, logits, codes, target, ignore, weight, regions, fields, table, gammas,
    scratch, coefficients, gradient_out,
):  # fmt: skip
    """Write the gradient of a block to ``gradient_out``, (C, K) and the offset of the block.

    ``coefficients``, (S, R, C), are the derivatives by the sums. Other arguments as in `reduce`.
    """
    tiles, r, _, ints = scratch
    out, first_out = gradient_out
    for start in range(0, n, r.shape[1]):
        size = min(r.shape[1], n - start)
        row = regions[0, start : start + size]
        _load(codes, target, ignore, weight, regions, start, size, scratch)
        _activate(activation, _reads(table), logits, start, size, scratch)
        for c in range(np.int32(len(tiles))):
            t = tiles[c]
            if len(regions) > 1:
                row = regions[c, start : start + size]
            for by in range(BY_P, TILES):
                t[by, :size] = 0
            for s in range(len(table)):
                _weight_of_sum(table[s], c, start, size, fields, t, r)
                _scale(coefficients[s, :, c], row, r[WEIGHT_OF_SUM, :size])
                _powers(table[s, READS], gammas[s], size, t, r)
                to = t[table[s, DERIVATIVE], :size]
                _slope_row(table[s, BY_FUNCTION], t, r, gammas[s], to)
            to = out[c, first_out + start : first_out + start + size]
            _by_logits(activation, t, t[SLOPES, :size] if activation == SOFTMAX else to)
        if activation == SOFTMAX:
            add_slopes(SLOPES, size, scratch)
            for c in range(np.int32(len(tiles))):
                to = out[c, first_out + start : first_out + start + size]
                gradient(tiles[c], SLOPES, c, r, ints, to)


@inner
def _reads(table):
    reads = 0
    for s in range(len(table)):
        reads |= table[s, READS]
    return reads


@inner
def _load(codes, target, ignore, weight, regions, start, size, scratch):
    """Load the targets and voxel weights of a tile; return the number of bad weights."""
    tiles, w = scratch[0], scratch[1][WEIGHT, :size]
    ignored, is_class = ignore
    shared = regions[0] if len(regions) == 1 else regions[0, :0]
    bad = voxel_weights(weight, codes if ignored == ignored else codes[:0], shared, start, w)
    if len(codes):
        for c in range(np.int32(len(tiles))):
            for i in range(size):
                tiles[c, TARGET, i] = codes[start + i] == c
        return bad
    g, first = target[0], target[1] + start
    if ignored == ignored:
        for c in range(len(g)):
            if c == ignored or not is_class:
                _ignore(g[c, first : first + size], ignored, is_class, w)
    for c in range(len(g)):
        masked(g[c, first : first + size], w, tiles[c, TARGET, :size])
    return bad


@inner
def _ignore(g, ignored, is_class, w):
    for i in range(len(w)):
        w[i] = 0.0 if (g[i] > 0.5 if is_class else g[i] == ignored) else w[i]


@inner
def _activate(activation, reads, logits, start, size, scratch):
    """Compute p, 1−p and, if read, their logarithms; for softmax also the largest class."""
    tiles, r, _, ints = scratch
    x, first = logits[0], logits[1] + start
    if activation == SOFTMAX:
        softmax(x, first, size, scratch)
        if reads & LOG_P:
            log_sum_row(r, LOG_SUM, size)
        largest_row(r, size)
    for c in range(np.int32(len(tiles))):
        t = tiles[c]
        if activation == SOFTMAX:
            _softmax_row(c, ints[0], r, t, size)
            if reads & LOG_P:
                _log_p_row(r, t, size)
            if reads & LOG_Q:
                _log_q_row(t, size)
            continue
        masked(x[c, first : first + size], r[WEIGHT, :size], t[LOGITS, :size])
        if activation == SIGMOID:
            _sigmoid_row(t, size)
            if reads & (LOG_P | LOG_Q):
                _log_sigmoid_row(t, size)
        else:
            _copy_row(t, size)
            if reads & (LOG_P | LOG_Q):
                _logs_row(t, size)


@inner
def _softmax_row(c, at, r, t, size):
    one = t.dtype.type(1)
    for i in range(size):
        p = t[P, i] * r[INVERSE, i]
        t[P, i] = p
        t[Q, i] = r[REST, i] if at[i] == c else one - p  # exact even where p is near 1


@inner
def _log_p_row(r, t, size):
    zero = t.dtype.type(0)
    for i in range(size):
        t[LOG_OF_P, i] = difference(t[LOGITS, i], r[LARGEST, i], zero) - r[LOG_SUM, i]


@inner
def _log_q_row(t, size):
    # For p < ½ compensated, as log1p(−p): with z = fl(1 − p) it is log z − ((z − 1) + p) / z.
    one, zero = t.dtype.type(1), t.dtype.type(0)
    for i in range(size):
        p, q = t[P, i], t[Q, i]
        small = p + p < one
        z = one - p if small else q
        lost = ((z - one) + p) / z
        t[LOG_OF_Q, i] = log(z) - (lost if small else zero)


@inner
def _sigmoid_row(t, size):
    one = t.dtype.type(1)
    for i in range(size):
        x = t[LOGITS, i]
        power = exp(-abs(x))
        near_one = one / (one + power)
        near_zero = power * near_one
        t[P, i] = near_one if x >= 0 else near_zero
        t[Q, i] = near_zero if x >= 0 else near_one


@inner
def _log_sigmoid_row(t, size):
    for i in range(size):
        x = t[LOGITS, i]
        of_near_one = -log_sum(exp(-abs(x)), max(t[P, i], t[Q, i]))
        t[LOG_OF_Q, i] = of_near_one - x if x >= 0 else of_near_one
        t[LOG_OF_P, i] = of_near_one if x >= 0 else of_near_one + x


@inner
def _copy_row(t, size):
    one = t.dtype.type(1)
    for i in range(size):
        t[P, i] = t[LOGITS, i]
        t[Q, i] = one - t[P, i]


@inner
def _logs_row(t, size):
    for i in range(size):
        t[LOG_OF_P, i] = log(t[P, i])
    _log_q_row(t, size)


@inner
def _weight_of_sum(row_of_table, c, start, size, fields, t, r):
    """m · weight · field."""
    _weight_row(row_of_table[BY_WEIGHT], t, r, size)
    if row_of_table[FIELD] >= 0:
        field = fields[row_of_table[FIELD], c, start : start + size]
        for i in range(size):
            weight = r[WEIGHT_OF_SUM, i] * field[i]
            r[WEIGHT_OF_SUM, i] = 0.0 if r[WEIGHT, i] == 0 else weight


@inner
def _powers(reads, gamma, size, t, r):
    if reads & P_GAMMA:
        _power(t[P, :size], gamma, r[POWER_OF_P, :size])
    if reads & Q_GAMMA:
        _power(t[Q, :size], gamma, r[POWER_OF_Q, :size])


@inner
def _power(base, gamma, out):
    if gamma == 2:
        for i in range(len(out)):
            out[i] = base[i] * base[i]
    else:
        for i in range(len(out)):
            out[i] = base[i] ** gamma


@inner
def _scale(factors, regions, row):
    """Multiply by the factor of every voxel's region, 0 where it has none."""
    if not len(regions):
        for i in range(len(row)):
            row[i] *= factors[0]
    for i in range(len(regions)):
        row[i] = row[i] * factors[regions[i]] if regions[i] >= 0 else row.dtype.type(0)


@inner
def _add(summands, regions, sums):
    """Add a row of voxels to the sums of their regions, or to the first if there are none."""
    if not len(regions):
        sums[0] += total(summands)
    stop = 0
    while stop < len(regions):
        start, region = stop, regions[stop]
        while stop < len(regions) and regions[stop] == region:
            stop += 1
        if region >= 0:
            sums[region] += total(summands[start:stop])


@inner
def _by_logits(activation, t, out):
    """Combine the derivatives by p, log p and log(1−p) to that by the logit; for softmax, by log p.

    dp/dx = p q, d log p/dx = q and d log q/dx = −p for sigmoid; d log q/d log p = −p / q.
    """
    zero = t.dtype.type(0)
    if activation == SOFTMAX:
        for i in range(len(out)):
            of_q = t[BY_LOG_Q, i]
            of_q = zero if of_q == 0 else of_q * (t[P, i] / t[Q, i])
            out[i] = t[BY_P, i] * t[P, i] + t[BY_LOG_P, i] - of_q
    elif activation == SIGMOID:
        for i in range(len(out)):
            p, q = t[P, i], t[Q, i]
            out[i] = t[BY_P, i] * p * q + t[BY_LOG_P, i] * q - t[BY_LOG_Q, i] * p
    else:
        for i in range(len(out)):
            of_p, of_q = t[BY_LOG_P, i], t[BY_LOG_Q, i]
            of_p = zero if of_p == 0 else of_p / t[P, i]
            of_q = zero if of_q == 0 else of_q / t[Q, i]
            out[i] = t[BY_P, i] + of_p - of_q
