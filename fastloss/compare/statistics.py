"""Statistics of scores that are paired by case and by run.

**The model.** A score, or the difference of two losses' scores, of case i after run j is
μ + a_i + b_j + e_ij: μ is wanted, a is the case, b is the run (a seed, and a fold where there are
several), which all cases share, and e is the rest. Cases and runs are random: the question is about
other patients and other trainings. A test that takes cases alone for its sample overlooks b, and
finds two copies of one loss different as soon as training has noise of its own.

**The interval** is the mean ± t · √V, V the variance of the mean by the components of the variance
(Henderson's third method), t at Satterthwaite's degrees of freedom. It was chosen by simulation:
with 12, 40 or 100 cases × 3 seeds it covers 94.5 to 99 % of the time whatever the sizes of a, b and
e, and so it does with five seeds; with two seeds, or five folds of one seed, 92.5 % or more, least
where b is as large as a. Percentiles of a bootstrap over cases and seeds cover 82 to 99 % there,
for three seeds are too few to resample: they are here for comparison. So is Wilcoxon's test over
the means of cases, which takes the seeds as they are: of two copies of one loss it finds 5 %
different if there is no b, 14 % with b of 0.6 a, and 27 % with b of 2.5 a (12 cases, 3 seeds).

**Limits.** Effects add, and are roughly normal: where cases are as skewed as an exponential law,
intervals of 12 cases cover 93 %, and of 8 cases with a stronger skew 90 %. Runs of several folds
count as independent, though folds share training cases. With one run b cannot be seen, and the
interval holds for that training alone.

Sources: Henderson 1953 (doi:10.2307/3001853), Satterthwaite 1946 (doi:10.2307/3002019), Wilcoxon
1945 (doi:10.2307/3001968), Holm 1979 (jstor.org/stable/4615733), Owen 2007, the bootstrap over rows
and columns (doi:10.1214/07-AOAS122).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, erfc, inf, nan, pi, sqrt
from typing import Any, NamedTuple

import numpy as np

from fastloss.compare.student import NORMAL, critical, two_sided

DRAWS = 1000  # of the studies that a promise of power is made from
EXACT = 50
"""Up to as many differences, Wilcoxon's test counts all their signs."""
TWICE = 2
"""How often the runs' share counts in Satterthwaite's formula. With two degrees of freedom it is
often seen far too small, which makes the variance small and its degrees of freedom many at once:
counted once, 8 % of two copies of one loss would differ with 40 cases × 3 seeds; twice, 5 %."""
MOST_CASES, MOST_SEEDS, MOST_TIMES = 10_000, 100, 30
"""Of a study that somebody could make."""


@dataclass(frozen=True)
class Estimate:
    """A mean over cases, and how sure it is.

    Attributes:
        mean: of the cases, each the mean of its runs.
        case, run, rest: the components of the variance: of a, b and e in the model of this module.
            ``run`` is NaN where one run gives none. Below two cases, all are NaN.
        variance: of the mean.
        df: the degrees of freedom of ``variance``.
        cases, runs: how many there are.
    """

    mean: float
    case: float
    run: float
    rest: float
    variance: float
    df: float
    cases: int
    runs: int

    def interval(self, alpha: float = 0.05) -> tuple[float, float]:
        """The confidence interval of level 1 − ``alpha``; infinite where it cannot be known."""
        reach = critical(self.df, alpha) * sqrt(self.variance) if self.variance else 0.0
        reach = inf if np.isnan(self.variance) else reach
        return self.mean - reach, self.mean + reach

    @property
    def p(self) -> float:
        """The probability of a mean at least as far from 0, were μ = 0; NaN if not known.

        If no difference varies, 1 if all are 0, and otherwise 0.
        """
        if self.variance == 0:
            return float(self.mean == 0)
        return two_sided(self.mean / sqrt(self.variance), self.df)


