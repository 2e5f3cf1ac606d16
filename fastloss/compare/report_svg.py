"""A comparison of losses as one picture, for a document or a talk."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from fastloss.compare.records import Study
from fastloss.compare.report_plots import (
    PLOT_STYLE,
    WIDTH,
    colour_of,
    interval_plot,
    learning_curves,
)
from fastloss.compare.report_words import size_of
from fastloss.compare.verdict import Verdict, judge

LINE = 20
"""Between lines of the names of the losses."""
TITLE = 22
"""Above each plot."""
_SIZE = re.compile(r'viewBox="0 0 (\d+) ([\d.]+)"')
_STYLE = (
    "svg { --ink: #1b1f24; --soft: #59636e; --paper: #fff; --line: #d8dee4;"
    ' font: 12px system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }\n'
    "text { fill: var(--soft); } .head { fill: var(--ink); font-size: 14px; font-weight: bold; }\n"
    ".grid { stroke: var(--line); }"
)


def svg(study: Study, verdict: Verdict | None = None) -> str:
    """Learning curves, and the first metric with its intervals, by class and size of lesion.

    Args:
        study: what was measured.
        verdict: `judge(study)`, where it is known already.

    Returns:
        A file of its own: it loads nothing, and has the colours of white paper.
    """
    verdict = verdict or judge(study)
    plots = []
    if study.curves:
        title = "Training: lines are means over trainings, bands from the least to the largest"
        plots.append((title, learning_curves(study.curves, study.losses)))
    if verdict.main is not None:
        metric = verdict.main.metric
        rows = [row for row in verdict.rows if row.metric == metric]
        title = (
            f"{metric} with 95 % intervals; filled at the right: a difference that the data show, "
            "empty: a tie"
        )
        plots.append((title, interval_plot(rows, study.losses)))
    names, y = _names(study.losses, study.reference)
    parts = [
        f'<text class="head" x="10" y="22">{escape(study.name)}: {escape(size_of(study))}</text>',
        *names,
    ]
    for title, plot in plots:
        size = _SIZE.search(plot)
        assert size is not None
        height = float(size[2])
        parts.append(f'<text class="head" x="10" y="{y + 16:g}">{escape(title)}</text>')
        place = f'<svg x="0" y="{y + TITLE:g}" width="{WIDTH}" height="{height:g}" '
        parts.append(plot.replace("<svg ", place, 1))
        y += TITLE + height + 10
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y:g}" width="{WIDTH}" '
        f'height="{y:g}">\n<style>{_STYLE}{PLOT_STYLE}</style>\n'
        f'<rect width="{WIDTH}" height="{y:g}" fill="#fff"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _names(losses: Sequence[str], reference: str) -> tuple[list[str], float]:
    """The names of the losses beside their colours, and where the last line of them ends."""
    stroke = colour_of(losses)
    parts, x, y = [], 10, 42
    for loss in losses:
        name = loss + " (reference)" * (loss == reference)
        width = 31 + 7 * len(name) + 24
        if x > 10 and x + width > WIDTH:
            x, y = 10, y + LINE
        parts.append(
            f'<path class="line" {stroke(loss)} d="M{x} {y}h25"/>'
            f'<text x="{x + 31}" y="{y + 4}">{escape(name)}</text>'
        )
        x += width
    return parts, float(y + LINE)
