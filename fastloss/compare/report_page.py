"""A comparison of losses as a page that stands alone."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import isnan
from typing import Any

import numpy as np

from fastloss.compare.records import Study
from fastloss.compare.report_plots import (
    PLOT_STYLE,
    cost_plot,
    interval_plot,
    learning_curves,
    legend,
    size_plot,
)
from fastloss.compare.report_table import LEGEND
from fastloss.compare.report_words import (
    cost_of,
    digits,
    interval,
    judgement,
    listed,
    mean_interval,
    number,
    paragraph,
    probability,
    rank,
    size_of,
)
from fastloss.compare.verdict import LESION_DICE, Row, Verdict, judge, size_bins
from fastloss.evaluation.html import document, html_table
from fastloss.evaluation.png import data_uri

MOST_ROWS = 300
"""Of the table of all comparisons; more are left to JSON."""


def page(study: Study, verdict: Verdict | None = None) -> str:
    """The report as HTML, with pictures and plots in it and no script.

    Args:
        study: what was measured.
        verdict: `judge(study)`, where it is known already.
    """
    verdict = verdict or judge(study)
    sections = [
        f"<h1>{escape(study.name)}</h1>",
        f"<p>{escape(size_of(study))}; {escape(listed(study.losses))}, compared with "
        f"<b>{escape(study.reference)}</b></p>",
        f'<section class="verdict"><h2>Verdict</h2><p>{_minus(paragraph(study, verdict))}</p>'
        "</section>",
        _notes(verdict),
        _rankings(verdict),
        _intervals(study, verdict),
        _curves(study, verdict),
        *_sizes(study),
        _cost(study),
        _pictures(study),
        _comparisons(verdict),
        _options(study),
    ]
    return document(study.name, filter(None, sections), style=STYLE)


def _minus(text: str) -> str:
    """Escaped, with real minus signs before digits."""
    words = escape(text).split(" ")
    return " ".join(
        word.replace("-", "−", 1)
        if word.lstrip("[(").startswith("-") and word[-1:] != "-"
        else word
        for word in words
    )


def _notes(verdict: Verdict) -> str:
    if not verdict.notes:
        return ""
    items = "".join(f"<li>{escape(note)}</li>" for note in verdict.notes)
    return f'<section class="problems"><h2>Notes</h2><ul>{items}</ul></section>'


def _rankings(verdict: Verdict) -> str:
    rows = [row for row in verdict.rows if not row.label] or list(verdict.rows[:1])
    if not rows:
        return ""
    tables = []
    for row in rows:
        header = ["rank", "loss", "mean", "± of seeds", "difference", "p", "Wilcoxon p", "d_z", ""]
        lines = []
        for each in row.standings:
            decimals, found = digits(row), each.comparison
            cells = [
                rank(each, row),
                escape(each.loss),
                f"{number(each.estimate.mean, decimals)}"
                f"<small>{_minus(mean_interval(each, row, decimals))}</small>",
                number(each.spread, decimals + 1),
            ]
            if found is None:
                word = judgement(None, row) if each.loss == row.reference else ""
                lines.append(
                    [*cells, "", "", "", "", f'<span class="reference-loss">{word}</span>']
                )
                continue
            lines.append(
                [
                    *cells,
                    f"{_minus(number(found.difference.mean, decimals, sign=True))}"
                    f"<small>{_minus(interval(found.difference, decimals))}</small>",
                    escape(probability(found.p_holm)),
                    escape(probability(found.signed_holm)),
                    _minus(number(found.effect, 2, sign=True)),
                    _badge(judgement(found, row)),
                ]
            )
        better = f"; {row.better} is better" if row.better else ""
        tables.append(
            f"<h3>{escape(row.title)}{better}</h3>"
            f'<div class="ranking">{html_table(header, lines)}</div>'
        )
    return "<h2>Ranking</h2>" + "".join(tables) + f"<p><small>{escape(LEGEND)}</small></p>"


def _badge(word: str) -> str:
    shown = "not distinguishable" if word == "tie" else word
    return f'<span class="{word}">{shown}</span>' if word else ""


def _intervals(study: Study, verdict: Verdict) -> str:
    metrics = list(dict.fromkeys(row.metric for row in verdict.rows))
    if not metrics:
        return ""
    parts = [
        "<h2>Intervals</h2>",
        "<p>Means and, at the right, differences from the reference, each with its 95 % interval "
        "over cases and trainings. A filled dot at the right is a difference that the data show "
        "after Holm's correction, an empty one is a tie.</p>",
        legend(study.losses, study.reference),
    ]
    for metric in metrics:
        rows = [row for row in verdict.rows if row.metric == metric]
        better = f", {rows[0].better} is better" if rows[0].better else ""
        parts.append(
            f"<figure><figcaption><b>{escape(metric)}</b>{better}</figcaption>"
            f"{interval_plot(rows, study.losses)}</figure>"
        )
    return "\n".join(parts)


def _curves(study: Study, verdict: Verdict) -> str:
    if not study.curves:
        return ""
    agreement = "; ".join(
        f"{escape(loss)} {number(each.mean, 2)}"
        for loss, each in verdict.agreement.items()
        if not isnan(each.mean)
    )
    text = (
        f"<p>Rank correlation of the falling loss and the Dice over a training, 1 where they "
        f"always go together: {_minus(agreement)}.</p>"
        if agreement
        else ""
    )
    return (
        "<h2>Training</h2><p>Lines are means over trainings, bands reach from the least to the "
        "largest. Values of different losses cannot be compared, so that each is drawn "
        f"from 0, its least, to 1, its first.</p>{legend(study.losses, study.reference)}"
        f"<figure>{learning_curves(study.curves, study.losses)}</figure>{text}"
    )


def _sizes(study: Study) -> list[str]:
    """Dice against size: of lesions, or of classes where lesions were not measured."""
    found: dict[str, dict[tuple[str, str, float], list[float]]] = {}
    if study.lesions:
        of, label = LESION_DICE, "lesion size, mm³"
        for lesion in study.lesions:
            key = (lesion.label, lesion.case, lesion.size)
            found.setdefault(lesion.loss, {}).setdefault(key, []).append(lesion.dice)
    else:
        of, label = "dice", "size of the class in a case, mm³"
        for score in study.scores:
            if score.metric == "dice" and score.size > 0 and not isnan(score.value):
                key = (score.label, score.case, score.size)
                found.setdefault(score.loss, {}).setdefault(key, []).append(score.value)
    parts = []
    for name in dict.fromkeys(key[0] for each in found.values() for key in each):
        values = {
            loss: [
                (size, float(np.mean(dice)))
                for (own, _, size), dice in each.items()
                if own == name and size > 0
            ]
            for loss, each in found.items()
        }
        sizes = {size for each in values.values() for size, _ in each}
        if len(sizes) < 3:
            continue
        bins = size_bins([size for each in list(values.values())[:1] for size, _ in each])
        bounds = [each.low for each in bins[1:]] if study.lesions else []
        plot = size_plot(values, study.losses, label, bounds)
        parts.append(
            f"<figure><figcaption><b>{escape(of)}</b>, {escape(name)}</figcaption>{plot}</figure>"
        )
    if not parts:
        return []
    lines = " Dashed lines part small, medium and large." if study.lesions else ""
    return [
        "<h2>Dice against size</h2><p>A point is the mean over the trainings of a loss; lines are "
        f"means of as many points each.{lines}</p>",
        legend(study.losses, study.reference),
        *parts,
    ]


def _cost(study: Study) -> str:
    costs = [cost for loss in study.losses if (cost := cost_of(study, loss))]
    if not costs:
        return ""
    steps = "; ".join(
        f"{escape(each.loss)} {each.step_ms:.3g} ms, of which the loss takes "
        f"{100 * each.loss_ms / each.step_ms:.2g} %"
        for each in costs
        if each.step_ms > 0
    )
    return (
        f"<h2>Cost</h2><figure>{cost_plot(costs, study.losses)}</figure>"
        f"<p>A whole step of the training: {steps}.</p>"
    )


def _pictures(study: Study) -> str:
    if not study.pictures:
        return ""
    parts = ["<h2>Pictures</h2>"]
    for case in dict.fromkeys(each.case for each in study.pictures):
        shown = [each for each in study.pictures if each.case == case]
        shown.sort(key=lambda each: study.losses.index(each.loss))
        figures = "".join(
            f'<figure><img src="{data_uri(each.image)}" width="{each.image.shape[1]}" '
            f'height="{each.image.shape[0]}" alt="{escape(case)}, {escape(each.loss)}">'
            f"<figcaption><b>{escape(each.loss)}</b><br>{escape(each.caption)}</figcaption></figure>"
            for each in shown
        )
        parts.append(
            f'<section class="case"><h3>{escape(case)}</h3><div class="slices">{figures}</div>'
            "</section>"
        )
    return "\n".join(parts)


def _comparisons(verdict: Verdict) -> str:
    lines = []
    for row in verdict.rows:
        for each in row.comparisons:
            lines.append(_comparison(row, each))
    if not lines:
        return ""
    if len(lines) > MOST_ROWS:
        return f"<p>The {len(lines)} single comparisons are left to the JSON.</p>"
    header = ["", "loss", "difference", "bootstrap", "p", "p, Holm", "Wilcoxon p", "p, Holm",
              "rank-biserial", "d_z", "cases", "trainings", ""]  # fmt: skip
    return (
        f"<details><summary>All {len(lines)} comparisons</summary><p>Bootstrap: percentiles of "
        "means of cases and trainings drawn again. With few trainings it is too narrow, and does "
        "not decide.</p>" + html_table(header, lines) + "</details>"
    )


def _comparison(row: Row, each: Any) -> Sequence[str]:
    decimals = digits(row)
    low, high = each.resampled
    resampled = (
        ""
        if isnan(low)
        else f"[{number(low, decimals, sign=True)}, {number(high, decimals, sign=True)}]"
    )
    return [
        escape(row.title),
        escape(each.loss),
        f"{_minus(number(each.difference.mean, decimals, sign=True))} "
        f"{_minus(interval(each.difference, decimals))}",
        _minus(resampled),
        *map(escape, map(probability, (each.p, each.p_holm, each.signed.p, each.signed_holm))),
        _minus(number(each.signed.biserial, 2, sign=True)),
        _minus(number(each.effect, 2, sign=True)),
        str(each.difference.cases),
        str(each.difference.runs),
        _badge(judgement(each, row)),
    ]


def _options(study: Study) -> str:
    if not study.options:
        return ""
    items = "".join(
        f"<dt>{escape(str(name))}</dt><dd>{escape(_shown(value))}</dd>"
        for name, value in study.options.items()
        if value is not None
    )
    return f"<h2>Settings</h2><dl>{items}</dl>"


def _shown(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return "; ".join(f"{key} {_shown(each)}" for key, each in value.items())
    return str(value)


STYLE = (
    PLOT_STYLE
    + """
.verdict { border: 1px solid var(--line); border-left: 5px solid var(--box); border-radius: 4px;
  padding: .2rem 1.2rem .4rem; background: var(--fill); }
.verdict h2 { margin-top: .6rem; }
.plot { max-width: 1000px; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.4rem; }
.key { display: inline-flex; align-items: center; gap: .5em; }
.better, .worse, .tie { padding: 0 .5em; border-radius: 3px; }
.better { background: #009e7333; } .worse { background: #d55e0033; } .tie { color: var(--soft); }
.ranking :is(th, td):is(:nth-child(2), :last-child) { text-align: left; }
.reference-loss { padding: 0 .5em; }
.case .slices { align-items: flex-start; } .case .slices figure { max-width: 490px; }
"""
)
