"""The reference: the passes in plain NumPy and float64, not optimised for speed or memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from fastloss.arrays import Arrays
from fastloss.backends.base import Backend
from fastloss.backends.targets import check_targets, load, target_of_sample
from fastloss.histogram import binned, layout
from fastloss.maps import Map
from fastloss.request import Request
from fastloss.sums import Sum


class Probability(NamedTuple):
    """p, 1−p, their logarithms, and the target, (C, N) each."""

    p: np.ndarray
    q: np.ndarray
    log_p: np.ndarray
    log_q: np.ndarray
    g: np.ndarray


class Function(NamedTuple):
    """A function of p, and its derivative by what ``by`` names: "p", "log_p" or "log_q"."""

    by: str
    value: Callable[[Probability, float], np.ndarray]
    slope: Callable[[Probability, float], np.ndarray]


def _zero(v: Probability, _: float) -> np.ndarray:
    return np.zeros_like(v.p)


def _one(v: Probability, _: float) -> np.ndarray:
    return np.ones_like(v.p)


FUNCTIONS = {
    "one": Function("p", _one, _zero),
    "p": Function("p", lambda v, _: v.p, _one),
    "p_squared": Function("p", lambda v, _: v.p**2, lambda v, _: 2 * v.p),
    "log": Function("log_p", lambda v, _: -v.log_p, lambda v, _: -np.ones_like(v.p)),
    "log_rest": Function("log_q", lambda v, _: -v.log_q, lambda v, _: -np.ones_like(v.p)),
    "focal": Function(
        "log_p",
        lambda v, gamma: -_product(v.q**gamma, v.log_p),
        lambda v, gamma: -_focal_slope(v.p, v.log_p, v.q, gamma),
    ),
    "focal_rest": Function(
        "log_q",
        lambda v, gamma: -_product(v.p**gamma, v.log_q),
        lambda v, gamma: -_focal_slope(v.q, v.log_q, v.p, gamma),
    ),
    "generalized": Function(
        "log_p",
        lambda v, gamma: -np.expm1(gamma * v.log_p) / gamma,
        lambda v, gamma: -(v.p**gamma),
    ),
    "log_power": Function(
        "log_p",
        lambda v, gamma: (-v.log_p) ** gamma,
        lambda v, gamma: _power_slope(-v.log_p, gamma),
    ),
    "error": Function(
        "p", lambda v, _: np.abs(_difference(v)), lambda v, _: np.sign(_difference(v))
    ),
    "sign": Function("p", lambda v, _: np.sign(_difference(v)), _zero),
    "log_ratio": Function(
        "log_p", lambda v, _: _log_of_target(v.g) - v.log_p, lambda v, _: -np.ones_like(v.p)
    ),
    "log_ratio_rest": Function(
        "log_q", lambda v, _: _log_of_target(1 - v.g) - v.log_q, lambda v, _: -np.ones_like(v.p)
    ),
}

WEIGHTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "one": np.ones_like,
    "target": lambda g: g,
    "rest": lambda g: 1 - g,
    "target_squared": lambda g: g**2,
}


class _Sample(NamedTuple):
    """One sample in float64: logits and target (C, N), voxel weights and rows (N,), fields (C, N).

    A row of −1: the voxel has no region. Rows are (C, N) where each class has regions of its own.
    """

    x: np.ndarray
    g: np.ndarray
    m: np.ndarray
    row: np.ndarray
    fields: dict[str, np.ndarray]

    def row_of(self, c: int) -> np.ndarray:
        """The rows of the voxels in the sums of class c, (N,)."""
        of_class: np.ndarray = self.row if self.row.ndim == 1 else self.row[c]
        return of_class


class ReferenceBackend(Backend):
    name = "reference"
    counts_errors = True

    def reduce(
        self,
        request: Request,
        arrays: Arrays,
        sums: np.ndarray,
        voxels: np.ndarray,
        voxel_map: Map | None = None,
    ) -> None:
        check_targets(request, arrays)
        for b in range(arrays.logits.shape[0]):
            sample = _sample(request, arrays, b)
            rows = slice(b * arrays.rows, (b + 1) * arrays.rows)
            voxels[rows] = _by_row(sample.m, sample.row_of(0), arrays.rows)
            with np.errstate(all="ignore"):
                v = _activate(request.activation, sample)
                for s, total in enumerate(request.sums):
                    summands = _summands(total, v, sample)
                    for c, of_class in enumerate(summands):
                        sums[s, rows, c] = _by_row(of_class, sample.row_of(c), arrays.rows)
                for kind in request.histograms:
                    sums[request.index[kind], b] = _histogram(kind, v, sample)
                if voxel_map is not None:
                    voxel_map.out[b] = _mapped(request, voxel_map, v, sample)

    def apply(
        self, request: Request, arrays: Arrays, coefficients: np.ndarray, out: np.ndarray
    ) -> None:
        for b in range(arrays.logits.shape[0]):
            sample = _sample(request, arrays, b)
            classes = range(len(sample.x))
            rows = coefficients[:, b * arrays.rows : (b + 1) * arrays.rows]
            with np.errstate(all="ignore"):
                # The coefficients of every voxel's row: (S, C, N).
                of_sums = rows[: len(request.sums)].transpose(0, 2, 1)
                k = np.stack([_by_voxel(of_sums[:, c], sample.row_of(c)) for c in classes], 1)
                by_error = {kind: rows[request.index[kind], 0] for kind in request.histograms}
                gradient = _gradient(request, k, by_error, sample)
                out[b] = _store(gradient.reshape(out[b].shape), arrays.logits_dtype)

    def write_map(self, request: Request, arrays: Arrays, voxel_map: Map) -> None:
        check_targets(request, arrays)
        for b in range(arrays.logits.shape[0]):
            sample = _sample(request, arrays, b)
            if voxel_map.kind == "label":  # for all voxels, including ignored ones
                x = load(arrays.logits[b], arrays.logits_dtype).reshape(len(sample.x), -1)
                sample = sample._replace(x=x)
            with np.errstate(all="ignore"):
                v = _activate(request.activation, sample)
                voxel_map.out[b] = _mapped(request, voxel_map, v, sample)


def _summands(total: Sum, v: Probability, sample: _Sample) -> np.ndarray:
    """m · weight · field · function(p), (C, N)."""
    return _product(_weights(total, sample), FUNCTIONS[total.function].value(v, total.parameter))


def _weights(total: Sum, sample: _Sample) -> np.ndarray:
    """m · weight · field, (C, N)."""
    weight = sample.m * WEIGHTS[total.weight](sample.g)
    return _product(weight, sample.fields[total.field]) if total.field else weight


def _by_row(summands: np.ndarray, row_of_voxel: np.ndarray, rows: int) -> np.ndarray:
    """Σ over the voxels of every row, (rows,)."""
    if rows == 1 and (row_of_voxel == 0).all():
        return np.array([summands.sum()])
    return np.array([summands[row_of_voxel == row].sum() for row in range(rows)])


def _by_voxel(of_rows: np.ndarray, row_of_voxel: np.ndarray) -> np.ndarray:
    """(S, rows) as the numbers of every voxel's row, 0 where it has none: (S, N)."""
    return np.where(row_of_voxel < 0, 0.0, of_rows[:, np.maximum(row_of_voxel, 0)])


