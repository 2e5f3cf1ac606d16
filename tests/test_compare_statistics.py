"""Statistics of compared losses: against SciPy, and against studies of which the truth is known."""

from __future__ import annotations

import warnings
from itertools import product
from math import inf, isinf, nan, sqrt

import numpy as np
import pytest
from support import need

from fastloss.compare.records import LesionScore, Score, Study
from fastloss.compare.statistics import (
    bootstrap,
    cohen,
    estimate,
    holm,
    needed,
    promised_power,
    ranks,
    spearman,
    wilcoxon,
)
from fastloss.compare.student import critical, two_sided
from fastloss.compare.verdict import agreement_of, judge, size_bins


def drawn(
    rng: np.random.Generator,
    count: int,
    cases: int,
    runs: int,
    case: float,
    run: float,
    rest: float,
) -> np.ndarray:
    """Studies whose mean is 0: (count, cases, runs), with standard deviations of each part."""
    return (
        case * rng.normal(size=(count, cases, 1))
        + run * rng.normal(size=(count, 1, runs))
        + rest * rng.normal(size=(count, cases, runs))
    )


def binomial(rate: float, count: int) -> float:
    """How far a share of ``count`` trials may be from its rate: four standard deviations."""
    return 4 * sqrt(rate * (1 - rate) / count)


# ---------------------------------------------------------------------- against SciPy


def test_student_as_scipy() -> None:
    stats = need("scipy.stats")
    for df in (0.4, 1, 2.5, 11, 300, 1e6):
        for t in (0.01, 0.7, 2, 9, 40):
            assert two_sided(t, df) == pytest.approx(2 * stats.t.sf(t, df), rel=1e-8)
            assert two_sided(-t, df) == two_sided(t, df)
        for alpha in (0.2, 0.05, 0.001):
            assert critical(df, alpha) == pytest.approx(stats.t.isf(alpha / 2, df), rel=1e-8)
    assert two_sided(inf, 3) == 0
    assert isinf(critical(0))


def test_wilcoxon_and_ranks_as_scipy() -> None:
    stats = need("scipy.stats")
    rng = np.random.default_rng(0)
    for n in (3, 6, 12, 30, 49, 80):
        d = rng.normal(0.3, 1, n)
        method = "exact" if n <= 50 else "approx"
        assert wilcoxon(d).p == pytest.approx(stats.wilcoxon(d, method=method).pvalue, rel=1e-9)
        tied = np.round(d * 2)
        tied[0] = 1
        if n > 50:
            expected = stats.wilcoxon(tied[tied != 0], method="approx").pvalue
            assert wilcoxon(np.append(tied, nan)).p == pytest.approx(expected, rel=1e-9)
        other = np.round(rng.normal(size=n))
        np.testing.assert_array_equal(ranks(tied), stats.rankdata(tied))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of constant input
            expected = stats.spearmanr(tied, other).statistic
        assert spearman(tied, other) == pytest.approx(expected, nan_ok=True)
    assert np.isnan(wilcoxon(np.zeros(4)).p)


def test_wilcoxon_with_ties_counts_all_signs() -> None:
    """By every combination of signs of the ranks, which SciPy has for differences without ties."""
    d = np.array([1.0, 1, -1, 2, 2, 3, -0.5, 4, 0])
    r = ranks(np.abs(d[d != 0]))
    observed = r[d[d != 0] > 0].sum()
    sums = np.array([r[np.array(signs)].sum() for signs in product((False, True), repeat=len(r))])
    middle = r.sum() / 2
    share = (np.abs(sums - middle) >= abs(observed - middle) - 1e-9).mean()
    assert wilcoxon(d).p == pytest.approx(share)
    assert wilcoxon(d).biserial == pytest.approx((2 * observed - r.sum()) / r.sum())
    assert wilcoxon(d).n == 8


def test_holm_and_effect_by_hand() -> None:
    # 4 × 0.01, 3 × 0.02, and never less than the one before; NaN is no test.
    assert holm([0.02, nan, 0.01, 0.9, 0.025]) == pytest.approx(
        [0.06, nan, 0.04, 0.9, 0.06], nan_ok=True
    )
    assert cohen(np.array([1.0, 2, 3, nan])) == pytest.approx(2.0)
    assert np.isnan(cohen(np.array([1.0, 1.0])))


