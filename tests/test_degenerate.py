"""Empty inputs, infinities and NaN have the same defined result on every backend."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from support import assert_agree, example, one_hot, reference

import fastloss as fl
from fastloss.sums import FUNCTIONS, WEIGHTS, Sum

# Losses that request different sums, and so take different paths through the kernels; the terms'
# formulas are tested in test_terms.py. "both" and its parts have fast paths for two classes, few
# classes and dense targets; "labels" has sums that only the path of label maps computes.
TABLES = {
    "regions": fl.Dice() + fl.Tversky(gamma=0.75),
    "both": fl.Dice(smooth_nr=0, smooth_dr=0) + fl.CrossEntropy(),
    "labels": fl.Dice(squared=True) + fl.CrossEntropy(label_smoothing=0.1) + fl.Focal(),
    "general": fl.Focal() + fl.Focal(gamma=0.5) + fl.GeneralizedCrossEntropy() + fl.Brier(),
}
TABLES["everything"] = fl.Loss(*TABLES.values(), fl.GeneralizedDice(), fl.Dice(batch=True))
DTYPES = ("float16", "float32", "float64")
LOSS = fl.Dice() + fl.CrossEntropy()
ACTIVATIONS = ("softmax", "sigmoid", "none")
EXTREMES = {
    "voxel-wise": fl.CrossEntropy() + fl.Focal() + fl.Focal(gamma=0.5) + fl.Focal(gamma=0),
    "regions": fl.Dice() + fl.Dice(squared=True) + fl.Tversky(gamma=0.75),
    "both": fl.Dice() + fl.CrossEntropy(),
}


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def arrays(activation: str, *args: Any, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    options = {"dtype": np.float32, **options}
    return example(*args, activation=activation, **options)


def agree(loss: Any, x: np.ndarray, y: np.ndarray, w: Any = None) -> tuple[Any, np.ndarray]:
    """The result, checked to be finite and equal to the reference's."""
    value, gradient = loss.value_and_grad(x, y, w)
    assert np.isfinite(value).all()
    assert np.isfinite(gradient).all()
    expected = reference(loss, x, y, w)
    assert_agree(value, gradient, expected, np.sqrt(x.size) / max(x[:, 0].size, 1))
    return value, gradient


# ------------------------------------------------------------------ empty inputs


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_absent_classes(backend: str, activation: str) -> None:
    for name in TABLES:
        loss = fl.Loss(TABLES[name], activation=activation)
        x, y = arrays(activation, 2, 4, (300,))
        agree(loss, x, np.minimum(y, 1))
        agree(loss, x, np.zeros_like(y))


@pytest.mark.parametrize("activation", ["sigmoid", "none"])
def test_empty_dense_target(backend: str, activation: str) -> None:
    for name in TABLES:
        loss = fl.Loss(TABLES[name], activation=activation)
        x, _ = arrays(activation, 2, 3, (300,))
        agree(loss, x, np.zeros_like(x))
        agree(loss, x, np.ones_like(x))


def test_values_of_a_class_that_is_absent(backend: str) -> None:
    x = np.array([[[1.0, 1.0], [0.0, 0.0]]])  # predicted: two voxels of class 0, none of class 1
    y = np.array([[0, 0]])

    def value(term: fl.Term) -> Any:
        return fl.Loss(term, activation="none")(x, y)

    assert value(fl.Dice(smooth_nr=0, smooth_dr=0)) == 0
    assert value(fl.Dice()) == pytest.approx(0, abs=1e-15)
    assert value(fl.Dice(smooth_nr=0)) == pytest.approx(0.5, abs=1e-5)
    # Predicted everywhere but absent: with smoothing a little less than 1.
    both = fl.Loss(fl.Dice(reduction="none", smooth_nr=0.5, smooth_dr=0.5), activation="none")
    np.testing.assert_allclose(both(1 - x, y), [[1 - 0.5 / 2.5, 1 - 0.5 / 2.5]])


