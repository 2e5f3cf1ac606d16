"""A verdict in plain words and numbers, for the screen and for the page."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, isfinite, isnan

from fastloss.compare.records import Cost, Study
from fastloss.compare.statistics import Estimate, Needed, rounded
from fastloss.compare.verdict import LEVEL, Comparison, Row, Standing, Verdict

ALIKE = 1.1
"""Times that differ by less are not told apart."""
FEW_AGREE = 0.5
"""Below this rank correlation a loss is said not to follow the metric."""


def digits(row: Row) -> int:
    """How many decimals the numbers of a row are shown with."""
    size = max((abs(each.estimate.mean) for each in row.standings), default=0.0)
    return 3 if size < 3 else 2 if size < 30 else 1 if size < 300 else 0


def number(value: float, decimals: int = 3, *, sign: bool = False) -> str:
    """A number for people; "–" for NaN."""
    if isnan(value):
        return "–"
    if not isfinite(value):
        return "inf" if value > 0 else "-inf"
    text = f"{value:+.{decimals}f}" if sign else f"{value:.{decimals}f}"
    return text.replace("-", "") if float(text) == 0 and not sign else text


def interval(found: Estimate, decimals: int) -> str:
    """The 95 % interval of a difference, in brackets; "" where there is none."""
    low, high = found.interval(LEVEL)
    if not isfinite(low):
        return ""
    return f"[{number(low, decimals, sign=True)}, {number(high, decimals, sign=True)}]"


def mean_interval(each: Standing, row: Row, decimals: int) -> str:
    """The 95 % interval of a mean, as far as the metric reaches."""
    low, high = each.estimate.interval(LEVEL)
    if not isfinite(low):
        return ""
    least, most = limits(row)
    return f"[{number(max(low, least), decimals)}, {number(min(high, most), decimals)}]"


def limits(row: Row) -> tuple[float, float]:
    """Between which the means of a metric lie: all that are better if higher end at 1."""
    means = [each.estimate.mean for each in row.standings]
    return (
        0.0 if min(means) >= 0 else -inf,
        1.0 if row.better == "higher" and max(means) <= 1 else inf,
    )


def probability(p: float) -> str:
    """A p-value for people."""
    return "–" if isnan(p) else "<0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def listed(names: Sequence[str], word: str = "and") -> str:
    """ "a, b and c"."""
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} {word} {names[-1]}"


def counted(count: int, noun: str) -> str:
    """ "1 case", "2 cases"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def size_of(study: Study) -> str:
    """ "12 cases, 3 seeds"."""
    runs = {(each.seed, each.fold) for each in study.scores}
    seeds, folds = ({run[i] for run in runs} for i in (0, 1))
    parts = [counted(len(study.cases), "case"), counted(len(seeds), "seed")]
    parts += [counted(len(folds), "fold")] if len(folds) > 1 else []
    return ", ".join(parts)


def judgement(each: Comparison | None, row: Row) -> str:
    """In a word or two: "better", "worse", "tie", "reference"."""
    if each is None:
        return "reference" if row.standings else ""
    if not row.better:
        return ""
    return {1: "better", -1: "worse", 0: "tie"}[each.sign]


def rank(each: Standing, row: Row) -> str:
    """The rank, or between which it may be."""
    if not row.better:
        return ""
    return f"{each.rank}" if each.rank == each.last else f"{each.rank}–{each.last}"


def cost_of(study: Study, loss: str) -> Cost | None:
    return next((each for each in study.costs if each.loss == loss), None)


# ---------------------------------------------------------------------- the last paragraph


def paragraph(study: Study, verdict: Verdict) -> str:
    """Which loss to take, by how much it is better, at what cost, or that the data cannot tell."""
    row = verdict.main
    if row is None:
        return "There are no scores to judge."
    if len(row.standings) == 1:
        return f"Only {row.standings[0].loss} has scores: there is nothing to compare."
    sentences = [_against(each, row, study) for each in row.comparisons]
    sentences.append(_choice(study, row))
    sentences += _within(verdict, row)
    sentences += _followers(verdict)
    if any(study.failures):
        failed = dict.fromkeys(each.loss for each in study.failures)
        sentences.append(f"Some runs of {listed(list(failed))} failed; see the notes.")
    return " ".join(filter(None, sentences))


