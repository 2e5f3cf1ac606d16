"""What is right, in float64, and how far from it a result is."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from operator import add

import numpy as np

import fastloss as fl
from fastloss.bench.inputs import Case
from fastloss.bench.losses import make_loss

_CHUNK = 1 << 21  # logits at a time: the reference backend keeps some twenty arrays of them


@dataclass(frozen=True, eq=False)
class Truth:
    value: float
    gradient: np.ndarray

    def value_error(self, value: float) -> float:
        """|value − truth| / |truth|."""
        return abs(value - self.value) / abs(self.value)

    def gradient_error(self, gradient: np.ndarray) -> float:
        """‖gradient − truth‖ / ‖truth‖."""
        wrong = norm = 0.0
        for ours, right in zip(gradient, self.gradient, strict=True):
            for a, b in zip(ours, right, strict=True):
                wrong += float(np.square(a.astype(np.float64) - b).sum())
                norm += float(np.square(b).sum())
        return float(np.sqrt(wrong / norm))


def find_truth(case: Case, loss_name: str) -> Truth:
    """Value and gradient from the reference backend, chunk by chunk, on the logits as they are."""
    loss = make_loss(loss_name)
    step = max(1, _CHUNK * case.logits.shape[2] // case.count)
    chunks = [slice(i, i + step) for i in range(0, case.logits.shape[2], step)]
    dense = case.target.ndim == case.logits.ndim

    def chunk(part: slice) -> tuple[np.ndarray, np.ndarray]:
        target = case.target[:, :, part] if dense else case.target[:, part]
        return case.logits[:, :, part].astype(np.float64), target

    gradient = np.empty(case.logits.shape)
    with fl.use_backend("reference"):
        statistics = reduce(add, (loss.statistics(*chunk(part)) for part in chunks))
        value = float(loss.value(statistics))
        for part in chunks:
            gradient[:, :, part] = loss.gradient(*chunk(part), statistics=statistics)
    return Truth(value, gradient)
