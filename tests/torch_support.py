"""Helpers of the PyTorch tests: every term with every option, and tensors to try it on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support import example, need, one_hot

import fastloss as fl

try:
    import torch
except ImportError:
    torch = None  # type: ignore[assignment]


@pytest.fixture(autouse=True)
def needs_torch() -> None:
    """A mark for test modules: without PyTorch each test is skipped by name."""
    need("torch")


W3, W2 = [0.5, 1.0, 2.0], [1.5, 0.5]


class LogCoshDice(fl.RegionTerm):
    """A custom term."""

    def formula(
        self, overlap: np.ndarray, predicted: np.ndarray, reference: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        size = predicted + reference + self.smooth_dr
        dice = 1 - (2 * overlap + self.smooth_nr) / size
        slope = np.tanh(dice)
        return np.log(np.cosh(dice)), -2 * slope / size, slope * (1 - dice) / size


TERMS = [
    fl.CrossEntropy(),
    fl.CrossEntropy(weight=W3),
    fl.CrossEntropy(weight=2.0, label_smoothing=0.2, reduction="sum"),
    fl.CrossEntropy(weight=W3, label_smoothing=0.1, reduction="none"),
    fl.Focal(),
    fl.Focal(gamma=1.5, alpha=[0.25, 0.5, 0.75]),
    fl.Focal(gamma=0.5, alpha=0.3, reduction="sum"),
    fl.Focal(reduction="none"),
    fl.Dice(),
    fl.Dice(squared=True, batch=True, include_background=False, weight=W2),
    fl.Dice(reduction="none"),
    fl.Dice(reduction="none", batch=True, include_background=False),
    fl.Dice(reduction="sum", weight=W3, smooth_nr=0.0, smooth_dr=1.0),
    fl.Jaccard(squared=True),
    fl.Jaccard(reduction="none", weight=W3),
    fl.Tversky(alpha=0.3, beta=0.7),
    fl.Tversky(alpha=0.3, beta=0.7, gamma=0.75, include_background=False),
    fl.Tversky(gamma=2.0, batch=True, reduction="none"),
    fl.GeneralizedDice(),
    fl.GeneralizedDice(weighting="simple", batch=True, weight=W3),
    fl.GeneralizedDice(weighting="uniform", reduction="none", include_background=False),
    LogCoshDice(),
    LogCoshDice(reduction="none"),
]
SUMS = [
    fl.Dice() + 0.5 * fl.CrossEntropy(label_smoothing=0.1),
    2.0 * fl.Tversky(alpha=0.3, beta=0.7, gamma=0.75) + fl.Focal(),
    fl.Dice(reduction="none") + fl.CrossEntropy(reduction="none"),
]
PARTS = [*TERMS, *SUMS]
TOP_K = [fl.TopKCrossEntropy(k=30), fl.Dice() + fl.TopKCrossEntropy(k=100, weight=W3)]
"""Defined for softmax of label maps."""


def tensors(
    activation: str = "softmax",
    kind: str = "labels",
    weighted: bool = False,
    *,
    batch: int = 2,
    spatial: tuple[int, ...] = (2, 3),
    dtype: Any = np.float64,
    seed: int = 0,
) -> tuple[Any, Any, Any]:
    """Logits, a target and a voxel weight or None."""
    x, y = example(batch, 3, spatial, seed=seed, activation=activation, dtype=dtype)
    rng = np.random.default_rng(seed + 1)
    target: np.ndarray = y
    if kind == "one-hot":
        target = one_hot(y, 3)
    elif kind == "soft":
        target = rng.dirichlet(np.ones(3), (batch, *spatial)).transpose(
            0, -1, *range(1, 1 + len(spatial))
        )
    elif kind == "ignored":
        target = np.where(rng.random(y.shape) < 0.3, 255, y)
    w = torch.tensor(rng.uniform(0.5, 2, y.shape)) if weighted else None
    return torch.tensor(x), torch.tensor(np.ascontiguousarray(target)), w


def options(activation: str, kind: str) -> dict[str, Any]:
    """The options of `fastloss.Loss` that go with these tensors."""
    return {"activation": activation, "ignore_index": 255 if kind == "ignored" else None}


def value_and_gradient(call: Any, logits: Any, *arguments: Any) -> tuple[Any, Any]:
    """The value, and the gradient of its sum by the logits, taken by autograd."""
    leaf = logits.detach().clone().requires_grad_()
    value = call(leaf, *arguments)
    value.sum().backward()
    return value.detach(), leaf.grad
