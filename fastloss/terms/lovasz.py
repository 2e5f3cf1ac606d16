"""Losses that rank voxels: Lovász's extension of the Jaccard loss, and the hardest voxels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import numpy as np

from fastloss.histogram import binned, layout
from fastloss.loss import Derivatives, Pullback, Term
from fastloss.options import check_choice, check_switch
from fastloss.request import Request
from fastloss.statistics import Statistics
from fastloss.sums import PREDICTED, UNIFORM, UNIFORM_REST, Sum

Targets = list[tuple[np.ndarray, np.ndarray]]
METHODS = ("histogram", "exact")

# The Lovász extension of the Jaccard loss, for errors e_x ≥ 0 of voxels of weight m_x, is
#
#   L = ∫₀^∞ J(F(t), N(t)) dt,   J(F, N) = (F + N)/(G + N),
#
# where G is the foreground's weight, and F(t) and N(t) are the weights of the foreground and of the
# background whose error is above t. With errors sorted downwards that is Σ e_x ΔJ_x, and ΔJ_x is
# the derivative by e_x (Berman et al. 2018).
#
# Voxels of one error, or of one bin, come in no order. Let their weights f and n come together,
# from (F, N) to (F + f, N + n) on a straight line. The increase of J then has two parts, those of
# the foreground and of the background, which are for every unit of weight
#
#   s_f = ∫₀¹ ds/(A + n s) = log(1 + n/A)/n,                             A = G + N, B = A + n,
#   s_n = ∫₀¹ (G − F − f s)/(A + n s)² ds = (G − F)/(A B) − f (log(1 + n/A) − n/B)/n²,
#
# so that f s_f + n s_n = ΔJ. For a single voxel of weight 1 both are the ΔJ of the sorted list. The
# loss is Σ over the groups of s_f Σe_f + s_n Σe_n, and its derivative by e_x is s_f or s_n.
#
# A histogram has bins for groups, and exact Σe. In a bin the sorted list gives Σ e_x ΔJ_x, and the
# histogram the mean of e_x times ΔJ_k, the sum of ΔJ_x, for foreground and background each. Both
# means lie in the bin of width w_k, and the ΔJ_x of its voxels differ by a share ρ_k of them, where
# ρ_k ≤ 1 and, as A and G − F change by n_k and f_k, ρ_k ≤ 2 n_k/(G + N_k) + f_k/(G − F_k). So
#
#   |error of the value| ≤ Σ_k w_k ρ_k ΔJ_k,   Σ_k ΔJ_k = 1.
#
# Widths are 2^-6 to 2^-11 of e, or of 1 − e: the bins of large errors, where N is
# small, are as narrow as their voxels are few, and ρ_k is small where ΔJ_k is not. If errors are
# spread evenly in a bin, it is off by w_k ρ_k ΔJ_k / 12 at most, and signs of those of a few
# voxels differ. Equal errors are not off at all. `python benchmarks/ranking.py` prints what the
# errors are: below 1e-5 of the value, the cosine of the gradients above 0.9999.


def slopes(
    foreground: np.ndarray, background: np.ndarray, total: float
) -> tuple[np.ndarray, np.ndarray]:
    """s_f and s_n of groups of voxels whose errors fall, (groups,) each.

    Args:
        foreground, background: f and n, of which one is above 0.
        total: G. Where it is 0 J is 1 from the first group on.
    """
    f, n = foreground, background
    if total <= 0:
        first = np.arange(n.size) == 0
        return np.zeros_like(f), np.where(first, 1 / n, 0.0)
    after_f, after_n = np.cumsum(f), np.cumsum(n)
    a, b = total + (after_n - n), total + after_n
    rest = np.maximum(total - (after_f - f), 0.0)  # G − F
    t = n / a
    few = t < 1e-3
    safe = np.where(few, 1.0, n)
    logarithm = np.log1p(t)
    # Where n is small, by the series in t, as the differences cancel.
    of_f = np.where(few, (1 - t / 2 + t * t / 3) / a, logarithm / safe)
    inner = np.where(
        few, (0.5 - 2 * t / 3 + 0.75 * t * t) / (a * a), (logarithm - n / b) / (safe * safe)
    )
    return of_f, np.maximum(rest / (a * b) - f * inner, 0.0)


class _Found(Term):
    """A Lovász loss whose value is known, as a sum of a field of this name."""

    def __init__(self, *, field: str) -> None:
        self.field = field
        self.requires = frozenset({PREDICTED, Sum(field=field)})

    def combine(self, statistics: Statistics) -> tuple[np.ndarray, Pullback]:
        total = Sum(field=self.field)
        return statistics[total].sum(), lambda upstream: {total: upstream}


@cache
def _found(total: Sum) -> _Found:
    return _Found(field=total.field)


class _Lovasz(Term):
    """The Lovász extension of the Jaccard loss of errors that a subclass names."""

    score: tuple[tuple[Sum, float], ...] = ()
    """p, or the logit, as sums and their coefficients: what the exact method ranks by."""

    ranks_weighted = False
    ranks_classes = True
    ranks_dense = True
    ranks_errors = True

    def __init__(
        self, *, classes: Any = "present", per_sample: bool = False, method: str = "histogram"
    ) -> None:
        self.classes = _checked_classes(classes)
        self.per_sample = check_switch("per_sample", per_sample)
        self.method = check_choice("method", method, METHODS)
        if self.method == "exact":
            fields = [sum_._replace(field="lovasz") for sum_, _ in self.score]
            self.requires = frozenset([PREDICTED, *(sum_ for sum_, _ in self.score), *fields])
        else:
            self.requires = frozenset([PREDICTED, self.histogram])

    @property
    def shares(self) -> bool:
        return True

    @property
    def ranking(self) -> Sum | None:  # type: ignore[override]
        return self.score[0][0]._replace(field="lovasz") if self.method == "exact" else None

    def check(self, activation: str, classes: int) -> None:
        if not isinstance(self.classes, str) and max(self.classes) >= classes:
            raise ValueError(
                f"classes: expected numbers in [0, {classes}), got {list(self.classes)}"
            )

    @property
    def sums_over_batch(self) -> bool:
        return not self.per_sample and self.method == "histogram"

    def _chosen(self, classes: int, present: np.ndarray) -> list[int]:
        """The classes of which one row takes the mean, given which of them occur."""
        if isinstance(self.classes, str):
            return [c for c in range(classes) if self.classes == "all" or present[c]]
        return list(self.classes)

    # ------------------------------------------------------------------ by a histogram

    def combine(self, statistics: Statistics) -> tuple[np.ndarray, Pullback]:
        if self.method == "exact":
            value = statistics[self.ranking].sum()  # type: ignore[index]
            coefficients = {s._replace(field="lovasz"): k for s, k in self.score}
            return value, lambda upstream: {s: upstream * k for s, k in coefficients.items()}
        own = layout(self.histogram)
        rows = self._rows(statistics)
        by = np.zeros_like(rows)
        value = 0.0
        for row, c, share in self._shares(rows):
            counts, sums = rows[:2, :, row, c], rows[2:, :, row, c]
            loss, slope = self._of_bins(counts, sums)
            value += share * loss
            by[2:, :, row, c] = share * slope
        # NaN is in no bin.
        if not np.isfinite(statistics[PREDICTED]).all():
            value, by = np.nan, np.full_like(by, np.nan)
        shape = (4, own.bins, statistics.batch_size, statistics.classes)
        whole = np.broadcast_to(by, shape).reshape(own.slots, *shape[2:])

        def pullback(upstream: np.ndarray) -> Derivatives:
            return {self.histogram: upstream * whole}

        return np.float64(value), pullback

    def _rows(self, statistics: Statistics) -> np.ndarray:
        """The histogram of every row, (4, bins, rows, C): of a sample, or of all together."""
        bins, classes = layout(self.histogram).bins, statistics.classes
        found = statistics[self.histogram].reshape(4, bins, statistics.batch_size, classes)
        joined = not self.per_sample and found.shape[2] != 1
        return found.sum(axis=2, keepdims=True) if joined else found

    def _shares(self, rows: np.ndarray) -> Iterator[tuple[int, int, float]]:
        """The row and class of every loss, and its share in the mean."""
        count, classes = rows.shape[2:]
        for row in range(count):
            occurs = (rows[:2, :, row] != 0).max(axis=1)  # background and foreground, (2, C)
            chosen = [c for c in self._chosen(classes, occurs[1]) if occurs[:, c].any()]
            for c in chosen:
                yield row, c, 1.0 / (count * len(chosen))

    def jumps(self, statistics: Statistics) -> np.ndarray:
        """The derivative by an error of weight 1 in every bin of background and foreground,
        (2, bins, B, C); in bins without voxels what it would be there."""
        rows = self._rows(statistics)
        found = np.zeros((2, *rows.shape[1:]))
        for row, c, share in self._shares(rows):
            n, f = rows[:2, ::-1, row, c]  # errors fall
            if f.any():
                of_f, of_n = slopes(f, n, float(f.sum()))
            else:
                first = int(np.flatnonzero(n)[0])
                of_f, of_n = np.zeros_like(f), np.where(np.arange(n.size) <= first, 1 / n[first], 0)
            found[:, ::-1, row, c] = share * np.stack([of_n, of_f])
        if self.histogram == "hinge":
            found[:, 0] = 0  # in the first bin there is no error
        return np.broadcast_to(found, (*found.shape[:2], statistics.batch_size, rows.shape[3]))

    def voxel_shares(
        self,
        jumps: np.ndarray,
        p: np.ndarray,
        q: np.ndarray,
        x: np.ndarray,
        foreground: np.ndarray,
    ) -> np.ndarray:
        """The error of every voxel times the derivative by it, for voxels of weight 1.

        Args:
            jumps: that derivative, (C, n), for the exact method; else those of `jumps` of a
                sample, (2, bins, C).
            p, q, x: the probability, 1 − p, and the logit, (C, n) each.
        """
        hinge = self.histogram == "hinge"
        error = np.where(foreground, q, p)
        if hinge:
            error = np.maximum(1 + np.where(foreground, -x, x), 0.0)
        if self.method == "histogram":
            place, _, _ = binned(self.histogram, p, q, x, foreground)
            jumps = jumps[foreground.astype(np.intp), place, np.arange(len(p))[:, None]]
        return np.where(error == 0, 0.0, error * jumps)

    def _of_bins(self, counts: np.ndarray, sums: np.ndarray) -> tuple[float, np.ndarray]:
        """The loss of one class, and its derivative by Σ v of every bin, (2, bins)."""
        own = layout(self.histogram)
        used = np.flatnonzero(counts.any(axis=0))[::-1]  # errors fall
        if self.histogram == "hinge":
            used = used[used > 0]  # in the first bin there is no error
        by, total = np.zeros_like(counts), counts[1].sum()
        if not used.size:
            return 0.0, by
        n, f = counts[0, used], counts[1, used]
        of_f, of_n = slopes(f, n, total)
        both = np.stack([of_n, of_f])
        errors = sums[:, used]
        if self.histogram == "errors":
            large = used >= own.places  # where v is 1 − e
            errors = np.where(large, counts[:, used] - errors, errors)
            by[:, used] = np.where(large, -both, both)
        else:
            by[:, used] = both
        return float((errors * both).sum()), by

    def found_as(self, total: Sum) -> Term:
        return _found(total)

    # ------------------------------------------------------------------ by sorting

    def ranks_by(self, request: Request, classes: int) -> np.ndarray:
        coefficients = np.zeros((len(request.sums), classes))
        for sum_, k in self.score:
            coefficients[request.index[sum_]] = k
        return coefficients

    def errors_of(self, score: np.ndarray, foreground: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The errors, and their derivative by the score, of one class."""
        raise NotImplementedError(f"{type(self).__name__} must define errors_of")

    def rank(self, numbers: np.ndarray, targets: Targets) -> float:
        """Turn p or the logits, (B, C, voxels), into the derivative by them; return the loss."""
        batch, classes, _ = numbers.shape
        rows = [[b] for b in range(batch)] if self.per_sample else [list(range(batch))]
        value = 0.0
        for row in rows:
            weight = np.concatenate([targets[b][1] for b in row] or [np.zeros(0)])
            at = weight > 0
            kept = weight[at]
            masks = [_foreground(targets, row, c)[at] for c in range(classes)]
            chosen = self._chosen(classes, np.array([mask.any() for mask in masks]))
            chosen = chosen if kept.size else []
            for c in range(classes):
                score = np.concatenate([numbers[b, c] for b in row] or [np.zeros(0)])[at]
                by = np.zeros(at.shape)
                if c in chosen:
                    errors, sign = self.errors_of(score.astype(np.float64), masks[c])
                    loss, slope = _sorted_loss(errors, masks[c], kept)
                    share = 1.0 / (len(rows) * len(chosen))
                    value += share * loss
                    by[at] = share * slope * sign
                numbers[row, c] = by.reshape(len(row), numbers.shape[2])
        return value


