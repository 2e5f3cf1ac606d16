"""How good a predicted label map is: metrics of each class, and the Dice of each lesion."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from fastloss.compare.data import Volume
from fastloss.compare.records import LesionScore, Score
from fastloss.metrics import evaluate, lesions
from fastloss.metrics.evaluate import METRICS, PATTERNS
from fastloss.metrics.metric import find_metrics

ENOUGH = 3
"""A class has lesions if it has as many components in some case: organs may come in pairs."""


@dataclass(frozen=True)
class Measures:
    """The metrics and their options, as in `fastloss.metrics.evaluate`."""

    metrics: tuple[str, ...] = ("dice", "hd95", "nsd")
    definition: str = "deepmind"
    tolerance: float = 2.0
    """In mm."""

    def check(self) -> None:
        """ValueError: a metric that is not there."""
        find_metrics(self.metrics, METRICS, PATTERNS)
        if not self.tolerance >= 0:
            raise ValueError(f"--tolerance: expected at least 0, got {self.tolerance}")


@dataclass(frozen=True)
class Run:
    """A training: a loss, a seed and a fold."""

    loss: str
    seed: int
    fold: int

    def __str__(self) -> str:
        return f"{self.loss}, seed {self.seed}, fold {self.fold}"


def judge(
    run: Run,
    prediction: np.ndarray,
    case: Volume,
    classes: Sequence[str],
    measures: Measures,
) -> tuple[list[Score], list[LesionScore]]:
    """The scores of every class but the background, and of each component of the reference.

    Raises:
        ValueError: a prediction of another shape, or of labels that are no class.
    """
    if prediction.shape != case.labels.shape:
        raise ValueError(
            f"the prediction of {case.name} has shape {prediction.shape}, expected "
            f"{case.labels.shape}"
        )
    largest = int(prediction.max())
    if largest >= len(classes):
        raise ValueError(
            f"the prediction of {case.name} holds label {largest}, expected below {len(classes)}"
        )
    pair = prediction[None], case.labels[None]
    common: dict[str, Any] = {
        "classes": {name: (index,) for index, name in enumerate(classes) if index},
        "ignore_index": len(classes),
        "spacing": case.spacing,
    }
    table = evaluate(
        *pair,
        metrics=measures.metrics,
        definition=measures.definition,
        tolerance=measures.tolerance,
        **common,
    )
    volume = prod(case.spacing)
    sizes = np.bincount(case.labels.ravel(), minlength=len(classes)) * volume
    key = run.loss, run.seed, run.fold, case.name
    scores = [
        Score(*key, metric, name, float(table[metric][0, k]), float(sizes[k + 1]))
        for metric in measures.metrics
        for k, name in enumerate(table.classes)
    ]
    found = [each for each in lesions(*pair, **common) if each.side == "reference"]
    single = [LesionScore(*key, each.label, each.volume, each.dice) for each in found]
    return scores, single


def of_lesions(scores: Sequence[LesionScore]) -> list[LesionScore]:
    """Those of the classes that have lesions: see `ENOUGH`."""
    counts = Counter((s.loss, s.seed, s.fold, s.case, s.label) for s in scores)
    several = {key[-1] for key, count in counts.items() if count >= ENOUGH}
    return [score for score in scores if score.label in several]


def mean_dice(prediction: np.ndarray, case: Volume, classes: Sequence[str]) -> float:
    """Of the classes that either has; NaN if there is none."""
    named = {name: (index,) for index, name in enumerate(classes) if index}
    scores = evaluate(
        prediction[None],
        case.labels[None],
        metrics=("dice",),
        classes=named,
        ignore_index=len(classes),
    )
    return float(scores.mean()["dice"])
