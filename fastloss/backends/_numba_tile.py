"""A tile of voxels for the Numba kernels: rows of memory, labels and weights, and their sums.

A tile is up to ``WIDTH`` voxels, held as rows of scratch memory: one row per channel, and a few
rows of numbers per voxel, ``WIDTH`` apart from each other at fixed places, by which LLVM sees
that they do not overlap.
"""

# mypy: ignore-errors
# What Numba compiles has no types that mypy could check.

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

from fastloss.backends._numba_cache import renamed
from fastloss.backends._numba_math import exp, log
from fastloss.backends._numba_pointers import (
    LINE,
    address,
    at_address,
    call_row,
    data,
    item_size,
    like,
    prefetch,
    select,
    shift,
    to_int32,
)

WIDTH = 512
FEW = 6
MORE = 24
"""Up to so many classes a pass over the voxels for each is faster than to read by the label, and
than to add by the label."""

GROUP = 16
"""So many channels are summed by themselves, as a long sum gathers the rounding of each step."""

# The numbers of a kernel's ``plan``, then the sizes of the spatial axes.
CHANNELS, VOXELS, TILE, BLOCK, BLOCKS, BATCH, IGNORE, AXES, SIZES = range(9)
"""IGNORE: 0 nothing, 1 the voxels that hold the number, 2 those of more than half that class."""
# The rows of ``operands``, and what each says of its array: then the strides of the spatial axes.
LOGITS, TARGET, WEIGHT, OUT = range(4)
ADDRESS, BY_SAMPLE, BY_CHANNEL, ROW, ROW64, DIRECT, STRIDES = range(7)
"""DIRECT: 1 where rows can be computed with as they lie. ROW, ROW64: the addresses of the row
functions, to the dtype of computation and to float64. That of a label map's ROW leads to int32; 0
where that would not hold all labels."""
# What a block counts besides its sums.
WEIGHT_SUM, BAD_LABELS, BAD_WEIGHTS, UNDEFINED, COUNTS = range(5)
# The indices of the slots of the sums, −1 where not asked for; a pair for each gamma at the end.
(
    REFERENCE,
    OVERLAP,
    PREDICTED,
    PREDICTED_SQUARED,
    REFERENCE_SQUARED,
    CROSS_ENTROPY,
    CROSS_ENTROPY_REST,
    UNIFORM,
    TOP_K,
    FOCAL,
) = range(10)

inner = njit(error_model="numpy", nogil=True, fastmath={"contract"})
summing = njit(error_model="numpy", nogil=True, fastmath={"contract", "reassoc", "nsz"})
"""For sums alone: their order is left to LLVM, which fixes it when it compiles."""

adding = njit(error_model="numpy", nogil=True, fastmath={"contract", "reassoc"})
"""For sums of what `select` chose or 0: were the sign of 0 left to LLVM too, it would choose
between the old sum and the new one instead, a sum that it does not vectorise."""


def kernel(function: Callable[..., Any]) -> Any:
    """Compile on first use; keep the result on disk where there is a place for it."""
    options = {"error_model": "numpy", "nogil": True, "fastmath": {"contract"}}
    try:
        return njit(cache=True, **options)(renamed(function))
    except RuntimeError:
        return njit(**options)(function)


@inner
def rows_of(operands):
    """Pointers to the rows. To pass a part of an array on takes a reference, and gives it back:
    atomic operations, which wait for all that was stored before, past the caches too."""
    table, step = data(operands), operands.shape[1]
    return table, shift(table, step), shift(table, 2 * step), shift(table, 3 * step)


@inner
def move(plan, operand, function, sample, channel, first, count, row, store):
    """Load the voxels from ``first`` on into a row, or store them from it."""
    base = operand[ADDRESS] + sample * operand[BY_SAMPLE] + channel * operand[BY_CHANNEL]
    size = item_size(row)
    here = address(row)
    axes = plan[AXES]
    last = axes - 1
    length = plan[SIZES + last]
    stride = operand[STRIDES + last]
    while count > 0:
        run = count
        there = base
        if axes == 1:
            there += first * stride
        else:
            rest = first // length
            place = first - rest * length
            run = min(count, length - place)
            there += place * stride
            for axis in range(last - 1, -1, -1):
                outer = rest // plan[SIZES + axis]
                there += (rest - outer * plan[SIZES + axis]) * operand[STRIDES + axis]
                rest = outer
        if store:
            call_row(function, here, stride, run, there)
        else:
            call_row(function, there, stride, run, here)
        here += run * size
        first += run
        count -= run


