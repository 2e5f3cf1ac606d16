"""Cross-entropy of the voxels whose label is least likely."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import BACKENDS, finite_differences, need, need_backend

import fastloss as fl


def kept_voxels(
    x: np.ndarray, y: np.ndarray, threshold: float, min_kept: int, m: np.ndarray
) -> np.ndarray:
    """Which voxels are kept, (B, *spatial), by a sort of p_y."""
    p = np.exp(x - x.max(axis=1, keepdims=True))
    p = p / p.sum(axis=1, keepdims=True)
    own = np.take_along_axis(p, np.where(y == 255, 0, y)[:, None], 1)[:, 0]
    counted = (y != 255) & (m > 0)
    kept = counted & (own < threshold)
    if kept.sum() < min(min_kept, counted.sum()):
        last = np.sort(own[counted])[min(min_kept, counted.sum()) - 1]
        kept = counted & (own <= last)
    return kept


@pytest.mark.parametrize("name", BACKENDS)
@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.integers(1, 3),
    classes=st.integers(2, 5),
    spatial=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    threshold=st.floats(0.05, 1),
    min_kept=st.integers(0, 30),
    weighted=st.booleans(),
)
def test_as_the_cross_entropy_of_the_kept(
    name: str,
    seed: int,
    batch: int,
    classes: int,
    spatial: list[int],
    threshold: float,
    min_kept: int,
    weighted: bool,
) -> None:
    """That of `fastloss.CrossEntropy` with the other voxels masked."""
    need_backend(name)
    rng = np.random.default_rng(seed)
    x = 2 * rng.normal(size=(batch, classes, *spatial))
    y = rng.integers(0, classes, (batch, *spatial))
    y[rng.random(y.shape) < 0.2] = 255
    w = rng.integers(0, 3, y.shape).astype(float) if weighted else np.ones(y.shape)
    weight = rng.uniform(0.5, 2, classes).tolist() if weighted else None
    kept = kept_voxels(x, y, threshold, min_kept, w)
    plain = fl.Loss(fl.CrossEntropy(weight=weight), ignore_index=255)
    expected, expected_gradient = plain.value_and_grad(x, y, w * kept)
    term = fl.OHEMCrossEntropy(threshold=threshold, min_kept=min_kept, weight=weight)
    with fl.use_backend(name):
        value, gradient = fl.Loss(term, ignore_index=255).value_and_grad(
            x, y, w if weighted else None
        )
    assert value == pytest.approx(expected, rel=1e-9, abs=1e-12)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-7, atol=1e-12)


def test_sums_ties_and_nothing_kept() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(1, 3, 4, 5)), rng.integers(0, 3, (1, 4, 5))
    term = fl.OHEMCrossEntropy(threshold=0.4, min_kept=2)
    both = 0.5 * term + fl.Dice()
    value, gradient = both.value_and_grad(x, y)
    one, two = term.value_and_grad(x, y), fl.Dice().value_and_grad(x, y)
    assert value == pytest.approx(0.5 * one[0] + two[0], rel=1e-12)
    np.testing.assert_allclose(gradient, 0.5 * one[1] + two[1], rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(one[1], finite_differences(term, x, y), atol=1e-8)
    # All tie: all are kept, though one would do.
    ties = fl.OHEMCrossEntropy(threshold=0.1, min_kept=1)
    assert ties(np.zeros_like(x), y) == pytest.approx(np.log(3))
    # None is below the threshold, and none need be.
    none = fl.OHEMCrossEntropy(threshold=0.1, min_kept=0)
    value, gradient = none.value_and_grad(np.zeros_like(x), y)
    assert value == 0
    assert not gradient.any()
    assert fl.OHEMCrossEntropy(threshold=1)(x, y) == pytest.approx(fl.CrossEntropy()(x, y))
    masked = x.copy()
    masked[0, 0, 0, 0] = np.nan
    w = np.ones(y.shape)
    w[0, 0, 0] = 0
    assert np.isfinite(term(masked, y, w))
    assert np.isnan(term(masked, y))


def test_autograd() -> None:
    torch = need("torch")
    import fastloss.torch as ft

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 3, 6, 5)), rng.integers(0, 3, (2, 6, 5))
    module = ft.OHEMCrossEntropy(threshold=0.5, min_kept=4, weight=[1, 2, 3])
    logits = torch.tensor(x, requires_grad=True)
    result = module(logits, torch.tensor(y))
    result.backward()
    term = fl.OHEMCrossEntropy(threshold=0.5, min_kept=4, weight=[1, 2, 3])
    value, gradient = term.value_and_grad(x, y)
    assert float(result.detach()) == value
    np.testing.assert_allclose(logits.grad.numpy(), gradient, rtol=1e-9)


def test_errors() -> None:
    x, y = np.zeros((1, 3, 4)), np.zeros((1, 4), int)
    term = fl.OHEMCrossEntropy
    calls: Any = (
        (ValueError, "^threshold: ", lambda: term(threshold=0)),
        (ValueError, "^threshold: ", lambda: term(threshold=1.1)),
        (ValueError, "^min_kept: ", lambda: term(min_kept=-1)),
        (TypeError, "^min_kept: ", lambda: term(min_kept=0.5)),
        (ValueError, "^weight: ", lambda: term(weight=[1, 2])(x, y)),
        (ValueError, "^target: OHEMCrossEntropy takes a label map", lambda: term()(x, x)),
        (ValueError, "^activation: OHEM", lambda: fl.Loss(term(), activation="sigmoid")(x, y)),
        (ValueError, "^statistics: OHEMCrossEntropy is no", lambda: term().statistics(x, y)),
        (ValueError, "^terms: expected at most one", lambda: term() + fl.TopKCrossEntropy()),
    )
    for error, message, call in calls:
        with pytest.raises(error, match=message):
            call()
