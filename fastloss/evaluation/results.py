"""What an evaluation of files found: the scores, their statistics, and what went wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite, isnan, nan
from typing import Any, NamedTuple

import numpy as np

from fastloss.evaluation.files import Case
from fastloss.metrics.scores import Scores


class Statistics(NamedTuple):
    """Statistics of one metric of one class over the cases."""

    mean: float
    """Of the finite values, and so is ``std``."""
    std: float
    """With n − 1; NaN below two values."""
    median: float
    """Of all values that are numbers, infinite ones included."""
    n: int
    """How many are finite."""
    infinite: int
    missing: int
    """How many are NaN: the metric has no value, as where both masks are empty."""


@dataclass(frozen=True)
class Results:
    """The scores of all cases that could be evaluated."""

    scores: Scores
    cases: tuple[Case, ...]
    """In the order of ``scores.samples``."""
    labels: Mapping[str, tuple[int, ...]]
    """For each class, which labels it unites."""
    spacings: tuple[tuple[float, ...], ...]
    """Of each case, by the axes z, y, x."""
    problems: tuple[tuple[str, str], ...]
    """Names of cases that were not evaluated, and why."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """The settings, for JSON and the page."""

    def statistics(self, metric: str) -> dict[str, Statistics]:
        """By class."""
        table = self.scores[metric]
        return {name: statistics(table[:, k]) for k, name in enumerate(self.scores.classes)}

    def text(self) -> str:
        """A table for each metric, a row for each class."""
        blocks = []
        width = max(map(len, (*self.scores.classes, *self.scores, "mean of classes")))
        for metric in self.scores:
            found = self.statistics(metric)
            header = ("mean", "std", "median", "n", "inf", "NaN")
            lines = [f"{metric:<{width}}" + "".join(f"{each:>9}" for each in header)]
            for name, each in found.items():
                cells = [shown(value) for value in each[:3]] + [str(count) for count in each[3:]]
                lines.append(f"{name:<{width}}" + "".join(f"{cell:>9}" for cell in cells))
            if len(found) > 1:
                mean = statistics([each.mean for each in found.values()]).mean
                totals = [sum(counts) for counts in list(zip(*found.values(), strict=True))[3:]]
                cells = [shown(mean), "", "", *map(str, totals)]
                lines.append(
                    f"{'mean of classes':<{width}}" + "".join(f"{cell:>9}" for cell in cells)
                )
            blocks.append("\n".join(lines))
        return "\n\n".join(blocks)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON has it: NaN is None, and infinity "Infinity"."""
        values = self.scores.values
        cases = [
            {
                "name": case.name,
                "prediction": str(case.prediction),
                "reference": str(case.reference),
                "spacing": list(spacing),
                "metrics": {
                    label: {name: plain(float(table[i, k])) for name, table in values.items()}
                    for k, label in enumerate(self.scores.classes)
                },
            }
            for i, (case, spacing) in enumerate(zip(self.cases, self.spacings, strict=True))
        ]
        return {
            **self.about,
            "classes": {name: list(labels) for name, labels in self.labels.items()},
            "summary": {
                name: {
                    label: {key: plain(value) for key, value in each._asdict().items()}
                    for label, each in self.statistics(name).items()
                }
                for name in self.scores
            },
            "cases": cases,
            "problems": [{"name": name, "problem": problem} for name, problem in self.problems],
        }


def statistics(values: Sequence[float] | np.ndarray) -> Statistics:
    """Of one metric of one class."""
    numbers = np.asarray(values, np.float64)
    known = numbers[~np.isnan(numbers)]
    finite = known[np.isfinite(known)]
    return Statistics(
        float(finite.mean()) if len(finite) else nan,
        float(finite.std(ddof=1)) if len(finite) > 1 else nan,
        # Not np.median: it makes NaN of two infinite values.
        _median(np.sort(known)) if len(known) else nan,
        len(finite),
        len(known) - len(finite),
        len(numbers) - len(known),
    )


def _median(ascending: np.ndarray) -> float:
    low, high = ascending[(len(ascending) - 1) // 2], ascending[len(ascending) // 2]
    return float(low if low == high else (low + high) / 2)


def plain(value: float) -> float | str | None:
    """A number as JSON has it."""
    if isinstance(value, float) and not isfinite(value):
        return None if isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def shown(value: float) -> str:
    """A number for people."""
    if isnan(value):
        return "–"
    if not isfinite(value):
        return "inf" if value > 0 else "-inf"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.4g}"