def _foreground(targets: Targets, row: list[int], c: int) -> np.ndarray:
    return np.concatenate([targets[b][0][c] > 0.5 for b in row] or [np.zeros(0, bool)])


def _sorted_loss(
    errors: np.ndarray, foreground: np.ndarray, weight: np.ndarray
) -> tuple[float, np.ndarray]:
    """The loss of one class by sorting its errors, and the derivative by each of them."""
    if np.isnan(errors).any():
        return np.nan, np.full_like(errors, np.nan)
    counted = np.maximum(errors, 0.0)
    # Equal errors are one group; of those of no error the derivative is not asked for.
    _, group = np.unique(-counted, return_inverse=True)
    f = np.bincount(group, weight * foreground)
    n = np.bincount(group, weight * ~foreground)
    of_f, of_n = slopes(f, n, float(f.sum()))
    slope = np.where(foreground, of_f[group], of_n[group])
    slope = np.where(errors < 0, 0.0, slope)
    return float((weight * counted * slope).sum()), slope


def _checked_classes(classes: Any) -> str | tuple[int, ...]:
    if isinstance(classes, str):
        return check_choice("classes", classes, ("present", "all"))
    if not isinstance(classes, Iterable):
        raise TypeError(f"classes: expected 'present', 'all' or class numbers, got {classes!r}")
    found: list[int] = []
    for number in classes:
        if isinstance(number, bool) or not isinstance(number, (int, np.integer)):
            raise TypeError(f"classes: expected class numbers, got {number!r}")
        if number < 0 or number in found:
            raise ValueError(f"classes: expected different numbers of at least 0, got {classes!r}")
        found.append(int(number))
    if not found:
        raise ValueError("classes: expected at least one class, got none")
    return tuple(found)


