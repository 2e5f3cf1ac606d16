"""The verdict: which loss is better, by how much, or that the data cannot tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isnan, nan
from typing import NamedTuple

import numpy as np

from fastloss.compare.records import LesionScore, Score, Study
from fastloss.compare.statistics import (
    Estimate,
    Needed,
    Signed,
    bootstrap,
    cohen,
    estimate,
    holm,
    needed,
    spearman,
    wilcoxon,
)
from fastloss.metrics.evaluate import METRICS, PATTERNS
from fastloss.metrics.metric import find_metrics

LEVEL = 0.05
"""Of tests; intervals are those of 95 %."""
LESION_DICE = "lesion dice"
FEWEST_LESIONS = 9
"""That are parted into small, medium and large ones."""


@dataclass(frozen=True)
class Comparison:
    """A loss less another, over cases and runs that have both.

    Attributes:
        loss, other: their names.
        difference: with its interval.
        resampled: the percentile interval of a bootstrap over cases and seeds, beside that of
            ``difference``, which decides.
        p, p_holm: of the difference over cases and runs; corrected for the losses of the row.
        signed, signed_holm: Wilcoxon's test over the cases' means, which holds for the seeds as
            they are, and its p corrected.
        effect: Cohen's d_z of the cases' means.
        sign: 1 if the loss is better than the other, −1 if it is worse, 0 if the two cannot be
            told apart, or the metric has no better end.
        needed: the study that would show the difference; None where this one does, and where no
            study of any size that somebody could make would.
    """

    loss: str
    other: str
    difference: Estimate
    resampled: tuple[float, float]
    p: float
    p_holm: float
    signed: Signed
    signed_holm: float
    effect: float
    sign: int
    needed: Needed | None


@dataclass(frozen=True)
class Standing:
    """A loss in a row.

    Attributes:
        loss: its name.
        rank: the best that it may have: 1 and how many losses were shown to be better.
        last: the worst that it may have: all losses but those that were shown to be worse.
        estimate: its mean, with its interval.
        spread: the standard deviation between seeds, of the mean over cases; NaN for one seed.
        comparison: with the reference; None for the reference itself.
    """

    loss: str
    rank: int
    last: int
    estimate: Estimate
    spread: float
    comparison: Comparison | None


@dataclass(frozen=True)
class Row:
    """One metric of one class.

    Attributes:
        metric, label: which; the label is empty for the mean over classes.
        size: which lesions, such as "small, under 120 mm³"; empty for all.
        better: "higher", "lower" or "".
        reference: the loss that the others are compared with.
        standings: in the order of their means, the best first.
        capped: how many infinite values were set to the worst finite one.
    """

    metric: str
    label: str
    size: str
    better: str
    reference: str
    standings: tuple[Standing, ...]
    capped: int = 0

    @property
    def title(self) -> str:
        return ", ".join(filter(None, (self.metric, self.label or "mean of classes", self.size)))

    def __getitem__(self, loss: str) -> Standing:
        """The standing of a loss.

        Raises:
            KeyError: it has no score here.
        """
        for each in self.standings:
            if each.loss == loss:
                return each
        raise KeyError(loss)

    @property
    def comparisons(self) -> list[Comparison]:
        return [each.comparison for each in self.standings if each.comparison]

    @property
    def best(self) -> list[str]:
        """The losses that may be the best: none was shown to be better."""
        return [each.loss for each in self.standings if each.rank == 1]


class Agreement(NamedTuple):
    """Whether a falling loss means a rising metric, over the moments of a training.

    Attributes:
        mean: the mean over runs of Spearman's correlation of −loss and metric: 1 if they always
            go together, NaN if no run measured the metric thrice.
        low, high: the runs' extremes.
        runs: how many have one.
    """

    mean: float
    low: float
    high: float
    runs: int


@dataclass(frozen=True)
class Verdict:
    """All that can be said.

    Attributes:
        rows: a row for each metric and class, and for small, medium and large lesions. The first
            is the one that decides: the first metric, its mean over classes. All others look
            into it, and with many of them some differ by chance.
        agreement: by loss.
        notes: plain sentences on what failed, is missing, or could not be measured.
    """

    rows: tuple[Row, ...]
    agreement: Mapping[str, Agreement]
    notes: tuple[str, ...]

    @property
    def main(self) -> Row | None:
        return self.rows[0] if self.rows else None


def judge(study: Study, *, seed: int = 0) -> Verdict:
    """What a study shows.

    A loss is better than another if the difference of their means, over cases and over runs, is
    not 0 by a test at 5 %, after Holm's correction for the losses of the row. With a single run
    of each loss no loss is called better, as another training of the same loss differs as well.
    Values of NaN are left out pairwise.

    Args:
        study: the scores. Infinite ones, as of a surface distance to nothing, count as the worst
            finite value of their metric and class over all losses.
        seed: of the bootstrap.

    Raises:
        ValueError: a score that is there twice.
    """
    study.check()
    table = _Table(study)
    notes = _failures(study, table)
    reference = study.reference
    if table.losses and reference not in table.losses:
        reference = table.losses[0]
        notes.append(f"The reference {study.reference} has no scores: {reference} takes its place.")
    rows = []
    for metric in study.metrics:
        better = _better(metric, study.options)
        labels = [label for label in study.labels if (metric, label) in table.cells]
        found = [table.row(metric, (label,), label, reference, better, seed) for label in labels]
        if len(labels) > 1:
            found.insert(0, table.row(metric, labels, "", reference, better, seed))
        rows += found
    rows += _lesion_rows(study, table, reference, seed)
    shown = tuple(row for row in rows if row.standings)
    notes += _limits(table, shown)
    return Verdict(shown, _agreement(study), tuple(notes))


class _Table:
    """Scores by metric and class, as arrays over cases and runs."""

    def __init__(self, study: Study) -> None:
        self.cases = study.cases
        lesions = list(dict.fromkeys(each.case for each in study.lesions))
        self.cases += [case for case in lesions if case not in self.cases]
        scores: list[Score | LesionScore] = [*study.scores, *study.lesions]
        self.runs = sorted({(each.seed, each.fold) for each in scores})
        self.case_of = {case: i for i, case in enumerate(self.cases)}
        self.run_of = {run: j for j, run in enumerate(self.runs)}
        with_scores = {each.loss for each in scores}
        self.losses = [loss for loss in study.losses if loss in with_scores]
        self.cells: dict[tuple[str, str], dict[str, np.ndarray]] = {}
        seen = set()
        for score in study.scores:
            key = (score.loss, score.seed, score.fold, score.case, score.metric, score.label)
            if key in seen:
                raise ValueError(f"scores: expected one for {key}, got two")
            seen.add(key)
            cells = self.cells.setdefault((score.metric, score.label), {})
            self.of(cells, score.loss)[self.place(score.case, score.seed, score.fold)] = score.value
        self.capped = {
            (metric, label): _cap(cells, _better(metric, study.options))
            for (metric, label), cells in self.cells.items()
        }

    @property
    def seeds(self) -> list[int]:
        return sorted({seed for seed, _ in self.runs})

    def place(self, case: str, seed: int, fold: int) -> tuple[int, int]:
        return self.case_of[case], self.run_of[seed, fold]

    def of(self, cells: dict[str, np.ndarray], loss: str) -> np.ndarray:
        """The array of a loss, made of NaN if there is none."""
        if loss not in cells:
            cells[loss] = np.full((len(self.cases), len(self.runs)), nan)
        return cells[loss]

    def row(
        self,
        metric: str,
        labels: Sequence[str],
        label: str,
        reference: str,
        better: str,
        seed: int,
    ) -> Row:
        layers = {
            loss: np.stack([self.of(self.cells[metric, each], loss) for each in labels])
            for loss in self.losses
        }
        capped = sum(self.capped[metric, each] for each in labels)
        return self.row_of(layers, metric, label, "", reference, better, seed, capped)

    def row_of(
        self,
        layers: dict[str, np.ndarray],
        metric: str,
        label: str,
        size: str,
        reference: str,
        end: str,
        seed: int,
        capped: int = 0,
    ) -> Row:
        """Of (classes, cases, runs) for each loss."""
        layers = {loss: each for loss, each in layers.items() if not np.isnan(each).all()}
        means = {loss: estimate(_mean(each)) for loss, each in layers.items()}
        sign = {"higher": 1, "lower": -1}.get(end, 0)
        comparisons = []
        if reference in layers:
            others = [loss for loss in layers if loss != reference]
            comparisons = _compare(layers, [(loss, reference) for loss in others], sign, seed)
        rest = [loss for loss in layers if loss != reference]
        pairs = [(one, two) for i, one in enumerate(rest) for two in rest[i + 1 :]]
        decided = [(each.loss, each.other, each.sign) for each in comparisons]
        # A family of its own: these pairs only order the losses beside the reference.
        signs = _decide([_cells(layers, *pair) for pair in pairs], sign)[2]
        decided += [(*pair, each) for pair, each in zip(pairs, signs, strict=True)]
        better, worse = dict.fromkeys(layers, 0), dict.fromkeys(layers, 0)  # than this one
        for one, other, each in decided:
            if each:
                first, second = (one, other)[::each]
                better[second] += 1
                worse[first] += 1
        by_loss = {each.loss: each for each in comparisons}
        standings = [
            Standing(
                loss,
                1 + better[loss],
                len(layers) - worse[loss],
                means[loss],
                self._spread(_mean(each)),
                by_loss.get(loss),
            )
            for loss, each in layers.items()
        ]
        standings.sort(key=lambda each: -sign * each.estimate.mean)
        return Row(metric, label, size, end, reference, tuple(standings), capped)

    def _spread(self, cells: np.ndarray) -> float:
        """The standard deviation between seeds, of the mean over the cases that all have."""
        by_seed = np.stack(
            [
                _nanmean(cells[:, [j for j, run in enumerate(self.runs) if run[0] == seed]], 1)
                for seed in self.seeds
            ],
            axis=1,
        )
        by_seed = by_seed[:, ~np.isnan(by_seed).all(axis=0)]
        whole = by_seed[~np.isnan(by_seed).any(axis=1)]
        if by_seed.shape[1] < 2 or not len(whole):
            return nan
        return float(whole.mean(axis=0).std(ddof=1))


def _compare(
    layers: Mapping[str, np.ndarray], pairs: Sequence[tuple[str, str]], sign: int, seed: int
) -> list[Comparison]:
    """Comparisons that are one family for Holm's correction."""
    cells = [_cells(layers, loss, other) for loss, other in pairs]
    found, p_holm, signs = _decide(cells, sign)
    by_case = [_nanmean(each, 1) for each in cells]
    signed = [wilcoxon(each) for each in by_case]
    signed_holm = holm([each.p for each in signed])
    return [
        Comparison(
            loss,
            other,
            found[k],
            bootstrap(cells[k], alpha=LEVEL, seed=seed),
            found[k].p,
            p_holm[k],
            signed[k],
            signed_holm[k],
            cohen(by_case[k]),
            signs[k],
            _needed(found[k], cells[k], LEVEL / len(pairs)) if sign and not signs[k] else None,
        )
        for k, (loss, other) in enumerate(pairs)
    ]


