"""Plots of a comparison as SVG, drawn by hand: curves, intervals, sizes and costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from math import ceil, floor, isfinite, isnan, log10
from typing import NamedTuple

import numpy as np

from fastloss.compare.records import Cost, CurvePoint
from fastloss.compare.report_words import (
    digits,
    interval,
    judgement,
    limits,
    mean_interval,
    number,
    probability,
)
from fastloss.compare.statistics import Estimate
from fastloss.compare.verdict import LEVEL, Row
from fastloss.evaluation.plots import ticks_of

WIDTH = 960
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#7f7f7f", "#8c564b")
"""Told apart by people who see no red or no green, too (after Okabe & Ito 2008)."""
DASHES = ("", "7 3", "2 3", "8 3 2 3")
"""From the ninth loss on, colours come again, and these tell them apart."""
MOST_DOTS = 4000
PLOT_STYLE = """
.plot .axis { fill: var(--ink); font-size: 12.5px; }
.line { stroke: var(--of); fill: none; stroke-width: 2; }
.band { fill: var(--of); fill-opacity: .13; stroke: none; }
.dot { fill: var(--of); } .ring { fill: var(--paper); stroke: var(--of); stroke-width: 1.8; }
.speck { fill: var(--of); fill-opacity: .32; } .bar { fill: var(--of); fill-opacity: .8; }
.zero { stroke: var(--ink); } .bound { stroke: var(--soft); stroke-dasharray: 4 4; }
"""
"""The style of all plots, in the colours of a page: --ink, --soft, --paper, --line."""


class Place(NamedTuple):
    """An axis: which pixels its numbers go to."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]
    logarithmic: bool = False

    def __call__(self, value: float) -> str:
        low, high = self.low, self.high
        if self.logarithmic:
            low, high, value = log10(low), log10(high), log10(value)
        value = min(max(value, low), high)
        return f"{self.start + (self.end - self.start) * (value - low) / (high - low):.1f}"


def axis_of(low: float, high: float, start: float, end: float, about: int = 6) -> Place:
    """From a round number to another."""
    ticks = ticks_of(low, high, about)
    return Place(ticks[0], ticks[-1], start, end, tuple(ticks))


def log_axis(low: float, high: float, start: float, end: float) -> Place:
    """From 1, 2 or 5 times a power of 10 to another."""
    powers = range(floor(log10(low)) - 1, ceil(log10(high)) + 2)
    steps = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
    first = max(step for step in steps if step <= low)
    last = min(step for step in steps if step >= high and step > first)
    ticks = tuple(step for step in steps if first <= step <= last)
    if len(ticks) > 8:
        ticks = tuple(tick for tick in ticks if log10(tick) == round(log10(tick)))
    return Place(first, last, start, end, ticks, True)


def colour_of(losses: Sequence[str]) -> Callable[[str], str]:
    """The attributes of a stroke in the colour of a loss."""

    def stroke(loss: str) -> str:
        i = losses.index(loss)
        dash = DASHES[i // len(COLOURS) % len(DASHES)]
        return f'style="--of: {COLOURS[i % len(COLOURS)]}"' + (
            f' stroke-dasharray="{dash}"' if dash else ""
        )

    return stroke


def legend(losses: Sequence[str], reference: str, shown: Sequence[str] | None = None) -> str:
    """Names beside their colours, as HTML."""
    stroke = colour_of(losses)
    items = "".join(
        f'<span class="key"><svg viewBox="0 0 26 10" width="26" height="10" aria-hidden="true">'
        f'<path class="line" {stroke(loss)} d="M1 5H25"/></svg>{escape(loss)}'
        + (" (reference)" if loss == reference else "")
        + "</span>"
        for loss in losses
        if shown is None or loss in shown
    )
    return f'<p class="legend">{items}</p>'


def _svg(title: str, height: float, parts: Sequence[str], width: int = WIDTH) -> str:
    return (
        f'<svg class="plot" viewBox="0 0 {width} {height:g}" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg>'
    )


def _text(x: float | str, y: float | str, text: str, anchor: str = "middle", kind: str = "") -> str:
    named = f' class="{kind}"' if kind else ""
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}"{named}>{escape(text)}</text>'


