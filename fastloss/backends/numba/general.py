"""The general path: any table of sums, any activation and target, with fields, regions and maps."""

# mypy: ignore-errors
# What Numba compiles has no types that mypy could check.

from __future__ import annotations

import numpy as np

from fastloss.backends.numba.functions import (
    LOG_P,
    LOG_Q,
    P_GAMMA,
    Q_GAMMA,
    power_row,
    product,
    slope_row,
    value_row,
    weight_row,
)
from fastloss.backends.numba.kernels import inner, kernel
from fastloss.backends.numba.maths import exp, log, log1p
from fastloss.backends.numba.rows import (
    exp_row,
    largest_row,
    masked_row,
    total,
    voxel_weights,
)

SOFTMAX, SIGMOID, NONE = range(3)
VOXEL, CLASS, ERROR = 1, 2, 3  # kinds of maps; 0: none
FIELD_OF_VOXEL, FIELD_OF_CLASS, FIELD_OF_LABELS = range(3)
# Columns of the table of sums, a row for each: numbers of its weight and function, what the
# function reads, what its derivative is by, and the field, −1: none.
WEIGHT, FUNCTION, READS, BY, FIELD = range(5)

_P, _Q, _LOG_P, _LOG_Q, _TARGET, _BY = range(6)
TILES = 8  # of scratch memory, of (C, width) each: _BY is three
_LARGEST, _REST, _INVERSE, _WEIGHT, _A, _F, _P_GAMMA, _Q_GAMMA, _POWER = range(9)
ROWS = 9


@kernel
def reduce(
    x, first, n, activation, codes, target, first_target, ignore, weight, regions, fields,
    field_kinds, table, gammas, map_kind, map_k, map_out, first_map, tiles, rows, ints, sums,
    voxels,
):  # fmt: skip
    """Add the sums over n voxels from the first on to ``sums`` (S, R, C) and ``voxels`` (R,).

    Args:
        x: (C, N) logits.
        codes: labels, (n,) int32, below 0 where a voxel counts for nothing; empty: dense target.
        target: (C, M), from ``first_target`` on; empty: labels.
        ignore: of a dense target: the ignored number, NaN: none; and whether it is a class.
        weight: (n,), or empty.
        regions: of every voxel the row of sums, below 0: none, (n,) int32; or empty: row 0.
        fields: (F, C, n); field_kinds: (F,).
        table: (S, 5), see above; gammas: (S,).
        map_out: of kind map_kind (C or 1, K), from ``first_map`` on, with coefficients (S, C).
        tiles, rows, ints: scratch memory, (TILES, C, width), (ROWS, width) and (1, width).

    Returns how many of the weights are none.
    """
    bad = 0
    classes, reads = x.shape[0], _reads(table)
    for start in range(0, n, tiles.shape[2]):
        size = min(tiles.shape[2], n - start)
        w, a, f = rows[_WEIGHT, :size], rows[_A, :size], rows[_F, :size]
        row = regions[start : start + size]
        bad += _weigh(codes, target, first_target, ignore, weight, regions, start, w)
        _targets(codes, target, first_target, start, w, tiles)
        _activate(activation, reads, x, first + start, w, tiles, rows, ints)
        common = _common(row)
        _add(w, row, common, voxels)
        if map_kind == VOXEL:
            map_out[0, first_map + start : first_map + start + size] = 0
        for c in range(np.int32(classes)):
            of_map = map_out[c if map_kind in (CLASS, ERROR) else 0]
            of_map = of_map[first_map + start : first_map + start + size]
            if map_kind == CLASS:
                of_map[:] = 0
            elif map_kind == ERROR:
                _error_row(tiles[_TARGET, c, :size], tiles[_P, c, :size], w, of_map)
            for s in range(len(table)):
                _weight_of_sum(table[s], c, start, fields, field_kinds, w, tiles, a)
                value_row(
                    table[s, FUNCTION], *_arguments(table[s], gammas[s], c, size, tiles, rows), f
                )
                for i in range(size):
                    a[i] = product(a[i], f[i])
                _add(a, row, common, sums[s, :, c])
                if map_kind in (VOXEL, CLASS):
                    k = map_k[s, c]
                    for i in range(size):
                        of_map[i] += product(k, a[i])
    return bad


