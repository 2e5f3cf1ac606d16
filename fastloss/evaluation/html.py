"""The page of an evaluation: one file that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from math import isnan
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastloss.evaluation.files import Mismatch
from fastloss.evaluation.overlay import Picture, overlay
from fastloss.evaluation.plots import box_plots
from fastloss.evaluation.png import data_uri
from fastloss.evaluation.results import Results, Statistics, shown
from fastloss.metrics.evaluate import METRICS, PATTERNS
from fastloss.metrics.metric import Metric, find_metrics

MOST_ROWS = 3000
"""Above as many cases times classes, the page leaves the table of single values to the CSV."""
MILLIMETRES = ("distance", "Hausdorff")


def page(results: Results, *, images: Path | None = None, worst: int = 5) -> str:
    """The page as text.

    Args:
        results: what is shown.
        images: a folder of grey images, which the worst cases are shown on.
        worst: how many of them.
    """
    metrics = find_metrics(list(results.scores), METRICS, PATTERNS)
    title = f"{len(results.cases)} cases, {len(results.scores.classes)} classes"
    sections = [
        f"<h1>Evaluation: {title}</h1>",
        _header(results),
        _problems(results),
        "<h2>By class</h2>",
        _statistics(results),
        "<h2>Distributions</h2>",
        "<p>A point is a case; hover over one for its name. Boxes are quartiles, whiskers reach to "
        "the last value within 1.5 times the box.</p>",
        *(_plot(results, metric) for metric in metrics.values()),
        _worst(results, metrics, images, worst),
        _values(results),
    ]
    return document(title, sections)


def document(title: str, sections: Iterable[str], *, style: str = "") -> str:
    """A whole page that loads nothing.

    Args:
        title: as text.
        sections: as HTML.
        style: CSS beside the usual one.
    """
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title>'
        f"<style>{STYLE}{style}</style></head>\n<body><main>\n"
        + "\n".join(sections)
        + "\n</main></body></html>\n"
    )


def _header(results: Results) -> str:
    about = dict(results.about)
    spacings = np.array([(each + (np.nan,) * 3)[:3] for each in results.spacings])
    sizes = []
    for axis in range(max(map(len, results.spacings))):
        low, high = np.nanmin(spacings[:, axis]), np.nanmax(spacings[:, axis])
        sizes.append(f"{low:.4g}" if np.isclose(low, high) else f"{low:.4g} to {high:.4g}")
    tolerance = about.get("tolerance")
    if isinstance(tolerance, dict):
        tolerance = ", ".join(f"{name} {number:g} mm" for name, number in tolerance.items())
    elif tolerance is not None:
        tolerance = f"{tolerance:g} mm"
    united = [
        f"{name} = {', '.join(map(str, labels))}"
        for name, labels in results.labels.items()
        if name != ", ".join(map(str, labels))
    ]
    rows = {
        "Predictions": about.get("predictions"),
        "References": about.get("references"),
        "Surfaces": about.get("definition"),
        "Tolerance": tolerance,
        "Spacing, by the axes z, y, x": " × ".join(sizes) + " mm",
        "Labels": "; ".join(united) or None,
        "Ignored label": about.get("ignore_index"),
        "fastloss": about.get("fastloss"),
        "Date": about.get("date"),
        "Command": about.get("command"),
    }
    return facts(rows)


def facts(rows: Mapping[str, object]) -> str:
    """Names and values, of which None are left out."""
    items = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>"
        for name, value in rows.items()
        if value is not None
    )
    return f"<dl>{items}</dl>"


def _problems(results: Results) -> str:
    if not results.problems:
        return ""
    items = "".join(
        f"<li><b>{escape(name)}</b>: {escape(problem)}</li>" for name, problem in results.problems
    )
    return (
        f'<section class="problems"><h2>Not evaluated: {len(results.problems)}</h2>'
        f"<ul>{items}</ul></section>"
    )


def html_table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of HTML cells."""
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>\n" for row in rows)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="wide">{table}</div>'


def _statistics(results: Results) -> str:
    columns = [results.statistics(metric) for metric in results.scores]
    rows = [
        [escape(name), *(_cell(column[name]) for column in columns)]
        for name in results.scores.classes
    ]
    return (
        "<p>Mean ± standard deviation of the finite values; below, the median, which counts "
        "infinite values, and how many values there are.</p>"
        + html_table(["class", *map(escape, results.scores)], rows)
    )


def _cell(each: Statistics) -> str:
    counts = [f"n {each.n}"]
    counts += [f"{each.infinite} inf"] if each.infinite else []
    counts += [f"{each.missing} NaN"] if each.missing else []
    spread = "" if isnan(each.std) else f" ± {shown(each.std)}"
    return (
        f"{shown(each.mean)}{spread}<small>median {shown(each.median)}, {', '.join(counts)}</small>"
    )


def _plot(results: Results, metric: Metric) -> str:
    unit = "mm" if any(word in metric.summary for word in MILLIMETRES) else ""
    scores = results.scores
    better = f"; {metric.better} is better" if metric.better else ""
    figure = box_plots(
        f"box plots of {metric.name}", scores.classes, scores[metric.name], scores.samples, unit
    )
    return (
        f"<figure><figcaption><b>{escape(metric.name)}</b>: {escape(metric.summary)}{better}"
        f"</figcaption>{figure}</figure>"
    )