def estimate(cells: np.ndarray) -> Estimate:
    """The mean of the cases, with its variance over cases and runs.

    Args:
        cells: (cases, runs); NaN where a run has no score for a case, as for a case of another
            fold. Cases and runs of NaN alone are left out.

    >>> cells = np.array([[0.8, 0.82, 0.78], [0.9, 0.92, 0.91], [0.7, 0.69, 0.68]])
    >>> found = estimate(cells)
    >>> print(f"{found.mean:.3f}, between {found.interval()[0]:.2f} and {found.interval()[1]:.2f}")
    0.800, between 0.53 and 1.07
    """
    cells = np.asarray(cells, np.float64)
    there = ~np.isnan(cells)
    cells = cells[there.any(axis=1)][:, there.any(axis=0)]
    there = ~np.isnan(cells)
    cases, runs = cells.shape
    if not cases:
        return Estimate(nan, nan, nan, nan, nan, 0.0, 0, 0)
    values = np.where(there, cells, 0.0)
    by_case, by_run, total = there.sum(axis=1), there.sum(axis=0), int(there.sum())
    means = values.sum(axis=1) / by_case
    mean = float(means.mean())
    if cases < 2:
        return Estimate(mean, nan, nan, nan, nan, 0.0, cases, runs)
    # Sums of squares are taken about the mean, so that rounding stays far below them.
    values = np.where(there, cells - mean, 0.0)
    square = float((values**2).sum())
    within_cases = square - float((values.sum(axis=1) ** 2 / by_case).sum())
    within_runs = square - float((values.sum(axis=0) ** 2 / by_run).sum())
    explained, rank = _runs_after_cases(values, there)
    parts = runs - rank  # folds that share no case
    df_case, df_run, df_rest = cases - parts, rank, total - cases - rank
    # How much of a run is in the mean, and of a single score.
    weights = there / (cases * by_case[:, None])
    share_run, share_rest = float((weights.sum(axis=0) ** 2).sum()), float((weights**2).sum())
    if df_rest > 0:
        rest = max(within_cases - explained, 0.0) / df_rest
        raw_run = within_cases / (total - cases) - rest
        raw_case = within_runs / (total - runs) - rest if total > runs else -rest
    else:  # a run for each case: what varies within the run is case and rest in one
        rest, raw_case = 0.0, within_runs / (total - runs) if total > runs else 0.0
        if total == runs:  # a case for each run
            raw_case, raw_run, df_case, df_run = 0.0, square / (total - 1), 0, total - 1
        elif runs > 1:
            spread = total - float((by_run**2).sum()) / total
            between = square - float(values.sum()) ** 2 / total
            raw_run, df_run = (between - raw_case * (total - 1)) / spread, runs - 1
        else:
            raw_run = 0.0
    case, run = max(raw_case, 0.0), max(raw_run, 0.0)
    of_rest = share_rest * rest
    of_case, of_run = case / cases + of_rest, max(share_run * raw_run + of_rest, 0.0)
    variance, df = _of_mean((of_case, of_run, of_rest), (df_case, df_run, df_rest))
    return Estimate(
        mean, case, nan if runs == 1 else run, rest, float(variance), float(df), cases, runs
    )