@kernel
def apply(
    x, first, n, activation, codes, target, first_target, ignore, weight, regions, fields,
    field_kinds, table, gammas, coefficients, out, first_out, tiles, rows, ints,
):  # fmt: skip
    """Write the gradient to n voxels of ``out`` (C, K), from ``first_out`` on.

    ``coefficients``, (S, R, C), are the derivatives by the sums. Other arguments as in `reduce`.
    """
    classes, reads = x.shape[0], _reads(table)
    for start in range(0, n, tiles.shape[2]):
        size = min(tiles.shape[2], n - start)
        w, a, f = rows[_WEIGHT, :size], rows[_A, :size], rows[_F, :size]
        row = regions[start : start + size]
        _weigh(codes, target, first_target, ignore, weight, regions, start, w)
        _targets(codes, target, first_target, start, w, tiles)
        _activate(activation, reads, x, first + start, w, tiles, rows, ints)
        common = _common(row)
        tiles[_BY:, :, :size] = 0
        for s in range(len(table)):
            for c in range(np.int32(classes)):
                _weight_of_sum(table[s], c, start, fields, field_kinds, w, tiles, a)
                k = coefficients[s, :, c]
                if common >= 0:
                    factor = k[common]
                    for i in range(size):
                        a[i] *= factor
                else:
                    for i in range(size):
                        a[i] *= k[max(row[i], 0)]
                slope_row(
                    table[s, FUNCTION], *_arguments(table[s], gammas[s], c, size, tiles, rows), f
                )
                by = tiles[_BY + table[s, BY], c, :size]
                for i in range(size):
                    by[i] += product(a[i], f[i])
        _by_logits(activation, size, tiles, rows, ints)
        for c in range(classes):
            out[c, first_out + start : first_out + start + size] = tiles[_BY, c, :size]


@kernel
def largest(x, first, n, activation, out):
    """The first class of the largest logit, or of NaN; of one class, whether p > ½."""
    for i in range(n):
        a = x[0, first + i]
        if x.shape[0] == 1:
            out[i] = a > 0.5 if activation == NONE else a > 0 if activation == SIGMOID else a == a
            continue
        at = 0
        for c in range(1, x.shape[0]):
            b = x[c, first + i]
            if b > a or (b != b and a == a):
                a, at = b, c
        out[i] = at


@kernel
def encode(labels, classes, ignored, ignore, codes):
    """Labels as int32: −1 where ``ignore`` if it is ``ignored``, −2 what is no class: their number.

    ``labels`` are numbers of any type, (n,).
    """
    bad = 0
    for i in range(len(codes)):
        y = labels[i]
        inside = (y >= 0) & (y < classes)
        code = np.int32(y) if inside else np.int32(-2)
        code = code if code == y else np.int32(-2)
        skip = ignored & (y == ignore)
        bad += (code < 0) & (not skip)
        codes[i] = np.int32(-1) if skip else code
    return bad


@kernel
def number_rows(regions, numbers, codes, found):
    """Number the regions of a block by where they first occur: these into ``codes``, and how many.

    Args:
        regions: (n,) int64.
        numbers: (rows,) int32, −1 everywhere; so it is left.
        codes: (n,) int32, −1 for a voxel of none.
        found: (n,) int64, the regions by number.
    """
    count = 0
    for i in range(len(codes)):
        r = regions[i]
        if r < 0 or r >= len(numbers):
            codes[i] = -1
            continue
        if numbers[r] < 0:
            numbers[r] = count
            found[count] = r
            count += 1
        codes[i] = numbers[r]
    for j in range(count):
        numbers[found[j]] = -1
    return count


@inner
def _reads(table):
    reads = 0
    for s in range(len(table)):
        reads |= table[s, READS]
    return reads