# ---------------------------------------------------------------------- worst cases


class Worst(NamedTuple):
    """A case and its worst class."""

    case: int
    label: int
    mean: float


def worst_cases(results: Results, metric: Metric, count: int) -> list[Worst]:
    """The cases with the worst mean over their classes, the worst first.

    NaN is left out; cases without any value are not ranked.
    """
    table = results.scores[metric.name]
    sign = 1 if metric.better == "higher" else -1
    found = []
    for i, row in enumerate(sign * table):
        known = np.flatnonzero(~np.isnan(row))
        if len(known):
            label = int(known[row[known].argmin()])
            found.append(Worst(i, label, float(sign * row[known].mean())))
    # Among cases that are equally bad, as with a class missed, the other metrics do not decide.
    return sorted(found, key=lambda each: sign * each.mean)[:count]


def _worst(results: Results, metrics: dict[str, Metric], images: Path | None, count: int) -> str:
    ranking = next((metric for metric in metrics.values() if metric.better), None)
    if ranking is None or count == 0:
        return ""
    parts = [
        "<h2>Worst cases</h2>",
        f"<p>By the mean {escape(ranking.name)} over the classes. Each is shown for its worst "
        "class, in slices through the wrong voxel that is farthest off: "
        '<span class="reference">reference</span> and '
        '<span class="prediction">prediction</span>. In axial and coronal '
        "slices left is the patient's right, in sagittal ones left is the front.</p>",
    ]
    for each in worst_cases(results, ranking, count):
        case, label = results.cases[each.case], results.scores.classes[each.label]
        value = float(results.scores[ranking.name][each.case, each.label])
        heading = (
            f"<h3>{escape(case.name)}</h3><p>mean {escape(ranking.name)} {shown(each.mean)}; "
            f"worst class {escape(label)}: {shown(value)}"
        )
        try:
            found = overlay(case, results.labels[label], images)
        except Mismatch as error:  # gone or changed since
            parts.append(f"{heading}</p><p>no picture: {escape(str(error))}</p>")
            continue
        parts.append(
            f'<section class="case">{heading}, {escape(found.caption)}</p>'
            f"{gallery(found.pictures, case.name)}</section>"
        )
    return "\n".join(parts)


def gallery(pictures: Iterable[Picture], name: str) -> str:
    """Pictures of something of this name, side by side."""
    figures = "".join(
        f'<figure><img src="{data_uri(picture.pixels)}" width="{picture.pixels.shape[1]}" '
        f'height="{picture.pixels.shape[0]}" alt="{escape(name)}, {picture.view}">'
        f"<figcaption>{picture.view}</figcaption></figure>"
        for picture in pictures
    )
    return f'<div class="slices">{figures}</div>'


def _values(results: Results) -> str:
    scores = results.scores
    count = len(scores.samples) * len(scores.classes)
    if count > MOST_ROWS:
        return f"<p>The {count} rows of single values are left to --csv.</p>"
    rows = [
        [
            escape(row["sample"]),
            escape(row["class"]),
            *(shown(row[name]) for name in scores),
        ]
        for row in scores.rows()
    ]
    table = html_table(["case", "class", *map(escape, scores)], rows)
    return f"<details><summary>All {count} values</summary>{table}</details>"


STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #59636e; --paper: #fff; --line: #d8dee4;
  --box: #0b7285; --fill: #0b728522; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --soft: #9aa4af; --paper: #14171a;
  --line: #343b42; --box: #4dc4d9; --fill: #4dc4d933; --bad: #ff8a80; } }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.45 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 1.5rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2rem; } h3 { margin-bottom: 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; }
dt, small, figcaption { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
.problems { border-left: 4px solid var(--bad); padding-left: 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .3rem .8rem; border-bottom: 1px solid var(--line);
  white-space: nowrap; vertical-align: top; }
th:first-child, td:first-child { text-align: left; }
small { display: block; font-size: .78rem; }
figure { margin: 1rem 0; }
.plot { width: 100%; max-width: 820px; height: auto; }
.plot text { fill: var(--soft); font-size: 12px; } .plot .infinite { fill: var(--bad); }
.grid { stroke: var(--line); } .whisker { stroke: var(--box); fill: none; }
.box { stroke: var(--box); fill: var(--fill); } .median { stroke: var(--box); stroke-width: 2.5; }
.point { fill: var(--ink); fill-opacity: .55; }
.slices { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-end; }
.slices figure { margin: .5rem 0; }
.slices img { image-rendering: pixelated; background: #000; max-width: 100%; height: auto; }
.reference, .prediction { color: #14171a; padding: 0 .4em; border-radius: 3px; }
.reference { background: rgb(0, 200, 255); } .prediction { background: rgb(255, 140, 0); }
.heat { color: #14171a; padding: 0 .4em; border-radius: 3px; background: rgb(255, 60, 190); }
details { margin: 2rem 0; } summary { cursor: pointer; }
"""