def _against(each: Comparison, row: Row, study: Study) -> str:
    decimals = digits(row)
    found = each.difference
    what = row.metric if row.label else f"mean {row.metric}"
    away = number(abs(found.mean), decimals)
    low, high = sorted(abs(end) for end in found.interval(LEVEL))
    if each.sign:
        way = "higher" if found.mean > 0 else "lower"
        return (
            f"{each.loss} is {judgement(each, row)} than {each.other}: its {what} is {away} {way} "
            f"(95 % interval {number(low, decimals)} to {number(high, decimals)}, "
            f"p {probability(each.p_holm)} after Holm's correction)."
        )
    if not found.cases:
        return f"{each.loss} and {each.other} have no run in common."
    if not row.better:
        return f"The {what} of {each.loss} is {away} from {each.other}'s; no end of it is better."
    start = f"{each.loss} and {each.other} are not distinguishable with {_counts(found)}"
    if not found.mean and not found.variance:
        return f"{start}: their scores are the same."
    seen = f"{what} {number(found.mean, decimals, sign=True)}"
    around = interval(found, decimals)
    seen += f", 95 % interval {around[1:-1].replace(', ', ' to ')}" if around else ""
    return f"{start} ({seen}); {_need(each.needed, found)}."


def _counts(found: Estimate) -> str:
    return f"{counted(found.cases, 'case')} and {counted(found.runs, 'training')} of each"


def _need(need: Needed | None, found: Estimate) -> str:
    if found.runs < 2:
        return "a single training shows no difference of losses, so repeat with three seeds or more"
    if found.cases < 2:
        return "a single case shows no difference of losses"
    if need is None:
        return "no study that could be made would show so small a difference"
    parts = [f"{rounded(need.cases)} cases"] if need.cases else []
    parts += [f"{rounded(need.seeds)} seeds"] if need.seeds else []
    return f"some {' with '.join(parts)} would be needed for this difference"


def _choice(study: Study, row: Row) -> str:
    """The one to take: shown to be best, or the cheapest of those that may be."""
    if not row.better:
        return ""
    best = row.best
    if len(best) == 1:
        return f"Take {best[0]}, which is shown to be better than all others. {_price(study, best)}"
    together = f"{listed(best)} may each be the best"
    costs = {loss: cost.loss_ms for loss in best if (cost := cost_of(study, loss))}
    if len(costs) < len(best):
        return f"{together}."
    near = [loss for loss in best if costs[loss] <= ALIKE * min(costs.values())]
    if len(near) == len(best):
        return f"{together}, and take about the same time. {_price(study, near[:1])}"
    ending = "is the fastest of them" if len(near) == 1 else "are the fastest of them"
    return f"{together}, and {listed(near)} {ending}. {_price(study, near)}"


def _price(study: Study, losses: Sequence[str]) -> str:
    parts = []
    for loss in dict.fromkeys((*losses, study.reference)):
        cost = cost_of(study, loss)
        if cost is not None:
            parts.append(f"{loss} takes {cost.loss_ms:.3g} ms of a step's {cost.step_ms:.3g}")
    return f"{listed(parts)}." if parts else ""


def _within(verdict: Verdict, main: Row) -> list[str]:
    """What other metrics, single classes and sizes add, where they say something else."""
    rows = [row for row in verdict.rows if row is not main and row.better]
    told = [(row, each) for row in rows for each in row.comparisons if each.sign]
    if not any(row.comparisons for row in rows):
        return []
    differ = len({row.title for row, _ in told})
    found = [
        f"Of {counted(len(rows), 'further row')} (other metrics, single classes, lesion sizes) "
        f"{differ or 'none'} show{'' if differ > 1 else 's'} a difference; 1 in {round(1 / LEVEL)} "
        "would by chance alone."
    ]
    signs = {each.loss: each.sign for each in main.comparisons}
    grouped: dict[tuple[str, str, str], list[str]] = {}
    for row, each in told:
        if each.sign != signs.get(each.loss):
            place = ", ".join(filter(None, (row.label or "mean of classes", row.size)))
            key = (each.loss, judgement(each, row), each.other)
            grouped.setdefault(key, []).append(f"{row.metric} ({place})")
    for (loss, word, other), places in grouped.items():
        shown = places if len(places) <= 4 else [*places[:3], f"{len(places) - 3} more"]
        found.append(f"Unlike above, {loss} is {word} than {other} by {listed(shown)}.")
    return found


def _followers(verdict: Verdict) -> list[str]:
    """Losses that do not follow the metric."""
    astray = [
        f"{loss} ({each.mean:.2f})"
        for loss, each in verdict.agreement.items()
        if each.mean < FEW_AGREE
    ]
    if not astray:
        return []
    return [
        f"During training {listed(astray)} did not fall as the Dice rose (rank correlation), so "
        "that its value says little of how good the network is."
    ]