PART = 128
"""So many voxels of a few rows are computed with at a time, where those ahead are fetched."""

_AHEAD = 4  # rows
_MOST_BYTES = 8  # of an element


@inner
def _row_ahead(plan, operand, sample, channel, first, count):
    """The address of a row that will be loaded soon, or 0 where rows are not contiguous: the
    processor follows a row by itself, but cannot guess where the next one starts."""
    stride = operand[STRIDES]
    if (plan[AXES] != 1) | (stride < 1) | (stride > _MOST_BYTES):
        return 0
    channel += _AHEAD
    while channel >= plan[CHANNELS]:
        channel -= plan[CHANNELS]
        first += count
    base = operand[ADDRESS] + sample * operand[BY_SAMPLE] + channel * operand[BY_CHANNEL]
    return base + first * stride


@inner
def source(plan, operand, sample, channel, first, row):
    """The pointer to a row where it lies."""
    base = operand[ADDRESS] + sample * operand[BY_SAMPLE] + channel * operand[BY_CHANNEL]
    return at_address(row, base + first * operand[STRIDES])


@inner
def fetch_part(plan, operand, sample, first, count, begin, part):
    """Fetch what lies ahead of a part of a tile's rows, where those are used where they lie."""
    if operand[DIRECT] == 1:
        stride = operand[STRIDES]
        for channel in range(plan[CHANNELS]):
            ahead = _row_ahead(plan, operand, sample, channel, first, count) + begin * stride
            for offset in range(0, part * stride, LINE):
                prefetch(ahead + offset)


@inner
def load(plan, operand, sample, channel, first, count, row):
    """Load a channel's row. The others are fetched in their order, to be loaded next."""
    # Half of the lines at a time: what is asked for with some 20 under way is dropped.
    ahead = _row_ahead(plan, operand, sample, channel, first, count)
    end = count * operand[STRIDES] + LINE - 1 if ahead != 0 else 0
    half = end // 2 // LINE * LINE
    for offset in range(0, half, LINE):
        prefetch(ahead + offset)
    move(plan, operand, operand[ROW], sample, channel, first, count, row, False)
    for offset in range(half, end, LINE):
        prefetch(ahead + offset)


@inner
def voxels_to_line(plan, operand, sample):
    """The voxels of a sample before the first that begins a cache line of the operand, where its
    voxels follow each other: to write parts of a line past the caches costs more than the line."""
    stride = operand[STRIDES]
    if (plan[AXES] != 1) | (stride < 1) | (stride > _MOST_BYTES):
        return 0
    past = (operand[ADDRESS] + sample * operand[BY_SAMPLE]) & (LINE - 1)
    return ((LINE - past) & (LINE - 1)) // stride


@inner
def store(plan, operand, sample, channel, first, count, row):
    move(plan, operand, operand[ROW], sample, channel, first, count, row, True)


@inner
def load_weights(plan, operands, sample, first, count, weights, wide, counts):
    """Fill the weights; return whether any is 0."""
    zeros = 0
    if operands[WEIGHT][ADDRESS] == 0:
        for i in range(count):
            weights[i] = like(weights, 1)
        return False
    operand = operands[WEIGHT]
    move(plan, operand, operand[ROW64], sample, 0, first, count, wide, False)
    bad = 0
    for i in range(count):
        w = wide[i]
        bad += 0 if (w >= 0) & (w < np.inf) else 1
        weights[i] = w
    for i in range(count):
        zeros += 1 if weights[i] == 0 else 0
    counts[BAD_WEIGHTS] += bad
    return zeros > 0


@adding
def _ignore_labels(labels, weights, ignore, count):
    """Weights and labels of 0 where the label is ``ignore``; return how many there are."""
    zero, one, label = like(weights, 0), like(weights, 1), np.int32(0)
    found = zero
    for i in range(count):
        y, weight = labels[i], weights[i]
        here = y == ignore
        labels[i] = select(here, label, y)
        weights[i] = settle(weights, select(here, zero, weight))
        found += select(here, one, zero)
    return found


@inner
def _bound_labels(labels, last, count):
    """Bring all labels into [0, last]; return how many were not."""
    largest = np.uint32(0)
    for i in range(count):
        y = np.uint32(labels[i])
        largest = select(y > largest, y, largest)
    return _bound_some(labels, last, count) if largest > np.uint32(last) else np.float32(0)


@adding
def _bound_some(labels, last, count):
    label, zero, one = np.int32(0), np.float32(0), np.float32(1)
    bad = zero
    for i in range(count):
        y = labels[i]
        inside = select(y > label, y, label)
        inside = select(inside < last, inside, last)
        labels[i] = inside
        bad += select(inside == y, zero, one)
    return bad