def test_estimate_by_mean_squares() -> None:
    """Of a whole table, the two-way analysis of variance of the textbook."""
    y = drawn(np.random.default_rng(1), 1, 7, 4, 1.0, 0.8, 0.5)[0] + 3
    n, m = y.shape
    by_case, by_run = y.mean(axis=1), y.mean(axis=0)
    ms_case = m * ((by_case - y.mean()) ** 2).sum() / (n - 1)
    ms_run = n * ((by_run - y.mean()) ** 2).sum() / (m - 1)
    rest = y - by_case[:, None] - by_run + y.mean()
    ms_rest = (rest**2).sum() / ((n - 1) * (m - 1))
    found = estimate(y)
    assert found.mean == pytest.approx(y.mean())
    assert found.rest == pytest.approx(ms_rest)
    assert found.run == pytest.approx((ms_run - ms_rest) / n)
    assert found.case == pytest.approx((ms_case - ms_rest) / m)
    assert found.variance == pytest.approx((ms_case + ms_run - ms_rest) / (n * m))
    # That of the runs twice, see TWICE.
    spread = ms_case**2 / (n - 1) + 2 * ms_run**2 / (m - 1) + ms_rest**2 / ((n - 1) * (m - 1))
    assert found.df == pytest.approx((ms_case + ms_run - ms_rest) ** 2 / spread)
    # One run is the usual t-interval, which SciPy has.
    stats = need("scipy.stats")
    one = estimate(y[:, :1])
    expected = stats.ttest_1samp(y[:, 0], 0).confidence_interval(0.95)
    assert one.interval() == pytest.approx((expected.low, expected.high))
    # Neither the order nor empty rows and columns matter, and the input stays as it is.
    empty = np.full((n + 1, m + 1), nan)
    empty[1:, 1:] = y[::-1, ::-1]
    before = empty.copy()
    assert estimate(empty).variance == pytest.approx(found.variance)
    np.testing.assert_array_equal(empty, before)


def test_estimates_without_an_interval() -> None:
    assert np.isnan(estimate(np.full((3, 2), nan)).mean)
    one_case = estimate(np.array([[0.5, 0.6, 0.7]]))
    assert one_case.mean == pytest.approx(0.6)
    assert one_case.interval() == (-inf, inf)
    assert np.isnan(one_case.p)
    assert estimate(np.zeros((5, 3))).p == 1
    assert estimate(np.full((5, 3), 0.1)).p == 0


# ---------------------------------------------------------------------- known truths


def test_intervals_cover_as_they_say() -> None:
    """95 % over cases and runs, or a little more, whichever of the parts is large."""
    rng, count = np.random.default_rng(2), 400
    for cases, runs, folds in ((12, 3, 1), (20, 1, 5), (20, 2, 5)):
        for parts in ((1, 0, 0.5), (1, 0.3, 0.5), (1, 0.6, 0.5), (0.2, 0.5, 1)):
            studies = drawn(rng, count, cases, runs * folds, *parts)
            if folds > 1:  # a case has the runs of its fold
                other = np.arange(cases)[:, None] % folds != np.arange(runs * folds) % folds
                studies[:, other] = nan
            studies[:, 1, 0] = nan  # a score may be missing
            covered = np.mean([estimate(study).p > 0.05 for study in studies])
            assert covered >= 0.95 - binomial(0.95, count), (cases, runs, folds, parts)
            if parts[0] == 1:  # where runs are the larger part, intervals are on the safe side
                assert covered <= 0.97 + binomial(0.97, count), (cases, runs, folds, parts)


def test_cases_alone_would_find_copies_different() -> None:
    """Why runs are part of the model: tests over cases, and a bootstrap, take too little."""
    rng, count = np.random.default_rng(3), 300
    studies = drawn(rng, count, 12, 3, 0.2, 0.5, 1)
    by_cases = np.mean([wilcoxon(study.mean(axis=1)).p <= 0.05 for study in studies])
    low, high = np.transpose([bootstrap(study, draws=200) for study in studies])
    by_bootstrap = np.mean((low > 0) | (high < 0))
    by_both = np.mean([estimate(study).p <= 0.05 for study in studies])
    assert by_cases > 0.15
    assert by_bootstrap > by_both
    assert by_both <= 0.05 + binomial(0.05, count)