def _decide(
    cells: Sequence[np.ndarray], sign: int
) -> tuple[list[Estimate], list[float], list[int]]:
    """Differences, their p by Holm's correction, and 1, −1 or 0 as `Comparison.sign`."""
    found = [estimate(each) for each in cells]
    p_holm = holm([each.p for each in found])
    signs = [
        (sign if each.mean > 0 else -sign) if p <= LEVEL and each.runs > 1 else 0
        for each, p in zip(found, p_holm, strict=True)
    ]
    return found, p_holm, signs


def _cells(layers: Mapping[str, np.ndarray], loss: str, other: str) -> np.ndarray:
    """Differences (cases, runs), the mean over classes that both have."""
    return _mean(layers[loss] - layers[other])


def _needed(found: Estimate, cells: np.ndarray, alpha: float) -> Needed | None:
    """None without a difference, or without variances to go by."""
    if not found.mean or isnan(found.variance) or found.runs < 2:
        return None
    counts = (~np.isnan(cells)).sum(axis=1)
    seeds = max(1, round(float(counts[counts > 0].mean())))
    return needed(found, seeds=seeds, alpha=alpha)


def _mean(layers: np.ndarray) -> np.ndarray:
    """Over classes that have a value."""
    return _nanmean(layers, 0)


def _nanmean(values: np.ndarray, axis: int) -> np.ndarray:
    """As np.nanmean, without its warning where there is no value."""
    known = ~np.isnan(values)
    count = known.sum(axis=axis)
    sums = np.where(known, values, 0.0).sum(axis=axis)
    found: np.ndarray = np.where(count > 0, sums / np.maximum(count, 1), nan)
    return found