@inner
def load_labels(plan, operands, ignore, sample, first, count, labels, weights, wide, counts):
    """Fill the labels, and weights of 0 where they are ignored; return whether any is."""
    operand = operands[TARGET]
    if operand[ROW] != 0:  # integers that int32 holds
        move(plan, operand, operand[ROW], sample, 0, first, count, labels, False)
        ignored = 0.0
        if plan[IGNORE] != 0:
            ignored = _ignore_labels(labels, weights, np.int32(ignore), count)
        counts[BAD_LABELS] += _bound_labels(labels, np.int32(plan[CHANNELS] - 1), count)
        return ignored > 0
    move(plan, operand, operand[ROW64], sample, 0, first, count, wide, False)
    classes = np.float64(plan[CHANNELS])
    zeros = 0
    bad = 0
    last = classes - 1.0
    for i in range(count):
        y = wide[i]
        # NaN too is brought inside, and found in the comparison.
        inside = select(y > 0.0, y, 0.0)
        inside = select(inside < last, inside, last)
        label = to_int32(inside)
        labels[i] = label
        bad += 0 if np.float64(label) == y else 1
    if plan[IGNORE] != 0:
        for i in range(count):
            ignored = wide[i] == ignore
            zeros += 1 if ignored else 0
            bad -= 1 if ignored & (np.float64(labels[i]) != wide[i]) else 0
            weight = weights[i]
            weights[i] = settle(weights, like(weights, 0) if ignored else weight)
    counts[BAD_LABELS] += bad
    return zeros > 0


@inner
def ignore_dense(plan, operands, ignore, sample, first, count, weights, wide):
    """Weights of 0 where a dense target is ignored; return whether any is."""
    operand = operands[TARGET]
    zeros = 0
    if plan[IGNORE] == 2:
        channel = np.int64(ignore)
        move(plan, operand, operand[ROW64], sample, channel, first, count, wide, False)
        for i in range(count):
            zeros += 1 if wide[i] > 0.5 else 0
            weight = weights[i]
            weights[i] = settle(weights, like(weights, 0) if wide[i] > 0.5 else weight)
    elif plan[IGNORE] == 1:
        for c in range(plan[CHANNELS]):
            move(plan, operand, operand[ROW64], sample, c, first, count, wide, False)
            for i in range(count):
                zeros += 1 if wide[i] == ignore else 0
                weight = weights[i]
                weights[i] = settle(weights, like(weights, 0) if wide[i] == ignore else weight)
    return zeros > 0


@inner
def settle(row, x):
    """x + 0. A choice between a new value and the one in place is else stored under a mask, which
    is slow on processors without AVX-512."""
    return x + like(row, 0)


@inner
def blank(row, weights, count):
    """0 where the voxel counts for nothing, whatever it holds."""
    for i in range(count):
        x = row[i]  # loaded before it is chosen, as LLVM moves no load out of a branch
        row[i] = settle(row, like(row, 0) if weights[i] == 0 else x)


@inner
def fill(row, value, count):
    for i in range(count):
        row[i] = like(row, value)


@inner
def carry(row, total, count):
    """Add the row to the total and begin it anew."""
    for i in range(count):
        total[i] += row[i]
    fill(row, 0, count)


@inner
def raise_to(row, x, count):
    for i in range(count):
        a, b = x[i], row[i]
        row[i] = settle(row, a if a > b else b)


@inner
def any_infinite(row, count):
    infinity = like(row, np.inf)
    found = 0
    for i in range(count):
        found += 1 if (row[i] == infinity) | (row[i] == -infinity) else 0
    return found > 0


@inner
def below_largest(x, largest, count):
    """x − largest, and 0 for all that equal the largest though it be infinite."""
    for i in range(count):
        a, b = x[i], largest[i]
        x[i] = like(x, 0) if a == b else a - b


@summing
def total(a, count):
    s = like(a, 0)
    for i in range(count):
        s += a[i]
    return np.float64(s)


@summing
def dot(a, b, count):
    s = like(a, 0)
    for i in range(count):
        s += a[i] * b[i]
    return np.float64(s)


@summing
def dot3(a, b, c, count):
    s = like(a, 0)
    for i in range(count):
        s += a[i] * b[i] * c[i]
    return np.float64(s)


@summing
def dot_square(a, b, count):
    """Σ a b²."""
    s = like(a, 0)
    for i in range(count):
        s += a[i] * (b[i] * b[i])
    return np.float64(s)