def _mapped(request: Request, voxel_map: Map, v: Probability, sample: _Sample) -> np.ndarray:
    """One sample of a map."""
    values: np.ndarray
    if voxel_map.kind == "label":
        values = v.p[0] > 0.5 if len(sample.x) == 1 else sample.x.argmax(axis=0)
        return values
    if voxel_map.kind == "mask":
        values = (v.p > 0.5) & (sample.m > 0)
        return values
    if voxel_map.kind == "error":
        values = sample.m * np.abs(sample.g - v.p)
        return values
    assert voxel_map.coefficients is not None
    each = np.zeros_like(sample.x)
    for total, k in zip(request.sums, voxel_map.coefficients, strict=True):
        each += _product(k[:, None] * np.ones_like(each), _summands(total, v, sample))
    return each.sum(axis=0) if voxel_map.kind == "voxel" else each


def _histogram(kind: str, v: Probability, sample: _Sample) -> np.ndarray:
    """The sums of a histogram of one sample, (4 · bins, C)."""
    own = layout(kind)
    found = np.zeros((2, 2, own.bins, len(sample.x)))  # counts and Σ v; background, foreground
    foreground = sample.g > 0.5
    place, size, _ = binned(kind, v.p, v.q, sample.x, foreground)
    for c in range(len(sample.x)):
        at = place[c] + own.bins * foreground[c]
        for to, weight in zip(found, (sample.m, sample.m * size[c]), strict=True):
            to[:, :, c] = np.bincount(at, weight, 2 * own.bins).reshape(2, own.bins)
    return found.reshape(own.slots, len(sample.x))