def _cap(cells: dict[str, np.ndarray], better: str) -> int:
    """Set infinite values to the worst finite one, of any loss; how many there were."""
    values = np.stack(list(cells.values()))
    infinite = int(np.isinf(values).sum())
    if infinite:
        finite = values[np.isfinite(values)]
        worst = nan if not len(finite) else finite.min() if better == "higher" else finite.max()
        for each in cells.values():
            each[np.isinf(each)] = worst
    return infinite


def _better(metric: str, options: Mapping[str, object]) -> str:
    """The better end of a metric: of this library, or as the options name it under "better"."""
    named = options.get("better")
    if isinstance(named, Mapping) and metric in named:
        return str(named[metric])
    try:
        return find_metrics(metric, METRICS, PATTERNS)[metric].better
    except ValueError:
        return ""


# ---------------------------------------------------------------------- lesions by size


class Bin(NamedTuple):
    """Lesions of a range of sizes, in mm³: more than ``low``, up to ``high``."""

    name: str
    low: float
    high: float


def size_bins(sizes: Sequence[float]) -> list[Bin]:
    """Small, medium and large: thirds of the sizes, in mm³. None below nine different ones."""
    known = np.unique(np.asarray(sizes, np.float64))
    if len(known) < FEWEST_LESIONS:
        return []
    one, two = np.quantile(np.asarray(sizes), (1 / 3, 2 / 3))
    return [
        Bin(f"small, up to {_volume(one)}", 0.0, float(one)),
        Bin("medium", float(one), float(two)),
        Bin(f"large, over {_volume(two)}", float(two), np.inf),
    ]