def _upright(x: Place, top: float, bottom: float, label: str, form: str = "g") -> list[str]:
    """Lines of an axis that runs along the bottom."""
    parts = []
    for tick in x.ticks:
        parts.append(f'<path class="grid" d="M{x(tick)} {top}V{bottom}"/>')
        parts.append(_text(x(tick), f"{bottom + 16}", f"{tick:{form}}".replace("-", "−")))
    return [*parts, _text((x.start + x.end) / 2, bottom + 34, label, kind="axis")]


def _level(y: Place, left: float, right: float, label: str) -> list[str]:
    """Lines of an axis that runs along the left."""
    parts = []
    for tick in y.ticks:
        parts.append(f'<path class="grid" d="M{left} {y(tick)}H{right}"/>')
        parts.append(
            _text(left - 8, f"{float(y(tick)) + 4:.1f}", f"{tick:g}".replace("-", "−"), "end")
        )
    middle, aside = (y.start + y.end) / 2, left - 44
    return [
        *parts,
        f'<text class="axis" text-anchor="middle" x="{aside}" y="{middle}" '
        f'transform="rotate(-90 {aside} {middle})">{escape(label)}</text>',
    ]


# ---------------------------------------------------------------------- intervals


def interval_plot(rows: Sequence[Row], losses: Sequence[str]) -> str:
    """Means with their intervals, and differences from the reference with theirs.

    Args:
        rows: of one metric, a group of lines each.
        losses: all names, for their colours.
    """
    stroke = colour_of(losses)
    longest = max(len(row.label or "mean of classes") for row in rows)
    longest = max([longest, *(len(row.size) for row in rows)])
    left, gap, right, line, pad = 24 + 6.6 * min(longest, 30), 50, 20, 17, 14
    span = (WIDTH - left - gap - right) / 2
    means = [each.estimate for row in rows for each in row.standings]
    differences = [each.difference for row in rows for each in row.comparisons]
    low, high = _reach(means)
    least, most = min(limits(row)[0] for row in rows), max(limits(row)[1] for row in rows)
    x = axis_of(max(low, least), min(high, most), left, left + span, 5)
    far = max(map(abs, _reach(differences))) if differences else 1.0
    away = axis_of(-far, far, left + span + gap, WIDTH - right, 5)
    height = sum(line * len(row.standings) + pad for row in rows)
    top = 24
    bottom = top + height
    zero = away(0.0)
    reference = rows[0].reference
    parts = [
        _text((x.start + x.end) / 2, 14, "mean", kind="axis"),
        _text((away.start + away.end) / 2, 14, f"difference from {reference}", kind="axis"),
        *_upright(x, top, bottom, ""),
        *_upright(away, top, bottom, _ends(rows[0])),
        f'<path class="zero" d="M{zero} {top}V{bottom}"/>',
    ]
    y = float(top)
    for row in rows:
        middle = y + (line * len(row.standings) + pad) / 2
        names = [name for name in (row.label or "mean of classes", row.size) if name]
        for i, name in enumerate(names):
            parts.append(_text(left - 10, middle + 4 + 14 * (i - (len(names) - 1) / 2),
                               name if len(name) <= 30 else name[:29] + "…", "end"))  # fmt: skip
        at = y + pad / 2 + line / 2
        for each in sorted(row.standings, key=lambda each: losses.index(each.loss)):
            decimals = digits(row)
            words = (
                f"{each.loss}: {number(each.estimate.mean, decimals)} "
                f"{mean_interval(each, row, decimals)}"
            )
            parts += _interval(each.estimate, x, at, stroke(each.loss), words, True)
            found = each.comparison
            if found is not None:
                words = (
                    f"{each.loss}: {number(found.difference.mean, decimals, sign=True)} "
                    f"{interval(found.difference, decimals)}, "
                    f"p {probability(found.p_holm)}, {judgement(found, row)}"
                )
                parts += _interval(
                    found.difference, away, at, stroke(each.loss), words, bool(found.sign)
                )
            at += line
        y += line * len(row.standings) + pad
        if row is not rows[-1]:
            parts.append(f'<path class="grid" d="M10 {y}H{WIDTH - right}"/>')
    return _svg(f"intervals of {rows[0].metric}", bottom + 44, parts)