@inner
def _weigh(codes, target, first_target, ignore, weight, regions, start, w):
    """The voxel weights of a tile, 0 where the target says so; how many are no weights."""
    bad = voxel_weights(weight, codes, regions, start, w)
    ignored, is_class = ignore
    if len(target) and ignored == ignored:
        for c in range(len(target)):
            if is_class and c != ignored:
                continue
            g = target[c, first_target + start : first_target + start + len(w)]
            for i in range(len(w)):
                skip = g[i] > 0.5 if is_class else g[i] == ignored
                w[i] = 0.0 if skip else w[i]
    return bad


@inner
def _targets(codes, target, first_target, start, w, tiles):
    for c in range(np.int32(tiles.shape[1])):
        g = tiles[_TARGET, c, : len(w)]
        if len(codes):
            y = codes[start : start + len(w)]
            for i in range(len(w)):
                g[i] = y[i] == c
        else:
            masked_row(target[c, first_target + start : first_target + start + len(w)], w, g)


@inner
def _activate(activation, reads, x, first, w, tiles, rows, ints):
    """p, 1−p and, where they are read, their logarithms; of a softmax also the largest class."""
    size = len(w)
    rest, inverse, top = rows[_REST, :size], rows[_INVERSE, :size], rows[_LARGEST, :size]
    at = ints[0, :size]
    one, zero = x.dtype.type(1), x.dtype.type(0)
    classes = np.int32(x.shape[0])
    for c in range(classes):
        logits = tiles[_LOG_P, c, :size]
        masked_row(x[c, first : first + size], w, logits)
        if activation == SOFTMAX:
            largest_row(logits, c, top, at)
    if activation == SOFTMAX:
        rest[:] = 0
        for c in range(classes):
            exp_row(tiles[_LOG_P, c, :size], top, at, c, tiles[_P, c, :size], rest)
        for i in range(size):
            inverse[i] = one / (one + rest[i])
        log_sum = rows[_A, :size]
        if reads & LOG_P:
            for i in range(size):
                log_sum[i] = log1p(rest[i])
    for c in range(classes):
        p, q, log_p = tiles[_P, c, :size], tiles[_Q, c, :size], tiles[_LOG_P, c, :size]
        log_q = tiles[_LOG_Q, c, :size]
        if activation == SOFTMAX:
            for i in range(size):
                p[i] *= inverse[i]
            for i in range(size):  # 1 − p, exact where p is near 1 as well
                others = rest[i] * inverse[i]
                q[i] = others if at[i] == c else one - p[i]
            if reads & LOG_P:
                for i in range(size):
                    d = log_p[i] - top[i]
                    log_p[i] = (zero if log_p[i] == top[i] else d) - log_sum[i]
            if reads & LOG_Q:
                for i in range(size):
                    # log(1 − p) while 1 − p has lost nothing that counts.
                    z = one - p[i]
                    lost = ((z - one) + p[i]) / z
                    small = p[i] + p[i] < one
                    log_q[i] = log(z if small else q[i]) - (lost if small else zero)
        elif activation == SIGMOID:
            for i in range(size):
                power = exp(-abs(log_p[i]))
                near_one = one / (one + power)
                p[i] = near_one if log_p[i] >= 0 else power * near_one
                q[i] = power * near_one if log_p[i] >= 0 else near_one
            if reads & (LOG_P | LOG_Q):
                for i in range(size):
                    t = log_p[i]
                    near_zero = -log1p(exp(-abs(t)))
                    log_q[i] = near_zero - t if t >= 0 else near_zero
                    log_p[i] = near_zero if t >= 0 else near_zero + t
        else:
            for i in range(size):
                p[i] = log_p[i]
                q[i] = one - p[i]
            if reads & LOG_P:
                for i in range(size):
                    log_p[i] = log(p[i])
            if reads & LOG_Q:
                for i in range(size):
                    log_q[i] = log1p(-p[i])