def test_a_planted_difference_is_found_as_often_as_promised() -> None:
    """Two standard errors of the mean, of studies of several shapes."""
    rng, count = np.random.default_rng(4), 600
    for cases, runs, parts in (
        (12, 3, (1, 0.1, 0.5)),
        (12, 3, (1, 0.6, 0.5)),
        (40, 5, (1, 0.1, 1)),
        (30, 8, (0.5, 0.5, 1)),
    ):
        case, run, rest = (part**2 for part in parts)
        error = sqrt(case / cases + run / runs + rest / (cases * runs))
        truth = estimate(np.zeros((2, 2)))
        truth = type(truth)(2 * error, case, run, rest, error**2, inf, cases, runs)
        promised = promised_power(2 * error, truth, cases=cases, runs=runs)
        studies = drawn(rng, count, cases, runs, *parts) + 2 * error
        found = np.mean([estimate(study).p <= 0.05 for study in studies])
        assert found == pytest.approx(promised, abs=binomial(promised, count))


def test_needed_studies() -> None:
    """So many cases do, one fewer does not; where runs differ too much, seeds are asked for."""
    rng = np.random.default_rng(5)
    found = estimate(drawn(rng, 1, 12, 3, 1, 0.02, 0.3)[0] + 0.45)
    need_ = needed(found, seeds=3)
    assert need_ is not None
    assert need_.seeds is None
    assert need_.cases is not None
    assert promised_power(found.mean, found, cases=need_.cases, runs=3) >= 0.8
    assert promised_power(found.mean, found, cases=need_.cases - 1, runs=3) < 0.8
    noisy = type(found)(0.5, 0.1, 1.0, 0.1, 0.35, 2.0, 12, 3)
    more = needed(noisy, seeds=3)
    assert more is not None
    assert more.seeds is not None
    assert more.seeds > 3
    tiny = type(found)(1e-9, 1.0, 1.0, 1.0, 0.4, 2.0, 12, 3)
    assert needed(tiny, seeds=3) is None


# ---------------------------------------------------------------------- verdicts


def study_of(
    differences: dict[str, np.ndarray],
    *,
    labels: tuple[str, ...] = ("liver",),
    metric: str = "dice",
) -> Study:
    """A study whose losses have these scores, (labels, cases, seeds)."""
    scores = [
        Score(loss, seed, 0, f"case {i}", metric, label, float(values[k, i, seed]))
        for loss, values in differences.items()
        for k, label in enumerate(labels)
        for i in range(values.shape[1])
        for seed in range(values.shape[2])
    ]
    names = list(differences)
    return Study("a study", names[0], names, scores=scores)


def trained(rng: np.random.Generator, gain: float = 0.0, *, run: float = 0.01) -> np.ndarray:
    """Scores of two classes as a training's noise makes them: (2, 12 cases, 3 seeds)."""
    shared = drawn(rng, 1, 12, 3, 0.02, run, 0.005)  # what the classes of a case have in common
    return gain + 0.85 + shared + drawn(rng, 2, 12, 3, 0.01, 0.003, 0.01)


def test_two_copies_of_a_loss_are_not_distinguishable() -> None:
    """In at least 19 of 20 studies, though each copy is trained with noise of its own."""
    rng, count = np.random.default_rng(6), 200
    told = [0, 0]
    for _ in range(count):
        verdict = judge(study_of({"one": trained(rng), "two": trained(rng)}, labels=("a", "b")))
        main = verdict.main
        assert main is not None
        assert main.title == "dice, mean of classes"
        told[0] += main["two"].comparison.sign != 0  # type: ignore[union-attr]
        told[1] += set(main.best) != {"one", "two"}
    assert told[0] == told[1]
    assert told[0] <= count / 20


