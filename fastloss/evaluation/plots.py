"""Box plots as SVG, drawn by hand: no library is loaded in the page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import floor, isfinite, isnan, log10
from typing import NamedTuple

import numpy as np

from fastloss.evaluation.results import shown

WIDTH, ROW, TOP, BOTTOM, RIGHT = 720, 26, 10, 34, 70
MOST_POINTS = 60
"""Above as many values of a class, only those beyond the whiskers are drawn one by one."""


class Box(NamedTuple):
    """The values of one class, as they are drawn."""

    low: float
    first: float
    median: float
    third: float
    high: float
    points: tuple[int, ...]
    """Indices of the values that are drawn one by one."""


def box_of(values: np.ndarray) -> Box | None:
    """Quartiles, and whiskers to the last value within 1.5 of their distance (Tukey 1977).

    None: no value is finite.
    """
    where = np.flatnonzero(np.isfinite(values))
    if not len(where):
        return None
    finite = values[where]
    first, median, third = (float(each) for each in np.percentile(finite, (25, 50, 75)))
    reach = 1.5 * (third - first)
    within = finite[(finite >= first - reach) & (finite <= third + reach)]
    low, high = min(float(within.min()), first), max(float(within.max()), third)
    every = len(where) <= MOST_POINTS
    points = where if every else where[(finite < low) | (finite > high)]
    return Box(low, first, median, third, high, tuple(points.tolist()))


def box_plots(
    title: str, classes: Sequence[str], table: np.ndarray, samples: Sequence[str], unit: str
) -> str:
    """A row for each class, on one axis.

    Args:
        title: for those who cannot see it.
        classes, samples: names of columns and rows.
        table: (samples, classes); NaN is left out, infinite values are counted at the side.
        unit: of the values, "mm" or "".
    """
    finite = table[np.isfinite(table)]
    share = bool(len(finite)) and finite.min() >= 0 and finite.max() <= 1 and not unit
    ticks = ticks_of(0.0 if len(finite) == 0 else min(0.0, float(finite.min())),
                     1.0 if share or not len(finite) else float(finite.max()))  # fmt: skip
    left = 24 + 7 * min(28, max(map(len, classes), default=0))
    height = TOP + ROW * len(classes) + BOTTOM
    span = WIDTH - left - RIGHT

    def x(value: float) -> str:
        return f"{left + span * (value - ticks[0]) / (ticks[-1] - ticks[0]):.1f}"

    bottom = TOP + ROW * len(classes)
    parts = [
        f'<svg class="plot" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">'
    ]
    for tick in ticks:
        parts.append(f'<path class="grid" d="M{x(tick)} {TOP}V{bottom}"/>')
        parts.append(f'<text x="{x(tick)}" y="{bottom + 16}" text-anchor="middle">{tick:g}</text>')
    if unit:
        parts.append(f'<text x="{WIDTH - RIGHT + 16}" y="{bottom + 16}">{unit}</text>')
    for k, name in enumerate(classes):
        y = TOP + ROW * k + ROW / 2
        short = name if len(name) <= 28 else name[:27] + "…"
        parts.append(
            f'<text x="{left - 10}" y="{y + 4}" text-anchor="end">{escape(short)}'
            f"<title>{escape(name)}</title></text>"
        )
        values = table[:, k]
        box = box_of(values)
        if box is not None:
            parts += _box(box, y, x)
            parts += [_point(values[i], samples[i], y, i, x) for i in box.points]
        infinite = int(np.isinf(values).sum())
        if infinite:
            parts.append(
                f'<text class="infinite" x="{WIDTH - RIGHT + 16}" y="{y + 4}">{infinite} inf</text>'
            )
    return "".join([*parts, "</svg>"])


def _box(box: Box, y: float, x: object) -> list[str]:
    assert callable(x)
    left, right = float(x(box.first)), float(x(box.third))
    width = max(right - left, 1)
    return [
        f'<path class="whisker" d="M{x(box.low)} {y}H{left}M{right} {y}H{x(box.high)}"/>',
        f'<rect class="box" x="{left}" y="{y - 7}" width="{width:.1f}" height="14"/>',
        f'<path class="median" d="M{x(box.median)} {y - 7}v14"/>',
    ]


def _point(value: float, sample: str, y: float, index: int, x: object) -> str:
    assert callable(x)
    # Beside each other, always in the same way: the fractions of the golden ratio spread evenly.
    shift = 10 * ((index * 0.618034) % 1 - 0.5)
    return (
        f'<circle class="point" cx="{x(float(value))}" cy="{y + shift:.1f}" r="2.2">'
        f"<title>{escape(sample)}: {shown(float(value))}</title></circle>"
    )


def ticks_of(low: float, high: float, about: int = 6) -> list[float]:
    """Round numbers from at most ``low`` to at least ``high``."""
    if isnan(low + high) or not isfinite(high - low) or high <= low:
        high = low + 1
    rough = (high - low) / about
    power = 10.0 ** floor(log10(rough))
    step = power * next(each for each in (1, 2, 2.5, 5, 10) if each * power >= rough * 0.999)
    first, last = int(np.floor(low / step + 1e-9)), int(np.ceil(high / step - 1e-9))
    return [round(i * step, 12) for i in range(first, last + 1)]