@summing
def dot_log(a, b, count):
    """Σ a b, where 0 times infinity is 0."""
    s = like(a, 0)
    for i in range(count):
        s += product(a, a[i], b[i])
    return np.float64(s)


@inner
def product(row, a, b):
    """a b, and 0 where a factor is 0 though the other be infinite: the limit of x log x."""
    vanishes = ((a == 0) & (b == b)) | ((b == 0) & (a == a))
    return like(row, 0) if vanishes else a * b


@summing
def add_by_label(values, labels, count, classes, sums):
    """Add every voxel's value to the sum of its label."""
    if classes <= MORE:
        for c in range(classes):
            s = like(values, 0)
            label = np.int32(c)
            for i in range(count):
                value = values[i]
                s += value if labels[i] == label else like(values, 0)
            sums[c] += s
    else:
        for i in range(count):
            sums[labels[i]] += values[i]


@inner
def find_present(labels, count, classes, present):
    """Say of every class whether a label names it; few do in so small a part of a volume."""
    if classes <= 32:
        one = np.uint32(1)
        found = np.uint32(0)
        for i in range(count):
            found |= one << np.uint32(labels[i])
        for c in range(classes):
            present[c] = (found >> np.uint32(c)) & one
        return
    for c in range(classes):
        present[c] = 0
    last = labels[0]
    present[last] = 1
    for i in range(count):
        if labels[i] != last:
            last = labels[i]
            present[last] = 1


@adding
def add_three_by_label(a, b, c, labels, count, classes, present, to_a, to_b, to_c):
    """Add every voxel's three values to the sums of its label."""
    zero = like(a, 0)
    if classes <= MORE:
        for k in range(classes):
            if present[k] == 0:
                continue
            s, t, u = zero, zero, zero
            label = np.int32(k)
            for i in range(count):
                here = labels[i] == label
                s += select(here, a[i], zero)
                t += select(here, b[i], zero)
                u += select(here, c[i], zero)
            to_a[k] += s
            to_b[k] += t
            to_c[k] += u
    else:
        # Neighbours mostly have one label: what is added up in registers need not wait for memory.
        label = labels[0]
        s, t, u = 0.0, 0.0, 0.0
        for i in range(count):
            if labels[i] != label:
                to_a[label] += s
                to_b[label] += t
                to_c[label] += u
                s, t, u = 0.0, 0.0, 0.0
                label = labels[i]
            s += a[i]
            t += b[i]
            u += c[i]
        to_a[label] += s
        to_b[label] += t
        to_c[label] += u


@inner
def by_label(table, labels, count, classes, row):
    """Fill a row with the table's number for each voxel's label."""
    if classes <= FEW:
        fill(row, 0, count)
        for c in range(classes):
            number, label = table[c], np.int32(c)  # 64 bits would halve the vectors
            for i in range(count):
                row[i] += number if labels[i] == label else like(row, 0)
    else:
        for i in range(count):
            row[i] = table[labels[i]]


@inner
def two_by_label(table, table2, labels, count, classes, present, row, row2):
    """As `by_label` for two tables and rows."""
    if classes <= MORE:
        fill(row, 0, count)
        fill(row2, 0, count)
        zero = like(row, 0)
        for c in range(classes):
            if present[c] == 0:
                continue
            number, number2, label = table[c], table2[c], np.int32(c)
            for i in range(count):
                here = labels[i] == label
                row[i] += select(here, number, zero)
                row2[i] += select(here, number2, zero)
    else:
        for i in range(count):
            label = labels[i]
            row[i] = table[label]
            row2[i] = table2[label]


@inner
def power(base, gamma, count, row):
    """base^γ."""
    whole = gamma == np.floor(gamma)
    if whole & (gamma >= 0) & (gamma <= 8):
        fill(row, 1, count)
        for _ in range(np.int64(gamma)):
            for i in range(count):
                row[i] = row[i] * base[i]
    elif gamma == 0.5:
        for i in range(count):
            row[i] = np.sqrt(base[i])
    else:
        exponent = like(row, gamma)
        infinity = like(row, np.inf)
        largest = like(row, 88 if item_size(row) == 4 else 709)  # that exp takes
        at_zero = like(row, 0.0 if gamma > 0 else np.inf)
        for i in range(count):
            q = base[i]
            q = abs(q) if whole else q
            power_log = exponent * log(q)
            r = exp(power_log)
            r = infinity if power_log > largest else r
            row[i] = at_zero if q == 0 else r
        if whole & (gamma % 2 == 1):
            for i in range(count):
                r = row[i]
                row[i] = -r if base[i] < 0 else r