def test_a_verdict_of_three_losses() -> None:
    """The better one is found, the two others tie, and what it takes to part them is told."""
    rng = np.random.default_rng(7)
    base = trained(rng)
    noise = [0.004 * rng.normal(size=base.shape) for _ in range(2)]
    study = study_of(
        {"plain": base, "same": base + noise[0], "better": base + 0.03 + noise[1]},
        labels=("a", "b"),
    )
    main = judge(study).main
    assert main is not None
    assert main.best == ["better"]
    assert [(each.loss, each.rank, each.last) for each in main.standings[:1]] == [("better", 1, 1)]
    better, same = main["better"].comparison, main["same"].comparison
    assert better is not None
    assert same is not None
    assert (better.sign, same.sign) == (1, 0)
    assert better.difference.mean == pytest.approx(0.03, abs=0.005)
    low, high = better.difference.interval()
    assert low < 0.03 < high
    assert better.signed.biserial == 1
    assert better.needed is None
    assert same.needed is not None
    assert (main["plain"].rank, main["plain"].last) == (2, 3)
    by_seed = base.mean(axis=(0, 1))
    assert main["plain"].spread == pytest.approx(by_seed.std(ddof=1))
    # A metric of which less is better turns the verdict, not the numbers.
    for score in study.scores:
        object.__setattr__(score, "metric", "hd95")
    main = judge(study).main
    assert main is not None
    assert main["better"].comparison.sign == -1  # type: ignore[union-attr]
    assert main.standings[-1].loss == "better"


def test_missing_and_infinite_scores() -> None:
    """NaN is left out pairwise, infinite distances count as the worst, a failure is told."""
    rng = np.random.default_rng(8)
    values = {name: rng.uniform(1, 5, (1, 6, 3)) for name in ("a", "b", "c")}
    values["a"][0, 0] = nan
    values["b"][0, 1, 2] = nan
    values["b"][0, 2, 0] = inf
    values["c"][:, :, 1] = nan
    study = study_of(values, metric="hd95")
    study.scores = [score for score in study.scores if not (score.loss == "c" and score.seed == 1)]
    verdict = judge(study)
    row = verdict.main
    assert row is not None
    worst = max(v[np.isfinite(v)].max() for v in values.values())
    b = np.where(np.isinf(values["b"][0]), worst, values["b"][0])
    expected = np.nanmean((b - values["a"][0])[1:], axis=1).mean()
    assert row["b"].comparison.difference.mean == pytest.approx(expected)  # type: ignore[union-attr]
    assert row["b"].comparison.difference.cases == 5  # type: ignore[union-attr]
    assert row["c"].comparison.difference.runs == 2  # type: ignore[union-attr]
    assert row.capped == 1
    assert "hd95 of liver 1" in " ".join(verdict.notes)
    # Of two classes those count that both losses have: the missed tumour is no gain in the mean.
    both = rng.uniform(0.6, 0.7, (2, 6, 3))
    gap = both + 0.01
    both[1] -= 0.5  # the tumour is harder
    gap[1] -= 0.5
    gap[1, 2] = nan
    row = judge(study_of({"a": both, "b": gap}, labels=("liver", "tumour"))).main
    assert row is not None
    assert row["b"].comparison.difference.mean == pytest.approx(0.01)  # type: ignore[union-attr]
    study.scores.append(study.scores[0])
    with pytest.raises(ValueError, match="expected one for"):
        judge(study)
    with pytest.raises(ValueError, match="reference: expected one of"):
        Study("x", "none", ["a"])


def test_lesions_by_size_and_agreement_of_loss_and_metric() -> None:
    bins = size_bins(np.arange(1.0, 13))
    assert bins[0].name.startswith("small, up to 4.67")
    assert [sum(each.low < size <= each.high for size in range(1, 13)) for each in bins] == [4] * 3
    assert size_bins(np.arange(9) * 1e5)[2].name == "large, over 533,000 mm³"
    assert size_bins([1, 2, 3]) == []
    rng = np.random.default_rng(9)
    lesions = [
        LesionScore(loss, seed, 0, f"case {i}", "tumour", 10.0 * (1 + i + 12 * size),
                    (0.2 if loss == "b" and size == 0 else 0.5) + rng.normal(0, 0.01))
        for loss in ("a", "b") for seed in range(3) for i in range(12) for size in range(3)
    ]  # fmt: skip
    rows = judge(Study("x", "a", ["a", "b"], lesions=lesions)).rows
    assert [row.size.split(",")[0] for row in rows] == ["small", "medium", "large"]
    assert [row["b"].comparison.sign for row in rows] == [-1, 0, 0]  # type: ignore[union-attr]
    falling = [(step, 1 / (step + 1), step if step % 5 == 4 else nan) for step in range(30)]
    assert agreement_of(falling) == pytest.approx(1)
    assert agreement_of([(step, -value, metric) for step, value, metric in falling]) == (
        pytest.approx(-1)
    )
    assert np.isnan(agreement_of(falling[:12]))