def _add_errors(
    kind: str, by_error: np.ndarray, v: Probability, by: dict[str, np.ndarray], sample: _Sample
) -> None:
    """Add the derivative of the errors' bins, given that by Σ v of each bin, (4 · bins, C)."""
    own = layout(kind)
    foreground = sample.g > 0.5
    place, _, slope = binned(kind, v.p, v.q, sample.x, foreground)
    at = (2 + foreground) * own.bins + place
    change = sample.m * slope * np.take_along_axis(by_error.T, at, 1)
    if kind == "hinge":  # x = log p − log q
        by["log_p"] += change
        by["log_q"] -= change
    else:
        by["p"] += change


def _gradient(
    request: Request, k: np.ndarray, by_error: dict[str, np.ndarray], sample: _Sample
) -> np.ndarray:
    """Σ over the sums of k · (derivative of the summand by each logit), (C, N)."""
    v = _activate(request.activation, sample)
    by = {name: np.zeros_like(sample.x) for name in ("p", "log_p", "log_q")}
    for total, coefficient in zip(request.sums, k, strict=True):
        function = FUNCTIONS[total.function]
        weight = coefficient * _weights(total, sample)
        by[function.by] += _product(weight, function.slope(v, total.parameter))
    for kind, of_bins in by_error.items():
        _add_errors(kind, of_bins, v, by, sample)
    p, q, by_p, by_log_p, by_log_q = v.p, v.q, by["p"], by["log_p"], by["log_q"]
    gradient: np.ndarray
    if request.activation == "softmax":
        t = by_p * p + by_log_p  # by log p
        # t − p Σ t; where p is near 1 this cancels, and is t (1−p) − p Σ of the others.
        largest = _is_largest(sample.x)
        of_others = np.where(largest, 0.0, t).sum(axis=0)
        gradient = np.where(largest, t * q - p * of_others, t - p * t.sum(axis=0))
        # d log q_c / d x_j is −p_c at c itself and elsewhere p_c p_j / q_c, where p_j ≤ q_c.
        for c in range(len(p)):
            by = by_log_q[c] * p[c]
            change = np.where(p == 0, 0.0, by * (p / q[c]))
            change[c] = -by
            gradient += change
    elif request.activation == "sigmoid":
        gradient = by_p * p * q + by_log_p * q - by_log_q * p
    else:
        of_logs = np.where(by_log_p == 0, 0.0, by_log_p / p)
        gradient = by_p + of_logs - np.where(by_log_q == 0, 0.0, by_log_q / q)
    return gradient


def _focal_slope(p: np.ndarray, log_p: np.ndarray, q: np.ndarray, gamma: float) -> np.ndarray:
    """The derivative of q^γ log p by log p, with q = 1−p: q^γ − γ p log p · q^(γ−1)."""
    if gamma == 0:
        return np.ones_like(p)
    # At q = 0 the second part has the limit 0, as log p ≈ −q, though for γ < 1 q^(γ−1) is infinite.
    product = np.where(q == 0, 0.0, _product(_product(p, log_p), q ** (gamma - 1)))
    return q**gamma - gamma * product