def _of_mean(shares: Sequence[Any], dfs: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """The variance of a mean, and its degrees of freedom, by mean squares.

    Args:
        shares: the mean squares of cases, of runs and of the rest, as they enter the variance;
            numbers, or arrays of many studies.
        dfs: their degrees of freedom.
    """
    of_case, of_run, of_rest = (np.asarray(each, np.float64) for each in shares)
    df_case, df_run, df_rest = dfs
    known = [df for df in (df_case, df_run) if df > 0]
    if not known:
        return of_case * nan, of_case * 0
    variance = of_case + np.maximum(of_run - of_rest, 0.0)
    terms = ((of_case, df_case), (of_run, df_run / TWICE), (of_rest, df_rest))
    spread = sum(each**2 / df for each, df in terms if df > 0)
    df = np.divide(variance**2, spread, out=np.zeros_like(variance), where=spread > 0)
    return variance, np.where(spread > 0, np.maximum(df, min(known)), sum(known))


def _runs_after_cases(values: np.ndarray, there: np.ndarray) -> tuple[float, int]:
    """The sum of squares that runs explain beside cases, and its degrees of freedom."""
    share = there / there.sum(axis=1, keepdims=True)
    normal = np.diag(there.sum(axis=0).astype(float)) - there.T.astype(float) @ share
    right = (values - there * (values.sum(axis=1) / there.sum(axis=1))[:, None]).sum(axis=0)
    sizes, vectors = np.linalg.eigh(normal)
    kept = sizes > 1e-9 * max(sizes[-1], 1.0)
    projected = vectors[:, kept].T @ right
    return float((projected**2 / sizes[kept]).sum()), int(kept.sum())


def bootstrap(
    cells: np.ndarray, *, draws: int = 2000, alpha: float = 0.05, seed: int = 0
) -> tuple[float, float]:
    """Percentiles of the mean when cases and runs are drawn again, each with replacement.

    Paired where ``cells`` are differences. Few runs make it too narrow, see this module.

    Args:
        cells: (cases, runs), as `estimate` takes them.
        draws: how many times.
        alpha: 1 − the level.
        seed: of the draws; the same seed gives the same interval.
    """
    cells = np.asarray(cells, np.float64)
    there = ~np.isnan(cells)
    if not there.any():
        return nan, nan
    cases, runs = cells.shape
    rng = np.random.default_rng(seed)
    by_case = rng.multinomial(cases, np.full(cases, 1 / cases), draws).astype(float)
    by_run = rng.multinomial(runs, np.full(runs, 1 / runs), draws).astype(float)
    # Of each draw and case: the mean of the runs that were drawn, then that over the cases.
    weight = by_run @ there.T
    sums = by_run @ np.where(there, cells, 0.0).T
    known = weight > 0
    means = np.divide(sums, weight, out=np.zeros_like(sums), where=known)
    counts = (by_case * known).sum(axis=1)
    found = ((by_case * means).sum(axis=1) / np.maximum(counts, 1))[counts > 0]
    low, high = np.quantile(found, (alpha / 2, 1 - alpha / 2))
    return float(low), float(high)


class Signed(NamedTuple):
    """Wilcoxon's signed rank test of differences."""

    p: float
    """Two-sided; NaN without a difference that is not 0."""
    biserial: float
    """The matched-pairs rank-biserial correlation (Kerby 2014): the share of the rank sum that is
    of positive differences, less that of negative ones; −1 to 1, 0 without differences."""
    n: int
    """How many differences are not 0, and count."""


def wilcoxon(differences: np.ndarray) -> Signed:
    """Whether differences lie around 0: Wilcoxon's signed rank test.

    Differences of 0 and NaN are left out, equal ones share their mean rank. Up to 50, all signs
    are counted, so that ties are exact too; above, the normal approximation with its correction
    for ties, without one for continuity, as SciPy's.

    >>> found = wilcoxon(np.array([1.0, 2.0, 3.0, 4.0, -0.5, 5.0]))
    >>> found.p, round(found.biserial, 3)
    (0.0625, 0.905)
    """
    d = np.asarray(differences, np.float64).ravel()
    d = d[~np.isnan(d) & (d != 0)]
    n = len(d)
    if n == 0:
        return Signed(nan, 0.0, 0)
    twice = np.rint(2 * ranks(np.abs(d))).astype(int)  # whole numbers, mean ranks too
    total = int(twice.sum())
    positive = int(twice[d > 0].sum())
    biserial = (2 * positive - total) / total
    least = min(positive, total - positive)
    if n <= EXACT:
        ways = np.zeros(total + 1)
        ways[0] = 1.0
        for rank in twice:  # sums with this difference positive, and without
            ways[rank:] = ways[rank:] + ways[: total + 1 - rank]
        p = min(1.0, 2 * float(ways[: least + 1].sum()) / 2.0**n)
    else:
        variance = float((twice.astype(float) ** 2).sum()) / 4  # Σ rank², and so ties, for 2 W
        z = (least - total / 2) / sqrt(variance)
        p = min(1.0, erfc(-z / sqrt(2)))
    return Signed(p, biserial, n)


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values share their mean rank.

    >>> ranks(np.array([10.0, 30.0, 10.0]))
    array([1.5, 3. , 1.5])
    """
    _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    found: np.ndarray = (last - (counts - 1) / 2)[index.reshape(np.shape(values))]
    return found


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """The correlation of the ranks (Spearman 1904), pairs with NaN left out.

    NaN below three pairs, and where all of one are equal.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    known = ~(np.isnan(x) | np.isnan(y))
    if known.sum() < 3:
        return nan
    a, b = ranks(x[known]), ranks(y[known])
    a, b = a - a.mean(), b - b.mean()
    scale = sqrt(float((a**2).sum() * (b**2).sum()))
    return float((a * b).sum()) / scale if scale else nan


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979); NaN stays, and does not count.

    >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    p = np.asarray(p_values, np.float64)
    found = np.full(len(p), nan)
    known = np.flatnonzero(~np.isnan(p))
    order = known[np.argsort(p[known], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    found[order] = np.minimum(1.0, np.maximum.accumulate(factors * p[order]))
    return [float(each) for each in found]


def cohen(differences: np.ndarray) -> float:
    """Cohen's d_z: the mean difference by the standard deviation of differences.

    NaN below two differences, and where none varies.
    """
    d = np.asarray(differences, np.float64)
    d = d[~np.isnan(d)]
    spread = float(d.std(ddof=1)) if len(d) > 1 else 0.0
    return float(d.mean()) / spread if spread else nan


def promised_power(
    difference: float,
    found: Estimate,
    *,
    cases: int,
    runs: int,
    each: int | None = None,
    alpha: float = 0.05,
) -> float:
    """How often a true difference would be found by so many cases and runs.

    The mean squares of a thousand such studies are drawn, the same ones in every call.

    Args:
        difference: the true one.
        found: the components of the variance, as `estimate` gives them.
        cases, runs: of the study to come.
        each: how many of the runs score a case; all, if not given.
        alpha: the level of the test.
    """
    run = 0.0 if np.isnan(found.run) else found.run
    each = each or runs
    of_rest = found.rest / (cases * each)
    of_case, of_run = found.case / cases + of_rest, run / runs + of_rest
    variance = of_case + of_run - of_rest
    if variance == 0:
        return float(difference != 0)
    dfs = (cases - 1, runs - 1, (cases - 1) * (each - 1))
    rng = np.random.default_rng(0)
    shares = [
        share * rng.chisquare(df, DRAWS) / df if df else np.zeros(DRAWS)
        for share, df in zip((of_case, of_run, of_rest), dfs, strict=True)
    ]
    shares[0] = np.maximum(shares[0], shares[2])
    drawn, df = _of_mean(shares, dfs)
    border = _critical(df, alpha) * np.sqrt(drawn)
    far, error = abs(difference), sqrt(variance)
    return float((_normal((far - border) / error) + _normal((-far - border) / error)).mean())


def _critical(df: np.ndarray, alpha: float) -> np.ndarray:
    """As `critical`, of many; within 1 % from 2 degrees of freedom on.

    Abramowitz & Stegun 26.7.5.
    """
    z = NORMAL.inv_cdf(1 - alpha / 2)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    found: np.ndarray = z + np.sum([term / df ** (i + 1) for i, term in enumerate(terms)], axis=0)
    return found


def _normal(z: np.ndarray) -> np.ndarray:
    """The normal distribution's probability below ``z``, within 0.0003 (Page 1977)."""
    found: np.ndarray = 0.5 * (1 + np.tanh(sqrt(2 / pi) * (z + 0.044715 * z**3)))
    return found


class Needed(NamedTuple):
    """A study that would show a difference; None: as many as there were."""

    cases: int | None
    seeds: int | None


def needed(
    found: Estimate, *, seeds: int, alpha: float = 0.05, wanted: float = 0.8
) -> Needed | None:
    """A study that would show the mean of ``found``, were it the true difference.

    More cases, or if they would not do, as where trainings differ by more than that, more seeds,
    or both in proportion.

    Args:
        found: the difference, as `estimate` gives it.
        seeds: how many runs scored a case.
        alpha: the level of the test.
        wanted: the power.

    Returns:
        None if neither 10,000 cases, nor 100 seeds, nor both thirty times would.
    """

    def enough(cases: int, now: int) -> bool:
        runs = max(now, round(found.runs * now / seeds))  # folds times seeds
        return wanted <= promised_power(
            found.mean, found, cases=cases, runs=runs, each=now, alpha=alpha
        )

    def in_proportion(now: int) -> int:
        return ceil(found.cases * now / seeds)

    cases = _least(lambda count: enough(count, seeds), MOST_CASES)
    if cases is not None:
        return Needed(max(cases, found.cases + 1), None)
    more = _least(lambda count: enough(found.cases, count), MOST_SEEDS)
    if more is not None:
        return Needed(None, max(more, seeds + 1))
    more = _least(lambda count: enough(in_proportion(count), count), MOST_TIMES * seeds)
    return None if more is None else Needed(in_proportion(more), more)


def _least(enough: Callable[[int], bool], most: int) -> int | None:
    """The least number from 2 on that is enough."""
    if not enough(most):
        return None
    low, high = 1, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def rounded(count: int) -> int:
    """To two digits, upward: 42 stays, and 417 is 420."""
    step = int(10 ** max(0, len(str(count)) - 2))
    return ceil(count / step) * step