@inner
def _weight_of_sum(row_of_table, c, start, fields, field_kinds, w, tiles, out):
    """m · weight · field."""
    size = len(w)
    weight_row(row_of_table[WEIGHT], w, tiles[_TARGET, c, :size], out)
    field = row_of_table[FIELD]
    if field >= 0:
        kind = field_kinds[field]
        of_class = fields[field, c if kind == FIELD_OF_CLASS else 0, start : start + size]
        for i in range(size):
            value = of_class[i]
            if kind == FIELD_OF_LABELS:
                value = fields.dtype.type(value == c)
            out[i] = 0.0 if w[i] == 0 else out[i] * value


@inner
def _arguments(row_of_table, gamma, c, size, tiles, rows):
    """The arguments of a function of p, rows of voxels; those it does not read mean nothing."""
    reads = row_of_table[READS]
    p, q = tiles[_P, c, :size], tiles[_Q, c, :size]
    p_gamma, q_gamma = rows[_P_GAMMA, :size], rows[_Q_GAMMA, :size]
    if reads & P_GAMMA:
        power_row(p, gamma, p_gamma)
    if reads & Q_GAMMA:
        power_row(q, gamma, q_gamma)
    log_p, log_q = tiles[_LOG_P, c, :size], tiles[_LOG_Q, c, :size]
    return p, q, log_p, log_q, p_gamma, q_gamma, gamma


@inner
def _error_row(g, p, w, out):
    for i in range(len(out)):
        out[i] = w[i] * abs(g[i] - p[i])


@inner
def _common(regions):
    """The row that all voxels belong to, −1 if they differ; 0 without regions."""
    if not len(regions):
        return 0
    for i in range(1, len(regions)):
        if regions[i] != regions[0]:
            return -1
    return regions[0]


@inner
def _add(summands, regions, common, sums):
    """Add a row of voxels to the sums of their regions."""
    if common >= 0:
        sums[common] += total(summands)
        return
    i = 0
    while i < len(regions):
        r = regions[i]
        run = 0.0
        while i < len(regions) and regions[i] == r:
            run += summands[i]
            i += 1
        if r >= 0:
            sums[r] += run


@inner
def _by_logits(activation, size, tiles, rows, ints):
    """From the derivatives by p, log p and log(1−p) those by the logits, in their first place."""
    by_p, by_log_p, by_log_q = tiles[_BY], tiles[_BY + 1], tiles[_BY + 2]
    of_all, of_others, at = rows[_A, :size], rows[_F, :size], ints[0, :size]
    zero = tiles.dtype.type(0)
    of_all[:] = 0
    of_others[:] = 0
    for c in range(np.int32(tiles.shape[1])):
        p, q = tiles[_P, c, :size], tiles[_Q, c, :size]
        g, by_log, by_rest = by_p[c, :size], by_log_p[c, :size], by_log_q[c, :size]
        if activation == SOFTMAX:
            for i in range(size):  # by log p; d log q / d log p = −p / q
                of_rest = zero if by_rest[i] == 0 else by_rest[i] * (p[i] / q[i])
                g[i] = g[i] * p[i] + by_log[i] - of_rest
            for i in range(size):
                of_all[i] += g[i]
                of_others[i] += zero if at[i] == c else g[i]
        elif activation == SIGMOID:
            for i in range(size):
                g[i] = g[i] * p[i] * q[i] + by_log[i] * q[i] - by_rest[i] * p[i]
        else:
            for i in range(size):
                of_log = zero if by_log[i] == 0 else by_log[i] / p[i]
                of_rest = zero if by_rest[i] == 0 else by_rest[i] / q[i]
                g[i] = g[i] + of_log - of_rest
    if activation == SOFTMAX:
        for c in range(np.int32(tiles.shape[1])):
            p, q, g = tiles[_P, c, :size], tiles[_Q, c, :size], by_p[c, :size]
            for i in range(size):
                # slope − p · Σ slopes; where p is near 1 it cancels, so of the others alone.
                near_one = g[i] * q[i] - p[i] * of_others[i]
                other = g[i] - p[i] * of_all[i]
                g[i] = near_one if at[i] == c else other