def _product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a b, but 0 for 0 · ∞: the limit of x log x."""
    return np.where((a == 0) & ~np.isnan(b) | (b == 0) & ~np.isnan(a), 0.0, a * b)


def _power_slope(loss: np.ndarray, gamma: float) -> np.ndarray:
    """The derivative of (−log p)^γ by log p; at p = 1 that by the logit, which is 0."""
    slope: np.ndarray = -gamma * np.where(loss == 0, 0.0, loss ** (gamma - 1))
    return slope


def _difference(v: Probability) -> np.ndarray:
    """p − g, exact where both are near 1."""
    found: np.ndarray = np.where(v.p > 0.5, (1 - v.g) - v.q, v.p - v.g)
    return found


def _log_of_target(g: np.ndarray) -> np.ndarray:
    """log g, and 0 where g is 0."""
    return np.log(np.where(g == 0, 1.0, g))


def _activate(activation: str, sample: _Sample) -> Probability:
    x, g = sample.x, sample.g
    if activation == "softmax":
        # Without one largest member the sum is exact where that one dominates, and so are
        # 1 − p = rest / (1 + rest) and −log p = log(1 + rest).
        first = _is_largest(x)
        largest = x.max(axis=0)
        # Classes that share an infinite maximum share the probability.
        e = np.exp(d := np.where(x == largest, 0.0, x - largest))
        rest = np.where(first, 0.0, e).sum(axis=0)
        log_p, p = d - np.log1p(rest), e / (1 + rest)
        q = np.where(first, rest, 1 + rest - e) / (1 + rest)
        return Probability(p, q, log_p, np.where(p < 0.5, np.log1p(-p), np.log(q)), g)
    if activation == "sigmoid":
        log_p, log_q = -np.logaddexp(0, -x), -np.logaddexp(0, x)
        return Probability(np.exp(log_p), -np.expm1(log_p), log_p, log_q, g)
    return Probability(x, 1 - x, np.log(x), np.log1p(-x), g)


def _is_largest(x: np.ndarray) -> np.ndarray:
    """Whether a class is the first of the largest logit, (C, N)."""
    largest: np.ndarray = x.argmax(axis=0) == np.arange(len(x))[:, None]
    return largest


def _sample(request: Request, arrays: Arrays, b: int) -> _Sample:
    x = load(arrays.logits[b], arrays.logits_dtype).reshape(arrays.logits.shape[1], -1)
    g, m = target_of_sample(request, arrays, b)
    row = np.zeros(x.shape[1], np.int64)
    if arrays.regions is not None:
        shape = (-1, x.shape[1]) if arrays.regions_by_class else (-1,)
        row = arrays.regions[b].reshape(shape).astype(np.int64)
        row = np.where((row < 0) | (row >= arrays.rows), -1, row)
        if not arrays.regions_by_class:
            m = np.where(row < 0, 0.0, m)
    fields = {}
    for name, field in zip(request.fields, arrays.fields, strict=True):
        numbers = load(field.array[b], field.dtype)
        if field.kind == "labels":
            numbers = (numbers.reshape(-1) == np.arange(len(x))[:, None]).astype(np.float64)
        numbers = np.broadcast_to(numbers.reshape(-1, x.shape[1]), x.shape)
        fields[name] = np.where(m == 0, 0.0, numbers)
    # An ignored voxel contributes nothing even if it holds NaN.
    return _Sample(np.where(m == 0, 0.0, x), np.where(m == 0, 0.0, g), m, row, fields)


def _store(array: np.ndarray, dtype: str) -> np.ndarray:
    if dtype != "bfloat16":
        return array.astype(dtype)
    bits = array.astype(np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # to nearest even
    return np.where(np.isnan(array), 0x7FC0, rounded).astype(np.uint16)


BACKEND = ReferenceBackend()