def _volume(size: float) -> str:
    """To three digits, as "8.49 mm³" and "849,000 mm³"."""
    return f"{float(f'{size:.3g}'):,.6g} mm³" if size < 1000 else f"{float(f'{size:.3g}'):,.0f} mm³"


def _lesion_rows(study: Study, table: _Table, reference: str, seed: int) -> list[Row]:
    rows = []
    for label in dict.fromkeys(each.label for each in study.lesions):
        lesions = [each for each in study.lesions if each.label == label]
        distinct = {(each.case, each.size) for each in lesions}
        for bin_ in size_bins([size for _, size in distinct]):
            sums: dict[str, np.ndarray] = {}
            counts: dict[str, np.ndarray] = {}
            for each in lesions:
                if bin_.low < each.size <= bin_.high:
                    place = table.place(each.case, each.seed, each.fold)
                    for found, value in ((sums, each.dice), (counts, 1.0)):
                        array = found.setdefault(
                            each.loss, np.zeros((len(table.cases), len(table.runs)))
                        )
                        array[place] += value
            layers = {
                loss: np.divide(sums[loss], n, out=np.full_like(n, nan), where=n > 0)[None]
                for loss, n in ((loss, counts[loss]) for loss in study.losses if loss in counts)
            }
            rows.append(
                table.row_of(layers, LESION_DICE, label, bin_.name, reference, "higher", seed)
            )
    return rows


# ---------------------------------------------------------------------- training


def _agreement(study: Study) -> dict[str, Agreement]:
    found = {}
    for loss in study.losses:
        runs: dict[tuple[int, int], list[tuple[int, float, float]]] = {}
        for point in study.curves:
            if point.loss == loss:
                place = runs.setdefault((point.seed, point.fold), [])
                place.append((point.step, point.loss_value, point.metric))
        each = [agreement_of(points) for points in runs.values()]
        known = [value for value in each if not isnan(value)]
        if known:
            mean = float(np.mean(known))
            found[loss] = Agreement(mean, min(known), max(known), len(known))
        elif runs:
            found[loss] = Agreement(nan, nan, nan, 0)
    return found


def agreement_of(points: Sequence[tuple[int, float, float]]) -> float:
    """Spearman's correlation of −loss and metric, of one training.

    Args:
        points: of a step, its training loss, and the metric or NaN. A metric is set beside the
            mean of the losses since the one before, as the loss of one batch is noisy.
    """
    losses: list[float] = []
    pairs = []
    for _, value, metric in sorted(points):
        losses.append(value)
        if not isnan(metric):
            pairs.append((-float(np.mean(losses)), metric))
            losses = []
    x, y = np.array(pairs).reshape(-1, 2).T
    return spearman(x, y)


# ---------------------------------------------------------------------- notes


def _failures(study: Study, table: _Table) -> list[str]:
    notes = []
    folds = {each.fold for each in study.scores} | {each.fold for each in study.failures}
    for loss in study.losses:
        failed = [each for each in study.failures if each.loss == loss]
        if failed:
            where = ", ".join(
                f"seed {each.seed}" + (f" fold {each.fold}" if len(folds) > 1 else "")
                for each in failed
            )
            messages = "; ".join(dict.fromkeys(each.message for each in failed))
            ending = (
                "it is compared on the runs that remain"
                if loss in table.losses
                else "it has no scores"
            )
            notes.append(f"{loss} failed in {where} ({messages}): {ending}.")
        elif loss not in table.losses:
            notes.append(f"{loss} has no scores.")
    return notes


def _limits(table: _Table, rows: Sequence[Row]) -> list[str]:
    notes = []
    runs, cases = len(table.runs), len(table.cases)
    if not rows:
        return ["There are no scores to judge."]
    if runs == 1:
        notes.append(
            "Each loss was trained once, so that the noise of training cannot be told from the "
            "loss, and none is called better: intervals and p-values hold for these trainings "
            "alone. Repeat with three seeds or more."
        )
    elif runs == 2:
        notes.append("With two runs of each loss intervals are wide: three or more say far more.")
    if cases == 1:
        notes.append("One case has no interval: it says nothing of other cases.")
    capped = [row for row in rows if row.capped and row.label]
    if capped:
        where = ", ".join(f"{row.metric} of {row.label} {row.capped}" for row in capped)
        notes.append(
            f"Infinite values count as the worst finite value of their metric and class: {where}."
        )
    no_end = list(dict.fromkeys(row.metric for row in rows if not row.better))
    if no_end:
        notes.append(f"Not ranked, as neither end is better: {', '.join(no_end)}.")
    return notes
