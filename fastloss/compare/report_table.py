"""A comparison of losses as text for the screen."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from fastloss.compare.records import Study
from fastloss.compare.report_words import (
    cost_of,
    digits,
    interval,
    judgement,
    mean_interval,
    number,
    paragraph,
    probability,
    rank,
    size_of,
)
from fastloss.compare.verdict import Row, Standing, Verdict, judge

WIDTH = 100
MARKS = {"better": "+", "worse": "-", "tie": "=", "reference": " ", "": " "}

LEGEND = (
    "rank: between which the loss may be; seeds ±: standard deviation between seeds; difference: "
    "from the reference; p: of it, over cases and trainings, after Holm's correction; Wilcoxon: "
    "the signed rank test over cases, for these trainings as they are; d_z: Cohen's effect size."
)


def table(study: Study, verdict: Verdict | None = None) -> str:
    """The report as text: which loss is better, by how much, at what cost, or that it is open.

    Args:
        study: what was measured.
        verdict: `judge(study)`, where it is known already.

    >>> from fastloss.compare.records import Score, Study
    >>> values = {"dice_ce": (0.80, 0.90, 0.70), "ce": (0.60, 0.71, 0.52)}
    >>> scores = [
    ...     Score(loss, seed, 0, f"case {i}", "dice", "liver", value + 0.01 * seed)
    ...     for loss, found in values.items()
    ...     for i, value in enumerate(found)
    ...     for seed in (0, 1)
    ... ]
    >>> text = table(Study("three livers", "dice_ce", ["dice_ce", "ce"], scores=scores))
    >>> print(text.splitlines()[-2])
    ce is worse than dice_ce: its dice is 0.190 lower (95 % interval 0.165 to 0.215, p <0.001 after
    """
    verdict = verdict or judge(study)
    blocks = [f"{study.name}: {size_of(study)}; compared with {study.reference}"]
    means = [row for row in verdict.rows if not row.label]
    # A study of one class has no mean over classes.
    ranked = means or verdict.rows[:1]
    blocks += [_ranking(row) for row in ranked]
    if any(row.comparisons for row in ranked):
        blocks.append(_wrapped(LEGEND))
    rest = [row for row in verdict.rows if row.label]
    if means or len(rest) > 1:
        blocks.append(_by_class(rest, study))
    blocks.append(_cost(study, verdict))
    if verdict.notes:
        blocks.append("Notes\n" + "\n".join(_wrapped(f"- {note}", 2) for note in verdict.notes))
    blocks.append("Verdict\n" + _wrapped(paragraph(study, verdict)))
    return "\n\n".join(filter(None, blocks))


def _ranking(row: Row) -> str:
    decimals = digits(row)
    better = f"; {row.better} is better" if row.better else ""
    header = ["rank", "loss", "mean", "95 % interval", "seeds ±", "difference", "95 % interval",
              "p", "Wilcoxon", "d_z", ""]  # fmt: skip
    lines = [_standing(each, row, decimals) for each in row.standings]
    return f"{row.title}{better}\n" + _columns([header, *lines], left=(1, 10))


def _standing(each: Standing, row: Row, decimals: int) -> list[str]:
    cells = [
        rank(each, row),
        each.loss,
        number(each.estimate.mean, decimals),
        mean_interval(each, row, decimals),
        number(each.spread, decimals + 1),
    ]
    found = each.comparison
    if found is None:
        return [*cells, "", "", "", "", "", judgement(found, row) * (each.loss == row.reference)]
    word = judgement(found, row)
    return [
        *cells,
        number(found.difference.mean, decimals, sign=True),
        interval(found.difference, decimals),
        probability(found.p_holm),
        probability(found.signed_holm),
        number(found.effect, 2, sign=True),
        "not distinguishable" if word == "tie" else word,
    ]


def _by_class(rows: Sequence[Row], study: Study) -> str:
    """A line for each metric and class, a column for each loss."""
    losses = [loss for loss in study.losses if any(_has(row, loss) for row in rows)]
    lines = [["", *losses]]
    for row in rows:
        cells = [", ".join(filter(None, (row.metric, row.label, row.size)))]
        for loss in losses:
            if _has(row, loss):
                each = row[loss]
                mark = MARKS[judgement(each.comparison, row)]
                cells.append(f"{number(each.estimate.mean, digits(row))} {mark}")
            else:
                cells.append("–  ")
        lines.append(cells)
    title = f"By class: + better, - worse, = not distinguishable from {study.reference}"
    return f"{title}\n" + _columns(lines, left=(0,))


def _has(row: Row, loss: str) -> bool:
    return any(each.loss == loss for each in row.standings)


def _cost(study: Study, verdict: Verdict) -> str:
    agreement = verdict.agreement
    if not study.costs and not agreement:
        return ""
    header = ["", "loss, ms", "step, ms", "memory, MiB", "agrees with Dice"]
    lines = []
    for loss in study.losses:
        cost = cost_of(study, loss)
        cells = [loss]
        cells += (
            [f"{cost.loss_ms:.3g}", f"{cost.step_ms:.3g}", f"{cost.peak_bytes / 2**20:.3g}"]
            if cost
            else ["–"] * 3
        )
        lines.append([*cells, number(agreement[loss].mean, 2) if loss in agreement else "–"])
    title = "Cost of a batch, and whether Dice rises as the loss falls (rank correlation)"
    return f"{title}\n" + _columns([header, *lines], left=(0,))


def _columns(rows: Sequence[Sequence[str]], left: Sequence[int]) -> str:
    """Cells below each other, those of the columns ``left`` from the left."""
    kept = [i for i in range(len(rows[0])) if any(row[i] for row in rows[1:])]
    widths = {i: max(len(row[i]) for row in rows) for i in kept}
    return "\n".join(
        "  ".join(
            f"{row[i]:<{widths[i]}}" if i in left else f"{row[i]:>{widths[i]}}" for i in kept
        ).rstrip()
        for row in rows
    )


def _wrapped(text: str, indent: int = 0) -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent=" " * indent, break_long_words=False)