def _ends(row: Row) -> str:
    if not row.better:
        return ""
    return "worse ← → better" if row.better == "higher" else "better ← → worse"


def _reach(estimates: Sequence[Estimate]) -> tuple[float, float]:
    """From the least to the largest end; of very wide intervals not all, for the others' sake."""
    means = np.array([each.mean for each in estimates])
    ends = np.array([each.interval(LEVEL) for each in estimates])
    known = np.isfinite(ends).all(axis=1)
    low, high = float(means.min()), float(means.max())
    if known.any():
        widths = (ends[known, 1] - ends[known, 0]) / 2
        most = 3 * float(np.median(widths))
        low = min(low, float(np.maximum(ends[known, 0], means[known] - most).min()))
        high = max(high, float(np.minimum(ends[known, 1], means[known] + most).max()))
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _interval(
    found: Estimate, x: Place, y: float, stroke: str, words: str, filled: bool
) -> list[str]:
    low, high = found.interval(LEVEL)
    parts = [f"<g><title>{escape(words)}</title>"]
    if isfinite(low):
        parts.append(f'<path class="line" {stroke} d="M{x(low)} {y}H{x(high)}"/>')
    shape = f'cx="{x(found.mean)}" cy="{y}" r="4.2"'
    kind = "dot" if filled else "ring"
    return [*parts, f'<circle class="{kind}" {stroke} {shape}/></g>']


# ---------------------------------------------------------------------- learning curves


def learning_curves(points: Sequence[CurvePoint], losses: Sequence[str]) -> str:
    """The metric, and the training losses each on a scale of its own, with bands over runs."""
    stroke = colour_of(losses)
    shown = [loss for loss in losses if any(point.loss == loss for point in points)]
    top, bottom, left, gap, right = 14, 284, 66, 84, 16
    span = (WIDTH - left - gap - right) / 2
    last = max(point.step for point in points)
    metric = {loss: _series(points, loss, False) for loss in shown}
    training = {loss: _scaled(_series(points, loss, True)) for loss in shown}
    parts = []
    known = [series for series in metric.values() if len(series)]
    if known:
        x = axis_of(0, last, left, left + span, 5)
        low, high = (float(f(np.concatenate(known)[:, i])) for f, i in ((np.min, 2), (np.max, 3)))
        y = axis_of(min(low, high), high, bottom, top, 6)
        parts += [*_upright(x, top, bottom, "step"), *_level(y, left, left + span, "held-out Dice")]
        for loss in shown:
            parts += _band(metric[loss], x, y, stroke(loss), loss)
    x = axis_of(0, last, left + span + gap, WIDTH - right, 5)
    y = axis_of(0, 1, bottom, top, 5)
    label = "training loss, scaled"
    parts += [
        *_upright(x, top, bottom, "step"),
        *_level(y, left + span + gap, WIDTH - right, label),
    ]
    for loss in shown:
        parts += _band(training[loss], x, y, stroke(loss), loss)
    return _svg("learning curves", bottom + 44, parts)


def _series(points: Sequence[CurvePoint], loss: str, training: bool) -> np.ndarray:
    """Rows of step, mean, least and largest over runs; losses are means of up to 40 parts."""
    runs: dict[tuple[int, int], list[tuple[int, float]]] = {}
    for point in points:
        value = point.loss_value if training else point.metric
        if point.loss == loss and isfinite(value):
            runs.setdefault((point.seed, point.fold), []).append((point.step, value))
    if not runs:
        return np.empty((0, 4))
    last = max(step for run in runs.values() for step, _ in run)
    by_step: dict[float, list[float]] = {}
    for run in runs.values():
        parts: dict[float, list[float]] = {}
        for step, value in run:
            part = ceil(40 * step / last) * last / 40 if training and last > 40 else float(step)
            parts.setdefault(part, []).append(value)
        for part, values in parts.items():
            by_step.setdefault(part, []).append(float(np.mean(values)))
    return np.array(
        [(step, np.mean(each), min(each), max(each)) for step, each in sorted(by_step.items())]
    )


def _scaled(series: np.ndarray) -> np.ndarray:
    """From 0, the least mean, to 1, the first."""
    if len(series):
        low, first = series[:, 1].min(), series[0, 1]
        series[:, 1:] = (series[:, 1:] - low) / ((first - low) or 1.0)
    return series