class LovaszSoftmax(_Lovasz):
    """Lovász-Softmax: of every class the Lovász extension of the Jaccard loss, 1 − IoU.

    With e = |g − p| sorted downwards it is Σ e ΔJ, where J is the Jaccard loss of the class if the
    voxels up to that one were wrong; the mean over classes. In spite of its name it takes any
    activation; of a dense target a class is where it is above ½. A voxel counts in J by its weight.
    Without a voxel that counts it is 0.

    "histogram" counts the errors in some 19,000 bins per class: it takes two passes over the logits
    and no memory of their size, and its sums add over chunks of a volume and ranks. Of classes that
    occur the value is within 1e-5 of the exact one and the cosine of the gradients above 0.9999,
    unless most voxels crowd into a few bins, as the p of logits within 0.01 of each other do; equal
    errors are no matter. Of a class of a few voxels the cosine may be 0.9998, where two of the
    first in rank share a bin. A class that does not occur has its
    largest error for a loss, known to a bin's width. Weights are rounded to 2^-21 of the largest
    one of a call. The bins take 0.6 MB for every class and sample.

    "exact" sorts, in memory of twice the logits', in one thread of the processor. There may be one
    such term in a loss, and chunks of a volume cannot be joined. In both, voxels of equal error (of
    one bin) have equal derivatives, of foreground and background each: those of their mean order.

    Args:
        classes: "present", those that occur; "all"; or a list of classes, absent ones too.
        per_sample: rank the voxels of every sample apart, and take the mean over the samples;
            classes are then present in a sample. Else the batch is one volume.
        method: "histogram" or "exact".

    Raises:
        ValueError, TypeError: an option out of its range; in a call, a class that there is none
            of, regions, or arrays on a GPU where the method is "exact".

    Source: Berman et al. 2018, "The Lovász-Softmax loss: a tractable surrogate for the optimization
    of the intersection-over-union measure in neural networks".

    >>> import numpy as np, fastloss as fl
    >>> p, labels = np.array([[[0.9, 0.4], [0.1, 0.6]]]), np.array([[0, 0]])
    >>> print(round(float(fl.Loss(fl.LovaszSoftmax(), activation="none")(p, labels)), 3))
    0.35
    """

    histogram = "errors"
    score = ((PREDICTED, 1.0),)

    def errors_of(self, score: np.ndarray, foreground: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.where(foreground, 1 - score, score), np.where(foreground, -1.0, 1.0)


class LovaszHinge(_Lovasz):
    """Lovász hinge: of every channel the Lovász extension of the Jaccard loss, of hinge errors.

    With h = max(0, 1 − x) of the foreground and max(0, 1 + x) of the background, x being the logit,
    sorted downwards, it is Σ h ΔJ. For ``activation="sigmoid"`` alone. Other things are as in
    `LovaszSoftmax`; errors above 65536 are taken for that.

    Args:
        classes, per_sample, method: as in `LovaszSoftmax`. The default is "all", as the paper's
            loss of one channel counts where it is empty.

    Raises:
        ValueError, TypeError: as `LovaszSoftmax`, and for another activation.

    Source: Yu & Blaschko 2015, "The Lovász hinge: a novel convex surrogate for submodular losses";
    Berman et al. 2018.

    >>> import numpy as np, fastloss as fl
    >>> logits, mask = np.array([[[2.0, 0.5, -3.0]]]), np.array([[1, 1, 0]])
    >>> print(round(float(fl.Loss(fl.LovaszHinge(), activation="sigmoid")(logits, mask)), 3))
    0.25
    """

    histogram = "hinge"
    score = ((UNIFORM, -1.0), (UNIFORM_REST, 1.0))  # log p − log q is the logit

    def __init__(
        self, *, classes: Any = "all", per_sample: bool = False, method: str = "histogram"
    ) -> None:
        super().__init__(classes=classes, per_sample=per_sample, method=method)

    def check(self, activation: str, classes: int) -> None:
        if activation != "sigmoid":
            raise ValueError(
                f"activation: LovaszHinge is defined for 'sigmoid', got {activation!r}"
            )
        super().check(activation, classes)

    def errors_of(self, score: np.ndarray, foreground: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        sign = np.where(foreground, -1.0, 1.0)
        return 1 + sign * score, sign