@pytest.mark.parametrize("how", ["labels", "dense", "weight"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_ignored_samples(backend: str, activation: str, how: str) -> None:
    for name in ("both", "labels", "everything"):
        loss = fl.Loss(TABLES[name], activation=activation, ignore_index=255)
        x, y = arrays(activation, 2, 3, (300,))
        target: Any = one_hot(y, 3) if how == "dense" else y.copy()
        w = np.ones(y.shape) if how == "weight" else None
        for ignored in (slice(1), slice(2)):  # one sample, then all of them
            if w is None:
                target[ignored] = 255
            else:
                w[ignored] = 0
            _, gradient = agree(loss, x, target, w)
            assert not gradient[ignored].any()
        value = loss(x, target, w)
        assert value == pytest.approx(0, abs=1e-12)


def test_a_mean_over_no_voxel_is_zero(backend: str) -> None:
    x, y = example(2, 3, (10,))
    w = np.ones(y.shape)
    w[1] = 0
    each = fl.CrossEntropy(reduction="none")(x, y, w)
    assert each[0, 0] > 0
    assert each[1, 0] == 0
    assert fl.CrossEntropy(weight=0)(x, y) == 0
    assert fl.CrossEntropy(weight=[0, 0, 1])(x, np.zeros_like(y)) == 0


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_one_voxel(backend: str, activation: str) -> None:
    for name in TABLES:
        loss = fl.Loss(TABLES[name], activation=activation)
        for spatial in ((), (1,), (1, 1, 1)):
            x, y = arrays(activation, 1, 3, spatial, dtype=np.float64)
            agree(loss, x, y)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_one_class(backend: str, activation: str) -> None:
    for name in TABLES:
        loss = fl.Loss(TABLES[name], activation=activation)
        x, _ = arrays(activation, 2, 1, (300,))
        if activation == "softmax":  # one class has probability 1
            value, gradient = agree(loss, x, np.zeros((2, 300), int))
            assert value == pytest.approx(0, abs=1e-6)
            assert np.abs(gradient).max() < 1e-8
        else:
            mask = np.random.default_rng(0).integers(0, 2, (2, 300))
            value, _ = agree(loss, x, mask)
            assert loss(x, mask[:, None]) == value


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", ["both", "everything"])
def test_no_voxel(backend: str, name: str, activation: str) -> None:
    loss = fl.Loss(TABLES[name], activation=activation)
    for spatial in ((0,), (3, 0), (0, 4, 2)):
        x = np.zeros((2, 3, *spatial), np.float32)
        for y in (np.zeros((2, *spatial), np.uint8), np.zeros_like(x)):
            value, gradient = loss.value_and_grad(x, y)
            assert value == pytest.approx(0, abs=1e-12)
            assert gradient.shape == x.shape


@pytest.mark.parametrize("name", ["both", "everything"])
def test_no_sample(backend: str, name: str) -> None:
    loss, x = TABLES[name], np.zeros((0, 3, 4), np.float32)
    for y in (np.zeros((0, 4), np.uint8), np.zeros_like(x)):
        value, gradient = loss.value_and_grad(x, y)
        assert value == pytest.approx(0, abs=1e-12)
        assert gradient.shape == x.shape
        assert loss(x, y, np.zeros((0, 4))) == value


# ------------------------------------------------------------------ single sums


class OneSum(fl.VoxelwiseTerm):
    """Any one sum, as a term."""

    reduction = "mean"

    def __init__(self, total: Sum) -> None:
        self.requires = frozenset({total})

    def linear(self, statistics: Any) -> tuple[dict[Any, Any], np.ndarray]:
        return dict.fromkeys(self.requires, np.array([1.0, 2.0, 0.5])[: statistics.classes]), (
            statistics.voxels
        )


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("classes", [2, 3])
def test_no_path_leaves_out_a_sum_that_it_does_not_know(
    backend: str, classes: int, dense: bool
) -> None:
    x, y = arrays("softmax", 2, classes, (300,))
    g = np.random.default_rng(3).uniform(size=x.shape)
    for weight, function in itertools.product(WEIGHTS, FUNCTIONS):
        term = OneSum(Sum(weight, function, 1.5 if FUNCTIONS[function] else 0.0))
        agree(fl.Loss(term), x, g if dense else y)
        agree(LOSS + term, x, g if dense else y)


# ------------------------------------------------------------------ far out of range


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_large_logits(backend: str, activation: str) -> None:
    for name in TABLES:
        loss = fl.Loss(TABLES[name], activation=activation)
        rng = np.random.default_rng(0)
        steps, y = rng.choice([-1.0, 0.0, 1.0, 0.5], (2, 3, 300)), rng.integers(0, 3, (2, 300))
        for dtype in DTYPES:
            for size in (100.0, 1e4):
                agree(loss, (size * steps).astype(dtype), y)
                agree(loss, (size * steps[:, :2]).astype(dtype), np.minimum(y, 1))


@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_softmax_does_not_see_a_shift(backend: str, shift: float) -> None:
    loss = fl.Dice() + fl.CrossEntropy()
    x, y = example(2, 3, (300,))
    x = np.round(x * 64) / 64  # so that the shift is exact
    value, gradient = loss.value_and_grad(x, y)
    moved, gradient_moved = loss.value_and_grad(x + shift, y)
    assert moved == pytest.approx(value, rel=1e-12)
    np.testing.assert_allclose(gradient_moved, gradient, rtol=1e-10, atol=1e-16)


@pytest.mark.parametrize("name", EXTREMES)
@pytest.mark.parametrize("kind", ["labels", "dense"])
def test_infinity_in_one_class_is_certainty(backend: str, name: str, kind: str) -> None:
    for dtype, classes in itertools.product(DTYPES, (2, 3)):
        loss = EXTREMES[name]
        x, y = example(2, classes, (304,), dtype=dtype)
        certain = x.copy()
        np.put_along_axis(certain, y[:, None], np.inf, axis=1)
        value, gradient = agree(loss, certain, y if kind == "labels" else one_hot(y, classes))
        assert value == pytest.approx(0, abs=1e-5)
        assert not gradient.any()


@pytest.mark.parametrize("classes", [3, 20, 40, 300])
@pytest.mark.parametrize("kind", ["labels", "dense"])
def test_infinities_share_the_probability(backend: str, classes: int, kind: str) -> None:
    for dtype in DTYPES:
        x, y = example(1, classes, (64,), dtype=dtype)
        y[:] = 1
        x[:, 1] = x[:, classes - 1] = np.inf
        x[:, 0] = -np.inf
        target = y if kind == "labels" else one_hot(y, classes)
        value, gradient = fl.CrossEntropy().value_and_grad(x, target)
        assert value == pytest.approx(np.log(2), rel=1e-6)
        expected = np.zeros(x.shape)
        expected[:, 1], expected[:, classes - 1] = -0.5 / y.size, 0.5 / y.size
        np.testing.assert_allclose(np.float64(gradient), expected, rtol=1e-6)


@pytest.mark.parametrize("name", EXTREMES)
@pytest.mark.parametrize("kind", ["labels", "dense"])
def test_minus_infinity_excludes_a_class(backend: str, name: str, kind: str) -> None:
    for dtype in DTYPES:
        x, y = example(2, 4, (300,), dtype=dtype)
        y = np.minimum(y, 2)
        x[:, 3, ::2] = -np.inf
        value, gradient = agree(EXTREMES[name], x, y if kind == "labels" else one_hot(y, 4))
        assert np.isfinite(value)
        assert not gradient[:, 3, ::2].any()


def test_an_excluded_target_costs_infinitely(backend: str) -> None:
    for dtype, kind in itertools.product(DTYPES, ("labels", "dense")):
        x, y = example(2, 3, (300,), dtype=dtype)
        x[0, y[0, 7], 7] = -np.inf
        target = y if kind == "labels" else one_hot(y, 3)
        for term in (fl.CrossEntropy(), fl.Focal(), fl.Focal(gamma=0.5)):
            value, gradient = term.value_and_grad(x, target)
            assert value == np.inf
            assert np.isfinite(gradient).all()
            assert gradient[0, y[0, 7], 7] < 0
        # With weight 0 it costs nothing.
        weight = np.ones(3)
        weight[y[0, 7]] = 0
        assert np.isfinite(fl.CrossEntropy(weight=weight)(x, target))


@pytest.mark.parametrize("name", EXTREMES)
def test_sigmoid_of_infinities(backend: str, name: str) -> None:
    for dtype in DTYPES:
        loss = fl.Loss(EXTREMES[name], activation="sigmoid")
        x, y = example(2, 3, (300,), dtype=dtype)
        g = one_hot(y, 3)
        x[..., ::3] = np.where(g[..., ::3] > 0, np.inf, -np.inf)
        _, gradient = agree(loss, x, g)
        assert not gradient[..., ::3].any()
        if name == "voxel-wise":
            assert loss(-x, g) == np.inf
            assert np.isfinite(loss.gradient(-x, g)).all()


def test_probabilities_of_zero_and_one(backend: str) -> None:
    for dtype in DTYPES:
        loss = fl.Loss(EXTREMES["voxel-wise"] + EXTREMES["regions"], activation="none")
        y = np.random.default_rng(0).integers(0, 3, (2, 300))
        x = one_hot(y, 3, dtype)
        assert loss(x, y) == pytest.approx(0, abs=1e-5)
        wrong = np.roll(x, 1, axis=1)
        assert loss(wrong, y) == np.inf
        dice = fl.Loss(EXTREMES["regions"], activation="none")
        agree(dice, x, y)
        agree(dice, wrong, y)


# ------------------------------------------------------------------ NaN


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_in_nan_out(backend: str, activation: str) -> None:
    for name in TABLES:
        loss = fl.Loss(TABLES[name], activation=activation)
        for dtype, classes, at in itertools.product(DTYPES, (2, 3), (0, 150, 299)):
            x, y = arrays(activation, 2, classes, (300,), dtype=dtype)
            x[1, y[1, at], at] = np.nan  # −log p_y does not depend on another class's probability
            value, gradient = loss.value_and_grad(x, y)
            assert np.isnan(value)
            assert np.isnan(gradient[1, y[1, at], at])
            x[1, :, at] = 0.3
            x[1, (y[1, at] + 1) % classes, at] = np.nan
            if activation == "softmax":
                assert np.isnan(loss(x, y))


@pytest.mark.parametrize("classes", [2, 3, 20])
def test_memory_of_ones_is_nan(backend: str, classes: int) -> None:
    """All bits set, as in uninitialised memory, is another NaN than NumPy's, and also gives NaN."""
    for dtype, kind in itertools.product(DTYPES, ("labels", "dense")):
        x, y = example(1, classes, (16,), dtype=dtype)
        x.view(f"i{x.itemsize}")[0, 1, 3] = -1
        assert np.isnan(x[0, 1, 3])
        value, gradient = LOSS.value_and_grad(x, y if kind == "labels" else one_hot(y, classes))
        assert np.isnan(value)
        assert np.isnan(gradient[0, :, 3]).all()


@pytest.mark.parametrize("how", ["labels", "class", "dense", "weight", "mask"])
def test_voxels_that_do_not_count_may_hold_anything(backend: str, how: str) -> None:
    for activation in ACTIVATIONS:
        for dtype, bad in itertools.product(DTYPES, (np.nan, np.inf, -np.inf)):
            ignore_index = 2 if how == "class" else 255
            terms = (*EXTREMES.values(), fl.CrossEntropy(label_smoothing=0.1))
            loss = fl.Loss(*terms, activation=activation, ignore_index=ignore_index)
            x, y = arrays(activation, 2, 3, (300,), dtype=dtype)
            ignored = np.random.default_rng(1).uniform(size=y.shape) < 0.3
            ignored[:, :3] = False
            w = None
            if how in ("weight", "mask"):
                w = ~ignored if how == "mask" else np.where(ignored, 0, 0.7)
            elif how == "dense":
                y = np.where(ignored[:, None], 255, one_hot(y, 3))
            else:
                y = np.where(ignored, ignore_index, y)
                ignored = y == ignore_index
            expected, expected_gradient = loss.value_and_grad(x, y, w)
            x[np.broadcast_to(ignored[:, None], x.shape)] = bad
            value, gradient = loss.value_and_grad(x, y, w)
            assert value == expected
            np.testing.assert_array_equal(gradient, expected_gradient)
            assert not gradient[np.broadcast_to(ignored[:, None], x.shape)].any()
            assert np.isfinite(gradient).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_in_a_dense_target(backend: str, activation: str) -> None:
    loss = fl.Loss(fl.Dice(), fl.CrossEntropy(), activation=activation)
    x, y = arrays(activation, 2, 3, (300,))
    g = one_hot(y, 3, np.float32)
    g[0, 1, 5] = np.nan
    assert np.isnan(loss(x, g))
    w = np.ones(y.shape, np.float32)
    w[0, 5] = 0
    assert np.isfinite(loss(x, g, w))