def _band(series: np.ndarray, x: Place, y: Place, stroke: str, loss: str) -> list[str]:
    if not len(series):
        return []
    upper = [f"{x(row[0])} {y(row[3])}" for row in series]
    lower = [f"{x(row[0])} {y(row[2])}" for row in series[::-1]]
    line = "L".join(f"{x(row[0])} {y(row[1])}" for row in series)
    band = f'<path class="band" {stroke} d="M{"L".join(upper + lower)}Z"/>'
    return [band, f'<path class="line" {stroke} d="M{line}"><title>{escape(loss)}</title></path>']


# ---------------------------------------------------------------------- sizes


def size_plot(
    values: Mapping[str, Sequence[tuple[float, float]]],
    losses: Sequence[str],
    label: str,
    bounds: Sequence[float] = (),
) -> str:
    """Dice against size on a logarithmic axis: points, and lines of their means.

    Args:
        values: by loss, (size in mm³, Dice).
        losses: all names, for their colours.
        label: of the axis of sizes.
        bounds: sizes that part small, medium and large.
    """
    stroke = colour_of(losses)
    top, bottom, left, right = 14, 304, 66, 40
    sizes = np.array([size for each in values.values() for size, _ in each])
    x = log_axis(float(sizes.min()), float(sizes.max()), left, WIDTH - right)
    y = axis_of(0, 1, bottom, top, 5)
    parts = [*_upright(x, top, bottom, label, ",.12g"), *_level(y, left, WIDTH - right, "Dice")]
    parts += [f'<path class="bound" d="M{x(size)} {top}V{bottom}"/>' for size in bounds]
    few = max(1, ceil(len(sizes) / MOST_DOTS))
    for loss in [loss for loss in losses if values.get(loss)]:
        of = stroke(loss)
        pairs = np.array(sorted(values[loss]))
        parts += [
            f'<circle class="speck" {of} cx="{x(size)}" cy="{y(dice)}" r="2.4"/>'
            for size, dice in pairs[::few]
        ]
        # Means of as many lesions each.
        groups = np.array_split(pairs, max(1, min(8, len(pairs) // 4)))
        line = "L".join(
            f"{x(float(np.exp(np.log(each[:, 0]).mean())))} {y(float(each[:, 1].mean()))}"
            for each in groups
        )
        parts.append(f'<path class="line" {of} d="M{line}"><title>{escape(loss)}</title></path>')
    return _svg(f"Dice against {label}", bottom + 44, parts)


# ---------------------------------------------------------------------- cost


def cost_plot(costs: Sequence[Cost], losses: Sequence[str]) -> str:
    """Bars of time and of memory."""
    stroke = colour_of(losses)
    line, top = 26, 24
    left, gap, right = 24 + 6.6 * min(30, max(len(each.loss) for each in costs)), 70, 60
    span = (WIDTH - left - gap - right) / 2
    bottom = top + line * len(costs)
    parts = []
    start = left
    for title, values, unit in (
        ("loss, forward and backward", [each.loss_ms for each in costs], "ms"),
        ("memory beside the logits", [each.peak_bytes / 2**20 for each in costs], "MiB"),
    ):
        x = axis_of(0, max([0, *(value for value in values if not isnan(value))]) or 1,
                    start, start + span, 4)  # fmt: skip
        parts.append(_text(start + span / 2, 14, title, kind="axis"))
        parts += _upright(x, top, bottom, unit)
        for k, (each, value) in enumerate(zip(costs, values, strict=True)):
            y = top + line * k + line / 2
            if start == left:
                name = each.loss if len(each.loss) <= 30 else each.loss[:29] + "…"
                parts.append(_text(left - 10, y + 4, name, "end"))
            if not isnan(value):
                width = float(x(value)) - start
                parts.append(f'<rect class="bar" {stroke(each.loss)} x="{start:.1f}" y="{y - 7}" '
                             f'width="{max(width, 1):.1f}" height="14"/>')  # fmt: skip
                parts.append(_text(f"{start + width + 6:.1f}", y + 4, f"{value:.3g}", "start"))
        start += span + gap
    return _svg("cost of the losses", bottom + 44, parts)
