"""Sums over chunks of a volume: they add, travel, and refuse to mix."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import numpy as np
import pytest
from support import example, one_hot

import fastloss as fl

LOSSES = {
    "regions": fl.Dice() + fl.Jaccard(squared=True) + fl.GeneralizedDice(),
    "voxel-wise": fl.CrossEntropy(label_smoothing=0.1, weight=[1, 2, 3]) + fl.Focal(gamma=1.5),
    "both": fl.Dice(batch=True) + fl.CrossEntropy(),
    "per sample": fl.Dice(reduction="none") + fl.CrossEntropy(reduction="none"),
}


def chunks(n: int) -> list[slice]:
    return [slice(0, 3), slice(3, 4), slice(4, n)]


@pytest.mark.parametrize("name", LOSSES)
def test_chunks_add_up(backend: str, name: str) -> None:
    for activation, dense in itertools.product(("softmax", "sigmoid"), (False, True)):
        loss = fl.Loss(LOSSES[name], activation=activation, ignore_index=255)
        x, y = example(2, 3, (11, 40))
        y[:, 2, :7] = 255
        w = np.random.default_rng(3).uniform(size=y.shape)
        target = one_hot(y, 3) if dense else y
        whole, gradient = loss.value_and_grad(x, target, w)

        cut = [(x[:, :, s], target[..., s, :], w[:, s]) for s in chunks(11)]
        total = sum(loss.statistics(*chunk) for chunk in cut)
        np.testing.assert_allclose(loss.value(total), whole, rtol=1e-12)
        parts = [loss.gradient(*chunk, statistics=total) for chunk in cut]
        np.testing.assert_allclose(np.concatenate(parts, axis=2), gradient, rtol=1e-10, atol=1e-15)


def test_chunk_gradient_into_out_with_upstream(backend: str) -> None:
    loss = LOSSES["both"]
    x, y = example(2, 3, (10, 40), dtype=np.float32)
    total = sum(loss.statistics(x[:, :, s], y[:, s]) for s in chunks(10))
    out = np.full_like(x, np.nan)
    for s in chunks(10):
        loss.gradient(x[:, :, s], y[:, s], statistics=total, out=out[:, :, s], upstream=8.0)
    np.testing.assert_allclose(out, 8 * loss.gradient(x, y), rtol=1e-5, atol=1e-8)


def test_value_of_own_statistics_is_the_value(backend: str) -> None:
    x, y = example(2, 3, (300,), dtype=np.float32)
    for loss in LOSSES.values():
        value = loss.value(loss.statistics(x, y))
        np.testing.assert_array_equal(value, loss(x, y))
        assert value.dtype == np.float32
    assert fl.Dice().value(fl.Dice().statistics(x, y)) == fl.Dice()(x, y)


def test_order_of_the_sum_matters_to_rounding_only(backend: str) -> None:
    x, y = example(2, 3, (10, 40))
    loss = LOSSES["both"]
    a, b, c = (loss.statistics(x[:, :, s], y[:, s]) for s in chunks(10))
    assert float(loss.value(a + b + c)) == pytest.approx(float(loss.value(c + (b + a))), rel=1e-13)


def test_what_the_sums_are(backend: str) -> None:
    x = np.log(np.array([[[0.5, 0.25], [0.5, 0.75]]]))
    statistics = fl.Dice().statistics(x, np.array([[0, 1]]), np.array([[1.0, 2.0]]))
    assert statistics.batch_size == 1
    assert statistics.classes == 2
    np.testing.assert_allclose(statistics.voxels, [3.0])
    np.testing.assert_allclose(statistics["reference"], [[1.0, 2.0]])
    np.testing.assert_allclose(statistics["predicted"], [[1.0, 2.0]])
    np.testing.assert_allclose(statistics["overlap"], [[0.5, 1.5]])


def test_statistics_are_small_and_pickle(backend: str) -> None:
    x, y = example(2, 3, (10, 400))
    loss = LOSSES["both"]
    statistics = loss.statistics(x, y)
    text = pickle.dumps(statistics)
    assert len(text) < 5_000
    for again in (pickle.loads(text), copy.deepcopy(statistics)):
        np.testing.assert_array_equal(again.sums, statistics.sums)
        assert loss.value(again) == loss.value(statistics)
        assert loss.value(again + statistics) == loss.value(statistics + statistics)
        np.testing.assert_array_equal(loss.gradient(x, y, statistics=again), loss.gradient(x, y))


def test_adding_leaves_both_sides_alone() -> None:
    x, y = example(2, 3, (10,))
    a, b = (fl.Dice().statistics(x, y) for _ in range(2))
    before = a.sums.copy()
    assert sum([a]) is a
    total = a + b
    np.testing.assert_array_equal(a.sums, before)
    np.testing.assert_array_equal(total.sums, 2 * before)


def test_float64_chunks_make_the_value_float64() -> None:
    x, y = example(2, 3, (10,))
    loss = fl.Dice()
    single, double = loss.statistics(x.astype(np.float32), y), loss.statistics(x, y)
    assert loss.value(single).dtype == np.float32
    assert loss.value(single + double).dtype == np.float64


def statistics_of(loss: Any, batch: int = 2, classes: int = 3, dense: bool = False) -> Any:
    x, y = example(batch, classes, (10,))
    return loss.statistics(x, one_hot(y, classes) if dense else y)


@pytest.mark.parametrize(
    "other",
    [
        lambda: statistics_of(fl.Jaccard(squared=True)),
        lambda: statistics_of(fl.CrossEntropy()),
        lambda: statistics_of(fl.Loss(fl.Dice(), activation="sigmoid")),
        lambda: statistics_of(fl.Loss(fl.Dice(), ignore_index=1)),
        lambda: statistics_of(fl.Dice(), batch=1),
        lambda: statistics_of(fl.Dice(), classes=4),
        lambda: statistics_of(fl.Dice(), dense=True),
    ],
)
def test_sums_of_different_losses_do_not_mix(other: Any) -> None:
    loss = fl.Dice()
    x, y = example(2, 3, (10,))
    with pytest.raises(ValueError, match="statistics"):
        loss.statistics(x, y) + other()
    with pytest.raises(ValueError, match="statistics"):
        loss.gradient(x, y, statistics=other())


def test_terms_on_the_same_sums_share_statistics() -> None:
    x, y = example(2, 3, (10,))
    statistics = fl.Dice().statistics(x, y)
    assert fl.Tversky(alpha=0.2).value(statistics) == fl.Tversky(alpha=0.2)(x, y)


@pytest.mark.parametrize("wrong", [None, 3.0, np.zeros(3), "sums"])
def test_what_is_no_statistics(wrong: Any) -> None:
    with pytest.raises(TypeError, match="statistics"):
        fl.Dice().value(wrong)
    with pytest.raises(TypeError):
        statistics_of(fl.Dice()) + wrong
    with pytest.raises(TypeError):
        statistics_of(fl.Dice()) + 1


def test_value_checks_the_class_count() -> None:
    plain, weighted = fl.Dice(), fl.Dice(weight=[1, 2, 3])
    with pytest.raises(ValueError, match="weight"):
        weighted.value(statistics_of(plain, classes=4))
